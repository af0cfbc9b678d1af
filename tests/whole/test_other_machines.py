"""Machines that are not like ours: no home directory, no POSIX, a terminal or a locale of few letters."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console

from pipeline.data.images import BadFile
from pipeline.errors import StorageError, UsageError
from pipeline.models.students import build_student
from pipeline.models.students.fused import inner
from pipeline.models.teachers import build_teacher
from pipeline.models.weights import download
from pipeline.system import compiling, home
from pipeline.training.checkpoints import save_checkpoint
from stages import cli
from stages.doctor import software
from stages.predict import predict
from tests.support.project import ROOT, environment

# What Python lacks on Windows, as far as pipeline/ and stages/ might use it.
WINDOWS = """
import os, signal, subprocess, sys
import click, h5py, numpy, PIL.Image, rich.console, safetensors.torch, torch, einops
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("O_DIRECTORY", "O_NOFOLLOW", "fork", "getloadavg", "getuid", "geteuid", "pread", "preadv", "pwrite",
             "pwritev", "register_at_fork", "sched_getaffinity", "statvfs", "sysconf", "uname", "posix_fadvise"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGALRM", "pthread_sigmask"):
    delattr(signal, name)
import pipeline
from stages.cli import run
folder, image = sys.argv[1:]
model, transform = pipeline.load(folder)
assert model(transform(image)[None]).shape == (1, 2)
assert run(["predict", folder, image]) == 0
assert run(["bench", folder, "--batch-sizes", "1", "--rounds", "1"]) == 0
assert run(["export", folder, "--data", os.path.dirname(image), "--format", "safetensors", "--out", "out"]) == 0
assert pipeline.load("out")[0].class_names == ("café", "猫")
assert run(["prepare"]) == 4
"""


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME", *home.LIBRARY_CACHES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_directory_what_is_kept_there_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_compiler", lambda: ("c++",))
    monkeypatch.setattr(compiling, "_version", lambda compiler: "")
    assert inner.why_not(5, 6, 3, 7) == "no home directory to keep the compiled library in; " + home.WAY_OUT
    with pytest.raises(UsageError, match="teacher vgg16: no home directory .* set HOME .*, or TORCH_HOME"):
        build_teacher("vgg16", num_classes=2, weights="imagenet")
    assert "there is no home directory" in software._home()[0].text
    assert list(Path().iterdir()) == []  # no folder `~`
    for name in home.LIBRARY_CACHES:  # which libraries set themselves when they are imported
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_HOME", "kept")
    home.lend_caches()
    lent = {os.environ[name] for name in home.LIBRARY_CACHES}
    assert os.environ["TRITON_HOME"] == "kept" and len(lent) == 2 and all(map(os.path.isabs, lent - {"kept"}))


def test_a_home_directory_that_cannot_be_written_to_is_none_for_libraries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert home.can_keep()
    assert software._home() == []
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert not home.can_keep()
    assert f"{tmp_path / 'cache'} cannot be written to" in software._home()[0].text


def unsearchable(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Refuse to look into a folder, as for a user who may not: these tests may run as root, who may."""
    real = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        if folder in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)


def test_a_home_directory_that_cannot_be_searched_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert home.can_keep()
    unsearchable(monkeypatch, tmp_path / "home")
    assert not home.can_keep()
    cli._settle()

    def refuse(**options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "home/.cache"))

    with pytest.raises(StorageError, match=r"no weights from url \(.*\.cache'\); `weights: none` trains"):
        download("vgg16", SimpleNamespace(url="url", get_state_dict=refuse), tmp_path / "home/.cache/vgg16.pth")


def test_a_working_directory_that_is_gone_is_no_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert not home.can_keep()
    cli._settle()


def test_what_the_system_refuses_before_a_command_begins_is_one_line_with_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/root")

    monkeypatch.setattr(cli, "_settle", refuse)
    monkeypatch.setattr(cli, "STOP", SimpleNamespace(install=lambda **_: None, end=lambda: None))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, capsys.readouterr().err) == (4, "Error: /root: Permission denied\n")


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", rb"\xb1 \xe9 \u732b"), ("cp1252", b"\xb1 \xe9 \\u732b")])
def test_what_a_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch, encoding: str, shown: bytes) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    cli.Output.replace_streams(())
    print("± é 猫")
    Console().print("± é 猫", markup=False)
    sys.stdout.flush()
    assert raw.getvalue() == (shown + b"\n") * 2


def test_a_folder_is_the_same_data_set_in_a_locale_without_utf_8(tmp_path: Path) -> None:
    for name in ("café/ü.png", "猫/1.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        (tmp_path / "images" / name).write_bytes(b"")
    (tmp_path / "list.csv").write_text("path,label\nimages/café/ü.png,café\nimages/猫/1.png,猫\n", encoding="utf-8")
    program = (
        "import sys; from pathlib import Path; from pipeline.data.digests import digest_listing\n"
        "from pipeline.data.listing import list_source\n"
        "for name in sys.argv[1:]:\n"
        "    listing = list_source(Path(name)); digest, seen = digest_listing(listing, {})\n"
        "    print(ascii((listing.class_names, list(seen), digest)))"
    )

    def listed(**locale: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "images"), str(tmp_path / "list.csv")],
            env=environment(**locale), capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    expected = listed(LC_ALL="C.UTF-8", PYTHONUTF8="1")
    assert r"('caf\xe9', '\u732b'), ['caf\xe9/\xfc.png'" in expected
    assert listed(LC_ALL="C", PYTHONUTF8="0") == expected


def test_models_are_loaded_asked_and_exported_without_posix(tmp_path: Path) -> None:
    arguments = {"num_classes": 2, "image_size": 32, "depth": 1, "width": 48}
    torch.manual_seed(0)
    student = build_student("vit", **arguments)
    meta = {
        "kind": "student", "model": "vit", "arguments": arguments, "class_names": ["café", "猫"], "image_size": 32,
        "mean": [0.5] * 3, "std": [0.25] * 3, "training": {"precision": "fp32"}, "recipe": "digits",
        "dataset_sha256": "0" * 64,
    }  # fmt: skip
    save_checkpoint(tmp_path / "model", "best", student.state_dict(), meta)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "images/1.png")
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS, "model", str(tmp_path / "images/1.png")],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "this system has no flock" in done.stderr
    assert "猫" in done.stdout


def test_an_image_of_too_many_pixels_is_one_line_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "bomb.ppm"
    file.write_bytes(b"P6 10000 10000 255\n")  # Pillow warns of it
    (bad,) = predict(
        SimpleNamespace(image_size=4, batch_size=8, resize="squeeze"),
        [str(file)],
        topk=1,
        left_out=Counter(),
        notes=Counter(),
    )
    assert bad == BadFile(str(file), "10000 x 10000 pixels, more than 64000000")


def test_a_clone_says_whose_code_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    cli._settle()
    assert (capsys.readouterr().err, software._code().mark) == ("", software.OK)
    assert str(ROOT) in software._code().text
    for file in ("pipeline/__init__.py", "stages/cli.py"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    cli._settle()
    line = f"the code in {ROOT} runs, not that in {tmp_path}; `pip install -e .` installs this one"
    assert capsys.readouterr().err.startswith(line)
    assert software._code().mark == software.WARNING and software._code().line.startswith(line)
