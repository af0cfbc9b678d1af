"""`--watch` and log.jsonl through the commands, with the classes of docs/watching.md and stand-ins for packages."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.support.in_process import invoke
from tests.support.markdown import blocks, page
from tests.support.project import Project

READING, LINES, MLFLOW, WANDB = blocks(page("docs/watching.md"), "python")
VIT = ("distill", "--student", "vit", "--set", "epochs=2")
OUT = Path("data/runs/smoke/vit-epochs-2")
BROKEN = "class Unmade:\n    def __init__(self, run):\n        raise ValueError('no account')\n\nnumber = 3\n"


class Calls:
    """Stands for a module: notes each call with its arguments."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: self.made.append((name, given, named))


class Watched(SimpleNamespace):
    """A project with a run that several followed: `said`, and the calls of the stand-ins, `mlflow` and `wandb`."""


@pytest.fixture(scope="module")
def watched(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    pytest.importorskip("tensorboard", reason="comes with the extra tensorboard")
    project = Project(tmp_path_factory.mktemp("watched") / "project")
    shutil.copytree(taught.path, project.path)
    for name, text in (("my_watcher", LINES), ("to_mlflow", MLFLOW), ("to_wandb", WANDB), ("unmade", BROKEN)):
        (project.path / f"{name}.py").write_text(text)
    mlflow, wandb, summary = Calls(), Calls(), {}
    wandb_run = SimpleNamespace(summary=summary, log=wandb.log, finish=wandb.finish)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])  # which the command adds to
        patch.setitem(sys.modules, "mlflow", mlflow)
        patch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **named: (wandb.init(**named), wandb_run)[1]))
        for name in ("my_watcher", "to_mlflow", "to_wandb", "unmade"):
            patch.setitem(sys.modules, name, ModuleType(name))
            del sys.modules[name]
        names = ("tensorboard", "my_watcher:Lines", "to_mlflow:Mlflow", "to_wandb:Wandb", "tensorboard")
        said = invoke(project, *VIT, *(word for name in names for word in ("--watch", name)))
        yield Watched(project=project, said=said, mlflow=mlflow.made, wandb=wandb.made, summary=summary)


def log_of(watched: Watched) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (watched.project.path / OUT / "log.jsonl").read_text().splitlines()]


def epochs_of(watched: Watched) -> list[dict[str, Any]]:
    return [line for line in log_of(watched) if line["event"] == "epoch"]


def metrics_of(watched: Watched) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((watched.project.path / OUT / "metrics.json").read_text())
    return metrics


def test_the_log_lies_beside_the_result_and_the_manifest_does_not_name_it(watched: Watched) -> None:
    lines, folder = log_of(watched), watched.project.path / OUT
    assert [line["event"] for line in lines if line["event"] != "warned"] == ["started", "epoch", "epoch", "ended"]
    meta = json.loads((folder / "best.json").read_text())
    told = {key: meta[key] for key in ("kind", "recipe", "seed", "fingerprint")}
    assert {**lines[0], **told, "name": "vit", "folder": str(OUT), "epochs": 2, "ranks": 1} == lines[0]
    assert lines[0]["settings"]["epochs"] == 2 and lines[0]["settings"]["lr"] == meta["training"]["lr"]
    assert lines[-1]["test"] == metrics_of(watched)["test"]
    assert "log.jsonl" not in json.loads((folder / "manifest.json").read_text())["files"]
    assert not list(watched.project.path.glob("data/work/smoke/**/log.jsonl"))


def test_the_page_reads_it(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(watched.project.path / OUT)
    names: dict[str, Any] = {}
    exec(READING, names)
    assert names["curve"] == {line["epoch"]: line["top1"] for line in epochs_of(watched)}


def test_a_class_of_ones_own_hears_everything(watched: Watched) -> None:
    said = watched.said
    assert "student vit of recipe smoke, seed 0, on " in said and f"goes to {OUT}\n" in said
    assert "2 epochs of " in said and ", from step 0 of epoch 0" in said
    assert all(f"\nepoch {line['epoch']}: top-1 {line['top1']:.2f} %\n" in said for line in epochs_of(watched))
    assert said.count(" images/s, without evaluation\n") == 2
    assert f"test top-1 {metrics_of(watched)['test']['top1']:.2f} %\n" in said


def test_mlflow_and_wandb_get_every_epoch(watched: Watched) -> None:
    rows = [{k: line[k] for k in line if k in metrics_of(watched)["best"]} for line in epochs_of(watched)]
    names = [name for name, *_ in watched.mlflow]
    assert names == [
        "set_experiment", "start_run", "log_params", "log_metrics", "log_metrics", "log_metric", "end_run",
    ]  # fmt: skip
    assert watched.mlflow[2][1][0]["epochs"] == 2
    for calls in (watched.mlflow[3:5], watched.wandb[1:3]):
        for row, (_, (logged,), named) in zip(rows, calls, strict=True):
            assert named == {"step": row["epoch"]}
            assert {key: logged.get(key) for key in row} == row and None not in logged.values()
    assert [name for name, *_ in watched.wandb] == ["init", "log", "log", "finish"]
    fingerprint = log_of(watched)[0]["fingerprint"]
    assert watched.wandb[0][2]["id"] == f"vit-0-{fingerprint[:12]}" and watched.wandb[0][2]["resume"] == "allow"
    test = metrics_of(watched)["test"]["top1"]
    assert watched.summary == {"test_top1": test} and watched.mlflow[5][1] == ("test_top1", test)


def test_tensorboards_files_stay(watched: Watched) -> None:
    assert len(list((watched.project.path / "data/work/smoke/tensorboard/runs/vit-epochs-2").iterdir())) == 1


def test_it_is_no_reason_to_train_again(watched: Watched) -> None:
    said = invoke(watched.project, *VIT, "--watch", "unmade:Unmade")
    assert "up to date" in said


def test_what_cannot_be_made_is_refused_before_its_run_begins(watched: Watched) -> None:
    said = invoke(watched.project, *VIT, "--set", "lr=0.2", "--watch", "unmade:Unmade", code=2)
    words = "--watch unmade:Unmade: cannot be made (ValueError: no account); mend it, or leave it out"
    assert words in said and "epoch 1/2" not in said
    assert not list(watched.project.path.glob("data/work/smoke/**/log.jsonl"))


@pytest.mark.parametrize(
    "command", [VIT, ("teacher", "vgg16"), ("teacher-select",), ("reproduce", "--recipe", "smoke")]
)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", "write tensorboard, or MODULE:CLASS, as my_watcher:Lines"),
        ("my_watcher.py:Lines", "write tensorboard, or MODULE:CLASS, as my_watcher:Lines"),
        ("nowhere.here:Lines", "cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
        ("unmade:Lines", "cannot be imported (AttributeError: module 'unmade' has no attribute 'Lines')"),
        ("unmade:number", "of type int; name a class"),
        ("tensorboard", "not installed; run `pip install 'titn-pipeline[tensorboard]'`"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_done(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], name: str, words: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert f"--watch {name}: {words}" in invoke(watched.project, *command, "--watch", name, code=2)
