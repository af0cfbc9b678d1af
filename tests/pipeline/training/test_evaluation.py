"""The classes that evaluation, labelling and prediction decide for: the same ones, in bf16 too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.inference.classifier import Classifier, PixelsToOutputs
from pipeline.labels.teacher import Teacher
from pipeline.losses import probabilities, training_loss
from pipeline.models import TEACHERS
from pipeline.models.folding import fold
from pipeline.models.network import Network, last_layers
from pipeline.models.students import STUDENTS, build_student
from pipeline.models.teachers import build_teacher
from pipeline.system.runtime import deciding
from pipeline.training.batches import Batch, EvaluationData
from pipeline.training.evaluation import Predictions, evaluate
from pipeline.training.step import train_step

MEAN, STD, NUM_CLASSES, NUM_IMAGES = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 60, 64


def images(size: int) -> Tensor:
    return torch.randint(
        0, 256, (NUM_IMAGES, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def evaluated(model: nn.Module, pixels: Tensor) -> Predictions:
    """What a model predicts where training evaluates it in bf16."""
    data = EvaluationData(pixels, torch.zeros(len(pixels), dtype=torch.int64), MEAN, STD, NUM_CLASSES)
    predictions = Predictions.of(data)
    evaluate(model, data, precision="bf16", predictions=predictions)
    return predictions


def crowd(layer: nn.Module) -> None:
    """Let a layer's logits lie so close together, around 8, that bf16, whose step is 1/16 there, ties many of them."""
    assert isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None
    nn.init.normal_(layer.weight, std=0.02 * layer.weight[0].numel() ** -0.5)
    nn.init.constant_(layer.bias, 8.0)


def num_ties(logits: Tensor) -> int:
    """Count the rows whose two largest logits are equal in bf16 and not in fp32."""
    exact, rounded = (values.topk(2, dim=1).values for values in (logits.float(), logits.bfloat16()))
    return int(((rounded[:, 0] == rounded[:, 1]) & (exact[:, 0] != exact[:, 1])).sum())


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_large"])
def test_a_teacher_is_evaluated_by_the_classes_that_it_labels_with(name: str) -> None:
    torch.manual_seed(0)
    model, pixels = build_teacher(name, num_classes=NUM_CLASSES).eval(), images(32)
    crowd(model.get_submodule(TEACHERS[name]))
    if name == "mobilenet_v3_large":
        # Folding its norms rounds its features in another way: here two classes tie in bf16 whatever they are.
        layer = model.get_submodule(TEACHERS[name])
        nn.init.zeros_(layer.weight)
        layer.bias.data[[7, 3]] = torch.tensor([9.02, 9.0])
    labeller = Teacher(fold(model, 32)[0], MEAN, STD, "bf16", batch_size=NUM_IMAGES)
    assert num_ties(labeller.logits(labeller.normalize(pixels))) > NUM_IMAGES / 4
    assert torch.equal(evaluated(model, pixels).classes, torch.from_numpy(labeller.label(pixels)))


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_is_evaluated_by_the_classes_that_it_predicts(name: str) -> None:
    torch.manual_seed(0)
    model, pixels = build_student(name, num_classes=NUM_CLASSES, image_size=16, width=48, depth=1).eval(), images(16)
    heads = [module for child, module in model.named_children() if child.endswith("head")]
    assert len(heads) == 1 + STUDENTS[name].has_distillation_head
    assert model.logit_layers == [layer for head in heads for layer in last_layers(head)]
    for layer in model.logit_layers:
        crowd(layer)
    runner = PixelsToOutputs(Network(model, MEAN, STD, "bf16")).eval()
    classifier = Classifier(runner=runner, class_names=tuple(map(str, range(NUM_CLASSES))), image_size=16)
    logits = classifier.logits(pixels)
    predictions, first = evaluated(model, pixels), logits[0] if isinstance(logits, tuple) else logits
    assert num_ties(first) > NUM_IMAGES / 4
    assert torch.equal(predictions.classes, probabilities(logits).argmax(dim=1))
    assert torch.equal(predictions.class_head, first.argmax(dim=1))
    if isinstance(logits, tuple):
        assert predictions.distillation_head is not None
        assert torch.equal(predictions.distillation_head, logits[1].argmax(dim=1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = model.train()(torch.zeros(1, 3, 16, 16))
    heads_logits = trained if isinstance(trained, tuple) else (trained,)
    assert all(head.dtype == torch.bfloat16 for head in heads_logits), "training is left as it was"


class Sizes(nn.Module):
    """Notes the number of images of each batch."""

    def __init__(self, tokens_per_image: int = 1) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.tokens_per_image = tokens_per_image

    def forward(self, inputs: Tensor) -> Tensor:
        self.sizes.append(len(inputs))
        return torch.eye(NUM_CLASSES)[: len(inputs)]


def test_large_images_are_evaluated_and_predicted_in_smaller_batches() -> None:
    pixels = images(150)  # 256 * 32^2 / 150^2 = 11.7
    for tokens, size in ((1, 11), (22_500, 1)):
        model = Sizes(tokens)
        evaluated(model, pixels[:12])
        assert model.sizes == [size, *[1] * (12 - size)]
        runner = PixelsToOutputs(Network(model, MEAN, STD)).eval()
        assert Classifier(runner=runner, class_names=("a",), image_size=150).batch_size == size
    student = build_student("titn", num_classes=2, image_size=32, patch_size=4, width=48, depth=1)
    assert student.tokens_per_image == 64 and build_student("vit", num_classes=2).tokens_per_image == 16


class Watched(nn.Module):
    """Notes how cuDNN is to compute float32 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.noted = nn.Parameter(torch.ones(())), []

    def forward(self, inputs: Tensor) -> Tensor:
        self.noted.append(torch.backends.cudnn.conv.fp32_precision)
        return torch.eye(NUM_CLASSES)[: len(inputs)] * self.weight


def test_float32_is_float32_on_a_gpu_in_evaluation_labels_and_predictions_not_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("training.evaluation", "models.network"):
        monkeypatch.setattr(
            f"pipeline.{module}.deciding", lambda device, precision: deciding(torch.device("cuda"), "fp32")
        )
    model, pixels = Watched(), images(8)[:3]
    evaluated(model, pixels)
    Teacher(model, MEAN, STD, "fp32", batch_size=8).label(pixels)
    Classifier(runner=PixelsToOutputs(Network(model, MEAN, STD)), class_names=("a",) * NUM_CLASSES, image_size=8)(
        pixels
    )
    assert model.noted == ["ieee"] * 3
    batch = Batch(torch.arange(3), torch.arange(3), torch.ones(3), images=torch.zeros(3, 3, 8, 8))
    train_step(model, batch, training_loss, torch.optim.SGD(model.parameters()), clip=0.0, precision="fp32")
    assert model.noted[3:] == ["tf32"], "as PyTorch has it"
