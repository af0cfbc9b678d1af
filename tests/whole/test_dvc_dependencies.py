"""What each DVC stage depends on: the code that decides its result, and none that only shows it."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from ruamel.yaml import YAML

from pipeline.training.manifest import MANIFEST
from stages.shared.runs import CHECKPOINTS, OUTPUTS
from tests.support.project import ROOT

STAGES = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
DATA = {"pipeline/config/recipes.py", "pipeline/data/datasets.py", "pipeline/data/arrays.py"}
VIEWS = {
    "pipeline/system/compiling.py",
    "pipeline/views/draws.py",
    "pipeline/views/mixing.py",
    "pipeline/views/per_image.cpp",
    "pipeline/views/policies.py",
    "pipeline/views/views.py",
}
TRAINING = {
    "pipeline/losses.py",
    "pipeline/models/network.py",  # the precision of the last layer
    "pipeline/system/runtime.py",  # the precision
    "pipeline/training/column_sum.py",
    "pipeline/training/distributed.py",
    "pipeline/training/fit.py",
    "pipeline/training/optimization.py",
    "pipeline/training/step.py",  # steps replayed from CUDA graphs too
    "stages/shared/fitting.py",
}
DECIDING = {
    "prepare": {*DATA, "pipeline/data/sources.py", "stages/prepare.py"},
    "teacher": {
        *DATA,
        *VIEWS,
        *TRAINING,
        "pipeline/models/own.py",
        "pipeline/models/teachers.py",
        "pipeline/models/weights.py",
        "stages/teacher.py",
    },
    "select": {"stages/selection.py"},
    "label": {
        *DATA,
        *VIEWS,
        "pipeline/labels/teacher.py",
        "pipeline/models/folding.py",
        "pipeline/models/network.py",
        "pipeline/models/own.py",
        "pipeline/models/weights.py",
        "pipeline/system/canonical.py",
        "stages/shared/labellers.py",
    },
    "student": {
        *DATA,
        *VIEWS,
        *TRAINING,
        "pipeline/labels/source.py",
        "pipeline/models/own.py",
        "pipeline/models/students/titn.py",
    },
    "report": {
        "pipeline/report/tables.py",
        "pipeline/models/counting.py",
        "stages/reports/tables.py",
        "stages/shared/runs.py",
    },
}
SHOWING = {
    "README.md",
    "docs/tutorial.md",
    "pipeline/report/progress.py",
    "pipeline/report/tables.py",
    "pipeline/report/watching.py",
    "pipeline/system/stopping.py",
    "pipeline/system/threads.py",
    "stages/cli.py",
    "stages/reports/tables.py",
    "stages/shared/options.py",
    "stages/shared/watching.py",
}


def code(stage: str) -> list[PurePosixPath]:
    """Return the code that a stage depends on."""
    deps = STAGES[stage].get("do", STAGES[stage])["deps"]
    return [PurePosixPath(path) for path in deps if not path.startswith("data/")]


@pytest.mark.parametrize("stage", STAGES)
def test_what_decides_a_stages_result_is_a_dependency(stage: str) -> None:
    for file in DECIDING[stage]:
        assert (ROOT / file).is_file(), file
        assert any(PurePosixPath(file).is_relative_to(path) for path in code(stage)), file


@pytest.mark.parametrize("stage", ["prepare", "teacher", "select", "label", "student"])
def test_what_only_shows_results_reruns_no_training(stage: str) -> None:
    for file in SHOWING:
        assert (ROOT / file).is_file(), file
        assert not any(PurePosixPath(file).is_relative_to(path) for path in code(stage)), file


def test_teachers_and_students_do_not_depend_on_each_other() -> None:
    assert not any(path.is_relative_to("pipeline/models/students") for path in code("teacher"))
    assert PurePosixPath("pipeline/models/teachers.py") not in code("student")


@pytest.mark.parametrize(("stage", "checkpoints"), [("teacher", CHECKPOINTS[:2]), ("student", CHECKPOINTS)])
def test_dvc_has_every_file_of_a_run_or_its_checkout_would_mix_runs(stage: str, checkpoints: tuple[str, ...]) -> None:
    parts = STAGES[stage]["do"]
    outs = [
        next(iter([out] if isinstance(out, str) else out)) for out in parts["outs"] + parts["metrics"] + parts["plots"]
    ]
    assert sorted(PurePosixPath(out).name for out in outs) == sorted([*checkpoints, *OUTPUTS, MANIFEST])


def test_dvc_sees_the_selected_teachers_labels_and_no_others() -> None:
    pathspec = pytest.importorskip("pathspec", reason="comes with the extra dvc")
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".dvcignore").read_text().splitlines())
    assert ignored.match_file("data/digits/labels/default@api.h5")
    assert not any(map(ignored.match_file, ("data/digits/labels/default.h5", "data/digits/teacher/best.json")))


def test_every_dependency_is_there_and_the_file_is_short() -> None:
    assert all((ROOT / path).exists() for stage in STAGES for path in code(stage))
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 150
