"""The details behind the figures: against counts by hand, and on a project that has been run."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from pipeline.config.params import load_params
from pipeline.config.recipes import ViewRecipe
from pipeline.errors import DataError
from pipeline.labels.cache import LabelCache
from pipeline.report.tables import Figure, Table
from pipeline.system.stopping import StopSignal
from pipeline.system.text import to_csv
from pipeline.views import operations
from pipeline.views.views import Views
from stages.reports.attention import attention, token_shares
from stages.reports.classes import by_class
from stages.reports.runs import FinishedRuns
from stages.reports.verdict import speeds_here, worst_mistakes
from stages.reports.views import Labelled, _described, by_operation, sample_views, teacher_on_views
from stages.shared.context import Context
from stages.shared.fitting import make_views
from stages.shared.paths import Paths
from tests.pipeline.report.test_figures import check
from tests.stages.test_soft_cli import run
from tests.support.finished_runs import finished, finished_runs, recipe
from tests.support.project import Project, unseal

MISTAKES = "Worst mistakes of titn"
CAT, DOG, COW = "cat", "dog", "$cow|"


def predictions(*rows: tuple[str, str, str]) -> list[list[object]]:
    """Rows of predictions.csv from targets, predictions and teacher's labels."""
    return [[sample, target, said, 0.5, said, said, teacher] for sample, (target, said, teacher) in enumerate(rows)]


def named(items: Sequence[Figure | Table]) -> tuple[dict[str, Figure], dict[str, Table]]:
    figures = {item.name: item for item in items if isinstance(item, Figure)}
    for figure in figures.values():
        check(figure.png)
        assert figure.alt and figure.note and figure.data is not None
    return figures, {item.title: item for item in items if isinstance(item, Table)}


def details(context: Context, runs: FinishedRuns) -> list[Figure | Table]:
    return [*by_class(runs), *teacher_on_views(context, runs), *attention(context, runs)]


def replace_note(item: Figure | Table) -> Figure | Table:
    """Give a figure whose note stands below the table that follows it a note, as `named` expects."""
    return dataclasses.replace(item, note=item.note or "below")


def cells(table: Table | None) -> list[list[str]]:
    assert table is not None
    return [list(row) for row in table.rows]


def test_classes_are_counted_as_by_hand(tmp_path: Path) -> None:
    said = predictions(
        (CAT, CAT, CAT), (CAT, DOG, DOG), (CAT, DOG, CAT), (DOG, DOG, DOG), (DOG, DOG, CAT), (COW, CAT, COW)
    )
    student = finished(tmp_path, "titn", [10.0, 60.0], predictions=said)
    worse = finished(tmp_path, "vit", [10.0, 50.0], predictions=predictions((CAT, CAT, CAT)))
    taught = predictions((CAT, CAT, ""), (CAT, DOG, ""), (CAT, CAT, ""), (DOG, DOG, ""), (DOG, CAT, ""), (COW, COW, ""))
    teacher = finished(tmp_path, "vgg16", [70.0], kind="teacher", predictions=taught)
    shown = by_class(finished_runs(recipe("digits"), student, worse, teacher, winner="vgg16"))
    figures, tables = named(shown)
    assert list(figures) == ["confusion-student", "confusion-teacher", "agreement"]
    assert cells(figures["confusion-student"].data) == [
        [COW, "0", "1", "0"],
        [CAT, "0", "1", "2"],
        [DOG, "0", "0", "2"],
    ]
    assert "3 of 6 images" in figures["confusion-student"].alt
    assert cells(tables["All classes, titn"]) == [
        [COW, "1", "0.0", "-", f"{CAT} (1)", "100.0", "100.0"],
        [CAT, "3", "33.3", "50.0", f"{DOG} (2)", "66.7", "66.7"],
        [DOG, "2", "100.0", "50.0", "-", "50.0", "50.0"],
    ]
    assert cells(tables["Agreement with the teacher by class, titn"]) == [
        [COW, "1", "0.0", "0.0", "100.0", "0.0", "100.0"],
        [DOG, "2", "50.0", "100.0", "50.0", "50.0", "0.0"],
        [CAT, "3", "66.7", "33.3", "66.7", "0.0", "33.3"],
    ]
    assert "epoch 2 of 2, seed 0; 6 test images" in figures["agreement"].note


def test_a_hundred_classes_are_a_heat_map_and_the_most_confused_pairs(tmp_path: Path) -> None:
    names = [f"class {index:03d}" for index in range(100)]
    rows = [(name, name, name) for name in names for _ in range(3)]
    rows += [(names[7], names[9], names[9])] * 5 + [(names[9], names[7], names[7])] * 2
    student = finished(tmp_path, "titn", [50.0], predictions=predictions(*rows))
    figures, tables = named(by_class(finished_runs(recipe("cifar100"), student)))
    assert list(figures) == ["confusion-student", "agreement"]
    pairs = tables["Most confused classes, titn"]
    assert cells(pairs) == [[names[7], names[9], "5", "62.5", "2"], [names[9], names[7], "2", "40.0", "5"]]
    worst = tables["The 15 worst classes, titn"]
    assert len(worst.rows) == 15 and worst.rows[0][0] == names[7]
    assert len(cells(figures["agreement"].data)) == 100


def test_without_a_teachers_labels_there_is_no_agreement_and_without_predictions_nothing(tmp_path: Path) -> None:
    alone = finished(tmp_path, "titn", [50.0], predictions=predictions((CAT, CAT, ""), (DOG, CAT, "")))
    figures, tables = named(by_class(finished_runs(recipe("digits"), alone)))
    assert list(figures) == ["confusion-student"] and list(tables) == ["All classes, titn"]
    assert by_class(finished_runs(recipe("digits"), finished(tmp_path, "vit", [50.0]))) == []
    assert by_class(finished_runs(recipe("digits"))) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sample,target\n0,cat\n", "no column prediction"),
        ("sample,target,prediction,probability,teacher\n0,cat,cat,1,\n1,dog,cat,1,dog\n", "teacher '' is none"),
    ],
)
def test_damaged_predictions_are_named(tmp_path: Path, text: str, words: str) -> None:
    student = finished(tmp_path, "titn", [50.0])
    (student.directory / "predictions.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        by_class(finished_runs(recipe("digits"), student))


def test_the_shares_of_both_tokens_are_taken_from_the_last_block_and_the_rollout() -> None:
    maps = torch.zeros(1, 2, 2, 4, 4)
    maps[:, 0] = torch.eye(4)
    maps[0, 1, 0, 0], maps[0, 1, 1, 0] = torch.tensor([0.0, 1, 0, 0]), torch.tensor([0.5, 0, 0.5, 0])
    maps[0, 1, :, 1:] = torch.eye(4)[1:]
    shares = token_shares(maps)
    assert shares[0].tolist() == [[0.5, 0.25], [0.0, 0.0], [0.25, 0.125], [0.0, 0.0]]


# On a project that has been run


@pytest.fixture(scope="module")
def trained(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with labels and a student."""
    path = tmp_path_factory.mktemp("trained") / "project"
    shutil.copytree(taught.path, path)
    project = Project(path)
    run(project, "label")
    run(project, "distill", "--student", "titn")
    return project


@contextlib.contextmanager
def opened(project: Project) -> Iterator[tuple[Context, FinishedRuns]]:
    """The project as a command sees it."""
    with contextlib.chdir(project.path):
        params = load_params(Path("params.yaml"))
        of = params.recipes["smoke"]
        context = Context(params, of, Console(file=io.StringIO()), StopSignal())
        yield context, FinishedRuns.read(of, Paths(of.name))


@pytest.fixture(scope="module")
def shown(trained: Project) -> tuple[dict[str, Figure], dict[str, Table]]:
    with opened(trained) as (context, runs):
        return named(details(context, runs))


def test_everything_is_drawn_of_a_project_that_has_been_run(
    trained: Project, shown: tuple[dict[str, Figure], dict[str, Table]]
) -> None:
    figures, tables = shown
    assert list(figures) == [
        "confusion-student", "confusion-teacher", "agreement", "teacher-on-views", "sample-views", "attention-titn",
    ]  # fmt: skip
    assert any(title.startswith("All classes") for title in tables)
    summary = json.loads((trained.data / "students" / "titn" / "metrics.json").read_text())
    confusion = cells(figures["confusion-student"].data)
    assert sum(int(cell) for row in confusion for cell in row[1:]) == summary["num_test"]
    hits = sum(int(row[1 + index]) for index, row in enumerate(confusion))
    assert 100 * hits / summary["num_test"] == pytest.approx(summary["test"]["top1"])
    agreed = cells(figures["agreement"].data)
    overall = sum(float(row[1]) * float(row[2]) for row in agreed) / summary["num_test"]
    assert overall == pytest.approx(summary["test"]["agreement"], abs=0.1)


def test_labels_are_compared_with_targets_and_views_are_those_that_were_labelled(
    trained: Project, shown: tuple[dict[str, Figure], dict[str, Table]]
) -> None:
    figures, _ = shown
    cache = LabelCache.open(trained.data / "labels/default.h5")
    with opened(trained) as (context, _):
        dataset = context.dataset()
        batches = [
            make_views(context, dataset, "default").batch(view, np.arange(len(dataset.train))) for view in (0, 1)
        ]
    assert "2 of 2 views (0, 1)" in figures["teacher-on-views"].note
    right = [
        cache.labels[view] == np.where(batch.lam >= 0.5, batch.labels, batch.partner_labels)
        for view, batch in enumerate(batches)
    ]
    total = cells(figures["teacher-on-views"].data)[0]
    assert total[2:4] == [str(cache.labels.size), f"{100 * np.mean(right):.1f}"]
    rows = cells(figures["sample-views"].data)
    assert len(rows) == 6
    for sample, _, target, _, other, share, label, _ in rows:
        index = int(sample)
        assert label == dataset.class_names[cache.labels[0, index]]
        assert target == dataset.class_names[batches[0].labels[index]]
        assert other == dataset.class_names[batches[0].partner_labels[index]]
        assert share == f"{batches[0].lam[index]:.4f}"


def test_attention_adds_up(shown: tuple[dict[str, Figure], dict[str, Table]]) -> None:
    maps = cells(shown[0]["attention-titn"].data)
    sums = np.array([[float(value) for value in row[3:]] for row in maps]).sum(axis=1)
    assert len(maps) == 6 * 4 and (sums > 0).all() and (sums <= 1.001).all()


def test_the_worst_mistakes_are_the_wrong_answers_with_the_highest_probability(
    trained: Project, tmp_path: Path
) -> None:
    shutil.copytree(trained.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    file = unseal(project.data / "students/titn") / "predictions.csv"
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    wrong = [row for row in rows if row["prediction"] != row["target"]]
    worst = sorted(wrong, key=lambda row: -float(row["probability"]))[:12]
    assert len(wrong) >= 12, "the student of a few seconds"
    expected = [
        [row["target"], row["prediction"], f"{100 * float(row['probability']):.0f}", row["teacher"]] for row in worst
    ]
    for paths in ([], [f"=a/{row['sample']}.png" for row in rows]):
        if paths:
            headings = [*(key for key in rows[0] if key != "path"), "path"]
            cells_ = [[*(row[key] for key in headings[:-1]), path] for row, path in zip(rows, paths, strict=True)]
            file.write_bytes(to_csv(headings, cells_))
        with opened(project) as (context, runs):
            figures, tables = named([replace_note(item) for item in worst_mistakes(context, runs)])
        assert list(figures) == ["worst-mistakes"] and f"{len(wrong)} of them wrong" in tables[MISTAKES].note
        assert [row[1:] for row in cells(tables[MISTAKES])] == expected
        named_ = [row[0] for row in cells(tables[MISTAKES])]
        assert not paths or named_ == [paths[int(row["sample"])] for row in worst]


def test_the_speed_of_teacher_and_student_is_measured_where_their_weights_are(trained: Project) -> None:
    with opened(trained) as (context, runs):
        speeds, how = speeds_here(context, runs)
        assert speeds.keys() == {"teacher", "student"} and min(speeds.values()) > 0 and "batches of 64" in how
        (runs.students["titn"].directory / "best.safetensors").rename("elsewhere")
        assert speeds_here(context, runs) == ({}, "images/s are left out: the weights of both are not here.")
        Path("elsewhere").rename(runs.students["titn"].directory / "best.safetensors")


def test_views_that_do_not_mix_are_shown_beside_each_other(trained: Project) -> None:
    cache = LabelCache.open(trained.data / "labels/default.h5")
    with opened(trained) as (context, _):
        dataset = context.dataset()
        recipe_ = ViewRecipe(count=2, flip=True, rotation=10.0, brightness=0.2)
        images = torch.from_numpy(np.ascontiguousarray(dataset.train.images[:])).permute(0, 3, 1, 2)
        views = Views(images, torch.from_numpy(dataset.train.labels), recipe_)
        labelled = Labelled("plain", dataset, cache, views)
        figures, _ = named([sample_views(labelled), *by_operation(labelled)])
    assert list(figures) == ["sample-views-plain", "teacher-on-views-plain"]
    assert [row[1] for row in cells(figures["sample-views-plain"].data)] == ["0"] * 6 + ["1"] * 6
    assert "either target %" not in (figures["teacher-on-views-plain"].data or Table("", (), ())).columns


def test_an_operation_is_told_with_what_it_was_given_even_nothing(trained: Project) -> None:
    cache = LabelCache.open(trained.data / "labels/default.h5")
    told: list[str] = []
    with opened(trained) as (context, _):
        dataset = context.dataset()
        images = torch.from_numpy(np.ascontiguousarray(dataset.train.images[:])).permute(0, 3, 1, 2)
        for seed in range(4):
            views = Views(
                images,
                torch.from_numpy(dataset.train.labels),
                ViewRecipe(count=2, seed=seed, autoaugment="trivialaugment"),
            )
            for row in cells(sample_views(Labelled("plain", dataset, cache, views)).data):
                drawn = views.drawn(int(row[1]))
                number, magnitude = (drawn[name][int(row[0]), 0] for name in ("operations", "magnitudes"))
                told.append(row[7])
                if number == operations.NO_OPERATION:
                    assert row[7] == ""
                    continue
                name, *rest = row[7].split()
                assert name == operations.OPERATIONS[number]
                assert len(rest) == (name not in operations.WITHOUT_MAGNITUDE)
                if name.startswith("Translate"):
                    assert rest == [f"{int(magnitude):+d}"]
                elif rest:
                    assert float(rest[0]) == pytest.approx(magnitude, rel=0.05, abs=0.5 * (abs(magnitude) >= 2))
    assert {"Solarize 0", "TranslateX +0", "ShearY +0"} & set(told), told


def test_what_is_cut_and_what_is_erased_is_told_where_it_is_any() -> None:
    drawn = {
        "resized_crop": np.array([[10, 20, 130, 100], [0, 0, 5, 6]]),
        "resized_crop_share": np.array([0.5, 0.1]),
        "flip": np.array([True, False]),
        "erasing": np.array([[1, 2, 9, 5], [0, 0, 0, 0]]),
    }
    assert _described(drawn, 0) == ["120x80 at 10,20", "flip", "black 8x3 at 1,2"]
    assert _described(drawn, 1) == ["5x6 at 0,0"]


def test_what_is_missing_leaves_out_what_it_is_needed_for(trained: Project, tmp_path: Path) -> None:
    for gone, drawing in (("prepared", (teacher_on_views, attention)), ("labels", (teacher_on_views,))):
        shutil.copytree(trained.path, tmp_path / gone)
        project = Project(tmp_path / gone)
        shutil.rmtree(project.data / gone)
        with opened(project) as (context, runs):
            assert runs.students and [draw(context, runs) for draw in drawing] == [[]] * len(drawing)
    (tmp_path / "labels/data/smoke/students/titn/best.safetensors").unlink()
    with opened(Project(tmp_path / "labels")) as (context, runs):
        assert runs.students and attention(context, runs) == []


def test_damaged_labels_are_named(trained: Project, tmp_path: Path) -> None:
    shutil.copytree(trained.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    file = project.data / "labels/default.h5"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with opened(project) as (context, runs), pytest.raises(DataError, match=r"default\.h5"):
        teacher_on_views(context, runs)


@pytest.mark.slow
def test_labels_of_other_views_keep_nothing_else_from_the_report(trained: Project, tmp_path: Path) -> None:
    shutil.copytree(trained.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    project.edit("crop: 2, flip: false", "crop: 1, flip: false")
    out = run(project, "report")
    assert "left out: The teacher on augmented views: " in out and "default.h5" in out
    text = (project.data / "reports/report.md").read_text()
    assert "### Attention over the patches" in text and "### Sample views" not in text
