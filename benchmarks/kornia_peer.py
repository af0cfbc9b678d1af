"""kornia's way of making the same views: float32 batches on the device, drawn for each image."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import kornia.augmentation as K
import torch
from kornia.augmentation.auto import AutoAugment
from kornia.augmentation.auto.autoaugment import ops
from torch import Tensor, nn

from benchmarks.synthetic import MEAN, SIZE, STD
from benchmarks.view_peers import CUTMIX_ALPHA, PADDING

NAME = "kornia, whole batches"
# Ours to kornia's names of AutoAugment's operations.
NAMES = {
    "ShearY": "shear_y",
    "TranslateX": "translate_x",
    "TranslateY": "translate_y",
    "Rotate": "rotate",
    "Brightness": "brightness",
    "Color": "color",
    "Contrast": "contrast",
    "Sharpness": "sharpness",
    "Posterize": "posterize",
    "Solarize": "solarize",
    "AutoContrast": "auto_contrast",
    "Equalize": "equalize",
    "Invert": "invert",
}

Transform = Callable[[Tensor, Tensor], object]


def whole_view(device: torch.device) -> Transform:
    """Return crop, flip, AutoAugment, CutMix and normalisation of `(B, 3, H, W)` uint8 images.

    kornia's AutoAugment draws one sub-policy for the whole batch, and whether it is applied for each image.
    """
    operations = nn.Sequential(_crop(), _flip(), AutoAugment("cifar10")).to(device)
    cutmix, normalized = _cutmix().to(device), _normalize().to(device)

    def transform(images: Tensor, labels: Tensor) -> object:
        mixed, mixed_labels = cutmix(operations(images.float().div_(255)), labels)
        return normalized(mixed), mixed_labels

    return transform


def single_operations(bins: Mapping[str, int | None], device: torch.device) -> dict[str, Transform]:
    """Return each operation alone, on float32 images in [0, 1], by our name of it.

    Args:
        bins: Magnitude bin by AutoAugment's name of an operation, None for one without magnitude.
        device: Where the images are.
    """
    modules: dict[str, nn.Module] = {
        "crop": _crop(),
        "flip": _flip(),
        "AutoAugment": AutoAugment("cifar10"),
        "normalise": _normalize(),
        **{name: getattr(ops, NAMES[name])(1.0, magnitude_bin) for name, magnitude_bin in bins.items()},
    }
    return {**{name: _on_images(module.to(device)) for name, module in modules.items()}, "CutMix": _cutmix().to(device)}


def _on_images(module: nn.Module) -> Transform:
    return lambda images, labels: module(images)


def _crop() -> nn.Module:
    module: nn.Module = K.RandomCrop((SIZE, SIZE), padding=PADDING, p=1.0, same_on_batch=False)
    return module


def _flip() -> nn.Module:
    module: nn.Module = K.RandomHorizontalFlip(p=0.5, same_on_batch=False)
    return module


def _cutmix() -> nn.Module:
    module: nn.Module = K.RandomCutMixV2(
        num_mix=1, beta=CUTMIX_ALPHA, p=1.0, same_on_batch=False, data_keys=["input", "class"], use_correct_lambda=True
    )
    return module


def _normalize() -> nn.Module:
    module: nn.Module = K.Normalize(mean=torch.tensor(MEAN), std=torch.tensor(STD))
    return module
