"""Labels that something else has computed: numpy's files, checked as if a teacher had given them."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.labels.given import GivenLabels

NUM_SAMPLES, NUM_CLASSES = 6, 4
ROWS = np.random.default_rng(0).integers(0, NUM_CLASSES, (3, NUM_SAMPLES))


def read(path: Path) -> GivenLabels:
    sizes = {"num_samples": NUM_SAMPLES, "num_classes": NUM_CLASSES, "max_views": 100}
    return GivenLabels.read(path, num_clean={"val": 2, "test": 3}, **sizes)


def ranked() -> tuple[NDArray[Any], NDArray[Any]]:
    """Classes and probabilities of the two most probable, `(3, N, 2)`."""
    classes = np.stack([ROWS, (ROWS + 1) % NUM_CLASSES], axis=2)
    return classes, np.broadcast_to(np.array([0.7, 0.1]), classes.shape)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4"])
def test_a_npy_file_holds_a_row_for_each_view(tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "labels.npy"
    np.save(file, np.asfortranarray(ROWS.astype(dtype)))
    given = read(file)
    assert (given.num_views, given.topk, dict(given.clean)) == (3, 0, {})
    assert np.array_equal(given.view(1).labels, ROWS[1])
    assert given.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert given.provenance["given"] is True and given.provenance["checkpoint_sha256"] == given.sha256


def test_a_npz_file_holds_probabilities_and_labels_of_clean_images(tmp_path: Path) -> None:
    classes, probabilities = ranked()
    plain = npz(tmp_path / "a.npz", classes=classes, probabilities=probabilities, clean_test=np.array([3, 0, 1]))
    given = read(plain)
    assert given.topk == 2 and given.provenance["topk"] == 2
    assert np.array_equal(given.view(2).labels, ROWS[2]) and given.view(2).classes is not None
    assert np.array_equal(given.view(2).classes, classes[2])
    assert given.view(0).probabilities is not None and given.view(0).probabilities.dtype == np.float16
    assert np.allclose(given.view(0).probabilities, [0.7, 0.1], rtol=2**-11)
    assert given.clean.keys() == {"test"} and given.clean["test"].tolist() == [3, 0, 1]
    np.savez_compressed(tmp_path / "b.npz", labels=ROWS, clean_val=np.array([0, 1], np.uint8))
    assert np.array_equal(read(tmp_path / "b.npz").labels, ROWS)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too few samples": ({"labels": ROWS[:, :5]}, r"shape \(3, 5\), expected \(V, 6\)"),
    "no view": ({"labels": ROWS[:0]}, r"shape \(0, 6\)"),
    "too many views": ({"labels": np.repeat(ROWS, 40, axis=0)}, "with V up to 100"),
    "one row": ({"labels": ROWS[0]}, r"shape \(6,\)"),
    "floats": ({"labels": ROWS.astype(float)}, "view 0: labels must be a row of integers"),
    "booleans": ({"labels": ROWS > 1}, "labels claims bool"),
    "text": ({"labels": ROWS.astype(str)}, "labels claims <U"),
    "no class": ({"labels": ROWS + 1}, "view 0: label 4 of sample . is outside of the 4 classes"),
    "negative": ({"labels": ROWS - 1}, "label -1"),
    "nothing": ({"clean_val": np.array([0, 1])}, "neither labels nor classes"),
    "half of top-k": ({"classes": ranked()[0]}, "one of classes and probabilities"),
    "other shapes": ({"classes": ranked()[0], "probabilities": ranked()[1][..., :1]}, r"one \(V, N, K\)"),
    "flat top-k": ({"classes": ROWS, "probabilities": ROWS.astype(float)}, r"one \(V, N, K\)"),
    "no top-k": ({"classes": ranked()[0][..., :0], "probabilities": ranked()[1][..., :0]}, r"one \(V, N, K\)"),
    "whole probabilities": ({"classes": ranked()[0], "probabilities": ranked()[0]}, "expected floats"),
    "above 1": ({"classes": ranked()[0], "probabilities": ranked()[1] * 9}, "view 0: sample 0: its probabilities"),
    "huge": ({"classes": ranked()[0], "probabilities": ranked()[1] * 1e9}, "sample 0: its probabilities"),
    "not a number": ({"classes": ranked()[0], "probabilities": ranked()[1] * np.nan}, "sample 0: its probabilities"),
    "ascending": ({"classes": ranked()[0], "probabilities": ranked()[1][..., ::-1]}, "do not descend"),
    "twice": ({"classes": ranked()[0][..., [0, 0]], "probabilities": ranked()[1]}, "one class twice"),
    "another label": (
        {"labels": (ROWS + 1) % 4, "classes": ranked()[0], "probabilities": ranked()[1]}, "first class is not its label"
    ),
    "an unknown array": ({"labels": ROWS, "extra": ROWS}, "holds 'extra'; known are labels, classes"),
    "an unknown split": ({"labels": ROWS, "clean_train": ROWS[0]}, "holds 'clean_train'"),
    "a short split": ({"labels": ROWS, "clean_val": np.array([0])}, r"clean_val is of shape \(1,\), expected \(2,\)"),
    "a split of no classes": ({"labels": ROWS, "clean_val": np.array([0, 4])}, "clean_val: label 4"),
}  # fmt: skip


@pytest.mark.parametrize(("arrays", "words"), WRONG.values(), ids=WRONG)
def test_what_no_teacher_can_have_answered_is_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read(npz(tmp_path / "given.npz", **arrays))
    assert str(tmp_path / "given.npz") in str(caught.value) and "\n" not in str(caught.value)


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    """The beginning of a .npy file."""
    text = io.BytesIO()
    np.lib.format.write_array_header_1_0(text, {"descr": dtype, "fortran_order": False, "shape": shape})
    return text.getvalue()


def archive(**members: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return data.getvalue()


def pickled() -> bytes:
    """A .npy file of objects, which numpy would unpickle."""
    file = io.BytesIO()
    np.save(file, np.array([print, None], object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.npy", b""),
        ("text.npy", b"0,1,2\n"),
        ("claims.npy", header((2**40, NUM_SAMPLES)) + bytes(NUM_SAMPLES)),
        ("negative.npy", header((-1, -NUM_SAMPLES)) + bytes(NUM_SAMPLES)),
        ("longer.npy", header((1, NUM_SAMPLES)) + bytes(NUM_SAMPLES + 1)),
        ("objects.npy", pickled()),
        ("objects.npz", archive(labels=pickled())),
        ("pickle.npy", pickle.dumps(ROWS)),
        ("claims.npz", archive(labels=header((2**40, NUM_SAMPLES)))),
        ("outside.npz", archive(**{"../labels": header((1, 6)) + bytes(6)})),
        ("no-archive.npz", header((1, NUM_SAMPLES)) + bytes(NUM_SAMPLES)),
        ("labels.csv", b"0,1\n"),
    ],
)
def test_a_hostile_file_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"no labels of these data \(.*\)") as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    row, data = header((1, NUM_SAMPLES)) + bytes(NUM_SAMPLES), io.BytesIO()
    with zipfile.ZipFile(data, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            file.writestr("labels.npy", row)
    (tmp_path / "twice.npz").write_bytes(data.getvalue())
    with pytest.raises(DataError, match="twice"):
        read(tmp_path / "twice.npz")
