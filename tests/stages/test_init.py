"""`pipeline init`: a project outside the clone, and the wheel that it comes from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from stages.cli import cli
from stages.init import DVC_IGNORE, README
from stages.shared.params import read_params
from tests.support.project import ROOT, environment, smoke_params

BUILT_OF = ("pyproject.toml", "README.md", "LICENSE", "params.yaml", "dvc.yaml", "pipeline", "stages", "titn")
FILES = {"params.yaml", "dvc.yaml", ".dvcignore", "README.md", "data/.gitignore"}


def init(*arguments: str, code: int = 0) -> str:
    ended = CliRunner().invoke(cli, ["init", *arguments])
    assert (2 if ended.exception and not isinstance(ended.exception, SystemExit) else ended.exit_code) == code
    return str(ended.exception) if code else ended.output


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_new_project_has_the_clones_settings_and_says_what_is_next(here: Path) -> None:
    said = init("new/project")
    project = here / "new/project"
    assert files(project) == FILES
    assert (project / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()
    assert read_params(project / "params.yaml").recipe == "digits"
    assert "cd new/project && git init && dvc init && dvc repro" in said
    assert len(README.splitlines()) == 10 and (project / "README.md").read_text() == README
    assert set(DVC_IGNORE.split()) <= set((ROOT / ".dvcignore").read_text().split())


def test_a_name_is_quoted_for_the_shell_and_an_address_is_no_folder(here: Path) -> None:
    assert "cd 'new $HOME project' && git init" in init("new $HOME project")
    assert init("https://example.org/x", code=2) == "https:/example.org/x: an address; name a folder"
    assert not (here / "https:").exists()


def test_here_is_the_default_and_a_git_repository_stays_one(here: Path) -> None:
    (here / ".git").mkdir()
    said = init()
    assert files(here) == FILES and ": dvc init && dvc repro" in said


def test_a_repositorys_own_readme_stays(here: Path) -> None:
    (here / "README.md").write_text("mine")
    init()
    assert files(here) == FILES and (here / "README.md").read_text() == "mine"


@pytest.mark.parametrize("name", sorted(FILES - {"README.md"}))
def test_a_file_that_is_there_is_named_and_nothing_is_written(here: Path, name: str) -> None:
    (here / name).parent.mkdir(exist_ok=True)
    (here / name).write_text("mine")
    error = init(code=2)
    assert f"{name}: there already, and never overwritten" in error
    assert files(here) == {name} and (here / name).read_text() == "mine"


def test_a_link_that_leads_nowhere_and_a_file_in_place_of_the_folder_are_refused_too(here: Path) -> None:
    (here / "params.yaml").symlink_to("missing")
    assert "params.yaml: there already" in init(code=2)
    (here / "taken").write_text("")
    assert "taken: a file" in init("taken", code=2)


def test_its_stages_are_the_clones_but_for_code(here: Path) -> None:
    init()

    def parse(file: Path) -> Any:
        return YAML(typ="safe", pure=True).load(file.read_text())

    new, own = parse(here / "dvc.yaml"), parse(ROOT / "dvc.yaml")
    assert not any(word in (here / "dvc.yaml").read_text() for word in ("pipeline/", "stages/", "README"))
    for stage in own["stages"].values():
        part = stage.get("do", stage)
        data = [dep for dep in part["deps"] if dep.startswith("data/")]
        if not data:
            del part["deps"]
        else:
            part["deps"] = data
    assert new == own
    comments = [line.strip() for line in (ROOT / "dvc.yaml").read_text().splitlines() if line.strip().startswith("#")]
    assert set(comments[2:]) <= {line.strip() for line in (here / "dvc.yaml").read_text().splitlines()}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what pip installs of the wheel."""
    if int(metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("building needs setuptools 77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILT_OF:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=ignored)
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    # What `pip wheel` and `pip install --target` do, without the seconds that pip takes to start.
    build = "import setuptools.build_meta as backend; backend.build_wheel('..')"
    command = [sys.executable, "-W", "error", "-c", build]
    built = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    shutil.rmtree(folder / "source")
    return folder / "installed"


def run(installed: Path, folder: Path, *arguments: str, code: int = 0) -> str:
    """Run a command of the installed package in a folder outside the clone."""
    variables = environment() | {"PYTHONPATH": str(installed), "GIT_CONFIG_GLOBAL": "/dev/null"}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    ended = subprocess.run(arguments, cwd=folder, env=variables, capture_output=True, text=True, timeout=900)
    assert ended.returncode == code, f"{arguments}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout + ended.stderr


def pipeline(installed: Path, folder: Path, *arguments: str) -> str:
    return run(installed, folder, sys.executable, "-m", "stages.cli", *arguments)


def test_a_wheel_holds_the_projects_files_and_makes_a_project(installed: Path, tmp_path: Path) -> None:
    assert (installed / "stages/project/params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()
    assert not any(path.is_symlink() for path in installed.rglob("*"))
    pipeline(installed, tmp_path, "init", "project")
    assert files(tmp_path / "project") == FILES


@pytest.mark.slow
def test_a_wheel_outside_the_clone_trains_with_the_commands_and_with_dvc(installed: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    pipeline(installed, tmp_path, "init", "project")
    text = smoke_params((project / "params.yaml").read_text())
    (project / "params.yaml").write_text(text.replace("teachers: [squeezenet1_1, mobilenet_v3_large]",
                                                      "teachers: [squeezenet1_1]"))  # fmt: skip
    assert "project" in pipeline(installed, project, "doctor") and "titn" in pipeline(installed, project, "models")
    code = "import stages.shared.dvc_file as d; print(d.__file__, d.code_digest('student@titn'))"
    file, digest = run(installed, project, sys.executable, "-c", code).split()
    assert Path(file).is_relative_to(installed)
    from stages.shared.dvc_file import code_digest

    assert digest == code_digest("student@titn")  # so that results made in a clone come back here, and here in a clone
    run(installed, project, "git", "init", "-q")
    run(installed, project, "dvc", "init", "-q")
    for _ in range(2):
        out = run(installed, project, "dvc", "repro")
    ran = {line.split("'")[1] for line in out.splitlines() if line.startswith("Running stage")}
    assert ran == {"prepare"}  # the second time nothing else does
    assert (project / "data/smoke/reports/report.html").is_file()
    assert "data/smoke" not in run(installed, project, "git", "status", "--porcelain", "-uall")
    assert "up to date" in pipeline(installed, project, "distill", "--student", "titn")
    (project / "data/smoke/students/titn/best.json").unlink()
    assert "put back" in pipeline(installed, project, "distill", "--student", "titn")
