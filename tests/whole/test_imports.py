"""The one rule of imports, and one home for each dependency."""

from __future__ import annotations

import ast
import functools
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A wing imports only the wings named before it.
WINGS = ("errors", "system", "config", "data", "views", "losses", "labels", "training", "inference")
# Leaves import errors and system alone. The second tuple names the wings that may import a leaf, beside stages/.
LEAVES = {"models": ("labels", "inference"), "report": ()}
HOMES = {
    "h5py": {"pipeline/labels/file.py"},
    "ruamel": {"pipeline/config/params.py"},
    "sklearn": set(),  # its digits are in pipeline/data; the tests use more of it
    "onnx": {"pipeline/inference/exporting.py"},
    "onnxruntime": {"pipeline/inference/exporting.py"},
    "PIL": {
        "pipeline/inference/classifier.py",
        "pipeline/report/figures/canvas.py",
        "pipeline/data/collecting.py",
        "pipeline/data/decoding.py",
        "pipeline/data/sources.py",
        "stages/demo.py",
    },
    "matplotlib": {
        "pipeline/report/figures/canvas.py",
        "pipeline/report/figures/dots.py",
        "pipeline/report/figures/heat_map.py",
        "pipeline/report/figures/lines.py",
        "pipeline/report/figures/repeats.py",
        "pipeline/report/figures/sheet.py",
    },
    "einops": {
        "pipeline/models/students/attention.py",
        "pipeline/models/students/layers.py",
        "pipeline/models/students/tnt.py",
    },
    "rich": {
        "pipeline/report/progress.py",
        "pipeline/report/tables.py",
        "stages/shared/context.py",
        "stages/shared/options.py",
    },
    "starlette": {"stages/demo.py"},
    "uvicorn": {"stages/demo.py"},
    "triton": {
        "pipeline/models/students/fused/cuda.py",
        "pipeline/models/students/fused/triton_backward.py",
        "pipeline/models/students/fused/triton_forward.py",
    },
    "torchvision": {
        "pipeline/system/runtime.py",
        "pipeline/data/sources.py",
        "pipeline/models/teachers.py",
        "pipeline/models/weights.py",
    },
}
FILES = sorted(file for package in ("pipeline", "stages", "titn") for file in ROOT.glob(f"{package}/**/*.py"))


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
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    package, *rest = file.relative_to(ROOT).with_suffix("").parts
    if package != "pipeline" or rest == ["__init__"]:
        return
    wing = rest[0]
    imported = {name.split(".")[1] for name in imports(file) if name.startswith("pipeline.")} - {wing}
    assert not any(name.split(".")[0] == "stages" for name in imports(file)), "the library imports no command"
    if wing in LEAVES:
        assert imported <= {"errors", "system"}
    else:
        leaves = {leaf for leaf, users in LEAVES.items() if wing in users}
        assert imported <= {*WINGS[: WINGS.index(wing)], *leaves}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_benchmarks_and_tests_import_benchmarks(file: Path) -> None:
    assert not any(name.split(".")[0] == "benchmarks" for name in imports(file))


def test_no_modules_import_one_another() -> None:
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
    graph = {module: (imports(file) & modules.keys()) - {module} for module, file in modules.items()}
    while free := {module for module, used in graph.items() if not used & graph.keys()}:
        graph = {module: used for module, used in graph.items() if module not in free}
    assert not graph, f"a circle among {sorted(graph)}"


def test_the_library_has_few_doors() -> None:
    library = ROOT / "pipeline"
    files = [path.relative_to(library) for path in library.rglob("*") if path.is_file()]
    doors = {file.parts[0] for file in files if "__pycache__" not in file.parts}
    assert len(doors) <= 13, sorted(doors)


@pytest.mark.parametrize("dependency", HOMES)
def test_a_dependency_has_its_home(dependency: str) -> None:
    users = {
        str(file.relative_to(ROOT)) for file in FILES if any(name.split(".")[0] == dependency for name in imports(file))
    }
    assert users == HOMES[dependency]


def test_click_is_for_commands_and_what_they_share() -> None:
    """Files below stages/ that import it define a command, except the table and the shared options."""
    shared = {"stages/cli.py", "stages/shared/options.py"}
    users = {file for file in FILES if any(name.split(".")[0] == "click" for name in imports(file))}
    for file in users - {ROOT / name for name in shared}:
        assert file.is_relative_to(ROOT / "stages"), file
        decorators = [ast.unparse(call.func) for call in nodes(file) if isinstance(call, ast.Call)]
        assert {"click.command", "click.group"} & set(decorators), f"{file} defines no command"


def test_the_library_prints_nothing() -> None:
    for file in ROOT.glob("pipeline/**/*.py"):
        calls = [node for node in nodes(file) if isinstance(node, ast.Call)]
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), file


def test_an_installation_holds_every_package_and_every_file_beside_the_modules() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == {".".join(file.parent.relative_to(ROOT).parts) for file in FILES}
    folders = {package: ROOT.joinpath(*package.split(".")) for package in settings["package-data"]}
    shipped = {
        file
        for name, folder in folders.items()
        for glob in settings["package-data"][name]
        for file in folder.glob(glob)
    }
    files = [file for package in ("pipeline", "stages", "titn") for file in ROOT.glob(f"{package}/**/*")]
    beside = {file for file in files if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert shipped == beside
