"""The one fit loop, for teachers and students alike.

`Fit` runs epochs of `train_step` over `TrainingData`, evaluates after each, keeps the best epoch's weights and
saves a resumable state at most once a minute. A run that was stopped and started again ends with the same weights
and curve as one that was not: views and order are pure functions of the epoch, and the generators' states are saved.

Under torchrun every rank runs the same loop on its share of every batch. The ranks first agree on whatever decides how
the loop goes on (a stop, a save, a loss that is not finite, scores), so all take the same steps; rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.recipes import FitRecipe
from pipeline.errors import NumericalError, UsageError
from pipeline.system.stopping import StopSignal, stopped
from pipeline.training.batches import Batch, EvaluationData, TrainingData, epoch_order, split_batches, step_draws
from pipeline.training.checkpoints import RunState
from pipeline.training.column_sum import published
from pipeline.training.distributed import has_batch_norm, parallel
from pipeline.training.evaluation import evaluate
from pipeline.training.execution import Execution
from pipeline.training.metrics import is_chance
from pipeline.training.optimization import MovingAverage, build_optimizer, learning_rate, set_learning_rate
from pipeline.training.resuming import FitResult, Progress, averages, keep_best, load_progress, moments, save_progress
from pipeline.training.standing import standing
from pipeline.training.step import CapturedStep, Objective, Step, train_step
from pipeline.views.parcel import send

SECONDS_BETWEEN_SAVES = 60.0
# The writing thread needs a core, so states take at most a thirtieth of the time. A VGG's state with its best epoch and
# Adam's moments is 2 GB: at the assumed rate, used until a save is timed, a run of under five minutes writes none.
SAVING_SHARE = 1 / 30
ASSUMED_BYTES_PER_SECOND = 2e8
STEPS_BETWEEN_CHECKS = 50
ADVICE = "lower lr or set clip to 1.0"


class Watcher(Protocol):
    """Follows a run's progress, for example to show it.

    Calls come from the thread that trains, which waits for them, in this order: `started`; for each epoch `stepped`
    after every step, `trained`, `epoch_ended`; then `ended` or `stopped`, from who writes the result. `warned` comes at
    any time. What `--watch` names needs only the methods that it wants, see pipeline.report.watching.Watchers.
    """

    def started(self, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        """Begin at `step` of `epoch`, both counted from 0."""

    def stepped(self) -> None:
        """Note one step done."""

    def trained(self, images: int, seconds: float) -> None:
        """Note an epoch's steps done: the images of all ranks since it began or went on, and the seconds."""

    def epoch_ended(self, row: Mapping[str, Any]) -> None:
        """Note a row of the curve: `epoch` from 1, `lr`, `train_loss` and scores; what does not apply is None."""

    def warned(self, message: str) -> None:
        """Show a warning."""

    def ended(self, metrics: Mapping[str, Any]) -> None:
        """Note that the result is written; `metrics` is its metrics.json."""

    def stopped(self, reason: str) -> None:
        """Note that the run was interrupted, or failed, before its end. A later process may go on with it."""


class Silent(Watcher):
    """Shows nothing."""


@dataclass(frozen=True)
class Session:
    """A run's ties to its process: saving, display and stopping; by default none.

    Attributes:
        state: The resumable state; None keeps none.
        watcher: Told of every step and epoch.
        stop: Asked after every step.
    """

    state: RunState | None = None
    watcher: Watcher = field(default_factory=Silent)
    stop: StopSignal = field(default_factory=StopSignal)


@dataclass(frozen=True)
class _Share:
    """A rank's part of a step.

    Attributes:
        indices: `(B,)` int64, the samples that its model sees.
        count: B, or 0 where they have no weight.
        size: Samples of all ranks together.
        rows: Which of those they are.
    """

    indices: Tensor
    count: int
    size: int
    rows: slice


@dataclass(kw_only=True)
class Fit:
    """A training run; `run` starts it, or resumes it after a stop.

    Attributes:
        model: On the device of the data; holds the last epoch's weights, or their average, afterwards.
        data: Training batches.
        evaluation: The split that decides the best epoch.
        objective: The loss.
        recipe: Epochs, batch size, optimiser, schedule, clipping. With 0 epochs the model is evaluated as it is.
        seed: Of the order of samples; initialisation is the caller's.
        metric: The score that decides the best epoch, higher is better. Of equals the lower loss on the same split
            counts, then the later epoch.
        rules: Number of the rules by which results are judged, kept in the state and the result.
        may_skip: Whether some parameters may have no part in the loss, which ranks take time to look for.
        ema: Decay of a moving average of the weights; 0 keeps none. The average is evaluated and becomes the best and
            the last weights; the resumable state holds weights and average.
        execution: How it is computed: precision, micro-batches, CUDA graph, ranks.
        session: Saving, display and stopping.
    """

    model: nn.Module
    data: TrainingData
    evaluation: EvaluationData
    objective: Objective
    recipe: FitRecipe
    seed: int = 0
    metric: str = "top1"
    rules: int = 1
    ema: float = 0.0
    may_skip: bool = False
    execution: Execution = field(default_factory=Execution)
    session: Session = field(default_factory=Session)

    def __post_init__(self) -> None:
        self.group = self.execution.group
        self.device = self.evaluation.images.device
        self.parallel = parallel(self.model, self.group, may_skip=self.may_skip)
        self.average = MovingAverage(self.model, self.ema) if self.ema else None
        captured = self.execution.step == "graph"
        self.optimizer = build_optimizer(self.model, self.recipe, captured=captured)
        step = functools.partial(
            train_step,
            self.parallel,
            objective=self.objective,
            optimizer=self.optimizer,
            clip=self.recipe.clip,
            precision=self.execution.precision,
            micro_batch=self.execution.micro_batch,
        )
        # A bound method would keep this run, and with it the memory of its graphs, until Python looks for cycles.
        refuse = functools.partial(type(self)._stay_eager, weakref.proxy(self))
        self.step: Step = CapturedStep(step, self.device, refuse) if captured else step
        self.batches = split_batches(self.data.views.num_samples, self.recipe.batch_size)
        # Batch norm cannot train on one sample.
        self.least = 2 if has_batch_norm(self.model) else 1
        self.num_draws = int(getattr(self.model, "num_draws", 0))
        result = FitResult(rules=self.rules)
        self.progress = Progress(torch.zeros((), dtype=torch.float64, device=self.device), result=result)
        self.saved_at = time.monotonic()
        weights = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        self.assumed_seconds = 4 * weights / ASSUMED_BYTES_PER_SECOND

    def run(self) -> FitResult:
        """Train to the last epoch.

        Raises:
            NumericalError: Loss, gradient norm, logits, weights or the optimiser's state are not finite. The message
                names epoch, step, lr and what to try; the best epoch so far is kept beside the state, and no state
                that is not finite is saved.
            Interrupted: A signal came, or the time limit has been reached; the state has been saved.
        """
        if not self.group.is_main:
            # Otherwise dropout would drop the same units on all ranks.
            torch.manual_seed(self.seed + (self.group.rank << 32))
        state, progress = self.session.state, self.progress
        with self.session.stop.deferred():
            if state is not None:
                load_progress(state, progress, self.model, self.optimizer, self.group, self.average)
            self.session.watcher.started(self.recipe.epochs, len(self.batches), progress.epoch, progress.step)
            for damaged in [] if state is None else state.damaged:
                again = "if it came from another machine, stop, copy it again and run again"
                self.session.watcher.warned(f"{damaged} is damaged, the state before it is taken; {again}")
            try:
                while progress.epoch < self.recipe.epochs:
                    self.train_epoch()
                    self.end_epoch()
                if self.recipe.epochs == 0:
                    self.judge_finished()
            except NumericalError as error:
                kept = keep_best(state, progress.result, self.group)
                raise NumericalError(f"epoch {min(progress.epoch + 1, self.recipe.epochs)}, {error}; {kept}") from None
            if self.average is not None:
                self.average.give()
        return progress.result

    def train_epoch(self) -> None:
        """Train from the current step to the end of the epoch."""
        began = time.monotonic()
        self.parallel.train()
        progress, ranks = self.progress, self.group.world_size
        order = epoch_order(self.seed, progress.epoch, self.data.views.num_samples, self.data.pairs(progress.epoch))
        check_every = 1 if self.device.type == "cpu" else STEPS_BETWEEN_CHECKS
        finite: list[Tensor] = []
        shares = self._shares(order)
        batches = self.data.batches(progress.epoch, [share.indices for share in shares])
        for share, batch in zip(shares, batches, strict=True):
            lr = self._learning_rate(progress.step)
            set_learning_rate(self.optimizer, lr)
            try:
                loss, is_finite = self.step(self._with_draws(self._weighed(batch, share), share))
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UsageError(
                    f"batch_size: {self.recipe.batch_size}: batch norm cannot train on a single image whose map is one "
                    "pixel; set it to 2 or more"
                ) from error
            if self.average is not None:
                self.average.update(self._steps_done(progress.step))
            progress.loss_sum += loss.double() * (share.size / ranks)
            progress.step += 1
            self.session.watcher.stepped()
            finite.append(is_finite)
            wishes = (self.session.stop.after_step(), int(self._save_is_due()))
            due = len(finite) == check_every or progress.step == len(self.batches)
            if due or (self.group.is_alone and any(wishes)):
                self._check(finite, lr, *wishes)
                finite = []
        # The last check has waited for the device.
        self.session.watcher.trained(sum(share.size for share in shares), time.monotonic() - began)

    def judge_finished(self) -> None:
        """Evaluate a model that is not to be trained; the result's best is the model as it is, its epoch 0."""
        self._require_finite(self.model.state_dict())
        scores = evaluate(self.model, self.evaluation, precision=self.execution.precision, group=self.group)
        row = {"epoch": 0, "lr": 0.0, "train_loss": None, **dataclasses.asdict(scores)}
        self.progress.result.curve.append(row)
        self._keep_as_best()
        self.session.watcher.epoch_ended(row)

    def end_epoch(self) -> None:
        """Evaluate, extend the curve, keep the best weights."""
        progress = self.progress
        self.group.broadcast_(self.model.buffers())
        # An infinite running variance gives finite logits, so the scores alone would not show it.
        self._require_finite({**self.model.state_dict(), **averages(self.average)})
        with contextlib.nullcontext() if self.average is None else self.average.applied():
            row = self._score()
        self.session.watcher.epoch_ended(row)
        self._warn_at_chance(row)
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss_sum.zero_()

    def _stay_eager(self, reason: str) -> None:
        """Say that steps are not replayed from a CUDA graph; refuse where the recipe asks for it by name."""
        if self.recipe.step == "graph":
            raise UsageError(f"step: graph: a step cannot be captured here ({reason}); use auto or eager")
        if self.execution.step == "graph":
            self.execution = dataclasses.replace(self.execution, step="eager")
            self.session.watcher.warned(f"steps are eager: they cannot be captured in a CUDA graph here ({reason})")

    def _score(self) -> dict[str, Any]:
        """Evaluate the model, keep its weights if they are the best so far, and return the curve's new row."""
        progress, result = self.progress, self.progress.result
        scores = evaluate(self.model, self.evaluation, precision=self.execution.precision, group=self.group)
        self.group.sum_(progress.loss_sum)
        row = {
            "epoch": progress.epoch + 1,
            "lr": self._learning_rate(len(self.batches) - 1),
            "train_loss": float(progress.loss_sum) / self.data.views.num_samples,
            **dataclasses.asdict(scores),
        }
        best = result.best_row if result.best_epoch else None
        result.curve.append(row)
        if best is None or standing(row, self.metric) >= standing(best, self.metric):
            result.best_epoch = progress.epoch + 1
            self._keep_as_best()
        return row

    def _keep_as_best(self) -> None:
        """Copy the weights to the CPU, on rank 0."""
        if self.group.is_main:
            self.progress.result.best = published(self.model)

    def save(self) -> None:
        """Write the resumable state, if the session keeps one."""
        if self.session.state is not None:
            save_progress(self.session.state, self.progress, self.model, self.optimizer, self.group, self.average)
        self.saved_at = time.monotonic()

    def _shares(self, order: Tensor) -> list[_Share]:
        """Return this rank's samples of each step to come, from the epoch's order, `(N,)` int64."""
        shares = []
        for part in self.batches[self.progress.step :]:
            batch = order[part]
            share = self.group.share(len(batch), least=self.least)
            count = share.stop - share.start
            # A rank without samples still takes part in the reduction, with the first samples and no weight.
            rows = share if count else slice(self.least)
            shares.append(_Share(batch[rows], count, len(batch), rows))
        return shares

    def _with_draws(self, batch: Batch, share: _Share) -> Batch:
        """Add the random numbers that the model takes, if it does: those of this rank's samples."""
        if not self.num_draws:
            return batch
        draws = step_draws(self.seed, self._steps_done(self.progress.step), share.size, self.num_draws)
        return dataclasses.replace(batch, draws=send(self.device, draws[share.rows].numpy())[0])

    def _weighed(self, batch: Batch, share: _Share) -> Batch:
        """Add a batch's weight among the ranks, and the mean confidence over all their samples."""
        if self.group.is_alone:
            return batch
        mean = None
        if batch.confidence is not None:
            mean = batch.confidence.sum() * (share.count > 0)
            self.group.sum_(mean)
            mean = mean / share.size
        weight = share.count * self.group.world_size / share.size
        return dataclasses.replace(batch, weight=weight, mean_confidence=mean)

    def _save_is_due(self) -> bool:
        """Tell whether it is time to save; rank 0's clock decides."""
        state = self.session.state
        if state is None:
            return False
        seconds = self.assumed_seconds if state.seconds is None else state.seconds
        pause = max(SECONDS_BETWEEN_SAVES, seconds / SAVING_SHARE)
        return self.group.is_main and time.monotonic() - self.saved_at > pause

    def _check(self, finite: list[Tensor], lr: float, stop: int, save: int) -> None:
        """Agree with the other ranks whether losses are finite and whether to stop or save, and do so."""
        self.data.check()
        [wishes] = send(self.device, np.array([stop, save]))
        stop, save, *broken = self.group.max_(torch.cat([wishes, (~torch.stack(finite)).long()])).tolist()
        if any(broken):
            step = self.progress.step - len(broken) + broken.index(1) + 1
            raise NumericalError(f"step {step}, lr {lr:.3g}: the loss or its gradient is not finite; {ADVICE}")
        if stop or save:
            self._require_finite({**self.model.state_dict(), **moments(self.optimizer), **averages(self.average)})
            self.save()
        if stop:
            if self.session.state is not None:
                self.session.state.wait()
            epoch = f"epoch {self.progress.epoch + 1} of {self.recipe.epochs}"
            raise stopped(stop, f"in {epoch} after step {self.progress.step}")

    def _require_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise NumericalError if a tensor of any rank is not finite."""
        names = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()]
        # The largest value of all is not finite where one of them is not, and takes a few launches.
        largest = nn.utils.get_total_norm([tensors[name].detach() for name in names], math.inf).to(self.device)
        if self.group.max_((~torch.isfinite(largest)).long()):
            broken = torch.stack([~torch.isfinite(tensors[name]).all().to(self.device) for name in names]).long()
            flags = self.group.max_(broken).tolist()
            name = names[flags.index(1)]
            raise NumericalError(f"after step {self.progress.step}: {name} is not finite; {ADVICE}")

    def _learning_rate(self, step: int) -> float:
        """Return the learning rate of a step of this epoch."""
        return learning_rate(self.recipe, self._steps_done(step), len(self.batches))

    def _steps_done(self, step: int) -> int:
        """Return the steps of all epochs before a step of this one."""
        return self.progress.epoch * len(self.batches) + step

    @functools.cached_property
    def _num_present(self) -> int:
        """Classes of the split that decides; counted once, because counting waits for the device."""
        return int((self.evaluation.labels.bincount() > 0).sum())

    def _is_at_chance(self, row: Mapping[str, Any]) -> bool:
        """Tell whether an epoch gives one class for all, or has the loss and the recall of guessing.

        That is a loss of ln K, which mixing and smoothing keep others near too, and a recall that chance explains.
        """
        guessed = 1 / self._num_present
        error = math.sqrt(guessed * (1 - guessed) / len(self.evaluation.labels))  # of its recall, in even classes
        stuck = row["train_loss"] > 0.98 * math.log(self.evaluation.num_classes)
        stuck &= row["recall"] < guessed + min(guessed / 2, 3 * error)
        return stuck or is_chance(row["recall"], self._num_present)

    def _warn_at_chance(self, row: Mapping[str, Any]) -> None:
        """Warn of an epoch after warm-up that is at chance, and judge the best epoch, which is what is kept.

        It is said once; the last such epoch is what the result tells of, and the next good one clears it.
        """
        result = self.progress.result
        has_warmed_up = row["epoch"] > self.recipe.warmup_epochs
        result.at_chance = has_warmed_up and self._is_at_chance(result.best_row)
        is_first = not result.warnings
        result.warnings.clear()
        if has_warmed_up and self._is_at_chance(row):
            figures = f"train loss {row['train_loss']:.3f}, top-1 {row['top1']:.2f} %, macro recall {row['recall']:.3f}"
            advice = "if it stays there, lower lr, add warmup_epochs, or set clip to 1.0"
            still = "still " if result.at_chance else ""
            result.warnings.append(f"epoch {row['epoch']} is {still}at chance ({figures}); {advice}")
            if is_first:
                self.session.watcher.warned(result.warnings[0])
