"""The compiled inner block's library at rest: damaged, planted or open to others, it is compiled again or refused."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.models.students.fused import inner as inner_cpp
from pipeline.system import compiling

GEOMETRY = (16, 12, 2, 48)


class Cache:
    """A cache of libraries, and a compiler that takes no time: it copies one that has been compiled."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if (why_not := inner_cpp.why_not(*GEOMETRY)) is not None:
            pytest.skip(why_not)
        source = inner_cpp._library(*GEOMETRY)._name
        self.whole = Path(source).read_bytes()
        self.calls, compiler = directory / "calls", directory / "compiler"
        copy = f'for last; do :; done\necho "$last" >> {self.calls}\ncp {source} "$last"\n'
        compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{copy}')
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        monkeypatch.setattr(inner_cpp, "_library", inner_cpp._library.__wrapped__)
        self.folder = directory / "cache" / "titn-pipeline"
        self.loaded: list[bytes] = []

        def load(path: str) -> ctypes.CDLL:
            self.loaded.append(Path(path).read_bytes())
            return library

        library = ctypes.CDLL(source)
        monkeypatch.setattr(ctypes, "CDLL", load)

    @property
    def library(self) -> Path:
        [path] = self.folder.glob("*.so")
        return path

    @property
    def seal(self) -> Path:
        return self.library.with_name(f"{self.library.name}.sha256")

    @property
    def num_compiled(self) -> int:
        return len(self.calls.read_text().splitlines())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    return Cache(tmp_path, monkeypatch)


def test_a_library_has_its_digest_beside_it_and_is_compiled_once(cache: Cache) -> None:
    assert [inner_cpp.why_not(*GEOMETRY) for _ in range(3)] == [None] * 3
    assert cache.num_compiled == 1
    assert cache.library.read_bytes() == cache.whole
    assert cache.seal.read_text() == f"{hashlib.sha256(cache.whole).hexdigest()}  {cache.library.name}\n"
    assert sorted(cache.folder.iterdir()) == sorted([cache.library, cache.seal]), "nothing is left behind"


def flipped(byte: int, bit: int) -> Callable[[bytes], bytes]:
    def flip(whole: bytes) -> bytes:
        return whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :]

    return flip


def test_a_damaged_library_is_never_loaded_but_compiled_again(cache: Cache) -> None:
    assert inner_cpp.why_not(*GEOMETRY) is None
    size, library = len(cache.whole), cache.library
    damages: list[Callable[[bytes], bytes]] = [
        lambda whole: b"",
        lambda whole: whole[: size // 2],
        lambda _: b"\x7fELF",
    ]
    damages += [lambda whole: whole + b"\0", *(flipped(size * part // 30, part % 8) for part in range(30))]
    for count, damage in enumerate(damages, start=2):
        content = damage(library.read_bytes())
        library.unlink()  # a library that is written to in place would kill the process that has loaded it
        library.write_bytes(content)
        assert inner_cpp.why_not(*GEOMETRY) is None
        assert cache.num_compiled == count
    assert set(cache.loaded) == {cache.whole}


def test_a_library_without_its_own_digest_is_compiled_again(cache: Cache) -> None:
    assert inner_cpp.why_not(*GEOMETRY) is None
    right = cache.seal.read_text()
    for count, text in enumerate(["", right[:40], right.upper(), right.replace("inner", "outer")], start=2):
        cache.seal.write_text(text)
        assert inner_cpp.why_not(*GEOMETRY) is None
        assert cache.num_compiled == count
    cache.seal.unlink()  # as those of before have none
    assert inner_cpp.why_not(*GEOMETRY) is None
    assert (cache.num_compiled, cache.seal.read_text()) == (6, right)


def test_what_others_could_have_written_is_not_loaded(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o002)
    try:
        assert inner_cpp.why_not(*GEOMETRY) is None
    finally:
        os.umask(before)
    for path in (cache.folder, cache.library):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    cache.library.chmod(0o664)
    assert inner_cpp.why_not(*GEOMETRY) is None and cache.num_compiled == 2
    cache.folder.chmod(0o777)
    assert inner_cpp.why_not(*GEOMETRY) is None
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o755
    # Another user's file, then another user's folder.
    foreign = {cache.library.stat().st_ino}
    monkeypatch.setattr(compiling, "_is_ours", lambda found: found.st_ino not in foreign)
    assert inner_cpp.why_not(*GEOMETRY) is None and cache.num_compiled == 3
    foreign.add(cache.folder.stat().st_ino)
    advice = f"others can write {cache.folder}; set XDG_CACHE_HOME to a folder that only you can write"
    assert inner_cpp.why_not(*GEOMETRY) == advice


@pytest.mark.parametrize(("user", "owner", "is_ours"), [(7, 7, True), (7, 0, True), (7, 8, False), (0, 7, False)])
def test_a_file_is_ours_or_roots(user: int, owner: int, is_ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert compiling._is_ours(os.stat_result((0o100644, 1, 1, 1, owner, owner, 1, 0, 0, 0))) is is_ours


def test_a_full_disk_leaves_no_library_and_is_told(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        why_not = inner_cpp.why_not(*GEOMETRY)
    assert why_not is not None and "No space left on device" in why_not and str(cache.folder) in why_not
    assert not list(cache.folder.iterdir()) and not cache.loaded
    assert inner_cpp.why_not(*GEOMETRY) is None


def test_nothing_is_compiled_on_windows(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fchmod")
    assert inner_cpp.why_not(*GEOMETRY) == "nothing is compiled on Windows" and not cache.calls.exists()
