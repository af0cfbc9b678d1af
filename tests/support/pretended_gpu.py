"""A stand-in for a CUDA device that counts what a real one would be asked for: launches, copies and waiting.

Its tensors say that they are on `cuda:0` and hold their values in ordinary memory, so that results can be compared bit
for bit with those of the CPU. PyTorch's own fake tensors cannot do this: without a GPU their backward pass fails, and
they have no values to decide by.

Counted is every operation that PyTorch would start on the GPU, except those that only make a view. What a kernel of
PyTorch does inside is not known here: an operation counts as one launch, and so does a fused optimiser's step.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
_aten = torch.ops.aten
# Operations whose result's size, or whose work, depends on values: the host waits for them.
WAITING = {
    _aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.bincount, _aten.equal, _aten.unique_dim,
    _aten._unique2, _aten.unique_consecutive, _aten.repeat_interleave, _aten.multinomial, _aten.is_nonzero,
}  # fmt: skip
# Operations that copy scalars or indices on the host to the GPU first, without saying so. Others take them along.
COPYING = {_aten.where, _aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten.index_fill_}
INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
# Operations that give memory, or another tensor of the same.
WITHOUT_WORK = {
    _aten.empty_like,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.detach,
    _aten.alias,
    _aten._unsafe_view,
}
# Autocast on CUDA computes these in float32; on a CPU it leaves most of them alone.
IN_FLOAT32 = {torch.layer_norm, torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax}
FOREACH = ("torch.optim.optimizer", "torch.utils._foreach_utils")  # the modules that ask whether a tensor is plain
KINDS = ("launches", "pinned copies", "pageable copies", "copies to the host", "waits")

_counts: Counter[str] = Counter()
_callers: Counter[tuple[str, str]] = Counter()
_pinned: list[Tensor] = []  # kept, so that their memory is nobody else's


class OnGpu(Tensor):
    """A tensor that says it is on a GPU; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held = held
        return made

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def numpy(self, **_: object) -> Any:  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        return self.to(CPU).tolist()

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_inference_mode_enabled():
            return _run(func, args, kwargs)
        if (result := func.decompose(*args, **kwargs)) is not NotImplemented:  # compound operations arrive whole
            return result
        with torch.inference_mode(False), torch.no_grad():  # a view is no inference tensor where its base is none
            return _run(func, args, kwargs)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Count an operation, and do it in ordinary memory."""
    packet, on_host, held = func.overloadpacket, [], {}

    def look(tensor: Tensor) -> Tensor:
        if isinstance(tensor, OnGpu):
            held[id(tensor.held)] = tensor
            return tensor.held
        on_host.append(tensor)
        return tensor

    plain_args, plain_kwargs = _changed(args, look), {key: _changed(value, look) for key, value in kwargs.items()}
    if packet is _aten.copy_ and not isinstance(args[0], OnGpu):
        _note("copies to the host", func)
        return func(args[0], args[1].held, *args[2:], **kwargs)
    if packet is _aten.copy_ and on_host and on_host[0].ndim:
        _copied(on_host[0], non_blocking=bool(kwargs.get("non_blocking", args[2:] == (True,))))
    elif packet in WAITING or (packet in INDEXING and _has_masks(args[1])):
        _note("waits", func)
    elif not func.is_view and packet not in WITHOUT_WORK:
        _note("launches", func)
    for host in on_host if packet in COPYING else []:
        _copied(host, non_blocking=False)
    result = (_inner_block if func.namespace == "pipeline" else func)(*plain_args, **plain_kwargs)
    return _changed(result, lambda tensor: held[id(tensor)] if id(tensor) in held else OnGpu(tensor))


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the tensors of an argument or a result."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_changed(part, change) for part in value) if type(value) in (list, tuple) else value


def _has_masks(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _inner_block(pixels: Tensor, weights: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    """Stands in for the kernels of the inner block, which pass on what they are given; see fused.interface.register."""
    if isinstance(rest[0], Tensor):
        return rest[0].clone(), torch.zeros(sum(weight.numel() for weight in weights))
    return pixels.clone(), pixels.clone()


COMPILED = 1, 3
"""Launches that a function which torch.compile prepares stands for, forward and backward: on a GPU the compiler decides
how many kernels sum up the gradients of weights."""


def as_compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that torch.compile would prepare: it counts as few launches, whatever it calls."""
    return _Compiled.apply(function, *arguments)  # type: ignore[no-untyped-call]


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        ctx.function, ctx.arguments = function, arguments
        with _uncounted(COMPILED[0]):
            return function(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        needs = ctx.needs_input_grad[1:]
        with _uncounted(COMPILED[1]), torch.enable_grad():
            again = [
                value.detach().requires_grad_(need) if isinstance(value, Tensor) else value
                for value, need in zip(ctx.arguments, needs, strict=True)
            ]
            results = ctx.function(*again)
            wanted = [value for value, need in zip(again, needs, strict=True) if need]
            found = iter(torch.autograd.grad(results, wanted, gradients))
        return None, *(next(found) if need else None for need in needs)


@contextlib.contextmanager
def _uncounted(launches: int) -> Iterator[None]:
    """Count so many launches in place of all that a block asks for."""
    counts, callers = _counts.copy(), _callers.copy()
    try:
        yield
    finally:
        for counter, before in ((_counts, counts), (_callers, callers)):
            counter.clear()
            counter.update(before)
        _counts["launches"] += launches


def _copied(host: Tensor, *, non_blocking: bool) -> None:
    _note("pinned copies" if non_blocking and is_pinned(host) else "pageable copies", "copy")


def _note(kind: str, func: object) -> None:
    _counts[kind] += 1
    frame = sys._getframe(1)
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    where = "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    _callers[kind, f"{where} {func}"] += 1


def is_pinned(tensor: Tensor) -> bool:
    """Whether a host tensor lies in memory that was asked for as pinned."""
    address = tensor.untyped_storage().data_ptr()
    return any(address == other.untyped_storage().data_ptr() for other in _pinned)


class Pretence(TorchFunctionMode):
    """Keeps tensors on the pretended device: what is made for it, sent there, or fetched."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return _move(func, args, kwargs)
        asked = kwargs.get("device")
        if asked is None:
            if func in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
                args = tuple(_in_float32(value) for value in args)
            return func(*args, **kwargs)
        kwargs["device"] = CPU
        is_gpu = torch.device(asked).type == "cuda"
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            made = func(*args, **kwargs)
            return _move(Tensor.to, (made, asked), {})
        made = func(*args, **kwargs)
        held = made.held if isinstance(made, OnGpu) else made
        if not is_gpu:
            return held
        if "empty" not in func.__name__:
            _note("launches", func.__name__)
        return OnGpu(held)


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, OnGpu) and value.dtype == torch.bfloat16 else value


def _move(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Move a tensor to the device of the arguments, and convert it to their dtype."""
    tensor, *rest = args
    target = GPU if func is Tensor.cuda else CPU if func is Tensor.cpu else kwargs.pop("device", None)
    dtype, non_blocking = kwargs.pop("dtype", None), bool(kwargs.pop("non_blocking", False))
    for value in rest:
        if isinstance(value, Tensor):
            target, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device):
            target = value
        elif isinstance(value, bool):
            non_blocking = value
    to_gpu = target is not None and torch.device(target).type == "cuda"
    options = kwargs if dtype is None else {**kwargs, "dtype": dtype}
    if isinstance(tensor, OnGpu):
        if target is None or to_gpu:
            return Tensor.to(tensor, **options) if options else tensor
        _note("copies to the host", "to")
        return tensor.held.to(**{**options, "copy": True}).detach()
    if not to_gpu:
        return Tensor.to(tensor, target, **options) if target is not None else Tensor.to(tensor, **options)
    _copied(tensor, non_blocking=non_blocking)
    sent = OnGpu(tensor.detach().to(**{**options, "copy": True}))
    return sent.requires_grad_(tensor.requires_grad)


class Counted:
    """What has been counted since the last `take`."""

    def take(self) -> dict[str, int]:
        """Return the counts by KINDS, and begin anew."""
        counts = {kind: _counts[kind] for kind in KINDS}
        _counts.clear()
        _callers.clear()
        return counts

    def callers(self, kind: str) -> dict[str, int]:
        """Return where in our code a kind was asked for, and by which operation, most often first."""
        return {where: number for (of, where), number in _callers.most_common() if of == kind}


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Counted]:
    """Let `cuda` be a stand-in within a block; yield what counts."""
    empty, autocast, group = torch.empty, torch.autocast, torch._C._group_tensors_by_device_and_dtype  # type: ignore[attr-defined]

    def pinnable_empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return _pin(made) if pin_memory else made

    def autocast_there(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def group_there(lists: Any, with_indices: bool = False) -> Any:
        is_there = isinstance(lists[0][0], OnGpu)
        return {
            (GPU if is_there else device, dtype): value for (device, dtype), value in group(lists, with_indices).items()
        }

    with pytest.MonkeyPatch.context() as patch, Pretence():
        patch.setattr(torch, "empty", pinnable_empty)
        patch.setattr(torch, "autocast", autocast_there)
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", group_there)
        patch.setattr(Tensor, "pin_memory", lambda tensor, *_: _pin(tensor.clone()))
        # Otherwise a module's parameter on the CPU would take over the memory of one that has none.
        patch.setattr(torch, "_has_compatible_shallow_copy_type", lambda one, other: type(one) is type(other))
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        for module in (sys.modules[name] for name in FOREACH):
            patch.setattr(module, "_foreach_supported_types", [*module._foreach_supported_types, OnGpu])
        _counts.clear()
        _callers.clear()
        try:
            yield Counted()
        finally:
            _pinned.clear()


def _pin(tensor: Tensor) -> Tensor:
    _pinned.append(tensor)
    return tensor
