"""The floor of a training step: PyTorch's own count, arithmetic by hand."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floor, steps
from benchmarks.floor import INNER, OUTER, Operation, Peaks
from benchmarks.student_contenders import FORWARD, TRAINING, Contender, recipe, turn
from pipeline.models.students import STUDENTS, Student

CPU = torch.device("cpu")


@pytest.mark.parametrize("operation", [TRAINING, FORWARD])
@pytest.mark.parametrize("student", STUDENTS)
def test_flops_are_those_that_pytorch_counts(student: str, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Student, "plain", True)
    run = turn(Contender(student, "fp32"), steps.synthetic_batch(2, CPU), operation, student=student, depth=2)
    # Attention runs as matrix products: PyTorch's count of fused attention differs between releases.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    counted = floor.operations(recipe(student, 2), batch_size=2, precision="fp32", training=operation == TRAINING)
    # Fused attention keeps no scores: its backward pass repeats the first of the two products.
    repeated = sum(part.flops for part in counted if part.name == "attention") / 2 if operation == TRAINING else 0
    assert sum(part.flops for part in counted) == counter.get_total_flops() + repeated


@pytest.mark.parametrize(("precision", "activation"), [("fp32", 4), ("bf16", 2)])
def test_bytes_are_those_of_the_arithmetic_by_hand(precision: str, activation: int) -> None:
    counted = floor.operations(recipe("titn", 1), batch_size=3, precision=precision, training=True)
    by_name = {(part.path, part.name): part for part in counted}
    pixels, tokens = 3 * 16 * 16 * 12, 3 * 18 * 192
    attention = by_name[INNER, "attention"]
    assert attention.flops == 3 * 16 * 2 * (2 * 16 * 6 * 16 + 2 * 16 * 16 * 6)  # patches, heads, two products
    assert attention.bytes_apart == pixels * (3 + 1) * activation
    assert by_name[OUTER, "into the MLP"].flops == 2 * 3 * 18 * 192 * 768
    assert by_name[OUTER, "GELU"].bytes_apart == 2 * 4 * tokens * activation
    norm = by_name[OUTER, "LayerNorm 1"].bytes_apart
    assert norm == tokens * (8 if precision == "fp32" else 8 + 6)  # autocast's copy reads 4 bytes and writes 2
    # Forward: pixels in and out, their LayerNorm out; backward: pixels and two gradients in, one out.
    fused = sum(part.bytes_fused for part in counted if part.path == INNER)
    assert fused == pixels * (2 * 4 + activation + 4 + 4 + activation + 4)
    for key in {(part.path, part.fused_pass) for part in counted}:
        parts = [part for part in counted if (part.path, part.fused_pass) == key]
        assert sum(part.bytes_fused for part in parts) <= sum(part.bytes_apart for part in parts), key


def test_a_forward_pass_has_nothing_of_the_backward_one() -> None:
    counted = floor.operations(recipe("vit"), batch_size=1, precision="bf16", training=False)
    assert counted and not any(part.name.endswith("'") for part in counted)


def test_the_floor_is_the_longer_of_flops_and_bytes_of_each_pass() -> None:
    peaks = Peaks({"fp32": 10.0}, 5.0, "by hand")
    counted = [
        Operation(INNER, "a", "product", flops=100.0, bytes_apart=5.0, bytes_fused=5.0),
        Operation(INNER, "a", "sum", flops=0.0, bytes_apart=20.0, bytes_fused=10.0),
        Operation(OUTER, "a", "sum", flops=0.0, bytes_apart=20.0, bytes_fused=15.0),
    ]
    shortest = floor.floor(counted, peaks, "fp32")
    assert (shortest.compute, shortest.apart, shortest.fused) == (10.0, 10.0 + 4.0 + 4.0, 10.0 + 3.0)


def test_instructions_of_the_inner_block_are_those_of_the_arithmetic_by_hand() -> None:
    tokens, width, hidden, scores = 3 * 16 * 16, 12, 48, 2 * 16  # of a token: a score with each token for each head

    def count(device_type: str, *, training: bool) -> float:
        counted = floor.operations(
            recipe("titn", 1), batch_size=3, precision="bf16", training=training, device_type=device_type
        )
        assert not any(part.instructions for part in counted if part.path != INNER)
        return sum(part.instructions for part in counted)

    # Three LayerNorms; scores, and a reciprocal for each head; GELU; the biases of MLP and projection; one sum.
    triton = 3 * (5 * width + 3) + (6 * scores + 2) + 15 * hidden + (hidden + 2 * width) + width
    assert count("cuda", training=False) == pytest.approx(tokens * triton)
    # The forward pass but for a gain and a bias; the LayerNorms' gradients, with those of one gain and bias; GELU's;
    # the scores'; four sums.
    back = (triton - width) + 3 * (6 * width + 2) + 2 * width + 3 * hidden + 4 * scores + 4 * width
    assert count("cuda", training=True) == pytest.approx(tokens * (triton + back))
    # An exponential is 15 instructions, queries are scaled, LayerNorms divide, and products begin at the biases.
    c_plus_plus = 3 * (5 * width + 4) + (width + 19 * scores + 2) + 31 * hidden + 2 * width
    assert count("cpu", training=False) == pytest.approx(tokens * c_plus_plus)
    # The gradients of all gains and biases are sums here: one of the MLP's, two of width c.
    back = (c_plus_plus - width) + 3 * (8 * width + 2) + 3 * hidden + 4 * scores + (hidden + 2 * width)
    assert count("cpu", training=True) == pytest.approx(tokens * (c_plus_plus + back))


def test_an_h200_s_inner_block_takes_its_instructions_not_its_products_or_bytes() -> None:
    def inner(precision: str) -> list[Operation]:
        counted = floor.operations(recipe("titn"), batch_size=1024, precision=precision, training=True)
        return [part for part in counted if part.path == INNER]

    elements = 12 * 1024 * 16 * 16 * 12
    seconds = sum(part.instructions for part in inner("bf16")) / 33.5e12
    assert seconds == pytest.approx(elements * 244 / 33.5e12)
    assert floor.floor(inner("bf16"), floor.H200, "bf16").fused == pytest.approx(seconds)
    assert sum(part.flops for part in inner("bf16")) / 495e12 < seconds
    assert sum(part.bytes_fused for part in inner("bf16")) / 4.8e12 < seconds
    # In float32 a product is three, and those of the backward pass take a little longer than its instructions.
    products = sum(part.flops for part in inner("fp32") if part.name.endswith("'")) / (495e12 / 3)
    forward = sum(part.instructions for part in inner("fp32") if not part.name.endswith("'")) / 33.5e12
    assert floor.floor(inner("fp32"), floor.H200, "fp32").fused == pytest.approx(forward + products)
    issued = floor.issued_seconds(recipe("titn"), batch_size=1024, precision="bf16")
    assert issued == pytest.approx(1024 * 16 * 12 * (1464 + 3276) / (132 * 4 * 1.98e9), rel=2e-3)
    assert floor.issued_seconds(recipe("vit"), batch_size=1024, precision="bf16") is None


def test_without_matrix_units_products_and_other_instructions_follow_each_other() -> None:
    counted = [
        Operation(INNER, "a", "product", flops=100.0, bytes_apart=5.0, bytes_fused=5.0),
        Operation(INNER, "a", "sum", flops=0.0, bytes_apart=20.0, bytes_fused=10.0, instructions=60.0),
        Operation(OUTER, "a", "product", flops=100.0, bytes_apart=5.0, bytes_fused=5.0),
    ]
    inner = {"fp32": 20.0}
    beside = Peaks({"fp32": 10.0}, 5.0, "by hand", inner, instructions=10.0)
    assert floor.floor(counted, beside, "fp32").fused == max(5.0, 6.0, 3.0) + 10.0
    after = Peaks({"fp32": 10.0}, 5.0, "by hand", inner, instructions=10.0, has_matrix_units=False)
    assert floor.floor(counted, after, "fp32").fused == 5.0 + 6.0 + 10.0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_kernels_issue_as_many_instructions_as_their_machine_code_has(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton = pytest.importorskip("triton", minversion="3.5")
    from pipeline.models.students.fused.tiles import geometry
    from pipeline.models.students.fused.triton_backward import backward_kernel
    from pipeline.models.students.fused.triton_forward import forward_kernel
    from tests.pipeline.models.test_inner_triton import machine_code

    of = geometry(16, 12, 2, 48, {"bf16": "tf32", "fp32": "tf32x3"}[precision])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel, expected in zip((forward_kernel, backward_kernel), floor.ISSUED[precision], strict=True):
        file = tmp_path / "kernel.cubin"
        machine_code(triton, kernel, of, file)
        listing = subprocess.run([tool, "-sass", file], check=True, capture_output=True, text=True).stdout
        found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(\w+)[^;\n]*?(0x[0-9a-f]+)?\s*;", listing, re.M)
        addresses = [int(address, 16) for address, _, _ in found]
        # The loop over patches is the longest way back.
        loops = [(int(target, 16), int(address, 16)) for address, name, target in found if name == "BRA" and target]
        first, last = max(loops, key=lambda loop: loop[1] - loop[0])
        count = sum(first <= address <= last for address in addresses)
        assert count == pytest.approx(expected, rel=0.1), "another Triton schedules a little differently"


def test_peaks_are_measured_where_no_data_sheet_is_known() -> None:
    peaks = floor.find_peaks(CPU, side=64, copied_bytes=2**20)
    assert set(peaks.flops) == {"fp32", "bf16"}
    assert min(*peaks.flops.values(), peaks.bandwidth) > 0
    assert peaks.inner_flops == {"fp32": peaks.flops["fp32"], "bf16": peaks.flops["fp32"]}, "C++ multiplies in float32"
    assert peaks.instructions == peaks.flops["fp32"] / 2 and not peaks.has_matrix_units
    assert peaks.source.startswith("measured")
