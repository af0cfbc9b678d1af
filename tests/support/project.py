"""A project folder for end-to-end tests: params.yaml with the recipe `smoke`, and the real command line."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEACHERS = ("squeezenet1_1", "mobilenet_v3_large")
SMALLER = {
    "val_fraction: 0.2, test_fraction: 0.2": "val_fraction: 0.25, test_fraction: 0.5",
    "squeezenet1_1: {epochs: 6": "squeezenet1_1: {epochs: 8",
    "mobilenet_v3_large: {epochs: 2": "mobilenet_v3_large: {epochs: 1, batch_size: 8",
}
"""What tests change in the recipe `smoke`: fewer images to train on, of which both teachers still learn something."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of a command: one thread, this checkout's code, plain output."""
    base = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "RANK", "WORLD_SIZE"))}
    return {**base, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200", **extra}


def smoke_params(text: str, *, alone: bool = False) -> str:
    """Change the project's params.yaml so that its default run takes seconds.

    Args:
        text: The file's.
        alone: Whether to leave all other recipes out: reading them takes a quarter of a second.
    """
    text = text.replace("recipe: digits", "recipe: smoke", 1)
    text = re.sub(r"^teachers: .*$", f"teachers: [{', '.join(TEACHERS)}]", text, count=1, flags=re.MULTILINE)
    text = text.replace("  tnt: default\n  deit: default\n", "", 1)
    before, smoke = text.split("\n  smoke:\n")
    for default, small in SMALLER.items():
        assert smoke.count(default) == 1, default
        smoke = smoke.replace(default, small)
    if alone:
        before, _, _ = before.partition("\n  # The bundled")
    return f"{before}\n  smoke:\n{smoke}"


def unseal(directory: Path) -> Path:
    """Make a result one of an older version, which wrote no manifest: a test may change it, and it counts as it is."""
    (directory / "manifest.json").unlink(missing_ok=True)
    return directory


@dataclass(frozen=True)
class Project:
    """A folder with a params.yaml."""

    path: Path

    @classmethod
    def create(cls, path: Path, *, alone: bool = False) -> Project:
        path.mkdir(parents=True, exist_ok=True)
        (path / "params.yaml").write_text(smoke_params((ROOT / "params.yaml").read_text(), alone=alone))
        return cls(path)

    @property
    def data(self) -> Path:
        return self.path / "data" / "smoke"

    def know_all_recipes(self, default: str) -> None:
        """Give the project all recipes, and let one be the default."""
        text = smoke_params((ROOT / "params.yaml").read_text())
        (self.path / "params.yaml").write_text(text.replace("recipe: smoke", f"recipe: {default}", 1))

    def edit(self, old: str, new: str) -> None:
        """Replace a text within the recipe `smoke` of params.yaml."""
        file = self.path / "params.yaml"
        before, smoke = file.read_text().split("\n  smoke:\n")
        assert old in smoke, old
        file.write_text(before + "\n  smoke:\n" + smoke.replace(old, new, 1))

    def forget(self, *outs: str) -> None:
        """Delete results of the recipe for good: what is kept too, of any."""
        shutil.rmtree(self.path / "data/work/kept", ignore_errors=True)
        for path in (self.data / out for out in outs):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def start(self, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "stages.cli", *arguments],
            cwd=self.path,
            env=environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, code: int = 0, **extra: str) -> str:
        """Run a command in a forked process (tests.support.commands), check its exit code, return what it printed."""
        from tests.support import commands  # which knows projects

        ended = commands.run(self.path, *arguments, **extra)
        return checked(ended.code, ended.out, ended.err, code)

    def run_anew(self, *arguments: str, code: int = 0, **extra: str) -> str:
        """As `run`, in an interpreter of its own."""
        with self.start(*arguments, **extra) as process:
            try:
                out, err = process.communicate(timeout=300)
            finally:
                process.kill()
        return checked(process.returncode, out, err, code)


def checked(exit_code: int, out: str, err: str, code: int) -> str:
    """Check that a command ended with a code, and an error with one line; return what it printed."""
    assert exit_code == code, f"exit {exit_code}, expected {code}\n{out}\n{err}"
    assert "Traceback" not in err, err
    if code not in (0, 128 + signal.SIGTERM):
        lines = [line for line in err.splitlines() if not line.startswith(("Usage:", "Try ", "Downloading:"))]
        assert len([line for line in lines if line.strip()]) == 1, err
    return out + err
