"""RAM by the limits of control groups, of both versions and nested, in made-up file trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.system import memory
from pipeline.system.memory import available_ram, ram

GIB = 2**30
V1 = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2 = "41 31 0:38 {top} /sys/fs/cgroup{below} rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
OTHER = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"


def tree(root: Path, mountinfo: str, cgroup: str, **files: object) -> Path:
    texts = {"proc/self/mountinfo": OTHER + mountinfo, "proc/self/cgroup": cgroup}
    texts |= {f"sys/fs/cgroup/{name}": f"{value}\n" for name, value in files.items()}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_machine", lambda: 64 * GIB)


@pytest.mark.parametrize(
    ("mountinfo", "cgroup", "files", "expected"),
    [
        ("", "", {}, 64),
        (V2.format(top="/", below=""), "0::/\n", {"memory.max": "max"}, 64),
        (V2.format(top="/", below=""), "0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": 3 * GIB}, 3),
        (V2.format(top="/", below=""), "0::/a/b\n", {"a/b/memory.max": 2 * GIB, "a/memory.max": 3 * GIB}, 2),
        # Hybrid: version 2 has no memory controller, version 1 has.
        (
            V1.format(top="/") + V2.format(top="/", below="/unified"),
            "9:name=systemd:/\n4:memory:/job/step\n0::/\n",
            {"memory/job/step/memory.limit_in_bytes": 2**63 - 4096, "memory/job/memory.limit_in_bytes": 5 * GIB},
            5,
        ),
        # A container that sees its own group as the mount, and a group within it; and one that does not see its path.
        (V1.format(top="/docker/1"), "4:cpu,memory:/docker/1/in\n", {"memory/in/memory.limit_in_bytes": GIB}, 1),
        (V2.format(top="/", below=""), "0::/../elsewhere\n", {"memory.max": 4 * GIB}, 4),
    ],
)
def test_the_smallest_limit_of_a_group_and_those_above_it_counts(
    tmp_path: Path, mountinfo: str, cgroup: str, files: dict[str, object], expected: int
) -> None:
    assert ram(tree(tmp_path, mountinfo, cgroup, **files)) == expected * GIB


def test_what_a_group_has_left_is_what_is_available(tmp_path: Path) -> None:
    root = tree(
        tmp_path, V1.format(top="/"), "4:memory:/job\n",
        **{
            "memory/job/memory.limit_in_bytes": 8 * GIB, "memory/job/memory.usage_in_bytes": 7 * GIB,
            "memory/job/memory.stat": f"cache 5\ninactive_file 9\ntotal_inactive_file {2 * GIB}",
        },
    )  # fmt: skip
    assert available_ram(root) is None
    (root / "proc/meminfo").write_text("MemTotal: 1 kB\nMemAvailable:   52428800 kB\n")
    assert available_ram(root) == 3 * GIB
    (root / "proc/meminfo").write_text("MemAvailable:   1024 kB\n")
    assert available_ram(root) == 2**20
