"""Who labels: the selected teacher or any other, an ensemble of several, or a file of labels that are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from pipeline.config.recipes import MAX_VIEWS
from pipeline.data.datasets import Dataset
from pipeline.errors import DataError, UsageError
from pipeline.labels.answers import ViewLabels
from pipeline.labels.given import GivenLabels
from pipeline.labels.identity import GIVEN, MEMBER_FIELDS, make_ensemble, make_member, make_provenance
from pipeline.labels.teacher import Ensemble, Teacher, label_view
from pipeline.models import TEACHERS
from pipeline.system.runtime import resolve_precision, versions
from pipeline.training.checkpoints import Checkpoint, read_meta
from pipeline.views.views import Views
from stages.shared.context import Context
from stages.shared.labelling import label_clean, make_ready, read_teacher
from stages.shared.trained import SHORT


@dataclass(frozen=True, eq=False)
class Member:
    """A teacher that labels, alone or in an ensemble.

    Attributes:
        checkpoint: Its weights, and the JSON that describes it.
        title: What a label file that is named after it is called.
    """

    checkpoint: Checkpoint
    title: str

    @property
    def model(self) -> str:
        """Its architecture."""
        return str(self.checkpoint.meta["model"])

    @property
    def sha256(self) -> str:
        """Of its weights."""
        return self.checkpoint.sha256

    def describe(self, dataset: Dataset) -> dict[str, Any]:
        """Return what the provenance says of it, see `make_member`."""
        return make_member(teacher=self.model, checkpoint_sha256=self.sha256, mean=dataset.mean, std=dataset.std)

    def ready(self, context: Context, dataset: Dataset) -> Teacher:
        """See `make_ready`."""
        return make_ready(context, dataset, self.checkpoint)


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

    def topk(self, asked: int) -> int:
        """Return how many classes it keeps with their probabilities where `asked` are asked for."""

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
        dataset: What they label.
    """

    members: Sequence[Member]
    dataset: Dataset

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Return the arguments of `make_provenance` that describe it."""
        described = [member.describe(self.dataset) for member in self.members]
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

    def topk(self, asked: int) -> int:
        """As asked."""
        return asked

    def provenance(self, context: Context, topk: int) -> dict[str, Any]:
        """Return the provenance of the labels that it makes here."""
        settings, device = context.recipe.label, context.device
        return make_provenance(
            **self.fields,
            precision=resolve_precision(settings.precision, device),
            device=device.type,
            versions=versions(),
            topk=topk,
            compiled=settings.compile,
        )

    def how(self, context: Context) -> str:
        """Name the teacher and the precision."""
        return f"by {self.fields['teacher']} in {resolve_precision(context.recipe.label.precision, context.device)}"

    def open(self, context: Context, views: Views) -> Source:
        """Build the teacher on the device."""
        return _Asked(context, self.dataset, self.ready(context), views)

    def ready(self, context: Context) -> Teacher:
        """Build the teacher on the device, see `make_ready`."""
        teachers = [member.ready(context, self.dataset) for member in self.members]
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

    def topk(self, asked: int) -> int:
        """As many as the file has, whatever is asked for."""
        return self.given.topk

    def provenance(self, context: Context, topk: int) -> dict[str, Any]:
        """Return the provenance of what is given."""
        return self.given.provenance

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
    return TeacherLabeller([find_member(context, dataset, what) for what in teachers or [_winner(context)]], dataset)


def find_member(context: Context, dataset: Dataset, what: str) -> Member:
    """Return the teacher that `--teacher` names.

    Args:
        context: The command's setting.
        dataset: The data to label.
        what: A teacher of the recipe, or the path of a checkpoint.

    Raises:
        UsageError: It is neither.
        DataError: It does not fit the data.
    """
    path = context.paths.teacher(what) if what in context.recipe.teachers else Path(what)
    if not path.exists():
        raise UsageError(f"{path}: No such file or directory; name what exists")
    folder = path.parent if path.stem in ("best", "last") else path
    title = folder.resolve().stem if folder.suffix == ".safetensors" else folder.resolve().name
    return Member(read_teacher(context, dataset, path), title)


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
    labeller = TeacherLabeller(members, dataset)
    if labeller.sha256 != recorded["checkpoint_sha256"]:
        raise DataError(
            f"{path}: labelled by checkpoint {recorded['checkpoint_sha256'][:SHORT]}..., not by "
            f"{labeller.title} ({labeller.sha256[:SHORT]}...); name the right one with --teacher"
        )
    return labeller


def _find_recorded(context: Context, dataset: Dataset, path: Path, recorded: Mapping[str, Any]) -> Member:
    """Return the teacher of a provenance: a checkpoint of the recipe.

    Raises:
        DataError: None of them is it.
    """
    paths, sha256 = context.paths, recorded["checkpoint_sha256"]
    runs = sorted(paths.run("").iterdir()) if paths.run("").is_dir() else []
    for folder in (paths.winner, *map(paths.teacher, context.recipe.teachers), *runs):
        if (meta := read_meta(folder)) is not None and meta["sha256"] == sha256:
            return find_member(context, dataset, str(folder))
    raise DataError(
        f"{path}: labelled by checkpoint {sha256[:SHORT]}... of {recorded['teacher']}, which none of the teachers in "
        f"{paths.root} has; name the right one with --teacher"
    )


def _winner(context: Context) -> str:
    """Return the folder of the selected teacher, as a path even where a teacher has that name."""
    return str(context.paths.winner)
