"""Prepare: from raw files to one HDF5 file of uint8 images, and a summary of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.config.recipes import Recipe, deciding_values
from pipeline.data.arrays import Spill
from pipeline.data.datasets import Dataset
from pipeline.data.images import BadFile, printable
from pipeline.data.sources import read_source
from pipeline.errors import UsageError
from pipeline.system.runtime import resident_limit
from pipeline.system.storage import lock, remove_leftovers, write_json


@dataclass(frozen=True)
class Summary:
    """What `prepare` made; also the content of summary.json.

    Attributes:
        recipe: The recipe's name.
        source: Where the images come from.
        settings: The recipe's `dataset`, by which a later change of it is noticed.
        num_samples: Samples of each split.
        class_counts: Samples of each class, split by split, in the order of `class_names`.
        class_names: K names.
        evaluation: The split that models are compared on, `val` or `test`.
        mean: Of each channel over train, pixels in [0, 1].
        std: Of each channel over train, pixels in [0, 1].
        sha256: Of the data set's content.
        num_skipped: Bad files left out.
        skipped: Those files, each with its reason.
    """

    recipe: str
    source: str
    settings: dict[str, object]
    num_samples: dict[str, int]
    class_counts: dict[str, list[int]]
    class_names: tuple[str, ...]
    evaluation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sha256: str
    num_skipped: int
    skipped: tuple[BadFile, ...]


def prepare(
    recipe: Recipe,
    *,
    out: Path,
    raw: Path,
    folder: Path | None = None,
    download: bool = False,
    skip_bad: bool = False,
) -> Summary:
    """Read a recipe's data set, cut its splits, and write `dataset.h5` and `summary.json`.

    A folder's images that are too many for RAM go to a file without a name in `out` first, and from there to
    `dataset.h5`.

    Args:
        recipe: The recipe.
        out: Folder for the two files, made where missing; what stands there is replaced once all is read.
        raw: Folder of torchvision's downloads.
        folder: An image folder to read instead of the source's own files.
        download: Download to `raw` what is not there.
        skip_bad: Leave an image folder's bad files out instead of refusing it.

    Returns:
        The summary.

    Raises:
        UsageError: Both a folder and a download; or the source is `folder` and none is given, or not there.
        DataError: The files are missing, damaged, or no data set.
        StorageError: Downloading, reading or writing failed.
    """
    check_request(folder, download=download)
    spill = Spill(out, resident_limit(torch.device("cpu")))
    dataset, skipped = read_source(recipe, raw=raw, folder=folder, download=download, skip_bad=skip_bad, spill=spill)
    summary = _summarize(recipe, dataset, skipped)
    with lock(out.with_name(f"{out.name}.lock")):
        for name in ("dataset.h5", "summary.json"):
            remove_leftovers(out / name)
        dataset.save(out / "dataset.h5")
        write_json(out / "summary.json", dataclasses.asdict(summary))
    return summary


def check_request(folder: Path | None, *, download: bool) -> None:
    """Refuse arguments that say twice where images come from.

    Raises:
        UsageError: Both a folder and a download.
    """
    if folder is not None and download:
        raise UsageError(
            f"--from {printable(folder)} and --download: both say where images come from; give one of them"
        )


def _summarize(recipe: Recipe, dataset: Dataset, skipped: list[BadFile]) -> Summary:
    """Count what was read."""
    return Summary(
        recipe=recipe.name,
        source=dataset.source,
        settings=deciding_values(recipe.dataset),
        num_samples={name: len(split) for name, split in dataset.splits.items()},
        class_counts={
            name: np.bincount(split.labels, minlength=dataset.num_classes).tolist()
            for name, split in dataset.splits.items()
        },
        class_names=dataset.class_names,
        evaluation=dataset.evaluation[0],
        mean=dataset.mean,
        std=dataset.std,
        sha256=dataset.sha256,
        num_skipped=len(skipped),
        skipped=tuple(skipped),
    )
