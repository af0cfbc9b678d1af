"""The teachers: eight torchvision CNNs with their heads replaced.

The architectures are torchvision's own, made for 224x224 images and left as they are for 32x32 ones: at that
size VGG's 7x7 pooling repeats a single vector 49 times, and dropout stays where torchvision has it. The one
exception is SqueezeNet's last ReLU, see `build_teacher`.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import sys
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models

from pipeline.errors import DataError, StorageError, UsageError

IMAGENET_CLASSES = 1000

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class TeacherArchitecture:
    """One torchvision architecture.

    Attributes:
        build: torchvision's builder; takes `num_classes`.
        weights: torchvision's ImageNet weights.
        head: Name of the module that makes the logits.
    """

    build: Callable[..., nn.Module]
    weights: models.WeightsEnum
    head: str


# V1 everywhere: all eight have it, while V2, from a stronger training recipe, exists for three of them and
# would compare recipes rather than architectures. The paper is silent.
TEACHERS: dict[str, TeacherArchitecture] = {
    "densenet121": TeacherArchitecture(models.densenet121, models.DenseNet121_Weights.IMAGENET1K_V1, "classifier"),
    "mobilenet_v3_large": TeacherArchitecture(
        models.mobilenet_v3_large, models.MobileNet_V3_Large_Weights.IMAGENET1K_V1, "classifier.3"
    ),
    "resnet50": TeacherArchitecture(models.resnet50, models.ResNet50_Weights.IMAGENET1K_V1, "fc"),
    "wide_resnet50_2": TeacherArchitecture(models.wide_resnet50_2, models.Wide_ResNet50_2_Weights.IMAGENET1K_V1, "fc"),
    "squeezenet1_1": TeacherArchitecture(
        models.squeezenet1_1, models.SqueezeNet1_1_Weights.IMAGENET1K_V1, "classifier.1"
    ),
    "vgg16": TeacherArchitecture(models.vgg16, models.VGG16_Weights.IMAGENET1K_V1, "classifier.6"),
    "vgg16_bn": TeacherArchitecture(models.vgg16_bn, models.VGG16_BN_Weights.IMAGENET1K_V1, "classifier.6"),
    "vgg19": TeacherArchitecture(models.vgg19, models.VGG19_Weights.IMAGENET1K_V1, "classifier.6"),
}


def build_teacher(name: str, *, num_classes: int, weights: str = "none", bn_momentum: float = 0.0) -> nn.Module:
    """Build a teacher with a head for `num_classes`.

    A head that the weights do not bring, because they classify ImageNet's 1000 classes, is initialised as
    torchvision initialises it.

    Args:
        name: A key of TEACHERS.
        num_classes: Classes K.
        weights: `none` (random), `imagenet` (torchvision's, downloaded once into torch.hub's cache and then
            checked against the hash in their name), or the path of a state dict with a head for 1000 or
            `num_classes` classes: `.safetensors`, or else torch's own format.
        bn_momentum: Weight of the newest batch in every batch norm's running statistics, in [0, 1]; 0 keeps
            the architecture's own. MobileNetV3's 0.01 is too slow for short runs; the others have 0.1.

    Returns:
        Model of `(B, 3, H, W)` float images, H and W at least 32, to `(B, K)` logits, on the CPU, in training
        mode.

    Raises:
        UsageError: Where the name is unknown or the path does not exist.
        DataError: Where the weights are damaged or do not fit.
        StorageError: Where they cannot be downloaded or read.

    Source: arXiv:2502.16762 §4.1, Table 2.
    Differs: SqueezeNet has no ReLU between its last convolution and the average pool. With it no logit is
        ever negative, and one that is zero on every image gets no gradient: at 32x32, where the pool averages
        a single value, a fresh head is half dead.
    """
    architecture = _architecture(name)
    model = architecture.build(weights=None, num_classes=num_classes)
    if name == "squeezenet1_1":
        assert isinstance(model, models.SqueezeNet)
        model.classifier[2] = nn.Identity()
    if weights == "imagenet":
        _load(model, name, _download(name))
    elif weights != "none":
        _load(model, name, _read(weights))
    if bn_momentum > 0:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = bn_momentum
    return model


def weights_url(name: str) -> str:
    """Tell where a teacher's ImageNet weights are downloaded from.

    Args:
        name: A key of TEACHERS.

    Returns:
        The URL; the file name ends in the first digits of the file's SHA-256.

    Raises:
        UsageError: Where the name is unknown.
    """
    url: str = _architecture(name).weights.url
    return url


def _architecture(name: str) -> TeacherArchitecture:
    """Look a teacher up by name."""
    if name not in TEACHERS:
        raise UsageError(f"teacher {name!r} is unknown; choose one of {', '.join(TEACHERS)}")
    return TEACHERS[name]


def _download(name: str) -> StateDict:
    """Fetch a teacher's ImageNet weights from torch.hub's cache or, the first time, from their URL."""
    url = weights_url(name)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    was_cached = cached.exists()
    try:
        # torch.hub announces the download on stdout, which belongs to the caller's own output.
        with contextlib.redirect_stdout(sys.stderr):
            state: StateDict = TEACHERS[name].weights.get_state_dict(
                progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu"
            )
    except Exception as error:  # an unpickler fails in many ways, among them OSError
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the server's answer, and the connection with it
        if was_cached:
            raise DataError(f"teacher {name}: {cached} is damaged; delete it and run again") from error
        if isinstance(error, OSError | http.client.HTTPException):
            raise StorageError(
                f"teacher {name}: no weights from {url} ({error}); `weights: none` trains from random "
                "initialisation, `weights: PATH` loads that file downloaded elsewhere"
            ) from error
        raise DataError(f"teacher {name}: the download of {url} is damaged ({error}); run again") from error
    return state


def _read(path: str) -> StateDict:
    """Read a state dict from a file."""
    if not Path(path).exists():
        raise UsageError(f"weights {path!r} does not exist; choose imagenet, none or the path of a state dict")
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):  # a device might not end
        raise DataError(f"weights {path!r} is not a file; choose imagenet, none or the path of a state dict")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise StorageError(f"weights {path!r} cannot be read ({error})") from error
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler fails in many ways
        raise DataError(f"weights {path!r} is damaged or no state dict; save model.state_dict()") from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise DataError(f"weights {path!r} holds more or less than a state dict; save model.state_dict()")
    return dict(state)


def _load(model: nn.Module, name: str, state: StateDict) -> None:
    """Load a state dict into a model, all but a head for ImageNet's classes where the model has another."""
    state = {_modern_key(key): value for key, value in state.items()}
    own = model.state_dict()
    for key in (f"{TEACHERS[name].head}.weight", f"{TEACHERS[name].head}.bias"):
        imagenet_head = key in state and state[key].shape == (IMAGENET_CLASSES, *own[key].shape[1:])
        if imagenet_head and len(own[key]) != IMAGENET_CLASSES:
            state[key] = own[key]
    _check_fits(name, own, state)
    model.load_state_dict(state)


def _modern_key(key: str) -> str:
    """Rename a key of DenseNet's published weights, which predate the ban of dots in module names."""
    return re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)


def _check_fits(name: str, own: StateDict, state: StateDict) -> None:
    """Refuse a state dict whose keys or shapes are not the model's own, naming the first that is not."""
    for key in [*own, *state]:
        if key not in own:
            raise DataError(f"teacher {name}: weights hold the unknown key {key!r}; use a state dict of {name}")
        if key not in state:
            # Weights published before PyTorch 0.4.1 have no such counters, and load_state_dict does without.
            if not key.endswith(".num_batches_tracked"):
                raise DataError(f"teacher {name}: weights lack the key {key!r}; use a state dict of {name}")
        elif state[key].shape != own[key].shape:
            raise DataError(
                f"teacher {name}: weights hold {key!r} of shape {tuple(state[key].shape)}, not "
                f"{tuple(own[key].shape)}; use a state dict of {name}"
            )
