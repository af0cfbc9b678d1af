"""`pipeline prepare`: from raw files to one HDF5 file of uint8 images, and a summary of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.config.recipes import Recipe, deciding_values
from pipeline.errors import UsageError, printable
from pipeline.system.storage import lock, read_json, remove_leftovers, write_json
from pipeline.system.text import counted
from stages.shared.options import PATH, dry_run_option, open_context, recipe_option
from stages.shared.paths import Paths

if TYPE_CHECKING:
    from pipeline.data.datasets import Dataset
    from pipeline.data.images import BadFile


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
    summary = prepare(
        context.recipe, out=paths.prepared, raw=paths.raw, folder=folder, download=download, skip_bad=skip_bad
    )
    counts = ", ".join(f"{count} {split}" for split, count in summary["num_samples"].items())
    num_classes = len(summary["class_names"])
    context.say(f"{paths.dataset}: {counts} images of {counted(num_classes, 'class')}, SHA-256 {summary['sha256']}")
    if summary["skipped"]:
        context.say(f"skipped {counted(summary['num_skipped'], 'bad file')}; see {paths.prepared / 'summary.json'}")
    context.changed("prepare")
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
    with lock(out.with_name(f"{out.name}.lock")):
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
        num_classes = counted(len(listed["train"]), "class")
        what = f"{counts} images of {num_classes} in {printable(folder)}, which are not opened yet"
        if bad:
            what += f"; {counted(len(bad), 'other file')}, " + ("left out" if skip_bad else "for which it is refused")
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
