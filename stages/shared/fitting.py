"""What `teacher` and `distill` share: run the fit loop and write its outputs.

A run's directory holds best.safetensors and best.json (students also last.*), metrics.json, curve.csv, predictions.csv
(the best epoch's on the test split), run.json, and manifest.json with the SHA-256 of them all; beside them log.jsonl,
which grows in the run's folder of data/work meanwhile. Times, dates and the device are in run.json and log.jsonl alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.recipes import StudentRecipe
from pipeline.data.datasets import Dataset, Split
from pipeline.data.decoding import EXIF_RULE, decoders
from pipeline.data.streaming import HostImages, place_images
from pipeline.errors import DataError, NumericalError
from pipeline.labels.source import TeacherLabels
from pipeline.losses import objective
from pipeline.models.network import rounds_logits
from pipeline.models.own import is_own
from pipeline.report.progress import RunWatcher
from pipeline.report.watching import RunLog
from pipeline.system.runtime import (
    RESIDENT_VARIABLE,
    environment,
    keep_freed_memory,
    resident_limit,
    resolve_precision,
)
from pipeline.system.stopping import stopped
from pipeline.system.storage import lock, to_json
from pipeline.system.text import counted, to_csv
from pipeline.training.batches import EvaluationData, TrainingData
from pipeline.training.checkpoints import RunState, checkpoint_files
from pipeline.training.column_sum import published
from pipeline.training.cpu_convolutions import use_cpu_convolutions
from pipeline.training.distributed import Group, has_batch_norm
from pipeline.training.evaluation import Predictions, evaluate
from pipeline.training.execution import Execution
from pipeline.training.fit import Fit, Session
from pipeline.training.manifest import MANIFEST, finish_replacing, write_with_manifest
from pipeline.training.metrics import Scores, is_chance
from pipeline.training.resuming import FitResult, keep_best
from pipeline.views.views import Views
from stages.shared import kept
from stages.shared.context import Context
from stages.shared.runs import NOT_TRAINED, OUTPUTS, RESTARTED, RULES, Run, costs, disagreement
from stages.shared.watching import watch

DESCRIBED = ("teacher", "views", "soft", "confidence", "warnings", "evaluated_on", "rules")
"""Keys of metrics.json that the checkpoints' JSON has too."""


def make_views(context: Context, dataset: Dataset, view_recipe: str, *, key: str = "") -> Views:
    """Return a view recipe's views of the training set; `key` as for pipeline.views.views.Views.

    The images are put on the device. Too many for it stream, and so do those of which each view is another part; a line
    says so.
    """
    split, device, recipe = dataset.train, context.device, context.recipe.views[view_recipe]
    limit = resident_limit(device)
    where = "RAM" if isinstance(split.images, np.ndarray) else context.paths.prepared
    images: Tensor | HostImages
    if recipe.resized_crop:
        images = HostImages(split.images, device)
        context.say(f"the files of {counted(len(split), 'training image')} are decoded from {where} for every batch")
    elif isinstance(images := place_images(split.images, device, limit), HostImages):
        size = f"{split.images.nbytes / 1e9:.3g} GB of training images, more than {limit / 1e9:.3g} GB"
        context.say(f"{size}: they stream from {where} to {device} ({RESIDENT_VARIABLE} sets the limit in bytes)")
    return Views(images, torch.from_numpy(split.labels), recipe, key=key)


def evaluation_data(
    dataset: Dataset,
    split: Split,
    device: torch.device,
    described: Mapping[str, Any],
    teacher_labels: np.ndarray[Any, Any] | None = None,
) -> EvaluationData:
    """Put a split on the device; too many images for it stream.

    Args:
        dataset: Whose split it is.
        split: Clean images.
        device: Where they are evaluated.
        described: The JSON of the model's description or checkpoint, which names its own mean and std.
        teacher_labels: `(n,)` integers, or None.
    """
    return EvaluationData(
        images=place_images(split.images, device, resident_limit(device)),
        labels=torch.from_numpy(split.labels).to(device),
        mean=tuple(described["mean"]),
        std=tuple(described["std"]),
        num_classes=dataset.num_classes,
        teacher_labels=None if teacher_labels is None else torch.from_numpy(teacher_labels.astype(np.int64)).to(device),
    )


def require_same_run(group: Group, run: Run, *, fresh: bool, clean_sha256: str | None = None) -> None:
    """Check that all ranks are about to train the same run, on the same labels, before one of them begins.

    Each machine reads its own files, and gradients of different runs can be added up: nothing else would tell.

    Args:
        group: The ranks.
        run: What this rank is about to train.
        fresh: Whether it is to start over.
        clean_sha256: Digest of the teacher's labels of unaugmented images, if it is measured against them.

    Raises:
        DataError: Another rank's differ; the message, the same on every rank, names what.
    """
    if group.device is None:
        return
    mine = {"name": run.name, "fresh": fresh, "precision": resolve_precision(run.recipe.precision, group.device)}
    mine |= {"labels_sha256": run.labels_sha256, "clean_sha256": clean_sha256}
    first, *others = group.gather_json({**run.decided_by, **mine})
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise DataError(
                f"rank {rank} is about to train another run than rank 0 ({disagreement(first, other)}); give every "
                f"machine the same command, params.yaml and data/{run.description['recipe']}, or let them share storage"
            )


def up_to_date(context: Context, run: Run, group: Group, *, fresh: bool) -> bool:
    """Return whether a run's result stands, and say so. Rank 0 looks, because it alone writes.

    Raises:
        DataError: It is this run's and damaged, and no whole copy of it is kept.
    """
    result = run.result  # also for --fresh: the digest of its code is of the files as they are before the work
    if fresh:
        return False

    def look() -> str | None:
        run.finish_replacing()
        if (why := run.why_stale()) == RESTARTED:
            return why
        why = kept.mend(context, result, why)
        if why is not None:
            run.refuse_damage()
        elif run.adopt():
            context.say(f"{run.out}: no {MANIFEST}, as older versions wrote none; it names the files as they are now")
            if run.stage is not None:
                context.changed(run.stage)
        return why

    why = group.on_main(look)
    if why is None:
        group.on_main(run.clean_up)
        context.say(f"{run.name}: up to date ({run.out}); --fresh trains it again")
    elif why != NOT_TRAINED:
        context.say(f"{run.name}: trains again ({why})")
    return why is None


@dataclass(frozen=True)
class Teaching:
    """What a model's training gets from another model, its teacher; by default there is none.

    Attributes:
        labels: Gives each batch its teacher labels; None where the model does not learn from them.
        clean: The teacher's labels of the clean splits by name, `(n,)` integers.
        teacher: Its name, its SHA-256, and by its labels `top1` on the evaluation split and `test_top1`, percent.
    """

    labels: TeacherLabels | None = None
    clean: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    teacher: Mapping[str, Any] | None = None


def carry_out(
    context: Context,
    run: Run,
    model: nn.Module,
    *,
    dataset: Dataset,
    views: Views,
    execution: Execution,
    teaching: Teaching | None = None,
    fresh: bool = False,
) -> None:
    """Train a model and write its outputs, or go on where a former run stopped.

    Args:
        context: The command's setting.
        run: What to train.
        model: Initialised, on the device.
        dataset: Its evaluation split decides the best epoch; the test split is scored once, at the end.
        views: Of the training set.
        execution: How it is computed. Rank 0 of its group holds the lock and writes.
        teaching: What the model learns from its teacher, if it has one.
        fresh: Whether to ignore a saved state.

    Raises:
        Interrupted: A signal came, or the time limit has been reached.
    """
    device, group, recipe, teaching = context.device, execution.group, run.recipe, teaching or Teaching()
    ema = recipe.ema if isinstance(recipe, StudentRecipe) else 0.0
    if device.type == "cpu":
        keep_freed_memory()
        use_cpu_convolutions(model)
    # The ranks agree on whether the time is up, because their clocks differ.
    if code := int(group.max_(torch.tensor(context.stop.before_step(), device=device))):
        raise stopped(code, f"before {run.name}")
    split_name, split = dataset.evaluation
    shown = RunWatcher(context.console, run.name, split_name, context.position)
    with _claimed(run, group, fresh=fresh) as state:
        if state is None:
            context.say(f"{run.name}: up to date ({run.out}), another run has finished it meanwhile")
            return
        costs(dict(run.description), dataset.image_size)  # what cannot be counted fails before it is trained
        watchers, log = watch(context, run, execution, device, shown)
        if recipe.warmup_epochs == recipe.epochs > 0:
            watchers.warned(
                f"warmup_epochs {recipe.warmup_epochs:g} is all of its epochs: the rate reaches lr as it ends"
            )
        _say_how(context, run, model, execution, shown.name, ema)
        images = torch.zeros(2, 3, dataset.image_size, dataset.image_size, device=device)
        if execution.precision == "bf16" and is_own(run.description["model"]) and rounds_logits(model, images):
            watchers.warned(
                "its logits are rounded to bf16, so that some images' two largest are equal: define the layer that "
                "makes them last, end its attribute's name in `head`, or set precision: fp32"
            )
        evaluation = evaluation_data(dataset, split, device, run.description, teaching.clean.get(split_name))
        with context.stop.deferred(), watchers, execution.compiling(model), shown:
            fit = Fit(
                model=model,
                data=TrainingData(views, evaluation.mean, evaluation.std, run.num_views, teaching.labels),
                evaluation=evaluation,
                objective=objective(recipe),
                recipe=recipe,
                seed=run.seed,
                metric=run.metric,
                rules=RULES,
                ema=ema,
                may_skip=is_own(run.description["model"]),
                execution=execution,
                session=Session(state, watchers, context.stop),
            )
            _train_and_write(context, run, fit, dataset, teaching, state, log)
    if run.stage is not None:
        context.changed(run.stage)


def _train_and_write(
    context: Context,
    run: Run,
    fit: Fit,
    dataset: Dataset,
    teaching: Teaching,
    state: RunState,
    log: RunLog | None,
) -> None:
    """Train, score the best epoch on the test split, and write the outputs in place of the resumable state."""
    result, model, device = fit.run(), fit.model, context.device
    execution, group = fit.execution, fit.execution.group
    last = _take_best(run, group, model, result)
    test = evaluation_data(dataset, dataset.test, device, run.description, teaching.clean.get("test"))
    predictions = Predictions.of(test)
    try:
        scores = evaluate(model, test, precision=execution.precision, group=group, predictions=predictions)
    except NumericalError as error:
        raise NumericalError(f"test split, {error}; {keep_best(state, result, group)}") from None

    def write() -> None:
        metrics = _metrics(run, dataset, teaching, result, scores, execution.precision)
        where = {**environment(device), "ranks": group.world_size, "execution": execution.as_json()}
        where["seconds"] = round(fit.progress.seconds, 1)
        table = predictions.as_csv(dataset.class_names, test, dataset.test.names)
        if log is not None:  # first, so that a kill in between leaves it to the run that goes on
            log.finished(metrics, fit.progress.seconds, run.out)
        decoded = {} if dataset.rendition is None else {"exif": EXIF_RULE, "decoders": decoders()}
        _write(run, result, last, metrics, table, where, decoded)
        if run.result is not None:
            kept.keep(context, run.result)
        state.delete()
        fit.session.watcher.ended(metrics)

    group.on_main(write)


def _say_how(context: Context, run: Run, model: nn.Module, execution: Execution, name: str, ema: float) -> None:
    """Say how a run is computed, and that other processes leave too little of the machine, where they do."""
    device, group, batch_size, busy = context.device, execution.group, run.recipe.batch_size, None
    if group.is_alone:  # other ranks on this machine are no strangers
        busy = context.neighbours.busy(torch.get_num_threads() if device.type == "cpu" else 1)
    size = run.description["arguments"].get("input_size")
    resized = f"; images resized to {size} x {size}" if size else ""  # it may be most of the work
    context.say(f"{name}: {execution.describe(device, batch_size, ema, busy)}{resized}")
    if not group.is_alone:
        context.say(f"{run.name}: {_describe_ranks(group, batch_size, model)}")


@contextlib.contextmanager
def _claimed(run: Run, group: Group, *, fresh: bool) -> Iterator[RunState | None]:
    """Hold a run's lock, on rank 0, and yield its resumable state; None where nothing is left to do.

    Another run may have held the lock since `up_to_date` looked, and have finished.
    """
    state = run.resumable
    with contextlib.ExitStack() as held:

        def claim() -> bool:
            held.enter_context(lock(run.lock))
            finish_replacing(run.out)
            run.remove_leftovers()
            if fresh:
                state.delete()
                state.is_fresh = True
            return not fresh and run.why_stale() is None

        yield None if group.on_main(claim) else state


def _describe_ranks(group: Group, batch_size: int, model: nn.Module) -> str:
    """Say how several ranks share the work, and what that changes."""
    line = f"{group.world_size} ranks ({group.backend}) share each batch of {batch_size}"
    if has_batch_norm(model) and group.backend == "gloo":
        line += "; gloo cannot add up batch norm's statistics: each rank's are its own, and rank 0's are kept"
    return line


def _take_best(run: Run, group: Group, model: nn.Module, result: FitResult) -> dict[str, Tensor] | None:
    """Put the best epoch's weights into `model`; return the last epoch's, on rank 0 and where the run keeps them."""
    last = None
    if group.is_main:
        if run.keep_last:
            last = published(model)
        model.load_state_dict(result.best)
    group.broadcast_(model.state_dict().values())
    return last


def _metrics(
    run: Run, dataset: Dataset, teaching: Teaching, result: FitResult, test_scores: Scores, precision: str
) -> dict[str, Any]:
    """Return metrics.json: the same keys for every model, no times."""

    def scores_of(row: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key not in ("lr", "train_loss")}

    best = result.best_row
    return {
        "name": run.name,
        "kind": run.description["kind"],
        "recipe": run.description["recipe"],
        "differs": dict(run.differs),
        "evaluated_on": dataset.evaluation[0],
        "rules": result.rules,
        "best": scores_of(best),
        "last": scores_of(result.curve[-1]),
        "test": {"epoch": result.best_epoch, **dataclasses.asdict(test_scores)},
        **costs(dict(run.description), dataset.image_size),
        "epochs": run.recipe.epochs,
        "batch_size": run.recipe.batch_size,
        "optimizer": run.recipe.optimizer,
        "lr": run.recipe.lr,
        "precision": precision,
        "views": run.num_views,
        "soft": run.soft,
        "confidence": run.confidence,
        "seed": run.seed,
        "num_train": len(dataset.train),
        "num_test": len(dataset.test),
        "teacher": dict(teaching.teacher) if teaching.teacher else None,
        "distilled": teaching.labels is not None,
        "at_chance": result.at_chance or is_chance(best["recall"], len(np.unique(dataset.evaluation[1].labels))),
        "warnings": result.warnings,
    }


def _write(
    run: Run,
    result: FitResult,
    last: Mapping[str, Tensor] | None,
    metrics: Mapping[str, Any],
    predictions: bytes,
    where: Mapping[str, Any],
    decoded: Mapping[str, Any],
) -> None:
    """Write the outputs in place of former ones, together, their manifest last."""
    labels = {} if run.labels_sha256 is None else {"labels_sha256": run.labels_sha256}
    meta = {**run.decided_by, "fingerprint": run.fingerprint, **labels, **decoded}
    meta |= {key: metrics[key] for key in DESCRIBED}
    of_best = {"epoch": result.best_epoch, "scores": metrics["best"], "metrics": without_test(metrics)}
    written = {"best": checkpoint_files("best", result.best, {**meta, **of_best})}
    if last is not None:
        of_last = {"epoch": run.recipe.epochs, "scores": metrics["last"]}
        written["last"] = checkpoint_files("last", last, {**meta, **of_last})
    texts = {"run.json": to_json(where), "predictions.csv": predictions, "curve.csv": _curve_csv(result.curve)}
    texts["metrics.json"] = to_json(metrics)
    files = {name: data for checkpoint, _ in written.values() for name, data in checkpoint.items()}
    digests = {f"{stem}.safetensors": digest for stem, (_, digest) in written.items()}
    files |= {name: texts[name] for name in OUTPUTS}
    write_with_manifest(run.out, files, run.fingerprint, digests=digests)


def without_test(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of metrics.json that the best weights' JSON keeps too: with new test scores it is whole again."""
    return {key: value for key, value in metrics.items() if key != "test"}


def _curve_csv(curve: list[dict[str, Any]]) -> bytes:
    """Return a curve as CSV; a missing value is an empty cell."""

    def cell(value: object) -> object:
        return f"{value:.6g}" if isinstance(value, float) else value

    # Rows that come from a saved state have lost their order.
    columns = ["epoch", "lr", "train_loss", *(field.name for field in dataclasses.fields(Scores))]
    return to_csv(columns, ([cell(row[name]) for name in columns] for row in curve))
