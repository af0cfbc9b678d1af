"""`pipeline predict CHECKPOINT IMAGE...`: a trained model's answers to image files."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
import numpy as np

from pipeline.data.folders import ImageFile, find_images, read_images
from pipeline.data.images import BadFile
from pipeline.errors import PipelineError, UsageError, printable
from pipeline.system.text import counted
from stages.shared.options import PATH, any_device_option, precision_option, tell_plain
from stages.shared.params import own_code_here

if TYPE_CHECKING:
    from pipeline.inference.classifier import Classifier

MAX_INPUT_BYTES = 2**29  # more than an image of MAX_PIXELS takes at 16 bits
STANDARD_INPUT = "-"
Top = list[tuple[str, float]]
"""The most probable classes and their probabilities, the most probable first."""


@click.command("predict")
@click.argument("checkpoint", type=PATH)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--topk", default=5, show_default=True, type=click.IntRange(1), help="Classes to name, at most all.")
@any_device_option
@precision_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line for each image.")
def command(
    checkpoint: Path, images: tuple[str, ...], topk: int, device: str | None, precision: str | None, as_json: bool
) -> None:
    """Name the classes of images, by a student or a teacher.

    CHECKPOINT is a directory that a stage or export wrote, or a file in it; nothing else is needed. An IMAGE is a file;
    a folder, of which all PNG, JPEG, WebP, PPM, BMP and TIFF files are taken at any depth, in the order of their
    names' bytes; or -, one image's bytes on standard input. For a list of files use xargs.

    Of two heads the prediction is the mean of their probabilities; what each says alone stands beside it. What can't
    be read is named on standard error, the rest is answered, and the exit code is 1.
    """
    from pipeline.inference.loading import load

    classifier = load(checkpoint, device=device, precision=precision, own_code=own_code_here())
    tell_plain(classifier)
    # A heading as wide as its columns.
    width = max(len("distillation head") - 9, *(len(printable(name)) for name in classifier.class_names))
    left_out: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    standard_input = sys.stdin.buffer if STANDARD_INPUT in images else None
    num_good = num_bad = 0
    for result in predict(classifier, images, topk=topk, left_out=left_out, notes=notes, standard_input=standard_input):
        if isinstance(result, BadFile):
            num_bad += 1
            click.echo(printable(f"{result.path}: {result.reason}"), err=True)
            continue
        if not as_json and not num_good and (heading := result.heading(width)) is not None:
            click.echo(heading)
        num_good += 1
        click.echo(json.dumps(result.as_json()) if as_json else result.as_text(width))
    if left_out:
        counts = ", ".join(f"{count} {printable(suffix) or 'without any'}" for suffix, count in left_out.most_common())
        click.echo(f"left out, not having an image's suffix: {counts}", err=True)
    for note, count in notes.items():
        click.echo(f"{note}, in {counted(count, 'image')}", err=True)
    if num_bad:
        raise PipelineError(f"{num_bad} of {num_bad + num_good} could not be read; they are named above")


@dataclass(frozen=True)
class Prediction:
    """The prediction for one file.

    Attributes:
        path: As given, or below the folder given; `-` is standard input.
        top: The prediction.
        heads: What each head alone says.
    """

    path: str
    top: Top
    heads: dict[str, Top]

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values; bytes of the path that are not UTF-8 are escaped."""

        def rows(top: Top) -> list[dict[str, Any]]:
            return [{"class": name, "probability": round(value, 6)} for name, value in top]

        path = os.fsencode(self.path).decode(errors="backslashreplace")
        return {"path": path, "top": rows(self.top), "heads": {name: rows(top) for name, top in self.heads.items()}}

    def heading(self, width: int) -> str | None:
        """Return the line above the texts; None where there is one head, and so one column.

        Args:
            width: Characters of the longest class name.
        """
        if len(self.heads) == 1:
            return None
        columns = ("prediction", *(f"{name} head" for name in self.heads))
        return "  " + "   ".join(f"{column:<{width + 9}}" for column in columns).rstrip()

    def as_text(self, width: int) -> str:
        """Return lines for people: the prediction, and beside it that of each of two heads.

        Args:
            width: Characters of the longest class name.
        """
        columns = [self.top, *(self.heads.values() if len(self.heads) > 1 else ())]
        rows = zip(*columns, strict=True)
        cells = [[f"{printable(name):<{width}} {100 * value:6.2f} %" for name, value in row] for row in rows]
        return "\n".join([printable(self.path), *("  " + "   ".join(row) for row in cells)])


def predict(
    classifier: Classifier,
    names: Sequence[str],
    *,
    topk: int,
    left_out: Counter[str],
    notes: Counter[str],
    standard_input: BinaryIO | None = None,
) -> Generator[Prediction | BadFile, None, None]:
    """Classify images one after the other, in memory that does not grow with their number.

    Args:
        classifier: The model.
        names: Files; folders, of which all images are taken; `-` for one image's bytes on standard input.
        topk: Classes to name, at most all.
        left_out: Counts by suffix the files of folders that are no images.
        notes: Counts the images of which there is something to say, see pipeline.data.images.read_image.
        standard_input: Read to its end where `-` is named.

    Yields:
        Predictions and unreadable files, in the order of the files.

    Raises:
        UsageError: Standard input is named twice.
        NumericalError: A logit is not finite.
    """
    if names.count(STANDARD_INPUT) > 1:
        raise UsageError("-: standard input holds one image and is read once; name it once")
    files = _find(names, standard_input, left_out)
    # Pillow warns of damaged metadata, which does no harm, and of many pixels, which are refused as it is.
    quiet = warnings.catch_warnings(action="ignore")
    with quiet, contextlib.closing(read_images(files, classifier.image_size, classifier.batch_size)) as batches:
        for batch in batches:
            notes.update(note for file in batch for note in file.notes)
            yield from _answer(classifier, batch, topk)


def _find(names: Sequence[str], standard_input: BinaryIO | None, left_out: Counter[str]) -> Iterator[ImageFile]:
    """Yield the image files of the names."""
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


def _answer(classifier: Classifier, batch: list[ImageFile], topk: int) -> Iterator[Prediction | BadFile]:
    """Yield a batch's predictions and unreadable files."""
    pixels = [file.pixels for file in batch if file.pixels is not None]
    answers: Iterator[tuple[Top, ...]] = iter(())
    names: tuple[str, ...] = ()
    if pixels:
        answer = classifier.answer(np.stack(pixels))
        names = tuple(answer.heads)
        answers = zip(answer.top(topk), *(answer.top(topk, name) for name in names), strict=True)
    for file in batch:
        if file.pixels is None:
            yield BadFile(printable(file.path), file.problem or "")
        else:
            top, *heads = next(answers)
            yield Prediction(str(file.path), top, dict(zip(names, heads, strict=True)))
