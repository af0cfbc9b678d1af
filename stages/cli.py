"""The command line: `pipeline COMMAND`, or `python -m stages.cli COMMAND`.

Every command imports what it needs when it runs, so that `--help` is quick and the handlers of SIGINT and SIGTERM
stand before anything slow.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import click

import pipeline
from pipeline.errors import Interrupted, PipelineError
from pipeline.recipes import MAX_VIEWS
from stages.options import (
    STOP,
    device_option,
    json_option,
    open_console,
    open_context,
    parse_keep,
    parse_settings,
    parse_views,
    recipe_option,
    require_exists,
    split_names,
    training_options,
)

GROUPS = (
    ("Data", ("prepare",)),
    ("Stage one: teachers and labels", ("teacher-select", "teacher", "select", "label", "labels")),
    ("Stage two: students", ("distill",)),
    ("Results", ("evaluate", "report", "models")),
)


class GroupedCommands(click.Group):
    """A group that lists its commands by stage."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section of the help for each stage."""
        for title, names in GROUPS:
            rows = [(name, self.commands[name].get_short_help_str(90)) for name in names]
            with formatter.section(title):
                formatter.write_dl(rows)


@click.group(cls=GroupedCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(pipeline.__version__, prog_name="pipeline")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Distil CNN teachers into small transformers from cached labels (arXiv:2502.16762)."""


@cli.command()
@recipe_option
@click.option("--download", is_flag=True, help="Download what is missing to data/raw.")
@click.option("--from", "folder", type=click.Path(path_type=Path), help="Take the images from this folder.")
@click.option("--skip-bad", is_flag=True, help="Leave corrupt, empty and oversized files out.")
def prepare(recipe: str | None, download: bool, folder: Path | None, skip_bad: bool) -> None:
    """Turn a data set into one file of uint8 images."""
    from stages.prepare import prepare as run

    context = open_context(recipe)
    paths = context.paths
    summary = run(
        context.recipe, out=paths.prepared, raw=paths.raw, folder=folder, download=download, skip_bad=skip_bad
    )
    counts = ", ".join(f"{count} {split}" for split, count in summary.num_samples.items())
    context.say(f"{paths.dataset}: {counts} images of {len(summary.class_names)} classes, SHA-256 {summary.sha256}")
    if summary.num_skipped:
        context.say(f"skipped {summary.num_skipped} bad files; {paths.prepared / 'summary.json'} names them")
    context.changed("prepare")
    context.end()


@cli.command()
@click.argument("name")
@recipe_option
@device_option
@training_options
def teacher(
    name: str, recipe: str | None, device: str | None, fresh: bool, seed: int, settings: tuple[str, ...]
) -> None:
    """Fine-tune and evaluate one candidate teacher."""
    context = open_context(recipe, device)
    from stages.teacher import teacher_recipe, train_teacher

    teacher_recipe(context.recipe, name)
    train_teacher(context, name, settings=parse_settings(settings), seed=seed, fresh=fresh)
    context.end()


@cli.command()
@recipe_option
@click.option("--teachers", help="Candidates, separated by commas; `teachers` of params.yaml where left out.")
def select(recipe: str | None, teachers: str | None) -> None:
    """Compare the candidates and copy the winner."""
    from stages.report import conditions
    from stages.selection import select as run
    from stages.selection import teachers_table

    context = open_context(recipe)
    comparison = run(context, split_names(teachers))
    names = [candidate["name"] for candidate in comparison["candidates"]]
    note = conditions(comparison["candidates"], (context.paths.teacher(name) for name in names))
    context.show(teachers_table(context.recipe, comparison, note))
    context.say(f"selected {comparison['winner']} by {comparison['by']}")
    context.end()


@cli.command()
@recipe_option
@device_option
@click.option("--view-recipe", default="default", show_default=True, help="A view recipe of the recipe.")
@click.option("--teacher", type=click.Path(path_type=Path), help="A checkpoint; the selected teacher where left out.")
@click.option("--fresh", is_flag=True, help="Label every view again.")
@click.option("--keep", metavar="argmax|topk=K", help="Keep the K most probable classes too; the recipe's if left out.")
@click.option("--views", metavar="A:B", help="Label the views A to B - 1 alone; :B and A: leave out 0 and the last.")
def label(
    recipe: str | None,
    device: str | None,
    view_recipe: str,
    teacher: Path | None,
    fresh: bool,
    keep: str | None,
    views: str | None,
) -> None:
    """Label every view of the training set with a teacher."""
    from stages.label import label as run

    topk, part = parse_keep(keep), parse_views(views)
    context = open_context(recipe, device)
    run(context, view_recipe, teacher=teacher, fresh=fresh, keep=topk, part=part)
    context.end()


@cli.command("teacher-select")
@recipe_option
@device_option
@click.option("--teachers", help="Candidates, separated by commas; `teachers` of params.yaml where left out.")
@click.option("--optimizers", help="Train the winner with each of these too (Figure 5), separated by commas.")
@click.option("--fresh", is_flag=True, help="Train and label everything again.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and why.")
def teacher_select(
    recipe: str | None,
    device: str | None,
    teachers: str | None,
    optimizers: str | None,
    fresh: bool,
    dry_run: bool,
) -> None:
    """Do all of stage one: prepare, train what is missing, select, label."""
    from stages.teacher_select import plan
    from stages.teacher_select import teacher_select as run

    context = open_context(recipe, device)
    names, sweep = split_names(teachers), split_names(optimizers) or ()
    if dry_run:
        for line in plan(context, names, sweep):
            context.say(line)
        return
    for table in run(context, teachers=names, optimizers=sweep, fresh=fresh):
        context.show(table)
    context.end()


@cli.group()
def labels() -> None:
    """Look into a label file, or replay its teacher."""


@labels.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def inspect(file: Path, as_json: bool) -> None:
    """Show what a label file holds and where it comes from."""
    from stages.label import inspect as run

    require_exists(file)
    found = run(file)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        click.echo(f"{key}: {json.dumps(value) if isinstance(value, dict) else value}")


@labels.command()
@click.argument("file", type=click.Path(path_type=Path))
@recipe_option
@device_option
@click.option("--sample", default=1000, show_default=True, type=click.IntRange(1), help="Labels to replay.")
@click.option("--teacher", type=click.Path(path_type=Path), help="The checkpoint; the selected teacher if left out.")
@click.option("--margin", type=click.FloatRange(0.0), help="Largest logit margin of a difference that may pass.")
def verify(
    file: Path,
    recipe: str | None,
    device: str | None,
    sample: int,
    teacher: Path | None,
    margin: float | None,
) -> None:
    """Replay the teacher on some labels; exit 1 if it would give others."""
    from stages.label import verify as run

    require_exists(file)
    context = open_context(recipe, device)
    replay, allowed = run(context, file, teacher=teacher, num_samples=sample, margin=margin)
    failed = [difference for difference in replay.differences if difference.margin > allowed]
    for difference in replay.differences:
        context.say(
            f"view {difference.view}, sample {difference.sample}: cached {difference.cached}, now "
            f"{difference.replayed}, logit margin {difference.margin:.4g}"
            + ("" if difference.margin > allowed else " (near tie, allowed)")
        )
    context.say(
        f"{file}: {sample} labels replayed, {len(replay.differences)} differ, {len(failed)} by more than {allowed:g}"
    )
    if replay.probability_error is not None:
        context.say(f"{file}: probabilities differ by at most {replay.probability_error:.2g}")
    if failed:
        raise PipelineError(f"{file}: {len(failed)} labels are not the teacher's; run `pipeline label --fresh`")


@cli.command()
@click.option("--student", required=True, help="A student of the recipe, as titn.")
@recipe_option
@device_option
@training_options
@click.option(
    "--labels",
    type=click.Choice(["cached", "none", "online"]),
    default="cached",
    show_default=True,
    help="none and online are controls; they go to data/runs.",
)
@click.option("--teacher", type=click.Path(path_type=Path), help="The checkpoint that --labels online asks.")
@click.option("--soft", type=float, metavar="T", help="Learn from the teacher's probabilities at temperature T.")
@click.option("--confidence", is_flag=True, help="Weigh the samples by the teacher's probability of its label.")
@click.option("--views", "num_views", type=click.IntRange(1, MAX_VIEWS), help="Train on the first views only.")
def distill(
    student: str,
    recipe: str | None,
    device: str | None,
    fresh: bool,
    seed: int,
    settings: tuple[str, ...],
    labels: str,
    teacher: Path | None,
    soft: float | None,
    confidence: bool,
    num_views: int | None,
) -> None:
    """Train a student against the cached labels."""
    context = open_context(recipe, device)
    from stages.distill import distill as run

    out = run(
        context,
        student,
        labels=labels,
        teacher=teacher,
        soft=soft,
        confidence=confidence,
        num_views=num_views,
        settings=parse_settings(settings),
        seed=seed,
        fresh=fresh,
    )
    metrics = json.loads((out / "metrics.json").read_text())
    best, last = metrics["best"], metrics["last"]
    context.say(
        f"{out}: best top-1 {best['top1']:.2f} % in epoch {best['epoch']}, "
        f"last {last['top1']:.2f} %, test {metrics['test']['top1']:.2f} %"
    )
    context.end()


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@recipe_option
@device_option
@click.option("--split", default="test", show_default=True, type=click.Choice(["train", "val", "test"]))
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), help="That of the training where left out.")
@json_option
def evaluate(
    checkpoint: Path, recipe: str | None, device: str | None, split: str, precision: str | None, as_json: bool
) -> None:
    """Score a checkpoint on a recipe's data."""
    from stages.evaluate import evaluate_checkpoint, scores_table

    require_exists(checkpoint)
    context = open_context(recipe, device)
    result = evaluate_checkpoint(context, checkpoint, split=split, precision=precision)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        context.show(scores_table(result))


@cli.command()
@recipe_option
@click.option("--out", type=click.Path(path_type=Path), help="Directory of report.md and report.json.")
def report(recipe: str | None, out: Path | None) -> None:
    """Print the tables of what has been run; write report.md and report.json."""
    from stages.report import report as run

    context = open_context(recipe)
    for table in run(context, out):
        context.show(table)
    context.say(f"wrote {context.paths.report if out is None else out / 'report.md'}")
    context.end()


@cli.command()
@click.option("--classes", default=100, show_default=True, type=click.IntRange(2, 65535))
@json_option
def models(classes: int, as_json: bool) -> None:
    """List students and teachers with their parameters and costs."""
    from stages.models import list_models, models_table

    found = list_models(classes)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        console = open_console()
        console.print(models_table(found, classes).to_rich(console.width))


def main() -> None:
    """Run the command line and exit with the documented code."""
    STOP.install(is_rank="WORLD_SIZE" in os.environ)
    debug = "--debug" in sys.argv[1:]
    try:
        cli.main(standalone_mode=False)
        code = 0
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except Interrupted as error:
        click.echo(str(error), err=True)
        code = error.exit_code
    except PipelineError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"Error: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        code = 4
    except OSError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"Error: {error.filename or 'reading or writing'}: {error.strerror or error}", err=True)
        code = 4
    except Exception as error:
        if debug:
            traceback.print_exc()
        hint = "" if debug else "; --debug in front of the command shows where"
        click.echo(f"Error: {type(error).__name__}: {' '.join(str(error).split())}{hint}", err=True)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
