"""What runs have written, damaged: a report is refused in one line, or written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support import report_project
from tests.support.fuzz_campaign import NUM_RESULTS
from tests.support.fuzz_results import fuzz_results


@pytest.mark.parametrize("count", [6, pytest.param(NUM_RESULTS, marks=pytest.mark.slow)])
def test_a_damaged_result_is_named_or_not_needed(tmp_path: Path, count: int) -> None:
    tally = fuzz_results(report_project.create(tmp_path / "project"), count, random.Random(count))
    assert tally.wrong == []
    assert tally.counts["refused"] > count // 5 and tally.counts["accepted"] > count // 5
