"""The paper's own figures, to stand beside ours.

Top-1 and top-5 are percentages, precision, recall and F1 lie in [0, 1]; None where the paper gives no figure.

Source: arXiv:2502.16762, Tables 2 to 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """A row of one of the paper's tables.

    Attributes:
        top1: Highest test accuracy over all epochs, percent.
        top5: Percent.
        precision: Macro precision.
        recall: Macro recall.
        f1: Macro F1.
    """

    top1: float
    top5: float | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None


TEACHERS: Mapping[str, Mapping[str, Reported]] = {
    "cifar100": {
        "densenet121": Reported(69.06, 89.61),
        "mobilenet_v3_large": Reported(65.50, 88.86),
        "resnet50": Reported(65.17, 87.32),
        "wide_resnet50_2": Reported(66.32, 87.91),
        "squeezenet1_1": Reported(42.34, 67.13),
        "vgg16": Reported(79.42, 94.72),
        "vgg16_bn": Reported(79.80, 94.51, 0.77, 0.80, 0.79),
        "vgg19": Reported(79.46, 94.75),
    },
    "cifar10": {"vgg16_bn": Reported(95.98, 99.92)},
    "mnist": {"vgg16_bn": Reported(99.75, 100.0)},
}
"""Data set, then teacher (Table 2; the teacher's rows of Tables 3 to 5)."""

STUDENTS: Mapping[str, Mapping[str, Reported]] = {
    "cifar100": {
        "vit": Reported(70.79, 89.55, 0.65, 0.71, 0.68),
        "deit": Reported(73.91, 91.91, 0.71, 0.74, 0.73),
        "tnt": Reported(68.47, 88.44, 0.61, 0.68, 0.64),
        "titn": Reported(74.71, 92.28, 0.72, 0.75, 0.74),
        "titn-mixup": Reported(74.40, 92.53, 0.70, 0.74, 0.72),
        "titn-large-patch": Reported(63.63, 85.93, 0.58, 0.64, 0.61),
    },
    "cifar10": {
        "vit": Reported(86.33, 99.41),
        "deit": Reported(91.64, 99.73),
        "tnt": Reported(86.91, 99.38),
        "titn": Reported(92.03, 99.80),
        "titn-large-patch": Reported(85.39, 99.31),
    },
    "mnist": {
        "vit": Reported(99.40, 100.0),
        "deit": Reported(99.52, 100.0),
        "tnt": Reported(99.46, 100.0),
        "titn": Reported(99.56, 100.0),
    },
}
"""Data set, then student (Tables 3 to 5)."""

OPTIMIZERS: Mapping[str, float | None] = {"sgd": 79.8017, "adam": None, "rmsprop": 73.40761}
"""Top-1 of VGG16_bn on CIFAR-100 by optimiser (Figure 5); the text gives no figure for Adam."""
