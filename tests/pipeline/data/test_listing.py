"""What a folder or a CSV file lists: every layout, every name of a split, and what is not used."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.recipes import DatasetRecipe, LabelRecipe, Recipe, SelectRecipe
from pipeline.data.datasets import Dataset
from pipeline.data.listing import Listing, list_source
from pipeline.data.sources import read_source
from pipeline.errors import DataError, UsageError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(listing: Listing) -> dict[str, dict[str, list[str]]]:
    """The listing's paths relative to its root."""
    return {
        split: {name: [os.fspath(path.relative_to(listing.root)) for path in paths] for name, paths in classes.items()}
        for split, classes in listing.splits.items()
    }


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", "VALIDATION"])
@pytest.mark.parametrize("train", ["train", "Train"])
def test_splits_are_known_by_all_their_names(tmp_path: Path, train: str, val: str) -> None:
    touch(tmp_path, f"{train}/a/1.png", f"{train}/b/1.png", f"{val}/b/2.JPG", "tEst/a/3.tiff")
    assert listed(list_source(tmp_path)) == {
        "train": {"a": [f"{train}/a/1.png"], "b": [f"{train}/b/1.png"]},
        "val": {"b": [f"{val}/b/2.JPG"]},
        "test": {"a": ["tEst/a/3.tiff"]},
    }


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "val/a/1.png", "valid/a/1.png")
    with pytest.raises(DataError, match="val and valid are both the split val; keep one"):
        list_source(tmp_path)


def test_a_flat_folder_is_all_training_images(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.png", "a/2.png", "a/10.png", "readme.md", ".git/x", "c/.keep", "loose.png")
    listing = list_source(tmp_path)
    assert listed(listing) == {"train": {"a": ["a/10.png", "a/2.png"], "b": ["b/1.png"]}}
    assert [file.path for file in listing.bad] == ["loose.png"]
    assert listing.left_out.names == {
        ".md file": ["readme.md"], "hidden file": [".git", "c/.keep"], "empty class folder": ["c"],
    }  # fmt: skip


def test_a_class_may_be_called_train_which_is_said(tmp_path: Path) -> None:
    touch(tmp_path, "bus/1.png", "train/2.png")
    listing = list_source(tmp_path)
    assert listing.class_names == ("bus", "train")
    assert listing.notes == ["train: taken for a class, as for the folders beside it"]


@pytest.mark.parametrize("names", [(), ("a/deep/1.png",), ("train",), ("1.png",)])
def test_a_folder_without_classes_says_where_images_go(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(
        DataError, match="no folder `train` in it; images go in train/<class>/<image>, or all in <class>"
    ):
        list_source(touch(tmp_path, *names))


def test_splits_without_train_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder `train` in it beside test and val"):
        list_source(touch(tmp_path, "test/a/1.png", "val/a/1.png"))


def test_what_is_not_used_is_counted_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "train/b/1.png", "train/a/x.json", "train/b/y.JSON", "train/c/.hidden")
    touch(tmp_path, "extra/a/1.png", "list.csv", "train/@eaDir/a.png", "train/a/@eaDir/1.png", "train/b/Thumbs.db")
    touch(tmp_path, ".git/config", "train/notes.txt", "__MACOSX/x.png")
    listing = list_source(tmp_path)
    assert listing.bad == [] and listing.class_names == ("a", "b")
    assert listing.left_out.as_json() == [
        {"kind": ".csv file", "count": 1, "names": ["list.csv"]},
        {"kind": ".json file", "count": 2, "names": ["train/a/x.json", "train/b/y.JSON"]},
        {"kind": ".txt file", "count": 1, "names": ["train/notes.txt"]},
        {"kind": "empty class folder", "count": 1, "names": ["train/c"]},
        {"kind": "hidden file", "count": 2, "names": [".git", "train/c/.hidden"]},
        {"kind": "other folder", "count": 1, "names": ["extra"]},
        {"kind": "system file", "count": 4, "names": ["__MACOSX", "train/@eaDir", "train/a/@eaDir"]},
    ]


NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(("name", "other"), [(NFC, NFD), (NFD, NFC)])
def test_a_class_is_one_class_in_both_unicode_forms_and_keeps_the_name_of_train(
    tmp_path: Path, name: str, other: str
) -> None:
    touch(tmp_path, f"train/{name}/1.png", "train/dog/1.png", f"val/{other}/2.png", f"test/{other}/3.png")
    listing = list_source(tmp_path)
    assert listing.class_names == (name, "dog")
    assert listed(listing)["test"] == {name: [f"test/{other}/3.png"]}
    touch(tmp_path, f"train/{other}/1.png")
    with pytest.raises(DataError, match=r"train: the classes .* are one name in two Unicode forms") as caught:
        list_source(tmp_path)
    assert r"'caf\xe9'" in str(caught.value) and r"'cafe\u0301'" in str(caught.value)


# --- CSV files -------------------------------------------------------------------------------------------


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("comma", [",", ";", "\t"])
def test_a_csv_file_lists_images_by_split_and_class(tmp_path: Path, comma: str, encoding: str) -> None:
    lines = ["Label,path,Split,camera", "b,x/2.png,Train,1", "a,x/10.png,train,2", "a,x/1.png,train,", "",
             f"b,{tmp_path}/y.gif,validation,", "a,../z.png,TEST,"]  # fmt: skip
    source = write(tmp_path / "list.csv", "\r\n".join(lines).replace(",", comma), encoding)
    listing = list_source(source)
    assert listing.class_names == ("a", "b") and listing.root == tmp_path
    assert listed(listing) == {
        "train": {"a": ["x/1.png", "x/10.png"], "b": ["x/2.png"]},
        "val": {"b": ["y.gif"]},
        "test": {"a": ["../z.png"]},
    }
    assert listing.left_out.names == {"column": ["camera"]}


def test_without_a_split_all_images_of_a_csv_file_are_training_images(tmp_path: Path) -> None:
    source = write(tmp_path / "list.csv", 'path,label\n"a, b.png",one\nc.png,two\n')
    assert listed(list_source(source)) == {"train": {"one": ["a, b.png"], "two": ["c.png"]}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: the columns are none; path and label are needed"),
        ("file,label\nx,y\n", "line 1: the columns are file, label; path and label are needed"),
        ("path,label,label\n", "line 1: the columns are path, label, label"),
        ("path,label\nx.png\n", "line 2: not a path and a label for each column"),
        ("path,label\nx.png,a,b\n", "line 2: not a path and a label for each column"),
        ("path,label\nx.png,a\ny.png, \n", "line 3: not a path and a label"),
        ("path,label\n\0,a\n", "line 2: not a path and a label"),
        ("path,label,split\nx.png,a,train\ny.png,a,dev\n", "line 3: split 'dev'; write train, val or test"),
        ("path,label,split\nx.png,a,test\n", "no training image in it; each line is path,label"),
        ("path,label,split\nx.png,a,train\nx.png,b,test\n", "test/b: a class that `train` does not have"),
        (f"path,label\nx.png,{NFC}\ny.png,{NFD}\n", "one name in two Unicode forms"),
        (
            f"path,label,split\nx.png,{NFC},train\ny.png,{NFC},test\nz.png,{NFD},test\n",
            "list.csv: test: the classes .* are one name in two Unicode forms .*; merge them",
        ),
        ('path,label\n"x.png,a\n', "line 2: not a CSV file"),
    ],
)
def test_a_csv_file_that_is_no_list_is_refused_by_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        list_source(write(tmp_path / "list.csv", text))


def test_what_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK\xff\xfe")
    with pytest.raises(DataError, match="not a CSV file in UTF-8"):
        list_source(tmp_path / "images.zip")
    with pytest.raises(UsageError, match=r"--from .*nowhere.csv: no such folder or file"):
        list_source(tmp_path / "nowhere.csv")


def read(source: Path) -> Dataset:
    recipe = Recipe(
        name="own", dataset=DatasetRecipe(source="folder", image_size=4), views={}, teachers={}, select=SelectRecipe(),
        label=LabelRecipe(), students={},
    )  # fmt: skip
    return read_source(recipe, raw=source, folder=list_source(source))[0]


def test_a_csv_file_of_a_folders_images_is_the_same_data_set_in_any_order_of_lines(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for number in range(24):
        name = f"images/{('train', 'test')[number % 4 == 0]}/{'ab'[number % 2]}/{number}.png"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(tmp_path / name)
        lines.append(f"{name},{'ab'[number % 2]},{name.split('/')[1]}")
    folder = read(tmp_path / "images")
    for order in (lines, lines[::-1]):
        dataset = read(write(tmp_path / "list.csv", "\n".join(["path,label,split", *order])))
        assert dataset.sha256 == folder.sha256
        assert dataset.test.names == [f"images/{name}" for name in folder.test.names or []]
