"""The moving average of the weights: its arithmetic, and runs that evaluate and keep it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.errors import Interrupted, NumericalError
from pipeline.system.stopping import StopSignal
from pipeline.training.checkpoints import RunState, load_checkpoint
from pipeline.training.evaluation import evaluate
from pipeline.training.fit import Fit
from pipeline.training.optimization import MovingAverage
from tests.pipeline.training.test_fit import Watcher, evaluation, make_fit, run, small_model
from tests.support import commands
from tests.support.project import Project

DECAY = 0.9
NUM_STEPS = 16  # of four epochs


class Recorder(Watcher):
    """Keeps the weights after every step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self.weights = [self._now()]

    def stepped(self) -> None:
        super().stepped()
        self.weights.append(self._now())

    def _now(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._model.named_parameters()}


def averages(recorded: list[dict[str, Tensor]], decay: float) -> list[dict[str, Tensor]]:
    """Return the average after each step, by the formula in float64."""
    expected = [{name: tensor.double() for name, tensor in recorded[0].items()}]
    for done, weights in enumerate(recorded[1:]):
        kept = min(decay, (1 + done) / (10 + done))
        expected.append({name: kept * old + (1 - kept) * weights[name] for name, old in expected[-1].items()})
    return expected


def assert_is_average(weights: Mapping[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert weights[name].dtype == torch.float32
        torch.testing.assert_close(weights[name].double(), tensor, rtol=0, atol=1e-6)


def test_the_average_follows_the_formula() -> None:
    weight = nn.Parameter(torch.tensor([8.0]))
    average = MovingAverage(nn.ParameterList([weight]), 0.25)
    averaged = []
    for step, value in enumerate([18.0, 7.0, 3.0, 43.0]):
        weight.data.fill_(value)
        average.update(step)
        averaged.append(average.tensors["0"].item())
    # Kept of the old value: 1/10, 2/11, 3/12, and 1/4 in place of 4/13.
    second = 17.0 * 2 / 11 + 7.0 * 9 / 11
    third = 0.25 * second + 0.75 * 3.0
    assert averaged == pytest.approx([0.1 * 8.0 + 0.9 * 18.0, second, third, 0.25 * third + 0.75 * 43.0], rel=1e-6)


def test_a_constant_decay_is_that_of_torchs_own_averaged_model() -> None:
    model, generator = small_model(), torch.Generator().manual_seed(0)
    average = MovingAverage(model, 0.1)  # the warm-up starts at 0.1, so it never lowers this decay
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.1))
    torchs.n_averaged.fill_(1)  # so that the first update does not copy the weights
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        average.update(step)
        torchs.update_parameters(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with average.applied():
        for name, tensor in torchs.module.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_run_evaluates_and_keeps_the_average_and_trains_as_it_does_without(tmp_path: Path) -> None:
    plain, _ = run(tmp_path, model=small_model())
    model = small_model()
    recorder = Recorder(model)
    result, last = run(tmp_path, model=model, watcher=recorder, ema=DECAY)
    assert [row["train_loss"] for row in result.curve] == [row["train_loss"] for row in plain.curve]
    expected = averages(recorder.weights, DECAY)
    assert len(expected) == 1 + NUM_STEPS
    assert_is_average(last, expected[-1])
    assert_is_average(result.best, expected[4 * result.best_epoch])
    assert (recorder.weights[-1]["0.weight"] - last["0.weight"]).abs().max() > 1e-4
    for weights, row in ((last, result.curve[-1]), (result.best, result.curve[result.best_epoch - 1])):
        model.load_state_dict(weights)
        scores = evaluate(model, evaluation())
        assert scores.loss == pytest.approx(row["loss"], abs=1e-7) and scores.top1 == row["top1"]


@pytest.mark.parametrize("stop_at", [1, 4, 6, 16])
def test_a_stopped_run_with_an_average_ends_like_an_unbroken_one(tmp_path: Path, stop_at: int) -> None:
    whole, last = run(tmp_path / "whole", ema=DECAY)
    stop = StopSignal()
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", ema=DECAY, stop=stop, watcher=Watcher(stop, stop_at))
    state = RunState(tmp_path / "cut", "fingerprint").load()
    assert state is not None
    assert not torch.equal(state.tensors["model.0.weight"], state.tensors["average.0.weight"])
    result, resumed = run(tmp_path / "cut", ema=DECAY)
    assert result.curve == whole.curve
    assert all(torch.equal(resumed[name], tensor) for name, tensor in last.items())
    assert all(torch.equal(result.best[name], tensor) for name, tensor in whole.best.items())


@pytest.mark.parametrize(("step", "where"), [(6, "epoch 2, after step 3"), (8, "epoch 2, after step 4")])
def test_an_average_that_is_not_finite_is_neither_saved_nor_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, where: str
) -> None:
    class Spoiler(Watcher):
        def stepped(self) -> None:
            super().stepped()
            if self.steps == step:
                assert fit.average is not None
                fit.average.tensors["5.bias"][1] = math.inf

    monkeypatch.setattr(Fit, "_save_is_due", lambda fit: fit.progress.step == 3)
    fit = make_fit(tmp_path, watcher=Spoiler(), ema=DECAY)
    with pytest.raises(NumericalError, match=rf"{where}: average\.5\.bias is not finite.*best epoch so far \(1\)"):
        fit.run()
    kept = [load_checkpoint(file).tensors for file in tmp_path.glob("[sl]*.safetensors")]
    assert len(kept) == (3 if step == 8 else 2), "a state of each epoch so far, and the last good weights"
    assert all(tensor.isfinite().all() for tensors in kept for tensor in tensors.values())


def test_a_student_of_a_recipe_with_an_average_is_that_average(taught: Project, tmp_path: Path) -> None:
    shutil.copytree(taught.path, tmp_path / "project")
    project = Project(tmp_path / "project")
    command = ("distill", "--student", "vit", "--labels", "none", "--set", "epochs=2", "--device", "cpu")
    for settings in ((), ("--set", "ema=0.9")):
        ended = commands.run(project.path, *command, *settings)
        assert ended.code == 0, ended.err
        assert ("EMA 0.9" in ended.out.splitlines()[0]) == bool(settings)
    outs = sorted(project.path.glob("data/runs/smoke/*"), key=lambda out: "ema" in out.name)
    plain, averaged = ([load_checkpoint(out, stem=stem) for stem in ("best", "last")] for out in outs)
    assert averaged[1].meta["training"]["ema"] == 0.9
    assert not any(
        torch.equal(tensor, averaged[1].tensors[name]) for name, tensor in plain[1].tensors.items() if tensor.dim() > 1
    )
