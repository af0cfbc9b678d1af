"""`pipeline report`: the tables of what has been run, printed and written to report.md; all figures to report.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline import paper
from pipeline.recipes import Recipe
from pipeline.reporting import Table, difference, number
from pipeline.storage import read_json, write_atomic, write_json
from stages.context import Context
from stages.selection import teachers_table

TABLES = {"cifar100": "Table 3", "cifar10": "Table 4", "mnist": "Table 5"}


def report(context: Context, out: Path | None = None) -> list[Table]:
    """Write report.md and report.json from whatever of the recipe has been run.

    Args:
        context: The command's setting.
        out: Directory of both; None takes data/<recipe>/reports.

    Returns:
        The tables.
    """
    recipe, paths = context.recipe, context.paths
    tables = []
    names: list[str] = []
    teacher: dict[str, Any] | None = None
    if paths.selection.is_file():
        comparison = read_json(paths.selection)
        teacher = next(each for each in comparison["candidates"] if each["name"] == comparison["winner"])
        names = [each["name"] for each in comparison["candidates"]]
        note = conditions(comparison["candidates"], (paths.teacher(name) for name in names))
        tables.append(teachers_table(recipe, comparison, note))
    students = {name: paths.student(name) for name in recipe.students}
    trained = {name: read_json(path / "metrics.json") for name, path in students.items() if is_trained(path)}
    if trained:
        note = conditions(list(trained.values()), (students[name] for name in trained))
        tables.append(students_table(recipe, teacher, trained, note))
    missing = [name for name in recipe.students if name not in trained]
    path = paths.report if out is None else out / "report.md"
    write_atomic(path, _markdown(recipe, tables, missing).encode())
    runs = {name: paths.teacher(name) for name in names} | {name: students[name] for name in trained}
    write_json(path.with_suffix(".json"), _figures(recipe, teacher, runs))
    context.changed("report")
    return tables


def _figures(recipe: Recipe, teacher: dict[str, Any] | None, runs: dict[str, Path]) -> dict[str, Any]:
    """Return report.json: every run's metrics, and under `run` where and when it took place."""
    models = {
        name: {**read_json(path / "metrics.json"), "run": read_json(path / "run.json")} for name, path in runs.items()
    }
    return {"recipe": recipe.name, "selected": None if teacher is None else teacher["name"], "models": models}


def is_trained(path: Path) -> bool:
    """Whether a run's directory is complete."""
    return (path / "metrics.json").is_file()


def students_table(recipe: Recipe, teacher: dict[str, Any] | None, trained: dict[str, Any], note: str) -> Table:
    """Return Table 3, 4 or 5: the selected teacher and the students, the paper's figures beside ours."""
    source = recipe.dataset.source
    reported = {**paper.TEACHERS.get(source, {}), **paper.STUDENTS.get(source, {})}
    entries = ([(teacher["name"], teacher)] if teacher else []) + list(trained.items())
    held_out = any(metrics["evaluated_on"] != "test" for _, metrics in entries)
    rows = []
    for name, metrics in entries:
        best, last, row = metrics["best"], metrics["last"], reported.get(name)
        test = metrics["test"]
        figures = [f"{name} (teacher)" if metrics is teacher else name, number(best["top1"])]
        figures += [number(test["top1"])] if held_out else []
        if reported:
            figures += [number(row.top1 if row else None), difference(test["top1"], row.top1 if row else None)]
        figures += [number(last["top1"]), number(test["top5"])]
        figures += [number(test[key], 3) for key in ("precision", "recall", "f1")]
        figures += [number(test["class_top1"]), number(test["distillation_top1"]), number(test["agreement"])]
        figures += [number(metrics["paper_gmacs_1024"]), f"{metrics['parameters'] / 1e6:.2f}"]
        figures += [f"{best['epoch']} of {metrics['epochs']}"]
        rows.append(figures)
    columns = ["model", "best top-1 %", *(["test top-1 %"] if held_out else [])]
    columns += [*(["paper", "difference"] if reported else []), "last top-1 %"]
    columns += ["top-5 %", "precision", "recall", "F1", "class head %", "distillation head %", "agreement %"]
    columns += ["paper GMACs, batch 1024", "parameters, M", "best epoch"]
    optional = ["precision", "recall", "paper GMACs, batch 1024", "parameters, M", "F1", "top-5 %"]
    optional += ["class head %", "distillation head %"]
    title = f"{TABLES.get(source, 'Table 3')}. Teacher and students on {recipe.name}"
    return Table(title, columns, rows, note, optional)


def conditions(metrics: list[dict[str, Any]], directories: Iterable[Path]) -> str:
    """Return the line that says under what conditions a table's figures were reached."""
    runs = [read_json(directory / "run.json") for directory in directories]
    teachers = {f"{each['teacher']['name']} at {each['teacher']['top1']:.2f} %" for each in metrics if each["teacher"]}
    views = {each["views"] for each in metrics if each["views"]}
    parts = [
        "Best epoch by "
        + _all(f"{each['evaluated_on']} accuracy" for each in metrics)
        + (", as in the paper" if _is_test(metrics) else "; all but best and last top-1 are on test"),
        "device " + _all(_device(run) for run in runs),
        "precision " + _all(each["precision"] for each in metrics),
        "epochs " + _all(each["epochs"] for each in metrics),
        "effective batch " + _all(each["batch_size"] for each in metrics),
        *(["views " + _all(views)] if views else []),
        "seed " + _all(each["seed"] for each in metrics),
        *(["teacher " + _all(teachers)] if teachers else []),
        f"{_all(each['num_train'] for each in metrics)} training and "
        f"{_all(each['num_test'] for each in metrics)} test images",
        f"{sum(run['seconds'] for run in runs):.0f} s of training in all",
        "torch " + _all(run["versions"]["torch"] for run in runs),
        "commit " + _all(run["commit"] or "unknown" for run in runs),
        _all(run["date"][:10] for run in runs),
    ]
    warnings = [f"{each['name']}: {warning}" for each in metrics for warning in each["warnings"]]
    return "; ".join(parts) + "." + "".join(f" Warning: {warning}." for warning in warnings)


def _device(run: dict[str, Any]) -> str:
    """Return a run's device, with the number of ranks where there were several."""
    ranks = run.get("ranks", 1)  # not in the run.json of former versions
    return run["device"] if ranks == 1 else f"{ranks} x {run['device']}"


def _is_test(metrics: list[dict[str, Any]]) -> bool:
    return all(each["evaluated_on"] == "test" for each in metrics)


def _all(values: Iterable[Any]) -> str:
    """Return the distinct values, in the order in which they first appear."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _markdown(recipe: Recipe, tables: list[Table], missing: list[str]) -> str:
    """Return report.md."""
    parts = [f"# Report on {recipe.name}\n", *(table.to_markdown() for table in tables)]
    if not tables:
        parts.append("Nothing has been run yet: `pipeline teacher-select`, then `pipeline distill --student titn`.\n")
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.\n")
    return "\n".join(parts)
