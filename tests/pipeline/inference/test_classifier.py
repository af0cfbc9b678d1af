"""From pixels to probabilities, on models whose answers can be worked out by hand."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import DataError, NumericalError, UsageError
from pipeline.inference.classifier import Classifier, PixelsToOutputs, Transform
from pipeline.models.network import Network

BLACK, WHITE = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)


class Brightness(nn.Module):
    """Measures brightness: heads with logits (m, 0, -m) and twice that, for the mean m of the normalised pixels."""

    def __init__(self, num_heads: int = 2, factor: float = 1.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        mean = images.mean(dim=(1, 2, 3)) * self.factor
        logits = torch.stack([mean, torch.zeros_like(mean), -mean], dim=1)
        return (logits, 2 * logits) if self.num_heads == 2 else logits


def classifier(model: nn.Module | None = None, image_size: int = 2) -> Classifier:
    network = Network(model or Brightness(), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Classifier(runner=PixelsToOutputs(network), class_names=("bright", "grey", "dark"), image_size=image_size)


def softmax(*logits: float) -> list[float]:
    powers = np.exp(np.array(logits))
    return list(powers / powers.sum())


def test_the_prediction_is_the_mean_of_both_heads_probabilities() -> None:
    answer = classifier().answer(np.stack([WHITE, BLACK]))
    first, second = softmax(1, 0, -1), softmax(2, 0, -2)
    assert answer.heads["class"][0].tolist() == pytest.approx(first)
    assert answer.heads["distillation"][0].tolist() == pytest.approx(second)
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert answer.probabilities[0].tolist() == pytest.approx(mean)
    assert answer.probabilities[1].tolist() == pytest.approx(mean[::-1])
    assert [[name for name, _ in row] for row in answer.top(2)] == [["bright", "grey"], ["dark", "grey"]]
    assert answer.top(1, "distillation")[0] == [("bright", pytest.approx(second[0]))]


def test_one_head_predicts_alone_and_more_classes_than_there_are_are_all_named() -> None:
    answer = classifier(Brightness(num_heads=1)).answer(WHITE[None])
    assert list(answer.heads) == ["class"]
    assert torch.equal(answer.heads["class"], answer.probabilities)
    assert len(answer.top(50)[0]) == 3


def test_of_equal_classes_the_first_comes_first_as_by_argmax() -> None:
    answer = classifier(Brightness(factor=0.0)).answer(WHITE[None])
    assert [name for name, _ in answer.top(3)[0]] == ["bright", "grey", "dark"]


def test_batches_are_small_where_images_are_large() -> None:
    assert [classifier(image_size=size).batch_size for size in (16, 32, 64, 1000)] == [256, 256, 64, 1]


def test_a_model_that_has_diverged_gives_no_answer() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        classifier(Brightness(factor=float("nan"))).answer(WHITE[None])


@pytest.mark.parametrize("resize", ["squeeze", "crop"])
def test_an_image_without_pixels_is_refused(resize: str) -> None:
    transform = Transform(32, resize)
    for empty in (np.zeros((0, 30, 3), np.uint8), np.zeros((30, 0), np.uint8), Image.new("RGB", (0, 30))):
        with pytest.raises(DataError, match=r"(30 x 0|0 x 30) pixels: an empty image"):
            transform(empty)


@pytest.mark.parametrize("thing", [None, io.BytesIO(b"x"), iter([WHITE]), torch.zeros(3, 2, 2, dtype=torch.uint8), 7])
def test_what_is_no_image_is_named(thing: Any) -> None:
    with pytest.raises(DataError, match=rf"a {type(thing).__name__} is no image; pass a path, a file's bytes, a PIL"):
        classifier().predict(thing)


def test_an_array_is_no_batch() -> None:
    batch: Any = WHITE.transpose(2, 0, 1)[None]
    with pytest.raises(UsageError, match=r"images: a ndarray; a tensor is needed: torch.from_numpy makes one"):
        classifier()(batch)


def test_answers_can_enter_a_loss() -> None:
    weight = torch.ones(3, requires_grad=True)
    likely = classifier()(torch.from_numpy(WHITE).permute(2, 0, 1)[None])
    (weight * likely).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, likely[0])
    likely.mul_(2)


def test_the_module_is_the_one_that_was_given_and_a_program_has_none() -> None:
    model = Brightness()
    assert classifier(model).module is model
    program = dataclasses.replace(classifier(), runner=lambda images: (images,), format="onnx", file=Path("model.onnx"))
    with pytest.raises(UsageError, match=r"model.onnx: onnx is a program without a module; load safetensors"):
        _ = program.module
