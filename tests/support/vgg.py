"""A VGG of torchvision that trains in milliseconds."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import VGG

WIDTH, HIDDEN = 8, 16


def small_vgg(num_classes: int, *, size: int = 32, dropout: float = 0.5) -> VGG:
    """Return a VGG whose feature map of images of one size is 1x1, which it pools to 7x7 as all of them do."""
    with torch.device("meta"):  # its own classifier has a hundred million weights
        model = VGG(nn.Identity(), init_weights=False)
    model.features = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.MaxPool2d(size)
    )
    model.classifier = nn.Sequential(
        nn.Linear(WIDTH * 49, HIDDEN), nn.ReLU(), nn.Dropout(dropout), nn.Linear(HIDDEN, num_classes)
    )
    return model
