"""The teacher on augmented views: how often its labels are right, and a sheet of sample views."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.datasets import Dataset
from pipeline.errors import DataError
from pipeline.labels.cache import LabelCache
from pipeline.labels.replay import check_canaries, other_pixels
from pipeline.report.figures import Cell, DotRow, dots, sheet
from pipeline.report.tables import Figure, Table, number
from pipeline.views import operations
from pipeline.views.augment import SUB_POLICY
from pipeline.views.scores import EVERYTHING, OperationMeter, OperationScores, wilson_interval
from pipeline.views.views import Views
from stages.reports.conditions import MIXINGS
from stages.reports.runs import FinishedRuns
from stages.shared.context import Context
from stages.shared.fitting import make_views
from stages.shared.paths import relabel
from stages.shared.teacher_labels import open_labels

NUM_VIEWS = 8
NUM_SAMPLES = 6
NUM_WRONG = 3  # of the samples, as far as there are any
NUM_COLUMNS = 4  # of views, where they do not mix


@dataclass(frozen=True, eq=False)
class Labelled:
    """A view recipe's views of the training split, and the teacher's labels of them.

    Attributes:
        name: The view recipe.
        dataset: The data set.
        cache: The labels.
        views: The views.
    """

    name: str
    dataset: Dataset
    cache: LabelCache
    views: Views

    @property
    def suffix(self) -> str:
        """What tells the names of its figures from those of other view recipes."""
        return "" if self.name == "default" else f"-{self.name}"

    @property
    def of(self) -> str:
        """What tells the titles of its figures from those of other view recipes."""
        return "" if self.name == "default" else f", views {self.name}"

    @property
    def teacher(self) -> str:
        """The teacher's name."""
        return str(self.cache.provenance["teacher"])

    @property
    def note(self) -> str:
        """Whose labels of which views these are."""
        mixing = MIXINGS[self.views.recipe.mixing]
        precision = self.cache.provenance["precision"]
        return f"Views {self.name} ({mixing}); labels of {self.teacher}, {precision}, from the label cache"


def teacher_on_views(context: Context, runs: FinishedRuns) -> list[Figure | Table]:
    """Show the teacher's accuracy by operation and sample views of each view recipe that is labelled.

    Raises:
        DataError: Labels or data are damaged, or belong to something else.
    """
    names = [name for name in runs.recipe.views if runs.paths.labels(name).is_file()]
    if not names or not context.paths.is_prepared:
        return []
    dataset = context.dataset()
    shown: list[Figure | Table] = []
    for name in names:
        cache = open_labels(runs.paths, runs.recipe, dataset, name)
        labelled = Labelled(name, dataset, cache, make_views(context, dataset, name))
        view = check_canaries(cache, labelled.views)
        if view is not None:
            raise DataError(f"{runs.paths.labels(name)}: {other_pixels(cache, view)}; {relabel(name)}")
        shown += [*by_operation(labelled), sample_views(labelled)]
    return shown


def by_operation(labelled: Labelled) -> list[Figure | Table]:
    """Show how often the teacher's labels are right, by what was drawn for the image."""
    count = labelled.cache.num_views
    chosen = sorted({int(view) for view in np.linspace(0, count - 1, min(count, NUM_VIEWS))})
    meter = OperationMeter(labelled.views.recipe, labelled.dataset.image_size)
    for view in chosen:
        meter.add(labelled.cache.labels[view], labelled.dataset.train.labels, labelled.views.drawn(view))
    scores = meter.scores()
    has_mixing = labelled.views.recipe.mixing != "none"
    listed = ", ".join(map(str, chosen))
    shown = f"view {listed}" if len(chosen) == 1 else f"{len(chosen)} of {count} views ({listed})"
    note = f"{labelled.note}; {shown} of {len(labelled.dataset.train)} training images. "
    if has_mixing:
        note += "Of two mixed images the one with the larger share decides: its target is right, its operations count. "
    note += "Lines: 95 % intervals, images taken as independent. The teacher learned from other views of these images."
    title = f"{labelled.teacher} on augmented views by operation{labelled.of}"
    columns = ["operation", "drawn", "images", "right %", *(["either target %"] if has_mixing else [])]
    rows = []
    for one in scores:
        counts = [one.num_right, *([one.num_either] if has_mixing else [])]
        shares = [number(100 * num / one.num_images, 1) for num in counts]
        rows.append([one.operation, one.drawn, str(one.num_images), *shares])
    table = Table(title, columns, rows, note)
    total = scores[0]
    assert total.operation == EVERYTHING
    drawn = [_row(one) for one in scores if one.operation not in (EVERYTHING, SUB_POLICY)]
    if not drawn:
        return [table]
    overall = 100 * total.num_right / total.num_images
    png = dots(drawn, ["right"], x_label="the teacher's labels that are right, %", overall=[overall], remarks="images")
    alt = f"Dots: share of the teacher's labels that are right, by operation. Overall {overall:.1f} %."
    figure = Figure(f"teacher-on-views{labelled.suffix}", title, png, alt, note, table)
    return [figure, Table(title, columns, [row for row in rows if row[0] != SUB_POLICY], note)]


def _row(scores: OperationScores) -> DotRow:
    share = 100 * scores.num_right / scores.num_images
    interval = wilson_interval(scores.num_right, scores.num_images)
    return DotRow(scores.drawn, [share], [interval], scores.operation, f"{scores.num_images:,}")


def sample_views(labelled: Labelled) -> Figure:
    """Draw a sheet of training images with their views, targets and the teacher's labels; of mixed views both parts."""
    has_mixing = labelled.views.recipe.mixing != "none"
    samples = _choose(labelled)
    indices = torch.from_numpy(samples)
    originals = labelled.dataset.train.images[samples]
    names = labelled.dataset.class_names
    targets = labelled.dataset.train.labels
    rows: list[list[Cell | None]] = [
        [Cell(image, [f"#{index}", f"target: {names[targets[index]]}"])]
        for index, image in zip(samples, originals, strict=True)
    ]
    data: list[list[str]] = []
    if has_mixing:
        columns = ["image and target", "its view", "partner's view", "mixed view: targets,\nteacher's label"]
        _add_mixed(labelled, indices, rows, data)
        shown = [0]
    else:
        shown = list(range(min(NUM_COLUMNS, labelled.cache.num_views)))
        columns = ["image and target", *(f"view {view},\nteacher's label" for view in shown)]
        for view in shown:
            _add_plain(labelled, view, indices, rows, data)
    table = Table(
        f"Sample views{labelled.of}",
        ["sample", "view", "target", "partner", "partner's target", "lambda", "teacher's label", "drawn"],
        data,
    )
    note = f"{labelled.note}; view{'s' if len(shown) > 1 else ''} {', '.join(map(str, shown))}. "
    note += "Framed and bold: the label is none of the targets. "
    note += f"Up to {NUM_WRONG} samples were chosen for such a label in view 0, the others evenly."
    note += " Before the targets: lambda and 1 - lambda." if has_mixing else ""
    note += " Cut: the box that is read of an image, in its own pixels." if labelled.views.recipe.resized_crop else ""
    note += " Crop: by how many pixels the frame moves down and right." if labelled.views.recipe.crop else ""
    alt = f"{len(samples)} training images, what their views make of them, and the teacher's labels of these."
    return Figure(f"sample-views{labelled.suffix}", table.title, sheet(rows, columns), alt, note, table)


def _choose(labelled: Labelled) -> NDArray[np.int64]:
    """Return the samples to show, ascending: some whose label is none of the targets, the others evenly spread."""
    targets, labels = labelled.dataset.train.labels, labelled.cache.labels[0]
    partners = labelled.views.drawn(0).get("partner", np.arange(len(targets)))
    is_wrong = (labels != targets) & (labels != targets[partners])
    wrong, others = np.flatnonzero(is_wrong), np.flatnonzero(~is_wrong)

    def spread(indices: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        count = min(count, len(indices))
        return indices[np.linspace(0, len(indices) - 1, count).astype(np.int64)] if count else indices[:0]

    some = spread(wrong, NUM_WRONG)
    chosen: NDArray[np.int64] = np.sort(np.concatenate([some, spread(others, NUM_SAMPLES - len(some))]))
    return chosen


def _add_mixed(labelled: Labelled, indices: torch.Tensor, rows: list[list[Cell | None]], data: list[list[str]]) -> None:
    """Add view, partner's view and mixed view of view 0."""
    names, views, drawn = labelled.dataset.class_names, labelled.views, labelled.views.drawn(0)
    partners = drawn["partner"][indices.numpy()]
    unmixed = Views(views.images, views.labels, dataclasses.replace(views.recipe, mixing="none"))
    firsts, seconds = (_pixels(unmixed, 0, samples) for samples in (indices, torch.from_numpy(partners)))
    mixed = _pixels(views, 0, indices)
    for row, index in enumerate(indices.tolist()):
        share, partner = float(drawn["lambda"][index]), int(partners[row])
        targets = [int(labelled.dataset.train.labels[sample]) for sample in (index, partner)]
        label = int(labelled.cache.labels[0, index])
        lines = [f"{part:.2f}: {names[target]}" for part, target in zip((share, 1 - share), targets, strict=True)]
        lines.append(f"teacher: {names[label]}")
        rows[row] += [
            Cell(firsts[row], _described(drawn, index)),
            Cell(seconds[row], [f"#{partner}", f"target: {names[targets[1]]}", *_described(drawn, partner)]),
            Cell(mixed[row], lines, marked=label not in targets),
        ]
        cells = [str(index), "0", names[targets[0]], str(partner), names[targets[1]], f"{share:.4f}", names[label]]
        data.append([*cells, "; ".join(_described(drawn, index))])


def _add_plain(
    labelled: Labelled, view: int, indices: torch.Tensor, rows: list[list[Cell | None]], data: list[list[str]]
) -> None:
    """Add a view that does not mix."""
    names, drawn = labelled.dataset.class_names, labelled.views.drawn(view)
    pixels = _pixels(labelled.views, view, indices)
    for row, index in enumerate(indices.tolist()):
        target, label = int(labelled.dataset.train.labels[index]), int(labelled.cache.labels[view, index])
        described = _described(drawn, index)
        rows[row].append(Cell(pixels[row], [f"teacher: {names[label]}", *described], marked=label != target))
        cells = [str(index), str(view), names[target], "", "", "", names[label]]
        data.append([*cells, "; ".join(described)])


def _pixels(views: Views, view: int, indices: torch.Tensor) -> NDArray[np.uint8]:
    """Return samples of a view, `(B, H, W, 3)` uint8."""
    return views.batch(view, indices).images.permute(0, 2, 3, 1).cpu().numpy()


def _described(drawn: Mapping[str, NDArray[Any]], index: int) -> list[str]:
    """Say what was drawn for an image, in lines that fit below it."""
    values = {name: array[index] for name, array in drawn.items()}
    cut = [_box(values["resized_crop"])] if "resized_crop" in values else []
    framed = [f"crop {values['crop'][0]:+d},{values['crop'][1]:+d}"] if "crop" in values else []
    framed += ["flip"] if values.get("flip") else []
    moved = [f"{values['rotation']:+.0f}°"] if "rotation" in values else []
    moved += [f"by {values['translate'][0]:+d},{values['translate'][1]:+d}"] if "translate" in values else []
    formed = [f"×{values['scale']:.2f}"] if "scale" in values else []
    formed += [f"shear {values['shear']:+.0f}°"] if "shear" in values else []
    lines = [", ".join(parts) for parts in (cut, framed, moved, formed) if parts]
    lines += [f"{name} ×{values[name]:.2f}" for name in ("brightness", "contrast") if name in values]
    applied = zip(values["operations"], values["magnitudes"], strict=True) if "operations" in values else []
    lines += [_strength(int(operation), float(value)) for operation, value in applied if operation >= 0]
    erased = values.get("erasing", np.zeros(4))
    return lines + ([f"black {_box(erased)}"] if erased[2] > erased[0] else [])


def _box(box: NDArray[np.int64]) -> str:
    """Write a box as width, height, and where its left upper corner is."""
    left, top, right, bottom = box.tolist()
    return f"{right - left}x{bottom - top} at {left},{top}"


def _strength(operation: int, magnitude: float) -> str:
    """Name an operation that a policy chose with its magnitude, if it has one."""
    name = operations.OPERATIONS[operation]
    if name in operations.WITHOUT_MAGNITUDE:
        return name
    if name.startswith("Translate"):
        return f"{name} {int(magnitude):+d}"
    sign = "" if name in operations.UNSIGNED_OPERATIONS else "+"
    return f"{name} {magnitude:{sign}.0f}" if abs(magnitude) >= 2 else f"{name} {magnitude:{sign}.2g}"
