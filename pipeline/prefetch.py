"""Reading ahead: the next part is read by a thread while the one before it is worked on."""

from __future__ import annotations

import collections
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")
Read = TypeVar("Read")


def prefetch(parts: Iterable[Part], read: Callable[[Part], Read], depth: int = 1) -> Generator[Read, None, None]:
    """Read parts in order, the next ones in a thread while the caller works on the last.

    At most `depth` parts are read beyond the one that the caller holds. The thread ends when the iterator is exhausted
    or closed; a part being read then is waited for.

    Args:
        parts: What to read.
        read: Called with each part, in the thread, one after another.
        depth: Parts to read ahead, at least 1.

    Yields:
        What `read` returned, in the order of `parts`.

    Raises:
        BaseException: Whatever `read` raised, where its part would have been yielded.
    """
    pool, ahead = ThreadPoolExecutor(1, "prefetch"), collections.deque[Future[Read]]()
    try:
        for part in parts:
            ahead.append(pool.submit(read, part))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
