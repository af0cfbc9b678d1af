"""The one rule of imports, and one home for each dependency."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports modules of its own layer or of those before it.
LAYERS = (
    {
        "errors",
        "recipes",
        "params",
        "strict_yaml",
        "storage",
        "runtime",
        "distributed",
        "stopping",
        "threads",
        "prefetch",
        "timing",
        "paper",
    },
    {"image_arrays", "dataset_file", "datasets", "image_folders", "image_files", "sources"},
    {
        "draws",
        "imageops",
        "geometry",
        "operations",
        "autoaugment",
        "randaugment",
        "trivialaugment",
        "augmentation",
        "mixing",
        "streaming",
        "views",
    },
    {
        "losses",
        "metrics",
        "class_scores",
        "seals",
        "label_identity",
        "view_labels",
        "view_scores",
        "intervals",
        "label_file",
        "label_parts",
        "labels",
        "checkpoints",
        "descriptions",
    },
    {
        "averaging",
        "batches",
        "optimization",
        "labelling",
        "replay",
        "teacher_answers",
        "resuming",
        "captured_step",
        "training_step",
        "evaluation",
        "prediction",
        "speed",
        "training",
        "reporting",
        "figures",
        "page",
        "classifier",
        "exporting",
        "model_card",
    },
)
LEAVES = {"teachers", "folding", "counting", "students"}
# Above all others, the leaves among them: they build models from what a file says.
TOP = {"loading"}
HOMES = {
    "click": {
        "stages/cli.py",
        "stages/commands/data.py",
        "stages/commands/export.py",
        "stages/commands/labels.py",
        "stages/commands/machine.py",
        "stages/commands/results.py",
        "stages/commands/students.py",
        "stages/commands/teachers.py",
        "stages/commands/trained.py",
        "stages/options.py",
    },
    "h5py": {"pipeline/dataset_file.py", "pipeline/label_file.py"},
    "yaml": {"pipeline/strict_yaml.py"},
    "sklearn": {"pipeline/sources.py"},
    "onnx": {"pipeline/exporting.py"},
    "onnxruntime": {"pipeline/exporting.py"},
    "PIL": {
        "pipeline/classifier.py",
        "pipeline/figures/canvas.py",
        "pipeline/image_folders.py",
        "pipeline/sources.py",
    },
    "matplotlib": {
        "pipeline/figures/canvas.py",
        "pipeline/figures/dots.py",
        "pipeline/figures/heat_map.py",
        "pipeline/figures/lines.py",
        "pipeline/figures/repeats.py",
        "pipeline/figures/sheet.py",
    },
    "einops": {"pipeline/students/attention.py", "pipeline/students/layers.py", "pipeline/students/tnt.py"},
    "rich": {"pipeline/reporting.py", "stages/context.py", "stages/options.py"},
    "triton": {
        "pipeline/students/inner_triton.py",
        "pipeline/students/inner_triton_backward.py",
        "pipeline/students/inner_triton_forward.py",
    },
    "torchvision": {"pipeline/folding.py", "pipeline/runtime.py", "pipeline/sources.py", "pipeline/teachers.py"},
}
FILES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/**/*.py")])


@functools.cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(file.read_text())))


@functools.cache
def imports(file: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "pipeline":
                names |= {f"pipeline.{alias.name}" for alias in node.names}
    return frozenset(names)


def layer(module: str) -> int:
    return next(index for index, modules in enumerate(LAYERS) if module in modules)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    package, *rest = file.relative_to(ROOT).with_suffix("").parts
    if package == "stages" or rest == ["__init__"]:
        return
    module = rest[0]
    inner = {name.split(".")[1] for name in imports(file) if name.startswith("pipeline.")}
    assert not any(name.split(".")[0] == "stages" for name in imports(file)), "the library imports no command"
    if module in LEAVES:
        assert inner <= {"errors", module}
    elif module in TOP:
        assert inner <= set().union(*LAYERS) | LEAVES | TOP
    else:
        assert inner.isdisjoint(LEAVES | TOP), "a stage builds the model and passes it in"
        assert all(layer(other) <= layer(module) for other in inner), inner


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_benchmarks_and_tests_import_benchmarks(file: Path) -> None:
    assert not any(name.split(".")[0] == "benchmarks" for name in imports(file))


def test_the_library_has_no_cycles() -> None:
    graph = {
        file.stem: {name.split(".")[1] for name in imports(file) if name.startswith("pipeline.")}
        for file in ROOT.glob("pipeline/*.py")
        if file.stem != "__init__"
    }
    done: set[str] = set()
    while len(done) < len(graph):
        free = {module for module, used in graph.items() if module not in done and used <= done | {module, "students"}}
        assert free, f"a cycle among {sorted(set(graph) - done)}"
        done |= free


@pytest.mark.parametrize("dependency", HOMES)
def test_a_dependency_has_its_home(dependency: str) -> None:
    users = {
        str(file.relative_to(ROOT)) for file in FILES if any(name.split(".")[0] == dependency for name in imports(file))
    }
    assert users == HOMES[dependency]


def test_the_library_prints_nothing() -> None:
    for file in ROOT.glob("pipeline/**/*.py"):
        calls = [node for node in nodes(file) if isinstance(node, ast.Call)]
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), file


def test_the_packages_are_listed_explicitly() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(settings["tool"]["setuptools"]["packages"])
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in FILES}
    assert listed == found
