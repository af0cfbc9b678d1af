"""The operations that AutoAugment, RandAugment and TrivialAugment choose from, on whole uint8 batches.

Results equal torchvision's on PIL images bit for bit. Samples are sorted by operation, so that each operation sees one
slice of the batch. Magnitudes are per-sample arguments; the index maps of the geometric operations are made once for an
image size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.views import colour as imageops
from pipeline.views import geometry
from pipeline.views.parcel import Parcel

# Each takes images and the magnitude of each sample, `(B,)` float64.
COLOUR_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": lambda images, magnitudes: imageops.brightness(images, 1.0 + magnitudes),
    "Color": lambda images, magnitudes: imageops.color(images, 1.0 + magnitudes),
    "Contrast": lambda images, magnitudes: imageops.contrast(images, 1.0 + magnitudes),
    "Sharpness": lambda images, magnitudes: imageops.sharpness(images, 1.0 + magnitudes),
    "Posterize": imageops.posterize,
    "Solarize": imageops.solarize,
    "AutoContrast": lambda images, _: imageops.autocontrast(images),
    "Equalize": lambda images, _: imageops.equalize(images),
    "Invert": lambda images, _: imageops.invert(images),
    "SolarizeAdd": imageops.solarize_add,
}
GEOMETRIC_OPERATIONS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
UNSIGNED_OPERATIONS = ("Posterize", "Solarize", "AutoContrast", "Equalize", "Invert", "SolarizeAdd")
# per_image.cpp has the same, in this order; where it lacks one, pipeline.views.guard finds other pixels.
OPERATIONS = (*GEOMETRIC_OPERATIONS, *COLOUR_OPERATIONS)
WITHOUT_MAGNITUDE = ("Identity", "AutoContrast", "Equalize", "Invert")
# What RandAugment and TrivialAugment draw from, evenly; in torchvision's order.
EVENLY_DRAWN = ("Identity", *(name for name in OPERATIONS if name not in ("Invert", "SolarizeAdd")))
NO_OPERATION = -1
TRANSLATIONS = tuple(OPERATIONS.index(name) for name in ("TranslateX", "TranslateY"))
# Index maps of more bytes are made for each batch instead of being kept.
MAX_KEPT_BYTES = 2**26


class Space(NamedTuple):
    """How strong each operation can be.

    Attributes:
        num_bins: Magnitudes, evenly apart from none to the largest.
        shear: Largest tangent.
        translation: Maps the side of the images along the translation to the largest translation, both in pixels.
        rotation: Largest angle, degrees.
        factor: Largest change of the factor of Brightness, Color, Contrast and Sharpness.
        bits: Most bits that Posterize takes away.
    """

    num_bins: int
    shear: float
    translation: Callable[[int], float]
    rotation: float
    factor: float
    bits: int


def magnitude(space: Space, operation: str, magnitude_bin: int, height: int, width: int) -> float:
    """Look up the positive magnitude of an operation.

    Args:
        space: The magnitudes.
        operation: One of OPERATIONS, or Identity.
        magnitude_bin: Bin in [0, num_bins); ignored where the operation has no magnitude.
        height: H, pixels.
        width: W, pixels.

    Returns:
        Tangents (shears), pixels (translations, not rounded), degrees (rotation), changes of a factor
        (brightness, color, contrast, sharpness), kept bits (posterize), a level (solarize), or 0 without a
        magnitude.

    Source: torchvision's `_augmentation_space` of AutoAugment, RandAugment and TrivialAugmentWide, whose bins are a
        float32 linspace.
    Differs: torch.linspace's last bit varies with the CPU (fused multiply-add or not); this one's does not, and is
        that of x86 with AVX2. It shows in TrivialAugment's translation of bin 15: 15 pixels, and 16 without AVX2.
    """
    if operation in WITHOUT_MAGNITUDE:
        return 0.0
    last = space.num_bins - 1
    if operation == "Posterize":
        return 8.0 - round(magnitude_bin / (last / space.bits))
    low, high = {
        "ShearX": (0.0, space.shear),
        "ShearY": (0.0, space.shear),
        "TranslateX": (0.0, space.translation(width)),
        "TranslateY": (0.0, space.translation(height)),
        "Rotate": (0.0, space.rotation),
        "Solarize": (255.0, 0.0),
    }.get(operation, (0.0, space.factor))
    start, end = np.float32(low), np.float32(high)
    step = float((end - start) / np.float32(last))
    # As torch.linspace: from the nearer end, rounded once.
    if magnitude_bin < space.num_bins // 2:
        return float(np.float32(float(start) + step * magnitude_bin))
    return float(np.float32(float(end) - step * (last - magnitude_bin)))


def timm_magnitude(operation: str, level: int, height: int, width: int) -> float:
    """Look up the positive magnitude of an operation at one of timm's levels; see `magnitude`.

    Args:
        operation: One of OPERATIONS; SolarizeAdd has the levels that are added below 128.
        level: In [0, 10].
        height: H, pixels.
        width: W, pixels.

    Source: timm.data.auto_augment, the `..._level_to_arg` of `_RAND_INCREASING_TRANSFORMS`, in float64.
    """
    share = level / 10.0
    return {
        "ShearX": share * 0.3,
        "ShearY": share * 0.3,
        "TranslateX": share * 0.45 * width,
        "TranslateY": share * 0.45 * height,
        "Rotate": share * 30.0,
        "Posterize": 4.0 - int(share * 4),
        "Solarize": 256.0 - min(256, int(share * 256)),
        "SolarizeAdd": float(min(128, int(share * 110))),
        **dict.fromkeys(WITHOUT_MAGNITUDE, 0.0),
    }.get(operation, share * 0.9)


Magnitude = Callable[[str, int, int, int], float]
"""Returns the positive magnitude of an operation at a bin, for images of a height and a width; as `magnitude` does."""


@dataclass(frozen=True, eq=False)
class OperationTable:
    """All operations of a policy on images of H x W pixels: I rows with signed magnitudes, geometric ones first.

    Attributes:
        height: H.
        width: W.
        rows: `(E, 2)` int64: for each entry of the policy, its rows in [0, I) with the positive and the negative
            magnitude; NO_OPERATION for Identity.
        operations: `(I,)` int64, ascending, indices into OPERATIONS.
        magnitudes: `(I,)` float64, in the units of `magnitude`.
        matrices: `(G, 6)` float64, of the G geometric operations.
    """

    height: int
    width: int
    rows: NDArray[np.int64]
    operations: NDArray[np.int64]
    magnitudes: NDArray[np.float64]
    matrices: NDArray[np.float64]


def tabulate(
    magnitude: Magnitude, entries: Sequence[tuple[str, int]], height: int, width: int, *, whole_pixels: bool = True
) -> OperationTable:
    """Tabulate the operations of a policy.

    Args:
        magnitude: The magnitudes.
        entries: E pairs of operation and magnitude bin; see `magnitude`.
        height: H, pixels.
        width: W, pixels.
        whole_pixels: Whether translations are cut to whole pixels, as by torchvision.
    """
    signed: list[tuple[int, float]] = []
    for name, magnitude_bin in entries:
        value = magnitude(name, magnitude_bin, height, width)
        # No level is as high as timm's weakest threshold.
        is_none = name == "Identity" or (name == "Solarize" and value > 255)
        number = NO_OPERATION if is_none else OPERATIONS.index(name)
        signed += [(number, value), (number, value if name in UNSIGNED_OPERATIONS else -value)]
    instances = sorted({instance for instance in signed if instance[0] != NO_OPERATION})
    row_of = {instance: row for row, instance in enumerate(instances)}
    matrices = [
        _matrix(OPERATIONS[number], int(value) if whole_pixels and number in TRANSLATIONS else value, height, width)
        for number, value in instances
        if OPERATIONS[number] in GEOMETRIC_OPERATIONS
    ]
    return OperationTable(
        height,
        width,
        rows=np.array([row_of.get(instance, NO_OPERATION) for instance in signed]).reshape(-1, 2),
        operations=np.array([number for number, _ in instances]),
        magnitudes=np.array([value for _, value in instances]),
        matrices=np.concatenate(matrices),
    )


class OperationChoice(NamedTuple):
    """The operations chosen for each of B images.

    Attributes:
        table: The operations of the policy.
        rows: `(B, P)` int64, rows of the table in the order of application; NO_OPERATION for none.
    """

    table: OperationTable
    rows: NDArray[np.int64]

    @property
    def operations(self) -> NDArray[np.int64]:
        """`(B, P)` int64, indices into OPERATIONS; NO_OPERATION where none is applied."""
        return np.where(self.rows == NO_OPERATION, NO_OPERATION, self.table.operations[self.rows])

    @property
    def magnitudes(self) -> NDArray[np.float64]:
        """`(B, P)` float64 with sign, in the units of `magnitude`; 0 where no operation is applied."""
        return np.where(self.rows == NO_OPERATION, 0.0, self.table.magnitudes[self.rows])


def apply(images: Tensor, choice: OperationChoice) -> Tensor:
    """Apply to each image the operations chosen for it.

    Args:
        images: `(B, 3, H, W)` uint8.
        choice: For these B images of H x W pixels.

    Returns:
        `(B, 3, H, W)` uint8; pixels from outside of the frame are black.

    Source: torchvision's `_apply_op` of PIL images, nearest neighbour, fill None.
    """
    parcel = Parcel(images.device)
    work = plan(choice, parcel)
    parcel.send()
    return work(images)


def plan(choice: OperationChoice, parcel: Parcel) -> Callable[[Tensor], Tensor]:
    """Prepare what `apply` does; the images can be given when the parcel has been sent."""
    order, steps = np.arange(len(choice.rows)), []
    for place in range(choice.rows.shape[1]):
        resorted = np.argsort(choice.rows[order, place], kind="stable")
        order = order[resorted]
        steps += [_plan_take(resorted, parcel), _plan_sorted(choice.table, choice.rows[order, place], parcel)]
    steps.append(_plan_take(np.argsort(order), parcel))

    def work(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images

    return work


def _plan_sorted(table: OperationTable, rows: NDArray[np.int64], parcel: Parcel) -> Callable[[Tensor], Tensor]:
    """Prepare to apply to each image its own row of the table, in place; `rows` ascends."""
    firsts = np.searchsorted(table.operations, np.arange(len(OPERATIONS) + 1))
    bounds = np.searchsorted(rows, firsts)
    geometric, move = slice(bounds[0], bounds[len(GEOMETRIC_OPERATIONS)]), None
    if geometric.start < geometric.stop:
        # Index maps carry the magnitude, so that all geometric operations are one group.
        move = _plan_moves(table, rows[geometric], parcel)
    groups = []
    for number, name in enumerate(OPERATIONS[len(GEOMETRIC_OPERATIONS) :], start=len(GEOMETRIC_OPERATIONS)):
        group = slice(bounds[number], bounds[number + 1])
        if group.start < group.stop:
            groups.append((name, group, parcel.add(table.magnitudes[rows[group]])))

    def work(images: Tensor) -> Tensor:
        if move is not None:
            move(images[geometric])
        for name, group, magnitudes in groups:
            images[group] = COLOUR_OPERATIONS[name](images[group], magnitudes())
        return images

    return work


def _plan_take(order: NDArray[np.int64], parcel: Parcel) -> Callable[[Tensor], Tensor]:
    """Prepare to reorder images."""
    rows = parcel.add(order)
    return lambda images: images.index_select(0, rows())


def _plan_moves(table: OperationTable, rows: NDArray[np.int64], parcel: Parcel) -> Callable[[Tensor], None]:
    """Prepare some geometric operations on images, in place; `rows` ascends."""
    if len(table.matrices) * table.height * table.width * 8 > MAX_KEPT_BYTES:
        maps = geometry.plan_index_maps(table.matrices[rows], table.height, table.width, parcel)
    elif parcel.device.type == "cpu":
        # Images of one row share a map, which is not copied for each.
        firsts = np.flatnonzero(np.diff(rows, prepend=-1)).tolist()
        runs = [
            (slice(first, last), int(rows[first])) for first, last in zip(firsts, [*firsts[1:], len(rows)], strict=True)
        ]

        def move_runs(images: Tensor) -> None:
            kept = _kept_maps(table, parcel.device)
            for run, row in runs:
                images[run] = geometry.gather(images[run], kept[row : row + 1])

        return move_runs
    else:
        later = parcel.add(rows)

        def maps() -> Tensor:
            return _kept_maps(table, parcel.device).index_select(0, later())

    def move(images: Tensor) -> None:
        images[:] = geometry.gather(images, maps())

    return move


@functools.lru_cache(maxsize=8)
def _kept_maps(table: OperationTable, device: torch.device) -> Tensor:
    """Return index maps of all geometric operations of a table, `(G, H, W)` int64."""
    return geometry.index_maps(table.matrices, table.height, table.width, device)


def _matrix(operation: str, signed_magnitude: float, height: int, width: int) -> NDArray[np.float64]:
    """Return the matrix `(1, 6)` of one geometric operation; shears keep the corner (0, 0), the others the centre."""
    if operation == "Rotate":
        return geometry.rotation_matrices(np.array([signed_magnitude]), height, width)
    along_x = operation.endswith("X")
    if operation.startswith("Translate"):
        return np.array([[1.0, 0.0, -signed_magnitude * along_x, 0.0, 1.0, -signed_magnitude * (not along_x)]])
    degrees = math.degrees(math.atan(signed_magnitude))
    shear = np.array([[degrees, 0.0] if along_x else [0.0, degrees]])
    return geometry.affine_matrices(np.zeros((1, 2), dtype=np.int64), np.ones(1), shear, (0.0, 0.0))
