"""A directory's files are replaced together, and its manifest tells damage and mixtures to whoever reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pipeline.errors import DataError, StorageError, UsageError
from pipeline.system.storage import remove_leftovers
from pipeline.training.manifest import (
    MANIFEST,
    adopt,
    check_all,
    finish_replacing,
    read_checked,
    read_manifest,
    refuse_writing,
    write_with_manifest,
)
from tests.support.killing import full_at_each_call, killed_at_each_call

OLD = {"best.safetensors": b"old weights", "curve.csv": b"old", "metrics.json": b'{"of": "old"}'}
NEW = {"best.safetensors": b"new weights!", "curve.csv": b"new", "metrics.json": b'{"of": "new"}'}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def test_the_manifest_names_each_files_sha256(tmp_path: Path) -> None:
    write_with_manifest(tmp_path, OLD, "f" * 64)
    assert contents(tmp_path) == OLD
    stored = json.loads((tmp_path / MANIFEST).read_text())
    assert stored["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in OLD.items()}
    assert stored["fingerprint"] == "f" * 64
    check_all(tmp_path)


def test_a_sha256_that_is_known_is_not_computed_again(tmp_path: Path) -> None:
    write_with_manifest(tmp_path, OLD, digests={"curve.csv": "0" * 64})
    assert json.loads((tmp_path / MANIFEST).read_text())["files"]["curve.csv"] == "0" * 64
    with pytest.raises(DataError, match=r"curve\.csv: not what"):
        check_all(tmp_path)


def test_killed_at_any_moment_old_or_new_is_whole_and_a_mixture_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_with_manifest(tmp_path, OLD, "old")
    seen: set[str] = set()

    def check() -> None:
        visible = {name: data for name, data in contents(tmp_path).items() if not name.startswith(".")}
        if visible not in (OLD, NEW):
            seen.add("mixed")
            with pytest.raises(DataError, match=r"not what manifest\.json says: its directory is being replaced"):
                check_all(tmp_path)
        finish_replacing(tmp_path)
        for name in (*OLD, MANIFEST):
            remove_leftovers(tmp_path / name)
        check_all(tmp_path)
        manifest = read_manifest(tmp_path)
        assert manifest is not None and contents(tmp_path) == {"old": OLD, "new": NEW}[str(manifest.fingerprint)]
        seen.add(str(manifest.fingerprint))
        write_with_manifest(tmp_path, OLD, "old")

    assert killed_at_each_call(monkeypatch, lambda: write_with_manifest(tmp_path, NEW, "new"), check) > 15
    assert seen == {"old", "new", "mixed"}


def test_a_full_disk_leaves_the_old_ones_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_with_manifest(tmp_path, OLD, "old")
    untouched, done = [], []

    def check() -> None:
        (untouched if contents(tmp_path) == OLD else done).append(len(untouched))
        finish_replacing(tmp_path)  # where only a flush of the folder failed, after the renames
        check_all(tmp_path)
        assert contents(tmp_path) in (OLD, NEW)
        write_with_manifest(tmp_path, OLD, "old")

    full_at_each_call(monkeypatch, lambda: write_with_manifest(tmp_path, NEW, "new"), check, StorageError)
    assert len(untouched) == 3 * 4, "open, write and flush each of four files"
    assert len(done) == 4, "open and flush the folder, twice"


@pytest.mark.parametrize("damage", [b"", b"new weights", b"new weightz!"], ids=["emptied", "cut", "flipped"])
def test_a_damaged_file_is_told_with_the_ways_out_the_cheapest_first(tmp_path: Path, damage: bytes) -> None:
    write_with_manifest(tmp_path, NEW)
    for name in ("best.safetensors", "metrics.json"):
        file = tmp_path / name
        file.write_bytes(damage)
        for look in (lambda file=file: read_checked(file), lambda: check_all(tmp_path)):
            with pytest.raises(DataError) as caught:
                look()
            ways = [
                f"`dvc checkout {file}`",
                "a kept copy",
                *(["evaluate"] if name == "metrics.json" else []),
                "--fresh",
            ]
            at = [str(caught.value).index(way) for way in ways]
            assert str(caught.value).startswith(f"{file}: not what") and at == sorted(at)
            assert ("evaluate" in str(caught.value)) == (name == "metrics.json")
        file.write_bytes(NEW[name])
    assert read_checked(tmp_path / "curve.csv") == b"new", "the others are read"


def test_a_damaged_manifest_is_told_and_a_directory_without_one_is_read(tmp_path: Path) -> None:
    write_with_manifest(tmp_path, NEW)
    manifest = tmp_path / MANIFEST
    whole = manifest.read_bytes()
    digest = hashlib.sha256(b"new").hexdigest().encode()
    for damaged in (b"", whole[:-30], whole.replace(digest, b"0" * 64), b"[]", b'{"files": {}}'):
        manifest.write_bytes(damaged)
        with pytest.raises(DataError, match=r"manifest\.json: damaged.*deleted, it checks nothing"):
            read_checked(tmp_path / "curve.csv")
    manifest.unlink()
    (tmp_path / "curve.csv").write_bytes(b"changed")
    assert read_checked(tmp_path / "curve.csv") == b"changed"
    adopt(tmp_path, ("curve.csv", "none.csv"), "f")
    (tmp_path / "curve.csv").write_bytes(b"changed again")
    with pytest.raises(DataError, match=r"curve\.csv: not what"):
        read_checked(tmp_path / "curve.csv")


def test_a_users_file_does_not_replace_a_runs_own(tmp_path: Path) -> None:
    refuse_writing(tmp_path / "curve.csv")
    write_with_manifest(tmp_path, NEW)
    refuse_writing(tmp_path / "rows.csv")
    for name in ("curve.csv", MANIFEST):
        with pytest.raises(UsageError, match="name another"):
            refuse_writing(tmp_path / name)
