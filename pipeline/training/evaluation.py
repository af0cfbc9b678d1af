"""A model's scores on a split of clean images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.errors import NumericalError
from pipeline.losses import Outputs, probabilities
from pipeline.system.runtime import deciding, images_at_once
from pipeline.system.text import to_csv
from pipeline.training.batches import EvaluationData
from pipeline.training.distributed import ALONE, Group
from pipeline.training.metrics import Meter, Scores
from pipeline.views.views import normalize

PREDICTION_COLUMNS = ("sample", "target", "prediction", "probability", "class_head", "distillation_head", "teacher")
"""Columns of predictions.csv: `sample` counts from 0, `probability` is that of the prediction, the heads' columns are
what one head alone predicts, and `teacher` is the teacher's label of the same image."""


@dataclass
class Predictions:
    """What a model predicts for each image of a split, on the data's device; zeros until `evaluate` has filled it.

    Attributes:
        classes: `(N,)` int64, the most probable class.
        probabilities: `(N,)` float32 in [0, 1], of that class.
        class_head: `(N,)` int64, the most probable class by the class head alone.
        distillation_head: `(N,)` int64, likewise by the distillation head; None where there is none.
    """

    classes: Tensor
    probabilities: Tensor
    class_head: Tensor
    distillation_head: Tensor | None = None

    @classmethod
    def of(cls, data: EvaluationData) -> Predictions:
        """Return zeros for every image of a split."""
        return cls.zeros(len(data.labels), data.labels.device)

    @classmethod
    def zeros(cls, num_images: int, device: torch.device) -> Predictions:
        """Return zeros for a number of images."""
        classes = torch.zeros(num_images, dtype=torch.int64, device=device)
        return cls(classes, torch.zeros(num_images, device=device), torch.zeros_like(classes))

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Return the predictions of at least one part, one after the other, by the same model."""
        columns = ([getattr(part, field.name) for part in parts] for field in dataclasses.fields(cls))
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]

    def add(self, part: slice, outputs: Outputs) -> None:
        """Fill in a batch: one or two heads' logits, `(B, K)` float each, of the images at `part`."""
        class_logits, distillation_logits = outputs if isinstance(outputs, tuple) else (outputs, None)
        self.probabilities[part], self.classes[part] = probabilities(outputs).max(dim=1)
        self.class_head[part] = class_logits.argmax(dim=1)
        if distillation_logits is not None:
            if self.distillation_head is None:
                self.distillation_head = torch.zeros_like(self.classes)
            self.distillation_head[part] = distillation_logits.argmax(dim=1)

    def reduce(self, group: Group) -> None:
        """Combine all ranks' shares of the split."""
        if group.is_alone:
            return
        has_two_heads = torch.tensor(
            [self.distillation_head is not None], dtype=torch.int64, device=self.classes.device
        )
        if group.max_(has_two_heads) and self.distillation_head is None:
            self.distillation_head = torch.zeros_like(self.classes)
        heads = () if self.distillation_head is None else (self.distillation_head,)
        group.sum_(self.classes, self.probabilities, self.class_head, *heads)

    def as_csv(self, class_names: Sequence[str], data: EvaluationData, paths: Sequence[str] | None = None) -> bytes:
        """Return one row for each image of the split that was evaluated, classes by name.

        The columns are PREDICTION_COLUMNS and, where there are paths, `path`; what does not exist is an empty cell.

        Args:
            class_names: K names.
            data: The split.
            paths: N paths, see pipeline.data.datasets.Split.
        """
        nobody = [None] * len(self.classes)
        columns = (data.labels, self.classes, self.class_head, self.distillation_head, data.teacher_labels)
        target, prediction, class_head, distillation_head, teacher = (
            nobody if column is None else [class_names[index] for index in column.tolist()] for column in columns
        )
        probabilities = (f"{value:.4f}" for value in self.probabilities.tolist())
        samples = range(len(self.classes))
        rows = zip(samples, target, prediction, probabilities, class_head, distillation_head, teacher, strict=True)
        if paths is None:
            return to_csv(PREDICTION_COLUMNS, rows)
        return to_csv((*PREDICTION_COLUMNS, "path"), ((*row, path) for row, path in zip(rows, paths, strict=True)))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: EvaluationData,
    *,
    precision: str = "fp32",
    group: Group = ALONE,
    predictions: Predictions | None = None,
) -> Scores:
    """Score a model on clean images; it is left in evaluation mode.

    Args:
        model: On the device of the data, with the same weights on every rank.
        data: The whole split.
        precision: `fp32` or `bf16`.
        group: The ranks that share the images; all return the scores of the whole split.
        predictions: Filled in for every image, where given; the same on all ranks.

    Raises:
        NumericalError: A logit is not finite.
    """
    model.eval()
    device = data.images.device
    meter = Meter(data.num_classes, device)
    broken = torch.zeros((), dtype=torch.int64, device=device)
    batch_size = images_at_once(device, data.images.shape[-1], model)
    for part, images in data.batches(batch_size, group.share(len(data.labels))):
        with deciding(device, precision):
            outputs = model(normalize(images, data.mean, data.std))
        for head in outputs if isinstance(outputs, tuple) else (outputs,):
            broken += (~torch.isfinite(head)).any()
        if predictions is not None:
            predictions.add(part, outputs)
        meter.add(outputs, data.labels[part], None if data.teacher_labels is None else data.teacher_labels[part])
    if group.max_(broken):
        raise NumericalError("evaluation: a logit is not finite; lower lr, or set clip to 1.0")
    meter.reduce(group)
    if predictions is not None:
        predictions.reduce(group)
    return meter.scores()
