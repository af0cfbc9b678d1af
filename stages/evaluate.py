"""`pipeline evaluate CHECKPOINT`: score a trained model on a recipe's data, or on a folder of images."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from pipeline.data.decoding import UNUSED_ALPHA
from pipeline.data.folders import MAX_CLASSES_NAMED, ImageFile, find_labelled_images, read_images
from pipeline.data.images import BadFile, refusal
from pipeline.data.listing import relative_name
from pipeline.errors import DataError, UsageError, printable
from pipeline.report.tables import Table, number
from pipeline.system.storage import lock, read_if_exists, remove_leftovers, to_json, write_atomic, write_together
from pipeline.system.text import counted
from pipeline.training.manifest import EVALUATED, MANIFEST, Manifest, check_all, read_manifest, refuse_writing
from stages.shared import kept, options
from stages.shared.context import Context
from stages.shared.runs import kept_as
from stages.shared.trained import require_same_data

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.inference.classifier import Classifier
    from pipeline.training.evaluation import Predictions
    from pipeline.training.metrics import Meter


@click.command("evaluate")
@click.argument("checkpoint", type=options.EXISTING)
@options.named_recipe_option
@options.any_device_option
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Of the recipe's data; test where left out.")
@click.option("--data", type=options.PATH, help="Score on this folder's <class>/* or test/<class>/*.")
@click.option("--skip-bad", is_flag=True, help="Leave corrupt, empty and oversized files of --data out.")
@click.option("--per-class", is_flag=True, help="Show each class too, the worst first.")
@click.option("--predictions", type=options.PATH, help="Write what is predicted for each image to this CSV file.")
@click.option("--mend", is_flag=True, help="Write a run's predictions.csv and metrics.json again if they are damaged.")
@options.precision_option
@options.json_option
def command(
    checkpoint: Path,
    recipe: str | None,
    device: str | None,
    split: str | None,
    data: Path | None,
    skip_bad: bool,
    per_class: bool,
    predictions: Path | None,
    mend: bool,
    precision: str | None,
    as_json: bool,
) -> None:
    """Score a checkpoint on a recipe's data, or on any folder's.

    Without --recipe it is scored on the data that it was trained on. With --data neither recipe nor prepared data are
    needed: folders are matched with the checkpoint's classes by name; classes may be absent, others are refused.
    """
    if predictions is not None:
        refuse_writing(predictions)
    if data is None:
        if skip_bad:
            raise UsageError("--skip-bad: the recipe's data have been prepared; use it with --data")
        classifier = options.load_model(checkpoint, device, precision)
        context = options.open_context(recipe, named_by=lambda params: classifier.config.get("recipe"))
        if mend:
            mend_run(context, classifier)
            context.end()
            return
        result = evaluate_split(context, classifier, split or "test", per_class=per_class, rows=predictions)
    else:
        if recipe is not None or split is not None or mend:
            given = "--recipe" if recipe is not None else "--mend" if mend else "--split"
            raise UsageError(f"--data and {given}: both say what to score on; give one of them")
        classifier = options.load_model(checkpoint, device, precision)
        result = evaluate_folder(classifier, data, skip_bad=skip_bad, per_class=per_class, rows=predictions)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    console = options.open_console()
    for table in (scores_table, classes_table) if per_class else (scores_table,):
        console.print(table(result).to_rich(console.width))


def evaluate_split(
    context: Context, classifier: Classifier, split: str, *, per_class: bool = False, rows: Path | None = None
) -> dict[str, Any]:
    """Score a model on a split of the recipe's prepared data.

    Args:
        context: The command's setting.
        classifier: The model, loaded from a file.
        split: `train`, `val` or `test`.
        per_class: Whether to add the scores of each class.
        rows: A CSV file to write, with the columns of predictions.csv.

    Returns:
        Model, split, number of images, `autocast` (`fp32` or `bf16`), the fields of pipeline.training.metrics.Scores;
        with `per_class` also `classes`, the fields of pipeline.training.metrics.ClassScores for each, the worst first.

    Raises:
        UsageError: There is no such split.
        DataError: The model was trained on other data than are prepared.
    """
    from pipeline.training.evaluation import Predictions
    from pipeline.training.metrics import Meter
    from stages.shared.fitting import evaluation_data

    dataset = context.dataset()
    if split not in dataset.splits:
        raise UsageError(f"--split {split}: recipe {context.recipe.name} has {', '.join(dataset.splits)}")
    assert classifier.file is not None, "it has been loaded"
    way_out = "name its own recipe, train it again, or score it on a folder's images with --data"
    require_same_data(classifier.config, classifier.file, context.paths, way_out, dataset=dataset)
    data = evaluation_data(dataset, dataset.splits[split], classifier.device, classifier.config)
    meter = Meter(dataset.num_classes, classifier.device)
    predictions = Predictions.of(data)
    for part, images in data.batches(classifier.batch_size, slice(0, len(data.labels))):
        outputs = classifier.logits(images)
        meter.add(outputs, data.labels[part])
        predictions.add(part, outputs)
    if rows is not None:
        remove_leftovers(rows)
        write_atomic(rows, predictions.as_csv(classifier.class_names, data, dataset.splits[split].names))
    where = {"recipe": context.recipe.name, "split": split}
    return _result(classifier, where, meter, (data.labels, predictions.classes) if per_class else None)


def evaluate_folder(
    classifier: Classifier,
    folder: Path,
    *,
    skip_bad: bool = False,
    per_class: bool = False,
    rows: Path | None = None,
) -> dict[str, Any]:
    """Score a model on a folder of images; nothing else is needed.

    Args:
        classifier: The model, loaded from a file.
        folder: Laid out as pipeline.data.folders.find_labelled_images reads it.
        skip_bad: Leave bad files out; otherwise one is enough to refuse the folder.
        per_class: Whether to add the scores of each class.
        rows: A CSV file to write, with the columns of predictions.csv; paths are relative to the folder.

    Returns:
        What `evaluate_split` returns, with `data` (the folder), `absent_classes`, `skipped` and `unused_alpha` (the
        images whose alpha is ignored) in place of recipe and split.

    Raises:
        UsageError: There is no such folder.
        DataError: A folder has the name of no class, or there are bad files.
    """
    import torch

    from pipeline.training.batches import EvaluationData

    scored = _ScoredFolder(classifier)
    files, bad = find_labelled_images(folder, classifier.class_names)
    # Pillow warns of damaged metadata, which does no harm, and of many pixels, which are refused as it is.
    quiet = warnings.catch_warnings(action="ignore")
    reading = read_images(files, classifier.image_size, classifier.batch_size, classifier.resize)
    with quiet, contextlib.closing(reading) as batches:
        for batch in batches:
            bad += (BadFile(printable(file.path.relative_to(folder)), file.problem) for file in batch if file.problem)
            scored.add([file for file in batch if file.pixels is not None])
    if bad and not skip_bad:
        raise refusal(folder, bad)
    if not scored.files:
        raise DataError(f"{printable(folder)}: no image can be read, of {len(files)}")
    names = [relative_name(file.path, folder) for file in scored.files]
    labels, predictions = torch.tensor([file.label for file in scored.files]), scored.predictions()
    if rows is not None:
        split = EvaluationData(torch.empty(0), labels, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), len(classifier.class_names))
        remove_leftovers(rows)
        write_atomic(rows, predictions.as_csv(classifier.class_names, split, names))
    supports = scored.meter.supports.tolist()
    where = {
        "data": printable(folder),
        "absent_classes": [name for name, support in zip(classifier.class_names, supports, strict=True) if not support],
        "skipped": [dataclasses.asdict(file) for file in bad],
        "unused_alpha": [name for name, file in zip(names, scored.files, strict=True) if UNUSED_ALPHA in file.notes],
    }
    return _result(classifier, where, scored.meter, (labels, predictions.classes) if per_class else None)


class _ScoredFolder:
    """A model's scores on the images of a folder, batch by batch."""

    def __init__(self, classifier: Classifier) -> None:
        from pipeline.training.metrics import Meter

        self.classifier = classifier
        self.meter = Meter(len(classifier.class_names), classifier.device)
        self.files: list[ImageFile] = []
        self._parts: list[Predictions] = []

    def add(self, files: list[ImageFile]) -> None:
        """Score images that have been read; `files` then has them without their pixels."""
        import torch

        from pipeline.training.evaluation import Predictions

        pixels = [file.pixels for file in files if file.pixels is not None]
        if not pixels:
            return
        labels = torch.tensor([file.label for file in files], device=self.classifier.device)
        outputs = self.classifier.logits(self.classifier.place(np.stack(pixels)))
        self.meter.add(outputs, labels)
        self._parts.append(Predictions.zeros(len(files), labels.device))
        self._parts[-1].add(slice(None), outputs)
        self.files += (dataclasses.replace(file, pixels=None) for file in files)

    def predictions(self) -> Predictions:
        """Return what is predicted for each image, in the order of `files`."""
        from pipeline.training.evaluation import Predictions

        return Predictions.joined(self._parts)


def mend_run(context: Context, classifier: Classifier) -> None:
    """Write what follows from a run's weights again where it is damaged: predictions.csv and metrics.json.

    The manifest tells whether they are what they were; elsewhere than on the run's machine their last digits may
    differ, and the manifest then names the new ones.

    Args:
        context: The command's setting.
        classifier: The run's best weights, loaded from its directory.

    Raises:
        UsageError: The directory is no run's with a manifest.
        DataError: Other files are damaged too; other data are prepared; or the teacher's labels are not here.
    """
    assert classifier.file is not None, "it has been loaded"
    directory, meta = classifier.file.parent, classifier.config
    manifest = read_manifest(directory)
    if manifest is None or classifier.file.name != "best.safetensors" or not set(EVALUATED) <= manifest.files.keys():
        raise UsageError(f"--mend: {directory} has no {MANIFEST} of a run; name what `teacher` or `distill` wrote")
    check_all(directory, but=EVALUATED)
    broken = [name for name in EVALUATED if _digest(read_if_exists(directory / name)) != manifest.files[name]]
    if not broken:
        context.say(f"{directory}: nothing to mend")
        return
    if meta.get("metrics") is None and "metrics.json" in broken:
        raise DataError(f"{directory}: of an older version, whose best.json lacks what metrics.json said; train again")
    contents = _evaluated(context, classifier, classifier.file)
    digests = {**manifest.files, **{name: _digest(contents[name]) for name in broken}}
    mended = manifest._replace(files=digests)
    _replace(context, directory, meta, {name: contents[name] for name in broken}, mended)
    is_same = mended == manifest
    how = "byte for byte as before" if is_same else "with other last digits, as another machine or run may have"
    context.say(f"{directory}: {' and '.join(broken)} written again, {how}")


def _evaluated(context: Context, classifier: Classifier, file: Path) -> dict[str, bytes]:
    """Return what evaluating a run's weights writes, by name: EVALUATED; `file` is what they were loaded from."""
    import torch

    from pipeline.training.evaluation import Predictions, evaluate
    from stages.shared.fitting import evaluation_data

    meta, dataset = classifier.config, context.dataset()
    way_out = "name its own recipe, or prepare its data again"
    require_same_data(meta, file, context.paths, way_out, dataset=dataset)
    teacher_labels = _teacher_labels(context, meta)
    data = evaluation_data(dataset, dataset.test, classifier.device, meta, teacher_labels)
    predictions, record = Predictions.of(data), meta.get("metrics")
    precision = classifier.precision if record is None else record["precision"]
    # Teachers are trained in this layout; in another one the last digits differ.
    layout = torch.channels_last if meta["kind"] == "teacher" else torch.preserve_format
    module = classifier.module.to(memory_format=layout)
    scores = evaluate(module, data, precision=precision, predictions=predictions)
    test = {"epoch": meta["epoch"], **dataclasses.asdict(scores)}
    return {
        "predictions.csv": predictions.as_csv(classifier.class_names, data, dataset.test.names),
        "metrics.json": to_json({**(record or {}), "test": test}),
    }


def _replace(
    context: Context, directory: Path, meta: Mapping[str, Any], contents: dict[str, bytes], manifest: Manifest
) -> None:
    """Write a run's files and its manifest together, and keep the run again if it is the recipe's own."""
    paths, name, kind = context.paths, directory.name, str(meta["kind"])
    differs = directory.resolve().parent == paths.run("").resolve()
    with lock(paths.work("runs" if differs else f"{kind}s", f"{name}.lock")):
        new = {directory / file: content for file, content in contents.items()}
        write_together({**new, directory / MANIFEST: manifest.to_bytes()})
        own = paths.teacher(name) if kind == "teacher" else paths.student(name)
        if directory.resolve() == own.resolve():
            files = tuple(own / file for file in (*manifest.files, MANIFEST))
            decided = kept_as(str(manifest.fingerprint), meta.get("labels_sha256"))
            result = kept.Result(context.recipe.name, f"{kind}@{name}", decided, own, files, project=context.project)
            if (former := kept.find(result, any_code=True)) is not None:  # its copy may be the same damaged file
                kept.keep(context, dataclasses.replace(result, code=former.code))
            context.changed(result.stage)


def _digest(data: bytes | None) -> str:
    return "" if data is None else hashlib.sha256(data).hexdigest()


def _teacher_labels(context: Context, meta: Mapping[str, Any]) -> np.ndarray[Any, Any] | None:
    """Return a run's teacher's labels of the test images, `(N,)` integers; None where it had no teacher.

    Args:
        context: The command's setting.
        meta: The checkpoint's JSON. Older versions did not say which labels it learned from, only by which teacher.

    Raises:
        DataError: No label file here is this teacher's.
    """
    from pipeline.labels.cache import LabelCache

    if not (teacher := meta.get("teacher")):
        return None
    if teacher.get("test_top1", 0.0) is None:  # labels that were given, without those of test images
        return None
    dataset, named = context.dataset(), teacher.get("labels")
    for path in (context.paths.labels(name, named) for name in context.recipe.views):
        if path.is_file():
            cache = LabelCache.open(path)
            is_its = cache.provenance["checkpoint_sha256"] == teacher["sha256"]
            is_cached = meta["inputs"].get("labels") == "cached"
            if is_its and is_cached and (learned := meta.get("labels_sha256")) is not None:
                count, topk = meta["views"], bool(meta["soft"] or meta["confidence"])
                is_its = cache.num_views >= count and cache.digest(count, topk=topk) == learned
            of = cache.identity["dataset_sha256"], cache.identity.get("rendition")
            if is_its and of == (dataset.sha256, dataset.rendition) and "test" in cache.clean:
                return cache.clean["test"]
    folder, name = context.paths.labels("default").parent, printable(teacher["name"])
    raise DataError(f"{folder}: no labels by its teacher, {name}, which the files have too; get them back first")


def scores_table(result: dict[str, Any]) -> Table:
    """Return the table of an evaluation."""
    heads = [number(result["class_top1"]), number(result["distillation_top1"])]
    row = [result["model"], number(result["top1"]), number(result["top5"])]
    row += [number(result[key], 3) for key in ("precision", "recall", "f1")]
    columns = ["model", "top-1 %", "top-5 %", "precision", "recall", "F1", "class head %", "distillation head %"]
    where = result["data"] if "data" in result else f"{result['recipe']}, {result['split']}"
    note = f"{counted(result['num_images'], 'image')}, {result['device']}, {result['autocast']}"
    if result.get("skipped"):
        note += f"; {counted(len(result['skipped']), 'bad file')} left out"
    if result.get("unused_alpha"):
        note += f"; {UNUSED_ALPHA}, in {counted(len(result['unused_alpha']), 'image')}"
    if absent := result.get("absent_classes"):
        names = [*map(printable, absent[:MAX_CLASSES_NAMED]), *(["..."] if len(absent) > MAX_CLASSES_NAMED else [])]
        note += f"; no images of {counted(len(absent), 'class')} ({', '.join(names)}), "
        note += f"which {'counts' if len(absent) == 1 else 'count'} 0 in the means where they are predicted"
    return Table(f"{result['checkpoint']} on {where}", columns, [[*row, *heads]], note)


def classes_table(result: dict[str, Any]) -> Table:
    """Return the table of an evaluation's classes, the worst first."""
    rows = []
    for row in result["classes"]:
        scores = [number(row[key], 3) for key in ("recall", "precision", "f1")]
        other = row["confused_with"]
        confused = "-" if other is None else f"{printable(other)} ({row['num_confused']})"
        rows.append([printable(row["name"]), str(row["support"]), *scores, confused])
    columns = ["class", "images", "recall", "precision", "F1", "most often taken for"]
    return Table("Classes, the worst first", columns, rows, "Recall is the accuracy on the images of the class alone.")


def _result(
    classifier: Classifier, where: dict[str, Any], meter: Meter, answers: tuple[Tensor, Tensor] | None
) -> dict[str, Any]:
    """Return the result of an evaluation as plain JSON values; with targets and predictions, each class's too."""
    from pipeline.training.metrics import class_scores, worst_first

    classes = []
    if answers is not None:
        targets, predictions = (classes.cpu() for classes in answers)
        classes = worst_first(class_scores(targets, predictions, classifier.class_names))
    return {
        "model": classifier.config["model"],
        "checkpoint": str(classifier.file),
        **where,
        "num_images": int(meter.supports.sum()),
        "autocast": classifier.precision,
        "device": classifier.device.type,
        **dataclasses.asdict(meter.scores()),
        **({"classes": [dataclasses.asdict(scores) for scores in classes]} if answers else {}),
    }
