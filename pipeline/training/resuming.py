"""A run's progress, saved as tensors and JSON and loaded again, so that a stopped run goes on as if never stopped.

pipeline.training.checkpoints knows files and nothing of training; pipeline.training.fit knows training and nothing of
files.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.training.checkpoints import RunState, SavedState
from pipeline.training.column_sum import column_sums
from pipeline.training.distributed import Group
from pipeline.training.optimization import MovingAverage


@dataclass
class FitResult:
    """The result of `pipeline.training.fit.Fit.run`.

    Attributes:
        curve: One row for every epoch: epoch (from 1), lr, train_loss and the fields of Scores. Of a model that is
            finished one row, epoch 0, without a train_loss.
        best: Weights of the best epoch, on the CPU; on rank 0 alone. Replaced, never changed.
        best_epoch: Its number, from 1; 0 of a finished model, and before the first epoch ends.
        warnings: What went wrong without ending the run.
        at_chance: Whether the best epoch predicts no better than guessing.
        rules: Number of the rules by which the epochs were judged; of a run that began under lower ones, theirs.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    best: Mapping[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    warnings: list[str] = field(default_factory=list)
    at_chance: bool = False
    rules: int = 1

    @property
    def best_row(self) -> dict[str, Any]:
        """The best epoch's row of the curve."""
        return self.curve[max(self.best_epoch, 1) - 1]


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        loss_sum: This rank's part of the epoch's sum of losses, a float64 scalar on the device.
        epoch: Epochs done.
        step: Steps done of the epoch under way.
        result: Of the epochs done.
        began: Start of this process's work on the run, monotonic clock, seconds.
        earlier_seconds: Work of earlier processes on it, seconds.
    """

    loss_sum: Tensor
    epoch: int = 0
    step: int = 0
    result: FitResult = field(default_factory=FitResult)
    began: float = field(default_factory=lambda: time.monotonic())
    earlier_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Work on the run so far, in this process and earlier ones, seconds."""
        return self.earlier_seconds + time.monotonic() - self.began


def save_progress(
    state: RunState,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: Group,
    average: MovingAverage | None = None,
) -> None:
    """Write the resumable state. Every rank calls it, rank 0 writes.

    Raises:
        StorageError: The state cannot be written; the one before is unharmed.
    """
    result, device = progress.result, progress.loss_sum.device
    group.sum_(progress.loss_sum)
    if not group.is_main:
        progress.loss_sum.zero_()
    generators = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        generators["rng.cuda"] = torch.cuda.get_rng_state(device)
    tensors = {
        _of_rank(name, rank): tensor
        for name, generator in generators.items()
        for rank, tensor in enumerate(group.gather(generator))
    }
    meta = {"epoch": progress.epoch, "step": progress.step, "curve": result.curve, "best_epoch": result.best_epoch}
    meta |= {"warnings": result.warnings, "at_chance": result.at_chance, "seconds": progress.seconds}
    meta["rules"] = result.rules
    if sums := list(column_sums(model)):
        meta["column_sums"] = sums

    def write() -> None:
        tensors["loss_sum"] = progress.loss_sum
        tensors.update({f"model.{name}": tensor for name, tensor in model.state_dict().items()})
        tensors.update(moments(optimizer))
        tensors.update(averages(average))
        state.save(tensors, meta, result.best)

    group.on_main(write)


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of an optimiser's state, `optimizer.<parameter>.<key>`."""
    return {
        f"optimizer.{index}.{key}": torch.as_tensor(value)
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def averages(average: MovingAverage | None) -> dict[str, Tensor]:
    """Return the tensors of a moving average, `average.<parameter>`; none where there is none."""
    return {f"average.{name}": tensor for name, tensor in average.tensors.items()} if average is not None else {}


def keep_best(state: RunState | None, result: FitResult, group: Group) -> str:
    """Let rank 0 write the best epoch's weights of a run that cannot go on, and say where they are.

    Ranks need not agree on why they end, so none waits for another.
    """
    if not result.best_epoch:
        return "no epoch was finished before"
    if state is None:
        return "nothing is kept"
    if group.is_main:
        state.keep(result.best)
    return f"the best epoch so far ({result.best_epoch}) is kept in {state.last_good}"


def load_progress(
    state: RunState,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: Group,
    average: MovingAverage | None = None,
) -> None:
    """Go on from the saved state, if there is one: rank 0 reads it, every rank gets what it read.

    A state may have been written by another number of ranks.
    """
    loaded: list[SavedState] = []

    def load() -> dict[str, Any] | None:
        loaded.extend(saved for saved in [state.load()] if saved is not None)
        return dict(loaded[0].meta) if loaded else None

    meta = group.on_main(load)
    if meta is None:
        return
    tensors, best = (loaded[0].tensors, loaded[0].best) if loaded else ({}, {})
    tensors = group.distribute(tensors)
    model.load_state_dict(_part(tensors, "model."))
    _load_optimizer(optimizer, _part(tensors, "optimizer."))
    if average is not None:
        average.load(_part(tensors, "average."))
    progress.loss_sum.copy_(tensors["loss_sum"] if group.is_main else torch.zeros(()))
    device = progress.loss_sum.device
    # States of former versions do not have it.
    progress.earlier_seconds = float(meta.get("seconds", 0.0))
    if (cpu := tensors.get(_of_rank("rng.cpu", group.rank))) is not None:
        torch.set_rng_state(cpu)
    if (cuda := tensors.get(_of_rank("rng.cuda", group.rank))) is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)
    progress.epoch, progress.step = meta["epoch"], meta["step"]
    progress.result = FitResult(
        list(meta["curve"]), best, meta["best_epoch"], list(meta["warnings"]), meta["at_chance"],
        min(meta.get("rules", 1), progress.result.rules),
    )  # fmt: skip


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load an optimiser's moments, which are kept by their parameters' places in its groups.

    Raises:
        DataError: They are of other parameters, because another version grouped these otherwise.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict()
    state["state"] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        if tensor.ndim and tensor.shape != parameter.shape:  # a fused step would write beyond its end
            raise DataError(
                f"saved state: {name} is of shape {tuple(tensor.shape)}, its parameter of {tuple(parameter.shape)}: "
                "another version has grouped the parameters otherwise; --fresh starts over"
            )
        if tensor.shape == parameter.shape:
            # A fused update goes through memory in order: moments must lie there as their weights do.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype, device="cpu").copy_(tensor)
        state["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(state)


def _of_rank(name: str, rank: int) -> str:
    """Return the name under which a rank's tensor is kept."""
    return f"{name}.{rank}" if rank else name


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
