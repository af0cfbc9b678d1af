"""From an image of any kind to probabilities, on models whose answers can be worked out by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import DataError, NumericalError
from pipeline.prediction import Predictor

BLACK, WHITE = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)


class Brightness(nn.Module):
    """Says how bright an image is: logits (m, 0, -m) of the mean m of normalised pixels, and twice that."""

    def __init__(self, num_heads: int = 2, factor: float = 1.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        mean = images.mean(dim=(1, 2, 3)) * self.factor
        logits = torch.stack([mean, torch.zeros_like(mean), -mean], dim=1)
        return (logits, 2 * logits) if self.num_heads == 2 else logits


def predictor(model: nn.Module | None = None, image_size: int = 2) -> Predictor:
    return Predictor(
        model=model or Brightness(),
        class_names=("bright", "grey", "dark"),
        image_size=image_size,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def softmax(*logits: float) -> list[float]:
    powers = np.exp(np.array(logits))
    return list(powers / powers.sum())


def test_the_prediction_is_the_mean_of_both_heads_probabilities() -> None:
    answer = predictor().answer(np.stack([WHITE, BLACK]))
    first, second = softmax(1, 0, -1), softmax(2, 0, -2)
    assert answer.heads["class"][0].tolist() == pytest.approx(first)
    assert answer.heads["distillation"][0].tolist() == pytest.approx(second)
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert answer.probabilities[0].tolist() == pytest.approx(mean)
    assert answer.probabilities[1].tolist() == pytest.approx(mean[::-1])
    assert [[name for name, _ in row] for row in answer.top(2)] == [["bright", "grey"], ["dark", "grey"]]
    assert answer.top(1, "distillation")[0] == [("bright", pytest.approx(second[0]))]


def test_one_head_predicts_alone_and_more_classes_than_there_are_are_all_named() -> None:
    answer = predictor(Brightness(num_heads=1)).answer(WHITE[None])
    assert list(answer.heads) == ["class"]
    assert torch.equal(answer.heads["class"], answer.probabilities)
    assert len(answer.top(50)[0]) == 3


def test_of_equal_classes_the_first_comes_first_as_by_argmax() -> None:
    answer = predictor(Brightness(factor=0.0)).answer(WHITE[None])
    assert [name for name, _ in answer.top(3)[0]] == ["bright", "grey", "dark"]


def test_a_path_its_bytes_a_pil_image_and_an_array_are_the_same_pixels(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    image, file = Image.fromarray(array), tmp_path / "image.png"
    image.save(file)
    each = [predictor(image_size=5).transform(kind) for kind in (file, str(file), file.read_bytes(), image, array)]
    assert all(pixels.shape == (5, 5, 3) and np.array_equal(pixels, each[0]) for pixels in each)
    grey = predictor().transform(np.array([[0, 50], [100, 255]], np.uint8))
    assert grey.reshape(4, 3).tolist() == [[0] * 3, [50] * 3, [100] * 3, [255] * 3]


def test_a_pil_image_is_turned_as_a_file_is() -> None:
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = 3
    Image.fromarray(np.array([[1, 2], [3, 4]], np.uint8)).save(content, format="PNG", exif=exif)
    with Image.open(content) as image:
        pixels = predictor().transform(image)
    assert pixels[..., 0].tolist() == [[4, 3], [2, 1]]
    assert np.array_equal(pixels, predictor().transform(content.getvalue()))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((2, 2, 3)), r"\(2, 2, 3\) float64"),
        (np.zeros((2, 2, 4), np.uint8), r"\(2, 2, 4\)"),
        (np.zeros(4, np.uint8), r"\(4,\)"),
        (Image.new("F", (2, 2)), "mode F"),
        (b"", "empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "known format"),
        ("no/such/file.png", "not a regular file"),
    ],
)
def test_what_is_no_image_is_refused(image: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        predictor().transform(image)  # type: ignore[arg-type]


def test_images_of_any_number_are_answered_in_order() -> None:
    few_at_once = predictor(image_size=2)
    levels = np.linspace(0, 255, 7).astype(np.uint8)
    images = [np.full((3, 4, 3), level, np.uint8) for level in levels]
    whole = few_at_once(images)
    assert whole.probabilities.shape == (7, 3)
    for index, image in enumerate(images):
        assert torch.allclose(few_at_once([image]).probabilities[0], whole.probabilities[index])
    with pytest.raises(DataError, match="at least one"):
        few_at_once([])


def test_batches_are_cut_where_images_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.prediction.PIXELS_AT_ONCE", {"cpu": 3 * 2**2})
    sizes: list[int] = []
    model = Brightness()
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    answer = predictor(model)([BLACK] * 7 + [WHITE])
    assert sizes == [3, 3, 2]
    assert [row[0][0] for row in answer.top(1)] == ["dark"] * 7 + ["bright"]
    assert all(len(head) == 8 for head in answer.heads.values())
    assert predictor(image_size=1000).batch_size == 1


def test_a_model_that_has_diverged_gives_no_answer() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        predictor(Brightness(factor=float("nan"))).answer(WHITE[None])
