"""Both stages from Python, without a params.yaml: `distill` and `label` of the module titn.

They call what the commands call, on a recipe made of the package's recipe `folder`, in a folder that is a project: the
commands work there too, except where the recipe names own files by relative paths, which are the caller's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from pipeline.config.params import load_yaml, parse_params
from pipeline.config.recipes import RESIZES, SQUEEZE
from pipeline.errors import DataError, Interrupted, PipelineError, UsageError, printable
from pipeline.system.stopping import StopSignal
from pipeline.system.storage import read_if_exists, write_atomic
from stages.shared.context import Context
from stages.shared.options import MAX_SEED, make_console
from stages.shared.params import check_models, own_code
from stages.shared.paths import PARAMS, PROJECT

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from pipeline.data.datasets import Dataset
    from pipeline.inference.classifier import AnyImage, Classifier, Prediction, Transform
    from pipeline.labels.cache import LabelCache

    Arrays: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.integer[Any]], Sequence[str] | Sequence[int]]

RECIPE = "folder"
"""The recipe of the package's params.yaml that is changed, and the name of the result."""
WRITTEN = "# Written by titn.distill or titn.label, for the commands in this folder; the next call replaces it.\n"
OWN_ARGUMENTS = {
    ("dataset", "source"): "data", ("dataset", "path"): "data", ("dataset", "image_size"): "image_size",
    ("views", "count"): "views", ("teacher", "model"): "teacher", ("teacher", "epochs"): "teacher_epochs",
    ("teacher", "weights"): "weights", ("student", "model"): "student", ("student", "epochs"): "epochs",
}  # fmt: skip
"""The fields of a recipe that have an argument of their own."""
IN_PYTHON = {
    rf"recipes\.{RECIPE}\.([\w.]+)": r"\1 of settings",
    r"--skip-bad": "skip_bad=True",
    r"--out (\S+):": r"folder=\1:",
    r"--int8": "int8=True",
    r"--dtype bf16": 'dtype="bf16"',
    r"--format (\w+)": r'format="\1"',
    r"--license (\S+):": r"license=\1:",
    r"--device (\S+):": r"device=\1:",
    r" with --data": " by `pipeline export --data FOLDER`",
}
"""What errors of the commands name, outside their backticks, and what it is in Python."""
CUTS = ("val_fraction", "test_fraction", "split_seed")
"""The fields of a recipe that say how splits are cut, which a Dataset has."""
SECTIONS = ("dataset", "views", "teacher", "select", "label", "student")
WARM_UP = 0.1  # the most that warming up takes of few epochs


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A student that `distill` has trained.

    Attributes:
        classifier: The model with its class names; images to probabilities, see Classifier.
        metrics: What metrics.json says: scores, costs, settings.
        folder: The run's directory, an absolute path; the commands `predict`, `bench`, `evaluate` and `export` take it.
            Another `distill` with the same `folder=` may replace what is there; this model stays as it is.
    """

    classifier: Classifier
    metrics: Mapping[str, Any] = field(repr=False)
    folder: Path
    _context: Context = field(repr=False)

    def __repr__(self) -> str:
        """Name the model, its classes and its score."""
        score = f"{self.scores['top1']:.2f} % of the test images right"
        return f"TrainedModel({self.metrics['name']}, {len(self.class_names)} classes, {score}, {self.folder})"

    @property
    def module(self) -> nn.Module:
        """The student itself: normalised images `(B, 3, S, S)` float32 to the logits of its heads."""
        return self.classifier.module

    @property
    def transform(self) -> Transform:
        """Makes an image of any size a `(3, S, S)` uint8 tensor, as calling the model takes them."""
        return self.classifier.transform

    @property
    def class_names(self) -> tuple[str, ...]:
        """The K classes, in the order of the probabilities."""
        return self.classifier.class_names

    @property
    def scores(self) -> Mapping[str, Any]:
        """The scores of the best epoch on the test images, percent: `top1`, `f1` and more."""
        return dict(self.metrics["test"])

    def __call__(self, images: Tensor) -> Tensor:
        """Return the probabilities `(B, K)` float32 of images `(B, 3, S, S)` uint8; see Classifier."""
        return self.classifier(images)

    @overload
    def predict(self, images: AnyImage) -> Prediction: ...  # type: ignore[overload-overlap]  # a text is one path

    @overload
    def predict(self, images: Sequence[AnyImage]) -> list[Prediction]: ...

    def predict(self, images: AnyImage | Sequence[AnyImage]) -> Prediction | list[Prediction]:
        """Name the class of an image, or of each of a list.

        Args:
            images: A path, a file's bytes, a PIL image, or a uint8 array `(H, W)` grey or `(H, W, 3)` RGB, of any size;
                or a list of these.

        Returns:
            A prediction for one image; a list of them, in the same order, for a list.

        Raises:
            DataError: One is no image, or a damaged one.
        """
        return self.classifier.predict(images)

    def export(
        self,
        folder: Path | str,
        *,
        format: str | Sequence[str] = "onnx",
        int8: bool = False,
        dtype: str = "fp32",
        license: str = "unknown",
    ) -> Path:
        """Write the model for other programs, with a model card, as `pipeline export` does.

        Args:
            folder: A new directory, or that of a former export.
            format: One or more of `onnx`, `torchscript` and `safetensors`.
            int8: Whether to add a quantised ONNX file.
            dtype: `fp32`, or `bf16` for safetensors alone.
            license: Of the weights, for the card.

        Returns:
            The directory, as `titn.load` takes it.

        Raises:
            UsageError: Options do not go together, an extra is missing, or the directory holds other files.
            DataError: `self.folder` holds another run by now.
            NumericalError: A file's answers are not PyTorch's on the test images; nothing is written then.
        """
        from pipeline.inference.classifier import CPU
        from pipeline.inference.loading import from_checkpoint
        from pipeline.training.checkpoints import load_checkpoint
        from stages.export import check_request, export, from_recipe

        out, formats = Path(folder), [format] if isinstance(format, str) else format
        known, say = own_code(self._context.params), self._context.say
        with _in_python():
            names = check_request(formats, dtype, int8=int8, license=license, out=out)
            checkpoint = load_checkpoint(self.folder)
            if checkpoint.sha256 != self.classifier.config["sha256"]:
                raise DataError(
                    f"{printable(self.folder)}: holds another run by now; export a model before `distill` trains "
                    "another one in its folder, or give each a folder of its own"
                )
            classifier = from_checkpoint(checkpoint, CPU, blocks="plain", own_code=known)
            export(classifier, from_recipe(self._context, classifier), out, formats=names, license=license, say=say)
        return out


def distill(
    data: Path | str | Dataset | Arrays,
    *,
    teacher: str = "resnet50",
    student: str = "titn",
    epochs: int = 100,
    teacher_epochs: int = 30,
    weights: str = "imagenet",
    views: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    folder: Path | str = "titn-work",
    skip_bad: bool = False,
    quiet: bool = False,
) -> TrainedModel:
    """Fine-tune a teacher, let it label views of the training images, and train a student on the labels.

        model = titn.distill("my-images", teacher="resnet50", student="titn", epochs=30)
        print(model.predict("cat.jpg").class_name, model.scores["top1"])

    Called again, it goes on where it was interrupted, keeps what is up to date, and returns at once what is finished.
    PyTorch's generators are as before afterwards.
    Ctrl-C ends it once the current step is saved; after a kill, up to a minute's training is done again. Results lie in
    `folder`, which holds one teacher's labels: another teacher's, or those of other views, take their place. The
    commands work in that folder, as `pipeline report` and `pipeline bench`. They read relative paths from there: a
    model `FILE.py:FUNCTION` and `weights` of your own are found only if you give them as absolute paths.

    Args:
        data: A folder of images (`train/<class>/*`, perhaps with `val` and `test`, or `<class>/*`) or a CSV file, as
            `pipeline prepare --from` takes them; a Dataset; or arrays: images `(N, S, S, 3)` uint8, labels `(N,)`
            integers, K class names. Where there is no test split a fifth of the images is held out.
        teacher: Its model, as in a recipe: one of the eight names, as `resnet50`, or what else `model` takes there.
        student: The student, likewise: `titn`, `deit`, or what else has a head for the teacher's labels.
        epochs: The student's.
        teacher_epochs: The teacher's.
        weights: The teacher's at the start: `imagenet` (downloaded once), `none` (random), or the path of a state dict.
        views: Augmented versions of the training set that the teacher labels; None takes one for each epoch.
        image_size: Side of the images, pixels; None takes 32 for files, else the images' own.
        seed: Of the student's initialisation and order, from 0 to 2**31 - 1.
        device: `cpu`, `cuda` or `cuda:1`; None takes a GPU where there is one.
        settings: Any other field of the recipe, by its section in params.yaml, as `{"student": {"lr": 0.05, "width":
            96}, "views": {"operations": {"flip": False}}}`; docs/recipes.md lists them.
        folder: Where everything is kept, made if missing. To start over, delete it.
        skip_bad: Whether to leave out the files that cannot be read, which are an error otherwise.
        quiet: Whether to print nothing.

    Returns:
        The student of the best epoch, on the device, in evaluation mode.

    Raises:
        UsageError: An argument or setting is wrong.
        DataError: The images are no data set, or the teacher has learned nothing.
        NumericalError: A loss is not finite.
        StorageError: Reading, writing or downloading failed.
        KeyboardInterrupt: Ctrl-C; what was done is saved.
    """
    from pipeline.inference.loading import build_unfilled, load
    from pipeline.models.students import STUDENTS
    from pipeline.training.manifest import read_json_checked
    from stages.distill import distill as train_student
    from stages.distill import plan_student, student_recipe
    from stages.shared.runs import student_arguments
    from stages.shared.teacher_labels import require_distillation_head
    from stages.teacher_select import teacher_select

    seed = _checked_seed(seed)
    context = _open(
        data, teacher, student, epochs=epochs, teacher_epochs=teacher_epochs, weights=weights,
        views=views, image_size=image_size, device=device, settings=settings or {},
        folder=Path(folder), quiet=quiet,
    )  # fmt: skip
    (name,) = context.params.students
    recipe = student_recipe(context.recipe, name, {})
    require_distillation_head(f"student={student!r}", name, recipe)
    if recipe.model in STUDENTS:  # what does not fit the images is refused before a teacher is trained
        size = context.recipe.dataset.image_size
        build_unfilled("student", recipe.model, student_arguments(recipe, num_classes=2, image_size=size))
    with _in_python(context):
        _prepare(context, data, skip_bad)
        teacher_select(context)
        if not plan_student(context, name, seed=seed)[1].is_distilled:  # a model that had to be tried first
            raise UsageError(f"student={student!r}: it has one head, and none for the teacher's labels; return two")
        out = train_student(context, name, seed=seed).absolute()  # the caller may change the working directory
    model = load(out, device=str(context.device), own_code=own_code(context.params))
    own = dataclasses.replace(context, _loaded=None, project=context.project.absolute())  # images need not stay in RAM
    return TrainedModel(model, read_json_checked(out / "metrics.json"), out, own)


def label(
    data: Path | str | Dataset | Arrays,
    *,
    teacher: str = "resnet50",
    views: int = 100,
    teacher_epochs: int = 30,
    weights: str = "imagenet",
    image_size: int | None = None,
    device: str | torch.device | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    folder: Path | str = "titn-work",
    skip_bad: bool = False,
    quiet: bool = False,
) -> LabelCache:
    """Do the first of the two stages of `distill`: fine-tune a teacher, and let it label views of the training images.

    Arguments and errors are those of `distill`, which goes on from the labels if it is called with the same ones.

    Returns:
        The labels, `.labels` `(V, N)`, with `.classes` and `.probabilities` if `settings={"label": {"topk": 5}}`.
    """
    from stages.shared.teacher_labels import open_labels
    from stages.teacher_select import teacher_select

    context = _open(
        data, teacher, "titn", epochs=views, teacher_epochs=teacher_epochs, weights=weights, views=views,
        image_size=image_size, device=device, settings=settings or {}, folder=Path(folder), quiet=quiet,
    )  # fmt: skip
    with _in_python(context):
        _prepare(context, data, skip_bad)
        teacher_select(context)
    (used,) = context.params.view_recipes
    return open_labels(context.paths, context.recipe, context.dataset(), used)


@contextlib.contextmanager
def _in_python(context: Context | None = None) -> Iterator[None]:
    """Run commands' code for a host program: its generators stay as they are, Ctrl-C ends it, errors name arguments."""
    try:
        if context is None:
            yield
            return
        import torch

        devices = [context.device] if context.device.type == "cuda" else []
        with torch.random.fork_rng(devices), context.stop.taking_ctrl_c():
            yield
    except Interrupted:
        raise
    except PipelineError as error:
        parts = str(error).split("`")  # commands between them are run in the folder
        for words, in_python in IN_PYTHON.items():
            parts[::2] = [re.sub(words, in_python, part) for part in parts[::2]]
        if (message := "`".join(parts)) == str(error):
            raise
        raise type(error)(message) from error


def _checked_seed(seed: Any) -> int:
    """Return a seed as the commands take it, also where it is one of NumPy's integers.

    Raises:
        UsageError: It is none.
    """
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number <= MAX_SEED:
        raise UsageError(f"seed={printable(repr(seed))}: write a whole number from 0 to {MAX_SEED}")
    return number


def _open(
    data: Path | str | Dataset | Arrays, teacher: str, student: str, *, epochs: int, teacher_epochs: int, weights: str,
    views: int | None, image_size: int | None, device: str | torch.device | None,
    settings: Mapping[str, Mapping[str, Any]], folder: Path, quiet: bool,
) -> Context:  # fmt: skip
    """Check the arguments, make the recipe of them, write it into the folder, and return the setting."""
    numbers = epochs, teacher_epochs, weights, epochs if views is None else views, image_size, settings
    epochs, teacher_epochs, weights, num_views, image_size, settings = map(_plain, numbers)
    for argument, model in (("teacher", teacher), ("student", student)):
        if not isinstance(model, str):
            raise UsageError(f"{argument}={printable(repr(model))}: write its model as a text, as in a recipe")
    tree = _tree(teacher, student, epochs, teacher_epochs, weights, num_views, settings)
    tree["recipes"][RECIPE]["dataset"] |= _described(data, image_size, settings.get("dataset", {}))
    try:
        params = parse_params(tree)
        check_models(params)
    except UsageError as error:
        message = str(error)
        if views is None:
            message = message.replace(f"recipes.{RECIPE}.views.default.count", "epochs")
        for (section, key), argument in OWN_ARGUMENTS.items():
            message = re.sub(rf"^recipes\.{RECIPE}\.{section}s?\.([^.:]+\.)?{key}(?=:)", argument, message)
        raise UsageError(message.replace(f"recipes.{RECIPE}.", "settings: ")) from None
    content = WRITTEN + json.dumps(tree, indent=1) + "\n"
    file = folder / PARAMS
    former = read_if_exists(file)
    if former is not None and not former.startswith(WRITTEN.encode()):
        raise UsageError(f"folder={str(folder)!r}: a project with a {PARAMS} of its own; name another folder")
    named = None if device is None else str(device)
    context = Context(params, params.select(None), make_console(quiet=quiet), StopSignal(), named, project=folder)
    with _in_python():
        _ = context.device
    if former != content.encode() and context.ranks.is_main:
        write_atomic(file, content.encode())
    context.console.quiet |= not context.ranks.is_main
    return context


def _tree(
    teacher: str,
    student: str,
    epochs: int,
    teacher_epochs: int,
    weights: str,
    views: int,
    settings: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return params.yaml's content: the package's recipe `folder` with what the arguments change."""
    for section, fields in settings.items():
        if section not in SECTIONS or not isinstance(fields, Mapping):
            raise UsageError(
                f"settings: {section!r}: {fields!r}; write a mapping of fields under one of {', '.join(SECTIONS)}"
            )
        for key in fields:
            if (argument := OWN_ARGUMENTS.get((section, key))) is not None:
                raise UsageError(f"settings: {section}.{key}: give it as {argument}=")
    tree = load_yaml((PROJECT / PARAMS).read_text(encoding="utf-8"), str(PARAMS))
    recipe = tree["recipes"][RECIPE]
    for section in SECTIONS:
        if section == "views":
            for fields in recipe[section].values():
                _merge(fields, {"count": views, **settings.get(section, {})})
        else:
            _merge(recipe.setdefault(section, {}), settings.get(section, {}))
    for kind, length in (("teacher", teacher_epochs), ("student", epochs)):
        shared = recipe[kind]
        shared["epochs"] = length
        if "warmup_epochs" not in settings.get(kind, {}) and isinstance(length, int):
            shared["warmup_epochs"] = min(shared["warmup_epochs"], WARM_UP * length)
    recipe["teacher"]["weights"] = weights
    names = _name_of(teacher), _name_of(student)
    own = dict(recipe["students"].get(student, {"model": student}))
    recipe["teachers"] = {names[0]: {} if names[0] == teacher else {"model": teacher}}
    recipe["students"] = {names[1]: own}
    used = own.get("views", recipe["student"].get("views", "default"))
    return {
        "recipe": RECIPE,
        "teachers": [names[0]],
        "view_recipes": [used],
        "students": {names[1]: used},
        "recipes": {RECIPE: recipe},
    }


def _merge(section: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Replace fields of a recipe's section; mappings in it, as `operations`, field by field."""
    for key, value in fields.items():
        if isinstance(value, Mapping) and isinstance(section.get(key), dict):
            _merge(section[key], value)
        else:
            section[key] = dict(value) if isinstance(value, Mapping) else value


def _plain(value: Any) -> Any:
    """Return a value as params.yaml holds it: numbers that are not NumPy's, paths as texts."""
    import numpy as np

    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else os.fspath(value) if isinstance(value, Path) else value


def _name_of(model: str) -> str:
    """Return a name for a model in a recipe, as `convnext_tiny` for `torchvision/convnext_tiny`."""
    name = re.sub(r"[^a-z0-9_-]+", "-", model.rpartition("/")[2].replace(".py:", "-").lower())
    return name.lstrip("-_")[:64] or "model"


def _described(
    data: Path | str | Dataset | Arrays, image_size: int | None, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the recipe's `dataset` says of the images; an existing folder, arrays and sizes are checked later.

    `fields` are the caller's settings of `dataset`.
    """
    if isinstance(data, str | Path):
        if not str(data):
            raise UsageError("data: an empty path; name a folder of images")
        return {} if image_size is None else {"image_size": image_size}
    if isinstance(data, tuple):
        if len(data) != 3 or getattr(data[0], "ndim", 0) != 4:
            raise UsageError("data: a tuple must hold images (N, S, S, 3) uint8, labels (N,) and class names")
        sides = tuple(data[0].shape[1:])
        if sides[0] != sides[1] or sides[2] != 3:
            raise UsageError(f"data: images are {data[0].dtype} of shape {data[0].shape}; give uint8 RGB, (N, S, S, 3)")
        described = {"source": RECIPE, "image_size": int(data[0].shape[1])}
    else:
        from pipeline.data.datasets import Dataset

        if not isinstance(data, Dataset):
            raise UsageError(
                f"data: a {type(data).__name__}; give a folder, a Dataset, or (images, labels, class names)"
            )
        for key in CUTS:
            if key in fields:
                raise UsageError(f"settings: dataset.{key}: {fields[key]!r}: the Dataset has its splits; leave it out")
        described = {"source": data.source, "image_size": data.image_size, "resize": _resize_of(data, fields)}
    if image_size not in (None, described["image_size"]):
        raise UsageError(
            f"image_size={image_size}: the images have {described['image_size']} pixels; leave it out, or resize them "
            "before"
        )
    return described


def _resize_of(data: Dataset, fields: Mapping[str, Any]) -> Any:
    """Return how a Dataset's images became squares: as it states, else as the caller's settings of `dataset` say."""
    asked = fields.get("resize", data.resize)
    # Pixels that a former version prepared name no rule, and read as squeezed; what is no rule is refused later.
    states_none = data.rendition is None and data.resize == SQUEEZE
    if asked == data.resize or states_none or asked not in RESIZES:
        return asked
    way_out = f", or make the Dataset by Dataset.from_arrays(..., resize={asked!r})" if data.rendition is None else ""
    raise UsageError(
        f"settings: dataset.resize: {asked!r}: the Dataset's images become squares by {data.resize!r}; "
        f"leave it out{way_out}"
    )


def _prepare(context: Context, data: Path | str | Dataset | Arrays, skip_bad: bool = False) -> None:
    """Prepare the images, unless that is up to date."""
    from pipeline.data.datasets import Dataset
    from stages.prepare import prepare_unless_done, take_dataset

    def prepare() -> None:
        if isinstance(data, str | Path):
            prepare_unless_done(context, folder=Path(data), skip_bad=skip_bad)
            return
        recipe = context.recipe.dataset
        dataset = data
        if isinstance(dataset, tuple):
            dataset = Dataset.from_arrays(
                *dataset,
                val_fraction=recipe.val_fraction,
                test_fraction=recipe.test_fraction,
                split_seed=recipe.split_seed,
                resize=recipe.resize,
            )
        elif dataset.resize != recipe.resize:  # it states none
            dataset = dataclasses.replace(dataset, resize=recipe.resize)
        take_dataset(context, dataset)

    if isinstance(data, str | Path) and not Path(data).exists():
        raise UsageError(f"data={printable(data)!r}: no such folder or file")
    with context.joined() as group:
        group.on_main(prepare)
