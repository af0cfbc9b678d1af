"""`pipeline labels inspect|verify`: look into a label file, or replay its teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.errors import DataError, PipelineError, UsageError, printable
from pipeline.system.storage import read_json
from pipeline.system.text import counted
from stages.shared import options
from stages.shared.context import Context
from stages.shared.paths import Paths, relabel

if TYPE_CHECKING:
    from pipeline.config.params import Params
    from pipeline.labels.replay import Replay


@click.group("labels")
def command() -> None:
    """Look into a label file, or replay its teacher."""


@command.command()
@click.argument("file", type=options.EXISTING)
@options.json_option
def inspect(file: Path, as_json: bool) -> None:
    """Show what a label file holds and where it comes from."""
    from pipeline.labels.cache import LabelCache

    cache = LabelCache.open(file)
    content = {
        "path": str(file),
        "bytes": file.stat().st_size,
        "num_views": cache.num_views,
        "num_samples": cache.num_samples,
        "num_classes": cache.num_classes,
        "dtype": str(cache.labels.dtype),
        "topk": cache.topk,
        "fingerprint": cache.fingerprint,
        "clean": {split: len(rows) for split, rows in cache.clean.items()},
        **({} if cache.accuracy is None else {"accuracy": dict(cache.accuracy)}),
        "identity": cache.identity,
        "provenance": cache.provenance,
    }
    if as_json:
        click.echo(json.dumps(content, indent=2))
        return
    for key, value in content.items():
        click.echo(f"{key}: {json.dumps(value) if isinstance(value, dict) else printable(str(value))}")


@command.command()
@click.argument("file", type=options.EXISTING)
@options.named_recipe_option
@options.device_option
@click.option("--sample", default=1000, show_default=True, type=click.IntRange(1), help="Labels to replay.")
@click.option(
    "--teacher", "teachers", multiple=True, type=options.TEACHER, metavar="WHAT",
    help="Who labelled, as for `label`; default: found by its SHA-256 among the recipe's teachers, or built again.",
)  # fmt: skip
@click.option("--margin", type=options.FiniteFloat(0.0), help="Largest logit margin of a difference that may pass.")
def verify(
    file: Path, recipe: str | None, device: str | None, sample: int, teachers: tuple[str, ...], margin: float | None
) -> None:
    """Replay the teacher on some labels; exit 1 if it would give others.

    If the views' pixels are no longer those that were labelled, it says how many of these labels change. The recipe is
    by default that of the file's data and views. Labels that came with --from have no teacher to ask: only the seal and
    the views are checked.
    """
    context = options.open_context(recipe, device, named_by=lambda params: _recipe_of(params, file))
    replayed, allowed = _replay(context, file, teachers=teachers, num_samples=sample, margin=margin)
    if replayed is None:
        what = "the seal holds, and the views are those of today; the labels were given, so that there is no teacher"
        context.say(f"{file}: {what} to ask")
        return
    num_failed = 0
    for difference in replayed.differences:
        is_tie = difference.margin <= allowed
        num_failed += not is_tie
        context.say(
            f"view {difference.view}, sample {difference.sample}: cached {difference.cached}, now "
            f"{difference.replayed}, logit margin {difference.margin:.4g}" + (" (near tie, allowed)" if is_tie else "")
        )
    context.say(
        f"{file}: {counted(replayed.num_samples, 'label')} replayed, {len(replayed.differences)} differ, "
        f"{num_failed} by more than {allowed:g}"
    )
    if replayed.probability_error is not None:
        context.say(f"{file}: probabilities differ by at most {replayed.probability_error:.2g}")
    if num_failed:
        wrong = counted(num_failed, "label")
        raise PipelineError(f"{file}: the teacher gives {wrong} otherwise; {_way_out(context, file, given=False)}")


def _way_out(context: Context, file: Path, *, given: bool | None = None) -> str:
    """Return how a label file is made again; of one that lies elsewhere, how the selected teacher's is."""
    is_ours = file.absolute().parent == context.paths.labels("default").absolute().parent
    return relabel(file.stem if is_ours else "default", given=given)


def _recipe_of(params: Params, file: Path) -> str:
    """Return the recipe whose prepared data and views a label file is for.

    Of several, and where there is none, it is the one whose folder the file is in, else params.yaml's own.
    """
    from pipeline.config.recipes import deciding_values
    from pipeline.labels.cache import LabelCache

    identity = LabelCache.open(file).identity

    def fits(name: str) -> bool:
        summary = Paths(name).prepared / "summary.json"
        views = [deciding_values(views, but=("count",)) for views in params.recipes[name].views.values()]
        is_same = summary.is_file() and read_json(summary).get("sha256") == identity["dataset_sha256"]
        return is_same and identity["view_recipe"] in views

    names = [name for name in (file.absolute().parent.parent.name, params.recipe) if name in params.recipes]
    return next(filter(fits, [*names, *params.recipes]), names[0])


def _replay(
    context: Context, path: Path, *, teachers: Sequence[str], num_samples: int, margin: float | None
) -> tuple[Replay | None, float]:
    """Replay the teacher on (view, sample) pairs drawn at a fixed seed, and return the margin that was applied too.

    Without `margin` it is SAME_MARGIN on the recorded kind of device and precision, else OTHER_MARGIN. Labels that
    were given cannot be replayed.

    Raises:
        UsageError: `teachers` are named for labels that were given.
        DataError: The file is not valid or belongs to other data, views or another teacher; or the views have other
            pixels, and the message says how many of the labels change.
    """
    import numpy as np

    from pipeline.labels.cache import LabelCache
    from pipeline.labels.replay import OTHER_MARGIN, SAME_MARGIN, check_canaries, other_pixels, replay
    from pipeline.system.canonical import require_equal
    from stages.shared.fitting import make_views
    from stages.shared.labellers import find_labeller, require_teacher
    from stages.shared.labelling import identity_of

    for what in teachers:
        require_teacher(context, what)
    dataset, cache = context.dataset(), LabelCache.open(path, way_out=_way_out(context, path))
    way_out = _way_out(context, path, given="given" in cache.provenance)
    names = [name for name, recipe in context.recipe.views.items() if identity_of(dataset, recipe) == cache.identity]
    if not names:
        named, default = path.stem.partition("@")[0], context.recipe.views["default"]
        require_equal(
            str(path), cache.identity, identity_of(dataset, context.recipe.views.get(named, default)), way_out
        )
    recorded, is_given = cache.provenance, "given" in cache.provenance
    if is_given and teachers:
        raise UsageError(f"--teacher {teachers[0]}: the labels of {path} were given, by no teacher; leave it out")
    labeller = None if is_given else find_labeller(context, dataset, path, recorded, teachers)
    views = make_views(context, dataset, names[0])
    changed = check_canaries(cache, views)
    if labeller is None:
        if changed is not None:
            raise DataError(f"{path}: {other_pixels(cache, changed)}; {way_out}")
        return None, 0.0
    model = labeller.ready()
    if margin is None:
        now = (model.precision, context.device.type, model.compiled)
        same = now == (recorded["precision"], recorded["device"], recorded["compiled"])
        margin = SAME_MARGIN if same else OTHER_MARGIN
    total = cache.num_views * cache.num_samples
    chosen = np.random.default_rng(0).choice(total, size=min(num_samples, total), replace=False)
    pairs = [divmod(int(index), cache.num_samples) for index in chosen]
    replayed = replay(cache, model, views, pairs)
    if changed is not None:
        num_changed = f"{len(replayed.differences)} of {counted(len(pairs), 'label')} replayed"
        raise DataError(f"{path}: {other_pixels(cache, changed)}; {num_changed} would change: {way_out}")
    return replayed, margin
