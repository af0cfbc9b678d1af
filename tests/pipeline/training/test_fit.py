"""The fit loop: order, resumption, faults, and cached labels against a teacher that is asked."""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.recipes import FitRecipe, ViewRecipe
from pipeline.errors import DataError, Interrupted, NumericalError, UsageError
from pipeline.labels.cache import LabelCache, make_identity, make_provenance
from pipeline.labels.source import OnlineLabels, TeacherLabels, cached_labels
from pipeline.labels.teacher import Teacher, label_view
from pipeline.losses import Outputs, training_loss
from pipeline.models.students import STUDENTS, Student, build_student
from pipeline.system.runtime import Ranks
from pipeline.system.stopping import StopSignal
from pipeline.training.batches import Batch, EvaluationData, TrainingData, epoch_order, split_batches, step_draws
from pipeline.training.checkpoints import RunState, load_checkpoint
from pipeline.training.distributed import ALONE, Group
from pipeline.training.evaluation import evaluate
from pipeline.training.execution import Execution
from pipeline.training.fit import Fit, Session
from pipeline.training.metrics import Scores
from pipeline.training.resuming import FitResult
from pipeline.training.step import Objective, train_step
from pipeline.views.views import Views, normalize

NUM_CLASSES, SIZE, NUM_TRAIN = 3, 8, 50
MEAN = STD = (0.5, 0.5, 0.5)
VIEW_RECIPE = ViewRecipe(count=2, crop=1, flip=True, mixing="cutmix")


def images_and_labels(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright band whose height is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (number,), generator=generator)
    images = torch.randint(0, 60, (number, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label + 1] = 250
    return images, labels


class Watcher:
    """Counts steps, keeps rows, and can send a signal at a step."""

    def __init__(self, stop: StopSignal | None = None, stop_at: int | None = None) -> None:
        self.steps, self.rows, self.warnings, self.paces = 0, [], [], []
        self.began: tuple[int, int] = (-1, -1)
        self._stop, self._stop_at = stop, stop_at

    def started(self, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        self.began = (epoch, step)

    def stepped(self) -> None:
        self.steps += 1
        if self._stop is not None and self.steps == self._stop_at:
            self._stop._handle(signal.SIGTERM, None)

    def trained(self, images: int, seconds: float) -> None:
        self.paces.append((images, seconds))

    def epoch_ended(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def warned(self, message: str) -> None:
        self.warnings.append(message)


def small_model(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout),
        nn.Linear(6 * SIZE * SIZE, NUM_CLASSES),
    )  # fmt: skip


class Bomb(nn.Module):
    """Gives NaN in the sixth training step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = small_model(), 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += self.training
        logits: Tensor = self.inner(images)
        return logits * math.nan if self.calls == 6 else logits


def evaluation() -> EvaluationData:
    images, labels = images_and_labels(30, seed=1)
    return EvaluationData(images, labels, MEAN, STD, NUM_CLASSES)


def make_fit(
    directory: Path,
    *,
    model: nn.Module | None = None,
    watcher: Watcher | None = None,
    stop: StopSignal | None = None,
    teacher_labels: TeacherLabels | None = None,
    objective: Objective = training_loss,
    group: Group = ALONE,
    micro_batch: int | None = None,
    ema: float = 0.0,
    may_skip: bool = False,
    scored_on: EvaluationData | None = None,
    **settings: Any,
) -> Fit:
    recipe = FitRecipe(**{"epochs": 4, "batch_size": 16, "lr": 0.05, "optimizer": "sgd", "clip": 1.0, **settings})
    views = Views(*images_and_labels(NUM_TRAIN, seed=0), VIEW_RECIPE)
    return Fit(
        model=model or small_model(),
        data=TrainingData(views, MEAN, STD, VIEW_RECIPE.count, teacher_labels),
        evaluation=scored_on or evaluation(),
        objective=objective,
        recipe=recipe,
        seed=3,
        ema=ema,
        may_skip=may_skip,
        execution=Execution(micro_batch=micro_batch, group=group),
        session=Session(RunState(directory, "fingerprint"), watcher or Watcher(), stop or StopSignal()),
    )


def run(directory: Path, **settings: Any) -> tuple[FitResult, dict[str, Tensor]]:
    torch.manual_seed(7)
    fit = make_fit(directory, **settings)
    result = fit.run()
    return result, fit.model.state_dict()


def test_training_learns_and_keeps_the_best_epoch(tmp_path: Path) -> None:
    result, _ = run(tmp_path, epochs=8)
    assert len(result.curve) == 8
    best = max(row["top1"] for row in result.curve)
    assert best > 80.0
    assert result.curve[result.best_epoch - 1]["top1"] == best
    ties = [row for row in result.curve if row["top1"] == best]
    assert result.best_epoch == min(reversed(ties), key=lambda row: row["loss"])["epoch"]
    model = small_model()
    model.load_state_dict(result.best)
    assert evaluate(model, evaluation()).top1 == best


class Told(nn.Module):
    """Answers to the evaluation split as told, epoch by epoch: how many of its images rightly, and how surely."""

    def __init__(self, answers: list[tuple[int, float]]) -> None:
        super().__init__()
        self.bias, self.answers = nn.Parameter(torch.zeros(NUM_CLASSES)), iter(answers)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            return self.bias.expand(len(images), -1)
        num_right, sureness = next(self.answers)
        labels = evaluation().labels
        labels = torch.where(torch.arange(len(labels)) < num_right, labels, (labels + 1) % NUM_CLASSES)
        return sureness * nn.functional.one_hot(labels, NUM_CLASSES).float()


@pytest.mark.parametrize(
    ("answers", "best"),
    [
        ([(20, 0.5), (20, 1.4), (20, 0.9)], 2),  # of equal top-1 the lower loss; ln 4 is the best sureness
        ([(30, 4.0), (30, 1.0), (20, 4.0)], 1),  # also where it came first
        ([(20, 1.0), (20, 1.0), (20, 1.0)], 3),  # of equal loss too the last
        ([(20, 1.0), (21, 0.1), (20, 1.0)], 2),  # the metric counts more than the loss
        ([(20, 0.0), (10, 0.0), (0, 0.0)], 3),  # without any sureness all predict class 0 at the same loss
    ],
)
def test_of_epochs_that_tie_the_lower_loss_counts_and_then_the_later(
    tmp_path: Path, answers: list[tuple[int, float]], best: int
) -> None:
    result, _ = run(tmp_path, model=Told(answers), epochs=3)
    assert result.best_epoch == best
    for row, (num_right, sureness) in zip(result.curve, answers, strict=True):
        right, wrong = (math.log(math.exp(sureness) + 2) - gain for gain in (sureness, 0.0))
        expected = (num_right * right + (30 - num_right) * wrong) / 30
        assert row["loss"] == pytest.approx(expected, rel=1e-5), "the mean cross-entropy, by hand"


def test_a_run_that_began_under_other_rules_keeps_their_number(tmp_path: Path) -> None:
    def interrupted(directory: Path, rules: int) -> None:
        stop = StopSignal()
        fit = make_fit(directory, stop=stop, watcher=Watcher(stop, 6))
        fit.rules = fit.progress.result.rules = rules
        with pytest.raises(Interrupted):
            fit.run()

    def ended(directory: Path, rules: int) -> int:
        fit = make_fit(directory)
        fit.rules = fit.progress.result.rules = rules
        return fit.run().rules

    interrupted(tmp_path / "former", 1)
    assert ended(tmp_path / "former", 2) == 1
    interrupted(tmp_path / "new", 2)
    assert ended(tmp_path / "new", 2) == ended(tmp_path / "whole", 2) == 2


def test_a_run_shorter_than_a_minute_leaves_no_state(tmp_path: Path) -> None:
    run(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_two_runs_are_equal_to_the_bit(tmp_path: Path) -> None:
    first, last = run(tmp_path / "a")
    again, last_again = run(tmp_path / "b")
    assert first.curve == again.curve
    assert all(torch.equal(last[name], last_again[name]) for name in last)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("stop_at", [1, 4, 6, 16])
def test_a_stopped_run_ends_like_an_unbroken_one(tmp_path: Path, optimizer: str, stop_at: int) -> None:
    settings: dict[str, Any] = {"optimizer": optimizer, "lr": 0.002}
    whole, last = run(tmp_path / "whole", **settings)
    stop = StopSignal()
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "cut", stop=stop, watcher=Watcher(stop, stop_at), **settings)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert "run the same command again" in str(stopped.value)
    watcher = Watcher()
    torch.manual_seed(99)
    resumed = make_fit(tmp_path / "cut", watcher=watcher, **settings)
    result = resumed.run()
    assert watcher.began == divmod(stop_at, 4) or watcher.began == (stop_at // 4 - 1, 4)
    assert watcher.steps == 16 - stop_at
    assert result.curve == whole.curve
    assert result.best_epoch == whole.best_epoch
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, last[name]), name
    for name, tensor in whole.best.items():
        assert torch.equal(result.best[name], tensor), name


def test_the_pace_is_of_the_images_trained_and_of_their_steps_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [0.0]
    monkeypatch.setattr("pipeline.training.fit.time", SimpleNamespace(monotonic=lambda: seconds[0]))

    def slowly(*arguments: Any, **options: Any) -> Scores:
        seconds[0] += 1000.0
        return evaluate(*arguments, **options)

    monkeypatch.setattr("pipeline.training.fit.evaluate", slowly)

    class Timed(Watcher):
        def stepped(self) -> None:
            seconds[0] += 1.0
            super().stepped()

    stop = StopSignal()
    first, second = Timed(stop, 6), Timed()
    with pytest.raises(Interrupted):
        run(tmp_path, stop=stop, watcher=first)
    run(tmp_path, watcher=second)
    assert first.paces == [(50, 4.0)]
    assert second.paces == [(18, 2.0), (50, 4.0), (50, 4.0)]


def test_a_channels_last_model_is_resumed_with_its_moments_in_the_same_layout(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return small_model().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    _, last = run(tmp_path / "whole", model=model(), optimizer="adamw", lr=0.01)
    stop = StopSignal()
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", model=model(), stop=stop, watcher=Watcher(stop, 6), optimizer="adamw", lr=0.01)
    _, resumed = run(tmp_path / "cut", model=model(), optimizer="adamw", lr=0.01)
    assert all(torch.equal(resumed[name], last[name]) for name in last)


def test_moments_of_a_version_that_grouped_the_parameters_otherwise_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, settings = StopSignal(), {"optimizer": "adamw", "decay": "matrices"}
    with pytest.raises(Interrupted):
        run(tmp_path, stop=stop, watcher=Watcher(stop, 6), **settings)
    monkeypatch.setattr("pipeline.training.optimization.decayed", lambda model: {"0.weight"})
    with pytest.raises(DataError, match=r"is of shape .* grouped the parameters otherwise; --fresh starts over"):
        run(tmp_path, **settings)


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_parts_of_a_batch_have_its_loss_gradients_and_weights(student: str, clip: float) -> None:
    images, labels = images_and_labels(13, seed=5)
    teacher_labels, confidence = labels.roll(1), torch.linspace(0.1, 0.9, 13)
    batch = Batch(
        labels, labels.roll(2), torch.linspace(0.2, 1.0, 13), teacher_labels, confidence, confidence.mean(),
        images=normalize(images, MEAN, STD),
    )  # fmt: skip

    def step(micro_batch: int | None) -> tuple[Tensor, nn.Module]:
        torch.manual_seed(0)
        model = build_student(student, num_classes=NUM_CLASSES, image_size=SIZE, patch_size=4, width=12, depth=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        settings: dict[str, Any] = {"clip": clip, "precision": "fp32", "micro_batch": micro_batch}
        loss, finite = train_step(model, batch, training_loss, optimizer, **settings)
        assert finite
        return loss, model

    loss, model = step(None)
    for micro_batch in (1, 5, 12, 13, 100):
        exact = micro_batch >= 13
        other_loss, other = step(micro_batch)
        assert torch.equal(loss, other_loss) if exact else abs(loss - other_loss) < 1e-6
        for parameter, others in zip(model.parameters(), other.parameters(), strict=True):
            assert parameter.grad is not None and others.grad is not None
            tolerance = 0.0 if exact else 1e-6
            torch.testing.assert_close(others.grad, parameter.grad, rtol=0, atol=tolerance)
            torch.testing.assert_close(others, parameter, rtol=0, atol=tolerance)


class Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how often each parameter is converted to bfloat16."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_parameter: Counter[Tensor] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._to_copy and isinstance(args[0], nn.Parameter):
            self.by_parameter[args[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("student", ["vit", "titn"])
def test_a_weight_is_converted_to_bfloat16_once_a_step_whatever_its_parts(student: str) -> None:
    images, labels = images_and_labels(8, seed=5)
    batch = Batch(labels, labels.roll(2), torch.ones(8), labels, images=normalize(images, MEAN, STD))
    model = build_student(student, num_classes=NUM_CLASSES, image_size=SIZE, patch_size=4, width=12, depth=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def gradients(part: Batch) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(part.images)
        (training_loss(outputs, part) * len(part) / 8).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = [sum(grads) for grads in zip(*(gradients(part) for part in batch.split(2)), strict=True)]
    with Casts() as casts:
        train_step(model, batch, training_loss, optimizer, clip=0.0, precision="bf16", micro_batch=2)
    assert casts.by_parameter and set(casts.by_parameter.values()) == {1}
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


def dropping(name: str = "titn") -> Student:
    torch.manual_seed(0)
    sizes = {"image_size": SIZE, "patch_size": 4, "width": 12, "depth": 2, "pixel_width": 4}
    return build_student(name, num_classes=NUM_CLASSES, drop_path=0.5, **sizes)


@pytest.mark.parametrize("student", ["vit", "titn"])
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_a_stopped_run_with_stochastic_depth_and_groups_of_decay_ends_like_an_unbroken_one(
    tmp_path: Path, student: str, decay: str
) -> None:
    settings: dict[str, Any] = {"optimizer": "adamw", "lr": 0.002, "decay": decay, "weight_decay": 0.1, "epochs": 2}
    whole, last = run(tmp_path / "whole", model=dropping(student), **settings)
    stop = StopSignal()
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", model=dropping(student), stop=stop, watcher=Watcher(stop, 3), **settings)
    torch.manual_seed(99)
    resumed = make_fit(tmp_path / "cut", model=dropping(student), **settings)
    torch.manual_seed(100)
    assert resumed.run().curve == whole.curve
    assert all(torch.equal(tensor, last[name]) for name, tensor in resumed.model.state_dict().items())
    other = "all" if decay == "matrices" else "matrices"
    assert run(tmp_path / "other", model=dropping(student), **{**settings, "decay": other})[0].curve != whole.curve


def test_stochastic_depth_drops_the_same_whatever_the_parts_of_a_batch_and_the_generator(tmp_path: Path) -> None:
    def curve(directory: str, **settings: Any) -> list[float]:
        return [row["train_loss"] for row in run(tmp_path / directory, model=dropping(), epochs=2, **settings)[0].curve]

    whole = curve("whole")
    assert curve("parts", micro_batch=5) == pytest.approx(whole, abs=1e-5)
    assert step_draws(3, 7, 4, 2).equal(step_draws(3, 7, 9, 2)[:4]), "a sample's draws are its own"
    assert not step_draws(3, 7, 4, 2).equal(step_draws(3, 8, 4, 2))
    assert not step_draws(3, 7, 4, 2).equal(step_draws(4, 7, 4, 2))
    fit = make_fit(tmp_path / "drawn", model=dropping())
    fit.progress.epoch, fit.progress.step = 1, 2
    [share, *_] = fit._shares(epoch_order(3, 1, NUM_TRAIN))
    batch = next(fit.data.batches(1, [share.indices]))
    assert torch.equal(fit._with_draws(batch, share).draws, step_draws(3, 4 + 2, 16, 4))  # type: ignore[arg-type]


def test_each_rank_gets_its_samples_draws(tmp_path: Path) -> None:
    fit = make_fit(tmp_path, model=dropping())
    fit.group = Group(Ranks(2, 4, 2))
    *_, last = shares = fit._shares(epoch_order(3, 0, NUM_TRAIN))
    assert [share.rows for share in shares] == [slice(8, 12)] * 3 + [slice(1)]
    assert (last.count, last.size) == (0, 2), "of the last two samples it has none, and takes part with the first"
    for share in shares:
        batch = next(fit.data.batches(0, [share.indices]))
        drawn = fit._with_draws(batch, share).draws
        assert drawn is not None and torch.equal(drawn, step_draws(3, 0, share.size, 4)[share.rows])


def test_state_is_saved_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr("pipeline.training.fit.time.monotonic", tick)
    saved: list[float] = []
    fit = make_fit(tmp_path, epochs=50)
    monkeypatch.setattr(fit.session.state, "save", lambda *arguments: saved.append(clock[0]))
    fit.run()
    assert len(saved) >= 2
    assert all(60.0 <= later - earlier <= 70.0 for earlier, later in itertools.pairwise(saved))


def test_a_run_without_a_state_ends_alike_and_writes_nothing(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    torch.manual_seed(7)
    plain = make_fit(tmp_path / "nowhere")
    plain.session = dataclasses.replace(plain.session, state=None)
    assert plain.run().curve == whole.curve
    stop = StopSignal()
    stopped = make_fit(tmp_path / "nowhere", stop=stop, watcher=Watcher(stop, stop_at=2))
    broken = make_fit(tmp_path / "nowhere", model=Bomb())
    for fit in (stopped, broken):
        fit.session = dataclasses.replace(fit.session, state=None)
    with pytest.raises(Interrupted):
        stopped.run()
    with pytest.raises(NumericalError, match=r"epoch 2, step 2, .* nothing is kept"):
        broken.run()
    assert not (tmp_path / "nowhere").exists()


def test_a_loss_that_is_not_finite_names_epoch_step_and_rate(tmp_path: Path) -> None:
    with pytest.raises(NumericalError) as error:
        run(tmp_path, model=Bomb())
    message = str(error.value)
    assert "epoch 2, step 2, lr 0.0" in message
    assert "lower lr" in message
    assert "\n" not in message
    kept = tmp_path / "last-good.safetensors"
    assert str(kept) in message
    assert kept.is_file()


def test_a_running_variance_that_is_not_finite_is_not_kept_though_its_logits_are(tmp_path: Path) -> None:
    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = small_model(), 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += self.training
            logits: Tensor = self.inner(images)
            if self.calls == 8:
                self.inner[1].running_var = torch.full((6,), math.inf)
            return logits

    with pytest.raises(NumericalError, match=r"epoch 2, after step 4: inner\.1\.running_var is not finite"):
        run(tmp_path, model=Overflow())
    kept = load_checkpoint(tmp_path / "last-good.safetensors").tensors
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())


@pytest.mark.parametrize("poison", [math.nan, -math.inf])
def test_one_weight_that_is_not_finite_is_named(poison: float, tmp_path: Path) -> None:
    fit = make_fit(tmp_path)
    with torch.no_grad():
        fit.model[5].weight[1, 200] = poison
    with pytest.raises(NumericalError, match=r"after step 0: 5\.weight is not finite"):
        fit._require_finite(fit.model.state_dict())


def test_a_teacher_that_is_asked_ends_the_run_where_its_logits_are_not_finite(tmp_path: Path) -> None:
    class Broken(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.flatten(1)) + torch.tensor([0.0, 0.0, math.nan])  # argmax takes it

    source = OnlineLabels(Teacher(Broken(3 * SIZE**2, NUM_CLASSES).eval(), MEAN, STD, "fp32", batch_size=16))
    with pytest.raises(NumericalError, match="epoch 1, labelling: a logit of the teacher is not finite"):
        run(tmp_path, teacher_labels=source)
    source.check()


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    class Cliff(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * math.inf

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_model()

        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = Cliff.apply(self.inner(images))
            return result

    with pytest.raises(NumericalError, match="epoch 1, step 1"):
        run(tmp_path, model=Model())


def test_logits_that_are_not_finite_are_not_scored() -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.full((len(images), NUM_CLASSES), math.nan)

    with pytest.raises(NumericalError, match="logit"):
        evaluate(Broken(), evaluation())


def test_a_run_that_stays_at_chance_is_warned_about_once_and_marked(tmp_path: Path) -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(NUM_CLASSES))

        def forward(self, images: Tensor) -> Tensor:
            return self.bias.expand(len(images), -1) * 0.0

    watcher = Watcher()
    result, _ = run(tmp_path, model=Dead(), watcher=watcher)
    assert result.at_chance
    assert len(result.warnings) == len(watcher.warnings) == 1
    assert "lower lr" in result.warnings[0]
    learned, _ = run(tmp_path / "other")
    assert not learned.at_chance


def test_what_is_kept_is_judged_and_an_epoch_at_chance_behind_it_is_a_warning(tmp_path: Path) -> None:
    result, _ = run(tmp_path, model=Told([(20, 2.0), (20, 0.0), (0, 0.0)]), epochs=3, lr=1e-9)
    assert result.best_epoch == 1 and not result.at_chance
    assert [warning.partition(" (")[0] for warning in result.warnings] == ["epoch 3 is at chance"]


def test_batch_norm_over_one_value_names_the_batch_size(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 4), nn.BatchNorm1d(4), nn.Linear(4, NUM_CLASSES))
    with pytest.raises(UsageError, match=r"^batch_size: 1: batch norm cannot train on a single image .* 2 or more$"):
        run(tmp_path, model=model, batch_size=1)


@pytest.mark.parametrize(
    ("share", "number", "at_chance"), [(0.36, 600, True), (0.40, 600, False), (0.40, 60, True), (0.55, 60, False)]
)
def test_what_is_better_than_chance_explains_is_not_at_chance_whatever_its_loss(
    tmp_path: Path, share: float, number: int, at_chance: bool
) -> None:
    """Mixing and smoothing keep a loss near ln K. Chance explains 0.058 more than 1/3 of 600 images, 0.167 of 60."""

    class Faint(nn.Module):
        """Sees the class, and hardly says so."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1e-3))

        def forward(self, images: Tensor) -> Tensor:
            return images.mean((1, 3))[:, [1, 3, 5]] * self.scale

    images, seen = images_and_labels(number, seed=3)
    labels = torch.where(torch.arange(number) < share * number, seen, (seen + 1) % NUM_CLASSES)
    watcher, scored_on = Watcher(), EvaluationData(images, labels, MEAN, STD, NUM_CLASSES)
    result, _ = run(tmp_path, model=Faint(), watcher=watcher, scored_on=scored_on, lr=1e-9)
    last = result.curve[-1]
    assert last["train_loss"] > 0.98 * math.log(NUM_CLASSES) and last["top1"] == pytest.approx(100 * share, abs=0.2)
    assert result.at_chance == at_chance
    told = [f"epoch {last['epoch']} is still at chance"] if at_chance else []
    assert [warning.partition(" (")[0] for warning in result.warnings] == told
    assert len(watcher.warnings) == len(told)


def test_a_model_that_gives_one_class_for_all_is_at_chance_however_common_that_class_is(tmp_path: Path) -> None:
    """Of 95/5 data it has 95 % top-1 and a loss far below ln K; its macro recall is 1 / K all the same."""

    class Commonest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(NUM_CLASSES))

        def forward(self, images: Tensor) -> Tensor:
            return (self.bias + torch.tensor([4.0, 1.0, 0.0])).expand(len(images), -1)

    images, labels = images_and_labels(100, seed=2)
    labels = torch.where(torch.arange(100) < 95, 0, 1)  # of class 2 there is none
    watcher, common = Watcher(), EvaluationData(images, labels, MEAN, STD, NUM_CLASSES)
    low = {"objective": lambda *given: training_loss(*given) * 0.01, "lr": 1e-9}
    result, _ = run(tmp_path, model=Commonest(), watcher=watcher, scored_on=common, **low)
    assert (
        result.curve[-1]["train_loss"] < 0.1 and result.curve[-1]["top1"] == 95.0 and result.curve[-1]["recall"] == 0.5
    )
    assert result.at_chance and "macro recall 0.500" in watcher.warnings[0]


@pytest.mark.parametrize(
    ("number", "size", "expected"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (5, 8, [5]), (8, 4, [4, 4]), (1, 4, [1])],
)
def test_a_last_batch_of_one_joins_the_one_before(number: int, size: int, expected: list[int]) -> None:
    parts = split_batches(number, size)
    assert [part.stop - part.start for part in parts] == expected
    assert [index for part in parts for index in range(number)[part]] == list(range(number))


def test_the_order_is_a_permutation_keyed_by_seed_and_epoch() -> None:
    order = epoch_order(0, 0, 100)
    assert sorted(order.tolist()) == list(range(100))
    torch.manual_seed(5)
    assert torch.equal(order, epoch_order(0, 0, 100))
    assert not torch.equal(order, epoch_order(0, 1, 100))
    assert not torch.equal(order, epoch_order(1, 0, 100))


def test_a_student_cycles_through_its_views_and_a_teacher_does_not() -> None:
    views = Views(*images_and_labels(NUM_TRAIN, seed=0), VIEW_RECIPE)

    def images(data: TrainingData, epoch: int) -> Tensor:
        [batch] = data.batches(epoch, [torch.arange(6)])
        return batch.images

    student = TrainingData(views, MEAN, STD, VIEW_RECIPE.count)
    assert torch.equal(images(student, 0), images(student, 2))
    teacher = TrainingData(views, MEAN, STD)
    assert not torch.equal(images(teacher, 0), images(teacher, 2))


def test_cached_and_online_labels_give_the_same_loss_at_every_step(tmp_path: Path) -> None:
    # Its normalisation is another one than the student's.
    teacher = Teacher(small_model(0.0).eval(), (0.1, 0.5, 0.3), (0.2, 0.4, 0.1), "fp32", batch_size=7)
    views = Views(*images_and_labels(NUM_TRAIN, seed=0), VIEW_RECIPE)
    identity = make_identity(
        dataset_sha256="0" * 64,
        split="train",
        view_recipe=VIEW_RECIPE,
        class_names="abc",
        num_samples=NUM_TRAIN,
    )
    provenance = make_provenance(
        teacher="small",
        checkpoint_sha256="0" * 64,
        mean=MEAN,
        std=STD,
        precision="fp32",
        device="cpu",
        versions={},
    )
    rows = np.stack([label_view(teacher, views, view).labels for view in range(VIEW_RECIPE.count)]).astype(np.uint8)
    cache = LabelCache(labels=rows, clean={}, canaries=(), identity=identity, provenance=provenance)
    assert len(np.unique(rows)) > 1

    def losses(teacher_labels: TeacherLabels, directory: Path) -> list[float]:
        torch.manual_seed(0)
        seen: list[float] = []
        model = build_student(
            "titn", num_classes=NUM_CLASSES, image_size=SIZE, patch_size=4, pixel_size=2, width=12, depth=1
        )

        def recording(outputs: Outputs, batch: Batch) -> Tensor:
            loss = training_loss(outputs, batch)
            seen.append(loss.item())
            return loss

        make_fit(directory, model=model, teacher_labels=teacher_labels, objective=recording).run()
        return seen

    cached = losses(cached_labels(cache, torch.device("cpu")), tmp_path / "cached")
    online = losses(OnlineLabels(teacher), tmp_path / "online")
    assert len(cached) == 16
    assert cached == pytest.approx(online, abs=1e-6)
