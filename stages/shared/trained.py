"""What a trained model's JSON says of its data and of its scores."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.recipes import ENCODED, SQUEEZE
from pipeline.errors import DataError, printable
from pipeline.system.storage import read_json
from pipeline.training.manifest import read_json_checked
from stages.shared.paths import Paths

if TYPE_CHECKING:
    from pipeline.data.datasets import Dataset

SHORT = 12  # hexadecimal digits of a SHA-256 that people are shown


def other_data(meta: Mapping[str, Any], paths: Paths, dataset: Dataset | None = None) -> str | None:
    """Say in a phrase on which data a model was trained, if not on a recipe's prepared data; None if on these.

    Labels that were corrected, or another split, make other data of the same images: what were training images may be
    test images now. Other pixels of an encoded store's files are other data too, though the SHA-256 stays. Where
    nothing is prepared there is nothing to compare.

    Args:
        meta: The JSON of the model's checkpoint or export.
        paths: The recipe's.
        dataset: The prepared data, where they have been loaded; None takes what their JSON says.
    """
    if dataset is None:
        prepared = _prepared(paths)
    else:
        shown = None if dataset.rendition is None else rendition(dataset.rendition)
        prepared = dataset.sha256, list(dataset.class_names), shown
    if prepared is None:
        return None
    sha256, class_names, shown = prepared
    trained, these = meta.get("dataset_sha256"), f"{paths.dataset} (SHA-256 {sha256[:SHORT]})"
    if trained == sha256:  # these names are then part of the digest, so that others are damage
        if meta.get("class_names", class_names) != class_names:
            return f"names other classes than {these}, on which it was trained; it is damaged"
        return None if shown in (None, rendition(meta)) else shown_otherwise(rendition(meta), these, shown)
    if not isinstance(trained, str):
        return f"names no data that it was trained on, so that it cannot be compared with {these}"
    recipe = printable(str(meta.get("recipe")))
    order = "the order of the images counts too, and a folder's is not that of a download"
    return f"trained on other data (recipe {recipe}, SHA-256 {printable(trained[:SHORT])}) than {these}; {order}"


def require_same_data(
    meta: Mapping[str, Any], file: Path, paths: Paths, way_out: str, *, dataset: Dataset | None = None
) -> None:
    """Check that a model was trained on a recipe's prepared data, wherever the two meet.

    Args:
        meta: See `other_data`.
        file: The model's file, for the message.
        paths: See `other_data`.
        way_out: What to do otherwise, for the message.
        dataset: See `other_data`.

    Raises:
        DataError: It was trained on others, or does not name them.
    """
    difference = other_data(meta, paths, dataset)
    if difference is not None:
        raise DataError(f"{file}: {difference}; {way_out}")


def rendition(values: Mapping[str, Any]) -> str:
    """Return in words by what the files of an encoded store become pixels, which is no part of their SHA-256.

    Args:
        values: A checkpoint's or an export's JSON, dataset.json's content, or Dataset.rendition.
    """
    return printable(f"image_size {values.get('image_size')}, resize {values.get('resize', SQUEEZE)}")


def prepared_rendition(paths: Paths) -> str | None:
    """Return the `rendition` of prepared data by their dataset.json; None where pixels are stored.

    The settings in summary.json need not name the store: a data set that was in memory brings its own.

    Raises:
        DataError: The file is no JSON.
    """
    description = read_json(paths.dataset)
    return rendition(description) if isinstance(description, dict) and description.get("store") == ENCODED else None


def shown_otherwise(trained: str | None, these: str, shown: str | None) -> str:
    """Say in a phrase that a model was trained on the same files under another `rendition`."""
    return f"trained on the same files as {these}, but with {trained} in place of {shown}"


def _prepared(paths: Paths) -> tuple[str, list[str], str | None] | None:
    """Return SHA-256, class names and `rendition` of prepared data; None without any, or where their JSON is damaged.

    Loading the data will say what is wrong.
    """
    if paths.is_prepared:
        with contextlib.suppress(DataError):
            summary = read_json(paths.prepared / "summary.json")
            sha256, names = (
                summary.get(key) if isinstance(summary, dict) else None for key in ("sha256", "class_names")
            )
            if isinstance(sha256, str) and isinstance(names, list):
                return sha256, names, prepared_rendition(paths)
    return None


@dataclass(frozen=True)
class Judged:
    """A model's scores, and what they are of.

    Attributes:
        scores: By name; empty where there are none.
        split: The split that they are on; None where it is not known.
        metrics: The metrics.json that has them; empty where they come from the checkpoint or the export itself.
    """

    scores: Mapping[str, Any]
    split: str | None
    metrics: Mapping[str, Any]

    @classmethod
    def of(cls, meta: Mapping[str, Any], file: Path) -> Judged:
        """Return a model's scores on test where they are known, else on the split that chose the checkpoint.

        Args:
            meta: The JSON of the model's checkpoint or export.
            file: Its file, beside which metrics.json may lie.

        Raises:
            DataError: metrics.json is no JSON object.
        """
        metrics = read_beside(file, "metrics.json")
        split, test = meta.get("scores_split", meta.get("evaluated_on")), metrics.get("test")
        if isinstance(test, dict) and metrics.get("seed") == meta.get("seed"):
            if test.get("epoch") == meta.get("epoch"):
                return cls(test, "test", metrics)
            split = metrics.get("evaluated_on")
        scores = meta.get("scores")
        return cls(scores if isinstance(scores, dict) else {}, split if isinstance(split, str) else None, {})


def read_beside(file: Path, name: str) -> dict[str, Any]:
    """Return a JSON file beside a model's; empty where there is none.

    Raises:
        DataError: It is no JSON object.
    """
    beside = file.with_name(name)
    content = read_json_checked(beside) if beside.is_file() else {}
    if not isinstance(content, dict):
        raise DataError(f"{beside}: not what a stage writes; delete it or train again")
    return content
