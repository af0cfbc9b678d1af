"""The paper's own figures, to stand beside ours.

Top-1 and top-5 are percentages, precision, recall and F1 lie in [0, 1]; None where the paper gives no figure.

Source: arXiv:2502.16762, Tables 1 to 6 and section 4.2.
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

TABLES: Mapping[str, str] = {"cifar100": "Table 3", "cifar10": "Table 4", "mnist": "Table 5"}
"""Data set, then the table of its students."""

FIGURES: Mapping[str, str] = {"cifar100": "Figure 6", "cifar10": "Figure 7", "mnist": "Figure 8"}
"""Data set, then the figure of its students."""

TEACHER = "vgg16_bn"
"""The teacher of all its students."""

OPTIMIZERS: Mapping[str, float | None] = {"sgd": 79.8017, "adam": None, "rmsprop": 73.40761}
"""Top-1 of VGG16_bn on CIFAR-100 by optimiser (Figure 5); the text gives no figure for Adam."""

PROTOCOL: Mapping[str, str] = {
    "cifar100": "600 epochs of batch 1024, one GPU, highest test accuracy of all epochs",
    "cifar10": "600 epochs of batch 1024, one GPU, highest test accuracy of all epochs",
    "mnist": "350 epochs of batch 1024, one GPU, highest test accuracy of all epochs",
}
"""Data set, then how the paper's figures were reached (section 4.1, Figures 4 and 8; of CIFAR-10 the epochs
are not said, and taken to be CIFAR-100's)."""


@dataclass(frozen=True)
class Settings:
    """A column of Table 1: a student's geometry in pixels and widths, and its parameters.

    Attributes:
        image_size: Side of the image, pixels.
        width: Patch dimension.
        pixel_width: Pixel dimension; None without an inner path.
        patch_size: Side of a patch, pixels.
        pixel_size: Side of an inner token, pixels; None without an inner path.
        depth: Blocks.
        parameters: Millions. Table 3 prints 5.39 and 5.41 for ViT and DeiT.
    """

    image_size: int
    width: int
    pixel_width: int | None
    patch_size: int
    pixel_size: int | None
    depth: int
    parameters: float


SETTINGS: Mapping[str, Settings] = {
    "vit": Settings(32, 192, None, 8, None, 12, 5.36),
    "deit": Settings(32, 192, None, 8, None, 12, 5.37),
    "tnt": Settings(32, 192, 12, 8, 2, 12, 5.83),
    "titn": Settings(32, 192, 12, 8, 2, 12, 5.85),
    "titn-large-patch": Settings(32, 192, 12, 16, 4, 12, 5.85),
}
"""Student, then its settings (Table 1)."""


@dataclass(frozen=True)
class Costs:
    """The last two columns of Table 3.

    Attributes:
        gmacs_1024: The column "GFLOPs": 10^9 multiply-accumulates of a batch of 1024, see pipeline.models.counting.
        parameters: Millions.
    """

    gmacs_1024: float
    parameters: float


COSTS: Mapping[str, Costs] = {
    "vgg16_bn": Costs(448.47, 138.36),
    "vit": Costs(93.37, 5.39),
    "deit": Costs(98.84, 5.41),
    "tnt": Costs(105.93, 5.83),
    "titn": Costs(111.40, 5.85),
    "titn-mixup": Costs(111.40, 5.85),
    "titn-large-patch": Costs(36.09, 5.85),
}
"""Model, then its costs at 100 classes (Table 3); VGG16_bn's are those of ImageNet's head for 1000."""


@dataclass(frozen=True)
class Transfer:
    """A row of Table 6.

    Attributes:
        teacher: As printed.
        student: As printed.
        approach: Method of distillation.
        before: The teacher's top-1, percent.
        after: The student's.
        change: The change as printed, which is not always `after - before`.
        flops: The teacher's, 10^9; of the paper's own row 10^9 multiply-accumulates of a batch of 1024.
        teacher_parameters: Millions.
        student_parameters: Millions.
    """

    teacher: str
    student: str
    approach: str
    before: float
    after: float
    change: float
    flops: float
    teacher_parameters: float
    student_parameters: float


TRANSFERS: tuple[Transfer, ...] = (
    Transfer("ResNet110", "ResNet20", "TaT", 74.31, 71.70, -2.61, 0.255, 1.7, 0.27),
    Transfer("ResNet56", "ResNet20", "TaT", 72.00, 70.06, -2.06, 0.2, 0.85, 0.27),
    Transfer("ResNet110", "ResNet32", "TaT", 74.31, 73.08, -1.23, 0.25, 1.7, 0.46),
    Transfer("DeiT", "DeiT Tiny (CIFAR-10)", "Attn. Probe", 76.30, 71.82, -5.10, 1.38, 21.3, 2.38),
    Transfer("ViT-B", "ResNet50", "Cross-Arch.", 90.02, 87.39, -2.63, 55.4, 86.0, 25.4),
    Transfer("Swin-L", "ResNet50", "Cross-Arch.", 87.32, 76.28, -11.04, 103.9, 197.0, 25.4),
    Transfer("Swin-Tiny", "EfficientNet-B0", "Cross-Arch.", 94.50, 92.70, -1.80, 5.3, 5.3, 4.7),
    Transfer("Swin-L", "MobileNetV2", "Cross-Arch.", 93.50, 88.34, -5.16, 103.9, 197.0, 6.0),
    Transfer("VGG16-BN", "TITN (the paper's)", "Cross-Arch. + CutMix", 95.98, 92.05, -3.93, 444.32, 134.30, 5.8),
)
"""Table 6: eight published pairs, then the paper's own, on CIFAR-10 (its Table 4 gives TITN 92.03)."""
