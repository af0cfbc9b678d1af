"""What a GPU should tell in the quarter of an hour that it is at hand: `python3 -m benchmarks.gpu_slice --out DIR`.

Each part is a process of its own with a time limit of its own, in order of worth. After each DIR/slice.json and
DIR/slice.txt are whole, so that a crash, a hang or a cut loses one part. README.md says what to bring.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from rich.console import Console

from benchmarks.measure import ROOT, Report, Row, figure, positive, text_table
from pipeline.system.neighbours import load_average
from pipeline.system.runtime import environment
from pipeline.system.storage import read_json, write_atomic

NEEDED = ("torch", "torchvision", "numpy", "PIL", "h5py", "einops", "click", "rich", "ruamel.yaml", "safetensors")
TESTED_BY = ("pytest", "hypothesis", "scipy")
"""What the part `tests` needs beside NEEDED."""
LEAST = 10.0  # seconds, under which no part is begun
AT_THE_END = 4.0  # seconds kept for the last tables
OUTPUT_LINES = 20
JSON, OUT, SECONDS = "{json}", "{out}", "{seconds}"
DONE, FAILED, HUNG, LEFT_OUT = "done", "failed", "timed out", "left out"


@dataclass(frozen=True)
class Goal:
    """What a figure should be.

    Attributes:
        row: How the name of the row begins that has the figure.
        name: Of the row that compares them.
        value: The goal.
        higher_is_better: Whether the figure should be at least that, or at most.
    """

    row: str
    name: str
    value: float
    higher_is_better: bool = False


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: For `--only`.
        limit: Seconds, after which it is killed; None takes all that are left.
        command: What follows `python -m`. `{json}` becomes the path of its report, `{out}` that of the slice's folder,
            `{seconds}` the time that it has.
        toy: The same on a CPU in a second or two.
        goals: Of its rows.
        read: Turns the file at `{json}` into a report, where it is none.
    """

    name: str
    limit: float | None
    command: Sequence[str]
    toy: Sequence[str]
    goals: Sequence[Goal] = ()
    read: Callable[[Path], dict[str, Any]] = read_json


def gpu_tests() -> list[str]:
    """Return the test files that have a test for a GPU: to collect only them saves a minute."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def read_tests(path: Path) -> dict[str, Any]:
    """Return the report of a run of pytest from its JUnit XML: how many passed, and the names of those that did not."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    broken, skipped = {}, {}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        for result in case:
            if result.tag in ("failure", "error"):
                broken[name] = (result.get("message") or "").partition("\n")[0][:300]
            elif result.tag == "skipped":
                skipped[name] = (result.get("message") or "")[:300]
    num_passed = len(cases) - len(broken) - len(skipped)
    what, ran = "tests of a GPU that passed", len(cases) - len(skipped)
    row = {
        "what": what,
        "ours": num_passed,
        "peer": ran,
        "peer_name": "run",
        "unit": "tests",
        "goal": 1.0,
        "spread": {},
    }
    row["ratio"] = num_passed / ran if ran else None
    return {"rows": [row], "extra": {"failed": broken, "skipped": skipped}}


PYTEST = (
    "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts=", "-q", "--continue-on-collection-errors",
    f"--junitxml={JSON}",
)  # fmt: skip
ON_CPU = ("--device", "cpu")
TOY = ("--quick", *ON_CPU, "--threads", "1", "--rounds", "1")
AS_TRAINED = "bf16 captured,bf16 eager"
COMPILED = "=titn triton bf16 compiled,=titn triton bf16 captured"


def report_of(module: str, *options: str) -> tuple[str, ...]:
    """Return the command that runs a benchmark."""
    return (f"benchmarks.{module}", "--json", JSON, *options)


def students(measured: str, only: str, *options: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the command, and the toy one, that run the benchmark of students, of which it measures one thing."""
    sizes = ("--depth", "1", "--students", "titn", "--batch-sizes", "2", "--peak-side", "64")
    return (
        report_of("students", "--measure", measured, "--only", only, *options),
        report_of("students", *TOY, "--measure", measured, "--only", "=titn plain fp32 eager", *sizes),
    )


def parts() -> list[Part]:
    """Return all parts in order of worth. What torch.compile prepares comes late: it takes minutes, and no goal."""
    both, few = ("--no-compile", "--batch-sizes", "128,1024"), ("--depth", "1", "--batch-size")
    return [
        Part(
            "tests",
            180,
            (*PYTEST, "-m", "gpu", *gpu_tests()),
            (*PYTEST, "-m", "not gpu", "tests/pipeline/test_errors.py"),
            read=read_tests,
        ),
        Part("exactness", 90, report_of("exactness"), report_of("exactness", *TOY)),
        Part(
            "steps",
            90,
            *students("training", AS_TRAINED, "--students", "titn", *both),
            [Goal("titn, training step at batch 1024", "step of TITN at batch 1024", 3.5)],
        ),
        Part(
            "epoch",
            90,
            report_of("epoch"),
            report_of("epoch", *TOY, *few, "16", "--images", "40"),
            [
                Goal("titn, an epoch", "epoch of TITN, 50,000 images", 0.25),
                Goal("titn, views", "views, share of an epoch of TITN", 10.0),
            ],
        ),
        Part(
            "labelling",
            60,
            report_of("labelling", "--quick", "--images", "40960", "--batch-size", "1024"),
            report_of("labelling", *TOY, "--images", "8", "--batch-size", "4", "--teacher", "squeezenet1_1"),
            [Goal("vgg16_bn, label_view", "labelling by VGG16_bn, views included", 150_000, higher_is_better=True)],
        ),
        Part(
            "launches",
            60,
            report_of("launches"),
            report_of("launches", *TOY, *few, "2"),
            [Goal("titn, kernels", "kernels of a step of TITN", 420)],
        ),
        Part("memory", 60, *students("memory", "bf16 eager", *both)),
        Part(
            "views",
            60,
            report_of("views", "--quick", "--images", "4096", "--batch-size", "1024"),
            report_of("views", *TOY, "--images", "16", "--batch-size", "8"),
        ),
        Part(
            "startup",
            75,
            report_of("startup", "--quick", "--rounds", "2"),
            report_of("startup", *TOY, "--only", "help"),
        ),
        Part("others", 90, *students("training", AS_TRAINED, "--students", "tnt,deit,vit", *both)),
        Part("compiled", 150, *students("training", COMPILED, "--students", "titn", "--batch-sizes", "1024")),
        Part(
            "paper",
            None,
            report_of("paper", "--out", f"{OUT}/state", "--seconds", SECONDS),
            report_of("paper", "--out", f"{OUT}/state", "--seconds", SECONDS, "--quick", *ON_CPU),
        ),
    ]


@dataclass
class Slice:
    """A run of parts.

    Attributes:
        out: Where slice.json and slice.txt are written.
        ends: When it must have ended, `time.monotonic()`.
        python: The interpreter of the parts.
        report: What is known so far.
        variables: Of the parts' environment.
    """

    out: Path
    ends: float
    python: str
    report: Report
    variables: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def left(self) -> float:
        """Seconds that are left for parts."""
        return self.ends - AT_THE_END - time.monotonic()

    def run(self, part: Part, command: Sequence[str], lacking: Sequence[str] = ()) -> None:
        """Run a part, unless packages are lacking that it needs, and write what is known then."""
        told: dict[str, Any] = {"name": part.name, "status": "running", "limit": None, "seconds": None, "why": None}
        self.report.extra["parts"].append(told)
        module = ROOT.joinpath(*command[0].split("."))
        if command[0] != "pytest" and not module.with_suffix(".py").exists():
            told |= {"status": LEFT_OUT, "why": f"{command[0]} is not there"}
        elif lacking:
            told |= {"status": LEFT_OUT, "why": f"not installed here: {', '.join(lacking)}"}
        elif self.left < LEAST:
            told |= {"status": LEFT_OUT, "why": f"{max(0.0, self.left):.0f} s were left"}
        else:
            told["limit"] = round(min(self.left, part.limit or math.inf), 1)
            self.write()
            began = time.monotonic()
            try:
                with tempfile.TemporaryDirectory() as folder:
                    told |= self._process(part, command, Path(folder), told["limit"])
            except BaseException as error:
                told |= {"status": FAILED, "why": f"{type(error).__name__}: the slice was cut"}
                raise
            finally:
                told["seconds"] = round(time.monotonic() - began, 1)
                self.write()
        self.write()

    def _process(self, part: Part, command: Sequence[str], folder: Path, limit: float) -> dict[str, Any]:
        """Run a part's process to its end or its limit, and take up its report; return how it ended."""
        file, log = folder / "report.json", folder / "output.txt"
        values = {JSON: str(file), OUT: str(self.out), SECONDS: str(int(limit - 2))}
        words = [self._filled(word, values) for word in command]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [self.python, "-m", *words],
                cwd=ROOT,
                env=dict(self.variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):  # what it has started ends with it
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        told: dict[str, Any] = {"status": DONE, "why": None}
        if code is None:
            told = {"status": HUNG, "why": f"killed after {limit:.0f} s"}
        elif code:
            why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            told = {"status": FAILED, "why": why}
        if file.exists():
            try:
                self._take(part, part.read(file))
            except Exception as error:  # a report of any damaged kind costs its part alone
                told = {"status": FAILED, "why": f"its report cannot be read: {type(error).__name__}: {error}"[:300]}
        elif code == 0:
            told = {"status": FAILED, "why": "it wrote no report"}
        if told["status"] != DONE:
            lines = log.read_text(errors="replace").strip().splitlines()
            told["output"] = "\n".join(line[:300] for line in lines[-OUTPUT_LINES:])
        return told

    @staticmethod
    def _filled(word: str, values: Mapping[str, str]) -> str:
        for name, value in values.items():
            word = word.replace(name, value)
        return word

    def _take(self, part: Part, found: Mapping[str, Any]) -> None:
        """Add a part's rows, with their goals before them, and whatever else it found."""
        fields = {name for name in Row.__dataclass_fields__ if name != "details"}
        rows = []
        for values in found["rows"]:
            details = {key: value for key, value in values.items() if key not in fields}
            known = {key: value for key, value in values.items() if key in fields}
            rows.append(Row(**known, details={**details, "part": part.name}))
        self.report.rows += [_against(goal, row, part) for goal in part.goals for row in _first(rows, goal)]
        self.report.rows += rows
        for package in found.get("missing", ()):
            if package not in self.report.missing:
                self.report.missing.append(package)
        where = self.report.environment
        for key, value in found.get("environment", {}).items():
            if where.get(key) is None:
                where[key] = value
        rest = {key: value for key, value in found.items() if key not in ("rows", "missing", "environment")}
        if rest:
            self.report.extra["found"][part.name] = rest

    def write(self) -> None:
        """Write slice.json and slice.txt."""
        told = self.report.extra["parts"]
        cells = [(part["name"], _ending(part), figure(part["seconds"]), figure(part["limit"])) for part in told]
        note = f"Images of the paper's part: {self.report.extra['data']}."
        self.report.tables = [text_table("Parts", ("part", "how it ended", "seconds", "limit"), cells, note)]
        text = StringIO()
        self.report.finish(Console(file=text, width=160), self.out / "slice.json")
        write_atomic(self.out / "slice.txt", text.getvalue().encode())


def _first(rows: Sequence[Row], goal: Goal) -> list[Row]:
    return [row for row in rows if row.what.startswith(goal.row)][:1]


def _against(goal: Goal, row: Row, part: Part) -> Row:
    """Compare a row's figure with its goal."""
    ratio = row.ours / goal.value if goal.higher_is_better else goal.value / max(row.ours, 1e-12)
    return Row(
        what=f"goal: {goal.name}",
        ours=row.ours,
        peer=goal.value,
        peer_name=f"the goal, {'at least' if goal.higher_is_better else 'at most'}",
        unit=row.unit,
        ratio=ratio,
        goal=1.0,
        spread={"ours": row.spread["ours"]} if "ours" in row.spread else {},
        details={"part": part.name, "row": row.what},
    )


def _ending(told: Mapping[str, Any]) -> str:
    """Say in a few words how a part ended."""
    return f"{told['status']}: {told['why']}" if told["why"] else str(told["status"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts."""
    options = _options(arguments)
    ends = time.monotonic() + 60 * options.minutes
    chosen = {part.name: part for part in parts()}
    for name in options.only or ():
        if name not in chosen:
            raise SystemExit(f"--only {name}: is no part; choose from {', '.join(chosen)}")
    with tempfile.TemporaryDirectory() as packages:
        variables = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *_unpacked(options.wheels, Path(packages))]),
        }
        missing = _missing(options.python, variables, NEEDED)
        if missing:
            names = ", ".join(missing)
            raise SystemExit(f"not installed here: {names}; bring their wheels, and name the folder with --wheels")
        data = "toy" if options.rehearse else "CIFAR-100" if options.data else "synthetic: no --data was given"
        where = environment(torch.device("cpu"))
        where["commit"] = options.commit or where["commit"]
        where |= {"device": None, "device_type": None, "load_average": load_average()}
        where["options"] = {name: value if value is None else str(value) for name, value in vars(options).items()}
        extra: dict[str, Any] = {"data": data, "parts": [], "found": {}}
        running = Slice(options.out, ends, options.python, Report("GPU slice", where, extra=extra), variables)
        own = {"--data": options.data, "--state": options.state, "--weights": options.weights}
        given = [word for name, value in own.items() if value is not None for word in (name, str(value))]
        console = Console()
        former = signal.signal(signal.SIGTERM, _stop)
        try:
            for name in options.only or chosen:
                part = chosen[name]
                command = [*(part.toy if options.rehearse else part.command)]
                if name == "paper":
                    command += [*given, "--python", options.python]
                lacking = _missing(options.python, variables, TESTED_BY) if name == "tests" else ()
                running.run(part, command, lacking)
                ending = _ending(extra["parts"][-1])
                console.print(f"{name}: {ending}", soft_wrap=True, highlight=False, markup=False)
        finally:
            signal.signal(signal.SIGTERM, former)
    console.print(f"{options.out / 'slice.json'}, {options.out / 'slice.txt'}", soft_wrap=True, markup=False)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where slice.json, slice.txt and state/ are written")
    parser.add_argument("--minutes", type=positive, default=11, help="after which it has ended; default: 11")
    parser.add_argument("--only", type=lambda text: text.split(","), help="parts, separated by commas; default: all")
    parser.add_argument("--data", type=Path, help="CIFAR-100 as `pipeline prepare --from` takes it")
    parser.add_argument("--state", type=Path, help="the folder state/ of the last slice, to go on from")
    parser.add_argument("--weights", type=Path, help="the teacher's state dict at the start; default: random weights")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of pure Python that are not installed here")
    parser.add_argument("--commit", help="the commit, where there is no git")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the parts; default: this one")
    parser.add_argument("--rehearse", action="store_true", help="all parts on the CPU at toy sizes")
    options = parser.parse_args(arguments)
    for name in ("data", "state", "weights", "wheels"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            parser.error(f"--{name} {path}: not found")
        if path is not None:
            setattr(options, name, path.resolve())
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    options.out = options.out.resolve()
    state = options.out / "state"
    if options.state is None and (state / "state.json").exists() and "paper" in (options.only or ["paper"]):
        parser.error(f"--out {options.out}: has a former slice's state; go on with --state {state}, or name another")
    return options


def _unpacked(wheels: Path | None, folder: Path) -> list[str]:
    """Unpack wheels, which then need no installing, and return what PYTHONPATH gets."""
    for wheel in sorted(wheels.glob("*.whl")) if wheels is not None else ():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]


def _missing(python: str, variables: Mapping[str, str], packages: Sequence[str]) -> list[str]:
    """Return which packages the interpreter of the parts does not find."""
    code = (
        "import importlib.util, json, sys\n"
        "def has(name):\n"
        "    try: return importlib.util.find_spec(name) is not None\n"
        "    except ImportError: return False\n"
        f"print(json.dumps([name for name in {[*packages]!r} if not has(name)]))"
    )
    done = subprocess.run([python, "-c", code], env=dict(variables), capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise SystemExit(f"--python {python}: does not run: {done.stderr.strip()[-300:]}")
    return list(json.loads(done.stdout))


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
