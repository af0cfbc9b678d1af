"""The slice of a GPU's time: parts that end badly, cuts, the state carried on, and all of it at toy sizes."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import carried, gpu_slice, paper
from benchmarks.gpu_slice import Goal, Part
from benchmarks.measure import Report
from pipeline.errors import DataError
from tests.support.in_process import invoke
from tests.support.project import Project
from tests.support.warm_python import warm_python

STUB = "tests.support.slice_part"
GOALS = (
    Goal("titn, an epoch", "epoch of TITN", 0.25),
    Goal("titn, an epoch", "the other way round", 0.25, higher_is_better=True),
    Goal("titn, views", "of a row that is not there", 1.0),
)


def stub(name: str, how: str, *note: str, limit: float = 30, goals: Sequence[Goal] = ()) -> Part:
    return Part(name, limit, (STUB, how, "{json}", *note), (), goals)


def read(out: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A slice's report, and its parts by name."""
    report = json.loads((out / "slice.json").read_text())
    return report, {part["name"]: part for part in report["parts"]}


def test_a_part_that_ends_badly_is_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = Part("missing", 30, ("benchmarks.no_such_module",), ())
    silent = stub("silent", "silent")
    hanging = stub("hanging", "hang", limit=0.5)
    named = [stub(how, how) for how in ("crash", "fail", "damaged", "late")]
    listed = [*named, missing, silent, hanging, stub("good", "good", goals=GOALS)]
    monkeypatch.setattr(gpu_slice, "parts", lambda: listed)
    gpu_slice.main(["--out", str(tmp_path), "--commit", "abc"])
    report, parts = read(tmp_path)
    assert {name: (part["status"], part["why"]) for name, part in parts.items() if name != "damaged"} == {
        "crash": ("failed", "killed by signal 6"),
        "fail": ("failed", "exit code 1"),
        "late": ("failed", "exit code 1"),
        "missing": ("left out", "benchmarks.no_such_module is not there"),
        "silent": ("failed", "it wrote no report"),
        "hanging": ("timed out", "killed after 0 s"),
        "good": ("done", None),
    }
    assert parts["damaged"]["why"].startswith("its report cannot be read")
    assert parts["fail"]["output"] == "this is fail\nit cannot be done"
    where = report["environment"]
    assert (where["commit"], where["device"], where["device_type"]) == ("abc", "a GPU", "cuda")
    assert report["missing"] == ["kornia"]
    assert report["data"] == "synthetic: no --data was given"
    late, met, other, good = report["rows"]
    assert late["part"] == "late", "what it wrote before it failed counts"
    assert (met["what"], met["ours"], met["peer"], met["ratio"]) == ("goal: epoch of TITN", 0.5, 0.25, 0.5)
    assert (other["ratio"], other["goal"]) == (2.0, 1.0)
    assert (good["part"], good["batch_size"], report["found"]["good"]) == ("good", 3, {"peaks": {"bandwidth": 1.0}})
    table = (tmp_path / "slice.txt").read_text()
    assert "goal: epoch of TITN" in table and "timed out: killed after 0 s" in table
    assert "crash: failed: killed by signal 6" in capsys.readouterr().out


def start_slice(out: Path, note: Path) -> None:
    """What a process does that is about to be cut in its second part."""
    listed = [stub("good", "good"), stub("hanging", "hang", str(note)), stub("never", "good")]
    gpu_slice.parts = lambda: listed  # type: ignore[assignment]  # of this process alone
    gpu_slice.main(["--out", str(out)])


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, "running"), (signal.SIGTERM, "failed")])
def test_a_cut_loses_one_part(tmp_path: Path, number: int, status: str) -> None:
    note = tmp_path / "pid"
    process = multiprocessing.get_context("fork").Process(target=start_slice, args=(tmp_path, note))
    process.start()
    assert wait_for(lambda: note.exists() and note.read_text() != "")
    part = int(note.read_text())
    try:
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(30)
        report, parts = read(tmp_path)
        assert [(name, told["status"]) for name, told in parts.items()] == [("good", "done"), ("hanging", status)]
        assert [row["part"] for row in report["rows"]] == ["good"]
        assert "titn, an epoch" in (tmp_path / "slice.txt").read_text()
        if number == signal.SIGTERM:
            assert wait_for(lambda: not is_alive(part)), "what was under way ends with the slice"
            assert process.exitcode != 0
    finally:
        if is_alive(part):
            os.kill(part, signal.SIGKILL)


def wait_for(condition: Callable[[], bool]) -> bool:
    """Tell whether it comes true within half a minute."""
    return any(condition() or time.sleep(0.05) for _ in range(600))  # type: ignore[func-returns-value]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_part_begins_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_slice, "parts", lambda: [stub("good", "good")])
    monkeypatch.setattr(gpu_slice, "AT_THE_END", 55.0)
    gpu_slice.main(["--out", str(tmp_path), "--minutes", "1"])
    _, parts = read(tmp_path)
    assert parts["good"]["status"] == "left out" and parts["good"]["why"].endswith(" s were left")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "steps,tests,all"), "--only all: is no part; choose from tests, exactness, steps,"),
        (("--data", "nowhere"), "--data nowhere: not found"),
        (("--python", "/bin/false"), "--python /bin/false: does not run"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    tmp_path: Path, arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_slice.main(["--out", str(tmp_path), *arguments])
    assert message in f"{stopped.value}{capsys.readouterr().err}"
    assert not (tmp_path / "slice.json").exists()


def test_a_package_that_is_missing_is_named_and_a_wheel_of_it_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    monkeypatch.setattr(gpu_slice, "NEEDED", ("json", "titn_brought.yaml"))
    monkeypatch.setattr(gpu_slice, "parts", lambda: [stub("good", "good")])
    with pytest.raises(SystemExit, match="not installed here: titn_brought.yaml; bring their wheels"):
        gpu_slice.main(["--out", str(tmp_path / "out")])
    with zipfile.ZipFile(tmp_path / "titn_brought-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("titn_brought/yaml.py", "")
    gpu_slice.main(["--out", str(tmp_path / "out"), "--wheels", str(tmp_path)])
    assert read(tmp_path / "out")[1]["good"]["status"] == "done"


def test_the_state_of_a_former_slice_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state/state.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        gpu_slice.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2 and f"go on with --state {tmp_path}/state" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_tests_without_what_they_need_are_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_slice, "TESTED_BY", ("pytest", "titn_brought.yaml"))
    gpu_slice.main(["--out", str(tmp_path), "--only", "tests"])
    [told] = json.loads((tmp_path / "slice.json").read_text())["parts"]
    assert (told["status"], told["why"]) == ("left out", "not installed here: titn_brought.yaml")


def test_the_gpu_tests_are_collected_and_told_apart(tmp_path: Path) -> None:
    assert {"tests/pipeline/training/test_captured_step.py", "tests/pipeline/models/test_inner_triton.py"} <= {
        *gpu_slice.gpu_tests()
    }
    file = tmp_path / "junit.xml"
    file.write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="bad">'
        '<failure message="assert 1 == 2&#10;where"/></testcase><testcase classname="a" name="out">'
        '<skipped message="no GPU"/></testcase></testsuite></testsuites>'
    )
    report = gpu_slice.read_tests(file)
    [row] = report["rows"]
    assert (row["ours"], row["peer"], row["ratio"], row["goal"]) == (1, 2, 0.5, 1.0)
    assert report["extra"] == {"failed": {"a::bad": "assert 1 == 2"}, "skipped": {"a::out": "no GPU"}}


def carry(folder: Path, out: Path, part_bytes: int = 10) -> list[Path]:
    """Some files, carried: two of the same content, an empty one, one of several parts."""
    contents = {"a": b"12345", "b/c": b"12345", "b/d": b"", "e": bytes(range(23))}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    files = [folder / name for name in contents]
    assert carried.pack(folder, files, out, part_bytes=part_bytes, slices=2) == 28
    return files


def test_files_are_cut_into_parts_and_joined_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "state-01234567-07.part").write_bytes(b"of a former slice")
    files = carry(tmp_path / "from", out)
    parts = sorted(out.glob("*.part"))
    assert [part["name"] for part in carried.read_index(out)["parts"]] == [part.name for part in parts]
    assert [part.stat().st_size for part in parts] == [10, 10, 8]
    assert carried.read_index(out)["notes"] == {"slices": 2}
    carried.unpack(out, tmp_path / "to")
    for file in files:
        there = tmp_path / "to" / file.relative_to(tmp_path / "from")
        assert there.read_bytes() == file.read_bytes()


def test_parts_that_are_missing_damaged_or_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    out, to = tmp_path / "out", tmp_path / "to"
    carry(tmp_path / "from", out)
    second = sorted(out.glob("*.part"))[1]
    whole = second.read_bytes()
    second.write_bytes(whole[:-1] + b"?")
    with pytest.raises(DataError, match=f"{second}: damaged, its SHA-256 is not the one in state.json"):
        carried.unpack(out, to)
    second.unlink()
    with pytest.raises(DataError, match=f"{second}: missing"):
        carried.unpack(out, to)
    second.write_bytes(whole)
    index = carried.read_index(out)
    index["files"][0]["path"] = "../elsewhere"
    (out / "state.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="is outside the folder"):
        carried.unpack(out, to)
    with pytest.raises(DataError, match="state.json: not found; give the folder that the last slice wrote"):
        carried.unpack(tmp_path, to)
    assert not to.exists()


class InProcess(paper.Project):
    """Runs its commands in this process."""

    limit = "1h"

    def command(self, name: str, *arguments: str, seconds: float | None = None) -> int:
        limit = () if seconds is None else ("--time-limit", self.limit)
        said = invoke(Project(self.path), name, "--device", "cpu", *arguments, *limit, code=None)
        self.said.append(said)
        assert "has learned anything" not in said, said
        return paper.TIME_IS_UP if "time limit reached" in said else 0


def paper_slice(work: Path, out: Path, state: Path | None) -> Report:
    """A slice of the paper's part at toy sizes, in a new folder."""
    options = argparse.Namespace(
        quick=True, device=torch.device("cpu"), data=None, weights=None, state=state, out=out, seconds=1000, python=""
    )
    report = Report("", {})
    paper.run(InProcess(work, options), time.monotonic() + 1000, report)
    return report


@pytest.mark.parametrize(("limit", "least"), [("16s", 2), pytest.param("8s", 3, marks=pytest.mark.slow)])
def test_a_paper_cut_into_slices_goes_on_on_new_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, least: int
) -> None:
    is_compared = least > 2  # with an unbroken one, which takes as long again
    if is_compared:
        whole = paper_slice(tmp_path / "whole", tmp_path / "whole-state", None)
        assert whole.extra["slice"]["is_finished"] and whole.extra["slice"]["slices"] == 1
    seconds = itertools.count(step=2)  # time passes by readings
    monkeypatch.setattr(InProcess, "limit", limit)
    monkeypatch.setattr("pipeline.system.stopping.time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    sizes, state = [], None
    for number in range(20):
        out = tmp_path / f"state{number}"
        work = tmp_path / f"machine{number}"
        report = paper_slice(work, out, state)
        state, labelled = out, (work / "data/cifar100/labels/default.h5").exists()
        names = [file["path"] for file in carried.read_index(out)["files"]]
        assert labelled != any("teacher" in name and not name.startswith("records") for name in names)
        assert not any("prepared" in name for name in names)
        sizes.append(report.extra["state"]["bytes"])
        if report.extra["slice"]["is_finished"]:
            break
    assert report.extra["slice"]["slices"] == number + 1 >= least
    for name in ("students/titn/best.safetensors", "labels/default.h5") if is_compared else ():
        ours, expected = (folder / "data/cifar100" / name for folder in (work, tmp_path / "whole"))
        assert hashlib.sha256(ours.read_bytes()).digest() == hashlib.sha256(expected.read_bytes()).digest()
    rows = {row.what: row for row in report.rows}
    assert rows["views labelled, of 2"].ours == 2
    for kind, name in (("student", "titn"), ("teacher", paper.TOY_TEACHER)):
        epochs = paper.TOY[kind]["epochs"]
        assert rows[f"{name}, epochs done of {epochs}"].ours == epochs
    assert sizes[-1] < max(sizes)


def test_a_state_of_other_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InProcess, "command", lambda *given, **named: paper.TIME_IS_UP)
    paper_slice(tmp_path / "one", tmp_path / "state", None)
    monkeypatch.setattr(paper, "TOY_IMAGES", (33, 9))
    with pytest.raises(DataError, match="it is of other images; give the --data of the slice before"):
        paper_slice(tmp_path / "two", tmp_path / "out", tmp_path / "state")


class Stopped(Exception):
    """A benchmark has read its command line, and would begin."""


@pytest.mark.parametrize("part", gpu_slice.parts(), ids=lambda part: part.name)
def test_the_command_lines_of_every_part_are_those_that_it_takes(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*given: Any, **named: Any) -> None:
        raise Stopped

    values = {"{json}": "report.json", "{out}": "out", "{seconds}": "100"}
    for module, *words in (part.command, part.toy):
        if module == "pytest":
            assert all((gpu_slice.ROOT / word).is_file() for word in words if word.startswith("tests/"))
            continue
        if not gpu_slice.ROOT.joinpath(*module.split(".")).with_suffix(".py").exists():
            continue
        benchmark = importlib.import_module(module)
        monkeypatch.setattr(benchmark, "begin", begin)
        with pytest.raises(Stopped):
            benchmark.main([gpu_slice.Slice._filled(word, values) for word in words])


def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    with warm_python(tmp_path / "warm") as folder:
        gpu_slice.main(["--out", str(tmp_path / "out"), "--rehearse", "--python", str(folder / "python")])
    report, parts = read(tmp_path / "out")
    assert list(parts) == [part.name for part in gpu_slice.parts()]
    for name, part in parts.items():
        assert part["status"] == "done", (name, part)
    goals = {row["what"] for row in report["rows"] if row["what"].startswith("goal: ")}
    assert goals == {"goal: epoch of TITN, 50,000 images", "goal: views, share of an epoch of TITN"}
    assert report["found"]["paper"]["slice"]["is_finished"]
    assert (tmp_path / "out" / "state" / "state.json").exists()
