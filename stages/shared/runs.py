"""One model to be trained: what decides its result, where that goes, and whether it is there already."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.config.recipes import SQUEEZE, FitRecipe, StudentRecipe, TeacherRecipe, deciding_values
from pipeline.errors import DataError, StorageError
from pipeline.report.watching import LOG
from pipeline.system.canonical import MISSING, Difference, compare, fingerprint
from pipeline.system.storage import lock, remove_leftovers
from pipeline.system.text import counted
from pipeline.training.checkpoints import RunState, read_meta
from pipeline.training.manifest import MANIFEST, adopt, check_all, finish_replacing, is_being_replaced, read_manifest
from stages.shared import kept
from stages.shared.paths import Paths
from stages.shared.places import Place

if TYPE_CHECKING:
    from pipeline.data.datasets import Dataset
    from pipeline.data.file import Channels

    Normalization = tuple[Channels, Channels]

# Raised where the code gives other results from the same recipe: what was trained before is then trained again. The
# package's own version may change without that.
RESULTS_VERSION = "0.1.0"
# Raised where the same weights are judged in another way, or others are chosen as the best epoch's: what was trained
# before stays, and its figures are not compared with new ones. What names no number was judged by the first.
# 2: of equal epochs the lower loss counts, then the later (1: the first); the last layer decides in fp32 (1: in bf16).
RULES = 2
NOT_TRAINED = "not trained"
RESTARTED = "--fresh was interrupted"
MAX_NAMED = 3
# Said in place of values that tell people nothing.
_PHRASES = {
    "dataset_sha256": "other data", "teacher": "another teacher", "weights_sha256": "other initial weights",
    "rules": "judged by other rules", "labels_sha256": "other labels", "code_sha256": "other code",
    "clean_sha256": "other labels of unaugmented images",
}  # fmt: skip
# Fields that follow from the data.
_CONSEQUENCES = ("class_names", "image_size", "resize", "mean", "std", "num_classes")

LESSON = ("labels", "teacher", "teacher_labels", "topk", "confidence")
"""Keys of `Run.inputs` that decide nothing where a student does not learn from its teacher."""
CHECKPOINTS = ("best.safetensors", "best.json", "last.safetensors", "last.json")
OUTPUTS = ("run.json", "predictions.csv", "curve.csv", "metrics.json")
"""LOG lies beside them and is none of them: a result of an older version has none, and DVC passes over it."""


class State(NamedTuple):
    """The state of a piece of work.

    Attributes:
        text: What is left to do and why, in one line.
        is_done: Whether nothing is left to do.
    """

    text: str
    is_done: bool = False


@dataclass(frozen=True)
class Run:
    """One model to be trained.

    Attributes:
        name: As shown to people.
        out: Where the outputs go.
        work: Where the resumable state is kept while it runs.
        stage: The DVC stage whose outputs these are; None for runs that differ from the recipe.
        description: The checkpoint's JSON, see stages.shared.runs.describe.
        recipe: How it is trained.
        seed: Of initialisation and order.
        inputs: Whatever else decides the result, as plain JSON values.
        differs: What differs from the recipe but for the seed, as key and value; empty for the recipe's own run.
        metric: The score that decides the best epoch.
        num_views: Views that the epochs cycle through; None for a teacher, which never sees a view twice.
        soft: Temperature of soft distillation; None for hard labels and without a teacher.
        confidence: Whether the teacher's confidence weighs the samples.
        keep_last: Whether the last epoch's weights are kept beside the best's.
        labels_sha256: Digest of the labels that it learns from, see TeacherSource.labels_sha256; None where from none.
            It is no part of `inputs`: results of older versions do not name it, and stand.
        project: The project's folder, see Paths.
    """

    name: str
    out: Path
    work: Path
    stage: str | None
    description: Mapping[str, Any]
    recipe: FitRecipe
    seed: int
    inputs: Mapping[str, Any]
    differs: Mapping[str, str]
    metric: str = "top1"
    num_views: int | None = None
    soft: float | None = None
    confidence: bool = False
    keep_last: bool = False
    labels_sha256: str | None = None
    project: Path = Path()

    @classmethod
    def of(
        cls, dataset: Dataset, recipe_name: str, kind: str, name: str, recipe: FitRecipe, seed: int,
        differs: Mapping[str, str], *, model: str, arguments: dict[str, Any],
        normalization: Normalization | None = None, project: Path = Path(), **fields: Any,
    ) -> Run:  # fmt: skip
        """Describe a run and place its files: a run that differs from the recipe goes to data/runs.

        Args:
            dataset: What it is trained on.
            recipe_name: The recipe of params.yaml.
            kind: `teacher` or `student`.
            name: As shown to people.
            recipe: How it is trained.
            seed: Of initialisation and order.
            differs: What differs from the recipe but for the seed.
            model: The architecture.
            arguments: What the architecture is built with, as plain JSON values.
            normalization: See `describe`.
            project: The project's folder.
            fields: The other attributes.
        """
        paths = Paths(recipe_name, project)
        out = paths.teacher(name) if kind == "teacher" else paths.student(name)
        work, stage = paths.work(f"{kind}s", name), f"{kind}@{name}"
        description = describe(
            dataset, recipe_name, kind=kind, model=model, arguments=arguments, normalization=normalization
        )
        run = cls(name, out, work, stage, description, recipe, seed, differs=differs, project=project, **fields)
        if not (differs or seed):
            return run
        folder = Place(kind, name, differs, seed).find(
            paths,
            has_ended=lambda out: why_other(out, run.fingerprint, {}) is None,
            is_under_way=lambda work: RunState(work, run.fingerprint).peek() is not None,
        )
        return dataclasses.replace(run, out=paths.run(folder), work=paths.work("runs", folder), stage=None)

    @property
    def _rest(self) -> dict[str, Any]:
        """What decides the result beside model and recipe."""
        return {"seed": self.seed, "inputs": dict(self.inputs), "version": RESULTS_VERSION}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the result."""
        return fingerprint({"model": dict(self.description), "recipe": training_values(self.recipe), **self._rest})

    @property
    def decided_by(self) -> dict[str, Any]:
        """What decides the result, as the checkpoint's JSON keeps it."""
        return {**self.description, "training": training_values(self.recipe), **self._rest}

    def why_stale(self) -> str | None:
        """Say in a phrase why the outputs are not those of exactly this run, or not whole; None if they are."""
        if self.resumable.begins_anew:
            return RESTARTED
        return why_stale(self.out, self.fingerprint, self.decided_by, self.labels_sha256)

    @property
    def resumable(self) -> RunState:
        """Its state while it is under way."""
        return RunState(self.work, self.fingerprint, self.labels_sha256)

    def refuse_damage(self) -> None:
        """Refuse to train again, which may take days, where the outputs are this run's and some are damaged.

        Raises:
            DataError: They are; the message names the file and what can be done, the cheapest first.
        """
        manifest = read_manifest(self.out)
        if manifest is not None and manifest.fingerprint == self.fingerprint:
            check_all(self.out)

    def finish_replacing(self) -> None:
        """Put in place the outputs that a killed run had written, if it came so far."""
        if is_being_replaced(self.out):
            with contextlib.suppress(StorageError), lock(self.lock):
                finish_replacing(self.out)

    def adopt(self) -> bool:
        """Write the manifest of outputs that an older version made without one; tell whether it did."""
        if (self.out / MANIFEST).exists():
            return False
        with contextlib.suppress(StorageError), lock(self.lock):
            adopt(self.out, (*CHECKPOINTS, *OUTPUTS), self.fingerprint)
            return True
        return False

    def state(self, *, fresh: bool = False) -> State:
        """Say what training the run would do, and why, with or without the option `--fresh`."""
        why = "--fresh" if fresh else self.why_stale()
        if why is None:
            return State(f"up to date ({self.out})", is_done=True)
        begins_anew = why in ("--fresh", RESTARTED)
        if not begins_anew and self.result is not None and (second := kept.find(self.result)) is not None:
            return State(f"put back what was finished on {second.when} ({why}); writes {self.out}")
        if not begins_anew:
            self.refuse_damage()
        state = self.resumable
        saved = None if fresh else state.peek()
        if saved is None:
            state.require_whole()
            what = (
                f"train {counted(self.recipe.epochs, 'epoch')}" if self.recipe.epochs else "evaluate what is finished"
            )
            return State(f"{what} ({why}); writes {self.out}")
        where = f"epoch {saved['epoch'] + 1} of {self.recipe.epochs}, step {saved['step']}"
        return State(f"interrupted, goes on from {where} ({why}); writes {self.out}")

    def epochs_to_train(self, *, fresh: bool) -> int:
        """Return how many epochs training it takes from the beginning: 0 where it is up to date or kept."""
        why = "--fresh" if fresh else self.why_stale()
        if why is None or (why not in ("--fresh", RESTARTED) and self.result is not None and kept.find(self.result)):
            return 0
        return self.recipe.epochs

    @property
    def result(self) -> kept.Result | None:
        """The outputs, as they are kept where DVC manages them; None elsewhere."""
        if self.stage is None:
            return None
        checkpoints = CHECKPOINTS if self.keep_last else CHECKPOINTS[:2]
        log = (LOG,) if (self.out / LOG).is_file() else ()
        paths = tuple(
            self.out / name for name in (*log, *checkpoints, *OUTPUTS, MANIFEST)
        )  # the last makes it complete
        recipe = str(self.description["recipe"])
        decided = kept_as(self.fingerprint, self.labels_sha256)
        return kept.Result(recipe, self.stage, decided, self.out, paths, lock=self.lock, project=self.project)

    @property
    def lock(self) -> Path:
        """The lock that the writer of the outputs holds."""
        return self.work.with_name(f"{self.work.name}.lock")

    def remove_leftovers(self) -> None:
        """Remove the temporary files of killed writers; the caller holds the lock."""
        for name in (*CHECKPOINTS, *OUTPUTS, LOG, MANIFEST):
            remove_leftovers(self.out / name)

    def clean_up(self) -> None:
        """Remove the state of a run that was killed after it had written its outputs."""
        if self.work.exists():
            with contextlib.suppress(StorageError), lock(self.lock):
                self.remove_leftovers()
                self.resumable.delete()


def kept_as(decided: str, labels_sha256: str | None) -> str:
    """Return the fingerprint under which a run's outputs are kept, from the run's own and from what it learned."""
    return decided if labels_sha256 is None else fingerprint({"run": decided, "labels_sha256": labels_sha256})


def why_stale(out: Path, fingerprint: str, expected: Mapping[str, Any], labels_sha256: str | None = None) -> str | None:
    """Say in a phrase why a directory does not hold a run's outputs, or not as they were written; None if it does.

    All files are compared with the manifest's SHA-256; the arguments are those of `why_other`.
    """
    why = why_other(out, fingerprint, expected, labels_sha256)
    if why is None:
        try:
            check_all(out)
        except DataError as error:
            why = str(error).partition(": ")[0] + " is damaged"
    return why


def why_other(out: Path, fingerprint: str, expected: Mapping[str, Any], labels_sha256: str | None = None) -> str | None:
    """Say in a phrase why a directory's files are not a run's outputs; None if they are, as far as their JSON tells.

    Args:
        out: The run's directory.
        fingerprint: The run's.
        expected: The run's `decided_by`, which explains a difference.
        labels_sha256: The run's, which differs from that of the outputs if they were learned from other labels; None
            takes any.
    """
    try:
        meta = read_meta(out)
    except DataError:
        return "its checkpoint is damaged"  # what runs the stage again must not be stopped by it
    if meta is None:
        return "a checkpoint without its other files" if any((out / name).exists() for name in OUTPUTS) else NOT_TRAINED
    missing = [name for name in OUTPUTS if not (out / name).is_file()]
    if missing:
        return f"{', '.join(missing)} missing"
    if meta.get("fingerprint") == fingerprint:
        is_other = labels_sha256 is not None and meta.get("labels_sha256", labels_sha256) != labels_sha256
        return _PHRASES["labels_sha256"] if is_other else None
    named = differences(meta, expected)
    more = f", {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return ", ".join(named[:MAX_NAMED]) + more if named else "trained under other settings, or by another version"


def describe_finished(meta: object, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return everything that decided a finished run's result, alike for runs that can only differ by chance.

    The order and spelling of `--set`, the recipe's name and a precision chosen as `auto` leave no trace in it. Of a
    student that did not learn from its teacher the teacher is not part of it.

    Args:
        meta: The checkpoint's JSON: `Run.decided_by` and more.
        metrics: The run's metrics.json.

    Returns:
        kind, model, arguments, dataset_sha256, training (the recipe as trained, with the precision that was used),
        inputs (`views`, the view recipe; `teacher`, its SHA-256; `labels` and whatever else), seed, version and rules;
        of an encoded store also rendition (`image_size` and `resize`), which its SHA-256 leaves open. None where the
        checkpoint does not say: such a run can be shown, and compared with no other.
    """
    if not isinstance(meta, dict):
        return None
    kinds = {"kind": str, "model": str, "arguments": dict, "dataset_sha256": str, "training": dict, "inputs": dict}
    if not all(isinstance(meta.get(key), kind) for key, kind in kinds.items()):
        return None
    inputs = dict(meta["inputs"])
    if meta["kind"] == "student" and not metrics["distilled"]:
        inputs = {key: value for key, value in inputs.items() if key not in LESSON} | {"labels": "none"}
    shown = {"image_size": meta.get("image_size"), "resize": meta.get("resize", SQUEEZE)}
    return {
        **{key: meta[key] for key in kinds},
        **({"rendition": shown} if "decoders" in meta else {}),  # only such data are decoded while a model trains
        "training": {**meta["training"], "precision": metrics["precision"]},
        "inputs": inputs,
        "seed": metrics["seed"],
        "version": meta.get("version"),
        "rules": metrics.get("rules", 1),
    }


def training_values(recipe: FitRecipe) -> dict[str, Any]:
    """Return what of a recipe decides a run's result: models that are not ours have no geometry of ours."""
    if not isinstance(recipe, StudentRecipe):
        return deciding_values(recipe)
    from pipeline.models.students import GEOMETRY, is_foreign

    return deciding_values(recipe, but=GEOMETRY if is_foreign(recipe.model) else ())


def differences(former: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the fields in which two trees of JSON values differ, as `lr 0.1 -> 0.05`.

    It explains why fingerprints differ; an empty list does not prove that they are the same.

    Args:
        former: The former values. Parts that `now` lacks, such as a checkpoint's scores, are no settings.
        now: The values asked for. Parts that `former` lacks are named too.
    """
    return [f"{name} {before} -> {after}" if before else after for name, before, after in _differences(former, now)]


def changes(former: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the same fields as `differences`, each with its value in `now` alone, as `lr 0.05`."""
    return [f"{name} {after}" if before else after for name, before, after in _differences(former, now)]


def disagreement(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Name the fields in which another rank's run differs from the first's, as `batch_size 64 where that has 128`."""
    named = [
        f"{name} {after} where that has {before}" if before else after
        for name, before, after in _differences(first, other)
    ]
    more = f", {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return ", ".join(named[:MAX_NAMED]) + more


def _differences(former: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return each field that differs, with both values in words; where these tell nothing, none and a phrase."""
    named: dict[str, tuple[str, str, str]] = {}
    for difference in compare({part: former[part] for part in now if part in former}, now):
        key, *words = _named(difference)
        named.setdefault(key, (words[0], words[1], words[2]))
    follows: tuple[str, ...] = _CONSEQUENCES if "dataset_sha256" in named else ()
    if "none" in named.get("labels", ()):
        follows += (*LESSON[1:], "soft")
    return [words for key, words in named.items() if key not in follows]


def _named(difference: Difference) -> tuple[str, str, str, str]:
    """Return the field of a difference, and in words its place and both values."""
    keys = [key for key in difference.place if isinstance(key, str)]
    key = ".".join(keys[-2:]) if keys[-2:-1] == ["views"] else keys[-1]
    if key in _PHRASES:
        return key, key, "", _PHRASES[key]
    if difference.before is MISSING and isinstance(difference.after, Mapping):
        return key, key, "", f"{key} not recorded"
    index = "".join(f"[{part}]" for part in difference.place if isinstance(part, int))
    return key, f"{key}{index}", _text(difference.before), _text(difference.after)


def _text(value: Any) -> str:
    """Write a value as params.yaml does, cut to 24 characters."""
    if value is MISSING or value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def student_arguments(recipe: StudentRecipe, *, num_classes: int, image_size: int) -> dict[str, Any]:
    """Return what pipeline.models.students.build_student needs, as plain JSON values."""
    from pipeline.models.students import SHARED_ARGUMENTS, recorded_arguments

    shared = {"num_classes": num_classes, "image_size": image_size}
    shared |= {key: getattr(recipe, key) for key in SHARED_ARGUMENTS if key not in shared}
    if not recipe.drop_path:  # as before there was such an argument
        del shared["drop_path"]
    return {**{key: shared[key] for key in recorded_arguments(recipe.model) if key in shared}, **recipe.arguments}


def teacher_description(dataset: Dataset, recipe: TeacherRecipe, name: str = "") -> dict[str, Any]:
    """Return what `describe` needs to know of a teacher: `model`, `arguments` and `normalization`.

    Args:
        dataset: What it is for.
        recipe: The teacher's.
        name: Its model where the recipe names none.
    """
    from pipeline.models.teachers import teacher_input

    model = recipe.model or name
    seen = teacher_input(
        model, weights=recipe.weights, image_size=dataset.image_size, mean=dataset.mean, std=dataset.std,
        input_size=recipe.input_size, normalization=recipe.normalization, stem=recipe.stem,
    )  # fmt: skip
    arguments: dict[str, Any] = {"num_classes": dataset.num_classes, "bn_momentum": recipe.bn_momentum}
    arguments |= {} if seen.size == dataset.image_size else {"input_size": seen.size}
    arguments |= {} if recipe.stem == "default" else {"stem": recipe.stem}
    return {"model": model, "arguments": arguments, "normalization": (seen.mean, seen.std)}


def describe(
    dataset: Dataset,
    recipe_name: str,
    *,
    kind: str,
    model: str,
    arguments: dict[str, Any],
    normalization: Normalization | None = None,
) -> dict[str, Any]:
    """Return the part of a checkpoint's JSON from which the model can be built and used again.

    Args:
        dataset: What it is trained on.
        recipe_name: The recipe of params.yaml.
        kind: `teacher` or `student`.
        model: The architecture.
        arguments: What it is built with, as plain JSON values.
        normalization: Mean and std of its inputs; None takes the data set's.
    """
    mean, std = normalization or (dataset.mean, dataset.std)
    return {
        "kind": kind,
        "model": model,
        "arguments": arguments,
        "recipe": recipe_name,
        "class_names": list(dataset.class_names),
        "image_size": dataset.image_size,
        **({} if dataset.resize == SQUEEZE else {"resize": dataset.resize}),
        "mean": list(mean),
        "std": list(std),
        "dataset_sha256": dataset.sha256,
    }


def costs(meta: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Return parameters, the paper's GMACs of a batch of 1024, and PyTorch's FLOPs of one image.

    Counting takes a second or two: of several seeds it is done once.

    Args:
        meta: Has the model's kind, model and arguments, plain JSON values. It comes from a recipe: if the model is the
            user's own code, it is run.
        image_size: Side of the image, pixels.
    """
    return dict(_costs(meta["kind"], meta["model"], json.dumps(meta["arguments"], sort_keys=True), image_size))


@functools.cache
def _costs(kind: str, model_name: str, arguments: str, image_size: int) -> dict[str, Any]:
    from pipeline.inference.loading import build_unfilled
    from pipeline.models.counting import flops_per_image, num_parameters, paper_gmacs_1024

    model = build_unfilled(kind, model_name, json.loads(arguments), own_code=(model_name,))
    return {
        "parameters": num_parameters(model),
        "paper_gmacs_1024": round(paper_gmacs_1024(model, image_size), 3),
        "flops_per_image": flops_per_image(model, image_size),
    }
