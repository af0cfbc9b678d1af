"""Reads label files that nobody should trust, in a process that may die of them.

Standard input brings files, each after its length. Standard output gives the verdict on each. The process may
hardly allocate memory: a file that claims to be large must be refused before it is believed.
"""

from __future__ import annotations

import hashlib
import io
import resource
import select
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

SPARE_BYTES = 128 * 2**20
SECONDS_UNTIL_HUNG = 20
_LENGTH = struct.Struct("<Q")


class HostileReader:
    """A process that reads hostile files, started again when one of them kills it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, data: bytes) -> str:
        """Return what became of a file.

        Returns:
            `refused: REASON`; `accepted` where the labels read are those that the file holds, with their digests;
            `wrong: LABELS` where they are not; `crashed` or `hung`.
        """
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(_LENGTH.pack(len(data)) + data)
        process.stdin.flush()
        if not any(select.select([process.stdout], [], [], 1.0)[0] for _ in range(SECONDS_UNTIL_HUNG)):
            self.close()
            return "hung"
        line = process.stdout.readline()
        if not line:
            self.close()
            return "crashed"
        return line.decode().strip()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.support.hostile_reader"]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process


def judge(data: bytes) -> str:
    """Read a file as the pipeline does; where it is accepted, read it again with h5py alone and compare."""
    import h5py
    import numpy as np

    from pipeline.labels.cache import LabelCache

    try:
        cache = LabelCache.from_bytes(data)
    except Exception as error:  # as LabelCache.open does
        return f"refused: {' '.join(repr(error).split())}"
    with h5py.File(io.BytesIO(data), "r") as file:
        rows: Any = file["labels"][...]
        digests = [hashlib.sha256(row.tobytes()).digest() for row in rows]
        right = (
            np.array_equal(rows, cache.labels)
            and rows.shape == (cache.num_views, cache.num_samples)
            and int(rows.max()) < cache.num_classes
            and b"".join(digests) == file["digest"][...].tobytes()
            and all(np.array_equal(file[f"clean/{split}"][...], row) for split, row in cache.clean.items())
            and set(file["clean"]) == set(cache.clean)
        )
    return "accepted" if right else f"wrong: {cache.labels.tolist()}"


def main() -> None:
    """Serve until standard input ends."""
    judge(b"")  # imports everything
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while header := sys.stdin.buffer.read(_LENGTH.size):
        data = sys.stdin.buffer.read(_LENGTH.unpack(header)[0])
        sys.stdout.write(judge(data) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
