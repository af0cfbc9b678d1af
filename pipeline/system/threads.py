"""Independent parts of one job on several CPU threads.

PyTorch's own threads share each operation and wait for each other after it. This wastes much of their time if
operations are short, and more if another process keeps a core busy. Independent parts run faster with a thread each.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipeline.system.neighbours import usable_cores

GROUP = 8
"""Files that a thread takes at a time: to hand one over takes as long as to read a small one."""

Read = TypeVar("Read")
Part = TypeVar("Part")


def for_each(parts: Iterable[Part], work: Callable[[Part], None]) -> None:
    """Call `work` on every part, on as many threads as PyTorch uses for one operation.

    Args:
        parts: May be processed in any order and at once.
        work: Called with each part. With several threads PyTorch does not divide its operations further.
    """
    import torch  # takes seconds, which those who only prefetch are spared

    parts, num_threads = list(parts), torch.get_num_threads()
    if num_threads == 1 or len(parts) < 2:
        for part in parts:
            work(part)
        return
    inference = torch.is_inference_mode_enabled()  # each thread has a mode of its own

    def run(part: Part) -> None:
        with torch.inference_mode(inference):
            work(part)

    for _ in _pool(num_threads).map(run, parts):  # raises what a thread raised
        pass


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    """Start threads whose operations PyTorch does not divide."""
    import torch

    pool, started = ThreadPoolExecutor(num_threads, "part"), threading.Barrier(num_threads)

    def start(_: int) -> int:
        started.wait()
        return torch.get_num_threads()

    # A thread takes PyTorch's setting over when it first asks for it, and keeps it.
    torch.set_num_threads(1)
    try:
        assert set(pool.map(start, range(num_threads))) == {1}
    finally:
        torch.set_num_threads(num_threads)
    return pool


if hasattr(os, "register_at_fork"):  # threads do not survive a fork, which Windows does not have
    os.register_at_fork(after_in_child=_pool.cache_clear)


class Budget:
    """An amount that threads share; whoever takes more than is left waits. One who takes more than all of it is alone.

    Args:
        total: All of it.
    """

    def __init__(self, total: int) -> None:
        self._total, self._taken, self._waiting, self._changed = total, 0, 0, threading.Condition()

    @contextlib.contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Hold an amount; a thread takes one at a time."""
        with self._changed:
            while self._taken and self._taken + amount > self._total:
                self._waiting += 1
                self._changed.wait()
                self._waiting -= 1
            self._taken += amount
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                if self._waiting:
                    self._changed.notify_all()


def prefetch(
    parts: Iterable[Part], read: Callable[[Part], Read], depth: int = 1, num_threads: int = 1
) -> Generator[Read, None, None]:
    """Read parts in order, the next ones in a thread while the caller works on the last.

    At most `depth` parts are read ahead of the caller's. The threads end when the iterator is exhausted or closed,
    after the parts that they are reading.

    Args:
        parts: What to read.
        read: Called with each part, in a thread; with one thread, one after another.
        depth: Parts to read ahead, at least 1.
        num_threads: How many read at once, `depth` at most.

    Yields:
        What `read` returned, in the order of `parts`.

    Raises:
        BaseException: Whatever `read` raised, where its part would have been yielded.
    """
    pool, ahead = ThreadPoolExecutor(num_threads, "prefetch"), collections.deque[Future[Read]]()
    try:
        for part in parts:
            ahead.append(pool.submit(read, part))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(parts: Iterable[Part], read: Callable[[Part], Read]) -> Generator[Read, None, None]:
    """Read parts on all cores, and yield the results in order; see `prefetch`. A few are read ahead."""
    return prefetch(parts, read, depth=3 * usable_cores(), num_threads=usable_cores())


def grouped(parts: Iterable[Part], size: Callable[[], int] = lambda: GROUP) -> Iterator[list[Part]]:
    """Yield parts together in lists, each time as many as `size` says then."""
    left = iter(parts)
    while group := list(itertools.islice(left, size())):
        yield group
