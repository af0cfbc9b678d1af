"""Students of timm and of a user's function: how they are built, their heads, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import UsageError
from pipeline.models.students import (
    build_student,
    check_arguments,
    check_student,
    has_distillation_head,
    use_inner_block,
)
from pipeline.models.students.foreign import ForeignStudent
from pipeline.training.optimization import decayed

timm = pytest.importorskip("timm")

SIZES: dict[str, Any] = {"num_classes": 5, "image_size": 32}
SMALL_VIT: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 3}
DISTILLED = "timm/deit_tiny_distilled_patch16_224"
OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, image_size, heads):
        super().__init__()
        self.heads = heads
        self.body = nn.Sequential(nn.AvgPool2d(image_size // 2), nn.Flatten(), nn.BatchNorm1d(12))
        self.class_head, self.distillation_head = nn.Linear(12, num_classes), nn.Linear(12, num_classes)
        self.last = nn.Linear(3, 3)

    def forward(self, images):
        features = self.body(images)
        outputs = [self.class_head(features), self.distillation_head(features), features]
        if self.heads == "dict":
            return {"logits": outputs[0]}
        if self.heads == "raise":
            raise ValueError("no\\nsuch thing")
        if self.heads == "evaluated":
            return outputs[0] if not self.training else tuple(outputs[:2])
        return outputs[0] if self.heads == 1 else outputs[: self.heads]

def build(num_classes, image_size, heads: int = 2):
    print("built")
    return Net(num_classes, image_size, heads)

def narrow(num_classes, image_size):
    return Net(3, image_size, 1)
"""


def images(number: int = 2) -> Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's function, in a file of the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_student.py").write_text(OWN)
    return "my_student.py:build"


@pytest.mark.parametrize(
    ("name", "arguments", "takes_size"), [("test_vit", {"img_size": 32}, True), ("test_resnet", {}, False)]
)
def test_a_timm_student_is_timms_model_of_the_images_size(name: str, arguments: Any, takes_size: bool) -> None:
    torch.manual_seed(0)
    student = build_student(f"timm/{name}", **SIZES, drop_path_rate=0.1).eval()
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=5, drop_path_rate=0.1, **arguments).eval()
    assert torch.equal(student(images()), theirs(images())) and student(images()).shape == (2, 5)
    assert isinstance(student, ForeignStudent) and student.state_dict().keys() == {
        f"module.{key}" for key in theirs.state_dict()
    }
    assert not has_distillation_head(f"timm/{name}", SIZES)
    assert decayed(student) == {f"module.{key}" for key in decayed(theirs)}
    assert use_inner_block(student, "auto", torch.device("cpu")) == "none"


def test_timms_distilled_models_give_both_heads_in_evaluation_too() -> None:
    assert has_distillation_head(DISTILLED, {**SIZES, **SMALL_VIT})
    student = build_student(DISTILLED, **SIZES, **SMALL_VIT)
    module: Any = student.module
    for model in (student.eval(), copy.deepcopy(student), student.train()):
        outputs = model(images())
        tokens = module.forward_features(images())
        assert len(outputs) == 2
        for output, head, token in zip(outputs, (module.head, module.head_dist), (0, 1), strict=True):
            torch.testing.assert_close(output, head(tokens[:, token]))
    nn.Sequential(student).eval()
    assert not any(layer.training for layer in module.modules() if layer is not module), "dropout is off"
    with torch.autocast("cpu", torch.bfloat16):
        assert [output.dtype for output in student.eval()(images())] == [torch.float32] * 2, "both heads decide in fp32"


@pytest.mark.parametrize("name", ["repvit_m0_9", "levit_128s", "pit_ti_distilled_224", "efficientformerv2_s0"])
def test_other_architectures_with_a_head_for_distillation_are_known_by_timms_own_method(name: str) -> None:
    with torch.device("meta"):
        student = ForeignStudent(timm.create_model(name, num_classes=5)).eval()
        outputs = student(torch.zeros(2, 3, 224, 224))
    assert [tuple(head.shape) for head in outputs] == [(2, 5), (2, 5)]


def test_a_users_function_has_the_heads_that_its_model_returns(own: str) -> None:
    state = torch.get_rng_state()
    assert has_distillation_head(own, SIZES) and not has_distillation_head(own, {**SIZES, "heads": 1})
    assert torch.equal(torch.get_rng_state(), state), "the generator is as before"
    student = build_student(own, **SIZES)
    outputs = student.eval()(images())
    assert isinstance(outputs, tuple) and [head.shape for head in outputs] == [(2, 5), (2, 5)]
    assert build_student(own, **SIZES, heads=1).eval()(images()).shape == (2, 5)
    module: Any = student.module
    assert student.logit_layers == [module.class_head, module.distillation_head], "by their names"
    with torch.autocast("cpu", torch.bfloat16):
        assert [head.dtype for head in student(images())] == [torch.float32] * 2


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        ("build", {"heads": 3}, r"for images \(2, 3, 32, 32\): it returns \(2, 5\), \(2, 5\), \(2, 12\)"),
        ("build", {"heads": "dict"}, r"it returns dict; needed are logits \(2, 5\), or two of them, of the class and"),
        ("build", {"heads": "raise"}, r"my_student.py:build in training mode.*ValueError: no\\nsuch thing$"),
        ("build", {"heads": "evaluated"}, "has 2 outputs in training mode and 1 in evaluation mode"),
        ("narrow", {}, r"it returns \(2, 3\); needed are logits \(2, 5\)"),
        ("narrow", {"heads": 2}, "unexpected keyword argument 'heads'"),
        ("missing", {}, "my_student.py has no function 'missing'"),
        ("build.py:build", {}, "there is no file my_student.py:build.py"),
    ],
)  # fmt: skip
def test_a_users_model_that_gives_no_logits_is_refused_in_one_line(
    own: str, function: str, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        has_distillation_head(own.replace("build", function), {**SIZES, **arguments})
    assert "\n" not in str(refused.value)


def test_a_student_is_tried_once_until_its_file_changes(own: str, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "my_student.py").write_text(OWN + "# of this test alone")
    for _ in range(3):
        has_distillation_head(own, SIZES)
    captured = capfd.readouterr()
    assert captured.err.count("built") == 1 and not captured.out
    (tmp_path / "my_student.py").write_text(OWN.replace("heads: int = 2", "heads: int = 1"))
    assert not has_distillation_head(own, SIZES)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("timm/tests_vit", "students.a.model: timm has no model 'tests_vit'; did you mean timm/test_vit"),
        ("timm/hf-hub:somebody/model", "'timm/hf-hub:somebody/model' is no name of timm's; write it as timm/vit_tiny"),
        ("timm/../model", "is no name of timm's"),
        ("timm/", "is no name of timm's"),
        (
            "swin",
            "students.a.model: 'swin' is no student; choose from vit, deit, tnt, titn, or write timm/NAME or FILE",
        ),
        ("torchvision/resnet18", "is no student"),
    ],
)
def test_a_model_that_does_not_exist_is_refused_by_its_key(model: str, words: str, own: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_student(model, "students.a.model")
    check_student(own, "students.a.model")
    check_student("timm/test_vit", "students.a.model")


@pytest.mark.parametrize(
    "argument", ["pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir", "num_classes", "img_size"]
)
def test_timm_is_told_to_read_or_download_nothing(argument: str) -> None:
    with pytest.raises(UsageError, match=f"arguments.{argument}: 'x' is no argument that a recipe may give to timm/"):
        check_arguments("timm/test_vit", {argument: "x"}, "arguments")
    if argument != "num_classes":
        with pytest.raises(UsageError, match="is no argument"):
            build_student("timm/test_vit", **SIZES, **{argument: "x"})
    check_arguments("timm/test_vit", {"depth": 2}, "arguments")
    with pytest.raises(UsageError, match=r"arguments.depth: \[2\] is not a number, a text, true or false"):
        check_arguments("timm/test_vit", {"depth": [2]}, "arguments")


def test_what_timm_cannot_build_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"timm/test_vit cannot be built .* 32 pixels, depths=2: TypeError: .*depths"):
        build_student("timm/test_vit", **SIZES, depths=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_student("timm/any", "a.model")
    with pytest.raises(UsageError, match=r"model timm/test_vit needs timm, .*pip install 'titn-pipeline\[timm\]'"):
        build_student("timm/test_vit", **SIZES)
