"""The doctor's checks of project and recipe: DVC, data, initial weights, and how models are computed here."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config.recipes import FitRecipe, Recipe, StudentRecipe
from pipeline.data.sources import check_source
from pipeline.errors import DataError, UsageError
from pipeline.models.students import Student, build_student, is_foreign, use_inner_block, use_outer_block
from pipeline.models.teachers import is_torchvision, weights_file
from pipeline.system.neighbours import usable_cores
from pipeline.system.runtime import device_name, resolve_precision
from pipeline.system.storage import NO_LOCKS_VARIABLE, has_file, is_locked, uses_locks
from pipeline.system.text import counted
from pipeline.training.execution import Execution
from pipeline.views import guard
from stages.distill import student_recipe
from stages.doctor.software import FAULTS, OK, PROBLEM, WARNING, Finding, size_text, version_of
from stages.jobs import LabelJob, StudentJob, TeacherJob, survey, whole_run
from stages.shared.context import Context
from stages.shared.paths import DATA, PARAMS
from stages.shared.prepared import check_available
from stages.shared.runs import student_arguments

DVC = Path(".dvc")


def dvc() -> list[Finding]:
    """Report whether `dvc repro` works here, and the remotes for `dvc push`."""
    version = version_of("dvc")
    if version is None:
        return []  # named among the extras
    if shutil.which("dvc", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}") is None:
        return [Finding("project", WARNING, f"DVC {version} is installed, but there is no command `dvc`", "mend PATH")]
    makes = {DVC: "`git init && dvc init`", Path("dvc.yaml"): "`pipeline init`"}
    if missing := [path for path in makes if not path.exists()]:
        names = " and no ".join(map(str, missing))
        what = f"DVC {version}, but this folder has no {names}: `dvc repro` does not work here"
        ways = " and ".join(makes[path] for path in missing)
        return [Finding("project", WARNING, what, f"run {ways}; or use the commands alone")]
    if hindrances := [*_python_of_stages(), *_git()]:
        return hindrances
    sections = (section.strip("'\" ") for section in _configuration().sections())
    remotes = [section.split()[-1].strip('"') for section in sections if section.startswith("remote ")]
    where = f"remotes {', '.join(remotes)}" if remotes else "no remote: `dvc push` and `dvc pull` have no place to go"
    return [Finding("project", OK, f"DVC {version} in a checkout, {where}")]


def _python_of_stages() -> list[Finding]:
    """Warn unless `python`, by which DVC runs the stages, is this one; a venv's is not while it is not activated."""
    found = shutil.which("python")
    if found is not None:
        asked = subprocess.run(
            [found, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, errors="surrogateescape"
        )
        if Path(asked.stdout.strip()) == Path(sys.prefix):
            return []
    activate = Path(sys.prefix) / "bin" / "activate"
    way_out = f"source {activate}" if activate.is_file() else f"put {Path(sys.executable).parent} first on PATH"
    which = "is not on PATH (python: not found)" if found is None else f"is {found} here, not {sys.executable}"
    return [Finding("project", WARNING, f"`dvc repro` does not work here: it runs `python`, which {which}", way_out)]


def _git() -> list[Finding]:
    """Warn where DVC misses git, or refuses what lies behind a link, outside of the checkout."""
    if dvc_setting("core", "no_scm") == "true":
        return []
    if not Path(".git").exists():
        text = "`dvc repro` does not work here: this folder is no git repository, as that of a ZIP archive"
        return [Finding("project", WARNING, text, "clone the project, or: dvc config core.no_scm true")]
    if DATA.is_symlink():
        text = f"`dvc repro` does not work here: {DATA} is a link, and DVC refuses outputs outside the git repository"
        way_out = "mount the disk at data instead (mount --bind), or clone the project on that disk"
        return [Finding("project", WARNING, text, way_out)]
    return []


def locks() -> Finding:
    """Tell whether files can be locked where runs lock theirs; the lock is given back at once."""
    file = next(iter([*DATA.glob("*/*.lock"), *DATA.glob("work/**/*.lock")]), PARAMS)
    try:
        if not uses_locks():
            text = f"{NO_LOCKS_VARIABLE}=1: nothing keeps two commands from writing the same files"
            return Finding("project", WARNING, text, "run one at a time")
        is_locked(file)
    except FAULTS as error:
        return Finding("project", PROBLEM, str(error))
    return Finding("project", OK, "files can be locked, so two commands never write the same ones")


def dvc_setting(section: str, key: str) -> str | None:
    """Return a setting of DVC's own configuration in this folder; None where there is none."""
    return _configuration().get(section, key, fallback=None)


def _configuration() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read([DVC / "config", DVC / "config.local"], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return configparser.ConfigParser()
    return parser


def data(context: Context) -> tuple[list[Finding], bool]:
    """Report on the data or their source, and return whether prepared data can be used."""
    paths, recipe = context.paths, context.recipe
    if paths.is_prepared:
        try:
            dataset = context.dataset()
        except FAULTS as error:
            return [Finding("data", PROBLEM, str(error))], False
        counts = ", ".join(f"{len(split)} {name}" for name, split in dataset.splits.items())
        size, classes = f"{dataset.image_size}x{dataset.image_size}", counted(dataset.num_classes, "class")
        return [Finding("data", OK, f"{paths.dataset}: {counts} images of {size}, {classes}")], True
    try:
        if (second := check_available(context)) is not None:
            return [Finding("data", OK, f"no prepared data; `pipeline prepare` can {second}")], False
    except FAULTS as error:
        return [Finding("data", PROBLEM, str(error))], False
    where = "comes with this package" if recipe.dataset.source == "digits" else f"is in {paths.raw}"
    where = f"is in {recipe.dataset.path}" if recipe.dataset.path else where
    makers = f"`pipeline prepare --recipe {recipe.name}`, teacher-select and DVC make them"
    return [Finding("data", OK, f"no prepared data yet; {recipe.dataset.source} {where}, and {makers}")], False


def has_source(recipe: Recipe, raw: Path) -> bool:
    """Tell whether `raw` holds the recipe's source, judged by file names."""
    try:
        check_source(recipe, raw)
    except FAULTS:
        return False
    return True


@dataclass(frozen=True)
class Task:
    """A stage of `dvc repro` that trains or labels, see stages.jobs.

    Attributes:
        kind: `teacher`, `label` or `student`.
        name: The teacher, view recipe or student.
        why: What is left to do; None where it is up to date.
        recipe: Of the training; None for labelling.
        model: Architecture; None for labelling.
    """

    kind: str
    name: str
    why: str | None
    recipe: FitRecipe | None = None
    model: str | None = None

    @property
    def stage(self) -> str:
        """Its name in DVC."""
        return f"{self.kind}@{self.name}"


def work(context: Context) -> tuple[list[Task], list[Finding]]:
    """Return what a full run trains and labels, in order, and findings about its data.

    A student whose labels or teachers are to be made counts as to be trained too, although it stays up to date if the
    same teacher wins.
    """
    recipe, tasks, findings = context.recipe, [], []
    for job, state in survey(whole_run(context), {recipe.name: context}):
        if isinstance(state, DataError):
            findings.append(Finding("data", PROBLEM, f"{job.title}: {state}"))
        why = str(state) if isinstance(state, DataError) else None if state.is_done else state.text
        if isinstance(job, TeacherJob) and job.name is not None:
            teacher = recipe.teachers[job.name]
            tasks.append(Task("teacher", job.name, why, teacher, teacher.model))
        elif isinstance(job, LabelJob):
            tasks.append(Task("label", job.views, why))
        elif isinstance(job, StudentJob):
            student = student_recipe(recipe, job.name, {})
            tasks.append(Task("student", job.name, why, student, student.model))
    if faults := context.params.faults_of_lists(recipe):
        text = f"`dvc repro` refuses the lists of params.yaml: {'; '.join(faults)}"
        way_out = f"use the commands, or: {context.params.dvc_command(recipe)}"
        findings.append(Finding("data", WARNING, text, way_out))
    done = sum(task.why is None for task in tasks)
    findings.append(Finding("data", OK, f"{done} of {len(tasks)} stages that train or label are up to date"))
    return tasks, findings


def weights(context: Context, tasks: list[Task]) -> list[Finding]:
    """Report on the initial weights of the teachers that are to be trained."""
    findings, missing = [], []
    names = [task.name for task in tasks if task.kind == "teacher" and task.why]
    recipes = context.recipe.teachers
    sources = {name: recipes[name].weights for name in names}
    for name, source in sources.items():
        model = recipes[name].model
        if source == "imagenet" and is_torchvision(model) and not has_file(weights_file(model)):
            missing.append(name)
        elif source not in ("imagenet", "none") and not has_file(Path(source)):
            text = f"teachers.{name}: weights {source!r} does not exist"
            findings.append(Finding("data", PROBLEM, text, "choose imagenet, none or the path of a state dict"))
    if missing:
        folder = weights_file(recipes[missing[0]].model).parent
        text = f"ImageNet weights of {', '.join(missing)} are not in {folder}: torchvision downloads them"
        findings.append(Finding("data", WARNING, text, "without a network put them there, or write weights: none"))
    elif any(source == "imagenet" and is_torchvision(recipes[name].model) for name, source in sources.items()):
        findings.append(Finding("data", OK, f"ImageNet weights are in {torch.hub.get_dir()}"))
    return findings


COMPILERS = ("c++", "g++", "clang++")


def computing(context: Context) -> list[Finding]:
    """Report how the recipe's models are computed on the device, and what fails; torch.compile may take a minute."""
    device, recipe = context.device, context.recipe
    teachers = context.params.candidates(recipe)
    fits: dict[str, FitRecipe] = {f"teachers.{name}": recipe.teachers[name] for name in teachers}
    students = [name for name in context.params.students if name in recipe.students]
    fits |= {f"students.{name}": recipe.students[name] for name in students}
    return [
        _device(device),
        *_precision(context, fits, device),
        *_graphs(fits, device),
        *_blocks(context, device),
        *_views(device),
        *_compile(context, fits, device),
    ]


def _device(device: torch.device) -> Finding:
    size = f"{usable_cores()} cores"
    if device.type == "cuda":
        size = "{} of {} free".format(*map(size_text, torch.cuda.mem_get_info(device)))
    return Finding("device", OK, f"runs on {device}: {device_name(device)}, {size}")


def _precision(context: Context, fits: dict[str, FitRecipe], device: torch.device) -> list[Finding]:
    automatic = resolve_precision("auto", device)
    units = "has units for bf16" if automatic == "bf16" else "has no units for bf16"
    text = f"precision: auto is {automatic} (the device {units}); fp32 products are {_fp32(device)}"
    findings = [Finding("device", OK, text)]
    slow = [name for name, recipe in fits.items() if recipe.precision == "bf16"]
    slow += ["label"] if context.recipe.label.precision == "bf16" else []
    if slow and automatic != "bf16":
        text = f"precision: bf16 of {', '.join(slow)} is emulated here, and slow"
        findings.append(Finding("device", WARNING, text, "write auto"))
    return findings


def _fp32(device: torch.device) -> str:
    """Tell whether fp32 products are rounded to tf32; students' fused inner blocks decide that for themselves."""
    if device.type != "cuda":
        return "not rounded"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "not rounded, there is no tf32"
    if torch.get_float32_matmul_precision() != "highest":
        return "rounded to tf32"
    if torch.backends.cudnn.conv.fp32_precision != "tf32":  # type: ignore[attr-defined]
        return "not rounded"
    return "not rounded in labels, evaluation and predictions; in training convolutions are rounded to tf32"


def _graphs(fits: dict[str, FitRecipe], device: torch.device) -> list[Finding]:
    findings = []
    for name, recipe in fits.items():
        try:
            Execution.of(recipe, device)
        except UsageError as error:
            findings.append(Finding("device", PROBLEM, f"{name}: {error}"))
    text = "steps are eager"
    if device.type != "cuda":
        text += "; CUDA graphs are for GPUs"
    elif num_graphs := sum(recipe.step != "eager" for recipe in fits.values()):
        text = f"steps are replayed from CUDA graphs ({num_graphs} of {len(fits)} models)"
    return [*findings, Finding("device", OK, text)]


def _blocks(context: Context, device: torch.device) -> list[Finding]:
    """Try the fused blocks of each student; the first time they are compiled, and kept."""
    by_answer: dict[tuple[str, str, str], list[str]] = {}
    for name in context.params.students:
        for block, use in (("inner block", _use_inner), ("outer block", _use_outer)):
            try:
                recipe = student_recipe(context.recipe, name, {})
                if is_foreign(recipe.model):
                    continue
                arguments = student_arguments(recipe, num_classes=10, image_size=context.recipe.dataset.image_size)
                answer = use(build_student(recipe.model, **{**arguments, "depth": 1}), recipe, device)
                mark = WARNING if answer.startswith("plain (") else OK
            except UsageError as error:
                answer, mark = str(error), PROBLEM if name in context.recipe.students else WARNING
            if answer != "none":
                by_answer.setdefault((mark, block, answer), []).append(name)
    return [
        Finding("device", mark, f"{block} of {', '.join(names)}: {answer}")
        for (mark, block, answer), names in by_answer.items()
    ]


def _views(device: torch.device) -> list[Finding]:
    """Try to make views in C++; the first time it is compiled, and kept."""
    if device.type != "cpu":
        return []
    why_not = guard.why_not()
    return [Finding("device", WARNING, f"views: plain ({why_not})") if why_not else Finding("device", OK, "views: c++")]


def _use_inner(student: Student, recipe: StudentRecipe, device: torch.device) -> str:
    return use_inner_block(student, recipe.inner_block, device, precision=resolve_precision(recipe.precision, device))


def _use_outer(student: Student, recipe: StudentRecipe, device: torch.device) -> str:
    precision = resolve_precision(recipe.precision, device)
    return use_outer_block(student, recipe.outer_block, device, precision=precision, compiled=recipe.compile)


def _compile(context: Context, fits: dict[str, FitRecipe], device: torch.device) -> list[Finding]:
    users = [name for name, recipe in fits.items() if recipe.compile]
    users += ["label"] if context.recipe.label.compile else []
    if not users:
        candidates = [*os.environ.get("CXX", "").split()[:1], *COMPILERS]
        compiler = next(filter(None, map(shutil.which, candidates)), None)
        text = "torch.compile is not used by this recipe; "
        text += f"it would find the C++ compiler {compiler}" if compiler else "it would find no C++ compiler"
        return [Finding("device", OK, text)]
    try:
        torch.compile(lambda x: torch.sin(x) + x)(torch.ones(64, device=device))
    except Exception as error:  # torch reports a compiler's failures in many ways
        reason = " ".join(str(error).split("\n\n")[0].split())
        text = f"compile: true of {', '.join(users)}: torch.compile fails here ({reason})"
        return [Finding("device", PROBLEM, text, "install a C++ compiler, or write compile: false")]
    return [Finding("device", OK, f"torch.compile works ({', '.join(users)})")]
