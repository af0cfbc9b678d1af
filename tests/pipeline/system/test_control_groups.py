"""CPU time by the quotas of control groups, of both versions and nested, in made-up file trees."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipeline.system import neighbours
from pipeline.system.control_groups import cores_paid_for
from pipeline.system.neighbours import limit_threads, usable_cores
from tests.pipeline.system.test_memory import V2, tree

V1 = "36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.mark.parametrize(
    ("mountinfo", "cgroup", "files", "expected"),
    [
        ("", "", {}, None),
        (V2.format(top="/", below=""), "0::/\n", {"cpu.max": "max 100000"}, None),
        (V2.format(top="/", below=""), "0::/\n", {"cpu.max": "200000 100000"}, 2),
        (V2.format(top="/", below=""), "0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 2),
        (V2.format(top="/", below=""), "0::/a/b\n", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "150000 100000"}, 1),
        (V1, "3:cpu,cpuacct:/job\n", {"cpu,cpuacct/job/cpu.cfs_quota_us": -1}, None),
        (
            V1,
            "3:cpu,cpuacct:/job\n",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": 400000, "cpu,cpuacct/job/cpu.cfs_period_us": 100000},
            4,
        ),
    ],
)
def test_the_smallest_share_of_a_group_and_those_above_it_counts(
    tmp_path: Path, mountinfo: str, cgroup: str, files: dict[str, object], expected: int | None
) -> None:
    assert cores_paid_for(tree(tmp_path, mountinfo, cgroup, **files)) == expected


@pytest.mark.parametrize(
    ("paid", "chosen", "loaded", "expected"),
    [
        (2, None, False, "2"),
        (None, None, False, None),
        (64, None, False, None),
        (2, "5", False, "5"),
        (2, None, True, None),
    ],
)
def test_pytorch_starts_as_many_threads_as_are_paid_for(
    monkeypatch: pytest.MonkeyPatch, paid: int | None, chosen: str | None, loaded: bool, expected: str | None
) -> None:
    monkeypatch.setattr(neighbours, "cores_paid_for", lambda: paid)
    monkeypatch.setattr(neighbours, "_cores", lambda: 16)
    monkeypatch.setenv("OMP_NUM_THREADS", chosen or "")
    if chosen is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
    limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == expected
    assert usable_cores() == min(paid or 16, 16)
