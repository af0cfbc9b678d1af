"""Teachers beside the eight: of torchvision and timm, the user's own, their own input, and weights from anywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from pipeline.errors import DataError, UsageError
from pipeline.models.folding import fold
from pipeline.models.network import rounds_logits
from pipeline.models.teachers import (
    HALF,
    ResizedInput,
    build_teacher,
    check_teacher,
    read_state_dict,
    require_size,
    teacher_input,
)
from pipeline.system.runtime import images_at_once
from pipeline.training.distributed import synchronize_norms

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DATA: dict[str, Any] = {"image_size": 32, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
SMALL = "torchvision/shufflenet_v2_x0_5"
ALL = models.list_models(module=models)
REALLY_BUILT = ("regnet_x_400mf", "regnet_y_400mf")
# One of each of torchvision's modules.
SMALLEST = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t",
    "swin_v2_t", "vgg11", "vit_b_32",
]  # fmt: skip


def module_of(name: str) -> str:
    return models.get_model_builder(name).__module__


def head_of(module: nn.Module) -> tuple[str, nn.Module]:
    """The layer that decides in float32, and its name."""
    ((name, layer),) = [(name, part) for name, part in module.named_modules() if part._forward_hooks]
    return name, layer


@pytest.mark.parametrize("names", [SMALLEST, pytest.param(ALL, marks=pytest.mark.slow)], ids=["smallest", "all"])
def test_every_classification_model_of_torchvision_gets_its_head_for_ten_classes(names: list[str]) -> None:
    assert len(ALL) >= 80 and {module_of(name) for name in SMALLEST} == {module_of(name) for name in ALL}
    for name in names:
        if name.startswith("regnet_") and name not in REALLY_BUILT:
            # On the device meta a RegNet fails, and the largest has 645 million parameters.
            assert module_of(name) == "torchvision.models.regnet"
            continue
        with torch.device("cpu" if name in REALLY_BUILT else "meta"):
            module = build_teacher(f"torchvision/{name}", num_classes=10)
        where, head = head_of(module)
        assert re.fullmatch(r"fc|head|heads\.head|classifier(\.\d+)?", where), name
        outputs = head.out_features if isinstance(head, nn.Linear) else head.out_channels
        assert outputs == 10, name
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        assert layers[-1] is head, name
        assert not any("aux" in part.lower() and layer is not None for part, layer in module.named_children()), name


@pytest.mark.parametrize(
    ("model", "recipe", "size", "channels"),
    [
        ("resnet50", {"weights": "imagenet"}, 32, None),
        ("resnet50", {"weights": "imagenet", "normalization": "model", "input_size": 64}, 64, IMAGENET),
        ("torchvision/convnext_tiny", {"weights": "imagenet"}, 224, IMAGENET),
        ("torchvision/convnext_tiny", {"weights": "none"}, 224, None),
        ("torchvision/convnext_tiny", {"weights": "imagenet", "normalization": "data", "input_size": 48}, 48, None),
        ("torchvision/googlenet", {"weights": "imagenet"}, 224, (HALF, HALF)),
        ("torchvision/vit_h_14", {"weights": "imagenet"}, 518, IMAGENET),
        ("torchvision/resnet18", {"weights": "none", "stem": "cifar"}, 32, None),
        ("timm/test_vit", {"weights": "imagenet"}, 160, (HALF, HALF)),
        ("timm/test_vit", {"weights": "w.pth"}, 160, None),
    ],
)
def test_a_teachers_input_is_the_data_sets_for_the_eight_and_its_own_for_others(
    model: str, recipe: dict[str, Any], size: int, channels: tuple[Any, Any] | None
) -> None:
    assert teacher_input(model, **recipe, **DATA) == (size, *(channels or (DATA["mean"], DATA["std"])))


def test_a_users_function_says_its_models_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "from torch import nn\n\ndef build(num_classes):\n    return nn.Flatten()\n"
    Path("plain.py").write_text(code)
    Path("says.py").write_text(
        f"{code}\nbuild.input_size, build.mean, build.std = 48, [0.5, 0.5, 0.5], [0.2, 0.2, 0.2]\n"
    )
    data = (DATA["mean"], DATA["std"])
    assert teacher_input("plain.py:build", weights="none", **DATA) == (32, *data)
    assert teacher_input("says.py:build", weights="w.pth", **DATA) == (48, HALF, (0.2, 0.2, 0.2))
    assert teacher_input("says.py:build", weights="none", normalization="data", **DATA) == (48, *data)
    with pytest.raises(UsageError, match=r"normalization: model, and it has none; set build.mean and build.std"):
        teacher_input("plain.py:build", weights="none", normalization="model", **DATA)


OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, name):
        super().__init__()
        setattr(self, name, nn.Linear(8, num_classes))
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8))
        self.name = name

    def forward(self, images):
        return getattr(self, self.name)(self.body(images))

def named(num_classes):
    return Net(num_classes, "head")

def unnamed(num_classes):
    return Net(num_classes, "fc")
"""


def test_the_layer_that_decides_is_found_by_its_name_and_another_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    named, unnamed = (build_teacher(f"own.py:{name}", num_classes=3, bn_momentum=0.5) for name in ("named", "unnamed"))
    images = torch.zeros(2, 3, 4, 4)
    assert head_of(named)[0] == "head" and not rounds_logits(named, images)
    assert rounds_logits(unnamed, images) and unnamed.training
    assert [part.momentum for part in named.modules() if isinstance(part, nn.BatchNorm1d)] == [0.5]
    state = {name: torch.zeros(1000, *value.shape[1:]) if name.startswith("head") else value
             for name, value in named.state_dict().items()}  # fmt: skip
    torch.save(state, "w.pt")
    build_teacher("own.py:named", num_classes=3, weights="w.pt")


def test_images_are_resized_on_the_way_in_as_torch_does_without_antialiasing() -> None:
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.mean((2, 3))

    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = ResizedInput(Recorder(), 12)
    model(images)
    model(expected := nn.functional.interpolate(images, 12, mode="bilinear", antialias=False, align_corners=False))
    assert torch.equal(seen[0], expected) and torch.equal(seen[1], expected)
    cpu, large = torch.device("cpu"), ResizedInput(Recorder(), 224)
    assert images_at_once(cpu, 32, large) == images_at_once(cpu, 224) < images_at_once(cpu, 32)


def test_a_size_that_a_model_cannot_take_is_refused_by_name() -> None:
    name = "timm/test_vit3"
    fixed = build_teacher(name, num_classes=7)
    with pytest.raises(UsageError, match=rf"{name}: cannot take images of 32x32 pixels \(.*\); its own is 160"):
        require_size(fixed, name, num_classes=7, image_size=32)
    resized = build_teacher(name, num_classes=7, input_size=160)
    require_size(resized, name, num_classes=7, image_size=32)
    assert all(module.training for module in resized.modules())
    with pytest.raises(UsageError, match=r"returns \(2, 7\) for 2 images, not logits of shape \(2, 8\)"):
        require_size(resized, name, num_classes=8, image_size=32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: check_teacher("torchvision/convnext_tony", "k"),
            "k: torchvision has no .*'convnext_tony'; did you mean",
        ),
        (lambda: check_teacher("torchvision/fcn_resnet50", "k"), "k: torchvision has no classification model"),
        (lambda: check_teacher("timm/tset_vit", "k"), "k: timm has no .* 'tset_vit'; did you mean test_vit"),
        (lambda: check_teacher("timm/test_vit.foo", "k"), "timm/test_vit.foo: Invalid pretrained tag"),
        (lambda: check_teacher("timm/hf-hub:a/b", "k"), "k: 'timm/hf-hub:a/b' is no teacher; choose from densenet121"),
        (lambda: check_teacher("timm/../a", "k"), "k: 'timm/../a' is no teacher"),
        (lambda: check_teacher("a.py:b", "k", weights="imagenet"), "k.weights: imagenet: a.py:b is your own"),
        (lambda: check_teacher("vgg16", "k", stem="cifar"), "k.stem: cifar: vgg16 has none; torchvision's ResNets"),
        (lambda: check_teacher("timm/test_vit", "k", stem="cifar"), "k.stem: cifar: timm/test_vit has none"),
        (lambda: check_teacher("resnet50", "k", weights="imagenet", stem="cifar"), "k.stem: cifar: ImageNet's weights"),
        (lambda: build_teacher("resnet50", num_classes=7, finished=True), "leave its head for 7 classes random; give"),
        (
            lambda: build_teacher("timm/test_vit", num_classes=7, weights="imagenet", finished=True),
            "leave its head for 7 classes random, they are for 1000",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_timms_models_keep_their_own_head_and_decide_in_float32() -> None:
    torch.manual_seed(0)
    ours = build_teacher("timm/test_resnet", num_classes=7).eval()
    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet", num_classes=7).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
        with torch.autocast("cpu", torch.bfloat16):
            assert (ours(images).dtype, theirs(images).dtype) == (torch.float32, torch.bfloat16)
    assert head_of(ours)[0] == "fc"


def test_timms_norms_keep_their_activation_where_ranks_share_statistics() -> None:
    model = build_teacher("timm/test_efficientnet", num_classes=7).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(images)
        synchronize_norms(model)
        assert any(isinstance(part, nn.SyncBatchNorm) for part in model.modules())
        torch.testing.assert_close(model(images), before)

    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(UsageError, match="Own: batch norms of their own cannot be synchronised"):
        synchronize_norms(nn.Sequential(Own(3)))


@pytest.mark.parametrize(
    ("name", "stem"), [("torchvision/resnet18", ("conv1", "bn1", "relu", "maxpool")), ("densenet121", ("features",))]
)
def test_the_stem_for_small_images_keeps_their_size(name: str, stem: tuple[str, ...]) -> None:
    module = build_teacher(name, num_classes=7, stem="cifar")
    layers = [*module.features][:4] if name == "densenet121" else [module.get_submodule(part) for part in stem]
    features = nn.Sequential(*layers)(torch.zeros(1, 3, 32, 32))
    assert features.shape == (1, 64, 32, 32)
    assert layers[0].weight.shape == (64, 3, 3, 3)
    # As torchvision draws it: He's initialisation, fan-out for ResNets and fan-in for DenseNets.
    fan = 64 * 9 if "resnet" in name else 3 * 9
    assert layers[0].weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.1)


def nested(state: dict[str, Tensor], how: str) -> dict[str, Any]:
    if how in ("state_dict", "model", "model_state_dict", "net", "module"):
        return {how: state, "epoch": 3, "optimizer": {"state": {}, "lr": 0.1}}
    return {f"{how}{key}": value for key, value in state.items()}


@pytest.mark.parametrize(
    "how", ["state_dict", "model", "model_state_dict", "net", "module", "module.", "model.", "_orig_mod.module."]
)
def test_a_state_dict_is_found_in_a_scripts_checkpoint_and_without_its_wrappers_names(tmp_path: Path, how: str) -> None:
    state = nn.Linear(2, 3).state_dict()
    torch.save(nested(state, how), tmp_path / "w.pth")
    read = read_state_dict(str(tmp_path / "w.pth"))
    assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state)


def test_weights_of_other_libraries_load_but_for_an_imagenet_head(tmp_path: Path) -> None:
    source = models.shufflenet_v2_x0_5().state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in source.items()}}, tmp_path / "w.pth")
    path = str(tmp_path / "w.pth")
    loaded = build_teacher(SMALL, num_classes=7, weights=path).state_dict()
    assert all(torch.equal(loaded[key], source[key]) for key in source if not key.startswith("fc."))
    assert loaded["fc.weight"].shape == (7, 1024)
    with pytest.raises(DataError, match="have a head for 1000 classes, not 7"):
        build_teacher(SMALL, num_classes=7, weights=path, finished=True)
    finished = build_teacher(SMALL, num_classes=1000, weights=path, finished=True).state_dict()
    assert torch.equal(finished["fc.weight"], source["fc.weight"])


def test_a_users_model_whose_names_begin_like_a_wrappers_loads_its_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from torch import nn\n\nclass Wrapped(nn.Module):\n    def __init__(self, k):\n        super().__init__()\n"
        "        self.model = nn.Linear(2, k)\n\ndef build(num_classes):\n    return Wrapped(num_classes)\n"
    )
    source = build_teacher("mine.py:build", num_classes=3).state_dict()
    assert list(source) == ["model.weight", "model.bias"]
    for name, prefix in (("own.pth", ""), ("parallel.pth", "module.")):
        torch.save({f"{prefix}{key}": value for key, value in source.items()}, name)
        loaded = build_teacher("mine.py:build", num_classes=3, weights=name, finished=True).state_dict()
        assert torch.equal(loaded["model.weight"], source["model.weight"])


def test_auxiliary_heads_of_published_weights_are_left_out(tmp_path: Path) -> None:
    source = models.googlenet(aux_logits=True, init_weights=False).state_dict()
    assert any(key.startswith("aux1.") for key in source)
    torch.save(source, tmp_path / "w.pth")
    loaded = build_teacher("torchvision/googlenet", num_classes=7, weights=str(tmp_path / "w.pth")).state_dict()
    assert not any(key.startswith("aux") for key in loaded)
    assert torch.equal(loaded["conv1.conv.weight"], source["conv1.conv.weight"])


def test_a_model_is_folded_where_it_can_be_traced_and_otherwise_taken_as_it_is() -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name, size, expected in (("timm/test_vit", 160, False), (SMALL, 64, True)):
        model = build_teacher(name, num_classes=7, input_size=size)
        folded, is_folded = fold(model, 32)
        assert (is_folded, folded.training, model.training) == (expected, False, True)
        assert isinstance(folded, ResizedInput)
        assert not {id(part) for part in folded.parameters()} & {id(part) for part in model.parameters()}
        with torch.no_grad():
            torch.testing.assert_close(folded(images), model.eval()(images), rtol=1e-4, atol=1e-5)
        norms = [any(isinstance(part, nn.BatchNorm2d) for part in each.modules()) for each in (model, folded)]
        assert norms == [expected, False]
