"""The floor of a training step: PyTorch's own count, arithmetic by hand."""

from __future__ import annotations

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


def test_peaks_are_measured_where_no_data_sheet_is_known() -> None:
    peaks = floor.find_peaks(CPU, side=64, copied_bytes=2**20)
    assert set(peaks.flops) == {"fp32", "bf16"}
    assert min(*peaks.flops.values(), peaks.bandwidth) > 0
    assert peaks.source.startswith("measured")
