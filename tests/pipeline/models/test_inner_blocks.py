"""The fused inner block on the CPU against PyTorch's own modules, and how it is chosen, compiled and refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import UsageError
from pipeline.models.students import STUDENTS, build_student, use_inner_block
from pipeline.models.students.fused import inner as inner_cpp
from pipeline.models.students.fused.interface import InnerWeights
from pipeline.models.students.layers import EncoderBlock
from pipeline.models.students.tnt import inner_weights
from pipeline.system import compiling
from tests.whole import test_golden

CPU = torch.device("cpu")
GEOMETRIES = [(16, 12, 2, 4), (4, 8, 2, 2), (9, 10, 5, 3), (16, 24, 1, 4)]
"""Pixel tokens M, width c, heads, MLP ratio."""
# Of the largest value, against float64. PyTorch's float32 modules differ from it by up to 4e-6 themselves.
TOLERANCE = 4e-6


@pytest.fixture(autouse=True)
def _needs_a_compiler(request: pytest.FixtureRequest) -> None:
    if "no_compiler" not in request.keywords and (why_not := inner_cpp.why_not(16, 12, 2, 48)) is not None:
        pytest.skip(why_not)


def modules(width: int, heads: int, ratio: int) -> tuple[EncoderBlock, nn.LayerNorm]:
    """An inner block and its LayerNorm, every parameter random."""
    torch.manual_seed(0)
    block, norm = EncoderBlock(width=width, num_heads=heads, mlp_ratio=ratio), nn.LayerNorm(width)
    with torch.no_grad():
        for parameter in [*block.parameters(), *norm.parameters()]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block, norm


def plain(pixels: Tensor, block: EncoderBlock, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    refined = block(pixels)
    return refined, norm(refined)


def error(ours: Tensor, expected: Tensor) -> float:
    ours, expected = ours.detach().double(), expected.detach().double()
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("number", [1, 16, 37])
@pytest.mark.parametrize(("num_pixels", "width", "heads", "ratio"), GEOMETRIES)
def test_results_and_gradients_are_those_of_the_modules(
    num_pixels: int, width: int, heads: int, ratio: int, number: int
) -> None:
    block, norm = modules(width, heads, ratio)
    exact_block, exact_norm = copy.deepcopy(block).double(), copy.deepcopy(norm).double()
    pixels = torch.randn(number, num_pixels, width, requires_grad=True)
    exact_pixels = pixels.detach().double().requires_grad_()
    weights, exact_weights = inner_weights(block, norm), inner_weights(exact_block, exact_norm)
    outputs = inner_cpp.inner_block(pixels, weights, heads)
    expected = plain(exact_pixels, exact_block, exact_norm)
    directions = [torch.randn(number, num_pixels, width) for _ in outputs]
    gradients = torch.autograd.grad(outputs, [pixels, *weights], directions)
    exact = torch.autograd.grad(
        expected, [exact_pixels, *exact_weights], [direction.double() for direction in directions]
    )
    for ours, theirs in zip([*outputs, *gradients], [*expected, *exact], strict=True):
        assert ours.shape == theirs.shape
        assert error(ours, theirs) < TOLERANCE


def test_a_result_that_nobody_uses_has_no_gradient_to_give() -> None:
    block, norm = modules(12, 2, 4)
    pixels = torch.randn(5, 16, 12, requires_grad=True)
    _, normed = inner_cpp.inner_block(pixels, inner_weights(block, norm), 2)
    [gradient] = torch.autograd.grad(normed.square().sum(), pixels)
    [expected] = torch.autograd.grad(plain(pixels, block, norm)[1].square().sum(), pixels)
    assert error(gradient, expected) < 10 * TOLERANCE


def test_a_pixel_that_is_not_finite_spoils_its_own_patch_alone() -> None:
    block, norm = modules(12, 2, 4)
    pixels = torch.randn(20, 16, 12)
    clean, _ = inner_cpp.inner_block(pixels, inner_weights(block, norm), 2)
    pixels[7, 3, 2] = float("nan")
    refined, normed = inner_cpp.inner_block(pixels, inner_weights(block, norm), 2)
    others = [patch for patch in range(20) if patch != 7]
    assert refined[7].isnan().all() and normed[7].isnan().all()
    assert torch.equal(refined[others], clean[others])


def test_large_activations_stay_exact() -> None:
    block, norm = modules(12, 2, 4)
    with torch.no_grad():
        block.attention.queries_keys_values.weight.mul_(20)
        block.mlp[0].weight.mul_(20)  # type: ignore[operator]
    pixels = torch.randn(16, 16, 12) * 100
    expected = plain(pixels.double(), copy.deepcopy(block).double(), copy.deepcopy(norm).double())
    for ours, theirs in zip(inner_cpp.inner_block(pixels, inner_weights(block, norm), 2), expected, strict=True):
        assert error(ours, theirs) < 10 * TOLERANCE


def test_threads_change_sums_of_gradients_by_rounding_only() -> None:
    block, norm = modules(12, 2, 4)
    pixels = torch.randn(100, 16, 12)
    by_threads = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = inner_cpp.inner_block(pixels, inner_weights(block, norm), 2)
        by_threads.append((*results, *torch.autograd.grad(results[1].sum() + results[0].square().sum(), list(
            inner_weights(block, norm)))))  # fmt: skip
    torch.set_num_threads(1)
    for other in by_threads[1:]:
        assert torch.equal(other[0], by_threads[0][0])
        assert all(error(ours, first) < TOLERANCE for ours, first in zip(other, by_threads[0], strict=True))


@pytest.mark.parametrize("name", ["tnt", "titn"])
def test_a_fused_student_has_the_golden_losses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: str, **geometry: int) -> nn.Module:
        student = build_student(*arguments, **geometry)
        assert use_inner_block(student, "fused", CPU) == "c++"
        return student

    monkeypatch.setattr(test_golden, "build_student", build)
    test_golden.check(name)


def test_autocast_leaves_the_inner_block_in_float32() -> None:
    student = build_student("titn", num_classes=10, depth=2)
    images = torch.randn(3, 3, 32, 32)
    embedded = student.embedding(images)
    block = student.blocks[0]
    use_inner_block(student, "fused", CPU)
    fused = block._refine(embedded, plain=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours in (block._refine(embedded, plain=False), block._refine(embedded, plain=True)):
            assert all(tensor.dtype == torch.float32 for tensor in ours)
            assert error(ours[1], fused[1]) < TOLERANCE


@pytest.mark.parametrize("name", STUDENTS)
def test_tokens_that_no_head_reads_may_be_left_out(name: str) -> None:
    torch.manual_seed(0)
    student = build_student(name, num_classes=10, depth=2)
    images = torch.randn(3, 3, 32, 32)
    by_mode = []
    for student.plain in (True, False):
        student.zero_grad()
        outputs = student(images)
        heads = outputs if student.has_distillation_head else (outputs,)
        sum(head.square().sum() for head in heads).backward()
        by_mode.append([*heads, *(parameter.grad.clone() for parameter in student.parameters())])
    for whole, trimmed in zip(*by_mode, strict=True):
        assert error(trimmed, whole) < TOLERANCE


def test_stochastic_depth_is_the_same_with_a_fused_inner_block() -> None:
    torch.manual_seed(0)
    student = build_student("titn", num_classes=10, depth=3, drop_path=0.5).train()
    images, draws = torch.randn(6, 3, 32, 32), torch.rand(6, student.num_draws)
    by_block = []
    for request in ("plain", "fused"):
        use_inner_block(student, request, CPU)
        student.zero_grad()
        outputs = student(images, draws)
        sum(head.square().sum() for head in outputs).backward()
        by_block.append([*outputs, *(parameter.grad.clone() for parameter in student.parameters())])
    for ours, expected in zip(*by_block, strict=True):
        assert error(ours, expected) < TOLERANCE


def test_what_runs_is_told() -> None:
    titn, vit = build_student("titn", num_classes=3), build_student("vit", num_classes=3)
    assert use_inner_block(titn, "auto", CPU) == use_inner_block(titn, "fused", CPU) == "c++"
    assert all(block.fused is not None for block in titn.blocks)
    assert use_inner_block(titn, "plain", CPU) == "plain"
    assert all(block.fused is None for block in titn.blocks)
    assert use_inner_block(vit, "auto", CPU) == use_inner_block(vit, "plain", CPU) == "none"
    with pytest.raises(UsageError, match="fused is not available here: the student has no inner blocks"):
        use_inner_block(vit, "fused", CPU)
    if not torch.cuda.is_available():
        assert use_inner_block(titn, "auto", torch.device("cuda")) == "plain (there is no GPU)"
    meta = torch.device("meta")
    assert use_inner_block(titn, "auto", meta) == "plain (there is none for meta)"
    with pytest.raises(UsageError, match="there is none for meta; use auto or plain"):
        use_inner_block(titn, "fused", meta)


@pytest.mark.no_compiler
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no-such-compiler does not run"),
        ("false", "false does not run"),
        (None, "C\\+\\+ compiler"),
    ],
)
def test_without_a_compiler_plain_is_chosen_and_fused_refused(
    compiler: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(inner_cpp, "_library", inner_cpp._library.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if compiler is None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        monkeypatch.setenv("CXX", compiler)
    student = build_student("titn", num_classes=3)
    with pytest.raises(UsageError, match=reason):
        use_inner_block(student, "fused", CPU)
    chosen = use_inner_block(student, "auto", CPU)
    assert chosen.startswith("plain (")
    student(torch.zeros(1, 3, 32, 32))


CHOOSE = """
import torch
from pipeline.models.students import build_student, use_inner_block
print(use_inner_block(build_student("titn", num_classes=3), "auto", torch.device("cpu")))
"""


@pytest.mark.slow
def test_a_library_is_compiled_once_and_a_compiler_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {" ".join(compiling._compiler())} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    together = [subprocess.Popen([sys.executable, "-c", CHOOSE], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in together] == ["c++", "c++"]
    compiled = calls.read_text().count(" -o ")
    assert compiled in (1, 2)
    monkeypatch.setattr(inner_cpp, "_library", inner_cpp._library.__wrapped__)
    titn = build_student("titn", num_classes=3)
    [compiled_library] = (tmp_path / "cache" / "titn-pipeline").glob("*.so")
    assert use_inner_block(titn, "auto", CPU) == "c++"
    assert calls.read_text().count(" -o ") == compiled
    compiled_library.unlink()
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "it: error: broken" >&2\nexit 1\n')
    assert use_inner_block(titn, "auto", CPU) == f"plain ({compiler} fails: it: error: broken)"


@pytest.mark.slow
def test_torch_compile_takes_it_as_it_is() -> None:
    student = build_student("titn", num_classes=3, depth=2)
    images = torch.randn(2, 3, 32, 32)
    expected = student(images)[0]
    use_inner_block(student, "fused", CPU)
    compiled = torch.compile(student)
    compiled_tokens = compiled(images)[0]
    assert error(compiled_tokens, expected) < 10 * TOLERANCE
    compiled_tokens.sum().backward()
    assert all(parameter.grad is not None for parameter in student.blocks[0].inner.parameters())


def test_the_weights_are_all_there() -> None:
    block, norm = modules(12, 2, 4)
    weights = inner_weights(block, norm)
    assert len(weights) == len(InnerWeights._fields)
    assert {id(weight) for weight in weights} == {
        id(parameter) for parameter in [*block.parameters(), *norm.parameters()]
    }
