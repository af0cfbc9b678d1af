"""The one fit loop, for teachers and students alike.

`Fit` runs epochs of `train_step` over `TrainingData`, evaluates after each, keeps the best epoch's weights and
saves a resumable state at most once a minute. A run that was stopped and started again ends with the same weights
and curve as one that was not: views and order are pure functions of the epoch, and the generators' states are saved.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.batches import Batch, EvaluationData, TrainingData, epoch_order, split_batches
from pipeline.checkpoints import Checkpoint, RunState
from pipeline.errors import NumericalError
from pipeline.losses import Outputs
from pipeline.metrics import Meter, Scores
from pipeline.optimization import build_optimizer, learning_rate
from pipeline.recipes import FitRecipe
from pipeline.runtime import autocast
from pipeline.stopping import StopSignal
from pipeline.views import normalize

SECONDS_BETWEEN_SAVES = 60.0
# Saving takes at most a thirtieth of the time. A VGG with its best epoch and Adam's moments is 2 GB: at the rate
# assumed before the first save is timed, a run of less than five minutes writes none.
SAVING_SHARE = 1 / 30
ASSUMED_BYTES_PER_SECOND = 2e8
STEPS_BETWEEN_CHECKS = 50
EVALUATION_BATCH = 1000


Objective = Callable[[Outputs, Batch], Tensor]


@dataclass
class FitResult:
    """What `Fit.run` returns.

    Attributes:
        curve: One row for every epoch: epoch (from 1), lr, train_loss and the fields of Scores.
        best: Weights of the best epoch, the earliest of equals, on the CPU.
        best_epoch: Its number, from 1.
        warnings: What went wrong without ending the run.
        at_chance: Whether the run ended without having learned anything.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    warnings: list[str] = field(default_factory=list)
    at_chance: bool = False


class Watcher(Protocol):
    """Is told how a run goes on; shows it, or does nothing."""

    def started(self, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        """Begin at `step` of `epoch`, both counted from 0."""

    def stepped(self) -> None:
        """Note one step done."""

    def epoch_ended(self, row: Mapping[str, Any]) -> None:
        """Note a row of the curve."""

    def warned(self, message: str) -> None:
        """Show a warning."""


def train_step(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    clip: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Do one step: forward, loss, backward, clip, update.

    Args:
        model: In training mode.
        batch: On the model's device.
        objective: Maps outputs and batch to the loss.
        optimizer: Over the model's parameters.
        clip: Largest gradient norm; 0 leaves gradients alone.
        precision: `fp32` or `bf16`.

    Returns:
        The loss, a float32 scalar, and whether loss and gradient norm are finite, a boolean scalar; both stay on
        the device.
    """
    with autocast(batch.images.device, precision):
        outputs = model(batch.images)
    loss = objective(outputs, batch)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else math.inf)
    optimizer.step()
    loss = loss.detach()
    return loss, torch.isfinite(loss) & torch.isfinite(norm)


@torch.inference_mode()
def evaluate(model: nn.Module, data: EvaluationData, *, precision: str = "fp32") -> Scores:
    """Score a model on clean images; it is left in evaluation mode.

    Raises:
        NumericalError: A logit is not finite.
    """
    model.eval()
    device = data.images.device
    meter = Meter(data.num_classes, device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for part, images in data.batches(EVALUATION_BATCH):
        with autocast(device, precision):
            outputs = model(normalize(images, data.mean, data.std))
        for head in outputs if isinstance(outputs, tuple) else (outputs,):
            finite &= torch.isfinite(head).all()
        meter.add(outputs, data.labels[part], None if data.teacher_labels is None else data.teacher_labels[part])
    if not finite:
        raise NumericalError("evaluation: a logit is not finite; lower lr, or set clip to 1.0")
    return meter.scores()


@dataclass(kw_only=True)
class Fit:
    """One training run; `run` starts it, or goes on with it after a stop.

    Attributes:
        model: On the device of the data; holds the last epoch's weights afterwards.
        data: Training batches.
        evaluation: The split that decides the best epoch.
        objective: The loss.
        recipe: Epochs, batch size, optimiser, schedule, clipping.
        precision: `fp32` or `bf16`, resolved.
        seed: Of the order of samples; initialisation is the caller's.
        state: Where the run's resumable state is kept.
        watcher: Is told of every step and epoch.
        stop: Asked after every step.
        metric: The score that decides the best epoch, higher is better.
    """

    model: nn.Module
    data: TrainingData
    evaluation: EvaluationData
    objective: Objective
    recipe: FitRecipe
    precision: str
    seed: int
    state: RunState
    watcher: Watcher
    stop: StopSignal
    metric: str = "top1"

    def __post_init__(self) -> None:
        self.optimizer = build_optimizer(self.model.parameters(), self.recipe)
        self.device = self.evaluation.images.device
        self.batches = split_batches(self.data.views.num_samples, self.recipe.batch_size)
        self.result = FitResult()
        self.epoch = self.step = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.saved_at = time.monotonic()
        weights = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        self.save_seconds = 4 * weights / ASSUMED_BYTES_PER_SECOND

    def run(self) -> FitResult:
        """Train to the last epoch.

        Raises:
            NumericalError: Loss, gradient norm or logits are not finite. The message names epoch, step, lr and what
                to try; the best epoch so far is kept beside the state.
            Interrupted: A signal came; the state has been saved.
        """
        with self.stop.deferred():
            self.resume()
            self.watcher.started(self.recipe.epochs, len(self.batches), self.epoch, self.step)
            while self.epoch < self.recipe.epochs:
                self.train_epoch()
                self.end_epoch()
        return self.result

    def train_epoch(self) -> None:
        """Train from the current step to the end of the epoch."""
        self.model.train()
        order = epoch_order(self.seed, self.epoch, self.data.views.num_samples)
        check_every = 1 if self.device.type == "cpu" else STEPS_BETWEEN_CHECKS
        finite: list[Tensor] = []
        for batch in self.data.batches(self.epoch, [order[part] for part in self.batches[self.step :]]):
            lr = self._learning_rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss, is_finite = train_step(
                self.model,
                batch,
                self.objective,
                self.optimizer,
                clip=self.recipe.clip,
                precision=self.precision,
            )
            self.loss_sum += loss.double() * len(batch.labels)
            self.step += 1
            self.watcher.stepped()
            finite.append(is_finite)
            stopping = self.stop.received is not None
            pause = max(SECONDS_BETWEEN_SAVES, self.save_seconds / SAVING_SHARE)
            saving = stopping or time.monotonic() - self.saved_at > pause
            if saving or len(finite) == check_every or self.step == len(self.batches):
                self._check_finite(finite, lr)
                finite = []
            if saving:
                self.save()
            if stopping:
                raise self.stop.error(
                    f"stopped in epoch {self.epoch + 1} of {self.recipe.epochs} after step {self.step}; "
                    "run the same command again to go on"
                )

    def end_epoch(self) -> None:
        """Evaluate, extend the curve, keep the best weights."""
        scores = evaluate(self.model, self.evaluation, precision=self.precision)
        train_loss = float(self.loss_sum) / self.data.views.num_samples
        row = {
            "epoch": self.epoch + 1,
            "lr": self._learning_rate(len(self.batches) - 1),
            "train_loss": train_loss,
            **dataclasses.asdict(scores),
        }
        best = max((past[self.metric] for past in self.result.curve), default=-math.inf)
        self.result.curve.append(row)
        if row[self.metric] > best:
            self.result.best_epoch = self.epoch + 1
            self.result.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        self.watcher.epoch_ended(row)
        self._warn_at_chance(row)
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum.zero_()

    def save(self) -> None:
        """Write the resumable state."""
        began = time.monotonic()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.result.best.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
        tensors["loss_sum"] = self.loss_sum
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        result = self.result
        meta = {
            "epoch": self.epoch,
            "step": self.step,
            "curve": result.curve,
            "best_epoch": result.best_epoch,
        }
        self.state.save(tensors, {**meta, "warnings": result.warnings, "at_chance": result.at_chance})
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - began

    def resume(self) -> None:
        """Go on from the saved state, if there is one."""
        saved = self.state.load()
        if saved is None:
            return
        self.model.load_state_dict(_part(saved, "model."))
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {}
        parameters = list(self.model.parameters())
        for name, tensor in _part(saved, "optimizer.").items():
            index, key = name.split(".", 1)
            parameter = parameters[int(index)]
            if tensor.shape == parameter.shape:
                # A fused update goes through memory in order: moments must lie there as their weights do.
                tensor = torch.empty_like(parameter, dtype=tensor.dtype, device="cpu").copy_(tensor)
            optimizer["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(optimizer)
        self.loss_sum.copy_(saved.tensors["loss_sum"])
        torch.set_rng_state(saved.tensors["rng.cpu"])
        if "rng.cuda" in saved.tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved.tensors["rng.cuda"], self.device)
        meta = saved.meta
        self.epoch, self.step = meta["epoch"], meta["step"]
        self.result = FitResult(
            list(meta["curve"]),
            _part(saved, "best."),
            meta["best_epoch"],
            list(meta["warnings"]),
            meta["at_chance"],
        )

    def _learning_rate(self, step: int) -> float:
        """Return the learning rate of a step of this epoch."""
        return learning_rate(self.recipe, self.epoch * len(self.batches) + step, len(self.batches))

    def _check_finite(self, finite: list[Tensor], lr: float) -> None:
        """Stop at the first of the last steps that was not finite, keeping the best epoch so far."""
        flags = torch.stack(finite).tolist()
        if all(flags):
            return
        step = self.step - len(flags) + flags.index(False) + 1
        where = f"epoch {self.epoch + 1}, step {step}, lr {lr:.3g}"
        kept = "no epoch was finished before"
        if self.result.best:
            kept = f"the best epoch so far ({self.result.best_epoch}) is kept in {self.state.keep(self.result.best)}"
        raise NumericalError(f"{where}: the loss or its gradient is not finite; lower lr or set clip to 1.0; {kept}")

    def _warn_at_chance(self, row: Mapping[str, Any]) -> None:
        """Warn of an epoch after warm-up whose loss has not left that of guessing, ln K; recorded while it lasts."""
        chance = 100.0 / self.evaluation.num_classes
        stuck = row["train_loss"] > 0.98 * math.log(self.evaluation.num_classes) and row["top1"] < 1.5 * chance
        self.result.at_chance = stuck and self.epoch + 1 > self.recipe.warmup_epochs
        if not self.result.at_chance:
            self.result.warnings.clear()
        elif not self.result.warnings:
            figures = f"train loss {row['train_loss']:.3f}, top-1 {row['top1']:.2f} %"
            advice = "if it stays there, lower lr, add warmup_epochs, or set clip to 1.0"
            message = f"epoch {row['epoch']} is still at chance ({figures}); {advice}"
            self.result.warnings.append(message)
            self.watcher.warned(message)


def _part(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in checkpoint.tensors.items() if name.startswith(prefix)}
