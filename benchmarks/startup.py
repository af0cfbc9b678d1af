"""How long commands take to start and to do next to nothing, as whole processes: `python -m benchmarks.startup`."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from benchmarks.measure import ROOT, Row, begin, compare, option_parser
from pipeline.config.params import load_params
from pipeline.data.datasets import Dataset
from pipeline.inference.speed import Seconds, interleave
from pipeline.models.students import build_student
from pipeline.system.runtime import commit_of
from pipeline.training.checkpoints import save_checkpoint
from stages import cli
from stages.shared.runs import describe, student_arguments

RECIPE, TEACHER = "smoke", "squeezenet1_1"
TORCH, FORWARD, PREDICT = "import torch", "import torch, forward pass", "predict"
MOST = 1.3  # times FORWARD that PREDICT may take
# What a user of PyTorch alone would write: TITN's own module, its weights, one image.
PLAIN = """
import torch
from pipeline.models.students.titn import TITN
model = TITN(num_classes=10, image_size=32, patch_size=8, pixel_size=2, width=192, depth=12, num_heads=3,
             pixel_width=12, pixel_heads=2).eval()
model.load_state_dict(torch.load("weights.pt", weights_only=True))
with torch.inference_mode():
    model(torch.zeros(1, 3, 32, 32))
"""
COMMANDS = {
    "help": ("--help",),
    PREDICT: (PREDICT, "titn", "image.png"),
    "models": ("models",),
    "prepare": ("prepare",),
    "teacher": ("teacher", TEACHER),
    "select": ("select",),
    "label": ("label",),
    "distill": ("distill", "--student", "titn"),
    "report": ("report", "--tracked-only"),
}
"""Commands as DVC starts them, where everything is up to date already, and others."""
QUICK = ("help", PREDICT)
SMALLER = {
    "val_fraction: 0.2, test_fraction: 0.2": "val_fraction: 0.25, test_fraction: 0.5",
    f"{TEACHER}: {{epochs: 6}}": f"{TEACHER}: {{epochs: 8}}",
}
"""What is changed in the recipe: fewer images to train on, of which the teacher still learns something."""
FINISHED = {"teacher", "select", "label", "distill", "report"}
"""Those that need finished stages."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__, threads=1)
    parser.add_argument("--beside", type=Path, metavar="DIR", help="another checkout, whose commands take turns too")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, help="commands; default: all, a few with --quick")
    options = parser.parse_args(arguments)
    report = begin("Starting", options)
    names = tuple(options.only or (QUICK if options.quick else COMMANDS))
    checkouts = {"ours": ROOT} | ({str(commit_of(options.beside)): options.beside.resolve()} if options.beside else {})
    with tempfile.TemporaryDirectory() as folder:
        make_project(Path(folder), names)
        scripts = {TORCH: ("-c", TORCH), FORWARD: ("-c", PLAIN)}
        contenders: dict[tuple[str, str], tuple[Path, tuple[str, ...]]]
        contenders = {(name, "ours"): (ROOT, script) for name, script in scripts.items()}
        for name in names:
            for whose, root in checkouts.items():
                contenders[name, whose] = root, ("-m", "stages.cli", *COMMANDS[name])
        seconds = interleave(
            {key: functools.partial(start, Path(folder), *run) for key, run in contenders.items()},
            rounds=options.rounds,
            device=torch.device("cpu"),
        )
    report.rows = rows(seconds)
    report.finish(Console(), options.json)


def rows(seconds: dict[tuple[str, str], Seconds]) -> list[Row]:
    """Compare each command with plain PyTorch, and with the other checkout's.

    Args:
        seconds: Command and checkout to its times.
    """
    compared = []
    for (name, whose), times in seconds.items():
        if whose == "ours" and name != FORWARD:
            goal = 1 / MOST if name == PREDICT else None
            peer = seconds[FORWARD, "ours"]
            compared.append(compare(name, times, peer, FORWARD, unit="s", higher_is_better=False, goal=goal))
        elif whose != "ours":
            compared.append(compare(name, seconds[name, "ours"], times, whose, unit="s", higher_is_better=False))
    return compared


def make_project(folder: Path, names: Sequence[str]) -> None:
    """Make what the commands find: a student of full size, an image, and, if they are asked for, finished stages."""
    text = (ROOT / "params.yaml").read_text().replace("recipe: digits", f"recipe: {RECIPE}", 1)
    lines = [f"teachers: [{TEACHER}]" if line.startswith("teachers: [") else line for line in text.splitlines()]
    before, smoke = "\n".join(lines).split(f"\n  {RECIPE}:\n")
    for default, small in SMALLER.items():
        assert default in smoke, default
        smoke = smoke.replace(default, small, 1)
    (folder / "params.yaml").write_text(f"{before}\n  {RECIPE}:\n{smoke}\n")
    recipe = load_params(folder / "params.yaml").select("digits")
    with contextlib.chdir(folder):
        _run("prepare", "--recipe", RECIPE)
        dataset = Dataset.load(Path("data", RECIPE, "prepared", "dataset.json"))
        arguments = student_arguments(recipe.students["titn"], num_classes=10, image_size=32)
        described = describe(dataset, RECIPE, kind="student", model="titn", arguments=arguments)
        weights = build_student("titn", **arguments).state_dict()
        save_checkpoint(Path("titn"), "best", weights, {**described, "training": {"precision": "fp32"}})
        torch.save(weights, "weights.pt")
        Image.fromarray(dataset.test.images[0]).save("image.png")
        if FINISHED & {*names}:
            for name in ("teacher", "select", "label", "distill"):
                _run(*COMMANDS[name])


def _run(*arguments: str) -> None:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        if code := cli.run(arguments):
            raise SystemExit(code)


def start(folder: Path, root: Path, arguments: Sequence[str]) -> None:
    """Run a process of Python with the code of a checkout, to its end."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
