"""`pipeline doctor`: what it finds, the disk and memory that it estimates, and that it writes nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.system.runtime import deciding
from stages.doctor import checks
from stages.doctor.software import OK, PROBLEM, WARNING, extras, size_text, software
from tests.support.in_process import invoke
from tests.support.project import Project
from tests.whole.test_other_machines import unsearchable


def small(project: Project) -> Project:
    """Let a full run be one teacher and two students."""
    file = project.path / "params.yaml"
    text = re.sub(r"^teachers: .*$", "teachers: [squeezenet1_1]", file.read_text(), count=1, flags=re.MULTILINE)
    file.write_text(text)
    return project


@pytest.fixture
def empty(tmp_path: Path) -> Project:
    """A project in which nothing has been run."""
    return small(Project.create(tmp_path / "project"))


@pytest.fixture(scope="module")
def labelled(taught: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose labels are up to date, and one of its two students."""
    project = Project(tmp_path_factory.mktemp("doctor") / "project")
    shutil.copytree(taught.path, project.path)
    small(project)
    invoke(project, "label")
    invoke(project, "distill", "--student", "vit")
    return project


def examine(project: Project, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Run the doctor, check that it leaves everything as it is, and return what it says as JSON."""

    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(project.path.rglob("*"))}

    before = state()
    out = invoke(project, "doctor", "--json", *arguments, code=code)
    assert state() == before
    start, end = out.index("\n{\n") + 1, out.rindex("\n}") + 2
    diagnosis: dict[str, Any] = json.loads(out[start:end])
    assert diagnosis["ok"] == (code == 0)
    return diagnosis


def lines(diagnosis: dict[str, Any], mark: str) -> str:
    return "\n".join(
        f"{finding['text']}; {finding['remedy']}" for finding in diagnosis["findings"] if finding["mark"] == mark
    )


def test_a_new_project_is_examined_in_words(empty: Project) -> None:
    out = invoke(empty, "doctor")
    for words in (
        f"torch {torch.__version__}",
        "this is smoke",
        "digits comes with this package",
        "0 of 4 stages that train or label are up to date",
        "disk: the recipe needs at most",
        "steps are eager",
        "inner block of titn: ",
        "teacher@squeezenet1_1",
        "train 8 epochs (no data yet)",
        "teacher squeezenet1_1",
    ):
        assert words in out, words


def test_what_is_left_to_do_is_said_stage_by_stage(labelled: Project) -> None:
    diagnosis = examine(labelled)
    stages = {stage["stage"]: stage["why"] for stage in diagnosis["stages"]}
    assert list(stages) == ["teacher@squeezenet1_1", "label@default", "student@titn", "student@vit"]
    assert {name for name, why in stages.items() if why is None} == set(stages) - {"student@titn"}
    assert "(not trained)" in stages["student@titn"]
    assert "3 of 4 stages" in lines(diagnosis, OK)
    needed = {part["name"]: part["needed"] for part in diagnosis["artefacts"]}
    assert needed["prepared data"] == needed["labels default"] == needed["teacher squeezenet1_1"] == 0
    assert needed["student titn, best and last"] > 0


def test_sizes_are_those_of_the_files(labelled: Project) -> None:
    sizes = {artefact["name"]: artefact["size"] for artefact in examine(labelled)["artefacts"]}
    real = {
        "teacher squeezenet1_1": labelled.data / "teachers/squeezenet1_1/best.safetensors",
        "the selected teacher, at most": labelled.data / "teacher/best.safetensors",
    }
    for name, file in real.items():
        assert sizes[name] == pytest.approx(file.stat().st_size, rel=0.02), name
    assert sizes["prepared data"] == sum(file.stat().st_size for file in (labelled.data / "prepared").iterdir())
    vit = sum(file.stat().st_size for file in (labelled.data / "students/vit").glob("*.safetensors"))
    assert sizes["student vit, best and last"] == pytest.approx(vit, rel=0.1)
    assert sizes["labels default"] == 2 * 673


def test_stages_wait_for_those_that_they_come_after(empty: Project, labelled: Project, tmp_path: Path) -> None:
    stages = {stage["stage"]: stage["why"] for stage in examine(empty)["stages"]}
    assert stages["label@default"] == "label 2 views, after the selection of squeezenet1_1"
    assert stages["student@vit"] == "train 2 epochs, after the labels of the views default"
    shutil.copytree(labelled.path, tmp_path / "copy")
    Project(tmp_path / "copy").forget("labels/default.h5")
    stages = {stage["stage"]: stage["why"] for stage in examine(Project(tmp_path / "copy"))["stages"]}
    assert "label the views 0:2 of" in stages["label@default"] and stages["teacher@squeezenet1_1"] is None
    assert stages["student@vit"].endswith("after the labels of the views default")


def test_a_changed_field_is_why_a_stage_runs_again(labelled: Project, tmp_path: Path) -> None:
    shutil.copytree(labelled.path, tmp_path / "copy")
    project = Project(tmp_path / "copy")
    project.edit("vit: {}", "vit: {lr: 0.05}")
    project.edit("count: 2", "count: 3")
    output = invoke(project, "doctor")
    assert "1 of 4 stages" in output
    project.edit("count: 3", "count: 2")
    assert "2 of 4 stages" in invoke(project, "doctor")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (("vit: {}", "vit: {epoch: 3}"), "epoch"),
        (("vit: {}", "vit: {step: graph}"), "students.vit: step: graph"),
        (("squeezenet1_1: {epochs: 8}", "squeezenet1_1: {weights: nowhere.pt}"), "weights 'nowhere.pt' does not exist"),
    ],
)
def test_what_cannot_work_is_a_problem_with_its_way_out(empty: Project, edit: tuple[str, str], words: str) -> None:
    empty.edit(*edit)
    assert words in lines(examine(empty, code=1), PROBLEM)


def test_data_that_are_not_there_are_a_problem(empty: Project, tmp_path: Path) -> None:
    for recipe, words in (("cifar100", "prepare --recipe cifar100 --download"), ("folder", "--from FOLDER")):
        diagnosis = examine(empty, "--recipe", recipe, code=1)
        assert words in lines(diagnosis, PROBLEM)
    assert "nothing is known of folder's images" in lines(diagnosis, WARNING)
    (empty.path / "params.yaml").unlink()
    assert "params.yaml" in lines(examine(empty, code=1), PROBLEM)
    assert "params.yaml" in invoke(Project.create(tmp_path / "other"), "doctor", "--recipe", "imagenet21k", code=2)


def test_a_full_disk_is_a_problem(empty: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(empty.path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000_000))
    problems = lines(examine(empty, code=1), PROBLEM)
    assert "10 MB are free" in problems and "larger disk" in problems


@pytest.mark.slow
def test_torch_compile_is_tried_where_the_recipe_uses_it(empty: Project) -> None:
    empty.edit("vit: {}", "vit: {compile: true}")
    assert "torch.compile works (students.vit)" in empty.run_anew("doctor")
    without = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(empty.path / "cache")}
    out = empty.run_anew("doctor", code=1, **without)
    assert "compile: true of students.vit: torch.compile fails here" in out and "install a C++ compiler" in out


def test_weights_to_be_downloaded_are_a_warning(
    empty: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty.edit("squeezenet1_1: {epochs: 8}", "squeezenet1_1: {weights: imagenet}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "ImageNet weights of squeezenet1_1 are not in" in lines(examine(empty), WARNING)
    unsearchable(monkeypatch, tmp_path / "hub")
    assert "ImageNet weights of squeezenet1_1 are not in" in lines(examine(empty), WARNING)


def test_a_torchvision_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    last = software()[-1]
    assert last.mark == PROBLEM and "torchvision cannot be imported" in last.text and "together" in last.remedy


def test_extras_name_the_pip_line_of_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=2.6", 'click; extra == "dvc"', 'no-such-thing>=1; extra == "report"', 'no-such; extra == "dev"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    dvc, report, rest = extras()
    assert dvc.mark == OK and dvc.text.startswith("extra dvc: click 8")
    assert report.mark == WARNING and report.line.endswith("not installed; pip install 'titn-pipeline[report]'")
    assert rest.mark == OK and rest.text.endswith("not here: dev")


def test_dvc_needs_its_folder_and_names_its_remotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dvc")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    with contextlib.chdir(tmp_path):
        assert "`dvc repro` does not work here" in checks.dvc()[0].text
        Path(".dvc").mkdir()
        Path("dvc.yaml").touch()
        Path(".git").mkdir()
        assert "no remote" in checks.dvc()[0].text
        Path(".dvc/config").write_text("[core]\n    remote = disk\n['remote \"disk\"']\n    url = /mnt/dvc\n")
        Path(".dvc/config.local").write_text("[cache]\n    dir = /mnt/cache\n")
        assert checks.dvc()[0].text.endswith("in a checkout, remotes disk")
        assert checks.dvc_setting("cache", "dir") == "/mnt/cache"


def test_a_file_system_without_locks_is_a_problem_and_no_locks_by_wish_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "data/smoke").mkdir(parents=True)
    lock = tmp_path / "data/smoke/prepared.lock"
    lock.touch()
    monkeypatch.chdir(tmp_path)
    assert checks.locks().mark == OK
    monkeypatch.setattr("fcntl.flock", refuse)
    assert checks.locks().mark == PROBLEM
    assert "cannot lock data/smoke/prepared.lock: No locks available" in checks.locks().text
    monkeypatch.setenv("TITN_NO_LOCKS", "1")
    assert checks.locks().mark == WARNING


def test_sizes_are_written_for_people() -> None:
    assert [size_text(size) for size in (0, 999, 4_414_464, 6.7e9, 2e12)] == [
        "0 bytes", "999 bytes", "4.41 MB", "6.7 GB", "2 TB",
    ]  # fmt: skip


def test_what_keeps_dvc_from_working_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dvc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")

    def dvc() -> list[str]:
        findings = checks.dvc()
        assert {finding.mark for finding in findings} <= {WARNING} or "in a checkout" in findings[0].text
        return [finding.line for finding in findings]

    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").touch()
    assert "no git repository, as that of a ZIP archive; clone the project, or: dvc config core.no_scm" in dvc()[0]
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    assert "in a checkout" in dvc()[0]
    (tmp_path / ".dvc/config").unlink()
    (tmp_path / ".git").mkdir()
    assert "in a checkout" in dvc()[0]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").symlink_to("elsewhere")
    assert "data is a link, and DVC refuses outputs outside the git repository" in dvc()[0]
    (tmp_path / "data").unlink()
    other = tmp_path / "bin" / "python"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho /other\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{other.parent}:/usr/bin:/bin")
    assert f"it runs `python`, which is {other} here, not {sys.executable}; " in dvc()[0]
    other.unlink()
    monkeypatch.setenv("PATH", str(other.parent))
    assert "`dvc repro` does not work here: it runs `python`, which is not on PATH (python: not found)" in dvc()[0]


def test_the_space_of_second_names_that_nothing_else_names_is_counted(labelled: Project, tmp_path: Path) -> None:
    shutil.copytree(labelled.path, tmp_path / "copy")  # a copy has no links: what is kept takes space of its own
    entries = [path for path in (tmp_path / "copy/data/work/kept/smoke").iterdir() if path.is_dir()]
    own = sum(file.stat().st_size for entry in entries for file in entry.rglob("*") if file.is_file())
    copy = Project(tmp_path / "copy")
    assert f"second names of results take {size_text(own)}, which `pipeline clean --kept` frees" in invoke(
        copy, "doctor"
    )
    assert f"{size_text(own)} are free now" in invoke(copy, "clean", "--kept")
    assert "clean --kept" not in invoke(copy, "doctor")


def test_doctor_says_where_fp32_is_rounded_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, capability = torch.device("cuda:1"), {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability[device.index])
    assert checks._fp32(torch.device("cpu")) == "not rounded"
    assert checks._fp32(cuda) == "not rounded, there is no tf32"
    newer = torch.device("cuda:0")
    assert checks._fp32(newer).endswith("predictions; in training convolutions are rounded to tf32")
    with deciding(newer, "fp32"):
        assert checks._fp32(newer) == "not rounded"
    monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "high")
    assert checks._fp32(newer) == "rounded to tf32"
