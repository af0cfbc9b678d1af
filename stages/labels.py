"""`pipeline labels inspect|verify`: look into a label file, or replay its teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.errors import DataError, PipelineError
from stages.shared import options
from stages.shared.context import Context

if TYPE_CHECKING:
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
        "identity": cache.identity,
        "provenance": cache.provenance,
    }
    if as_json:
        click.echo(json.dumps(content, indent=2))
        return
    for key, value in content.items():
        click.echo(f"{key}: {json.dumps(value) if isinstance(value, dict) else value}")


@command.command()
@click.argument("file", type=options.EXISTING)
@options.recipe_option
@options.device_option
@click.option("--sample", default=1000, show_default=True, type=click.IntRange(1), help="Labels to replay.")
@click.option("--teacher", type=options.EXISTING, help="The checkpoint; default: the selected teacher.")
@click.option("--margin", type=options.FiniteFloat(0.0), help="Largest logit margin of a difference that may pass.")
def verify(
    file: Path, recipe: str | None, device: str | None, sample: int, teacher: Path | None, margin: float | None
) -> None:
    """Replay the teacher on some labels; exit 1 if it would give others."""
    context = options.open_context(recipe, device)
    replayed, allowed = _replay(context, file, teacher=teacher, num_samples=sample, margin=margin)
    num_failed = 0
    for difference in replayed.differences:
        is_tie = difference.margin <= allowed
        num_failed += not is_tie
        context.say(
            f"view {difference.view}, sample {difference.sample}: cached {difference.cached}, now "
            f"{difference.replayed}, logit margin {difference.margin:.4g}" + (" (near tie, allowed)" if is_tie else "")
        )
    context.say(
        f"{file}: {replayed.num_samples} labels replayed, {len(replayed.differences)} differ, "
        f"{num_failed} by more than {allowed:g}"
    )
    if replayed.probability_error is not None:
        context.say(f"{file}: probabilities differ by at most {replayed.probability_error:.2g}")
    if num_failed:
        raise PipelineError(f"{file}: {num_failed} labels are not the teacher's; run `pipeline label --fresh`")


def _replay(
    context: Context, path: Path, *, teacher: Path | None, num_samples: int, margin: float | None
) -> tuple[Replay, float]:
    """Replay the teacher on (view, sample) pairs drawn at a fixed seed, and return the margin that was applied too.

    Without `margin` it is SAME_MARGIN on the recorded kind of device and precision, else OTHER_MARGIN.

    Raises:
        DataError: The file is not valid or belongs to other data, views or another teacher.
    """
    import numpy as np

    from pipeline.labels.cache import RELABEL, LabelCache
    from pipeline.labels.replay import OTHER_MARGIN, SAME_MARGIN, check_canaries, replay
    from pipeline.system.canonical import require_equal
    from stages.shared.fitting import make_views
    from stages.shared.labelling import identity_of, make_ready, read_teacher

    cache, dataset = LabelCache.open(path), context.dataset()
    names = [name for name, recipe in context.recipe.views.items() if identity_of(dataset, recipe) == cache.identity]
    if not names:
        view_recipe = context.recipe.views.get(path.stem, context.recipe.views["default"])
        require_equal(str(path), cache.identity, identity_of(dataset, view_recipe), RELABEL)
    checkpoint = read_teacher(context, dataset, teacher or context.paths.winner)
    recorded = cache.provenance
    if checkpoint.sha256 != recorded["checkpoint_sha256"]:
        raise DataError(
            f"{path}: labelled by checkpoint {recorded['checkpoint_sha256'][:12]}..., not by {checkpoint.path} "
            f"({checkpoint.sha256[:12]}...); name the right one with --teacher"
        )
    model, views = make_ready(context, dataset, checkpoint), make_views(context, dataset, names[0])
    changed = check_canaries(cache, views)
    if changed is not None:
        raise DataError(f"{path}: the pixels of view {changed} are not those that were labelled; label again")
    if margin is None:
        now = (model.precision, context.device.type, model.compiled)
        same = now == (recorded["precision"], recorded["device"], recorded["compiled"])
        margin = SAME_MARGIN if same else OTHER_MARGIN
    total = cache.num_views * cache.num_samples
    chosen = np.random.default_rng(0).choice(total, size=min(num_samples, total), replace=False)
    pairs = [divmod(int(index), cache.num_samples) for index in chosen]
    return replay(cache, model, views, pairs), margin
