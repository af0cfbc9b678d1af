"""The report's tables and files, of runs made up for it."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from pathlib import Path

import pytest

from pipeline.config.recipes import deciding_values
from pipeline.report import paper
from pipeline.report.tables import Table
from stages.reports.runs import FinishedRuns
from stages.reports.tables import all_teachers, drops_table, students_tables
from tests.support import report_project
from tests.support.browser import in_a_browser
from tests.support.finished_runs import recipe
from tests.support.in_process import invoke
from tests.support.project import Project

REPORTS = f"data/{report_project.RECIPE}/reports"
REPORT = ("report", "--recipe", report_project.RECIPE)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with its report. Tests that change anything copy it."""
    project = report_project.create(tmp_path_factory.mktemp("report") / "project")
    invoke(project, *REPORT)
    return project


@pytest.fixture
def project(written: Project, tmp_path: Path) -> Project:
    shutil.copytree(written.path, tmp_path / "project")
    return Project(tmp_path / "project")


def table(project: Project, name: str) -> dict[str, dict[str, str]]:
    """Read a table's CSV as rows by their first cell."""
    with (project.path / REPORTS / "tables" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {next(iter(row.values())): row for row in rows}


def test_table_2_has_the_papers_figure_beside_each_of_ours(written: Project) -> None:
    rows = table(written, "table-2")
    assert [name.removesuffix(" (selected)") for name in rows] == list(recipe("cifar100").teachers)
    row = rows["densenet121"]
    assert (row["best test top-1 %"], row["paper: best test top-1 %"], row["best test top-1 %: difference"]) == (
        "74.00", "69.06", "+4.94",
    )  # fmt: skip
    assert row["last test top-1 %"] == "73.75" and row["best epoch"] == "19 of 20"
    assert "vgg16_bn (selected)" in rows


def test_several_seeds_are_their_mean_and_deviation(written: Project) -> None:
    row = table(written, "table-3")["titn"]
    assert row["best test top-1 %"] == "76.00 ± 1.00 (3)", "75, 76 and 77"
    assert row["best test top-1 %: difference"] == f"{76 - 74.71:+.2f}"
    assert row["best epoch"] == "19, 19, 19 of 20"
    assert table(written, "table-3")["deit"]["best test top-1 %"] == "73.00"
    assert ", titn 0 1 2, tnt 0," in (written.path / REPORTS / "report.md").read_text()


def test_costs_stand_beside_the_papers(written: Project) -> None:
    row = table(written, "table-3-continued")["titn"]
    assert (row["paper GMACs, batch 1024"], row["paper: paper GMACs, batch 1024"]) == ("111.40", "111.40")
    assert (row["GFLOPs of one image"], row["parameters, M: difference"]) == ("0.220", "0.00")


def test_table_1_counts_what_the_paper_counts(written: Project) -> None:
    rows = table(written, "table-1")
    assert list(rows) == list(recipe("cifar100").students)
    assert [rows[name]["parameters, M"] for name in ("vit", "deit", "tnt", "titn")] == ["5.39", "5.41", "5.83", "5.85"]
    assert (rows["vit"]["paper: Table 1"], rows["vit"]["paper: Table 3"]) == ("5.36", "5.39")
    assert (rows["titn"]["pixel size"], rows["vit"]["pixel size"]) == ("2", "-")


def test_table_6_has_ours_and_all_that_the_paper_prints(written: Project) -> None:
    with (written.path / REPORTS / "tables/table-6.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ours = {row["student"]: row for row in rows}["titn"]
    assert (ours["teacher top-1 %"], ours["change"]) == ("72.00", "+4.00")
    assert ours["paper: change"] == f"{74.71 - 79.80:+.2f}".lstrip("+")
    assert len(rows) == 4 + len(paper.TRANSFERS), "the four students with a distillation head"
    printed = {(row["teacher"], row["student"]): row["paper: change"] for row in rows}
    assert printed["Swin-L", "ResNet50"] == "-11.04" and printed["VGG16-BN", "TITN (the paper's)"] == "-3.93"


def test_where_the_papers_table_6_does_not_add_up_is_known() -> None:
    wrong = [row.teacher for row in paper.TRANSFERS if abs(row.after - row.before - row.change) > 0.005]
    assert wrong == ["ResNet56", "DeiT"]


def test_other_runs_are_compared_with_the_recipes_own(written: Project) -> None:
    rows = table(written, "other-runs-on-cifar100")
    assert rows["titn"]["differs in"] == "labels cached -> none"
    assert (rows["titn"]["the recipe's test top-1 %"], rows["titn"]["difference"]) == ("76.00 ± 1.00 (3)", "-5.00")
    optimizers = table(written, "figure-5-in-figures")
    assert (optimizers["rmsprop"]["paper: top-1 %"], optimizers["adam"]["best test top-1 %"]) == ("73.41", "not run")


def test_report_json_has_every_run(written: Project) -> None:
    figures = json.loads((written.path / REPORTS / "report.json").read_text())
    assert figures["selected"] == "vgg16_bn" and len(figures["models"]) == 14
    assert figures["models"]["titn"]["run"]["device"] == "a processor, 2 threads"
    assert "titn-seed-2" in figures["other_runs"]
    folder = written.path / REPORTS
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {*figures["files"], "report.json"}
    assert {"figures/figure-4.png", "figures/figure-6.png", "tables/figure-6.csv"} <= files


def test_what_is_not_tracked_can_be_left_out(project: Project) -> None:
    invoke(project, *REPORT, "--tracked-only")
    assert table(project, "table-3")["titn"]["best test top-1 %"] == "75.00"
    assert "data/runs are left out" in (project.path / REPORTS / "report.md").read_text()
    folder = project.path / REPORTS
    assert not (folder / "tables/other-runs-on-cifar100.csv").exists(), "a former report's tables are deleted"
    assert not (folder / "figures/figure-5.png").exists()


def test_what_is_left_out_is_not_read_either(project: Project) -> None:
    """A damaged run there would end `dvc repro`, which does not know it; nor does it vote on which data are these."""
    of, paths = recipe(report_project.RECIPE), report_project.Paths(report_project.RECIPE, project.path)
    for seed in range(30):
        report_project.add(project, "tnt", 99.0, seed=seed + 10, data="e" * 64)
    assert FinishedRuns.read(of, paths).teachers == {}
    runs = FinishedRuns.read(of, paths, tracked_only=True)
    assert len(runs.teachers) == 8 and not runs.others and not runs.left_out
    (project.path / "data/runs/cifar100/titn-seed-1/metrics.json").write_text('{"name": ')
    assert "titn-seed-1/metrics.json" in invoke(project, *REPORT, "--no-figures", code=3)
    invoke(project, *REPORT, "--no-figures", "--tracked-only")


def test_only_what_a_former_report_lists_as_its_own_is_deleted(project: Project) -> None:
    folder = project.path / "out"
    invoke(project, *REPORT, "--out", "out", "--no-figures")
    listed = json.loads((folder / "report.json").read_text())
    for name in ("tables/mine.csv", "precious.csv", "tables/old.csv"):
        (folder / name).write_text("")
    listed["files"] += ["tables/old.csv", "precious.csv", "tables/../precious.csv", 7]
    (folder / "report.json").write_text(json.dumps(listed))
    invoke(project, *REPORT, "--out", "out", "--no-figures")
    assert (folder / "tables/mine.csv").exists() and (folder / "precious.csv").exists()
    assert not (folder / "tables/old.csv").exists()
    (folder / "report.json").write_text("not JSON")
    left = [folder / f"{place}.0123456789abcdef.tmp" for place in (".report.md", "tables/.gone.csv", "figures/.a.png")]
    for file in left:
        file.write_text("half")
    invoke(project, *REPORT, "--out", "out", "--no-figures")
    assert not any(file.exists() for file in left), "a killed report's"
    assert json.loads((folder / "report.json").read_text())["recipe"] == "cifar100"


def test_without_matplotlib_the_report_names_the_way_out(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    error = invoke(project, *REPORT, code=2)
    assert "pip install 'titn-pipeline[report]'" in error and "--no-figures" in error
    invoke(project, *REPORT, "--no-figures")
    assert "left out by --no-figures" in (project.path / REPORTS / "report.md").read_text()
    assert not list((project.path / REPORTS / "figures").iterdir())


def test_a_run_whose_settings_have_changed_is_named_and_is_no_seed_of_the_recipes(project: Project) -> None:
    former = {**deciding_values(recipe("cifar100").students["titn"]), "epochs": 20}
    for folder, alpha in (
        ("cifar100/students/titn", 0.5),
        ("runs/cifar100/titn-seed-1", 0.9),
        ("runs/cifar100/titn-seed-2", 0.5),
    ):
        file = project.path / "data" / folder / "best.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "training": {**former, "alpha": alpha}}))
    invoke(project, *REPORT, "--no-figures")
    assert table(project, "table-3")["titn"]["best test top-1 %"] == "76.00 ± 1.41 (2)", "75 and 77"
    text = (project.path / REPORTS / "report.md").read_text()
    assert "titn was trained before params.yaml changed: epochs 20 -> 600." in text
    assert (
        "Left out, titn: seed 1 (alpha 0.5 -\\> 0.9)." in text or "Left out, titn: seed 1 (alpha 0.5 -> 0.9)." in text
    )


def test_rows_stay_where_nothing_has_been_run(tmp_path: Path) -> None:
    project = report_project.create(tmp_path / "project", seeds=0)
    shutil.rmtree(project.path / "data")
    out = invoke(project, *REPORT)
    rows = table(project, "table-3")
    assert list(rows) == ["vgg16_bn (the paper's teacher)", *recipe("cifar100").students]
    assert all(
        row["best test top-1 %"] == "not run" and row["paper: best test top-1 %"] != "-" for row in rows.values()
    )
    text = (project.path / REPORTS / "report.md").read_text()
    assert "### Figure 4. Teachers on cifar100 by epoch\n\nnot run: `pipeline teacher-select --recipe cifar100`" in text
    assert "not run: `pipeline distill --recipe cifar100 --student titn`" in text
    assert "Nothing has been run yet" in text and "report.html" in out


def test_a_damaged_run_is_refused_by_its_file(project: Project) -> None:
    data = project.path / "data/cifar100"
    file = data / "students/titn/metrics.json"
    whole = json.loads(file.read_text())
    for text, wrong in (
        ("{", "metrics.json"), ("[]", "not an object"),
        (json.dumps({**whole, "epochs": "many"}), "epochs: 'many'"),
        (json.dumps({key: value for key, value in whole.items() if key != "warnings"}), "no warnings"),
        (json.dumps({**whole, "best": {"epoch": 1}}), "best: no top1"),
        (json.dumps({**whole, "name": "x" * 300}), f"of '{'x' * 40}', not of 'titn'; train the model again"),
    ):  # fmt: skip
        file.write_text(text)
        error = invoke(project, *REPORT, code=3)
        assert "students/titn/metrics.json" in error and wrong in error
    file.write_text(json.dumps(whole))
    (data / "selection.json").write_text("[1]")
    assert "selection.json: not an object; run `pipeline select --recipe" in invoke(project, *REPORT, code=3)


def test_data_that_the_paper_has_not_get_the_form_without_its_columns(tmp_path: Path) -> None:
    of = recipe("digits")
    runs = FinishedRuns.read(of, report_project.Paths("digits"))
    tables: list[Table] = [all_teachers(runs), *students_tables(runs), drops_table(runs)]
    assert [table.title for table in tables] == [
        "Teachers on digits", "Teacher and students on digits", "Heads, agreement and costs on digits",
        "Accuracy lost from teacher to student, digits",
    ]  # fmt: skip
    said = [text for table in tables for text in (*table.columns, table.note, *(row[0] for row in table.rows))]
    assert not any("paper" in text.lower() for text in said)
    assert statistics.fmean(len(table.rows) for table in tables) > 5


@pytest.mark.browser
def test_a_browser_shows_every_figure_and_every_row(written: Project, tmp_path: Path) -> None:
    folder = written.path / REPORTS
    page = in_a_browser(folder / "report.html", tmp_path)
    pictures = sorted((folder / "figures").glob("*.png"))
    assert len(page["pictures"]) == len(pictures) >= 3
    assert all(width > 0 for width in page["pictures"])
    tables = {path.stem: path for path in (folder / "tables").glob("*.csv") if not path.with_suffix(".png").exists()}
    for name, rows in page["rows"].items():
        assert rows == len(tables[name].read_text(encoding="utf-8").splitlines()) - 1 > 0, name
    assert len(page["rows"]) >= 7 and min(page["cells"]) >= 3
    assert page["fetched"] == []
    assert page["wider"] <= 0, "wide tables scroll within their frames"


def test_tables_say_what_teachers_began_from(project: Project) -> None:
    teacher = project.path / "data/cifar100/teachers/vgg16_bn"
    (teacher / "best.safetensors").write_bytes(b"")
    metrics = json.loads((project.path / "data/cifar100/students/titn/metrics.json").read_text())
    meta = {"sha256": metrics["teacher"]["sha256"], "training": {"weights": "none"}}
    (teacher / "best.json").write_text(json.dumps(meta))
    invoke(project, *REPORT, "--no-figures")
    report = (project.path / REPORTS / "report.md").read_text()
    assert "teachers trained from random weights" in report
    assert "learned from vgg16_bn at 78.00 % on test (trained from random weights)" in report
    (teacher / "best.json").write_text(json.dumps({**meta, "training": {"weights": "imagenet"}}))
    invoke(project, *REPORT, "--no-figures")
    assert (
        "teachers trained from random weights, ImageNet weights" in (project.path / REPORTS / "report.md").read_text()
    )
