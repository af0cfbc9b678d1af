"""Teachers as torchvision builds them, and as labels are made with them."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.synthetic import MEAN, NUM_CLASSES, SIZE, STD, images_and_labels
from pipeline.labels.teacher import Teacher
from pipeline.models.folding import fold
from pipeline.models.teachers import build_teacher
from pipeline.views.views import normalize

NUM_CALIBRATION_IMAGES = 64


def build(name: str) -> nn.Module:
    """Build a teacher with random weights and batch norms that have seen images, in evaluation mode, on the CPU.

    Fresh norms would let the activations of deep teachers shrink to subnormal numbers, which are slow on CPUs.

    Args:
        name: A key of pipeline.models.teachers.TEACHERS.
    """
    torch.manual_seed(0)
    model = build_teacher(name, num_classes=NUM_CLASSES, bn_momentum=1.0)
    images, _ = images_and_labels(NUM_CALIBRATION_IMAGES)
    with torch.no_grad():
        model(normalize(images, MEAN, STD))
    return model.eval()


def stock(model: nn.Module, device: torch.device, batch_size: int) -> Teacher:
    """Return a teacher that labels in float32 as torchvision built it."""
    return Teacher(model.to(device), MEAN, STD, "fp32", batch_size)


def folded(model: nn.Module, device: torch.device, batch_size: int, precision: str) -> Teacher:
    """Return a teacher folded for 32x32 images, channels last.

    Args:
        model: In evaluation mode; left as it is.
        device: Where it labels.
        batch_size: Images a forward pass.
        precision: `fp32` or `bf16`.
    """
    light = fold(model, SIZE)[0].to(device)
    light.to(memory_format=torch.channels_last)
    return Teacher(light, MEAN, STD, precision, batch_size)
