"""Ranks that train together: their shares, what they agree on, and a run that ends like one process's."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.errors import DataError, Interrupted, NumericalError, PipelineError, UsageError
from pipeline.labels.source import TeacherAnswer
from pipeline.losses import training_loss
from pipeline.system.runtime import Ranks
from pipeline.system.stopping import StopSignal
from pipeline.training import fit as training
from pipeline.training.batches import EvaluationData
from pipeline.training.column_sum import ColumnSum, published
from pipeline.training.distributed import ALONE, Group, join
from pipeline.training.evaluation import PREDICTION_COLUMNS, Predictions, evaluate
from pipeline.training.metrics import Scores
from tests.pipeline.training.test_fit import SIZE, Watcher, make_fit
from tests.support.ranks import on_ranks

CLASSES = 3


class TwoHeads(nn.Module):
    """A student in small: no batch norm, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3 * SIZE * SIZE, 12)
        self.heads = nn.ModuleList(nn.Linear(12, CLASSES) for _ in range(2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(images.flatten(1)))
        return self.heads[0](hidden), self.heads[1](hidden)


def teacher(view: int, indices: Tensor, images: Tensor) -> TeacherAnswer:
    return TeacherAnswer(indices % CLASSES, 0.1 + 0.8 * (indices % 7) / 7)


def train_student(
    group: Group, directory: Path, micro_batch: int | None, ema: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """50 samples in batches of 16, 16, 16 and 2."""
    fit = make_fit(directory, model=TwoHeads(), teacher_labels=teacher, group=group, micro_batch=micro_batch, ema=ema)
    return fit.run().curve, fit.model.state_dict()


@given(size=st.integers(0, 300), world_size=st.integers(1, 9), least=st.integers(1, 3))
def test_shares_are_contiguous_and_equal_but_for_one(size: int, world_size: int, least: int) -> None:
    parts = [Group(Ranks(rank, world_size)).share(size, least=least) for rank in range(world_size)]
    assert [index for part in parts for index in range(size)[part]] == list(range(size))
    sizes = [part.stop - part.start for part in parts]
    assert sizes == sorted(sizes, key=lambda number: number == 0), "the last ranks get none"
    used = [number for number in sizes if number]
    assert max(used, default=0) - min(used, default=0) <= 1
    assert len(used) < 2 or min(used) >= least


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "ema"),
    [(2, None, 0.0), (2, None, 0.8), pytest.param(3, 5, 0.0, marks=pytest.mark.slow)],
)
def test_the_number_of_ranks_changes_neither_losses_nor_weights(
    tmp_path: Path, world_size: int, micro_batch: int | None, ema: float
) -> None:
    """The last of three ranks gets no sample of a batch of 2, and 6 of a batch of 16: one part more than the others."""
    curve, weights = train_student(ALONE, tmp_path, None, ema)
    for other_curve, other_weights in on_ranks(world_size, train_student, tmp_path, micro_batch, ema):
        assert [row.keys() for row in other_curve] == [row.keys() for row in curve]
        for row, other in zip(curve, other_curve, strict=True):
            assert other["top1"] == row["top1"] and other["epoch"] == row["epoch"]
            assert other["train_loss"] == pytest.approx(row["train_loss"], abs=1e-6)
            assert other["loss"] == pytest.approx(row["loss"], abs=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=1e-5)


def predict(group: Group) -> tuple[Scores, bytes]:
    """Two images, so that the last of three ranks gets none, and learns of the second head from the others."""
    torch.manual_seed(1)
    images = torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    data = EvaluationData(images, torch.tensor([0, 2]), (0.5,) * 3, (0.3,) * 3, CLASSES, torch.tensor([1, 2]))
    predictions = Predictions.of(data)
    scores = evaluate(TwoHeads(), data, group=group, predictions=predictions)
    return scores, predictions.as_csv(["a", "b", 'c,"'], data)


def test_predictions_of_ranks_are_those_of_one_process() -> None:
    scores, rows = predict(ALONE)
    assert rows.count(b"\n") == 3 and b'"c,"""' in rows and b",," not in rows
    for other_scores, other_rows in on_ranks(3, predict):
        assert other_rows == rows
        assert other_scores.top1 == scores.top1 and other_scores.distillation_top1 == scores.distillation_top1


def test_the_paths_of_images_are_a_last_column_where_there_are_any() -> None:
    data = EvaluationData(
        torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), torch.tensor([0, 2]), (0.5,) * 3, (0.3,) * 3, CLASSES
    )
    predictions = Predictions.of(data)
    names = ["a", "b", "c"]
    assert predictions.as_csv(names, data, ["cat/1.png", "dog/a, b.png"]).decode().splitlines() == [
        "sample,target,prediction,probability,class_head,distillation_head,teacher,path",
        "0,a,a,0.0000,a,,,cat/1.png",
        '1,c,a,0.0000,a,,,"dog/a, b.png"',
    ]
    first = predictions.as_csv(names, data).decode().splitlines()
    assert first[0] == ",".join(PREDICTION_COLUMNS) and first[1] == "0,a,a,0.0000,a,,"


def train_with_batch_norm(group: Group, directory: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor], int, float]:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Linear(12, CLASSES)
    )
    fit = make_fit(directory, model=model, batch_size=47, group=group)  # then a batch of 3, too small for two ranks
    result = fit.run()
    return result.curve, fit.model.state_dict(), len(result.best), torch.rand(()).item()


def test_ranks_have_the_same_weights_and_statistics_also_with_batch_norm_and_dropout(tmp_path: Path) -> None:
    one, other = on_ranks(2, train_with_batch_norm, tmp_path)
    curve, weights, num_best, drawn = one
    other_curve, other_weights, num_other_best, other_drawn = other
    assert curve == other_curve
    assert all(math.isfinite(row["train_loss"]) for row in curve)
    assert {name.split(".")[0] for name in weights} == {"1", "2", "4"}, "checkpoints know nothing of ranks"
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert drawn != other_drawn, "each rank drops other units out"
    assert (num_best, num_other_best) == (len(weights), 0), "rank 0 alone keeps the best epoch"


class Pretext(TwoHeads):
    """Has a layer that the loss knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(12, 2)


def train_with_an_unused_layer(group: Group, directory: Path) -> dict[str, Tensor]:
    fit = make_fit(directory, model=Pretext(), teacher_labels=teacher, group=group, micro_batch=4, may_skip=True)
    fit.run()
    return fit.model.state_dict()


def test_a_layer_without_a_part_in_the_loss_stops_no_ranks(tmp_path: Path) -> None:
    alone = train_with_an_unused_layer(ALONE, tmp_path)
    for weights in on_ranks(2, train_with_an_unused_layer, tmp_path):
        for name, tensor in alone.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)


def train_column_sum(group: Group, directory: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    summed = ColumnSum(nn.Linear(9 * 4, 12), 9)
    body = (nn.AvgPool2d(SIZE), nn.Conv2d(3, 4, 1), nn.Flatten())
    model = nn.Sequential(*body, summed, nn.Tanh(), nn.Linear(12, CLASSES))
    make_fit(directory, model=model, group=group, weight_decay=0.3, clip=0.1).run()
    return published(model)


def test_the_gradients_of_a_column_sum_are_averaged_before_they_are_clipped(tmp_path: Path) -> None:
    alone = train_column_sum(ALONE, tmp_path)
    for weights in on_ranks(2, train_column_sum, tmp_path):
        for name, tensor in alone.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)


def train_until_stopped(
    group: Group, directory: Path, stop_at: int | None, saving: bool
) -> tuple[str, list[dict[str, Any]], dict[str, Tensor], tuple[int, int]]:
    """Train with dropout; rank 1 alone gets a signal."""
    stop = StopSignal()
    watcher = Watcher(stop, stop_at if group.rank == 1 else None)
    fit = make_fit(directory, watcher=watcher, stop=stop, group=group, optimizer="adamw", lr=0.01, ema=0.9)
    if saving:
        training.SECONDS_BETWEEN_SAVES, training.SAVING_SHARE = 0.0, math.inf
    said = ""
    try:
        fit.run()
    except Interrupted as stopped:
        assert stopped.exit_code == 128 + signal.SIGTERM
        said = str(stopped)
    return said, fit.progress.result.curve, fit.model.state_dict(), watcher.began


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_they_go_on_alike(tmp_path: Path) -> None:
    whole = on_ranks(2, train_until_stopped, tmp_path / "whole", None, False)
    stopped = on_ranks(2, train_until_stopped, tmp_path / "cut", 6, False)
    assert [said for said, *_ in stopped] == [stopped[0][0]] * 2 and "epoch 2 of 4 after step 2" in stopped[0][0]
    resumed = on_ranks(2, train_until_stopped, tmp_path / "cut", None, True)
    for (_, curve, weights, _), (said, other_curve, other_weights, began) in zip(whole, resumed, strict=True):
        assert said == "" and began == (1, 2)
        for row, other in zip(curve, other_curve, strict=True):
            assert other == {**row, "train_loss": pytest.approx(row["train_loss"], rel=1e-12)}
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def train_to_a_loss_that_is_not_finite(group: Group, directory: Path) -> None:
    calls = 0

    def objective(outputs: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        # No gradient: nothing but the flag tells the other rank.
        return training_loss(outputs, batch) + (math.inf if calls == 6 and group.rank == 1 else 0.0)

    make_fit(directory, model=TwoHeads(), teacher_labels=teacher, objective=objective, group=group).run()


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_the_same_line(tmp_path: Path) -> None:
    errors = on_ranks(2, train_to_a_loss_that_is_not_finite, tmp_path)
    assert all(isinstance(error, NumericalError) for error in errors)
    assert str(errors[0]) == str(errors[1])
    assert "epoch 2, step 2" in str(errors[0]) and str(tmp_path / "last-good.safetensors") in str(errors[0])


def work_on_main(group: Group) -> list[Any]:
    """Rank 0 works longer than an operation of all ranks may take."""
    results: list[Any] = [group.on_main(lambda: time.sleep(1.5) or {"rank": group.rank})]
    order: list[int] = []
    group.main_first(lambda: order.append(time.monotonic_ns()))
    results += [order[0]]
    group.sum_(total := torch.tensor([group.rank + 1.0]))
    results += [total.item(), [gathered.item() for gathered in group.gather(torch.tensor(group.rank))]]

    def fail() -> None:
        raise DataError("broken")

    try:
        group.on_main(fail)
    except PipelineError as error:
        results.append((error.exit_code, str(error)))
    return results


def test_ranks_wait_for_rank_0_however_long_and_learn_what_it_failed_of() -> None:
    first, second = on_ranks(2, work_on_main, seconds=1)
    assert first[0] == second[0] == {"rank": 0}
    assert first[1] < second[1]
    assert first[2:4] == second[2:4] == [3.0, [0, 1]]
    assert first[4] == (3, "broken") and second[4] == (3, "rank 0: broken")


def gather(group: Group) -> list[Any]:
    return group.gather_json({"rank": "é" * group.rank, "lr": 0.1})


def test_ranks_learn_each_others_json_of_any_length() -> None:
    expected = [{"rank": "", "lr": 0.1}, {"rank": "é", "lr": 0.1}]
    assert on_ranks(2, gather) == [expected, expected] and gather(ALONE) == expected[:1]


@pytest.mark.parametrize(
    ("device", "variables", "words"),
    [
        ("cpu", {}, "MASTER_ADDR is not set, but WORLD_SIZE=2 is"),
        ("meta", {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "--device meta: WORLD_SIZE=2 ranks train on cpu or"),
        ("cuda:0", {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "--device cuda:0: .* would share a GPU"),
    ],
)
def test_what_cannot_become_a_group_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, variables: dict[str, str], words: str
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words), join(torch.device(device)):
        pass


def test_without_torchrun_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join(torch.device("cpu")) as group:
        assert group.is_alone and group.is_main and not torch.distributed.is_initialized()
        assert group.on_main(lambda: (1, 2)) == group.main_first(lambda: (1, 2)) == (1, 2)
