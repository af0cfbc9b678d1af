"""The fused passes of outer blocks on the CPU against PyTorch's own modules, and how they are chosen and refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UsageError
from pipeline.models.students import (
    FUSED_OUTER,
    STUDENTS,
    Student,
    attention_maps,
    build_student,
    use_inner_block,
    use_outer_block,
)
from pipeline.models.students.attention import outer_blocks
from pipeline.models.students.fused import guard, outer
from pipeline.models.students.fused.guard import compare_outer
from pipeline.models.students.layers import EncoderBlock, Entering
from pipeline.system.runtime import autocast
from tests.pipeline.models.test_inner_guard import Wrong
from tests.whole import test_golden

CPU = torch.device("cpu")
LAST = slice(None, None, 8)
# Of the largest value, against float64. PyTorch's float32 modules differ from it by up to 4e-6 themselves.
TOLERANCE = 4e-6


@pytest.fixture(autouse=True)
def _needs_a_compiler(request: pytest.FixtureRequest) -> None:
    if "no_compiler" not in request.keywords and (why_not := outer.why_not(192, 3, 768)) is not None:
        pytest.skip(why_not)


def block(width: int = 32, num_heads: int = 2, mlp_ratio: int = 2, drop_path: float = 0.0) -> EncoderBlock:
    """A block whose parameters are all random; zero biases and gains of 1 would hide mistakes."""
    torch.manual_seed(0)
    made = EncoderBlock(width=width, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_path=drop_path)
    for parameter in made.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return made


def error(ours: Tensor, expected: Tensor) -> float:
    ours, expected = ours.detach().double(), expected.detach().double()
    return float((ours - expected).abs().max() / expected.abs().max())


def outcome(made: nn.Module, run: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """A result, and the gradients of inputs and parameters in a direction that is drawn from a fixed seed."""
    inputs = tuple(tensor.to(next(made.parameters()).dtype).clone().requires_grad_() for tensor in inputs)
    result = run(*inputs)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    used = [*inputs, *made.parameters()]
    return [result, *torch.autograd.grad(result, used, direction, materialize_grads=True)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("selection", [slice(None), LAST], ids=["all", "two"])
@pytest.mark.parametrize(
    ("number", "tokens", "width", "heads"), [(5, 9, 32, 2), (2, 18, 192, 3), (3, 17, 64, 1), (1, 1, 48, 3)]
)
def test_results_and_gradients_are_those_of_the_modules(
    number: int, tokens: int, width: int, heads: int, selection: slice, precision: str
) -> None:
    made = block(width, heads)
    inputs, exact_block = torch.randn(number, tokens, width), copy.deepcopy(made).double()
    exact = outcome(exact_block, lambda tokens: exact_block(tokens, selection), inputs)
    made.passes = outer.PASSES
    with autocast(CPU, precision):
        ours = outcome(made, lambda tokens: made(tokens, selection), inputs)
        plain = outcome(made, lambda tokens: made(tokens, selection, plain=True), inputs)
    for one, modules, other in zip(ours, plain, exact, strict=True):
        assert one.shape == other.shape and one.dtype == torch.float32
        assert error(one, other) < 2 * error(modules, other) + 1e-6


@pytest.mark.parametrize("first", [0, 1, 3])
def test_what_enters_is_added_to_its_own_tokens_alone(first: int) -> None:
    made = block()
    made.entering = nn.Linear(24, 32)
    exact = copy.deepcopy(made).double()
    made.passes = outer.PASSES
    tokens, inputs = torch.randn(4, 7, 32), torch.randn(4, 4, 24)

    def run(which: Any, plain: bool) -> Callable[..., Tensor]:
        return lambda tokens, inputs: which(tokens, entering=Entering(which.entering, inputs, first), plain=plain)

    ours, expected = (outcome(which, run(which, which is exact), tokens, inputs) for which in (made, exact))
    for one, other in zip(ours, expected, strict=True):
        assert error(one, other) < TOLERANCE


def test_stochastic_depth_leaves_out_what_the_modules_leave_out() -> None:
    made = block(drop_path=0.5).train()
    tokens, draws = torch.randn(4, 5, 32), torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.4, 0.4], [0.6, 0.6]])
    exact = copy.deepcopy(made).double()
    expected = outcome(exact, lambda tokens: exact(tokens, draws=draws), tokens)
    made.passes = outer.PASSES
    for one, other in zip(outcome(made, lambda tokens: made(tokens, draws=draws), tokens), expected, strict=True):
        assert error(one, other) < TOLERANCE


def test_bfloat16_is_rounded_as_pytorch_rounds() -> None:
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1e-40, 3.4e38, 65504.0, -0.0, 2**-126 * 1.3])
    values = torch.cat([values, torch.randn(39)]).reshape(1, 3, 16)
    norm = nn.LayerNorm(16)
    with autocast(CPU, "bf16"):
        _, normed = outer.residual(values, None, norm)
        assert normed.dtype == torch.bfloat16
    assert torch.equal(normed, outer.residual(values, None, norm)[1].bfloat16())
    large = torch.linspace(100, 200, 32)  # of which GELU is the identity
    active = outer.gelu(torch.zeros(1, 1, 32, dtype=torch.bfloat16), large)
    assert torch.equal(active.flatten(), large.bfloat16())


def test_what_is_not_finite_spoils_its_own_sequence_alone() -> None:
    made = block()
    made.passes = outer.PASSES
    tokens = torch.randn(6, 9, 32)
    clean = made(tokens)
    for value in (torch.nan, torch.inf):
        tokens[4, 3, 2] = value
        spoilt = made(tokens)
        assert spoilt[4].isnan().all()
        assert torch.equal(spoilt[[0, 1, 2, 3, 5]], clean[[0, 1, 2, 3, 5]])


def test_large_activations_stay_exact() -> None:
    made = block()
    made.attention.queries_keys_values.weight.data.mul_(20)
    made.mlp[0].weight.data.mul_(20)  # type: ignore[operator]
    tokens = torch.randn(3, 9, 32) * 100
    expected = copy.deepcopy(made).double()(tokens.double())
    made.passes = outer.PASSES
    assert error(made(tokens), expected) < 10 * TOLERANCE


def test_threads_change_sums_of_gradients_by_rounding_only() -> None:
    made, tokens = block(), torch.randn(7, 9, 32)
    made.passes = outer.PASSES
    by_threads = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        by_threads.append(outcome(made, made, tokens))
    torch.set_num_threads(1)
    for other in by_threads[1:]:
        assert torch.equal(other[0], by_threads[0][0])
        assert all(error(ours, first) < TOLERANCE for ours, first in zip(other, by_threads[0], strict=True))


def test_tensors_that_do_not_lie_side_by_side_are_read_as_they_are() -> None:
    projected = torch.randn(9, 4, 96).transpose(0, 1)
    queries, keys, values = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in projected.chunk(3, dim=2))
    expected = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
    assert error(outer.attend([projected], 2), expected) < TOLERANCE
    hidden, bias = torch.randn(32, 9, 4).permute(2, 1, 0), torch.randn(32)
    assert error(outer.gelu(hidden, bias), F.gelu(hidden + bias)) < TOLERANCE


@pytest.mark.parametrize("name", STUDENTS)
def test_a_fused_student_has_the_golden_losses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: str, **geometry: int) -> nn.Module:
        student = build_student(*arguments, **geometry)
        assert use_outer_block(student, "fused", CPU) == "c++"
        return student

    monkeypatch.setattr(test_golden, "build_student", build)
    test_golden.check(name)


def test_attention_is_shown_however_a_student_is_computed() -> None:
    student, images = build_student("titn", num_classes=3, depth=2).eval(), torch.randn(2, 3, 32, 32)
    plain = attention_maps(student, images)
    use_outer_block(student, "fused", CPU)
    assert torch.equal(attention_maps(student, images), plain) and plain.shape == (2, 2, 3, 18, 18)
    assert not student.plain


def test_what_runs_is_told() -> None:
    for name in STUDENTS:
        student = build_student(name, num_classes=3, depth=2)
        blocks = outer_blocks(student)
        assert len(blocks) == 2
        assert use_outer_block(student, "auto", CPU) == use_outer_block(student, "fused", CPU) == "c++"
        assert all(block.passes is outer.PASSES for block in blocks)
        assert use_outer_block(student, "auto", CPU, compiled=True) == use_outer_block(student, "plain", CPU) == "plain"
        assert all(block.passes is None for block in blocks)
    with pytest.raises(UsageError, match="outer_block: fused is not available here: torch.compile, which the recipe"):
        use_outer_block(student, "fused", CPU, compiled=True)
    with pytest.raises(UsageError, match="outer_block: fused is not available here: there is none for meta"):
        use_outer_block(student, "fused", torch.device("meta"))
    foreign = Student()
    assert use_outer_block(foreign, "auto", CPU) == "none"
    with pytest.raises(UsageError, match="the student is none of ours; use auto or plain"):
        use_outer_block(foreign, "fused", CPU)


def test_a_geometry_that_does_not_fill_the_registers_is_plain() -> None:
    student = build_student("vit", num_classes=3, depth=1, width=36, num_heads=3)
    lanes = outer._library().outer_lanes()
    reason = f"width 36 is no multiple of {lanes}, the processor's lanes"
    assert use_outer_block(student, "auto", CPU) == "plain", "no fault of the machine's, so without a reason"
    with pytest.raises(UsageError, match=reason):
        use_outer_block(student, "fused", CPU)
    assert outer.why_not(192, 64, 768) == f"heads' width 3 is no multiple of {lanes}, the processor's lanes"


def wrong(tensor: Tensor) -> Tensor:
    changed: Tensor = Wrong.apply(tensor)  # type: ignore[no-untyped-call]
    return changed


WRONG = {
    "attend": lambda projected, heads: outer.attend([wrong(part) for part in projected], heads),
    "gelu": lambda hidden, bias: outer.gelu(hidden, wrong(bias)),
    "residual": lambda tokens, *rest: outer.residual(wrong(tokens), *rest),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_pass_with_a_wrong_gradient_is_told_with_both_errors_and_refused_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Module:
        PASSES = outer.PASSES._replace(**{name: WRONG[name]})
        why_not, misfit, explain = map(staticmethod, (outer.why_not, outer.misfit, outer.explain))

    monkeypatch.setitem(FUSED_OUTER, "cpu", ("c++", Module))  # type: ignore[arg-type]
    monkeypatch.setattr(guard, "_verdicts", {})
    student = build_student("deit", num_classes=3, depth=1)
    answer = use_outer_block(student, "auto", CPU)
    assert answer.startswith("plain (the error of its gradients is ") and " of the plain block)" in answer
    assert use_outer_block(student, "auto", CPU, training=False) == "c++", "its results are right"
    with pytest.raises(UsageError, match="outer_block: fused is not available here: the error of its gradients"):
        use_outer_block(student, "fused", CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_check_leaves_model_and_generator_alone(precision: str) -> None:
    made = block(192, 3, 4)
    before, state = copy.deepcopy(made.state_dict()), torch.get_rng_state()
    compared = compare_outer(outer.PASSES, made, CPU, precision=precision, training=True)
    assert list(compared) == ["results", "gradients"] and all(errors.are_alike for errors in compared.values())
    assert torch.equal(torch.get_rng_state(), state) and made.passes is None and made.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in made.state_dict().items())
    assert all(parameter.grad is None for parameter in made.parameters())


@pytest.mark.no_compiler
def test_without_a_compiler_both_blocks_are_plain_for_the_same_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from pipeline.models.students.fused import inner

    for module in (inner, outer):
        monkeypatch.setattr(module, "_library", module._library.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    student = build_student("titn", num_classes=3, depth=1)
    assert (
        use_inner_block(student, "auto", CPU) == use_outer_block(student, "auto", CPU) == "plain (false does not run)"
    )
    student(torch.zeros(1, 3, 32, 32))
