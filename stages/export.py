"""`pipeline export CHECKPOINT`: a trained model as files that others can use, with a model card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

import pipeline
from pipeline.data.arrays import Images
from pipeline.data.decoding import EXIF_RULE
from pipeline.data.folders import find_images, find_labelled_images
from pipeline.data.images import read_image, refusal
from pipeline.errors import DataError, NumericalError, PipelineError, UsageError, printable
from pipeline.inference.card import CARD, CONFIG, FILES, SCHEMA, model_card
from pipeline.system.canonical import seal
from pipeline.system.storage import read_json, remove_leftovers, storage_errors, to_json, write_together
from pipeline.training.checkpoints import load_checkpoint
from stages.shared.context import Context
from stages.shared.options import EXISTING, PATH, json_option, open_console, open_context
from stages.shared.params import own_code_here
from stages.shared.trained import Judged, read_beside, require_same_data

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.inference.classifier import Classifier

NUM_CHECKED = 256
BATCH = 64
DESCRIBED = (
    "kind", "model", "arguments", "recipe", "epoch", "seed", "dataset_sha256", "views", "soft", "confidence",
    "evaluated_on",
)  # fmt: skip
RESULTS = ("top1", "top5", "precision", "recall", "f1", "class_top1", "distillation_top1", "agreement")


@click.command("export")
@click.argument("checkpoint", type=EXISTING)
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["onnx", "torchscript", "safetensors"]),
    help="Repeatable; at least one.",
)
@click.option("--out", required=True, type=PATH, help="A new directory, or that of a former export.")
@click.option("--int8", is_flag=True, help="Also quantise the ONNX file, and measure what that costs in accuracy.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of the weights in a safetensors file; bf16 halves it, and its accuracy is measured.",
)
@click.option("--recipe", help="The recipe whose test images check it; default: the checkpoint's.")
@click.option("--data", type=PATH, help="Check it on the images of this folder instead.")
@click.option("--license", default="unknown", show_default=True, help="License of the weights, as hubs name it.")
@json_option
def command(
    checkpoint: Path,
    formats: tuple[str, ...],
    out: Path,
    int8: bool,
    dtype: str,
    recipe: str | None,
    data: Path | None,
    license: str,
    as_json: bool,
) -> None:
    """Write a trained model as ONNX, TorchScript or safetensors, with a model card.

    CHECKPOINT is a directory that a stage wrote, or a .safetensors file in it. Each file is compared with PyTorch on
    real images; nothing is written before all of them agree. `pipeline.load` takes the directory in Python.
    """
    from pipeline.inference.classifier import CPU
    from pipeline.inference.loading import from_checkpoint

    if recipe is not None and data is not None:
        raise UsageError("--recipe and --data: give one of them; both name the images to check on")
    names = check_request(formats, dtype, int8=int8, license=license, out=out)
    classifier = from_checkpoint(load_checkpoint(checkpoint), CPU, blocks="plain", own_code=own_code_here())
    if data is not None:
        console, real = open_console(), from_folder(data, classifier, labelled=int8 or dtype == "bf16")
    else:
        context = open_context(recipe, named_by=lambda params: classifier.config.get("recipe"))
        console, real = context.console, from_recipe(context, classifier)

    def say(line: str) -> None:
        console.print(printable(line), highlight=False, soft_wrap=True, markup=False)

    config = export(classifier, real, out, formats=names, license=license, say=say)
    if as_json:
        click.echo(json.dumps(config, indent=2))


def check_request(formats: Sequence[str], dtype: str, *, int8: bool, license: str, out: Path) -> tuple[str, ...]:
    """Refuse what cannot be exported, before any work is done, and return the `format_names`.

    Raises:
        UsageError: See `format_names` and `check_out`; or the license is no identifier.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", license):
        raise UsageError(f"--license {license!r}: write an identifier, as apache-2.0")
    names = format_names(formats, dtype, int8=int8)
    check_out(out)
    return names


def format_names(formats: Sequence[str], dtype: str, *, int8: bool) -> tuple[str, ...]:
    """Return the formats as pipeline.inference.card.FILES names them, in the order in which they are made.

    Args:
        formats: As given by --format.
        dtype: `fp32` or `bf16`.
        int8: Whether to quantise the ONNX file too.

    Raises:
        UsageError: There is none, or two options don't go together.
    """
    if not formats:
        raise UsageError("--format: name one or more of onnx, torchscript and safetensors")
    if dtype == "bf16" and (int8 or set(formats) != {"safetensors"}):
        other = "--int8" if int8 else f"--format {next(name for name in formats if name != 'safetensors')}"
        raise UsageError(
            f"--dtype bf16 {other}: only a safetensors file is written in bf16; export the other by itself"
        )
    if int8 and "onnx" not in formats:
        raise UsageError("--int8: only ONNX files are quantised; add --format onnx")
    names = ["safetensors-bf16" if dtype == "bf16" else name for name in formats]
    return tuple(dict.fromkeys([*names, "onnx-int8"] if int8 else names))


def check_out(out: Path) -> None:
    """Check, before any work is done, that an output directory is new, empty or a former export's.

    Raises:
        UsageError: It is not.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"--out {out}: not a directory")
    try:
        config = read_json(out / CONFIG) if (out / CONFIG).is_file() else None
    except PipelineError:
        config = None
    is_export = isinstance(config, dict) and config.get("schema") == SCHEMA
    own, there = (*FILES.values(), CARD, CONFIG), {path.name for path in out.iterdir()}
    # A killed export leaves these hidden ones, and perhaps some of its files.
    left = {name for name in there if name.endswith(".tmp") and name.startswith(tuple(f".{file}." for file in own))}
    if there and not is_export and not (left and there <= {*left, *own}):
        raise UsageError(f"--out {out}: it holds other files than a former export's; name a new directory")


@dataclass(frozen=True, eq=False)
class RealImages:
    """The images that an export is checked on, and their classes if these are known.

    Attributes:
        images: `(N, H, W, 3)` uint8, N at least 1.
        labels: `(N,)` int64, or None.
        description: Their name for people.
        source: The data set's source, one of pipeline.config.recipes.SOURCES; None for a folder.
        sha256: The data set's SHA-256; None for a folder.
        evaluated_on: The split that the recipe's models are compared on; None for a folder.
    """

    images: Images
    labels: NDArray[np.int64] | None
    description: str
    source: str | None = None
    sha256: str | None = None
    evaluated_on: str | None = None

    def sample(self) -> Tensor:
        """Return at most NUM_CHECKED of them, evenly spread, `(n, 3, H, W)` uint8."""
        count = len(self.images)
        rows = np.linspace(0, count - 1, min(count, NUM_CHECKED)).astype(np.int64)
        return _to_tensor(self.images[rows])

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images with their labels, BATCH at a time."""
        import torch

        assert self.labels is not None
        for start in range(0, len(self.images), BATCH):
            part = slice(start, start + BATCH)
            yield _to_tensor(self.images[part]), torch.from_numpy(self.labels[part])


def from_recipe(context: Context, classifier: Classifier) -> RealImages:
    """Return a recipe's prepared test images.

    Raises:
        DataError: There is no prepared data, or the model was trained on other data.
    """
    try:
        dataset = context.dataset()
    except DataError as error:
        raise DataError(f"{error}, or give a folder of images with --data") from error
    assert classifier.file is not None, "it has been loaded"
    way_out = "name its own with --recipe, train it again, or check it on a folder's images with --data"
    require_same_data(classifier.config, classifier.file, context.paths, way_out, dataset=dataset)
    return RealImages(
        images=dataset.test.images,
        labels=dataset.test.labels,
        description=f"{context.recipe.name}, test",
        source=dataset.source,
        sha256=dataset.sha256,
        evaluated_on=dataset.evaluation[0],
    )


def from_folder(folder: Path, classifier: Classifier, *, labelled: bool) -> RealImages:
    """Return the images at any depth of a folder.

    Args:
        folder: The folder. What is hidden or left by a system is passed over.
        classifier: The model.
        labelled: Whether every image must lie in a folder named after one of the model's classes. Then all images are
            returned, else at most NUM_CHECKED.

    Raises:
        UsageError: There is no such folder.
        DataError: There is no image in it, one cannot be read, or one has no class.
    """
    if not folder.is_dir():
        raise UsageError(f"--data {printable(folder)}: no such folder")
    labels = None
    if labelled:
        try:
            files, bad = find_labelled_images(folder, classifier.class_names)
            if bad:
                raise refusal(folder, bad)
        except DataError as error:
            raise DataError(f"{error}; --int8 and --dtype bf16 are measured on labelled images") from error
        labels = np.array([file.label for file in files], np.int64)
    else:
        files = list(find_images(folder, Counter()))
        if problems := [file for file in files if file.problem is not None]:
            raise DataError(f"--data {printable(problems[0].path)}: {problems[0].problem}")
        if len(files) > NUM_CHECKED:
            files = [files[row] for row in np.linspace(0, len(files) - 1, NUM_CHECKED).astype(int)]
    paths = [file.path for file in files]
    images = np.empty((len(paths), classifier.image_size, classifier.image_size, 3), np.uint8)
    for row, path in enumerate(paths):
        try:
            images[row] = read_image(path, classifier.image_size, resize=classifier.resize)
        except DataError as error:
            raise DataError(f"{printable(path)}: {error}; mend or remove it") from error
    return RealImages(images, labels, printable(folder))


def export(
    classifier: Classifier,
    real: RealImages,
    out: Path,
    *,
    formats: Sequence[str],
    license: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Export a model, check every file on real images, and only then write them all.

    Args:
        classifier: The model, from a checkpoint: on the CPU, in fp32, without fused blocks.
        real: The images to check on, with labels for int8 and bf16.
        out: Directory of the files, which `check_out` has checked; a former export there is replaced.
        formats: Names that `format_names` returned.
        license: The weights' license, for the card.
        say: Takes a line for people.

    Returns:
        The content of config.json.

    Raises:
        UsageError: An extra is missing, or nothing can be quantised.
        NumericalError: A file's outputs are not PyTorch's.
        StorageError: A file cannot be written.
    """
    from pipeline.inference.exporting import top1
    from pipeline.inference.loading import from_file

    assert classifier.file is not None, "it has been loaded"
    sample = real.sample()
    contents: dict[str, bytes] = {}
    models: dict[str, Classifier] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name in formats:
        contents[name] = _make(name, classifier, contents)
        # As its users will load it.
        own = (classifier.config["model"],)  # its code has been run already, where it is the user's own
        models[name] = from_file(name, contents[name], classifier.config, classifier.file, classifier.device, own)
        entries[name] = entry = _entry(name, contents[name], classifier, models[name], sample)
        if name == "onnx-int8":
            entries["onnx"] |= _measured(models["onnx"], real)
            entry |= _measured(models[name], real)
            text = _compared(entries, real)
        else:
            text = _agreed(entry, real)
            if name == "safetensors-bf16":
                entry |= {"dtype": "bfloat16", **_measured(models[name], real)}
                entry["top1_of_checkpoint"] = top1(classifier, real.batches())
                text += f"; top-1 {entry['top1']:.2f} % beside {entry['top1_of_checkpoint']:.2f} % in float32"
        say(f"{entry['file']}: {entry['bytes'] / 1e6:.2f} MB, {text}")
    config = seal(_config(classifier, real, entries, license))
    _write(out, contents, config)
    say(f"wrote {out}; {out / CARD} is its model card")
    return config


def _make(name: str, classifier: Classifier, contents: Mapping[str, bytes]) -> bytes:
    """Return the content of a format's file, given those made before it."""
    import torch

    from pipeline.inference import exporting

    if name == "onnx":
        config = classifier.config
        kept = {"model": config["model"], "class_names": json.dumps(classifier.class_names)}
        kept |= {"checkpoint_sha256": config["sha256"], "input": "uint8 RGB (batch, 3, height, width), not normalised"}
        return exporting.to_onnx(classifier, kept)
    if name == "onnx-int8":
        return exporting.to_onnx_int8(contents["onnx"])
    if name == "torchscript":
        return exporting.to_torchscript(classifier)
    return exporting.to_safetensors(classifier, torch.bfloat16 if name == "safetensors-bf16" else torch.float32)


def _entry(name: str, content: bytes, classifier: Classifier, exported: Classifier, sample: Tensor) -> dict[str, Any]:
    """Compare an exported file with the original, and return its entry in config.json."""
    from pipeline.inference import exporting

    # An int8 file is judged by its accuracy; its difference is only noted.
    rounded = {"onnx-int8": math.inf, "safetensors-bf16": exporting.BF16_TOLERANCE}
    tolerance = rounded.get(name, exporting.TOLERANCE)
    try:
        agreement = exporting.compare(classifier.outputs, exported.outputs, sample, tolerance=tolerance)
    except NumericalError as error:
        raise NumericalError(f"{FILES[name]}: {error}; nothing was written") from error
    digest = hashlib.sha256(content).hexdigest()
    entry = {"file": FILES[name], "bytes": len(content), "sha256": digest}
    return {**entry, "agreement": dataclasses.asdict(agreement)}


def _measured(exported: Classifier, real: RealImages) -> dict[str, Any]:
    from pipeline.inference.exporting import top1

    return {"top1": top1(exported, real.batches()), "top1_images": len(real.images)}


def _agreed(entry: Mapping[str, Any], real: RealImages) -> str:
    agreement = entry["agreement"]
    sizes = ", ".join(map(str, agreement["batch_sizes"]))
    return (
        f"within {agreement['max_difference']:.1e} of PyTorch's probabilities on {agreement['num_images']} images "
        f"({real.description}) in batches of {sizes}"
    )


def _compared(entries: Mapping[str, Mapping[str, Any]], real: RealImages) -> str:
    plain, int8 = entries["onnx"], entries["onnx-int8"]
    return (
        f"{int8['bytes'] / plain['bytes']:.0%} of {plain['file']}; top-1 {int8['top1']:.2f} % beside "
        f"{plain['top1']:.2f} % on {len(real.images)} images ({real.description})"
    )


def _config(
    classifier: Classifier, real: RealImages, entries: Mapping[str, Mapping[str, Any]], license: str
) -> dict[str, Any]:
    """Return the content of config.json, which the model card says in words."""
    from pipeline.inference.classifier import INPUT

    meta, side, num_classes = classifier.config, classifier.image_size, len(classifier.class_names)
    outputs = classifier.outputs(_to_tensor(real.images[:1]))
    pixels = {"name": INPUT, "dtype": "uint8", "shape": ["batch", 3, side, side], "channels": "RGB", "range": [0, 255]}
    return {
        **{key: meta.get(key) for key in DESCRIBED},
        "rules": meta.get("rules", 1),
        **{key: meta.get(key) if isinstance(meta.get(key), dict) else None for key in ("teacher", "training")},
        "warnings": meta["warnings"] if isinstance(meta.get("warnings"), list) else [],
        "schema": SCHEMA,
        "class_names": list(classifier.class_names),
        "image_size": side,
        "resize": classifier.resize,
        "exif": EXIF_RULE,
        "decoders": meta["decoders"] if isinstance(meta.get("decoders"), dict) else None,
        "mean": meta["mean"],
        "std": meta["std"],
        "input": pixels,
        "outputs": [{"name": name, "dtype": "float32", "shape": ["batch", num_classes]} for name in outputs],
        "parameters": sum(parameter.numel() for parameter in classifier.module.parameters()),
        "checkpoint_sha256": meta["sha256"],
        "files": {name: dict(entry) for name, entry in entries.items()},
        "checked_on": {"images": real.description, "dataset_sha256": real.sha256},
        "data_source": real.source,
        "license": license,
        "versions": _versions(entries),
        **_results(classifier, real),
    }


def _results(classifier: Classifier, real: RealImages) -> dict[str, Any]:
    """Return the model's scores: on the test split if its metrics.json is there, else on the split that chose it."""
    meta, file = classifier.config, classifier.file
    assert file is not None, "it has been loaded"
    judged, run = Judged.of(meta, file), read_beside(file, "run.json")
    metrics, scores, split = judged.metrics, judged.scores, judged.split or real.evaluated_on
    selected_on = metrics.get("evaluated_on") if metrics else split
    if file.stem == "last":
        # Nothing chose it. The metrics.json beside it is its run's if it has its scores.
        selected_on, beside = None, read_beside(file, "metrics.json")
        if (beside.get("seed"), beside.get("last")) == (meta.get("seed"), meta.get("scores")):
            metrics = beside
    return {
        "scores": {key: scores[key] for key in RESULTS if type(scores.get(key)) in (int, float)},
        "scores_split": split,
        "scores_precision": metrics.get("precision"),
        "selected_on": selected_on,
        "num_train": metrics.get("num_train"),
        "num_test": metrics.get("num_test"),
        "trained": {key: run.get(key) for key in ("device", "date", "commit", "versions", "seconds")} if run else None,
    }


def _versions(entries: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions that the files depend on."""
    names = ["torch", "safetensors", "numpy", *(["onnx", "onnxscript", "onnxruntime"] if "onnx" in entries else [])]
    versions = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), "titn-pipeline": pipeline.__version__, **versions}


def _write(out: Path, contents: Mapping[str, bytes], config: Mapping[str, Any]) -> None:
    """Write the files together, config.json last, which names their SHA-256; then delete what it no longer names."""
    for file in (*FILES.values(), CARD, CONFIG):
        remove_leftovers(out / file)
    files = {out / FILES[name]: content for name, content in contents.items()}
    write_together({**files, out / CARD: model_card(config).encode(), out / CONFIG: to_json(config)})
    for path in [out / file for name, file in FILES.items() if name not in contents]:
        with storage_errors(f"delete {path}"):
            path.unlink(missing_ok=True)


def _to_tensor(images: NDArray[np.uint8]) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
