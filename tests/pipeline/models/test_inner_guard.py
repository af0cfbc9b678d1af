"""The guard of the fused inner block: what it lets through, what it refuses, and what it leaves alone."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.inference.classifier import Classifier
from pipeline.models.students import FUSED, Student, build_student, use_inner_block
from pipeline.models.students.fused import cuda as inner_triton
from pipeline.models.students.fused import guard
from pipeline.models.students.fused.guard import Errors, compare_inner
from pipeline.models.students.fused.interface import InnerBlock, InnerWeights
from pipeline.system.runtime import Ranks
from pipeline.training.distributed import ALONE, Group
from stages.shared.options import tell_plain

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def by_formula(pixels: Tensor, weights: InnerWeights, num_heads: int) -> tuple[Tensor, Tensor]:
    """A right inner block that is none of the modules'."""
    number, num_pixels, width = pixels.shape
    inputs = F.layer_norm(pixels, (width,), weights.attention_norm_weight, weights.attention_norm_bias)
    projected = F.linear(inputs, weights.queries_keys_values_weight)
    split = projected.reshape(number, num_pixels, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4)
    queries, keys, values = split
    shares = (queries @ keys.transpose(2, 3) / math.sqrt(width // num_heads)).softmax(3)
    mixed = (shares @ values).transpose(1, 2).reshape(pixels.shape)
    pixels = pixels + F.linear(mixed, weights.projection_weight, weights.projection_bias)
    inputs = F.layer_norm(pixels, (width,), weights.mlp_norm_weight, weights.mlp_norm_bias)
    hidden = F.gelu(F.linear(inputs, weights.hidden_weight, weights.hidden_bias))
    pixels = pixels + F.linear(hidden, weights.output_weight, weights.output_bias)
    return pixels, F.layer_norm(pixels, (width,), weights.pixel_norm_weight, weights.pixel_norm_bias)


class Wrong(torch.autograd.Function):
    """Does nothing, but its gradient is a thousandth too large."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 1.001


def wrong_gradient(name: str) -> InnerBlock:
    def inner_block(pixels: Tensor, weights: InnerWeights, num_heads: int) -> tuple[Tensor, Tensor]:
        wrong: Tensor = Wrong.apply(getattr(weights, name))  # type: ignore[no-untyped-call]
        return by_formula(pixels, weights._replace(**{name: wrong}), num_heads)

    return inner_block


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    return build_student("titn", num_classes=3, depth=1)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[InnerBlock], None]:
    """Puts an inner block in the place of the compiled one."""

    def put(inner_block: InnerBlock) -> None:
        module = SimpleNamespace(
            why_not=lambda *_: None, num_checked=lambda *_: 5, explain=inner_triton.explain, inner_block=inner_block
        )
        monkeypatch.setitem(FUSED, "cpu", ("c++", module))

    monkeypatch.setattr(guard, "_verdicts", {})
    return put


def test_the_bound_is_four_times_the_plain_error_and_a_little() -> None:
    assert Errors(4e-3 + 1e-6, 1e-3).are_alike and not Errors(4.01e-3, 1e-3).are_alike
    assert Errors(1e-6, 0.0).are_alike and not Errors(1.1e-6, 0.0).are_alike
    assert not Errors(math.nan, 1.0).are_alike and not Errors(1.0, math.nan).are_alike
    exact = [torch.tensor([1.0, -2.0]).double(), torch.tensor([8.0]).double()]
    assert guard._error([torch.tensor([1.0, -1.5]), torch.tensor([9.0])], exact) == 0.25
    assert math.isnan(guard._error([torch.tensor([1.0, -2.0]), torch.tensor([math.nan])], exact))


def test_products_in_tf32_have_ten_bits_of_fraction_forward_and_backward() -> None:
    kept, lost = 1 + 2**-10, 2**-11
    factor = torch.full((1, 1, 1), kept + lost, requires_grad=True)
    weight = torch.full((1, 1), -(kept + lost), requires_grad=True)
    with guard._tf32():
        products = [F.linear(factor, weight), factor @ factor.mT, F.linear(factor[0], weight, torch.tensor([lost]))]
        gradients = torch.autograd.grad(sum(product.sum() for product in products), [factor, weight])
    assert [float(product.detach()) for product in products] == pytest.approx(
        [-(kept**2), kept**2, lost - kept**2], abs=1e-7
    )
    assert [float(gradient) for gradient in gradients] == pytest.approx([0.0, 2 * kept], abs=1e-7)
    assert float((factor @ factor.mT).detach()) == pytest.approx((kept + lost) ** 2, abs=1e-7)


def test_a_block_that_is_right_may_run(student: Student, stand_in: Callable[[InnerBlock], None]) -> None:
    stand_in(by_formula)
    assert use_inner_block(student, "fused", CPU) == "c++"
    assert student.blocks[0].fused is by_formula  # type: ignore[index, union-attr]
    compared = compare_inner(by_formula, student.blocks[0], CPU, precision="fp32", training=True, num_patches=5)  # type: ignore[index, arg-type]
    assert list(compared) == ["results", "gradients"]
    assert all(0 < errors.fused < 1e-5 and 0 < errors.plain < 1e-5 for errors in compared.values())


@pytest.mark.parametrize("name", InnerWeights._fields)
def test_one_wrong_gradient_is_told_with_both_errors_and_refused_by_name(
    name: str, student: Student, stand_in: Callable[[InnerBlock], None]
) -> None:
    stand_in(wrong_gradient(name))
    chosen = use_inner_block(student, "auto", CPU)
    assert chosen.startswith("plain (the error of its gradients is 1.0e-03, and ")
    assert chosen.endswith("e-07 of the plain block)")
    assert student.blocks[0].fused is None  # type: ignore[index, union-attr]
    with pytest.raises(UsageError, match="fused is not available here: the error of its gradients is 1.0e-03"):
        use_inner_block(student, "fused", CPU)
    assert use_inner_block(student, "auto", CPU, training=False) == "c++", "nobody will ask for a gradient"


def test_a_wrong_result_is_refused_without_gradients_too(
    student: Student, stand_in: Callable[[InnerBlock], None]
) -> None:
    def wrong(pixels: Tensor, weights: InnerWeights, num_heads: int) -> tuple[Tensor, Tensor]:
        refined, normed = by_formula(pixels, weights, num_heads)
        normed[2, 3, 1] += 0.01 * normed.abs().max()
        return refined, normed

    stand_in(wrong)
    assert "the error of its results is 1.0e-02" in use_inner_block(student, "auto", CPU, training=False)


def test_weights_gradients_and_generators_are_left_alone(
    student: Student, stand_in: Callable[[InnerBlock], None]
) -> None:
    stand_in(by_formula)
    before = {}
    for name, parameter in student.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        before[name] = (parameter.detach().clone(), parameter.grad, parameter.grad.clone())
    generator = torch.get_rng_state()
    with torch.inference_mode():
        assert use_inner_block(student, "fused", CPU) == "c++"
    assert torch.equal(torch.get_rng_state(), generator)
    for name, parameter in student.named_parameters():
        values, gradient, copied = before[name]
        assert torch.equal(parameter, values) and parameter.requires_grad
        assert parameter.grad is gradient and torch.equal(gradient, copied)


def test_once_is_enough_for_a_process(student: Student, stand_in: Callable[[InnerBlock], None]) -> None:
    calls = []

    def counted(pixels: Tensor, weights: InnerWeights, num_heads: int) -> tuple[Tensor, Tensor]:
        calls.append(torch.is_grad_enabled())
        return by_formula(pixels, weights, num_heads)

    stand_in(counted)
    for training in (False, False, True, True, False):
        assert use_inner_block(student, "auto", CPU, training=training) == "c++"
    assert calls == [False, True]
    other = build_student("titn", num_classes=3, depth=1, pixel_width=8)
    assert use_inner_block(other, "auto", CPU) == "c++" and len(calls) == 3


def out_of_resources() -> Exception:
    errors = pytest.importorskip("triton.runtime.errors")
    error: Exception = errors.OutOfResources(114_688, 101_376, "shared memory")
    return error


FAILURES: dict[str, tuple[Callable[[], Exception], str]] = {
    "shared memory": (
        out_of_resources, "a kernel needs 114,688 bytes of shared memory, and the device has 101,376"
    ),
    "no C compiler": (
        lambda: RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nand more"),
        "Triton fails: Failed to find C compiler. Please specify via CC environment variable.",
    ),
    "a C compiler that fails": (
        lambda: subprocess.CalledProcessError(1, ["gcc", "x.c"]), "Triton's compiler fails (gcc returned 1)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_what_triton_cannot_do_here_is_told(
    name: str, student: Student, stand_in: Callable[[InnerBlock], None]
) -> None:
    pytest.importorskip("triton")
    make, reason = FAILURES[name]

    def failing(pixels: Tensor, weights: InnerWeights, num_heads: int) -> tuple[Tensor, Tensor]:
        raise make()

    stand_in(failing)
    assert use_inner_block(student, "auto", CPU) == f"plain ({reason})"
    with pytest.raises(UsageError) as raised:
        use_inner_block(student, "fused", CPU)
    assert str(raised.value) == f"inner_block: fused is not available here: {reason}; use auto or plain"


def test_an_error_that_takes_the_gpu_away_ends_the_command(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = "CUDA error: an illegal memory access was encountered"
    is_lost = True

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"{lost}\nCUDA kernel errors might be asynchronously reported")

    def synchronize(device: torch.device) -> None:
        if is_lost:
            fail()

    monkeypatch.setattr(guard, "_verdicts", {})
    monkeypatch.setattr(guard, "compare_inner", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    settings: dict[str, Any] = {"precision": "bf16", "training": True, "num_patches": 5}
    with pytest.raises(UsageError, match=rf"cannot survive \({lost}\); write inner_block: plain in the recipe"):
        guard.why_not_inner(by_formula, student.blocks[0], GPU, **settings)  # type: ignore[index, arg-type]
    is_lost = False
    assert guard.why_not_inner(by_formula, student.blocks[0], GPU, **settings) == lost  # type: ignore[index, arg-type]


def test_all_ranks_are_plain_if_one_is(
    student: Student, stand_in: Callable[[InnerBlock], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ALONE.first_reason(None) is None and ALONE.first_reason("x") == "x"
    told_by_ranks: list[str | None] = [None, "0 / 0", "x"]
    monkeypatch.setattr(Group, "gather_json", lambda group, reason: [reason, *told_by_ranks[1:]])
    assert Group(Ranks(0, 3)).first_reason(None) == "rank 1: 0 / 0"
    told_by_ranks[1:] = [None, None]
    assert Group(Ranks(0, 3)).first_reason(None) is None
    stand_in(by_formula)
    assert use_inner_block(student, "auto", CPU, agree=lambda _: "rank 1: no") == "plain (rank 1: no)"
    assert student.blocks[0].fused is None  # type: ignore[index, union-attr]
    told: list[str | None] = []
    assert use_inner_block(student, "auto", CPU, agree=told.append) == "c++"
    assert told == [None]
    with pytest.raises(UsageError, match="not available here: rank 1: no; use auto or plain"):
        use_inner_block(student, "fused", CPU, agree=lambda _: "rank 1: no")


@pytest.mark.parametrize(("runs", "told"), [("plain (no reason)", "w: inner block plain (no reason)\n"), ("c++", "")])
def test_a_command_says_why_a_loaded_model_is_plain(runs: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    tell_plain(Classifier(runner=lambda _: (), class_names=("a", "b"), image_size=8, file=Path("w"), inner_block=runs))
    assert capsys.readouterr().err == told
