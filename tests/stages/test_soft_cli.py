"""What is kept beside the labels, views labelled in slices, and students that learn from it, through the commands.

The first test runs each command in a new process. The others run in this process, which is faster.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.labels.cache import LabelCache
from tests.support.in_process import invoke as run
from tests.support.project import Project

FILE = "data/smoke/labels/default.h5"


@pytest.fixture
def project(taught: Project, tmp_path: Path) -> Project:
    shutil.copytree(taught.path, tmp_path / "project")
    return Project(tmp_path / "project")


def kept(project: Project) -> LabelCache:
    return LabelCache.open(project.path / FILE)


def labelled(project: Project, *arguments: str) -> bytes:
    """Label every view at once, starting over, and return the file."""
    run(project, "label", "--fresh", *arguments)
    return (project.path / FILE).read_bytes()


def metrics(directory: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((directory / "metrics.json").read_text())
    return result


def test_from_kept_classes_to_a_soft_student(project: Project) -> None:
    assert "topk=3, sealed" in project.run("label", "--keep", "topk=3")
    assert json.loads(project.run("labels", "inspect", FILE, "--json"))["topk"] == 3
    out = project.run("labels", "verify", FILE, "--sample", "300")
    assert "0 differ" in out and "probabilities differ by at most" in out
    project.run("distill", "--student", "deit", "--soft", "2", "--confidence", "--views", "1")
    student = metrics(project.path / "data/runs/smoke/deit-soft-2-confidence-on-num_views-1")
    assert (student["soft"], student["confidence"], student["views"], student["distilled"]) == (2.0, True, 1, True)
    assert not (project.data / "students").exists()


# What is kept


def test_a_file_that_keeps_less_than_is_asked_is_refused_with_the_way_out(project: Project) -> None:
    run(project, "label")
    before = (project.path / FILE).read_bytes()
    out = run(project, "label", "--keep", "topk=3", code=3)
    for word in (FILE, "keeps argmax", "--keep asks for topk=3", "pipeline label --recipe smoke --keep topk=3 --fresh"):
        assert word in out
    project.edit("label: {batch_size: 256", "label: {topk: 4, batch_size: 256")
    out = run(project, "label", code=3)
    assert "recipes.smoke.label.topk asks for topk=4" in out and "`pipeline label --recipe smoke --fresh`" in out
    dry = run(project, "teacher-select", "--teachers", "squeezenet1_1", "--dry-run")
    assert "labels of the views default: refused: " in dry and "keeps argmax" in dry and "asks for topk=4" in dry
    assert (project.path / FILE).read_bytes() == before
    run(project, "label", "--fresh")
    assert kept(project).topk == 4
    out = run(project, "label", "--keep", "topk=5", code=3)
    assert "keeps topk=4" in out


def test_what_is_kept_is_never_dropped_and_extends_to_the_bytes_of_a_file_made_at_once(project: Project) -> None:
    whole = labelled(project, "--keep", "topk=3")
    for asked in ([], ["--keep", "argmax"], ["--keep", "topk=2"]):
        assert "up to date" in run(project, "label", *asked)
    project.edit("count: 2", "count: 4")
    out = run(project, "label")
    assert "keeps topk=3 and goes on with it; argmax was asked for" in out and "labelled 2/2 views" in out
    extended = (project.path / FILE).read_bytes()
    assert extended != whole and extended == labelled(project, "--keep", "topk=3")


def test_the_labels_are_the_same_whatever_is_kept_beside_them(project: Project) -> None:
    run(project, "label")
    plain = kept(project)
    run(project, "label", "--keep", "topk=10", "--fresh")
    full = kept(project)
    assert np.array_equal(plain.labels, full.labels) and full.probabilities is not None
    assert np.allclose(full.probabilities.astype(np.float32).sum(axis=2), 1, atol=2e-3)


# Slices


def test_slices_in_any_order_give_the_bytes_of_one_run(project: Project) -> None:
    project.edit("count: 2", "count: 5")
    whole = labelled(project, "--keep", "topk=2")
    project.forget("labels/default.h5")
    keep = ("--keep", "topk=2")
    out = run(project, "label", "--views", "3:", *keep)
    assert "labelled 2/2 views" in out and f"{FILE}: not sealed yet, the views 0:3 are missing" in out
    assert not (project.path / FILE).exists()
    run(project, "label", "--views", "1:2")  # without --keep
    out = run(project, "label", "--views", ":2", *keep)
    assert "1 finished view is damaged, or of another" in out and "labelled 2/2 views" in out
    assert kept(project).num_views == 2
    out = run(project, "label", "--views", "2:4", *keep)  # 3 is there already, and so is 4
    assert "labelled 1/1 views" in out and "5 views" in out
    assert (project.path / FILE).read_bytes() == whole
    assert "up to date" in run(project, "label", "--views", "1:5", *keep)
    rest = [path for path in (project.path / "data/work").rglob("*.part")]
    assert rest == []


@pytest.mark.slow
def test_slices_go_beyond_the_recipes_count_and_a_gap_is_named(project: Project) -> None:
    run(project, "label")
    before = (project.path / FILE).read_bytes()
    out = run(project, "label", "--views", "5:6")
    assert "not sealed yet, the views 2:5 are missing" in out
    assert "the views 2:5, 6:8 are missing" in run(project, "label", "--views", "8:9")
    assert (project.path / FILE).read_bytes() == before
    assert "up to date, 2 views" in run(project, "label")
    run(project, "label", "--views", "2:5")
    assert kept(project).num_views == 6
    extended = (project.path / FILE).read_bytes()
    project.edit("count: 2", "count: 6")
    assert extended == labelled(project)


@pytest.mark.slow
def test_the_ranks_of_a_group_share_a_slice(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.edit("count: 2", "count: 6")
    whole = labelled(project, "--keep", "topk=2")
    project.forget("labels/default.h5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for views in ("0:3", "3:6"):
        for rank in ("1", "0"):  # rank 0 waits for the other's views
            monkeypatch.setenv("RANK", rank)
            run(project, "label", "--views", views, "--keep", "topk=2")
            if rank == "1":
                names = {path.name for path in (project.path / "data/work/smoke/labels/default").glob("*.part")}
                assert names == {"0:3": {"000001.part"}, "3:6": {"000003.part", "000005.part"}}[views]
    assert (project.path / FILE).read_bytes() == whole


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--views", "5"), ["--views 5", "A:B"]),
        (("--views", ":"), ["--views :", "A:B"]),
        (("--views", "a:b"), ["--views a:b"]),
        (("--views", "-1:2"), ["--views -1:2"]),
        (("--views", "3:3"), ["from 3 to 3", "A < B"]),
        (("--views", "4:2"), ["from 4 to 2"]),
        (("--views", ":0"), ["from 0 to 0"]),
        (("--views", "2:"), ["from 2 to 2", "recipes.smoke.views.default.count"]),
        (("--views", "0:100001"), ["100001", "100000"]),
        (("--views", "0:1", "--fresh"), ["--fresh", "--views", FILE]),
        (("--keep", "five"), ["--keep five", "topk=5"]),
        (("--keep", "topk=0"), ["--keep topk=0", "argmax"]),
        (("--keep", "topk=11"), ["--keep", "topk=11", "10 classes"]),
    ],
)
def test_a_wrong_slice_or_number_of_classes_is_named(
    taught: Project, arguments: tuple[str, ...], words: list[str]
) -> None:
    out = run(taught, "label", *arguments, code=2)
    for word in words:
        assert word in out


# Students


@pytest.mark.slow
def test_students_learn_from_what_is_kept_and_say_so(project: Project) -> None:
    run(project, "label", "--keep", "topk=10")
    deit = ("distill", "--student", "deit")
    for options in ([], ["--soft", "1"], ["--soft", "0.5"], ["--confidence"], ["--soft", "1", "--confidence"]):
        run(project, *deit, *options)
    online = ("--labels", "online", "--teacher", "data/smoke/teacher")
    run(project, *deit, "--soft", "1", *online)
    runs = project.path / "data/runs/smoke"
    assert {path.name for path in runs.iterdir()} == {
        "deit-soft-1", "deit-soft-0.5", "deit-confidence-on", "deit-soft-1-confidence-on", "deit-labels-online-soft-1",
    }  # fmt: skip
    by_run = {path.name: metrics(path) for path in (*runs.iterdir(), project.data / "students/deit")}
    said = {name: (run_metrics["soft"], run_metrics["confidence"]) for name, run_metrics in by_run.items()}
    assert said["deit"] == (None, False) and said["deit-soft-1-confidence-on"] == (1.0, True)
    assert said["deit-soft-0.5"] == (0.5, False) and said["deit-confidence-on"] == (None, True)
    scores = [json.dumps(run_metrics["last"]) for name, run_metrics in by_run.items() if "online" not in name]
    assert len(set(scores)) == len(scores), "each learns something else"
    cached, online_run = by_run["deit-soft-1"]["last"], by_run["deit-labels-online-soft-1"]["last"]
    assert cached["top1"] == pytest.approx(online_run["top1"], abs=3.0), "all classes are kept: only rounding differs"
    described = json.loads((runs / "deit-soft-0.5/best.json").read_text())
    assert (described["soft"], described["confidence"], described["views"]) == (0.5, False, 2)
    assert "up to date" in run(project, *deit, "--soft", "1")
    run(project, "label", "--keep", "topk=2", "--fresh")
    assert "up to date" not in run(project, *deit, "--soft", "1"), "another K is another run"
    assert "up to date" in run(project, *deit), "hard labels are the same"


@pytest.mark.slow
def test_a_student_can_train_on_fewer_views_than_the_recipes(project: Project) -> None:
    project.edit("count: 2", "count: 4")
    run(project, "label", "--views", ":2")
    out = run(project, "distill", "--student", "deit", code=3)
    assert "2 views, the recipe asks for 4" in out and "--views" in out
    out = run(project, "distill", "--student", "deit", "--views", "3", code=3)
    for word in ("2 views", "--views asks for 3", "pipeline label --recipe smoke --views :3"):
        assert word in out
    run(project, "distill", "--student", "deit", "--views", "2")
    run(project, "distill", "--student", "deit", "--views", "1")
    runs = project.path / "data/runs/smoke"
    assert [metrics(runs / f"deit-num_views-{count}")["views"] for count in (1, 2)] == [1, 2]
    run(project, "label", "--views", "2:4")
    run(project, "distill", "--student", "deit", "--views", "4")
    assert metrics(project.data / "students/deit")["views"] == 4, "the recipe's own number is the recipe's own run"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("vit", "--soft", "2"), ["--soft 2", "vit", "no distillation head", "deit"]),
        (("vit", "--confidence"), ["--confidence", "vit", "no distillation head"]),
        (("deit", "--soft", "2", "--labels", "none"), ["--soft 2", "--labels none"]),
        (("deit", "--confidence", "--labels", "none"), ["--confidence", "--labels none"]),
        (("deit", "--soft", "0.00001"), ["students.deit.soft: 1e-05", "0.01 to 1000.0, or 0"]),
        (("deit", "--set", "soft=1001"), ["students.deit.soft: 1001", "0.01 to 1000.0, or 0"]),
        (("deit", "--soft", "-1"), ["-1.0", "0.0<=x<=1000.0"]),
        (("deit", "--soft", "nan"), ["nan", "not a finite number"]),
        (("deit", "--soft", "inf"), ["inf", "0.0<=x<=1000.0"]),
        (("deit", "--soft", "2", "--set", "soft=3"), ["--set soft=3 --soft 2", "one of them"]),
        (("vit", "--set", "soft=2"), ["--soft 2", "vit", "no distillation head", "deit"]),
        (("deit", "--views", "0"), ["0 is not in the range"]),
    ],
)
def test_what_a_student_cannot_learn_is_refused(taught: Project, arguments: tuple[str, ...], words: list[str]) -> None:
    out = run(taught, "distill", "--student", *arguments, code=2)
    for word in words:
        assert word in out


def test_a_cache_without_probabilities_names_the_way_out(project: Project) -> None:
    run(project, "label")
    for options in (["--soft", "2"], ["--confidence"]):
        out = run(project, "distill", "--student", "deit", *options, code=3)
        for word in (FILE, "keeps argmax", " ".join(options), "pipeline label --recipe smoke --keep topk=5 --fresh"):
            assert word in out


# A recipe that is soft


@pytest.mark.slow
def test_a_soft_recipe_needs_no_option_and_the_command_goes_before_it(project: Project) -> None:
    project.edit("label: {batch_size: 256", "label: {topk: 5, batch_size: 256")
    run(project, "label")
    deit = ("distill", "--student", "deit")
    run(project, *deit)
    hard = project.data / "students/deit"
    before = (hard / "best.json").read_bytes()
    project.edit("      deit: {}", "      deit: {soft: 2}")
    assert "deit: trains again (soft none -> 2, topk none -> 5)" in run(project, *deit)
    directory = project.data / "students/deit"
    meta = json.loads((directory / "best.json").read_text())
    assert (metrics(directory)["soft"], metrics(directory)["differs"]) == (2.0, {})
    assert (meta["training"]["soft"], meta["inputs"]["topk"], meta["soft"]) == (2.0, 5, 2.0)
    for same in (["--soft", "2"], ["--set", "soft=2.0"]):
        assert "up to date (data/smoke/students/deit)" in run(project, *deit, *same), "it is what the recipe says"
    run(project, *deit, "--soft", "0")
    run(project, *deit, "--set", "soft=4")
    run(project, *deit, "--labels", "none")
    runs = project.path / "data/runs/smoke"
    temperatures = {path.name: metrics(path)["soft"] for path in runs.iterdir()}
    assert temperatures == {"deit-soft-0": None, "deit-soft-4": 4.0, "deit-labels-none": None}
    off = json.loads((runs / "deit-soft-0/best.json").read_text())
    assert off["fingerprint"] == json.loads(before)["fingerprint"], "as if the recipe had never been soft"
    assert off["sha256"] == json.loads(before)["sha256"]
    dry = run(project, *deit, "--soft", "4", "--dry-run")
    assert "up to date (data/runs/smoke/deit-soft-4)" in dry


def test_a_soft_recipe_that_cannot_be_is_refused_early(project: Project) -> None:
    project.edit("label: {batch_size: 256", "label: {topk: 5, batch_size: 256")
    project.edit("      vit: {}", "      vit: {soft: 2}")
    out = run(project, "distill", "--student", "vit", code=2)
    for word in ("students.vit.soft: 2", "no distillation head", "set it to 0", "deit"):
        assert word in out
    run(project, "distill", "--student", "vit", "--soft", "0", "--dry-run")
    run(project, "label", "--keep", "topk=5")
    project.edit("topk: 5, ", "")
    out = run(project, "prepare", code=2)
    for word in ("recipes.smoke.students.vit.soft: 2", "recipes.smoke.label.topk is 0", "topk: 5", "set soft to 0"):
        assert word in out


def test_a_soft_recipe_names_what_its_labels_lack(project: Project) -> None:
    run(project, "label")
    project.edit("label: {batch_size: 256", "label: {topk: 5, batch_size: 256")
    project.edit("      deit: {}", "      deit: {soft: 2}")
    out = run(project, "distill", "--student", "deit", code=3)
    assert "students.deit.soft: 2 needs the teacher's probabilities; run `pipeline label --recipe smoke --fresh`" in out
