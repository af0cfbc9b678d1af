from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline.system.threads import Budget, for_each
from tests.pipeline.views.test_views import EVERYTHING, make_views


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def test_every_part_is_worked_on_once(num_threads: int) -> None:
    done = torch.zeros(100, dtype=torch.int64)

    def work(part: int) -> None:
        done[part] += 1

    for_each(range(100), work)
    assert (done == 1).all()
    assert torch.get_num_threads() == num_threads


def test_parts_run_at_once_and_their_operations_are_not_divided(num_threads: int) -> None:
    seen: set[tuple[int, int]] = set()

    def work(part: int) -> None:
        time.sleep(0.02)
        seen.add((threading.get_ident(), torch.get_num_threads()))

    for_each(range(4 * num_threads), work)
    assert len({thread for thread, _ in seen}) == num_threads
    assert {number for _, number in seen} == {1}


def test_an_error_in_a_part_is_raised(num_threads: int) -> None:
    def work(part: int) -> None:
        if part == 7:
            raise ValueError("part 7")

    with pytest.raises(ValueError, match="part 7"):
        for_each(range(10), work)


def test_parts_may_write_what_was_made_in_inference_mode(num_threads: int) -> None:
    with torch.inference_mode():
        made = torch.zeros(10)
        for_each(range(10), lambda part: made[part].fill_(part))
    assert made.tolist() == list(range(10))


def test_views_do_not_depend_on_the_number_of_threads(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    expected = make_views(EVERYTHING).digest(1)
    torch.set_num_threads(num_threads)
    monkeypatch.setattr("pipeline.views.views.CPU_CHUNK", 4)
    assert make_views(EVERYTHING).digest(1) == expected


def test_threads_share_a_budget_and_who_takes_more_than_all_is_alone() -> None:
    budget, together, most = Budget(10), set[int](), []

    def work(index: int) -> None:
        amount = 99 if index == 5 else 4
        with budget.take(amount):
            together.add(index)
            most.append(frozenset(together))
            time.sleep(0.002)
            together.discard(index)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert {index for seen in most for index in seen} == set(range(16))
    assert max(map(len, most)) <= 2
    assert all(seen == {5} for seen in most if 5 in seen)
