"""Where students look: the attention of class and distillation token over some test images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.datasets import Dataset
from pipeline.inference.classifier import Classifier
from pipeline.inference.loading import load
from pipeline.models import PAPERS_STUDENTS
from pipeline.models.students import STUDENTS, Student, attention_maps, attention_rollout
from pipeline.report.figures import Cell, sheet
from pipeline.report.tables import Figure, Table, number
from pipeline.training.checkpoints import read_meta
from pipeline.views.views import normalize
from stages.reports.runs import FinishedRun, FinishedRuns
from stages.shared.context import Context
from stages.shared.trained import other_data

NUM_IMAGES = 6
WITH_BOTH_TOKENS = [name for name in PAPERS_STUDENTS if STUDENTS[name].has_distillation_head]
COLUMNS = (
    "class token,\nlast block",
    "distillation token,\nlast block",
    "class token,\nrollout",
    "distillation token,\nrollout",
)
NAMES = tuple(column.replace("\n", " ") for column in COLUMNS)
EXPLANATION = (
    "Yellow patches get the most attention, blue ones the least; what is missing to 100 % goes to the two tokens "
    "themselves. Last block: mean over heads. Rollout (arXiv:2005.00928): attention through all blocks, each of which "
    "also passes on half of its input; MLPs, and what pixel tokens add to patches, are left out."
)


def attention(context: Context, runs: FinishedRuns) -> list[Figure | Table]:
    """Draw attention maps of the recipe's students that have both tokens and were trained on the prepared data.

    Raises:
        DataError: A checkpoint or the data are damaged.
    """
    trained = [(run, read_meta(run.directory) or {}) for run in runs.students.values()]
    able = [(run, meta) for run, meta in trained if meta.get("model") in WITH_BOTH_TOKENS]
    if not able or not context.paths.is_prepared:
        return []
    dataset = context.dataset()
    return [_figure(run, dataset) for run, meta in able if not other_data(meta, context.paths, dataset)]


def _figure(run: FinishedRun, dataset: Dataset) -> Figure:
    """Draw one student's maps."""
    classifier = load(run.directory)
    student = classifier.module
    assert isinstance(student, Student)
    samples = _choose(dataset.test.labels)
    pixels = np.ascontiguousarray(dataset.test.images[samples])
    with torch.no_grad():
        class_logits, distillation_logits = student(_normalized(classifier, pixels))
    predicted = [logits.argmax(dim=1).tolist() for logits in (class_logits, distillation_logits)]
    shares = attention_over(student, classifier, pixels)
    side = shares[NAMES[0]].shape[-1]
    names, rows, data = dataset.class_names, [], []
    for row, (sample, image) in enumerate(zip(samples.tolist(), pixels, strict=True)):
        target = names[dataset.test.labels[sample]]
        heads = [f"its head: {names[of_images[row]]}" for of_images in predicted]
        cells = [Cell(image, [f"#{sample}", f"target: {target}"], grid=side)]
        for column, name in enumerate(NAMES):
            patches = shares[name][row]
            lines = [f"up to {100 * patches.max():.0f} % a patch", f"{100 * patches.sum():.0f} % on patches"]
            lines += heads[column : column + 1]
            cells.append(Cell(image, lines, weights=patches / patches.max()))
            data.append([str(sample), target, name, *(number(value, 4) for value in patches.flatten())])
        rows.append(cells)
    epoch = f"epoch {run.metrics['test']['epoch']} of {run.metrics['epochs']}"
    note = f"{run.name}, {epoch}, seed {run.seed}; {len(samples)} test images of as many classes. {EXPLANATION}"
    title = f"Attention over the patches, {run.name}"
    table = Table(title, ["sample", "target", "map", *(f"patch {number_ + 1}" for number_ in range(side**2))], data)
    alt = f"{len(samples)} test images, and four maps of each that are light where the student's tokens attend."
    return Figure(f"attention-{run.name}", title, sheet(rows, ["image, patches", *COLUMNS]), alt, note, table)


def attention_over(
    student: Student, classifier: Classifier, pixels: NDArray[np.uint8]
) -> dict[str, NDArray[np.float64]]:
    """Return how much a student's tokens attend to each patch of some images.

    Args:
        student: In evaluation mode.
        classifier: The same, as loaded.
        pixels: `(B, image_size, image_size, 3)` uint8 RGB.

    Returns:
        `(B, S, S)` float64 in [0, 1] for each of NAMES, S patches a side; without those of a distillation token where
        the student has none.
    """
    both = student.has_distillation_head
    shares = token_shares(attention_maps(student, _normalized(classifier, pixels)), has_distillation_token=both)
    side = round(shares.shape[-1] ** 0.5)
    names = [name for name in NAMES if both or name.startswith("class token")]
    return {name: shares[:, index].reshape(-1, side, side) for index, name in enumerate(names)}


def token_shares(maps: torch.Tensor, *, has_distillation_token: bool = True) -> NDArray[np.float64]:
    """Return how much the class and the distillation token attend to each patch.

    Args:
        maps: `(B, L, heads, T, T)` float, of pipeline.models.students.attention_maps.
        has_distillation_token: Whether the last token is one.

    Returns:
        `(B, 4, T - 2)` float64 in [0, 1]: of the last block, mean over heads, class and distillation token; of the
        rollout the same. Without a distillation token `(B, 2, T - 1)`.
    """
    tokens, patches = ((0, -1), slice(1, -1)) if has_distillation_token else ((0,), slice(1, None))
    last, rollout = maps[:, -1].mean(dim=1), attention_rollout(maps)
    shares = [matrix[:, token, patches] for matrix in (last, rollout) for token in tokens]
    return torch.stack(shares, dim=1).cpu().double().numpy()


def _normalized(classifier: Classifier, pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Return pixels `(B, H, W, 3)` uint8 as the input of the classifier's module."""
    return normalize(classifier.place(pixels), classifier.config["mean"], classifier.config["std"])


def _choose(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first test images of classes chosen evenly."""
    classes, first = np.unique(labels, return_index=True)
    chosen: NDArray[np.int64] = first[np.linspace(0, len(classes) - 1, min(NUM_IMAGES, len(classes))).astype(np.int64)]
    return chosen
