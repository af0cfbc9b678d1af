"""Reading ahead: order, errors, and the thread's end."""

from __future__ import annotations

import threading

import pytest

from pipeline.system.threads import prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [1, 3, 100])
@pytest.mark.parametrize("number", [0, 1, 7])
def test_parts_come_in_order_and_the_thread_ends_with_them(number: int, depth: int) -> None:
    assert list(prefetch(range(number), lambda part: part * part, depth)) == [part * part for part in range(number)]
    assert threads() == []


def test_the_next_part_is_read_while_the_last_is_worked_on_and_no_other() -> None:
    begun = [threading.Event() for _ in range(5)]

    def read(part: int) -> int:
        begun[part].set()
        return threading.get_ident()

    parts = prefetch(range(5), read)
    for number in range(4):
        assert next(parts) != threading.get_ident()
        assert begun[number + 1].wait(10)
        assert not any(event.is_set() for event in begun[number + 2 :])
    parts.close()
    assert threads() == []


def test_an_error_surfaces_where_its_part_would_have_and_ends_the_thread() -> None:
    def read(part: int) -> int:
        if part == 2:
            raise OSError("the disk is gone")
        return part

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for part in prefetch(range(5), read):
            seen.append(part)
    assert seen == [0, 1] and threads() == []


def test_the_thread_ends_when_the_loop_that_reads_is_left() -> None:
    with pytest.raises(KeyError):
        for _ in prefetch(range(100), lambda part: part):
            assert len(threads()) == 1
            raise KeyError
    assert threads() == []
