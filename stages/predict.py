"""`pipeline predict CHECKPOINT IMAGE...`: a trained model's answers to image files."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
import numpy as np

from pipeline.data.folders import ImageFile, find_images, read_images
from pipeline.data.images import BadFile
from pipeline.errors import PipelineError, UsageError, printable
from pipeline.system.storage import replacing
from pipeline.system.text import counted, to_csv
from pipeline.training.manifest import refuse_writing
from stages.shared.options import PATH, FiniteFloat, any_device_option, load_model, precision_option

if TYPE_CHECKING:
    from pipeline.inference.classifier import Classifier

MAX_INPUT_BYTES = 2**29  # more than an image of MAX_PIXELS takes at 16 bits
STANDARD_INPUT = "-"
HEADS = ("class", "distillation")
Top = list[tuple[str, float]]
"""The most probable classes and their probabilities, the most probable first."""


@click.command("predict")
@click.argument("checkpoint", type=PATH)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--topk", type=click.IntRange(1), help="Classes to name, at most all; default: 5, with --csv 1.")
@click.option(
    "--threshold", type=FiniteFloat(0.0, 1.0), metavar="P", help="Call predictions with a probability below P unsure."
)
@any_device_option
@precision_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line for each image.")
@click.option("--csv", "csv_file", type=PATH, metavar="FILE", help="Write one row for each image; - prints them.")
def command(
    checkpoint: Path,
    images: tuple[str, ...],
    topk: int | None,
    threshold: float | None,
    device: str | None,
    precision: str | None,
    as_json: bool,
    csv_file: Path | None,
) -> None:
    """Name the classes of images, by a student or a teacher.

    CHECKPOINT is a directory that a stage or export wrote, or a file in it; nothing else is needed. An IMAGE is a file;
    a folder, of which all PNG, JPEG, WebP, PPM, BMP and TIFF files are taken at any depth, in the order of their
    names' bytes; or -, one image's bytes on standard input. For a list of files use xargs.

    Of two heads the prediction is the mean of their probabilities; what each says alone stands beside it. With
    --threshold a prediction below it is named unsure, with the class that it would have been. What can't be read is
    named on standard error, the rest is answered, and the exit code is 1.
    """
    if as_json and csv_file is not None:
        raise UsageError(f"--json --csv {csv_file}: give one of them")
    classifier = load_model(checkpoint, device, precision)
    topk = min(topk or (5 if csv_file is None else 1), len(classifier.class_names))
    # A heading as wide as its columns.
    width = max(len("distillation head") - 9, *(len(printable(name)) for name in classifier.class_names))

    def lines(result: Prediction) -> str:
        if csv_file is not None:
            return _csv_line(result.as_row(threshold))
        return json.dumps(result.as_json(threshold)) if as_json else result.as_text(width, threshold)

    left_out: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    standard_input = sys.stdin.buffer if STANDARD_INPUT in images else None
    results = predict(classifier, images, topk=topk, left_out=left_out, notes=notes, standard_input=standard_input)
    num_good = num_bad = 0
    with _output(csv_file) as write:
        if csv_file is not None:
            write(_csv_line(columns(topk, threshold)))
        for result in results:
            if isinstance(result, BadFile):
                num_bad += 1
                click.echo(printable(f"{result.path}: {result.reason}"), err=True)
                continue
            if not (as_json or csv_file or num_good) and (heading := result.heading(width)) is not None:
                write(heading)
            num_good += 1
            write(lines(result))
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

    def is_unsure(self, threshold: float | None) -> bool:
        """Tell whether the prediction's probability is below a threshold; nothing is below None."""
        return threshold is not None and self.top[0][1] < threshold

    def as_json(self, threshold: float | None = None) -> dict[str, Any]:
        """Return plain JSON values; bytes of the path that are not UTF-8 are escaped.

        Args:
            threshold: See `is_unsure`; without one there is no key `unsure`.
        """

        def rows(top: Top) -> list[dict[str, Any]]:
            return [{"class": name, "probability": round(value, 6)} for name, value in top]

        path = os.fsencode(self.path).decode(errors="backslashreplace")
        unsure = {} if threshold is None else {"unsure": self.is_unsure(threshold)}
        heads = {name: rows(top) for name, top in self.heads.items()}
        return {"path": path, **unsure, "top": rows(self.top), "heads": heads}

    def as_row(self, threshold: float | None = None) -> list[object]:
        """Return the values of `columns`; those of a head that the model lacks are None."""
        unsure = [] if threshold is None else ["yes" if self.is_unsure(threshold) else "no"]
        heads = [self.heads[name][0] if name in self.heads else (None, None) for name in HEADS]
        first, *others = self.top
        cells = [value for pair in (*heads, *others) for value in pair]
        values = [self.path, first[0], first[1], *unsure, *cells]
        return [round(value, 6) if isinstance(value, float) else value for value in values]

    def heading(self, width: int) -> str | None:
        """Return the line above the texts; None where there is one head, and so one column.

        Args:
            width: Characters of the longest class name.
        """
        if len(self.heads) == 1:
            return None
        columns = ("prediction", *(f"{name} head" for name in self.heads))
        return "  " + "   ".join(f"{column:<{width + 9}}" for column in columns).rstrip()

    def as_text(self, width: int, threshold: float | None = None) -> str:
        """Return lines for people: the prediction, and beside it that of each of two heads.

        Args:
            width: Characters of the longest class name.
            threshold: See `is_unsure`.
        """
        columns = [self.top, *(self.heads.values() if len(self.heads) > 1 else ())]
        rows = zip(*columns, strict=True)
        cells = [[f"{printable(name):<{width}} {100 * value:6.2f} %" for name, value in row] for row in rows]
        name, value = self.top[0]
        unsure = f": unsure ({printable(name)} {100 * value:.2f} %)" if self.is_unsure(threshold) else ""
        return "\n".join([printable(self.path) + unsure, *("  " + "   ".join(row) for row in cells)])


def columns(topk: int, threshold: float | None = None) -> list[str]:
    """Return the headings of `Prediction.as_row`: the prediction, each head's, then the classes after the first."""
    heads = [heading for name in HEADS for heading in (f"{name}_head", f"{name}_head_probability")]
    others = [heading for rank in range(2, topk + 1) for heading in (f"prediction_{rank}", f"probability_{rank}")]
    return ["path", "prediction", "probability", *([] if threshold is None else ["unsure"]), *heads, *others]


def _csv_line(cells: Sequence[Any]) -> str:
    return to_csv(cells, ())[:-1].decode()


@contextlib.contextmanager
def _output(csv_file: Path | None) -> Iterator[Callable[[str], object]]:
    """Yield what takes each line: a file, which is there once it is whole, or standard output."""
    if csv_file is None or csv_file == Path(STANDARD_INPUT):
        yield click.echo
        return
    refuse_writing(csv_file)
    with replacing(csv_file) as descriptor, open(descriptor, "wb", closefd=False) as file:
        yield lambda line: file.write(f"{line}\n".encode())
    click.echo(printable(f"{csv_file}: written"))


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
    reading = read_images(files, classifier.image_size, classifier.batch_size, classifier.resize)
    with quiet, contextlib.closing(reading) as batches:
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
