"""The least time that a student's step can take: its FLOPs and bytes, counted from the geometry, over a device's peaks.

The arithmetic is in README.md. Letters: B batch, P patches, T tokens of a sequence, M pixel tokens of a patch, c pixel
width, D width, K classes, r the MLP's ratio; s bytes of a float32, a bytes of an activation.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.synthetic import NUM_CLASSES, SIZE
from pipeline.config.recipes import StudentRecipe
from pipeline.models.counting import num_parameters
from pipeline.models.students import STUDENTS, build_student
from stages.shared.runs import student_arguments

CHANNELS, MLP_RATIO = 3, 4
INNER, OUTER, ENDS, WEIGHTS = "inner", "outer", "ends", "weights"
STREAM = 4
AGAIN = "forward pass again'"
EXPONENTIAL = 15  # instructions of the C++ one
ACTIVATION = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Operation:
    """One operation of all blocks together.

    Attributes:
        path: INNER, OUTER, ENDS (embedding and heads) or WEIGHTS.
        fused_pass: Operations of the same path and name here make one pass over memory when fused.
        name: As the tables show it.
        flops: Of its matrix products; a multiply-accumulate is 2. Everything else is bound by memory and counts none.
        bytes_apart: Read and written where every operation makes a pass of its own.
        bytes_fused: Its part of what the fused pass reads and writes.
        instructions: Of the fused inner block's kernel beside its products, one for an element: additions, selections,
            exponentials. Outside the inner path none is counted.
    """

    path: str
    fused_pass: str
    name: str
    flops: float
    bytes_apart: float
    bytes_fused: float
    instructions: float = 0.0


@dataclass(frozen=True)
class Peaks:
    """What a device can do at best.

    Attributes:
        flops: Per second, by precision.
        bandwidth: Bytes a second, read and written together.
        source: Where the figures come from.
        inner_flops: Per second, of the products of the fused inner block, by the model's precision: its kernels have
            other ones than the model. None takes those of `flops`.
        instructions: That are no products, a second, one for an element.
        has_matrix_units: Whether products and other instructions run beside each other; else one after the other.
    """

    flops: dict[str, float]
    bandwidth: float
    source: str
    inner_flops: dict[str, float] | None = None
    instructions: float = math.inf
    has_matrix_units: bool = True


TF32 = 495e12
FP32 = 67e12
H200 = Peaks(
    {"bf16": 989e12, "fp32": FP32},
    4.8e12,
    "NVIDIA H200 SXM data sheet, dense; TF32 in the fused inner block alone",
    inner_flops={"bf16": TF32, "fp32": TF32 / 3},  # three tf32 products make one of float32
    instructions=FP32 / 2,  # the sheet counts a multiply-accumulate, one instruction, as 2
)
ISSUED = {"bf16": (1464, 3276), "fp32": (3038, 8260)}
"""Instructions that a warp issues for a patch, forward and backward, in the loops of the kernels as Triton 3.8 compiles
them for an H200: TITN's geometry, by the model's precision. Products are among them, 54 and 160 in tf32."""
ISSUED_GEOMETRY = (16, 12, 2)
WARP = 32


@dataclass(frozen=True)
class Floor:
    """Seconds at a device's peaks.

    Attributes:
        compute: All FLOPs.
        apart: Sum over the operations of the longer time, that of the FLOPs or that of the bytes.
        fused: The same sum over the fused passes: the floor. A pass of the inner block takes the longest of its
            products, its other instructions and its bytes; without matrix units the first two add up.
    """

    compute: float
    apart: float
    fused: float


def operations(
    recipe: StudentRecipe, *, batch_size: int, precision: str, training: bool, device_type: str = "cuda"
) -> list[Operation]:
    """Count what a student's training step or forward pass does.

    Args:
        recipe: The student's geometry.
        batch_size: B.
        precision: `fp32`, or `bf16` for autocast, which leaves sums and LayerNorms in float32.
        training: Whether backward pass and update are counted too.
        device_type: `cuda`, or `cpu`: whose fused inner block's instructions are counted.
    """
    counted = _Counter(STREAM, ACTIVATION[precision], training, device_type)
    student = STUDENTS[recipe.model]
    patches = (SIZE // recipe.patch_size) ** 2
    tokens = 1 + patches + student.has_distillation_head
    outer = batch_size * tokens * recipe.width
    image = batch_size * CHANNELS * SIZE**2
    if student.has_pixels:
        pixels = (recipe.patch_size // recipe.pixel_size) ** 2
        inner = batch_size * patches * pixels * recipe.pixel_width
        counted.embedding(image, inner, CHANNELS * recipe.pixel_size**2)
        joined = batch_size * patches * recipe.width
        for _ in range(recipe.depth):
            counted.block(INNER, inner, recipe.pixel_width, pixels)
            counted.join(inner, joined, outer, recipe.width)
            counted.instructions(inner, recipe.pixel_width, pixels, recipe.pixel_heads)
            counted.block(OUTER, outer, recipe.width, tokens)
    else:
        counted.embedding(image, batch_size * patches * recipe.width, CHANNELS * recipe.patch_size**2)
        for _ in range(recipe.depth):
            counted.block(OUTER, outer, recipe.width, tokens)
    for _ in range(1 + student.has_distillation_head):
        counted.head(batch_size, recipe.width)
    with torch.device("meta"):
        model = build_student(recipe.model, **student_arguments(recipe, num_classes=NUM_CLASSES, image_size=SIZE))
    counted.weights(num_parameters(model))
    return _merged(counted.found)


class _Counter:
    """Adds operations up. `stream` is s, `activation` is a; `cast` is what a conversion between them moves."""

    def __init__(self, stream: int, activation: int, training: bool, device_type: str) -> None:
        self.stream, self.activation, self.training = stream, activation, training
        self.device_type = device_type
        self.cast = 0 if stream == activation else stream + activation
        self.found: list[Operation] = []

    def add(self, path: str, elements: float, rows: Iterable[tuple[str, str, float, float, float]]) -> None:
        """Add rows of (fused pass, name, FLOPs, bytes apart, bytes fused), each for one element of the token tensor.

        Names that end in `'` belong to the backward pass.
        """
        for fused_pass, name, *figures in rows:
            if self.training or not name.endswith("'"):
                self.found.append(Operation(path, fused_pass, name, *(elements * figure for figure in figures)))

    def block(self, path: str, elements: float, width: int, tokens: int) -> None:
        """Add an encoder block. A fused inner block makes one pass forward and one backward."""
        s, a, cast, r = self.stream, self.activation, self.cast, MLP_RATIO
        rows = [
            ("qkv", "LayerNorm 1", 0, 2 * s + cast, s),
            ("qkv", "queries, keys, values", 6 * width, 4 * a, 3 * a),
            ("attention", "attention", 4 * tokens, 4 * a, 4 * a),
            ("projection", "projection", 2 * width, 2 * a, a),
            ("projection", "sum 1", 0, 2 * s + a, 2 * s),
            ("hidden", "LayerNorm 2", 0, 2 * s + cast, s),
            ("hidden", "into the MLP", 2 * r * width, (1 + r) * a, r * a),
            ("output", "GELU", 0, 2 * r * a, 0),
            ("output", "out of the MLP", 2 * r * width, (1 + r) * a, r * a),
            ("output", "sum 2", 0, 2 * s + a, 2 * s),
            ("output'", "sum 2'", 0, cast, s),
            ("output'", "out of the MLP'", 4 * r * width, (3 + 2 * r) * a, 2 * r * a),
            ("output'", "GELU'", 0, 3 * r * a, 0),
            ("hidden'", "into the MLP'", 4 * r * width, (2 + 3 * r) * a, r * a + s),
            ("hidden'", "LayerNorm 2'", 0, 5 * s + cast, 2 * s),
            ("projection'", "sum 1'", 0, 3 * s + cast, s),
            ("projection'", "projection'", 4 * width, 5 * a, 2 * a),
            ("attention'", "attention'", 10 * tokens, 14 * a, 8 * a),
            ("qkv'", "queries, keys, values'", 12 * width, 8 * a, 3 * a + s),
            ("qkv'", "LayerNorm 1'", 0, 5 * s + cast, 2 * s),
            ("qkv'", "sum 0'", 0, 3 * s, 0),
        ]
        if path == INNER:
            crossing = {"LayerNorm 1": s, "sum 2": s, "sum 2'": 2 * s, "LayerNorm 1'": s}
            whole = {False: "block", True: "block'"}
            rows = [(whole[row[1].endswith("'")], *row[1:4], crossing.get(row[1], 0)) for row in rows]
        self.add(path, elements, rows)

    def instructions(self, elements: float, width: int, tokens: int, heads: int) -> None:
        """Add what the fused inner block's kernel computes beside its products; the bytes are those of `block`."""
        counts = inner_instructions(self.device_type, width, tokens, heads)
        again = sum(count for name, count in counts.items() if not name.endswith("'")) - 1
        for name, count in {**counts, AGAIN: again}.items():
            if self.training or not name.endswith("'"):
                whole = "block'" if name.endswith("'") else "block"
                self.found.append(Operation(INNER, whole, name, 0, 0, 0, elements * count))

    def join(self, inner: float, joined: float, outer: float, width: int) -> None:
        """Add the LayerNorm of the pixels, their product to patches, and its sum with the patches."""
        s, a, cast = self.stream, self.activation, self.cast
        self.add(
            INNER,
            inner,
            [
                ("block", "LayerNorm of pixels", 0, 2 * s + cast, a),
                ("block'", "LayerNorm of pixels'", 0, 8 * s + cast, a),
            ],
        )
        share, padded = joined / inner, outer / inner
        self.add(
            OUTER,
            inner,
            [
                ("join", "pixels to patch", 2 * width, a * (1 + share), a),
                ("join", "sum of pixels", 0, a * (share + padded) + (2 * s + a) * padded, 2 * s * padded),
                ("join'", "sum of pixels'", 0, cast * padded + 2 * a * share, s * share),
                ("join'", "pixels to patch'", 4 * width, a * (2 + 3 * share), 2 * a),
            ],
        )

    def embedding(self, image: float, tokens: float, inputs: int) -> None:
        """Add the linear embedding of an image's parts; the image itself needs no gradient."""
        s, a, cast = self.stream, self.activation, self.cast
        share = image / tokens
        rows = [
            ("embed", "embedding", 2 * inputs, share * (2 * s + cast + a) + 2 * a + s, share * s + s),
            ("embed'", "embedding'", 2 * inputs, share * a + cast + 2 * a + s, share * s + s),
        ]
        self.add(ENDS, tokens, rows)

    def head(self, batch_size: int, width: int) -> None:
        """Add LayerNorm and product of a head, on one token of each image."""
        s, a, cast = self.stream, self.activation, self.cast
        share = NUM_CLASSES / width
        rows = [
            ("head", "head", 2 * NUM_CLASSES, 2 * s + cast + a * (1 + share), s + a * share),
            ("head'", "head'", 4 * NUM_CLASSES, 5 * s + cast + a * (2 + 3 * share), 2 * s + a * share),
        ]
        self.add(ENDS, batch_size * width, rows)

    def weights(self, num_parameters: int) -> None:
        """Add what happens to parameters: cast and read, read again, gradient, its norm, SGD with momentum."""
        s, a, cast = self.stream, self.activation, self.cast
        rows = [("weights", "weights", 0, cast + a, s), ("weights'", "weights'", 0, 2 * a + cast + 6 * s, 8 * s)]
        self.add(WEIGHTS, num_parameters, rows)


def inner_instructions(device_type: str, width: int, tokens: int, heads: int) -> dict[str, float]:
    """Count the instructions of the fused inner block's kernel beside its products, for one element of the pixels.

    Those of the formulas as pipeline/models/students/fused has them, a multiplication and an addition being one where
    they follow each other. README.md goes through them. Addresses, masks, padding, moves between threads and memory
    are left out.

    Args:
        device_type: `cuda` for the Triton kernels, `cpu` for the C++ ones.
        width: c.
        tokens: M.
        heads: Of the attention.

    Returns:
        Operation to its count. The forward pass that the backward kernel repeats is not among them.
    """
    c, r, scores = width, MLP_RATIO, heads * tokens / width
    if device_type == "cuda":
        norm, norm_gradient = 5 + 3 / c, 6 + 2 / c
        return {
            "LayerNorm 1": norm,
            "attention": 6 * scores + heads / c,
            "sum 1": 2,
            "LayerNorm 2": norm,
            "into the MLP": r,
            "GELU": 15 * r,
            "sum 2": 1,
            "LayerNorm of pixels": norm,
            "LayerNorm of pixels'": norm_gradient + 2,
            "sum 2'": 2,
            "GELU'": 3 * r,
            "LayerNorm 2'": norm_gradient,
            "sum 1'": 1,
            "attention'": 4 * scores,
            "LayerNorm 1'": norm_gradient,
            "sum 0'": 1,
        }
    norm, norm_gradient = 5 + 4 / c, 8 + 2 / c
    return {
        "LayerNorm 1": norm,
        "attention": 1 + (4 + EXPONENTIAL) * scores + heads / c,
        "sum 1": 1,
        "LayerNorm 2": norm,
        "GELU": (16 + EXPONENTIAL) * r,
        "sum 2": 1,
        "LayerNorm of pixels": norm,
        "LayerNorm of pixels'": norm_gradient,
        "out of the MLP'": 1,
        "GELU'": 3 * r,
        "into the MLP'": r,
        "LayerNorm 2'": norm_gradient,
        "projection'": 1,
        "attention'": 4 * scores,
        "LayerNorm 1'": norm_gradient,
    }


def issued_seconds(recipe: StudentRecipe, *, batch_size: int, precision: str, peaks: Peaks = H200) -> float | None:
    """Return the seconds in which an H200 issues the instructions of a training step's inner kernels, see ISSUED.

    It is what limits these kernels, products and bytes being less, where the floor is what limits any. None for another
    geometry than TITN's.
    """
    pixels = (recipe.patch_size // recipe.pixel_size) ** 2
    if (pixels, recipe.pixel_width, recipe.pixel_heads) != ISSUED_GEOMETRY or not STUDENTS[recipe.model].has_pixels:
        return None
    patches = batch_size * (SIZE // recipe.patch_size) ** 2 * recipe.depth
    return patches * sum(ISSUED[precision]) * WARP / peaks.instructions


def floor(counted: Sequence[Operation], peaks: Peaks, precision: str) -> Floor:
    """Return the seconds that counted operations take at a device's peaks."""
    rate, bandwidth = peaks.flops[precision], peaks.bandwidth
    inner_rate = (peaks.inner_flops or peaks.flops)[precision]

    def products(parts: Sequence[Operation]) -> float:
        return sum(part.flops / (inner_rate if part.path == INNER else rate) for part in parts)

    def together(parts: Sequence[Operation]) -> float:
        others = sum(part.instructions for part in parts) / peaks.instructions
        moved = sum(part.bytes_fused for part in parts) / bandwidth
        return max(moved, max(products(parts), others) if peaks.has_matrix_units else products(parts) + others)

    passes: dict[tuple[str, str], list[Operation]] = {}
    for operation in counted:
        passes.setdefault((operation.path, operation.fused_pass), []).append(operation)
    return Floor(
        compute=products(counted),
        apart=sum(max(operation.flops / rate, operation.bytes_apart / bandwidth) for operation in counted),
        fused=sum(map(together, passes.values())),
    )


def find_peaks(device: torch.device, *, side: int = 2048, copied_bytes: int = 2**30) -> Peaks:
    """Return a device's peaks: from the data sheet for an H200, else the best of a few measurements.

    Instructions are taken at half the FLOPs of float32 products, which are multiply-accumulates of the same units. A
    GPU's fused inner block has products in tf32, three of them for one in float32; a CPU's has float32 ones.

    Args:
        device: Which.
        side: Of the square matrices that are multiplied.
        copied_bytes: Size of the block that is copied.
    """
    if device.type == "cuda" and "H200" in torch.cuda.get_device_name(device):
        return H200
    flops, kinds = {}, {"fp32": torch.float32, "bf16": torch.bfloat16, "tf32": torch.float32}
    for kind, dtype in kinds.items():
        if kind != "tf32" or device.type == "cuda":
            matrix = torch.ones(side, side, device=device, dtype=dtype)
            with _float32_products("high" if kind == "tf32" else "highest"):
                flops[kind] = 2 * side**3 / _best_seconds(matrix, matrix, product=True)
    tf32 = flops.pop("tf32", None)
    inner = {"fp32": flops["fp32"] if tf32 is None else tf32 / 3, "bf16": tf32 or flops["fp32"]}
    original, copy = torch.ones(2, copied_bytes // 4, device=device).unbind()
    bandwidth = 2 * copied_bytes / _best_seconds(copy, original, product=False)
    source = f"measured: products of {side}x{side} matrices, a copy of {copied_bytes} bytes"
    return Peaks(flops, bandwidth, source, inner, flops["fp32"] / 2, has_matrix_units=tf32 is not None)


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """Let PyTorch multiply float32 so within the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _best_seconds(target: torch.Tensor, source: torch.Tensor, *, product: bool, times: int = 5) -> float:
    """Return the shortest time of a product of two matrices, or of a copy."""
    best = float("inf")
    for number in range(times + 1):
        began = time.perf_counter()
        _ = target @ source if product else target.copy_(source)
        if target.is_cuda:
            torch.cuda.synchronize(target.device)
        if number:
            best = min(best, time.perf_counter() - began)
    return best


def _merged(unmerged: Iterable[Operation]) -> list[Operation]:
    """Add up the operations of the same name, in the order in which they first occur."""
    by_name: dict[tuple[str, str, str], list[Operation]] = {}
    for operation in unmerged:
        by_name.setdefault((operation.path, operation.fused_pass, operation.name), []).append(operation)
    return [
        Operation(
            *key,
            flops=sum(part.flops for part in parts),
            bytes_apart=sum(part.bytes_apart for part in parts),
            bytes_fused=sum(part.bytes_fused for part in parts),
            instructions=sum(part.instructions for part in parts),
        )
        for key, parts in by_name.items()
    ]
