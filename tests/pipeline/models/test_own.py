"""Models that a user's own Python file builds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.errors import UsageError
from pipeline.models.own import code_sha256, is_own, load_function

FILE = """
import dataclasses
from torch import nn
from beside import WIDTH

@dataclasses.dataclass
class Settings:
    width: int = WIDTH

def build(num_classes):
    print("building")
    return nn.Linear(Settings().width, num_classes)

def number(num_classes):
    return num_classes

def broken(num_classes):
    raise ValueError("no weights\\nhere")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "beside.py").write_text("WIDTH = 7\n")
    return tmp_path


def test_names_of_own_code_are_told_from_others() -> None:
    own = ["mine.py:build", "a/b c.py:_f1", "/x/y.py:f", "C:\\x.py:f"]
    assert all(is_own(name) for name in own)
    others = [
        "resnet50",
        "torchvision/resnet50",
        "timm/vit.py",
        "mine.py",
        "mine.py:",
        ".py:f",
        "mine.py:a.b",
        "mine.pyc:f",
    ]
    assert not any(is_own(name) for name in others)


def test_a_function_of_the_users_file_builds_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_function("mine.py:build")(num_classes=3)
    assert isinstance(model, nn.Linear) and model(torch.zeros(1, 7)).shape == (1, 3)
    assert capsys.readouterr() == ("", "building\n")  # stdout belongs to the command
    assert code_sha256("mine.py:build") == hashlib.sha256(FILE.encode()).hexdigest()
    assert code_sha256("resnet50") is None


def test_a_changed_file_is_read_anew(folder: Path) -> None:
    load_function("mine.py:build")
    (folder / "mine.py").write_text(FILE.replace("Settings().width", "2 * Settings().width"))
    assert load_function("mine.py:build")(2).in_features == 14


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("none.py:build", "there is no file none.py in"),
        ("mine.py:missing", "mine.py has no function 'missing'; it has Settings, build, number, broken"),
        ("mine.py:number", r"number\(...\) returns int, not a torch.nn.Module"),
        ("mine.py:broken", r"broken\(...\) fails: ValueError: no weights\\nhere"),
        ("wrong.py:f", "wrong.py fails: SyntaxError"),
        ("exits.py:f", "exits.py fails: SystemExit: 3"),
    ],
)
def test_what_the_users_file_does_wrong_is_one_line(folder: Path, model: str, message: str) -> None:
    (folder / "wrong.py").write_text("def f(:\n")
    (folder / "exits.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(UsageError, match=message):
        load_function(model)(num_classes=4)
