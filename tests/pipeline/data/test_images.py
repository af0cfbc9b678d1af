"""Images of every mode and format against hand-written pixels."""

from __future__ import annotations

import struct
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.data import decoding, images
from pipeline.data.decoding import UNUSED_ALPHA, fit, in_rgb
from pipeline.data.folders import ImageFile, read_images
from pipeline.data.images import read_image
from pipeline.errors import DataError
from pipeline.system.threads import Budget

RED, GREEN, WHITE, ROSE = [255, 0, 0], [0, 255, 0], [255, 255, 255], [255, 127, 127]
BLUE_NEXT = {"save_all": True, "append_images": [Image.new("RGB", (2, 2), "blue")]}


def to_rgb(image, image_size, notes=None):
    return fit(in_rgb(image, notes), image_size)


def grey(*rows):
    return Image.fromarray(np.array(rows, np.uint8))


def palette():
    image = Image.new("P", (2, 2))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    return image


def half_clear():
    image = Image.new("RGBA", (2, 2), (0, 255, 0, 255))
    for row in (0, 1):
        image.putpixel((0, row), (255, 0, 0, 0))
    return image


def noise(width=9, height=7, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


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
        ("alpha.png", half_clear(), {}, [WHITE, GREEN, WHITE, GREEN]),
        ("grey.tif", grey([0, 7], [128, 255]), {}, [[0] * 3, [7] * 3, [128] * 3, WHITE]),
        ("alpha.tiff", half_clear(), {"compression": "tiff_lzw"}, [WHITE, GREEN, WHITE, GREEN]),
        ("ink.tif", Image.new("CMYK", (2, 2), (0, 255, 255, 0)), {}, [RED] * 4),
        ("pages.tif", Image.new("RGB", (2, 2), "red"), BLUE_NEXT, [RED] * 4),
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
    Image.fromarray(levels).save(tmp_path / "deep.tif")
    (tmp_path / "deep.pgm").write_bytes(b"P5 3 3 65535\n" + levels.astype(">u2").tobytes())
    for name in ("deep.png", "deep.pgm", "deep.tif"):
        assert read_image(tmp_path / name, 3)[..., 1].ravel().tolist() == expected


def test_grey_of_12_bits_fills_the_whole_range(tmp_path):
    (tmp_path / "deep.pgm").write_bytes(b"P5 2 2 4095\n" + np.array([0, 16, 2048, 4095], ">u2").tobytes())
    assert read_image(tmp_path / "deep.pgm", 2)[..., 0].ravel().tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("levels", [[0, 65536], [-1, 5]])
def test_whole_numbers_beyond_16_bits_are_refused(tmp_path, levels):
    Image.fromarray(np.array([levels], np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match=f"grey levels from {levels[0]} to {levels[1]}, outside 0 to 65535"):
        read_image(tmp_path / "deep.tif", 2)


def bmp_of_32_bits(pixels):
    """Write a BMP that declares an alpha channel; Pillow itself only reads such files."""
    height, width, _ = pixels.shape
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", 108, width, -height, 1, 32, 3, pixels.size, 0, 0, 0, 0) + masks + bytes(52)
    body = pixels[..., [2, 1, 0, 3]].tobytes()
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(body), 0, 0, 14 + len(info)) + info + body


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tif"])
def test_alpha_that_is_0_everywhere_is_ignored_and_said(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 4), np.uint8)
    path = tmp_path / f"image.{suffix}"
    for alpha, is_unused in ((0, True), (255, False)):
        pixels[..., 3] = alpha
        if suffix == "bmp":
            path.write_bytes(bmp_of_32_bits(pixels))
        else:
            options = {"lossless": True, "exact": True} if suffix == "webp" else {}
            Image.fromarray(pixels).save(path, **options)
        notes = []
        assert np.array_equal(read_image(path, 6, notes), pixels[..., :3])
        assert notes == [UNUSED_ALPHA] * is_unused
    pixels[..., 3], pixels[0, 0, 3] = 0, 255
    notes = []
    assert np.array_equal(to_rgb(Image.fromarray(pixels), 6, notes)[1], np.full((6, 3), 255)) and notes == []


def test_floating_point_pixels_are_refused(tmp_path):
    (tmp_path / "deep.ppm").write_bytes(b"Pf\n2 2\n-1.0\n" + bytes(16))
    with pytest.raises(DataError, match="floating-point"):
        read_image(tmp_path / "deep.ppm", 2)


def test_resizing_is_pillows_bilinear_and_left_out_where_it_need_not_be():
    image = noise(9, 7)
    assert np.array_equal(to_rgb(image, 5), np.asarray(image.resize((5, 5), Image.Resampling.BILINEAR)))
    square = noise(6, 6)
    assert np.array_equal(to_rgb(square, 6), np.asarray(square))


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
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
    for name, form in (("a.png", "GIF"), ("b.png", "TGA"), ("c.png", "EPS")):
        noise().save(tmp_path / name, format=form)
        with pytest.raises(DataError, match="not an image of a known format"):
            read_image(tmp_path / name, 7)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "ppm", "tif"])
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
    monkeypatch.setattr("pipeline.data.decoding.MAX_PIXELS", 100)
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


def test_a_length_that_is_claimed_takes_no_memory(tmp_path):
    noise().save(tmp_path / "claim.png")
    content = (tmp_path / "claim.png").read_bytes()
    at = content.index(b"IDAT")
    (tmp_path / "claim.png").write_bytes(content[: at - 4] + struct.pack(">I", 2**32 - 1) + content[at:])
    tracemalloc.start()
    try:
        pixels = read_image(tmp_path / "claim.png", 5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(pixels, read_image(content, 5)) and peak < 2**20


def test_images_of_many_pixels_are_decoded_at_once_only_as_memory_allows(tmp_path, monkeypatch):
    together, most = [], []

    def slow(image, image_size, resize):
        together.append(image.size)
        most.append(len(together))
        time.sleep(0.005)
        together.pop()
        return np.zeros((image_size, image_size, 3), np.uint8)

    monkeypatch.setattr(images, "fit", slow)
    files = [ImageFile(tmp_path / f"{index}.png") for index in range(12)]
    for index, file in enumerate(files):
        Image.new("L", (10, 40 if index == 6 else 10)).save(file.path)
    two_small_ones = Budget(2 * 100 * decoding.BYTES_PER_PIXEL)
    for budget, expected in ((two_small_ones, 2), (Budget(1), 1)):
        monkeypatch.setattr(decoding, "_budget", lambda budget=budget: budget)
        most.clear()
        assert [file.problem for batch in read_images(files, 4, 12) for file in batch] == [None] * 12
        assert max(most) <= expected
