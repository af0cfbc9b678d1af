"""Figures from plain arrays: what they show, that they are readable, and that the arrays alone decide the bytes."""

from __future__ import annotations

import builtins
import importlib
import io
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import UsageError
from pipeline.report.figures import (
    Cell,
    DotRow,
    Panel,
    Repeats,
    Series,
    dots,
    heat_map,
    lines,
    over_counts,
    sheet,
    smoothing,
)
from pipeline.report.figures.canvas import COLOURS, DASHES, MARKERS, shown, to_png
from pipeline.report.figures.lines import running_mean
from pipeline.report.figures.sheet import overlaid

LIMIT = 200_000  # bytes
EPOCHS = np.arange(1.0, 9.0)
IMAGE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def decode(png: bytes) -> NDArray[np.uint8]:
    """The picture as `(H, W, 3)` uint8."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def chunks(png: bytes) -> list[bytes]:
    names, at = [], 8
    while at < len(png):
        size, name = struct.unpack(">I4s", png[at : at + 8])
        assert zlib.crc32(png[at + 4 : at + 8 + size]) == struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0]
        names.append(name)
        at += size + 12
    return names


def check(png: bytes) -> NDArray[np.uint8]:
    """Check what holds for every figure, and return the picture."""
    picture = decode(png)
    assert picture.shape[1] == 1200 and 200 < picture.shape[0] < 4000
    assert len(png) < LIMIT
    grey = np.asarray(Image.fromarray(picture).convert("L"))
    assert grey.max() == 255 and 0.005 < (grey < 160).mean() < 0.7, "neither blank nor filled"
    assert (grey[:3] > 200).all() and (grey[-3:] > 200).all() and (grey[:, :2] > 200).all(), "nothing is cut off"
    assert (grey[:, -2:] > 200).all(), "nothing is cut off"
    assert set(chunks(png)) <= {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"}, "no date, no version"
    return picture


def panel(name: str) -> Panel:
    """Means of two and of one count."""
    return Panel(name, [Repeats(name, {1: [40.0, 50.0], 5: [60.0]}), Repeats(f"{name} 2", {5: [55.0, 57.0]})])


def examples(name: str = "class") -> dict[str, bytes]:
    """A figure of each kind, with texts that contain `name`."""
    counts = np.diag([9, 8, 7]) + np.eye(3, dtype=np.int64)[[1, 2, 0]]
    names = [f"{name} {index}" for index in range(3)]
    shades = 100 * counts / counts.sum(axis=1, keepdims=True)
    return {
        "lines": lines([Series(name, EPOCHS, EPOCHS * 10, reference=75.0)], x_label="epoch", y_label="%"),
        "dots": dots(
            [DotRow(label, [50.0], [(40.0, 60.0)], name) for label in names], [name], x_label="%", overall=[55.0]
        ),
        "heat_map": heat_map(shades, names, x_label="x", y_label="y", bar_label="%", numbers=counts),
        "repeats": over_counts([panel(name), panel("best")], x_label="views", y_label="%"),
        "sheet": sheet([[Cell(IMAGE, [name], marked=True), Cell(IMAGE, grid=4)]], ["a", "b"]),
    }


def test_equal_arrays_give_equal_bytes_whatever_the_users_matplotlib_is_set_to() -> None:
    import matplotlib

    before = examples()
    for png in before.values():
        check(png)
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "figure.facecolor": "black", "savefig.dpi": 20}):
        assert examples() == before
        assert matplotlib.rcParams["font.size"] == 30, "and they stay as they are"


@pytest.mark.parametrize("name", ["$\\frac$ 猫 a\nb\x00\udcff", "W" * 300])
def test_a_class_may_have_any_name(name: str) -> None:
    for png in examples(name).values():
        check(png)


def test_texts_fit_their_place() -> None:
    assert shown("abcdef", 6) == "abcdef" and shown("abcdefg", 6) == "abcde…"
    assert shown("a\tb", 6) == "a\\tb"


def test_forty_curves_can_be_told_apart_in_greyscale() -> None:
    pairs = {(str(DASHES[index % len(DASHES)]), MARKERS[index % len(MARKERS)]) for index in range(40)}
    assert len(pairs) == 40
    assert len(COLOURS) == len(MARKERS) == 8

    def luminance(colour: str) -> float:
        red, green, blue = bytes.fromhex(colour[1:])
        return 0.299 * red + 0.587 * green + 0.114 * blue

    assert max(map(luminance, COLOURS)) < 175, "all stand out from white"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that have been drawn."""
    figures: list[Any] = []
    for module in ("lines", "heat_map"):
        there = importlib.import_module(f"pipeline.report.figures.{module}")
        monkeypatch.setattr(there, "to_png", lambda figure: figures.append(figure) or to_png(figure))
    return figures


@pytest.mark.parametrize("detail", ["", "60.00 ± 0.12 (3)"])
@pytest.mark.parametrize("count", [8, 9, 16, 40])
def test_the_legend_of_many_curves_is_not_cut_off(drawn: list[Any], count: int, detail: str) -> None:
    series = [Series(f"teacher {index}", EPOCHS, EPOCHS * 10 + index, detail=detail) for index in range(count)]
    lines(series, x_label="epoch", y_label="%", legend="highest, %")
    legend = drawn[0].legends[0].get_window_extent()
    assert legend.y0 >= 0 and legend.y1 <= drawn[0].bbox.y1
    assert count > 8 or drawn[0].get_figheight() == 4.6


@pytest.mark.parametrize(("classes", "most"), [(3, 9), (10, 500), (10, 27200), (20, 99), (20, 27200), (20, 10**8)])
def test_numbers_do_not_run_into_their_neighbours(drawn: list[Any], classes: int, most: int) -> None:
    counts = np.full((classes, classes), most)
    names = [f"class {index}" for index in range(classes)]
    shares = 100 * counts / counts.sum(axis=1, keepdims=True)
    check(heat_map(shares, names, x_label="x", y_label="y", bar_label="%", numbers=counts))
    axes = drawn[0].axes[0]
    cell = axes.get_window_extent().width / classes
    assert len(axes.texts) == (0 if most == 10**8 else classes**2), "what cannot be read is left out"
    assert all(text.get_window_extent().width < 0.95 * cell for text in axes.texts)


def test_a_second_curve_looks_different_in_greyscale() -> None:
    """The same values as a first and as a second series give other pixels, whatever their colours."""
    flat = Series("a", EPOCHS, np.full(8, 50.0))
    first, second = (
        np.asarray(Image.fromarray(decode(png)).convert("L")) < 200
        for png in (lines([flat], x_label="x", y_label="y"), lines([flat, flat], x_label="x", y_label="y"))
    )
    wide = min(first.shape[1], second.shape[1])
    assert (first[:, :wide] != second[:, :wide]).sum() > 100


def test_curves_that_end_close_together_are_enlarged() -> None:
    steep = np.array([10.0, 50, 90, 95, 97, 98, 98.5, 99])
    plain = check(lines([Series("a", EPOCHS, EPOCHS * 10)], x_label="epoch", y_label="%"))
    enlarged = check(lines([Series("a", EPOCHS, steep)], x_label="epoch", y_label="%"))
    assert enlarged.shape[0] > plain.shape[0]


@pytest.mark.parametrize("y", [[5.0], [np.nan, 3.0], [np.nan], [4.0, 4.0]])
def test_short_and_broken_curves_are_drawn(y: list[float]) -> None:
    check(lines([Series("a", np.arange(1.0, len(y) + 1), np.array(y))], x_label="epoch", y_label="%"))


def test_long_noisy_curves_stay_small_and_are_smoothed() -> None:
    noise = np.random.default_rng(0).normal(0, 3, (8, 600))
    x = np.arange(1.0, 601.0)
    many = [Series(f"teacher {i}", x, 70 + i - 60 * np.exp(-x / 50) + noise[i], reference=70.0 + i) for i in range(8)]
    check(lines(many, x_label="epoch", y_label="%", legend="highest"))
    assert (smoothing(99), smoothing(600), smoothing(350) % 2) == (1, 15, 1)


def test_a_running_mean_is_that_of_hand_arithmetic() -> None:
    assert running_mean(np.array([1.0, 2, 6, 7]), 3).tolist() == [1.5, 3, 5, 6.5]
    assert running_mean(np.array([1.0, np.nan, 6, 7]), 3).tolist()[2:] == [6.5, 6.5]
    assert np.isnan(running_mean(np.array([1.0, np.nan, 6]), 3)[1])


def test_counts_are_drawn_by_their_logarithm_and_many_share_their_ticks() -> None:
    values = {2**power: [float(power)] for power in range(20)}
    picture = check(over_counts([Panel("a", [Repeats("a", values)])], x_label="x", y_label="%"))
    blue = (picture[..., 2] > 120) & (picture[..., 0] < 60)
    rows, columns = np.nonzero(blue[150:])
    assert np.corrcoef(rows, columns)[0, 1] < -0.99, "a straight line"


def test_a_hundred_classes_fit() -> None:
    shades = np.random.default_rng(0).uniform(0, 3, (100, 100)) + 60 * np.eye(100)
    names = [f"class number {index}" for index in range(100)]
    check(heat_map(shades, names, x_label="x", y_label="y", bar_label="%"))
    check(dots([DotRow(name, [50.0, None]) for name in names[:40]], ["a", "b"], x_label="%"))


@pytest.mark.parametrize("shade", [0, 255])
def test_a_marked_image_has_a_frame_that_is_seen_beside_black_and_white(shade: int) -> None:
    """No pixel of the frame is as dark as ink; the frame of before was black, and lost on black images."""
    cell = Cell(np.full((8, 8, 3), shade, np.uint8), ["a"])
    plain, marked = (decode(sheet([[cell], [one]], [""])) for one in (cell, replace(cell, marked=True)))
    orange = (np.abs(marked.astype(int) - (0xE8, 0x55, 0x0F)).max(axis=-1) < 24).sum()
    # Four sides of 1.25 + 0.07 inches, 3 points thick, at 150 dots an inch: 4 x 198 x 6.25 = 4950.
    assert 4000 < orange < 6000
    assert not (np.abs(plain.astype(int) - (0xE8, 0x55, 0x0F)).max(axis=-1) < 24).any()


@pytest.mark.parametrize("shade", [0, 255])
def test_weights_are_lighter_the_larger_they_are_on_black_and_on_white(shade: int) -> None:
    image = np.full((4, 4, 3), shade, np.uint8)
    grey = overlaid(image, np.array([[1.0, 0.0], [0.5, 1.0]])) @ np.array([0.299, 0.587, 0.114])
    assert grey[0, 0] == grey[3, 3] > grey[2, 0] + 30 > grey[0, 3] + 60
    assert (grey[:2, :2] == grey[0, 0]).all() and (grey[:2, 2:] == grey[0, 3]).all()


def test_without_matplotlib_one_line_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"^figures need matplotlib; pip install 'titn-pipeline\[report\]'$"):
        lines([Series("a", EPOCHS, EPOCHS)], x_label="x", y_label="y")
