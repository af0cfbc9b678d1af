"""Trained models, loaded from checkpoints and from exported directories."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.config.recipes import PRECISIONS, RESIZES, SQUEEZE, StudentRecipe
from pipeline.data.file import Channels
from pipeline.errors import DataError, UsageError
from pipeline.inference.card import CONFIG, FILES, SCHEMA
from pipeline.inference.classifier import Classifier, PixelsToOutputs
from pipeline.inference.exporting import run_onnx, run_torchscript
from pipeline.models import PAPERS_STUDENTS, TEACHERS
from pipeline.models.network import Network
from pipeline.models.own import is_own
from pipeline.system.canonical import SEAL, is_whole
from pipeline.system.runtime import resolve_device, resolve_precision
from pipeline.system.storage import read_bytes, read_json
from pipeline.training.checkpoints import Checkpoint, load_checkpoint, load_weights

KINDS = ("student", "teacher")
CLASSES = (int, 2, 65535)
IMAGE_SIZES = (int, 4, 1024)
INPUT_SIZES = (int, 1, 4096)
"""Type, least and largest value."""
STEMS = ("default", "cifar")
DRAWING = frozenset(
    {draw for name, draw in vars(nn.init).items() if name.endswith("_") and callable(draw)}
    | {Tensor.normal_, Tensor.uniform_}
)
"""What initialises a tensor in place."""


def load(
    path: Path | str,
    *,
    format: str | None = None,
    device: str | None = "cpu",
    precision: str | None = "fp32",
    own_code: Collection[str] = (),
) -> Classifier:
    """Load a trained model.

    Args:
        path: A directory that a stage wrote, or a .safetensors file in it; or one that `pipeline export` wrote, or a
            file in it.
        format: Of an export; see pipeline.load.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; None takes a GPU where there is one, but the CPU for ONNX files.
        precision: `auto`, `fp32` or `bf16`; None takes that of the training. Exports compute as they were exported.
        own_code: Functions of the user's, `FILE.py:FUNCTION`, that may be run to build the model.

    Raises:
        UsageError: The path, the format or the device does not exist, the precision is not the export's, or the model
            is a program that `format` does not ask for.
        DataError: There is no valid model.
    """
    path = Path(path)
    named = format_named(path)
    directory = path.parent if named else path
    if device is not None:
        resolve_device(device)
    if (directory / CONFIG).is_file():
        if precision == "bf16":
            raise UsageError(f"--precision bf16: {path} is an export, which computes in fp32 or int8; leave it out")
        if named and format not in (None, named):
            raise UsageError(f"format {format!r}: {path} is of format {named!r}; give that, or name {directory}")
        return _load_export(directory, named, format, device, own_code)
    if not path.exists():
        raise UsageError(f"{path}: no such model; name what `pipeline export` wrote, or a stage's checkpoint")
    if format not in (None, "checkpoint", named):
        raise UsageError(f"format {format!r}: {path} is no export, it has no {CONFIG}; leave it out")
    return from_checkpoint(load_checkpoint(path), resolve_device(device), precision=precision, own_code=own_code)


def format_named(path: Path) -> str | None:
    """Return the format of the export's file that a path names; None of any other path.

    Commands ask `load` for it: who names a program on the command line wants that one.
    """
    return next((name for name, file in FILES.items() if file == path.name), None)


def load_checkpoint_of(path: Path, kind: str) -> Checkpoint:
    """Load a checkpoint of a `teacher` or a `student`.

    Args:
        path: A directory that a stage wrote, or a .safetensors file in it.
        kind: Which of the two is needed.

    Raises:
        UsageError: The path does not exist.
        DataError: It holds no valid checkpoint, or one of the other kind.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.meta.get("kind") != kind:
        raise DataError(f"{checkpoint.path}: a {checkpoint.meta.get('kind')}'s checkpoint; a {kind}'s is needed here")
    return checkpoint


def from_checkpoint(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    precision: str | None = "fp32",
    blocks: str = "auto",
    own_code: Collection[str] = (),
) -> Classifier:
    """Build a checkpoint's model with its weights, in evaluation mode.

    Args:
        checkpoint: Its JSON describes the model.
        device: Where the model computes.
        precision: See `load`.
        blocks: How a student's blocks are computed, see pipeline.models.students.use_inner_block and use_outer_block.
        own_code: See `load`.

    Raises:
        DataError: The JSON describes no model or no precision, or one of the user's own code that `own_code` does not
            name; or the weights are another model's.
    """
    from pipeline.models.students import Student, use_inner_block, use_outer_block

    file = checkpoint.path.with_suffix(".json")
    described = Description.read(checkpoint.meta, file)
    if precision is None:
        training = checkpoint.meta.get("training")
        precision = training.get("precision") if isinstance(training, dict) else None
        if precision not in PRECISIONS:
            raise DataError(f"{file}: training.precision is {precision!r}; give --precision")
    try:
        module = build_unfilled(described.kind, described.model, described.arguments, own_code=own_code)
    except (DataError, UsageError) as error:
        raise DataError(f"{file}: {error}") from error
    load_weights(module, checkpoint)
    precision, inner, outer = resolve_precision(precision, device), "none", "none"
    if isinstance(module, Student):
        inner = use_inner_block(module, blocks, device, precision=precision, training=False)
        outer = use_outer_block(module, blocks, device, precision=precision, training=False)
    network = Network(module.to(device).eval(), described.mean, described.std, precision)
    return Classifier(
        runner=PixelsToOutputs(network).eval(),
        class_names=described.class_names,
        image_size=described.image_size,
        resize=described.resize,
        device=device,
        precision=precision,
        file=checkpoint.path,
        config=checkpoint.meta,
        inner_block=inner,
        outer_block=outer,
    )


def from_file(
    format: str,
    content: bytes,
    config: Mapping[str, Any],
    file: Path,
    device: torch.device,
    own_code: Collection[str] = (),
) -> Classifier:
    """Build the model of one file of an export.

    Args:
        format: A key of pipeline.inference.card.FILES.
        content: The file's bytes.
        config: The export's config.json, or the JSON of the exported checkpoint.
        file: The file's path, for messages.
        device: Where the model computes; the CPU for ONNX files.
        own_code: See `load`.

    Raises:
        UsageError: onnxruntime is not installed.
        DataError: The content is of another format or another model.
    """
    described = Description.read(config, file.with_name(CONFIG))
    if format.startswith("safetensors"):
        try:
            tensors = safetensors.torch.load(content)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise DataError(f"{file}: not a safetensors file ({error}); export it again") from None
        # The model computes in float32, also with weights rounded to bfloat16.
        weights = {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in tensors.items()}
        loaded = from_checkpoint(Checkpoint(file, config, weights), device, own_code=own_code)
        return dataclasses.replace(loaded, format=format)
    try:
        runner = run_torchscript(content, device) if format == "torchscript" else run_onnx(content)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    return Classifier(
        runner=runner,
        class_names=described.class_names,
        image_size=described.image_size,
        resize=described.resize,
        device=device,
        precision="int8" if format == "onnx-int8" else "fp32",
        format=format,
        file=file,
        config=config,
    )


def build_model(kind: str, model: str, arguments: Mapping[str, Any], *, own_code: Collection[str] = ()) -> nn.Module:
    """Build an untrained model from its Description's kind, name and arguments.

    Args:
        kind: `student` or `teacher`.
        model: See Description.
        arguments: See Description.
        own_code: Functions of the user's, `FILE.py:FUNCTION`, that may be run. A checkpoint alone never has one run.

    Raises:
        UsageError: The name is unknown, or the geometry does not divide evenly.
        DataError: The model is the user's own code, and `own_code` does not name it.
    """
    if is_own(model) and model not in own_code:
        raise DataError(
            f"its model is your own code, {model}, which is run only where you name it: as `model` in a recipe of "
            f"params.yaml here, or pipeline.load(..., own_code=({model!r},)) in Python"
        )
    if kind == "student":
        from pipeline.models.students import build_student

        return build_student(model, **arguments)
    from pipeline.models.teachers import build_teacher

    return build_teacher(model, **arguments)


def build_unfilled(kind: str, model: str, arguments: Mapping[str, Any], *, own_code: Collection[str] = ()) -> nn.Module:
    """Build a model whose weights are still to be loaded, or of which only the shapes count; see `build_model`.

    The paper's students and teachers are built on the device `meta`, which takes no memory. Others are built for real:
    their constructors may fail there, and buffers that no checkpoint holds would stay empty.
    """
    if model in (PAPERS_STUDENTS if kind == "student" else TEACHERS):
        with torch.device("meta"), _Undrawn():
            return build_model(kind, model, arguments)
    with torch.random.fork_rng(devices=[]):  # what is loaded must not change what is drawn
        return build_model(kind, model, arguments, own_code=own_code)


class _Undrawn(TorchFunctionMode):
    """Leaves parameters on the device `meta` as they are: they have no values that could be initialised.

    PyTorch would draw none either, but imports its compiler and SymPy for that, which takes as long as all of the rest.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DRAWING:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


def _load_export(
    directory: Path, named: str | None, format: str | None, device: str | None, own_code: Collection[str]
) -> Classifier:
    """Load a file of a directory that `pipeline export` wrote.

    Args:
        directory: The directory.
        named: The format that the path names; None takes that of `format`, or the first of FILES.
        format: What the caller asks for; without it no program is loaded.
        device: See `load`.
        own_code: See `load`.
    """
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict) or config.get("schema") != SCHEMA or not isinstance(config.get("files"), dict):
        raise DataError(f"{directory / CONFIG}: not that of an export ({SCHEMA}); run `pipeline export` again")
    available = [name for name in FILES if name in config["files"]]
    if not available:
        raise DataError(f"{directory}: its export did not end; run `pipeline export` again")
    if not is_whole(config):
        raise DataError(
            f"{directory / CONFIG}: changed since `pipeline export` wrote it; export again, or delete its `{SEAL}` to "
            "trust it as it is"
        )
    chosen = format if format is not None else named or available[0]  # TorchScript is the last of FILES
    if chosen not in available:
        raise UsageError(f"format {chosen!r}: {directory} has {', '.join(available)}")
    if chosen == "torchscript" and format is None:
        raise UsageError(
            f"{directory / FILES[chosen]} is a TorchScript archive, a program that could read and write files here; if "
            "you trust its source, load it with format='torchscript', or give a command the file's path"
        )
    is_onnx, file = chosen.startswith("onnx"), directory / FILES[chosen]
    target = resolve_device("cpu" if is_onnx and device is None else device)
    if is_onnx and target.type != "cpu":
        raise UsageError(f"device {target}: ONNX files run on the CPU here; use format='safetensors', or onnxruntime")
    content, entry = read_bytes(file), config["files"][chosen]
    digest = hashlib.sha256(content).hexdigest()
    if not isinstance(entry, dict) or entry.get("sha256") != digest:
        raise DataError(f"{file}: SHA-256 {digest[:12]}... is not what {CONFIG} says; export again")
    return from_file(chosen, content, config, file, target, own_code)


@dataclass(frozen=True)
class Description:
    """A model and its inputs, as the JSON of a checkpoint or an export describes them.

    Attributes:
        kind: `student` or `teacher`.
        model: A student's name, see StudentRecipe.model, or a teacher's, see pipeline.models.teachers.build_teacher.
        arguments: Of its constructor. Never a teacher's `weights`: a file must not make us read or download more.
        class_names: K names.
        image_size: Side of the images, pixels.
        mean: Of each channel, pixels in [0, 1].
        std: Of each channel, above 0.
        resize: How an image of another shape becomes such a square; models of before there was a choice squeeze it.
    """

    kind: str
    model: str
    arguments: Mapping[str, Any]
    class_names: tuple[str, ...]
    image_size: int
    mean: Channels
    std: Channels
    resize: str = SQUEEZE

    @classmethod
    def read(cls, meta: Mapping[str, Any], file: Path) -> Description:
        """Check the JSON of a file before anything is built from it.

        Raises:
            DataError: Fields are missing or out of range; the message names them.
        """
        arguments, names = meta.get("arguments"), meta.get("class_names")
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        limits = _limits(meta.get("kind"), meta.get("model"))
        checks = {
            "kind": meta.get("kind") in KINDS,
            "model": isinstance(meta.get("model"), str),
            "arguments": isinstance(arguments, dict) and _takes(meta, arguments.keys() - limits.keys()),
            "class_names": is_list and len(set(names or ())) == len(names or ()),
            "image_size": _is_within(meta.get("image_size"), *IMAGE_SIZES),
            "mean": _is_channels(meta.get("mean"), 0.0),
            "std": _is_channels(meta.get("std"), sys.float_info.min),
            "resize": meta.get("resize", SQUEEZE) in RESIZES,
        }
        if isinstance(arguments, dict):
            known = sorted(limits.keys() & arguments.keys())
            checks |= {f"arguments.{key}": _is_within(arguments[key], *limits[key]) for key in known}
            checks["arguments.stem"] = arguments.get("stem", "default") in STEMS
            checks["arguments.num_classes"] = is_list and arguments.get("num_classes") == len(names or ())
            size = meta.get("image_size")
            checks["arguments.image_size"] = arguments.get("image_size", size) == size
        if wrong := [key for key, is_right in checks.items() if not is_right]:
            raise DataError(f"{file}: {', '.join(wrong)} missing or impossible; name a checkpoint that a stage wrote")
        channels = {key: tuple(meta[key]) for key in ("mean", "std")}
        resize = meta.get("resize", SQUEEZE)
        return cls(
            meta["kind"], meta["model"], meta["arguments"], tuple(names or ()), meta["image_size"], **channels,
            resize=resize,
        )  # fmt: skip


def _limits(kind: Any, model: Any) -> dict[str, tuple[type, float, float]]:
    """Return type, least and largest value of the arguments that every model of a kind may have."""
    if kind == "teacher":
        return {"num_classes": CLASSES, "bn_momentum": (float, 0.0, 1.0), "input_size": INPUT_SIZES}
    from pipeline.models.students import GEOMETRY, is_foreign

    if isinstance(model, str) and is_foreign(model):
        return {"num_classes": CLASSES, "image_size": IMAGE_SIZES}
    ranges = {field.name: field.metadata.get("range", ()) for field in dataclasses.fields(StudentRecipe)}
    limits = {name: (int, *ranges[name]) for name in GEOMETRY} | {"drop_path": (float, *ranges["drop_path"])}
    return {"num_classes": CLASSES, "image_size": IMAGE_SIZES, **limits}


def _takes(meta: Mapping[str, Any], names: AbstractSet[str]) -> bool:
    """Return whether the model's constructor takes these arguments of its own."""
    from pipeline.models.students import STUDENTS, check_arguments, is_foreign

    model = meta.get("model")
    if meta.get("kind") == "teacher":
        return names <= {"stem"}
    if meta.get("kind") != "student" or not isinstance(model, str) or not (model in STUDENTS or is_foreign(model)):
        return not names
    try:
        check_arguments(model, {name: meta["arguments"][name] for name in names}, "arguments")
    except UsageError:
        return False
    return True


def _is_within(value: Any, kind: type, low: float, high: float) -> bool:
    return type(value) is kind and isinstance(value, int | float) and low <= value <= high


def _is_channels(value: Any, low: float) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_within(number, float, low, 1.0) for number in value)
