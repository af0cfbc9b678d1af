"""`pipeline prepare`: from raw files to one HDF5 file of uint8 images, and a summary of it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.config.recipes import Recipe, deciding_values
from pipeline.errors import DataError, UsageError, printable
from pipeline.system.canonical import fingerprint
from pipeline.system.storage import lock, read_json, remove_leftovers, write_json
from stages.shared import kept
from stages.shared.options import PATH, dry_run_option, open_context, recipe_option
from stages.shared.paths import Paths

if TYPE_CHECKING:
    from pipeline.data.datasets import Dataset
    from pipeline.data.images import BadFile
    from stages.shared.context import Context


@click.command("prepare")
@recipe_option
@click.option("--download", is_flag=True, help="Download what is missing to data/raw.")
@click.option("--from", "folder", type=PATH, help="Take the images from this folder.")
@click.option("--skip-bad", is_flag=True, help="Leave corrupt, empty and oversized files out.")
@dry_run_option
def command(recipe: str | None, download: bool, folder: Path | None, skip_bad: bool, dry_run: bool) -> None:
    """Turn a data set into one file of uint8 images."""
    context = open_context(recipe)
    paths = context.paths
    if dry_run:
        for line in plan_prepare(context.recipe, paths, folder=folder, download=download, skip_bad=skip_bad):
            context.say(line)
        return
    if put_back_prepared(context, folder=folder, download=download):
        context.end()
        return
    summary = prepare(
        context.recipe, out=paths.prepared, raw=paths.raw, folder=folder, download=download, skip_bad=skip_bad
    )
    counts = ", ".join(f"{count} {split}" for split, count in summary["num_samples"].items())
    num_classes = len(summary["class_names"])
    context.say(f"{paths.dataset}: {counts} images of {num_classes} classes, SHA-256 {summary['sha256']}")
    if summary["skipped"]:
        context.say(f"skipped {summary['num_skipped']} bad files; {paths.prepared / 'summary.json'} names them")
    keep_prepared(context)
    context.end()


def prepare(
    recipe: Recipe,
    *,
    out: Path,
    raw: Path,
    folder: Path | None = None,
    download: bool = False,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Read a recipe's data set, cut its splits, and write `dataset.h5` and `summary.json`.

    A folder's images that are too many for RAM go through an unnamed file in `out` to `dataset.h5`.

    Args:
        recipe: The recipe.
        out: Folder for the two files, made if missing; earlier files there are replaced once all images are read.
        raw: Folder of torchvision's downloads.
        folder: An image folder to read instead of the source's own files.
        download: Download to `raw` what is missing there.
        skip_bad: Leave an image folder's bad files out instead of refusing it.

    Returns:
        The content of summary.json, see `_summarize`.

    Raises:
        UsageError: Both a folder and a download are given; or the source is `folder` and no existing folder is given.
        DataError: The files are missing, damaged, or no data set.
        StorageError: Downloading, reading or writing failed.
    """
    import torch

    from pipeline.data.arrays import Spill
    from pipeline.data.sources import read_source
    from pipeline.system.runtime import resident_limit

    _check_request(folder, download=download)
    spill = Spill(out, resident_limit(torch.device("cpu")))
    dataset, skipped = read_source(recipe, raw=raw, folder=folder, download=download, skip_bad=skip_bad, spill=spill)
    summary = _summarize(recipe, dataset, skipped)
    with lock(_lock(out)):
        for name in ("dataset.h5", "summary.json"):
            remove_leftovers(out / name)
        dataset.save(out / "dataset.h5")
        write_json(out / "summary.json", summary)
    return summary


def plan_prepare(recipe: Recipe, paths: Paths, *, folder: Path | None, download: bool, skip_bad: bool) -> list[str]:
    """Say what `prepare` would do, and write nothing; images are not opened.

    Raises:
        UsageError: See `prepare`.
        DataError: Files are missing, or the folder is no image folder.
    """
    from pipeline.data.folders import list_folder
    from pipeline.data.sources import check_source

    _check_request(folder, download=download)
    source = recipe.dataset.source
    if folder is not None:
        bad: list[BadFile] = []
        listed = list_folder(folder, bad)
        counts = ", ".join(f"{sum(map(len, classes.values()))} {split}" for split, classes in listed.items())
        what = f"{counts} images of {len(listed['train'])} classes in {printable(folder)}, which are not opened yet"
        if bad:
            what += f"; {len(bad)} other files, " + ("left out" if skip_bad else "for which it is refused")
    elif download and source not in ("digits", "folder"):
        what = f"{source} in {paths.raw}, downloading what is missing"
    else:
        check_source(recipe, paths.raw)
        what = "the bundled digits" if source == "digits" else f"{source} in {paths.raw}"
    return [f"read {what}", f"write {paths.dataset} ({_state(recipe, paths)})"]


def _state(recipe: Recipe, paths: Paths) -> str:
    """Say which prepared data exist."""
    from stages.shared.runs import differences

    summary = paths.prepared / "summary.json"
    if not (paths.dataset.is_file() and summary.is_file()):
        return "no data yet"
    former = read_json(summary)["settings"]
    if changed := differences({"settings": former}, {"settings": deciding_values(recipe.dataset)}):
        return f"in place of one of other settings: {', '.join(changed)}"
    return "in place of one of the same settings; the same images give the same file"


def _check_request(folder: Path | None, *, download: bool) -> None:
    """Refuse both a folder and a download."""
    if folder is not None and download:
        raise UsageError(
            f"--from {printable(folder)} and --download: both say where images come from; give one of them"
        )


def _summarize(recipe: Recipe, dataset: Dataset, skipped: list[BadFile]) -> dict[str, Any]:
    """Return what summary.json says of a data set.

    `settings` are the recipe's, by which a later change is noticed; `class_counts` are by split, in the order of
    `class_names`; `evaluation` is the split that models are compared on, `val` or `test`; `mean` and `std` are of each
    channel over train, pixels in [0, 1]; `skipped` are the bad files left out, each with its reason.
    """
    import numpy as np

    splits, num_classes = dataset.splits.items(), dataset.num_classes
    return {
        "recipe": recipe.name,
        "source": dataset.source,
        "settings": deciding_values(recipe.dataset),
        "num_samples": {name: len(split) for name, split in splits},
        "class_counts": {name: np.bincount(split.labels, minlength=num_classes).tolist() for name, split in splits},
        "class_names": list(dataset.class_names),
        "evaluation": dataset.evaluation[0],
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "sha256": dataset.sha256,
        "num_skipped": len(skipped),
        "skipped": [dataclasses.asdict(file) for file in skipped],
    }


def kept_data(context: Context) -> kept.Result:
    """Describe a recipe's prepared data as they are kept: its settings decide whether they fit."""
    paths, decides = context.paths, fingerprint({"settings": deciding_values(context.recipe.dataset)})
    return kept.Result(
        context.recipe.name, "prepare", decides, paths.prepared, (paths.prepared,), lock=_lock(paths.prepared)
    )


def keep_prepared(context: Context) -> None:
    """Keep the prepared data that `prepare` has just written, unless they are kept."""
    result = kept_data(context)
    if not kept.holds(result):
        kept.keep(context, result)
    context.changed("prepare")


def put_back_prepared(context: Context, *, folder: Path | None = None, download: bool = False) -> bool:
    """Put back kept data that are missing or of other settings, and return whether that is all that can be done.

    Data whose source cannot be read now, because it was named by another command, are put back whatever code made them.
    """
    result, can_be_read = kept_data(context), folder is not None or download or is_readable(context)
    summary = context.paths.prepared / "summary.json"
    with contextlib.suppress(DataError):
        former = read_json(summary).get("settings") if context.paths.is_prepared else None
        if former == deciding_values(context.recipe.dataset):
            kept.say_if_older(context, result, any_code=not can_be_read)
            return False
    return kept.put_back(context, result, any_code=not can_be_read) and not can_be_read


def is_readable(context: Context) -> bool:
    """Tell whether the recipe's own source is there, so that its data can be prepared without --from or --download."""
    from pipeline.data.sources import check_source

    try:
        check_source(context.recipe, context.paths.raw)
    except (UsageError, DataError):
        return False
    return True


def check_available(context: Context) -> str | None:
    """Say which kept data `prepare` would put back; None where it would read the recipe's own source.

    Raises:
        UsageError: The source is `folder`, and nothing is kept.
        DataError: The source's files are missing, and nothing is kept.
    """
    from pipeline.data.sources import check_source

    second = kept.find(kept_data(context), any_code=not is_readable(context))
    if second is None:
        check_source(context.recipe, context.paths.raw)
        return None
    return f"put back what was finished on {second.when}"


def _lock(out: Path) -> Path:
    return out.with_name(f"{out.name}.lock")
