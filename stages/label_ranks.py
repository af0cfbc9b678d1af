"""The ranks that share a view recipe's labelling: each holds a lock of its own while it is at work."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.runtime import current_ranks
from pipeline.storage import is_locked

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 10.0


def lock_of(work: Path, rank: int) -> Path:
    """Return a rank's lock file, beside the directory of the parts."""
    return work.with_name(f"{work.name}-{rank}.lock")


def ranks_at_work(work: Path) -> set[int]:
    """Return the other ranks that hold their lock, of whatever group.

    A rank may outlive its group: without torchrun nobody ends it when rank 0 dies.
    """
    own = current_ranks().rank
    name = re.compile(re.escape(work.name) + r"-(\d+)\.lock")
    found = {int(match[1]): file for file in work.parent.iterdir() if (match := name.fullmatch(file.name))}
    return {rank for rank, file in found.items() if rank != own and is_locked(file)}


def label_for_others(
    say: Callable[[str], None],
    work: Path,
    views: Iterable[int],
    *,
    is_finished: Callable[[int], bool],
    label: Callable[[int], None],
) -> None:
    """Return when every view is labelled and no other rank is at work, labelling what nobody else does.

    So rank 0 never waits for a rank that died, failed, or finished without being of use (one that found other
    libraries than rank 0 did writes parts that rank 0 does not take), and never deletes the file that another is
    about to rename. One that starts late finds some of its work done.

    Args:
        say: Prints a line.
        work: The directory of the parts.
        views: The views wanted.
        is_finished: Whether a view is labelled.
        label: Labels a view.
    """
    left, said, taken = list(views), time.monotonic(), 0
    while True:
        # Looked at before the parts: a rank that ends in between has written its views.
        busy = ranks_at_work(work)
        left = [view for view in left if not is_finished(view)]
        abandoned = [view for view in left if view % current_ranks().world_size not in busy]
        if abandoned:
            label(abandoned[0])
            taken += 1
        elif not busy:
            break
        else:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            say(f"{len(left)} views to go; ranks at work besides this one: {sorted(busy) or 'none'}")
            said = time.monotonic()
    if taken:
        say(f"labelled {taken} views of ranks that were not at work")
