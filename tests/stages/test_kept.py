"""What is kept of finished results: whole at any moment, put back only where it fits, and counted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.training.manifest import write_with_manifest
from stages.cli import cli
from stages.shared import dvc_file, kept
from tests.support.killing import killed_at_each_call
from tests.support.project import Project

JSON = Path("data/work/kept/smoke/student@titn.json")
OUT = Path("data/smoke/students/titn")
FILES = {"best.safetensors": b"weights", "run.json": b"{}", "metrics.json": b"{ }"}


class Said:
    """Stands for a command's context: notes what is said and changed."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stages: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def changed(self, stage: str) -> None:
        self.stages.append(stage)


@pytest.fixture(autouse=True)
def in_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Project.create(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def said() -> Any:
    return Said()


def result(fingerprint: str = "f" * 64, **amounts: int) -> kept.Result:
    return kept.Result("smoke", "student@titn", fingerprint, OUT, tuple(OUT / name for name in FILES), amounts)


def write(mark: bytes = b"") -> None:
    """Write the result as commands do, every file anew."""
    OUT.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        (OUT / name).unlink(missing_ok=True)
        (OUT / name).write_bytes(content + mark)


def contents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in OUT.iterdir()} if OUT.exists() else {}


def delete() -> None:
    for path in OUT.iterdir():
        path.unlink()
    OUT.rmdir()


def marked(mark: bytes) -> dict[str, bytes]:
    return {name: content + mark for name, content in FILES.items()}


def other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "code_digest", lambda stage: "other")


def test_what_the_manifest_names_is_kept_though_the_file_is_damaged_before(said: Any) -> None:
    write_with_manifest(OUT, FILES)
    (OUT / "best.safetensors").unlink()
    (OUT / "best.safetensors").write_bytes(b"others")
    kept.keep(said, result())
    delete()
    assert not kept.put_back(said, result()) and "not what was kept" in said.lines[-1]


def test_a_deleted_result_is_put_back_by_links_to_the_same_files(said: Any) -> None:
    write()
    kept.keep(said, result())
    inodes = {path.name: path.stat().st_ino for path in OUT.iterdir()}
    delete()
    assert kept.put_back(said, result()) and contents() == FILES
    assert {path.name: path.stat().st_ino for path in OUT.iterdir()} == inodes
    assert len(said.lines) == 1 and f"{OUT}: put back as it was finished on 20" in said.lines[0]
    assert said.stages == ["student@titn"]
    entry = json.loads(JSON.read_text())
    assert entry["code"] == dvc_file.code_digest("student@titn")
    assert {Path(file["path"]).name: (file["size"], file["sha256"]) for file in entry["files"]} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in FILES.items()
    }


def test_only_the_same_settings_the_same_code_and_enough_of_it_fit(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    kept.keep(said, result(views=2))
    assert kept.find(result(views=2)) and kept.find(result())
    assert kept.find(result(views=3)) is None
    assert kept.find(result("e" * 64)) is None
    other_code(monkeypatch)
    assert kept.find(result()) is None and not kept.put_back(said, result())
    delete()
    assert kept.put_back(said, result(), any_code=True) and contents() == FILES
    assert "by other code than today's" in said.lines[-1]
    assert kept.is_of_other_code(result()) and not kept.holds(result())


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_where_links_fail_there_are_copies(said: Any, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def link(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    write()
    kept.keep(said, result())
    assert [path.stat().st_nlink for path in OUT.iterdir()] == [1, 1, 1]
    (OUT / "best.safetensors").write_bytes(b"spoilt in place")
    assert kept.put_back(said, result()) and contents() == FILES
    assert kept.space() == kept.Space(1, 12, 12)


def test_killed_while_keeping_either_the_former_or_the_new_one_is_whole(
    said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(b"1")
    kept.keep(said, result())
    write(b"2")
    seen = set()

    def check() -> None:
        delete()
        assert kept.put_back(said, result())
        assert contents() in (marked(b"1"), marked(b"2"))
        seen.add(contents()["metrics.json"])
        write(b"1")
        kept.keep(said, result())
        assert len(list(Path("data/work/kept/smoke/student@titn").iterdir())) == 1, "leftovers"
        write(b"2")

    assert killed_at_each_call(monkeypatch, lambda: kept.keep(said, result()), check) > 15
    assert seen == {b"{ }1", b"{ }2"}


def test_killed_while_putting_back_the_next_command_finishes_it(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write(b"2")
    kept.keep(said, result())
    write(b"1")

    def check() -> None:
        there = contents()
        assert there.get("metrics.json") != b"{ }2" or there == marked(b"2"), "complete, but mixed"
        assert kept.put_back(said, result()) and contents() == marked(b"2")
        write(b"1")

    assert killed_at_each_call(monkeypatch, lambda: assert_put_back(said), check) > 10


def assert_put_back(said: Any) -> None:
    assert kept.put_back(said, result())


def test_a_full_disk_costs_the_second_name_and_not_the_result(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write(b"1")
    kept.keep(said, result())
    write(b"2")

    def link(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        kept.keep(said, result())
    assert contents() == marked(b"2")
    assert len(said.lines) == 1 and "has no second name" in said.lines[0] and "No space left" in said.lines[0]
    delete()
    assert kept.put_back(said, result()) and contents() == marked(b"1")


def test_what_is_deleted_while_it_is_kept_takes_no_place(said: Any) -> None:
    write(b"1")
    kept.keep(said, result())
    write(b"2")
    (OUT / "best.safetensors").unlink()  # as the next `dvc repro` does, which finds the run still at work
    kept.keep(said, result())
    assert len(said.lines) == 1 and "best.safetensors" in said.lines[0] and "No such file" in said.lines[0]
    assert kept.put_back(said, result()) and contents() == marked(b"1")


def test_a_damaged_one_is_never_put_back(said: Any) -> None:
    write()
    kept.keep(said, result())
    (OUT / "best.safetensors").write_bytes(b"written")  # in place, which no command does
    delete()
    assert not kept.put_back(said, result()) and contents() == {}
    assert len(said.lines) == 1 and "best.safetensors: not what was kept" in said.lines[0]


@pytest.mark.parametrize(
    "change",
    [
        {"folder": "../../../../smoke"},
        {"files": [{"path": "../../outside", "size": 1, "sha256": ""}]},
        {"files": []},
        {"files": None},
        {"files": [{"path": "students/titn/metrics.json"}]},
        {"amounts": {"views": "3"}},
        {"earlier": []},
        {"format": 2},
        {"more": 1},
    ],
)
def test_a_json_that_keep_does_not_write_keeps_nothing(said: Any, change: dict[str, Any]) -> None:
    write()
    kept.keep(said, result())
    JSON.write_text(json.dumps({**json.loads(JSON.read_text()), **change}))
    assert kept.find(result()) is None and kept.mend(said, result(), "gone") == "gone"
    kept.keep(said, result())
    assert kept.holds(result())


def test_an_older_result_in_place_of_a_newer_one_is_called_so(said: Any) -> None:
    write(b"1")
    kept.keep(said, result())
    write(b"2")
    kept.keep(said, result())
    assert kept.mend(said, result(), None) is None and said.lines == []
    write(b"1")
    assert kept.mend(said, result(), None) is None
    assert "a newer result, of 20" in said.lines[0] and f"rm -r {OUT}, and this command again" in said.lines[0]
    assert len(said.lines) == 1 and contents() == marked(b"1")
    write(b"unknown")  # pulled from elsewhere, it may be newer
    kept.mend(said, result(), None)
    assert len(said.lines) == 1
    delete()
    assert kept.mend(said, result(), "not trained") is None and contents() == marked(b"2")


def test_what_is_kept_is_counted_and_removed(said: Any) -> None:
    def clean(*arguments: str) -> str:
        return CliRunner().invoke(cli, ["clean", *arguments], catch_exceptions=False).output

    assert "0 kept results of 0 bytes: nothing to free" in clean()
    write()
    kept.keep(said, result())
    assert kept.space() == kept.Space(1, 12, 0)
    (OUT / "best.safetensors").unlink()
    assert kept.space("smoke") == kept.Space(1, 12, 7) and kept.space("digits") == kept.Space(0, 0, 0)
    assert "1 kept result of 12 bytes; `pipeline clean --kept` frees 7 bytes of it" in clean()
    assert "nothing to free" in clean("--recipe", "digits") and JSON.exists()
    assert "1 kept result of 12 bytes removed; 7 bytes are free now" in clean("--recipe", "smoke", "--kept")
    assert kept.space() == kept.Space(0, 0, 0) and set(contents()) == {"run.json", "metrics.json"}


def test_the_digest_is_of_the_code_that_dvc_looks_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "code"
    (package / "pipeline/data/__pycache__").mkdir(parents=True)
    project = package / "stages/project"
    project.mkdir(parents=True)
    (project / "stages.yaml").write_text("stages: {prepare: {cmd: x, deps: [pipeline/data, stages/a.py, data/raw]}}")
    for name in ("pipeline/data/a.py", "pipeline/data/table.csv", "pipeline/other.py", "stages/a.py"):
        (package / name).write_text("1")
    monkeypatch.setattr(dvc_file, "_CODE", package)
    monkeypatch.setattr(dvc_file, "STAGES", project / "stages.yaml")

    def digest() -> str:
        for cached in (dvc_file.code_digest, dvc_file._own_definitions, dvc_file._digests):
            cached.cache_clear()
        return dvc_file.code_digest("prepare")

    try:
        former = digest()
        (package / "pipeline/other.py").write_text("2")
        (package / "pipeline/data/__pycache__/a.pyc").write_text("2")
        assert digest() == former
        for name in ("pipeline/data/a.py", "pipeline/data/table.csv", "stages/a.py"):
            (package / name).write_text("2")
            assert digest() != former
            former = digest()
        (package / "pipeline/data/b.py").write_text("")
        assert digest() != former
        (project / "stages.yaml").unlink()  # then all of the code counts
        former = digest()
        (package / "pipeline/other.py").write_text("3")
        assert digest() != former
    finally:
        for cached in (dvc_file.code_digest, dvc_file._own_definitions, dvc_file._digests):
            cached.cache_clear()
