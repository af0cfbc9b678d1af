"""Who labels: the selected teacher or any other, an ensemble of several, or a file of labels that are given."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from pipeline.config.recipes import MAX_VIEWS, TeacherRecipe
from pipeline.data.datasets import Dataset
from pipeline.data.decoding import decoders
from pipeline.errors import DataError, PipelineError, UsageError
from pipeline.inference.loading import from_checkpoint
from pipeline.labels.answers import ViewLabels
from pipeline.labels.given import GivenLabels
from pipeline.labels.identity import GIVEN, MEMBER_FIELDS, make_ensemble, make_member, make_provenance
from pipeline.labels.teacher import Ensemble, Teacher, label_view
from pipeline.models import TEACHERS
from pipeline.models.own import code_sha256, is_own
from pipeline.system.canonical import require_equal
from pipeline.system.runtime import resolve_precision, versions
from pipeline.system.storage import sha256_file
from pipeline.training.checkpoints import checkpoint_files, read_meta
from pipeline.views.views import Views
from stages.shared.context import Context
from stages.shared.labelling import label_clean, read_teacher, teacher_of
from stages.shared.params import own_code
from stages.shared.runs import describe, teacher_description
from stages.shared.trained import SHORT

if TYPE_CHECKING:
    from torch import nn

DECIDING = ("checkpoint_sha256", "mean", "std", "input_size", "code_sha256")
"""The fields of a provenance that decide a teacher's labels, beside its name and how they were computed."""


def what_decides(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a teacher's labels, beside how they are computed; None for what it has not.

    Args:
        described: A provenance, or what describes a member.
    """
    teacher = str(described["teacher"])
    # Of the user's own code the function's name counts: the file has its digest, and may be named in several ways.
    name = teacher.rpartition(":")[2] if is_own(teacher) else teacher
    return {"teacher": name, **{key: described.get(key) for key in DECIDING}}


def as_member(meta: Mapping[str, Any], sha256: str, code: str | None, *, folded: bool = True) -> dict[str, Any]:
    """Return what a provenance says of a teacher, see `make_member`.

    Args:
        meta: What describes it, as the JSON of a checkpoint.
        sha256: Of its weights.
        code: Digest of its file, if it is the user's own code.
        folded: See `make_provenance`.
    """
    return make_member(
        teacher=str(meta["model"]), checkpoint_sha256=sha256, mean=meta["mean"], std=meta["std"], folded=folded,
        input_size=meta["arguments"].get("input_size"), code_sha256=code,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Member:
    """A teacher that labels, alone or in an ensemble.

    Attributes:
        context: The command's setting.
        dataset: What it labels.
        meta: What describes it, as the JSON of a checkpoint: model, arguments, mean, std.
        sha256: Of its checkpoint, of the state dict that it was given, or of the one that it was built with.
        title: What a label file that is named after it is called.
        load: Returns the model in evaluation mode, on the context's device.
    """

    context: Context
    dataset: Dataset
    meta: Mapping[str, Any]
    sha256: str
    title: str
    load: Callable[[], nn.Module]

    @property
    def model(self) -> str:
        """Its architecture."""
        return str(self.meta["model"])

    @cached_property
    def _folded(self) -> tuple[nn.Module, bool]:
        from pipeline.models.folding import fold  # imports torchvision, which takes seconds

        return fold(self.load(), self.dataset.image_size)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """What the provenance says of it, see `make_member`."""
        folded = self.model in TEACHERS or self._folded[1]  # the eight can be folded, which need not be tried
        return as_member(self.meta, self.sha256, code_sha256(self.model), folded=folded)

    def ready(self) -> Teacher:
        """Make it ready to label, see `teacher_of`."""
        return teacher_of(self.context, self.dataset, self._folded[0], self.meta)


class Labeller(Protocol):
    """Whoever labels a recipe's views."""

    @property
    def title(self) -> str:
        """What a label file that is named after it is called."""

    @property
    def sha256(self) -> str:
        """Digest of what decides its labels beside the views, 64 hexadecimal digits."""

    @property
    def is_usual(self) -> bool:
        """Whether it is one of the paper's teachers, of whose files no byte has changed since."""

    @property
    def deciding(self) -> dict[str, Any]:
        """What decides its labels, of the fields of the provenance; None for those that it has not."""

    def is_of(self, checkpoint: Mapping[str, Any]) -> bool:
        """Tell whether it is the teacher of a checkpoint, by the checkpoint's JSON."""

    @property
    def topk(self) -> int | None:
        """How many classes its answers have with their probabilities; None for as many as are asked for."""

    def provenance(self, context: Context, topk: int) -> dict[str, Any]:
        """Return the provenance of its labels, see `make_provenance`."""

    def how(self, context: Context) -> str:
        """Say in a few words how it labels."""

    def open(self, context: Context, views: Views) -> Source:
        """Make it ready to answer on a recipe's views."""


class Source(Protocol):
    """A labeller at work."""

    def view(self, index: int, topk: int) -> ViewLabels:
        """Return its answers to a view."""

    def clean(self) -> Mapping[str, NDArray[Any]]:
        """Return its labels of the unaugmented evaluation images, `(n,)` integers, by split as far as known."""


@dataclass(frozen=True, eq=False)
class TeacherLabeller:
    """One teacher, or an ensemble of several.

    Attributes:
        members: The teachers.
    """

    members: Sequence[Member]
    topk: None = None

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The arguments of `make_provenance` that describe it."""
        described = [member.fields for member in self.members]
        return described[0] if len(described) == 1 else make_ensemble(described)

    @property
    def title(self) -> str:
        """The members' titles."""
        return "+".join(member.title for member in self.members)

    @property
    def sha256(self) -> str:
        """Of the checkpoint, or of what describes the members."""
        return str(self.fields["checkpoint_sha256"])

    @property
    def is_usual(self) -> bool:
        """Whether it is one of the eight, with nothing of its own."""
        return self.members[0].model in TEACHERS and self.fields.keys() == set(MEMBER_FIELDS)

    @property
    def deciding(self) -> dict[str, Any]:
        """The model, its weights, and what it sees."""
        return what_decides(self.fields)

    def is_of(self, checkpoint: Mapping[str, Any]) -> bool:
        """By weights, model and input."""
        [first, *others] = self.members
        keys = ("model", "arguments", "mean", "std")
        is_same = first.sha256 == checkpoint["sha256"] and all(first.meta[key] == checkpoint.get(key) for key in keys)
        return is_same and not others

    def provenance(self, context: Context, topk: int) -> dict[str, Any]:
        """Return the provenance of the labels that it makes here."""
        settings, device = context.recipe.label, context.device
        return make_provenance(
            **self.fields,
            precision=resolve_precision(settings.precision, device),
            device=device.type,
            versions=versions() | _version_of_timm(self.members) | _decoders(self.members[0].dataset),
            topk=topk,
            compiled=settings.compile,
        )

    def how(self, context: Context) -> str:
        """Name the teacher and the precision."""
        return f"by {self.fields['teacher']} in {resolve_precision(context.recipe.label.precision, context.device)}"

    def open(self, context: Context, views: Views) -> Source:
        """Build the teacher on the device."""
        return _Asked(context, self.members[0].dataset, self.ready(), views)

    def ready(self) -> Teacher:
        """Make the teachers ready to label, as one."""
        teachers = [member.ready() for member in self.members]
        return teachers[0] if len(teachers) == 1 else Ensemble(teachers)


@dataclass(frozen=True, eq=False)
class _Asked:
    """A teacher at work."""

    context: Context
    dataset: Dataset
    teacher: Teacher
    views: Views

    def view(self, index: int, topk: int) -> ViewLabels:
        return label_view(self.teacher, self.views, index, topk)

    def clean(self) -> Mapping[str, NDArray[Any]]:
        return label_clean(self.context, self.dataset, self.teacher)


@dataclass(frozen=True, eq=False)
class GivenLabeller:
    """A file of labels that something else has computed.

    Attributes:
        given: Its content.
    """

    given: GivenLabels
    title: str = GIVEN
    is_usual: bool = False

    @classmethod
    def read(cls, path: Path, dataset: Dataset) -> GivenLabeller:
        """Read a file, see `GivenLabels.read`."""
        num_clean = {split: len(part) for split, part in dataset.splits.items() if split != "train"}
        sizes = {"num_samples": len(dataset.train), "num_classes": dataset.num_classes, "max_views": MAX_VIEWS}
        return cls(GivenLabels.read(path, num_clean=num_clean, **sizes))

    @property
    def sha256(self) -> str:
        """Of the file."""
        return self.given.sha256

    @property
    def deciding(self) -> dict[str, Any]:
        """The file."""
        return {"checkpoint_sha256": self.sha256}

    def is_of(self, checkpoint: Mapping[str, Any]) -> bool:
        """Never."""
        return False

    @property
    def topk(self) -> int:
        """As many as the file has, whatever is asked for."""
        return self.given.topk

    def provenance(self, context: Context, topk: int) -> dict[str, Any]:
        """Return the provenance of what is given, and by what the views' files are decoded."""
        return {**self.given.provenance, "versions": _decoders(context.dataset())}

    def how(self, context: Context) -> str:
        """Name the file."""
        return f"as {self.given.path} gives them"

    def open(self, context: Context, views: Views) -> Source:
        """Return itself: all is known."""
        return self

    def view(self, index: int, topk: int) -> ViewLabels:
        """Return what is given for a view."""
        return self.given.view(index)

    def clean(self) -> Mapping[str, NDArray[Any]]:
        """Return what is given for the evaluation images."""
        return self.given.clean


def read_labeller(context: Context, dataset: Dataset, teachers: Sequence[str], given: Path | None) -> Labeller:
    """Return whoever labels.

    Args:
        context: The command's setting.
        dataset: The data to label.
        teachers: What `--teacher` names, several for an ensemble; none takes the selected teacher.
        given: The file that `--from` names.

    Raises:
        UsageError: A name is none of a teacher.
        DataError: A teacher or the file does not fit the data.
    """
    if given is not None:
        return GivenLabeller.read(given, dataset)
    return TeacherLabeller([find_member(context, dataset, what) for what in teachers or [str(context.paths.winner)]])


def require_teacher(context: Context, what: str) -> None:
    """Check that `--teacher` names something, before any data is looked for.

    Raises:
        UsageError: It does not.
    """
    is_known = what in context.recipe.teachers or _is_model(what.partition("=")[0]) or _exists(Path(what))
    if not is_known:
        raise UsageError(
            f"--teacher {what}: no teacher of recipe {context.recipe.name} ({', '.join(context.recipe.teachers)}), no "
            "path that exists and no model; a model is torchvision/NAME, timm/NAME or FILE.py:FUNCTION, a state dict "
            "MODEL=FILE"
        )


def find_member(context: Context, dataset: Dataset, what: str) -> Member:
    """Return the teacher that `--teacher` names.

    Args:
        context: The command's setting.
        dataset: The data to label.
        what: A teacher of the recipe, trained or finished (`epochs: 0`); the path of a checkpoint; a model of
            torchvision, timm or a user's file, whose weights must be for these classes; or MODEL=FILE, a state dict.

    Raises:
        UsageError: It is none of these, or the model cannot be built.
        DataError: It does not fit the data.
    """
    option, recipe = f"--teacher {what}", context.recipe.teachers.get(what)
    if recipe is not None:
        if read_meta(folder := context.paths.teacher(what)) is not None:
            return _checkpoint(context, dataset, folder, what)
        if recipe.epochs == 0:
            return _built(context, dataset, recipe, option, what)
        raise DataError(f"{folder}: {what} is not trained; run `pipeline teacher {what}`")
    model, equals, file = what.partition("=")
    if equals and _is_model(model):
        return _built(context, dataset, _finished(model, file), option, Path(file).stem)
    path = Path(what)
    if _exists(path):
        if path.is_file() and not (path.suffix == ".safetensors" and path.with_suffix(".json").is_file()):
            is_code = path.suffix == ".py"
            way_out = f"{what}:FUNCTION" if is_code else f"MODEL={what}, as torchvision/resnet18={what}"
            what_it_is = "code without the name of its function" if is_code else "no checkpoint of ours"
            raise UsageError(f"{option}: {what_it_is}; write --teacher {way_out}")
        folder = path.parent if path.is_file() and path.stem in ("best", "last") else path
        return _checkpoint(context, dataset, path, folder.resolve().name.removesuffix(".safetensors"))
    require_teacher(context, what)
    weights = "none" if is_own(what) else "imagenet"
    name = Path(what.rpartition(":")[0]).stem if is_own(what) else what.rpartition("/")[2]
    return _built(context, dataset, _finished(what, weights), option, name)


def _exists(path: Path) -> bool:
    """Return whether there is such a file or folder; a name that is too long is none."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def _is_model(text: str) -> bool:
    return text in TEACHERS or text.startswith(("torchvision/", "timm/")) or is_own(text)


def _title(text: str) -> str:
    """Return a text as the name of a file of labels."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text).lstrip("._+-") or "teacher"


def _checkpoint(context: Context, dataset: Dataset, path: Path, title: str) -> Member:
    """Return the teacher of a checkpoint.

    Raises:
        DataError: Its JSON describes no model, or it was trained on other data.
    """
    checkpoint = read_teacher(context, dataset, path)

    def load() -> nn.Module:
        return from_checkpoint(checkpoint, context.device, own_code=own_code(context.params)).module

    return Member(context, dataset, checkpoint.meta, checkpoint.sha256, _title(title), load)


def _finished(model: str, weights: str) -> TeacherRecipe:
    """Return the recipe of a teacher that is named on a command line."""
    return TeacherRecipe(model=model, weights=weights, epochs=0, batch_size=1, optimizer="sgd", lr=0.0)


def _built(context: Context, dataset: Dataset, recipe: TeacherRecipe, option: str, title: str) -> Member:
    """Return a teacher that is finished as it is built.

    Raises:
        UsageError: There is no such model, or its head would be random.
        DataError: The weights do not fit.
    """
    import torch

    from pipeline.models.teachers import build_teacher, check_teacher, require_size

    check_teacher(recipe.model, option, weights=recipe.weights, stem=recipe.stem)
    built = teacher_description(dataset, recipe)
    description = describe(dataset, context.recipe.name, kind="teacher", **built)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of a function that draws weights and does not say how
        module = build_teacher(recipe.model, weights=recipe.weights, finished=True, **built["arguments"])
    require_size(module, recipe.model, num_classes=dataset.num_classes, image_size=dataset.image_size)
    if recipe.weights in ("none", "imagenet"):
        _, sha256 = checkpoint_files("best", module.state_dict(), {})
    else:
        sha256 = sha256_file(Path(recipe.weights))
    return Member(context, dataset, description, sha256, _title(title), lambda: module.to(context.device).eval())


def _version_of_timm(members: Sequence[Member]) -> dict[str, str]:
    """Return timm's version where it has built one of the teachers."""
    return {"timm": importlib.metadata.version("timm")} if any(m.model.startswith("timm/") for m in members) else {}


def _decoders(dataset: Dataset) -> dict[str, str]:
    """Return the versions of what decodes a data set's files; nothing where it keeps pixels."""
    return {} if dataset.rendition is None else decoders()


def find_labeller(
    context: Context, dataset: Dataset, path: Path, recorded: Mapping[str, Any], teachers: Sequence[str] = ()
) -> TeacherLabeller:
    """Return who made the labels of a file.

    Args:
        context: The command's setting.
        dataset: The data that are labelled.
        path: The file, for messages.
        recorded: Its provenance, not of labels that were given.
        teachers: What `--teacher` names, in any order; none looks among the recipe's teachers.

    Raises:
        UsageError: A name is none of a teacher.
        DataError: It is none of those, or another.
    """
    wanted = [dict(member) for member in recorded.get("members", [recorded])]
    if teachers:
        members = [find_member(context, dataset, what) for what in teachers]
        order = [member["checkpoint_sha256"] for member in wanted]
        members.sort(key=lambda member: order.index(member.sha256) if member.sha256 in order else len(order))
    else:
        members = [_find_recorded(context, dataset, path, member) for member in wanted]
    labeller = TeacherLabeller(members)
    if labeller.sha256 != recorded["checkpoint_sha256"]:
        raise DataError(
            f"{path}: labelled by checkpoint {recorded['checkpoint_sha256'][:SHORT]}..., not by "
            f"{labeller.title} ({labeller.sha256[:SHORT]}...); name the right one with --teacher"
        )
    changed = f"{labeller.title} has changed since; label again"
    require_equal(f"{path}", what_decides(recorded), labeller.deciding, changed)
    return labeller


def _find_recorded(context: Context, dataset: Dataset, path: Path, recorded: Mapping[str, Any]) -> Member:
    """Return the teacher of a provenance: a checkpoint of the recipe, or one that is finished as it is built.

    A function of the user's is called only where the recipe names it.

    Raises:
        DataError: None of them is it.
    """
    paths, sha256, model = context.paths, recorded["checkpoint_sha256"], str(recorded["teacher"])
    runs = sorted(paths.run("").iterdir()) if paths.run("").is_dir() else []
    for folder in (paths.winner, *map(paths.teacher, context.recipe.teachers), *runs):
        if (meta := read_meta(folder)) is not None and meta["sha256"] == sha256:
            return find_member(context, dataset, str(folder))
    finished = [recipe for recipe in context.recipe.teachers.values() if recipe.epochs == 0 and recipe.model == model]
    if _is_model(model) and not is_own(model):
        finished.append(_finished(model, "imagenet"))
    for recipe in finished:
        with contextlib.suppress(PipelineError):
            if (member := _built(context, dataset, recipe, model, model)).sha256 == sha256:
                return member
    raise DataError(
        f"{path}: labelled by checkpoint {sha256[:SHORT]}... of {model}, which none of the teachers in {paths.root} "
        "has, nor is there a way to build it; name the right one with --teacher"
    )
