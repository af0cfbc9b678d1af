"""Watchers: who is told of what, what a broken one costs, log.jsonl, and TensorBoard's files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Interrupted, NumericalError
from pipeline.report.watching import LOG, RunLog, TensorBoard, WatchedRun, Watchers
from pipeline.system import storage
from pipeline.system.stopping import StopSignal
from tests.pipeline.training.test_fit import Bomb, Watcher, make_fit

METRICS = {"evaluated_on": "val", "best": {"top1": 50.0}, "last": {"top1": 40.0}, "test": {"epoch": 2, "top1": 45.0}}


def watched(**fields: Any) -> WatchedRun:
    given: dict[str, Any] = {
        "name": "titn", "kind": "student", "recipe": "digits", "seed": 3, "fingerprint": "f" * 64,
        "folder": Path("data/digits/students/titn"), "settings": {"lr": 0.05, "arguments": {}}, "device": "a processor",
        "precision": "fp32", **fields,
    }  # fmt: skip
    return WatchedRun(**given)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(path: Path, **settings: Any) -> list[dict[str, Any]]:
    """Train with a log and return it."""
    with Watchers(RunLog(path, watched(), pytest.fail), settings.pop("other", None)) as watchers:
        make_fit(path.parent, watcher=watchers, **settings).run()  # type: ignore[arg-type]
    return lines_of(path)


class Few:
    """Has two methods, as a class of a user's may, and changes what it is given."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def started(self, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        self.heard.append((epochs, steps_per_epoch, epoch, step))

    def epoch_ended(self, row: dict[str, Any]) -> None:
        self.heard.append(row.pop("epoch"))
        row.clear()


class Broken(Few):
    """Fails in its second epoch."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def epoch_ended(self, row: dict[str, Any]) -> None:
        super().epoch_ended(row)
        if len(self.heard) == 3:
            raise self.error


def test_all_are_told_the_same_by_the_methods_that_they_have_and_none_changes_the_result(tmp_path: Path) -> None:
    own, few = Watcher(), Few()
    fit = make_fit(tmp_path, watcher=Watchers(own, guests={"few": few}))  # type: ignore[arg-type]
    result = fit.run()
    assert own.rows == result.curve and [row["epoch"] for row in own.rows] == [1, 2, 3, 4]
    assert few.heard == [(4, len(fit.batches), 0, 0), 1, 2, 3, 4]


@pytest.mark.parametrize("error", [KeyError("loss"), SystemExit(3)])
def test_a_broken_one_is_named_and_told_nothing_more_and_the_run_goes_on(tmp_path: Path, error: BaseException) -> None:
    own, broken, few = Watcher(), Broken(error), Few()
    watchers = Watchers(own, guests={"mine:Broken": broken, "mine:Few": few})
    result = make_fit(tmp_path, watcher=watchers).run()  # type: ignore[arg-type]
    assert len(result.curve) == 4 and few.heard[1:] == [1, 2, 3, 4] and broken.heard[1:] == [1, 2]
    reason = f"{type(error).__name__}: {error}"
    assert own.warnings == [f"--watch mine:Broken: epoch_ended failed ({reason}); it is told nothing more"]


def test_a_signal_that_reaches_a_watcher_still_stops_the_run(tmp_path: Path) -> None:
    watchers = Watchers(guests={"mine:Broken": Broken(Interrupted("stopped", 143))})
    with pytest.raises(Interrupted):
        make_fit(tmp_path, watcher=watchers).run()  # type: ignore[arg-type]


def test_the_log_says_what_is_trained_each_epoch_and_the_end(tmp_path: Path) -> None:
    path, warnings = tmp_path / "work" / LOG, []
    log = RunLog(path, watched(), warnings.append)
    log.warned("before it began")
    fit = make_fit(tmp_path, watcher=Watchers(log))  # type: ignore[arg-type]
    curve = fit.run().curve
    log.finished(METRICS, 12.34, tmp_path / "out")
    started, warned, *epochs, ended = lines_of(path)
    assert started.pop("time").endswith("+00:00") and started == {
        "event": "started", "epochs": 4, "steps_per_epoch": len(fit.batches), "epoch": 0, "step": 0, "ranks": 1,
        "name": "titn", "kind": "student", "recipe": "digits", "seed": 3, "fingerprint": "f" * 64,
        "folder": "data/digits/students/titn", "settings": {"lr": 0.05, "arguments": {}}, "device": "a processor",
        "precision": "fp32",
    }  # fmt: skip
    assert (warned["event"], warned["message"]) == ("warned", "before it began")
    assert [{key: line[key] for key in row} for line, row in zip(epochs, curve, strict=True)] == curve
    assert all(line["seconds"] > 0 and line["images_per_second"] > 0 for line in epochs)
    assert ended.pop("time") and ended == {"event": "ended", "seconds": 12.3, **METRICS}
    assert (tmp_path / "out" / LOG).read_bytes() == path.read_bytes() and not warnings
    log.warned("too late")
    assert len(lines_of(path)) == 7, "its folder may be gone by now"


def test_a_run_that_goes_on_appends_to_its_log(tmp_path: Path) -> None:
    path, stop = tmp_path / LOG, StopSignal()
    with pytest.raises(Interrupted) as error:
        logged(path, stop=stop, other=Watcher(stop, 7))
    before = lines_of(path)
    assert before[-1]["event"] == "stopped" and before[-1]["reason"] == str(error.value)
    after = logged(path)
    assert after[: len(before)] == before
    began = [line for line in after if line["event"] == "started"]
    steps = began[0]["steps_per_epoch"]
    assert [(line["epoch"], line["step"]) for line in began] == [(0, 0), divmod(7, steps)]
    assert [line["epoch"] for line in after if line["event"] == "epoch"] == [1, 2, 3, 4]


@pytest.mark.parametrize("torn", [b'{"event": "epo', b"\0" * 5])
def test_a_line_that_a_kill_has_torn_does_not_spoil_the_next(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / LOG
    RunLog(path, watched(), pytest.fail).started(4, 5, 0, 0)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    RunLog(path, watched(), pytest.fail).started(4, 5, 2, 1)
    assert path.read_bytes().startswith(whole) and [line["epoch"] for line in lines_of(path)] == [0, 2]


@pytest.mark.parametrize("former", ["another run's", "no log", "torn in its first line"])
def test_what_is_no_log_of_this_run_is_replaced(tmp_path: Path, former: str) -> None:
    path = tmp_path / LOG
    RunLog(path, watched(fingerprint="e" * 64), pytest.fail).started(4, 5, 0, 0)
    if former != "another run's":
        path.write_bytes(b"[1]\n" if former == "no log" else path.read_bytes()[:-9])
    RunLog(path, watched(), pytest.fail).started(4, 5, 0, 0)
    assert [line["fingerprint"] for line in lines_of(path)] == ["f" * 64]


def test_an_error_ends_the_log_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / LOG
    with pytest.raises(NumericalError) as error:
        logged(path, model=Bomb())
    last = lines_of(path)[-1]
    assert (last["event"], last["reason"]) == ("stopped", f"NumericalError: {error.value}")


def test_a_full_disk_costs_lines_and_not_the_run_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, warnings, written = tmp_path / LOG, [], storage._write_all
    log = RunLog(path, watched(), warnings.append)

    def full(descriptor: int, data: Any) -> None:
        written(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log.started(4, 5, 0, 0)
    monkeypatch.setattr(storage, "_write_all", full)
    log.warned("lost")
    log.warned("lost too")
    monkeypatch.setattr(storage, "_write_all", written)
    log.warned("there is space again")
    assert [line.get("message") for line in lines_of(path)] == [None, "there is space again"]
    assert len(warnings) == 1 and f"{path}: the log lacks lines" in warnings[0] and "No space left" in warnings[0]


def test_a_folder_that_cannot_be_made_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    warnings: list[str] = []
    log = RunLog(tmp_path / "file" / LOG, watched(), warnings.append)
    log.started(4, 5, 0, 0)
    log.finished(METRICS, 1.0, tmp_path / "out")
    assert len(warnings) == 1 and not (tmp_path / "out").exists()


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard would show, `(step, value)` by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in shown.Scalars(name)] for name in shown.Tags()["scalars"]}


def test_tensorboard_shows_the_curve_of_a_run_that_went_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="comes with the extra tensorboard")
    stop = StopSignal()

    def run(**settings: Any) -> list[Mapping[str, Any]]:
        with Watchers(
            settings.pop("other", None), guests={"tb": (board := TensorBoard(tmp_path / "tb", watched()))}
        ) as all_:
            curve = make_fit(tmp_path, watcher=all_, **settings).run().curve  # type: ignore[arg-type]
            board.ended(METRICS)
        return curve

    with pytest.raises(Interrupted):
        run(stop=stop, other=Watcher(stop, 14))
    curve = run()
    shown = events(tmp_path / "tb")
    for key in ("train_loss", "top1", "lr", "loss"):
        assert shown[key] == [(row["epoch"], pytest.approx(row[key], rel=1e-6)) for row in curve]
    assert shown["test/top1"] == [(2, 45.0)] and len(shown["images_per_second"]) == 4
    assert "agreement" not in shown, "it does not apply"
    assert len(list((tmp_path / "tb").iterdir())) == 2
