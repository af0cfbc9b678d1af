"""Views of the recipe cifar100 as other libraries make them: torchvision for each image, and whole batches.

Each is a callable that goes once over all images in random order and leaves every batch normalised on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.autoaugment import _apply_op

from benchmarks.synthetic import MEAN, NUM_CLASSES, SIZE, STD
from pipeline.views.views import normalize

NUM_WORKERS = 2
PADDING = 4
# Beta(1/2, 1/2), as our recipes draw lambda.
CUTMIX_ALPHA = 0.5
POLICY = transforms.AutoAugmentPolicy.CIFAR10

Operation = Callable[[Any], Any]


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return `(N, 3, H, W)` uint8 as RGB images."""
    return [Image.fromarray(image) for image in np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())]


class Samples(Dataset[tuple[Any, int]]):
    """Images and labels, one at a time, transformed.

    PIL images are made beforehand: torchvision's own CIFAR100 makes one for every sample, 7 % of its time.
    """

    def __init__(self, images: Sequence[Any] | Tensor, labels: Tensor, transform: Operation) -> None:
        self.images, self.labels, self.transform = images, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


class Collate:
    """Stack samples, CutMix the batch, and normalise it unless each sample already is.

    torchvision's CutMix takes the next sample of the batch as the partner, already transformed, and one box for the
    whole batch; ours renders a partner for each sample and draws a box for each.
    """

    def __init__(self, *, normalized: bool) -> None:
        self.normalized = normalized
        self.cutmix = v2.CutMix(alpha=CUTMIX_ALPHA, num_classes=NUM_CLASSES)

    def __call__(self, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Return images `(B, 3, H, W)` float32, normalised, and mixed one-hot labels `(B, K)` float32."""
        images, labels = self.cutmix(*default_collate(samples))
        return (images if self.normalized else normalize(images, MEAN, STD)), labels


class LoaderEpoch:
    """An epoch of a DataLoader whose workers stay, so that starting them is not timed.

    Each worker computes with one thread, as PyTorch sets it.
    """

    def __init__(self, samples: Samples, collate: Callable[..., Any], batch_size: int, device: torch.device) -> None:
        self.device = device
        self.loader = DataLoader(
            samples,
            batch_size=batch_size,
            shuffle=True,
            num_workers=NUM_WORKERS,
            persistent_workers=True,
            prefetch_factor=2,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
        )

    def __call__(self) -> None:
        """Go through the epoch."""
        for images, labels in self.loader:
            images.to(self.device, non_blocking=True)
            labels.to(self.device, non_blocking=True)


class BatchEpoch:
    """An epoch of whole batches on the device.

    Args:
        images: `(N, 3, H, W)` uint8 on the device.
        labels: `(N,)` int64 on the device.
        batch_size: Images a batch.
        transform: Maps a batch of images and labels to what is trained on.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, transform: Callable[[Tensor, Tensor], object]
    ) -> None:
        self.images, self.labels, self.batch_size, self.transform = images, labels, batch_size, transform

    @torch.no_grad()
    def __call__(self) -> None:
        """Go through the epoch."""
        order = torch.randperm(len(self.images), device=self.images.device)
        for part in torch.split(order, self.batch_size):
            self.transform(self.images[part], self.labels[part])


def loader_epochs(images: Tensor, labels: Tensor, batch_size: int, device: torch.device) -> dict[str, LoaderEpoch]:
    """Return torchvision's three ways of transforming each image, in a DataLoader.

    The best setting found for each: samples stay uint8 until the batch is normalised as a whole in the worker. The
    customary one, ToTensor and Normalize for each image, stands beside it.
    """
    crop_flip = [transforms.RandomCrop(SIZE, padding=PADDING), transforms.RandomHorizontalFlip()]
    first = [*crop_flip, transforms.AutoAugment(POLICY)]
    second = [v2.RandomCrop(SIZE, padding=PADDING), v2.RandomHorizontalFlip(), v2.AutoAugment(POLICY)]
    customary = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    pictures, tensors = to_pil(images), images.cpu()

    def loader(kind: Sequence[Any] | Tensor, operations: list[Any], *, normalized: bool = False) -> LoaderEpoch:
        samples = Samples(kind, labels, transforms.Compose(operations))
        return LoaderEpoch(samples, Collate(normalized=normalized), batch_size, device)

    suffix = f"DataLoader {NUM_WORKERS} workers"
    return {
        f"torchvision PIL, {suffix}": loader(pictures, [*first, transforms.PILToTensor()]),
        f"torchvision PIL, ToTensor and Normalize per image, {suffix}": loader(
            pictures, [*first, *customary], normalized=True
        ),
        f"torchvision uint8 tensors, {suffix}": loader(tensors, first),
        f"transforms.v2 uint8 tensors, {suffix}": loader(tensors, second),
    }


def v2_on_batches() -> Callable[[Tensor, Tensor], object]:
    """Return transforms.v2 on a whole batch. It draws once for all images, so its views differ from ours."""
    operations = v2.Compose([v2.RandomCrop(SIZE, padding=PADDING), v2.RandomHorizontalFlip(), v2.AutoAugment(POLICY)])
    cutmix = v2.CutMix(alpha=CUTMIX_ALPHA, num_classes=NUM_CLASSES)

    def transform(images: Tensor, labels: Tensor) -> object:
        mixed, mixed_labels = cutmix(operations(images), labels)
        return normalize(mixed, MEAN, STD), mixed_labels

    return transform


def in_batches(
    transform: Callable[[Tensor, Tensor], object], images: Tensor, labels: Tensor, batch_size: int
) -> Callable[[], None]:
    """Return a loop that applies an operation to one batch after the other."""

    @torch.no_grad()
    def run() -> None:
        for start in range(0, len(images), batch_size):
            transform(images[start : start + batch_size], labels[start : start + batch_size])

    return run


def each(operation: Operation, images: Sequence[Any]) -> Callable[[], None]:
    """Return a loop that applies an operation to each image, on one core."""

    def run() -> None:
        for image in images:
            operation(image)

    return run


def each_with_magnitude(name: str, images: Sequence[Any], magnitudes: Sequence[float]) -> Callable[[], None]:
    """Return a loop that applies one of AutoAugment's operations to each image, on one core."""

    def run() -> None:
        for image, magnitude in zip(images, magnitudes, strict=True):
            _apply_op(image, name, magnitude, transforms.InterpolationMode.NEAREST, None)

    return run
