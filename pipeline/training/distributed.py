"""The ranks that train one model together, under torchrun: gloo between CPUs, nccl between GPUs.

A `Group` of one rank starts nothing, and its methods return what they are given. Ranks wait for rank 0's own work at
torchrun's store, not in a collective operation: no time limit ends that, and signals are heard.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import PipelineError, UsageError
from pipeline.system.runtime import Ranks, current_ranks

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# All ranks must reach the same operation within this time, a limit for ranks that hang. One that died is noticed at
# once, by its connection or by torchrun.
TIMEOUT = datetime.timedelta(minutes=10)
SECONDS_BETWEEN_LOOKS = 0.05

T = TypeVar("T")
_serial = itertools.count()


@dataclass(eq=False)
class Group:
    """The ranks that work together; by default this process alone.

    Attributes:
        ranks: This process's place.
        device: Of its tensors; None in a group of one, whose tensors may be anywhere.
        store: The ranks' shared key-value store; None in a group of one.
    """

    ranks: Ranks = field(default_factory=Ranks)
    device: torch.device | None = None
    store: Store | None = None
    _turn: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False)

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """Number of ranks, W."""
        return self.ranks.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.ranks.is_main

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.world_size == 1

    @property
    def backend(self) -> str | None:
        """`gloo` or `nccl`; None in a group of one."""
        return None if self.device is None else BACKENDS[self.device.type]

    def share(self, size: int, *, least: int = 1) -> slice:
        """Return this rank's part of `size` samples: contiguous, in the order of ranks, sizes equal but for one.

        Args:
            size: Samples of all ranks together.
            least: Smallest part. Where there are too few samples, the last ranks get none.
        """
        workers = max(1, min(self.world_size, size // least))
        rank = min(self.rank, workers)
        return slice(size * rank // workers, size * min(rank + 1, workers) // workers)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks."""
        for tensor in () if self.is_alone else tensors:
            torch.distributed.all_reduce(tensor)

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its largest values over the ranks, and return it."""
        if not self.is_alone:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return every rank's tensor, of one shape, on the CPU, in the order of ranks."""
        if self.is_alone:
            return [tensor.cpu()]
        sent = tensor.to(self.device)
        received = [torch.empty_like(sent) for _ in range(self.world_size)]
        torch.distributed.all_gather(received, sent)
        return [tensor.cpu() for tensor in received]

    def gather_json(self, value: Any) -> list[Any]:
        """Return every rank's JSON value, in the order of ranks."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self.gather(torch.tensor(len(text)))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(text)] = text
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(self.gather(padded), sizes, strict=True)]

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by rank 0's."""
        for tensor in () if self.is_alone else tensors:
            sent = tensor.contiguous()  # both backends send the memory as stored
            torch.distributed.broadcast(sent, 0)
            tensor.copy_(sent)

    def distribute(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return rank 0's tensors, on the CPU, on every rank; what other ranks pass in does not matter."""
        if self.is_alone:
            return tensors
        shapes = self.on_main(
            lambda: {
                name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in tensors.items()
            }
        )
        received = {}
        for name, (dtype, *shape) in shapes.items():
            sent = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            if self.is_main:
                sent.copy_(tensors[name])
            torch.distributed.broadcast(sent, 0)
            received[name] = tensors[name] if self.is_main else sent.cpu()
        return received

    def first_reason(self, reason: str | None) -> str | None:
        """Return the first rank's reason against something, naming the rank, or None where no rank has one."""
        if self.is_alone:
            return reason
        told = (f"rank {rank}: {text}" for rank, text in enumerate(self.gather_json(reason)) if text is not None)
        return next(told, None)

    def on_main(self, work: Callable[[], T]) -> T:
        """Let rank 0 do some work while the others wait, and return its result on every rank.

        Args:
            work: Returns a JSON value; it may take any time.

        Raises:
            PipelineError: On the other ranks, with rank 0's error, where that has failed.
        """
        key = f"turn-{next(self._turn)}"  # every rank takes the same turns
        if not self.is_main:
            result: T = self._await(key)
            return result
        told: dict[str, Any] = {"result": None}
        try:
            result = work()
            told["result"] = result
            return result
        except Exception as error:
            told = {"error": str(error) or type(error).__name__, "code": getattr(error, "exit_code", 1)}
            raise
        finally:
            if self.store is not None:
                self.store.set(key, json.dumps(told))

    def main_first(self, work: Callable[[], T]) -> T:
        """Do some work on every rank, first on rank 0: what it downloads is there for the others.

        Raises:
            PipelineError: On the other ranks, with rank 0's error, where that has failed.
        """
        results: list[T] = []
        self.on_main(lambda: results.append(work()))
        return results[0] if self.is_main else work()

    def _await(self, key: str) -> Any:
        """Wait until rank 0 has told how its work ended, and return its result."""
        assert self.store is not None
        while not self.store.check([key]):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        told = json.loads(self.store.get(key))
        if "error" in told:
            failure = PipelineError(f"rank 0: {told['error']}")
            failure.exit_code = told["code"]
            raise failure
        return told["result"]


ALONE = Group()


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[Group]:
    """Join torchrun's group, and leave it at the end; without torchrun, or with one process, nothing is started.

    Args:
        device: This rank's own.

    Raises:
        UsageError: The device has no backend, is another rank's too, or the group's address is not set.
        PipelineError: Another rank has ended while this one waited for it.
    """
    ranks = current_ranks()
    if ranks.world_size == 1:
        yield ALONE
        return
    _check(ranks, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    with _naming_lost_ranks(ranks):
        shared, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
        store = PrefixStore(f"pipeline-{next(_serial)}", shared)
        torch.distributed.init_process_group(
            BACKENDS[device.type], store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=TIMEOUT
        )
        try:
            group = Group(ranks, device, store)
            yield group
            # Where torchrun is not there to hold the store, it goes with rank 0.
            group.sum_(torch.zeros((), device=device))
        finally:
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _naming_lost_ranks(ranks: Ranks) -> Iterator[None]:
    """Turn a lost connection to another rank, whatever operation noticed it, into one clear line."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise PipelineError(
            f"rank {ranks.rank} of {ranks.world_size}: the connection to another rank was lost; its own message, or "
            "torchrun's, says why; run the same command again to go on"
        ) from error


def _check(ranks: Ranks, device: torch.device) -> None:
    """Refuse what cannot become a group.

    Raises:
        UsageError: As for `join`.
    """
    world = f"WORLD_SIZE={ranks.world_size}"
    if device.type not in BACKENDS:
        raise UsageError(f"--device {device}: {world} ranks train on cpu or cuda; start it without torchrun")
    if not torch.distributed.is_available():
        raise UsageError(f"{world}: this PyTorch was built without torch.distributed; start it without torchrun")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UsageError(f"{name} is not set, but {world} is; start with torchrun, or unset WORLD_SIZE and RANK")
    if device.type == "cuda" and device.index != ranks.local_rank:
        raise UsageError(f"--device {device}: {world} ranks would share a GPU; leave --device out, or write cuda")


def has_batch_norm(model: nn.Module) -> bool:
    """Tell whether a model computes statistics over batches."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def parallel(model: nn.Module, group: Group, *, may_skip: bool = False) -> nn.Module:
    """Return what trains `model` on all ranks: its weights become rank 0's, gradients the mean over the ranks.

    On GPUs batch norm takes its statistics over all ranks; its layers are replaced within `model`. Between CPUs gloo
    cannot: each rank's are those of its own share, and the running ones, which evaluation uses, are rank 0's.

    Args:
        model: On the rank's device; it stays the one to evaluate and save.
        group: In a group of one, the model itself is returned.
        may_skip: Whether some of its parameters may have no part in the loss, which takes time to look for.
    """
    if group.is_alone:
        return model
    assert group.device is not None
    on_gpu = group.device.type == "cuda"
    if on_gpu:
        synchronize_norms(model)
    if may_skip:  # PyTorch warns where it has found none
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    devices = [group.device] if on_gpu else None
    return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=may_skip)


def synchronize_norms(model: nn.Module) -> None:
    """Replace a model's batch norms by ones that take their statistics over all ranks.

    Raises:
        UsageError: One of them is of a class of its own, which would lose what it adds to a batch norm.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    libraries = {type(norm).__module__.partition(".")[0]: type(norm).__name__ for norm in norms}
    if others := libraries.keys() - {"torch", "timm"}:
        names = ", ".join(sorted(libraries[name] for name in others))
        raise UsageError(f"{names}: batch norms of their own cannot be synchronised; train this model on one GPU")
    if "timm" in libraries:
        from timm.layers import convert_sync_batchnorm  # timm's norms hold an activation, which PyTorch would drop

        convert_sync_batchnorm(model)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]


def accumulating(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Sum gradients on this rank alone; the next backward pass outside the block averages the sums over the ranks."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
