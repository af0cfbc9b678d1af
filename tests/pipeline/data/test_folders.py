"""Images of every mode and format against hand-written pixels; folders whole, odd and damaged."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.data import images
from pipeline.data.folders import read_folder
from pipeline.data.images import BadFile, read_image, to_rgb
from pipeline.errors import DataError, StorageError, UsageError

RED, GREEN, WHITE, ROSE = [255, 0, 0], [0, 255, 0], [255, 255, 255], [255, 127, 127]
BLUE_NEXT = {"save_all": True, "append_images": [Image.new("RGB", (2, 2), "blue")]}


def grey(*rows):
    return Image.fromarray(np.array(rows, np.uint8))


def palette():
    image = Image.new("P", (2, 2))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    return image


def noise(width=9, height=7, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def make_folder(root, files):
    """Write `files`, path -> content: bytes, an image, or None for a fresh 3 x 3 one."""
    for number, (name, content) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            with path.open("wb") as file:
                (content or Image.new("RGB", (3, 3), (number, 0, 0))).save(file, format="PNG")
    return root


def order_of(split):
    """The numbers that make_folder gave its images."""
    return split.images[:, 0, 0, 0].tolist()


def png(number=0):
    return Image.new("RGB", (3, 3), (number, 0, 0))


# --- one image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image", "options", "expected"),
    [
        ("grey.png", grey([0, 7], [128, 255]), {}, [[0] * 3, [7] * 3, [128] * 3, WHITE]),
        ("grey.pgm", grey([0, 7], [128, 255]), {}, [[0] * 3, [7] * 3, [128] * 3, WHITE]),
        ("bits.png", grey([0, 255], [255, 0]).convert("1"), {}, [[0] * 3, WHITE, WHITE, [0] * 3]),
        ("key.png", grey([0, 7], [128, 255]), {"transparency": 7}, [[0] * 3, WHITE, [128] * 3, WHITE]),
        ("rgb.ppm", Image.new("RGB", (2, 2), (1, 2, 3)), {}, [[1, 2, 3]] * 4),
        ("rgb.bmp", Image.new("RGB", (2, 2), (1, 2, 3)), {}, [[1, 2, 3]] * 4),
        ("rgb.webp", Image.new("RGB", (2, 2), (1, 2, 3)), {"lossless": True}, [[1, 2, 3]] * 4),
        ("palette.png", palette(), {}, [RED, GREEN, RED, RED]),
        ("palette.bmp", palette(), {}, [RED, GREEN, RED, RED]),
        ("hole.png", palette(), {"transparency": 0}, [WHITE, GREEN, WHITE, WHITE]),
        ("glass.png", palette(), {"transparency": bytes([128, 255])}, [ROSE, GREEN, ROSE, ROSE]),
        ("alpha.png", Image.new("RGBA", (2, 2), (0, 255, 0, 0)), {}, [WHITE] * 4),
        ("alpha.webp", Image.new("RGBA", (2, 2), (0, 0, 255, 255)), {"lossless": True}, [[0, 0, 255]] * 4),
        ("grey_alpha.png", Image.merge("LA", [grey([10, 10], [10, 0]), grey([0, 255], [128, 0])]), {},
         [WHITE, [10] * 3, [132] * 3, WHITE]),
        ("ink.jpg", Image.new("CMYK", (2, 2), (0, 255, 255, 0)), {}, [RED] * 4),
        ("moving.webp", Image.new("RGB", (2, 2), "red"), {**BLUE_NEXT, "lossless": True}, [RED] * 4),
        ("moving.png", Image.new("RGB", (2, 2), "red"), BLUE_NEXT, [RED] * 4),
    ],
)  # fmt: skip
def test_every_mode_and_format_gives_the_colours_one_sees(tmp_path, name, image, options, expected):
    image.save(tmp_path / name, **options)
    pixels = read_image(tmp_path / name, 2)
    assert pixels.dtype == np.uint8 and pixels.shape == (2, 2, 3)
    assert pixels.reshape(4, 3).tolist() == expected


def test_grey_of_16_bits_is_scaled_and_rounded_not_clipped(tmp_path):
    levels = np.array([[0, 128, 129], [385, 386, 1000], [32768, 65407, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 2, 4, 128, 255, 255]
    assert expected == [round(level / 257) for level in levels.ravel()]
    Image.fromarray(levels).save(tmp_path / "deep.png")
    (tmp_path / "deep.pgm").write_bytes(b"P5 3 3 65535\n" + levels.astype(">u2").tobytes())
    for name in ("deep.png", "deep.pgm"):
        assert read_image(tmp_path / name, 3)[..., 1].ravel().tolist() == expected


def test_grey_of_12_bits_fills_the_whole_range(tmp_path):
    (tmp_path / "deep.pgm").write_bytes(b"P5 2 2 4095\n" + np.array([0, 16, 2048, 4095], ">u2").tobytes())
    assert read_image(tmp_path / "deep.pgm", 2)[..., 0].ravel().tolist() == [0, 1, 128, 255]


def test_floating_point_pixels_are_refused(tmp_path):
    (tmp_path / "deep.ppm").write_bytes(b"Pf\n2 2\n-1.0\n" + bytes(16))
    with pytest.raises(DataError, match="floating-point"):
        read_image(tmp_path / "deep.ppm", 2)


def test_resizing_is_pillows_bilinear_and_left_out_where_it_need_not_be():
    image = noise(9, 7)
    assert np.array_equal(to_rgb(image, 5), np.asarray(image.resize((5, 5), Image.Resampling.BILINEAR)))
    square = noise(6, 6)
    assert np.array_equal(to_rgb(square, 6), np.asarray(square))


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_a_photograph_is_upright_whatever_its_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    noise().save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as image:
        assert np.array_equal(read_image(path, 8), to_rgb(ImageOps.exif_transpose(image), 8))


@pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0garbage!", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b""])
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_metadata_does_not_spoil_the_pixels(tmp_path, exif, suffix):
    noise().save(tmp_path / f"photo.{suffix}", exif=exif)
    noise().save(tmp_path / f"plain.{suffix}")
    assert np.array_equal(read_image(tmp_path / f"photo.{suffix}", 7), read_image(tmp_path / f"plain.{suffix}", 7))


def test_a_format_is_known_by_its_content_and_only_those_allowed_are_interpreted(tmp_path):
    noise().save(tmp_path / "really.png", format="BMP")
    assert np.array_equal(read_image(tmp_path / "really.png", 7), to_rgb(noise(), 7))
    for name, form in (("a.png", "GIF"), ("b.png", "TIFF"), ("c.png", "EPS")):
        noise().save(tmp_path / name, format=form)
        with pytest.raises(DataError, match="not an image of a known format"):
            read_image(tmp_path / name, 7)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "ppm"])
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    noise(16, 16).save(path)
    content, whole = path.read_bytes(), read_image(path, 16)
    num_refused = 0
    for length in range(0, len(content), max(1, len(content) // 60)):
        path.write_bytes(content[:length])
        try:
            assert np.array_equal(read_image(path, 16), whole)
        except DataError as error:
            assert "\n" not in str(error)
            num_refused += 1
    assert num_refused >= 50


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    header_only = b"P6 12 10 255\n"
    (tmp_path / "big.ppm").write_bytes(header_only)
    with pytest.raises(DataError, match="12 x 10 pixels, more than 100"):
        read_image(tmp_path / "big.ppm", 4)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_what_pillow_takes_for_a_decompression_bomb_is_refused(tmp_path, side):
    (tmp_path / "bomb.ppm").write_bytes(f"P6 {side} {side} 255\n".encode())
    with pytest.raises(DataError, match="more than 64000000"):
        read_image(tmp_path / "bomb.ppm", 4)


# --- folders -----------------------------------------------------------------------------------------------


def test_classes_and_images_are_ordered_by_bytes(tmp_path):
    ordered = ["A", "Zoë", "a", "a b", "a\nb", "e\u0301", "Ärger", "é", "日本", "\U0001f600"]
    ordered.sort(key=os.fsencode)
    names = ["1.png", "10.png", "2.png", "B.png", "a\nb.png", "b.png", "é.png", "\udcff.png"]
    names.sort(key=os.fsencode)
    files = {f"train/{cls}/{name}": None for cls in ordered for name in names}
    for name in reversed(files):
        make_folder(tmp_path, {name: png(list(files).index(name))})
    class_names, train, test, bad = read_folder(tmp_path, 3, skip_bad=False)
    assert class_names == tuple(ordered) and test is None and bad == []
    assert order_of(train) == list(range(len(files)))
    assert train.labels.tolist() == [label for label in range(len(ordered)) for _ in names]
    assert class_names.index("A") < class_names.index("a") < class_names.index("é") < class_names.index("日本")


def test_train_decides_the_classes_and_test_may_lack_some(tmp_path):
    make_folder(tmp_path, {"train/a/x.png": None, "train/b/x.png": None, "test/b/x.png": None})
    class_names, train, test, _ = read_folder(tmp_path, 3, skip_bad=False)
    assert class_names == ("a", "b") and train.labels.tolist() == [0, 1] and test.labels.tolist() == [1]


def test_a_class_of_test_that_train_lacks_is_refused_by_name(tmp_path):
    make_folder(tmp_path, {"train/a/x.png": None, "test/a/x.png": None, "test/other/x.png": None})
    with pytest.raises(DataError, match="test/other: a class that `train` does not have"):
        read_folder(tmp_path, 3, skip_bad=False)


def test_what_desktops_and_authors_leave_is_ignored(tmp_path):
    clutter = [
        "train/.DS_Store",
        "train/a/.hidden.png",
        "train/a/Thumbs.db",
        "train/b/desktop.ini",
        "train/README.md",
    ]
    make_folder(tmp_path, {"train/a/x.png": None, "train/b/x.png": None, "train/.cache/x.png": None, "val/c/x": b""})
    make_folder(tmp_path, {name: b"clutter" for name in [*clutter, "train/b/LICENSE.txt", "labels.csv"]})
    class_names, train, _, bad = read_folder(tmp_path, 3, skip_bad=False)
    assert class_names == ("a", "b") and len(train) == 2 and bad == []


@pytest.fixture
def spoiled(tmp_path):
    """Three good images among files bad in every way."""
    make_folder(tmp_path, {"train/a/1.png": png(1), "train/b/2.png": png(2), "test/a/3.png": png(3)})
    make_folder(tmp_path, {
        "train/a/empty.png": b"",
        "train/a/not\nan image.jpg": b"plain text",
        "train/a/\udcff.png": b"\x89PNG\r\n\x1a\n",
        "train/a/movie.mp4": b"",
        "train/a/deeper/x.png": None,
        "train/loose.png": None,
        "test/a/broken.webp": b"RIFF\x10\0\0\0WEBPVP8 ",
    })  # fmt: skip
    os.mkfifo(tmp_path / "train/b/pipe.png")
    (tmp_path / "train/b/dangling.png").symlink_to("nowhere.png")
    (tmp_path / "train/loop").symlink_to("loop")
    return tmp_path


def test_bad_files_are_named_and_counted(spoiled):
    with pytest.raises(DataError) as caught:
        read_folder(spoiled, 3, skip_bad=False)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    assert ": 10 bad: " in message and message.endswith("; and 7 more; mend them or add --skip-bad")
    assert "train/a/deeper (a folder inside a class folder)" in message


def test_bad_files_can_be_skipped_and_are_reported(spoiled):
    class_names, train, test, bad = read_folder(spoiled, 3, skip_bad=True)
    assert class_names == ("a", "b")
    assert order_of(train) == [1, 2] and train.labels.tolist() == [0, 1]
    assert order_of(test) == [3] and test.labels.tolist() == [0]
    reasons = {file.path: file.reason for file in bad}
    assert len(bad) == len(reasons) == 10
    assert reasons["train/a/empty.png"] == "empty"
    assert reasons["train/a/not\\nan image.jpg"] == "not an image of a known format"
    assert reasons["train/a/\\xff.png"].startswith(("cannot be read", "not an image"))
    assert reasons["train/a/movie.mp4"].startswith("not one of .png .jpg")
    assert reasons["train/loose.png"] == reasons["train/loop"] == "not in a class folder"
    assert reasons["train/b/pipe.png"] == reasons["train/b/dangling.png"] == "not a regular file"
    assert "test/a/broken.webp" in reasons
    assert all(reason.isprintable() for reason in reasons.values())


def test_bad_files_are_in_the_order_of_the_listing_whichever_thread_is_first(tmp_path):
    make_folder(tmp_path, {f"train/a/{number:03}.png": b"" if number % 3 else None for number in range(100)})
    bad = read_folder(tmp_path, 3, skip_bad=True)[3]
    assert bad == [BadFile(f"train/a/{number:03}.png", "empty") for number in range(100) if number % 3]


@pytest.mark.parametrize("files", [{"train/b/x.png": b"damaged"}, {"train/b/note.txt": b""}])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_images_is_refused_by_name(tmp_path, files, split):
    make_folder(tmp_path, {"train/a/x.png": None, "train/b/y.png": None, "test/a/x.png": None})
    (tmp_path / "train/b/y.png").rename(tmp_path / "train/a/y.png")
    if split == "test":
        make_folder(tmp_path, {"train/b/y.png": None})
    make_folder(tmp_path, {name.replace("train", split): content for name, content in files.items()})
    with pytest.raises(DataError, match=f"{split}/b: no image in it"):
        read_folder(tmp_path, 3, skip_bad=True)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_classes_is_refused(tmp_path, split):
    make_folder(tmp_path, {"train/a/x.png": None} if split == "test" else {})
    (tmp_path / split).mkdir(exist_ok=True)
    with pytest.raises(DataError, match=f"{split}: no image in it"):
        read_folder(tmp_path, 3, skip_bad=False)


def test_a_class_name_that_is_not_utf8_is_refused(tmp_path):
    make_folder(tmp_path, {"train/a\udcff/x.png": None})
    with pytest.raises(DataError, match=r"train/a\\xff: class name is not UTF-8"):
        read_folder(tmp_path, 3, skip_bad=False)


def test_linked_class_folders_and_images_are_followed(tmp_path):
    make_folder(tmp_path, {"elsewhere/x.png": png(9), "train/a/x.png": png(8)})
    (tmp_path / "train/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/a/y.png").symlink_to(tmp_path / "elsewhere/x.png")
    class_names, train, _, _ = read_folder(tmp_path, 3, skip_bad=False)
    assert class_names == ("a", "b") and order_of(train) == [8, 9, 9]


def test_a_folder_that_is_not_there_is_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match=r"--from .*nowhere: no such folder"):
        read_folder(tmp_path / "nowhere", 3, skip_bad=False)


def test_a_folder_without_train_says_where_images_go(tmp_path):
    with pytest.raises(DataError, match="no folder `train` in it; images go in train/<class>/<image>"):
        read_folder(tmp_path, 3, skip_bad=False)


def test_a_folder_that_cannot_be_listed_is_a_storage_error(tmp_path, monkeypatch):
    make_folder(tmp_path, {"train/a/x.png": None})

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.raises(StorageError, match="cannot be listed"):
        read_folder(tmp_path, 3, skip_bad=False)


def test_an_image_that_may_not_be_read_is_a_bad_file(tmp_path, monkeypatch):
    make_folder(tmp_path, {"train/a/x.png": None, "train/a/y.png": None})

    def refuse(path, formats):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(images.Image, "open", refuse)
    with pytest.raises(DataError, match=r"2 bad: train/a/x.png \(cannot be read: Permission denied\)"):
        read_folder(tmp_path, 3, skip_bad=False)


def test_a_files_content_is_read_as_the_file_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    noise().save(tmp_path / "photo.png", exif=exif)
    content = (tmp_path / "photo.png").read_bytes()
    assert np.array_equal(read_image(content, 5), read_image(tmp_path / "photo.png", 5))
    for damaged, words in (
        (b"", "empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "known format"),
        (content[:90], "cannot be read"),
    ):
        with pytest.raises(DataError, match=words):
            read_image(damaged, 5)
