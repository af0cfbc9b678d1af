"""What the real DVC reruns after each kind of change, and what it does not."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config.params import load_params
from pipeline.labels.cache import LabelCache
from tests.support.commands import run
from tests.support.markdown import blocks, page
from tests.support.project import ROOT, Project, environment
from tests.support.warm_python import warm_python

pytest.importorskip("dvc", reason="comes with the extra dvc")
BIN = Path(sys.executable).parent
DVC = BIN / "dvc"


@dataclass(frozen=True)
class Checkout(Project):
    """A git checkout of the project on the recipe `smoke`, with DVC.

    Attributes:
        python: The folder of the `python` that DVC runs.
    """

    python: Path = BIN

    def shell(self, *command: str) -> str:
        path = f"{self.python}:{BIN}:{environment()['PATH']}"
        done = subprocess.run(
            command,
            cwd=self.path,
            env=environment(PATH=path, PYTHONPATH="", GIT_CONFIG_GLOBAL="/dev/null"),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def dvc(self, *arguments: str) -> str:
        return self.shell(str(DVC), *arguments)

    def repro(self, *arguments: str) -> set[str]:
        """Run `dvc repro` and return the names of the stages that ran; prepare always does, to look at its source."""
        out = self.dvc("repro", *arguments)
        return {line.split("'")[1] for line in out.splitlines() if line.startswith("Running stage")} - {"prepare"}

    def pipeline(self, *arguments: str) -> str:
        return self.shell("python", "-m", "stages.cli", *arguments)

    def commit(self) -> None:
        self.shell("git", "add", "-A")
        self.shell("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "state")


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="python-") as folder, warm_python(Path(folder)) as path:
        yield path


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Checkout:
    """A checkout in which `dvc repro` has run once."""
    path = tmp_path_factory.mktemp("reproduced") / "project"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        if not name.startswith(("tests/", "results/", "benchmarks/")) and (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, path / name)
    Project.create(path)
    checkout = Checkout(path, python)
    checkout.edit("{crop: 2, flip: false, autoaugment: cifar10, mixing: cutmix}", "{crop: 1, mixing: none}")
    checkout.edit("squeezenet1_1: {epochs: 8", "squeezenet1_1: {epochs: 3")
    checkout.shell("git", "init", "-q")
    checkout.commit()
    ran = checkout.repro()
    assert ran == {
        "teacher@squeezenet1_1", "teacher@mobilenet_v3_large", "select", "label@default",
        "student@titn", "student@vit", "report",
    }  # fmt: skip
    checkout.commit()
    return checkout


@pytest.fixture
def checkout(reproduced: Checkout, tmp_path: Path) -> Checkout:
    shutil.copytree(reproduced.path, tmp_path / "project", symlinks=True)
    return Checkout(tmp_path / "project", reproduced.python)


def test_a_second_repro_runs_nothing_and_asks_for_no_log(reproduced: Checkout) -> None:
    logs = [*reproduced.data.glob("*/*/log.jsonl")]
    assert len(logs) == 4
    for log in logs:  # as after `dvc pull`
        log.unlink()
    assert reproduced.repro() == set()
    assert reproduced.dvc("status").split() == ["prepare:", "always", "changed"]
    assert all((reproduced.data / "reports" / name).is_file() for name in ("report.html", "report.md", "report.json"))


def test_metrics_and_plots_are_dvcs(reproduced: Checkout) -> None:
    shown = json.loads(reproduced.dvc("metrics", "show", "--json").splitlines()[-1])
    files = shown[""]["data"]
    assert len(files) == 4
    assert 0 <= files["data/smoke/students/titn/metrics.json"]["data"]["best"]["top1"] <= 100
    plots = reproduced.dvc("plots", "show", "--json", "data/smoke/students/titn/curve.csv")
    assert "top1" in plots


def plots(out: str) -> dict[str, list[dict[str, Any]]]:
    """Find the JSON in the output of `dvc plots`, which warns of teachers that are not in the recipe."""
    data: dict[str, list[dict[str, Any]]] = json.loads(next(line for line in out.splitlines() if line[:1] == "{"))[
        "data"
    ]
    return data


@pytest.mark.slow
def test_dvcs_plots_show_the_curves_together_and_the_reports_pictures(checkout: Checkout) -> None:
    shown = plots(checkout.dvc("plots", "show", "--json"))
    for title, folder in (("Figure 4, top-1 of the teachers by epoch", "teachers"),
                          ("Figures 6 to 8, top-1 of the students by epoch", "students")):  # fmt: skip
        values = shown[title][0]["content"]["data"]["values"]
        trained = {path.parent.name for path in (checkout.data / folder).glob("*/curve.csv")}
        assert {Path(value["filename"]).parts[0] for value in values} == trained
    assert "data/smoke/reports/figures/teachers.png" in shown
    confusion = shown["data/smoke/students/vit/predictions.csv"][0]["content"]["data"]["values"]
    assert len(confusion) == json.loads((checkout.data / "students/vit/metrics.json").read_text())["num_test"]
    checkout.edit("      vit: {}\n", "      vit: {epochs: 1}\n")
    checkout.repro("student@vit")
    title = "Figures 6 to 8, top-1 of the students by epoch"
    compared = plots(checkout.dvc("plots", "diff", "--json"))[title]
    values = [value for one in compared for value in one["content"]["data"]["values"]]
    epochs = {(value["rev"], value["epoch"]) for value in values if value["filename"].startswith("vit")}
    assert epochs == {("HEAD", "1"), ("HEAD", "2"), ("workspace", "1")}


@pytest.mark.slow
def test_changing_one_students_recipe_reruns_that_student_alone(checkout: Checkout) -> None:
    checkout.edit("      vit: {}\n", "      vit: {epochs: 3}\n")
    assert checkout.repro() == {"student@vit", "report"}


@pytest.mark.slow
def test_changing_a_teacher_that_does_not_win_does_not_relabel(checkout: Checkout) -> None:
    selection = json.loads((checkout.data / "selection.json").read_text())
    loser = next(candidate["name"] for candidate in selection["candidates"] if candidate["name"] != selection["winner"])
    checkout.edit(f"{loser}: {{", f"{loser}: {{lr: 0.00001, ")
    assert checkout.repro() == {f"teacher@{loser}", "select", "report"}


@pytest.mark.slow
def test_another_winner_relabels_and_retrains(checkout: Checkout) -> None:
    selection = json.loads((checkout.data / "selection.json").read_text())
    loser = next(candidate["name"] for candidate in selection["candidates"] if candidate["name"] != selection["winner"])
    file = checkout.path / "params.yaml"
    file.write_text(file.read_text().replace("teachers: [squeezenet1_1, mobilenet_v3_large]", f"teachers: [{loser}]"))
    assert checkout.repro() == {"select", "label@default", "student@titn", "student@vit", "report"}
    assert LabelCache.open(checkout.data / "labels/default.h5").provenance["teacher"] == loser


@pytest.mark.slow
def test_more_views_extend_the_labels_and_leave_teachers_alone(checkout: Checkout) -> None:
    file = checkout.data / "labels/default.h5"
    former = LabelCache.open(file)
    checkout.edit("count: 2", "count: 3")
    assert checkout.repro() == {"label@default", "student@titn", "student@vit", "report"}
    extended = LabelCache.open(file)
    assert extended.num_views == 3
    assert (extended.labels[:2] == former.labels).all()


@pytest.mark.slow
def test_changed_code_reruns_the_stages_that_use_it(checkout: Checkout) -> None:
    for name, stages in (
        ("stages/reports/tables.py", {"report"}),
        ("pipeline/models/students/vit.py", {"student@titn", "student@vit", "report"}),
    ):
        with (checkout.path / name).open("a") as file:
            file.write("\n# changed\n")
        ran = checkout.repro()
        # Students with the same results would leave the report alone, were it not for their times.
        assert ran == stages, name


@pytest.mark.slow
def test_what_the_command_line_wrote_is_adopted_by_the_line_it_ends_with(checkout: Checkout) -> None:
    checkout.edit("      titn: {}\n", "      titn: {epochs: 1}\n")
    out = checkout.pipeline("distill", "--student", "titn")
    line = out.strip().splitlines()[-1]
    assert line.endswith("dvc commit -f student@titn")
    checkout.dvc(*line.split("dvc ")[-1].split())
    before = (checkout.data / "students/titn/metrics.json").read_bytes()
    assert checkout.repro() == {"report"}
    assert checkout.repro() == set()
    assert (checkout.data / "students/titn/metrics.json").read_bytes() == before


@pytest.mark.slow
def test_students_on_demand_need_no_edit(checkout: Checkout) -> None:
    checkout.dvc(
        "exp", "run", "-S", "+students={titn-mixup: mixup}", "-S", "view_recipes=[default,mixup]", "-n", "mixup"
    )
    assert (checkout.data / "students/titn-mixup/metrics.json").is_file()
    assert (checkout.data / "labels/mixup.h5").is_file()


@pytest.mark.slow
def test_an_experiment_in_a_copy_runs_the_copys_code_and_changes_the_recipe(checkout: Checkout) -> None:
    checkout.dvc("exp", "run", "--temp", "-S", "+recipes.smoke.students.vit.epochs=1", "-n", "short")
    shown = json.loads(checkout.dvc("exp", "show", "--json"))
    assert "short" in json.dumps(shown)
    checkout.dvc("exp", "apply", "short")
    assert json.loads((checkout.data / "students/vit/metrics.json").read_text())["epochs"] == 1


@pytest.mark.slow
def test_the_page_on_sharing_a_clone_trains_on_what_it_pulls(checkout: Checkout, tmp_path: Path) -> None:
    share, train, again, moved, everything = (block.splitlines() for block in blocks(page("docs/sharing.md"), "sh"))
    assert share[1] == "dvc repro" and share[-1] == "git push"  # nothing to do, and nowhere to
    for line in [share[0].replace("/mnt/storage/titn", str(tmp_path / "remote")), share[2], *share[3:-2]]:
        checkout.shell(*shlex.split(line))
    checkout.commit()
    assert train[0] == "git clone URL titn && cd titn"
    checkout.shell("git", "clone", "-q", str(checkout.path), str(tmp_path / "titn"))
    clone = Checkout(tmp_path / "titn", checkout.python)
    clone.shell(*shlex.split(train[1]))
    assert {path.name for path in clone.data.iterdir()} == {"labels", "prepared"}
    ended = run(clone.path, *shlex.split(train[2])[1:])
    assert ended.code == 0, ended.err
    assert (clone.data / "students/titn/metrics.json").read_bytes() == (
        checkout.data / "students/titn/metrics.json"
    ).read_bytes()
    clone.edit("      titn: {}\n", "      titn: {epochs: 1}\n")
    assert again == ["dvc repro --allow-missing student@titn"]
    assert clone.repro(*shlex.split(again[0])[2:]) == {"student@titn"}
    assert not (clone.data / "teachers").exists()
    shutil.rmtree(clone.data)
    clone.shell("git", "checkout", "-q", ".")
    assert (
        "pipeline distill --recipe cifar100 --student titn" in moved[-1]
    )  # over ssh; tests of interruptions move runs
    assert everything == ["dvc pull", "dvc repro"]
    clone.dvc("pull")
    assert clone.repro() == set()


def start_dvc(checkout: Checkout, stage: str) -> subprocess.Popen[bytes]:
    """Let DVC run a stage in a session of its own."""
    path = f"{Path(sys.executable).parent}:{environment()['PATH']}"
    return subprocess.Popen(
        [DVC, "repro", stage],
        cwd=checkout.path,
        env=environment(PATH=path, PYTHONPATH="", GIT_CONFIG_GLOBAL="/dev/null"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def start_labelling(checkout: Checkout) -> subprocess.Popen[bytes]:
    """Let DVC label 20 views, and return it when some of them are finished."""
    checkout.edit("count: 2", "count: 20")
    process = start_dvc(checkout, "label@default")
    until = time.monotonic() + 120
    while len(parts_of(checkout)) < 3:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    return process


def parts_of(checkout: Checkout) -> dict[str, tuple[int, int]]:
    """The finished parts, each with what changes when it is written again."""
    parts = {}
    for file in (checkout.path / "data/work/smoke/labels/default").glob("*.part"):
        status = file.stat()
        parts[file.name] = (status.st_ino, status.st_mtime_ns)
    return parts


@pytest.mark.slow
def test_a_killed_repro_keeps_its_parts_and_the_next_one_goes_on(checkout: Checkout) -> None:
    file = checkout.data / "labels/default.h5"
    former = file.read_bytes()
    process = start_labelling(checkout)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = len(parts_of(checkout))
    assert 3 <= finished < 18 and file.read_bytes() == former
    left = 20 - 2 - finished
    assert f"labelled {left}/{left} views" in checkout.dvc("repro", "label@default")
    resumed = file.read_bytes()
    ended = run(checkout.path, "label", "--fresh")
    assert ended.code == 0 and "labelled 20/20 views" in ended.out
    assert file.read_bytes() == resumed


@pytest.mark.slow
def test_labelling_that_outlives_its_dvc_is_not_disturbed_by_another(checkout: Checkout) -> None:
    process = start_labelling(checkout)
    process.kill()
    process.wait()
    with pytest.raises(AssertionError, match="held by another run"):
        checkout.dvc("repro", "label@default")
    until = time.monotonic() + 120
    while parts_of(checkout):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert "up to date, 20 views" in checkout.dvc("repro", "label@default")


@pytest.mark.slow
def test_labels_that_rotted_in_dvcs_cache_reach_no_student(checkout: Checkout) -> None:
    file = checkout.data / "labels/default.h5"
    digest = hashlib.md5(file.read_bytes()).hexdigest()
    cached = checkout.path / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    rotten = bytearray(cached.read_bytes())
    rotten[-100] ^= 1
    cached.chmod(0o644)
    cached.write_bytes(rotten)
    cached.chmod(0o444)
    file.unlink()
    checkout.dvc("checkout", "label@default")
    assert file.read_bytes() == rotten, "DVC trusts what it has made read-only"
    with pytest.raises(AssertionError, match=r"labels/default\.h5 is not a valid label cache: .*SHA-256 differs"):
        checkout.dvc("repro", "--single-item", "--force", "student@titn")


# What DVC deletes and replaces comes back


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("run.json", "log.jsonl")}


def append_comment(checkout: Checkout, name: str) -> None:
    with (checkout.path / name).open("a") as file:
        file.write("\n# changed\n")


def check_kept(checkout: Checkout) -> None:
    """Check that nothing has written into a file that has a second name, or into DVC's cache."""
    for file in (checkout.path / "data/work/kept/smoke").glob("*.json"):
        entry = json.loads(file.read_text())
        for part in entry["files"]:
            data = (file.with_suffix("") / entry["folder"] / part["path"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == part["sha256"], part
    for file in (checkout.path / ".dvc/cache/files/md5").rglob("*"):
        if file.is_file() and file.suffix != ".dir":
            assert hashlib.md5(file.read_bytes()).hexdigest() == file.parent.name + file.name


@pytest.mark.slow
def test_images_that_dvc_deletes_come_back_without_their_folder(checkout: Checkout, tmp_path: Path) -> None:
    for number in range(24):
        path = tmp_path / "photos/train" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 2 * number, 255)).save(path)
    own, params = checkout.path / "data/folder-small/prepared", checkout.path / "params.yaml"
    checkout.pipeline("prepare", "--recipe", "folder-small", "--from", str(tmp_path / "photos"))
    shutil.rmtree(tmp_path / "photos")
    whole = contents(own)
    recipes = load_params(params)
    line = shlex.split(recipes.dvc_command(recipes.recipes["folder-small"]))
    assert line[:3] == ["dvc", "exp", "run"]
    out = checkout.dvc(*line[1:], "prepare")
    assert "data/folder-small/prepared: put back as it was finished on" in out and contents(own) == whole
    small = load_params(params).recipes["folder-small"]
    teachers, students = load_params(params).teachers, load_params(params).students
    assert set(teachers) <= set(small.teachers) and set(students) <= set(small.students)
    stages = {listed.split()[0] for listed in checkout.dvc("stage", "list").splitlines()}
    names = [*(f"teacher@{name}" for name in teachers), *(f"student@{name}" for name in students)]
    assert stages == {"prepare", "select", "label@default", "report", *names}
    out = checkout.dvc("repro", "prepare")  # params.yaml names the recipe now
    assert "kept, of the same settings; it is of the folder photos" in out and contents(own) == whole
    checkout.dvc("commit", "-f", "prepare")
    append_comment(checkout, "stages/prepare.py")
    shutil.rmtree(own)
    out = checkout.dvc("repro", "prepare")
    assert "perhaps by other code than today's" in out and contents(own) == whole
    checkout.shell("git", "checkout", "-q", "dvc.lock", "params.yaml")
    checkout.dvc("checkout", "--force")
    checkout.dvc("exp", "run", *line[3:], "prepare")
    assert contents(own) == whole
    assert checkout.repro("prepare") == set() and contents(own) == whole


@pytest.mark.slow
def test_a_newer_result_comes_back_and_changed_code_is_really_run(checkout: Checkout) -> None:
    vit = checkout.data / "students/vit"
    older = contents(vit)
    checkout.edit("      vit: {}\n", "      vit: {epochs: 1}\n")
    assert "epoch 1/1" in checkout.pipeline("distill", "--student", "vit")
    newer, log = contents(vit), (vit / "log.jsonl").read_bytes()
    checkout.dvc("checkout", "--force", "student@vit")
    assert contents(vit) == older
    (vit / "log.jsonl").unlink()
    out = checkout.pipeline("distill", "--student", "vit")
    assert "put back as it was finished on" in out and "epoch 1/1" not in out and contents(vit) == newer
    assert (vit / "log.jsonl").read_bytes() == log
    out = checkout.dvc("repro", "student@vit")  # deletes it, for its recipe is another than DVC's
    assert "put back as it was finished on" in out and "epoch 1/1" not in out and contents(vit) == newer
    checkout.dvc("exp", "run", "student@vit", "-S", "recipes.smoke.students.vit.epochs=2", "-n", "longer")
    assert json.loads((vit / "metrics.json").read_text())["epochs"] == 2
    append_comment(checkout, "pipeline/models/students/vit.py")
    out = checkout.dvc("repro", "student@vit")
    assert "epoch 2/2" in out and "put back" not in out
    check_kept(checkout)


@pytest.mark.slow
def test_what_rotted_in_place_is_told_and_comes_back_by_dvc_checkout(checkout: Checkout) -> None:
    checkout.forget()  # nothing is kept
    vit, name = checkout.data / "students/vit", "data/smoke/students/vit/curve.csv"
    (vit / "log.jsonl").unlink()  # DVC has none
    whole = {path.name: path.read_bytes() for path in vit.iterdir()}
    (vit / "curve.csv").write_bytes(whole["curve.csv"][:-20])
    way = f"`dvc checkout {name}`"
    with pytest.raises(AssertionError, match=f"curve.csv: not what manifest.json says.*{way}.*--fresh") as told:
        checkout.pipeline("distill", "--student", "vit")
    assert "epoch 1/" not in str(told.value)
    checkout.dvc("checkout", "--force", name)
    assert "up to date" in checkout.pipeline("distill", "--student", "vit") and checkout.repro() == set()
    shutil.rmtree(vit)
    checkout.dvc("checkout", "student@vit")
    assert {path.name: path.read_bytes() for path in vit.iterdir()} == whole, "the manifest with the rest"


@pytest.mark.slow
def test_what_outlives_its_dvc_is_not_trained_again(checkout: Checkout) -> None:
    checkout.edit("      vit: {}\n", "      vit: {epochs: 12}\n")
    process = start_dvc(checkout, "student@vit")
    work, metrics = checkout.path / "data/work/smoke/students/vit.lock", checkout.data / "students/vit/metrics.json"
    until = time.monotonic() + 120
    while metrics.exists() or not work.exists() or not work.read_bytes():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    process.terminate()  # DVC alone
    process.wait()
    assert not metrics.exists(), "the test has to be quicker than the training"
    while work.read_bytes():
        assert time.monotonic() < until
        time.sleep(0.05)
    trained = contents(checkout.data / "students/vit")
    out = checkout.dvc("repro", "student@vit")
    assert "put back as it was finished on" in out and "epoch 1/12" not in out
    assert contents(checkout.data / "students/vit") == trained


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hardlink", "symlink"])
def test_a_cache_of_links_is_never_written_into(checkout: Checkout, kind: str) -> None:
    checkout.dvc("config", "cache.type", kind)
    vit = checkout.data / "students/vit"
    for epochs, before in ((1, "{}"), (2, "{epochs: 1}")):
        checkout.edit(f"      vit: {before}\n", f"      vit: {{epochs: {epochs}}}\n")
        checkout.pipeline("distill", "--student", "vit")
        checkout.dvc("commit", "-f", "student@vit", "prepare")
        checkout.dvc("checkout", "--force", "--relink", "student@vit", "prepare")
        weights = vit / "best.safetensors"
        assert weights.is_symlink() if kind == "symlink" else not os.access(weights, os.W_OK) or os.getuid() == 0
        check_kept(checkout)
    for file in vit.iterdir():
        file.unlink()
    assert "put back as it was finished on" in checkout.pipeline("distill", "--student", "vit")
    assert checkout.repro("student@vit") == set()
    check_kept(checkout)


def test_lists_that_do_not_fit_a_recipe_are_refused_with_the_line_that_works(checkout: Checkout) -> None:
    """That line is run in `test_images_that_dvc_deletes_come_back_without_their_folder`."""
    params = load_params(checkout.path / "params.yaml")
    line = params.dvc_command(params.recipes["folder-small"])
    with pytest.raises(AssertionError, match="'squeezenet1_1' is not in recipes.folder-small") as error:
        checkout.dvc("exp", "run", "-S", "recipe=folder-small")
    assert f"run this instead: {line}" in str(error.value)
    made = [path for path in (checkout.path / "data/folder-small").rglob("*") if path.is_file()]
    assert made == [], "nothing was trained"
