"""Photographs become pixels as torchvision makes them of PIL images, and as another decoder decodes them."""

from __future__ import annotations

import io
import struct
import subprocess
import sys

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision import io as torchvision_io  # loads the operators
from torchvision import transforms
from torchvision.transforms import functional

from pipeline.data.decoding import MAX_SEGMENTS, cut, decode, decoders, fit, named_decoders, opened
from pipeline.data.images import read_image
from pipeline.errors import DataError

SIZES = [(1, 1), (2, 9), (31, 17), (16, 16), (17, 31), (40, 30), (73, 80), (150, 61)]
RGB = torchvision_io.ImageReadMode.RGB.value


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, as a photograph has."""
    rng = np.random.default_rng((seed, width, height))
    few = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(few, np.int64) + rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("image_size", [16, 64])
def test_a_box_is_cut_and_resized_as_torchvisions_resized_crop_does_it(image_size):
    torch.manual_seed(0)
    for seed in range(8):
        for width, height in SIZES:
            image = photograph(width, height, seed)
            top, left, rows, columns = transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
            expected = functional.resized_crop(image, top, left, rows, columns, [image_size, image_size])
            box = (left, top, left + columns, top + rows)
            assert np.array_equal(cut(image, image_size, box), np.asarray(expected)), (image.size, box)


def test_pixels_beyond_a_box_are_not_seen():
    image = Image.new("RGB", (40, 40), "white")
    image.paste("black", (10, 10, 30, 30))
    assert cut(image, 8, (10, 10, 30, 30)).max() == 0  # bilinear, each result pixel reaches beyond its own 2.5


@pytest.mark.parametrize("image_size", [16, 32, 61])
def test_evaluation_pixels_are_those_of_torchvisions_resize_and_center_crop(image_size):
    cropped = transforms.Compose([transforms.Resize(int(image_size / 0.875)), transforms.CenterCrop(image_size)])
    squeezed = transforms.Resize((image_size, image_size))
    for width, height in SIZES:
        image = photograph(width, height)
        assert np.array_equal(fit(image, image_size, "crop"), np.asarray(cropped(image))), image.size
        assert np.array_equal(fit(image, image_size), np.asarray(squeezed(image))), image.size


def test_an_image_too_narrow_to_be_cropped_is_refused_before_it_is_resized(tmp_path):
    Image.new("L", (1, 30_000)).save(tmp_path / "line.png")
    assert read_image(tmp_path / "line.png", 64).shape == (64, 64, 3)
    with pytest.raises(DataError, match=r"^1 x 30000 pixels, too narrow to be cut to a square of 64$"):
        read_image(tmp_path / "line.png", 64, resize="crop")


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}, {"subsampling": "4:2:0"}, {"subsampling": "4:1:1"},
        {"quality": 30}, {"quality": 100}, {"progressive": True}, {"progressive": True, "subsampling": "4:2:2"},
        {"optimize": True}, {"restart_marker_blocks": 3}, {"grey": True}, {"grey": True, "progressive": True},
        *({"turn": turn} for turn in range(2, 9)),
    ],
    ids=str,
)  # fmt: skip
def test_a_jpeg_has_the_pixels_that_another_decoder_gives_it(options):
    options = dict(options)
    exif = Image.Exif()
    exif[0x0112] = options.pop("turn", 1)
    is_grey = options.pop("grey", False)
    for width, height in SIZES:
        image = photograph(width, height)
        content = jpeg(image.convert("L") if is_grey else image, exif=exif, **options)
        expected = torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), RGB, True)
        assert np.array_equal(np.asarray(decode(content)), expected.permute(1, 2, 0).numpy()), (image.size, options)


def test_a_photographs_content_is_decoded_upright_and_then_fitted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = jpeg(photograph(40, 30), exif=exif)
    (tmp_path / "photo.jpg").write_bytes(content)
    image = decode(content)
    assert image.mode == "RGB" and image.size == (30, 40)
    for resize in ("squeeze", "crop"):
        assert np.array_equal(read_image(tmp_path / "photo.jpg", 16, resize=resize), fit(image, 16, resize))
    with opened(tmp_path / "photo.jpg") as file:
        assert file.tobytes() == image.tobytes()


def test_a_jpeg_made_to_take_minutes_is_refused_in_one_line():
    whole = jpeg(Image.new("RGB", (1500, 1500), "red"), progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    assert decode(whole[:-2] + 3 * last + whole[-2:]).size == (1500, 1500)
    many = whole[:-2] + 1000 * last + whole[-2:]
    with pytest.raises(DataError, match=r"^more than 910 scans of 1500 x 1500 pixels$"):
        decode(many)
    assert np.array_equal(np.asarray(decode(whole + many)), np.asarray(decode(whole))), "what follows is not decoded"
    with pytest.raises(DataError, match=r"^more than 1000 scans of 8 x 8 pixels$"):
        decode(jpeg(Image.new("RGB", (8, 8), "red"), progressive=True)[:-2] + 1000 * last + whole[-2:])
    plain, comment = jpeg(Image.new("RGB", (8, 8), "red")), b"\xff\xfe" + struct.pack(">H", 6) + b"\xff\xd9ab"
    assert decode(plain[:2] + 100 * comment + plain[2:]).size == (8, 8)
    with pytest.raises(DataError, match=f"^more than {MAX_SEGMENTS} segments in its header$"):
        decode(plain[:2] + 600 * comment + plain[2:])


def test_decoders_are_named_with_their_versions():
    names = decoders()
    assert names["pillow"] == PIL.__version__ and set(names) <= {"pillow", "libjpeg", "libwebp"}
    assert named_decoders({"torch": "2", "libjpeg": "turbo-3.1", "pillow": "9"}) == "pillow 9, libjpeg turbo-3.1"
    assert named_decoders({"torch": "2"}) == "what is not recorded"


def test_images_are_read_without_pytorch():
    code = "import sys, pipeline.data.images; sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
