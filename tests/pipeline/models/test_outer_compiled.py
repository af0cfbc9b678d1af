"""The passes of an outer block that torch.compile joins, for CUDA; here they are compiled for the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import UsageError
from pipeline.models import students
from pipeline.models.students import build_student, use_outer_block
from pipeline.models.students.attention import outer_blocks
from pipeline.models.students.fused import guard, outer_cuda
from pipeline.models.students.layers import EncoderBlock

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def student(name: str = "titn") -> Any:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "width": 48, "depth": 2}
    return build_student(name, num_classes=3, **sizes)


def block() -> EncoderBlock:
    torch.manual_seed(0)
    made = EncoderBlock(width=48, num_heads=3, mlp_ratio=4)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases that are not 0
    return made


@pytest.fixture
def compile_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Sets what stands in for torch.compile, and lets the CPU be a device whose passes are compiled."""
    monkeypatch.setitem(students.FUSED_OUTER, "cpu", students.FUSED_OUTER["cuda"])
    monkeypatch.setattr(outer_cuda, "why_not", lambda *_: None)
    monkeypatch.setattr(guard, "_verdicts", {})
    outer_cuda._compiled.cache_clear()
    yield lambda stand_in: monkeypatch.setattr(torch, "compile", stand_in)
    outer_cuda._compiled.cache_clear()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_passes_are_the_modules(precision: str, compile_by: Callable[[Any], None]) -> None:
    compile_by(lambda function, **_: function)
    errors = guard.compare_outer(outer_cuda.PASSES, block(), CPU, precision=precision, training=True)
    assert all(error.are_alike for error in errors.values()), errors


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's compiler looks at inputs' gradients
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_passes_are_the_modules(precision: str, compile_by: Callable[[Any], None]) -> None:
    errors = guard.compare_outer(outer_cuda.PASSES, block(), CPU, precision=precision, training=True)
    assert all(error.are_alike for error in errors.values()), errors


def test_a_student_is_compiled_only_where_that_works(compile_by: Callable[[Any], None]) -> None:
    asked: list[str] = []

    def stand_in(function: Any, **options: Any) -> Any:
        assert options == {"dynamic": True, "fullgraph": True}
        asked.append(function.__name__)
        return function

    compile_by(stand_in)
    model = student()
    assert use_outer_block(model, "auto", CPU) == "torch.compile"
    assert {outer.passes for outer in outer_blocks(model)} == {outer_cuda.PASSES}
    assert sorted(asked) == ["_add", "_add_and_normalize", "_enter_and_normalize", "_gelu", "_norm"]


def test_students_of_many_widths_in_one_process_are_all_compiled(compile_by: Callable[[Any], None]) -> None:
    compiled: list[str] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Any:
        compiled.append(str(graph.graph))
        return graph.forward

    compile_by(functools.partial(torch.compile, backend=count))
    hidden = [torch.randn(2, 3, width) for width in range(32, 44)]
    for tokens in hidden:
        active = outer_cuda.gelu(tokens, nn.Parameter(torch.ones(tokens.shape[-1])))
        torch.testing.assert_close(active, torch.nn.functional.gelu(tokens + 1))
    assert len(compiled) == len(hidden)


def test_where_nothing_compiles_the_blocks_are_plain(compile_by: Callable[[Any], None]) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nmore")

    compile_by(lambda *_, **__: fail)
    model = student()
    reason = "torch.compile fails: no compiler"
    assert use_outer_block(model, "auto", CPU) == f"plain ({reason})"
    assert {outer.passes for outer in outer_blocks(model)} == {None}
    with pytest.raises(UsageError, match=f"outer_block: fused is not available here: {reason}; use auto or plain"):
        use_outer_block(model, "fused", CPU)


def test_a_gpu_is_needed_and_used_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = student("vit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert use_outer_block(model, "auto", CUDA) == "plain (there is no GPU)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(outer_cuda, "find_spec", lambda _: None)
    assert use_outer_block(model, "auto", CUDA) == "plain (Triton is not installed)"
    monkeypatch.setattr(outer_cuda, "find_spec", lambda _: object())
    asked: list[torch.device] = []

    def why_not(passes: object, block: object, device: torch.device, **_: object) -> None:
        asked.append(device)

    monkeypatch.setattr(guard, "why_not_outer", why_not)
    assert use_outer_block(model, "auto", CUDA) == "torch.compile" and asked == [CUDA]
    assert use_outer_block(model, "auto", CUDA, training=False) == "plain" and asked == [CUDA]
    assert use_outer_block(model, "fused", CUDA, training=False) == "torch.compile"
    assert use_outer_block(model, "auto", CUDA, compiled=True) == "plain"
