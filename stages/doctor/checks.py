"""The project and the recipe: DVC, data, initial weights, and how the models would be computed here."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config.recipes import FitRecipe, Recipe
from pipeline.data.sources import check_source
from pipeline.errors import DataError, UsageError
from pipeline.models.students import build_student, use_inner_block
from pipeline.models.students.layers import Student
from pipeline.models.teachers import weights_file
from pipeline.system.runtime import device_name, resolve_precision
from pipeline.training.execution import Execution
from stages.distill import student_recipe
from stages.doctor.software import FAULTS, OK, PROBLEM, WARNING, Finding, size_text
from stages.jobs import LabelJob, StudentJob, TeacherJob, survey, whole_run
from stages.shared.context import Context
from stages.shared.runs import student_arguments

DVC = Path(".dvc")


def dvc() -> list[Finding]:
    """Say whether `dvc repro` works here, and where `dvc push` would go."""
    try:
        version = importlib.metadata.version("dvc")
    except importlib.metadata.PackageNotFoundError:
        return []  # named among the extras
    if shutil.which("dvc", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}") is None:
        return [Finding("project", WARNING, f"DVC {version} is installed, but there is no command `dvc`", "mend PATH")]
    if not (DVC.is_dir() and Path("dvc.yaml").is_file()):
        what = f"DVC {version}, but this folder has no .dvc and dvc.yaml: `dvc repro` does not work here"
        return [Finding("project", WARNING, what, "run it in a clone of the project, or use the commands alone")]
    remotes = _remotes()
    where = f"remotes {', '.join(remotes)}" if remotes else "no remote: `dvc push` and `dvc pull` have no place to go"
    return [Finding("project", OK, f"DVC {version} in a checkout, {where}")]


def dvc_setting(section: str, key: str) -> str | None:
    """Return a setting of DVC's own configuration in this folder; None where there is none."""
    parser = _configuration()
    return parser.get(section, key, fallback=None)


def _remotes() -> list[str]:
    sections = (section.strip("'\" ") for section in _configuration().sections())
    return [section.split()[-1].strip('"') for section in sections if section.startswith("remote ")]


def _configuration() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read([DVC / "config", DVC / "config.local"])
    except (configparser.Error, UnicodeDecodeError):
        return configparser.ConfigParser()
    return parser


def data(context: Context) -> tuple[list[Finding], bool]:
    """Say whether there are data, or what to make them from, and return whether the prepared ones can be used."""
    paths, recipe = context.paths, context.recipe
    if paths.is_prepared:
        try:
            dataset = context.dataset()
        except FAULTS as error:
            return [Finding("data", PROBLEM, str(error))], False
        counts = ", ".join(f"{len(split)} {name}" for name, split in dataset.splits.items())
        size = f"{dataset.image_size}x{dataset.image_size}"
        return [Finding("data", OK, f"{paths.dataset}: {counts} images of {size}, {dataset.num_classes} classes")], True
    try:
        check_source(recipe, paths.raw)
    except FAULTS as error:
        return [Finding("data", PROBLEM, str(error))], False
    where = "comes with this package" if recipe.dataset.source == "digits" else f"is in {paths.raw}"
    makers = "`pipeline prepare`, teacher-select and DVC make them"
    return [Finding("data", OK, f"no prepared data yet; {recipe.dataset.source} {where}, and {makers}")], False


def has_source(recipe: Recipe, raw: Path) -> bool:
    """Tell whether the recipe's source lies in `raw`, as far as names tell."""
    try:
        check_source(recipe, raw)
    except FAULTS:
        return False
    return True


@dataclass(frozen=True)
class Task:
    """A job of a full run that trains or labels, see stages.jobs.

    Attributes:
        kind: `teacher`, `label` or `student`.
        name: The teacher, view recipe or student.
        why: What is left to do; None where it is up to date.
        recipe: How the model is trained; None for labelling.
        model: Its architecture; None for labelling.
    """

    kind: str
    name: str
    why: str | None
    recipe: FitRecipe | None = None
    model: str | None = None

    @property
    def stage(self) -> str:
        """What DVC calls it."""
        return f"{self.kind}@{self.name}"


def work(context: Context) -> tuple[list[Task], list[Finding]]:
    """Return what a full run trains and labels, in order, and what is wrong with what it starts from.

    A student counts as to be trained where its labels or teachers are, although it is not if the same teacher wins.
    """
    recipe, tasks, findings = context.recipe, [], []
    for job, state in survey(whole_run(context), {recipe.name: context}):
        if isinstance(state, DataError):
            findings.append(Finding("data", PROBLEM, f"{job.title}: {state}"))
        why = str(state) if isinstance(state, DataError) else None if state.is_done else state.text
        if isinstance(job, TeacherJob) and job.name is not None:
            tasks.append(Task("teacher", job.name, why, recipe.teachers[job.name], job.name))
        elif isinstance(job, LabelJob):
            tasks.append(Task("label", job.views, why))
        elif isinstance(job, StudentJob):
            student = student_recipe(recipe, job.name, {})
            tasks.append(Task("student", job.name, why, student, student.model))
    absent = [name for name in context.params.students if name not in recipe.students]
    absent += [name for name in context.params.teachers if name not in recipe.teachers]
    if absent:
        text = f"params.yaml lists {', '.join(absent)}, not in recipe {recipe.name}: `dvc repro` fails on them"
        way_out = "set `teachers` and `students` (dvc exp run -S ...), or use the commands"
        findings.append(Finding("data", WARNING, text, way_out))
    done = sum(task.why is None for task in tasks)
    findings.append(Finding("data", OK, f"{done} of {len(tasks)} stages that train or label are up to date"))
    return tasks, findings


def weights(context: Context, tasks: list[Task]) -> list[Finding]:
    """Say whether the initial weights of the teachers that are to be trained are there."""
    found, missing = [], []
    wanted = [
        (task.name, context.recipe.teachers[task.name].weights) for task in tasks if task.kind == "teacher" and task.why
    ]
    for name, source in wanted:
        if source == "imagenet" and not weights_file(name).is_file():
            missing.append(name)
        elif source not in ("imagenet", "none") and not Path(source).is_file():
            text = f"teachers.{name}: weights {source!r} does not exist"
            found.append(Finding("data", PROBLEM, text, "choose imagenet, none or the path of a state dict"))
    if missing:
        folder = weights_file(missing[0]).parent
        text = f"ImageNet weights of {', '.join(missing)} are not in {folder}: torchvision downloads them"
        found.append(Finding("data", WARNING, text, "without a network put them there, or write weights: none"))
    elif any(source == "imagenet" for _, source in wanted):
        found.append(Finding("data", OK, f"ImageNet weights are in {torch.hub.get_dir()}"))
    return found


COMPILERS = ("c++", "g++", "clang++")


def computing(context: Context) -> list[Finding]:
    """Say how the recipe's models are computed on the device at hand, and what of it does not work.

    Args:
        context: The command's setting; where its recipe uses torch.compile, that is tried, up to a minute.
    """
    device = context.device
    wanted = _fits(context)
    return [
        _device(device),
        *_precision(context, wanted, device),
        *_graphs(wanted, device),
        *_inner_blocks(context, device),
        *_compile(context, wanted, device),
    ]


def _fits(context: Context) -> dict[str, FitRecipe]:
    """Return the recipes of the models that a full run trains, by what params.yaml calls them."""
    recipe = context.recipe
    found: dict[str, FitRecipe] = {
        f"teachers.{name}": recipe.teachers[name] for name in context.params.candidates(recipe)
    }
    names = [name for name in context.params.students if name in recipe.students]
    return found | {f"students.{name}": recipe.students[name] for name in names}


def _device(device: torch.device) -> Finding:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Finding(
            "device", OK, f"runs on {device}: {device_name(device)}, {size_text(free)} of {size_text(total)} free"
        )
    return Finding("device", OK, f"runs on {device}: {device_name(device)}, {os.cpu_count()} cores")


def _precision(context: Context, wanted: dict[str, FitRecipe], device: torch.device) -> list[Finding]:
    automatic = resolve_precision("auto", device)
    units = "has units for bf16" if automatic == "bf16" else "has no units for bf16"
    text = f"precision: auto is {automatic} (the device {units}); fp32 products are {_fp32(device)}"
    found = [Finding("device", OK, text)]
    slow = [name for name, recipe in wanted.items() if recipe.precision == "bf16"]
    slow += ["label"] if context.recipe.label.precision == "bf16" else []
    if slow and automatic != "bf16":
        what = f"precision: bf16 of {', '.join(slow)} is emulated here, and slow"
        found.append(Finding("device", WARNING, what, "write auto"))
    return found


def _fp32(device: torch.device) -> str:
    """Say whether products of fp32 are rounded to tf32, which students' fused inner blocks decide for themselves."""
    if device.type != "cuda":
        return "not rounded"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "not rounded, there is no tf32"
    return "not rounded" if torch.get_float32_matmul_precision() == "highest" else "rounded to tf32"


def _graphs(wanted: dict[str, FitRecipe], device: torch.device) -> list[Finding]:
    found = []
    for name, recipe in wanted.items():
        try:
            Execution.of(recipe, device)
        except UsageError as error:
            found.append(Finding("device", PROBLEM, f"{name}: {error}"))
    graphs = [name for name, recipe in wanted.items() if device.type == "cuda" and recipe.step != "eager"]
    text = (
        f"steps are replayed from CUDA graphs ({len(graphs)} of {len(wanted)} models)" if graphs else "steps are eager"
    )
    return [*found, Finding("device", OK, text + ("" if device.type == "cuda" else "; CUDA graphs are for GPUs"))]


def _inner_blocks(context: Context, device: torch.device) -> list[Finding]:
    """Try the fused inner block of each student that has one; the first time it is compiled, and kept."""
    by_answer: dict[tuple[str, str], list[str]] = {}
    for name in context.params.students:
        try:
            own = student_recipe(context.recipe, name, {})
            with torch.device("meta"):
                student = build_student(
                    own.model, **student_arguments(own, num_classes=10, image_size=context.recipe.dataset.image_size)
                )
            assert isinstance(student, Student)
            answer = use_inner_block(student, own.inner_block, device)
            mark = WARNING if answer.startswith("plain (") else OK
        except UsageError as error:
            answer, mark = str(error), PROBLEM if name in context.recipe.students else WARNING
        if answer != "none":
            by_answer.setdefault((mark, answer), []).append(name)
    return [
        Finding("device", mark, f"inner block of {', '.join(names)}: {answer}")
        for (mark, answer), names in by_answer.items()
    ]


def _compile(context: Context, wanted: dict[str, FitRecipe], device: torch.device) -> list[Finding]:
    users = [name for name, recipe in wanted.items() if recipe.compile] + (
        ["label"] if context.recipe.label.compile else []
    )
    if not users:
        compiler = _compiler()
        text = "torch.compile is not used by this recipe; "
        text += f"it would find the C++ compiler {compiler}" if compiler else "it would find no C++ compiler"
        return [Finding("device", OK, text)]
    try:
        torch.compile(lambda x: torch.sin(x) + x)(torch.ones(64, device=device))
    except Exception as error:  # what a compiler does not do, torch reports in many ways
        reason = " ".join(str(error).split("\n\n")[0].split())
        remedy = "install a C++ compiler, or write compile: false"
        return [
            Finding(
                "device", PROBLEM, f"compile: true of {', '.join(users)}: torch.compile fails here ({reason})", remedy
            )
        ]
    return [Finding("device", OK, f"torch.compile works ({', '.join(users)})")]


def _compiler() -> str | None:
    """Return the C++ compiler that torch.compile would take."""
    own = os.environ.get("CXX", "").split()
    return next((path for name in (*own[:1], *COMPILERS) if (path := shutil.which(name))), None)
