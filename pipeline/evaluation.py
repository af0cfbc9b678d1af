"""A model's scores on a split of clean images."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.batches import EvaluationData
from pipeline.distributed import ALONE, Group
from pipeline.errors import NumericalError
from pipeline.metrics import Meter, Scores
from pipeline.runtime import autocast
from pipeline.views import normalize

# What an evaluation's batch touches should fit a CPU's cache; a GPU wants few, large launches.
CPU_BATCH = 256
GPU_BATCH = 4096


def evaluate(model: nn.Module, data: EvaluationData, *, precision: str = "fp32", group: Group = ALONE) -> Scores:
    """Score a model on clean images; it is left in evaluation mode.

    Args:
        model: On the device of the data, with the same weights on every rank.
        data: The whole split.
        precision: `fp32` or `bf16`.
        group: The ranks that share the images; all return the scores of the whole.

    Raises:
        NumericalError: A logit is not finite.
    """
    meter = Meter(data.num_classes, data.images.device)
    tally(model, data, meter, precision=precision, group=group)
    meter.reduce(group)
    return meter.scores()


@torch.inference_mode()
def tally(
    model: nn.Module, data: EvaluationData, meter: Meter, *, precision: str = "fp32", group: Group = ALONE
) -> None:
    """Add a model's answers on clean images to a meter; the model is left in evaluation mode.

    Args:
        model: On the device of the data, with the same weights on every rank.
        data: Images and targets.
        meter: Gains this rank's share.
        precision: `fp32` or `bf16`.
        group: The ranks that share the images.

    Raises:
        NumericalError: A logit is not finite.
    """
    model.eval()
    device = data.images.device
    broken = torch.zeros((), dtype=torch.int64, device=device)
    batch_size = CPU_BATCH if device.type == "cpu" else GPU_BATCH
    for part, images in data.batches(batch_size, group.share(len(data.labels))):
        with autocast(device, precision):
            outputs = model(normalize(images, data.mean, data.std))
        for head in outputs if isinstance(outputs, tuple) else (outputs,):
            broken += (~torch.isfinite(head)).any()
        meter.add(outputs, data.labels[part], None if data.teacher_labels is None else data.teacher_labels[part])
    if group.max_(broken):
        raise NumericalError("evaluation: a logit is not finite; lower lr, or set clip to 1.0")
