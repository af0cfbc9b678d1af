"""`pipeline predict CHECKPOINT IMAGE...`: a trained model's answers to image files."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.data.folders import ImageFile, find_images, read_images
from pipeline.data.images import BadFile
from pipeline.errors import UsageError, printable
from pipeline.inference.prediction import Predictor

MAX_INPUT_BYTES = 2**29  # more than an image of MAX_PIXELS takes at 16 bits
STANDARD_INPUT = "-"
Top = list[tuple[str, float]]
"""The most probable classes and their probabilities, the most probable first."""


@dataclass(frozen=True)
class Prediction:
    """The answer to one file.

    Attributes:
        path: As given, or below the folder given; `-` is standard input.
        top: Of the prediction.
        heads: Of each head alone.
    """

    path: str
    top: Top
    heads: dict[str, Top]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON values; bytes of the path that are not UTF-8 are escaped."""

        def rows(top: Top) -> list[dict[str, Any]]:
            return [{"class": name, "probability": round(value, 6)} for name, value in top]

        path = os.fsencode(self.path).decode(errors="backslashreplace")
        return {"path": path, "top": rows(self.top), "heads": {name: rows(top) for name, top in self.heads.items()}}

    def heading(self, width: int) -> str | None:
        """Return the line above the texts; None where there is one head, and so one column.

        Args:
            width: Of the longest class name.
        """
        if len(self.heads) == 1:
            return None
        columns = ("prediction", *(f"{name} head" for name in self.heads))
        return "  " + "   ".join(f"{column:<{width + 9}}" for column in columns).rstrip()

    def as_text(self, width: int) -> str:
        """Return it as lines for people: what is predicted, and beside it what each of two heads says.

        Args:
            width: Of the longest class name.
        """
        columns = [self.top, *(self.heads.values() if len(self.heads) > 1 else ())]
        rows = zip(*columns, strict=True)
        cells = [[f"{printable(name):<{width}} {100 * value:6.2f} %" for name, value in row] for row in rows]
        return "\n".join([printable(self.path), *("  " + "   ".join(row) for row in cells)])


def predict(
    predictor: Predictor,
    names: Sequence[str],
    *,
    topk: int,
    left_out: Counter[str],
    standard_input: BinaryIO | None = None,
) -> Generator[Prediction | BadFile, None, None]:
    """Answer to images, one after the other, in memory that does not grow with their number.

    Args:
        predictor: The model.
        names: Files; folders, of which all images are taken; `-` for one image's bytes on standard input.
        topk: Classes to name, at most all.
        left_out: Counts, by suffix, the files of folders that have no image's suffix.
        standard_input: Read to its end where `-` is named.

    Yields:
        The answers, and what could not be read, in the order of the files.

    Raises:
        UsageError: Standard input is named twice.
        NumericalError: A logit is not finite.
    """
    if names.count(STANDARD_INPUT) > 1:
        raise UsageError("-: standard input holds one image and is read once; name it once")
    files = _find(names, standard_input, left_out)
    # Pillow warns of damaged metadata, which does no harm.
    quiet = warnings.catch_warnings(action="ignore", category=UserWarning)
    with quiet, contextlib.closing(read_images(files, predictor.image_size, predictor.batch_size)) as batches:
        for batch in batches:
            yield from _answer(predictor, batch, topk)


def _find(names: Sequence[str], standard_input: BinaryIO | None, left_out: Counter[str]) -> Iterator[ImageFile]:
    """Yield what the names stand for."""
    for name in names:
        if name != STANDARD_INPUT:
            yield from find_images(Path(name), left_out)
            continue
        assert standard_input is not None
        content = standard_input.read(MAX_INPUT_BYTES + 1)
        if len(content) > MAX_INPUT_BYTES:
            yield ImageFile(Path(name), problem=f"more than {MAX_INPUT_BYTES} bytes")
        else:
            yield ImageFile(Path(name), content)


def _answer(predictor: Predictor, batch: list[ImageFile], topk: int) -> Iterator[Prediction | BadFile]:
    """Answer to a batch."""
    pixels = [file.pixels for file in batch if file.pixels is not None]
    answers: Iterator[tuple[Top, ...]] = iter(())
    names: tuple[str, ...] = ()
    if pixels:
        answer = predictor.answer(np.stack(pixels))
        names = tuple(answer.heads)
        answers = zip(answer.top(topk), *(answer.top(topk, name) for name in names), strict=True)
    for file in batch:
        if file.pixels is None:
            yield BadFile(printable(file.path), file.problem or "")
        else:
            top, *heads = next(answers)
            yield Prediction(str(file.path), top, dict(zip(names, heads, strict=True)))
