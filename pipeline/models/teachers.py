"""The teachers: eight torchvision CNNs with their heads replaced.

The architectures are torchvision's, made for 224x224 images. They stay as they are for 32x32 images, where VGG's 7x7
pooling repeats one vector 49 times; only SqueezeNet loses its last ReLU, see `build_teacher`.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import sys
import urllib.error
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.errors import DataError, StorageError, UsageError
from pipeline.models import TEACHERS
from pipeline.models.network import decide_in_fp32
from pipeline.system.home import WAY_OUT

if TYPE_CHECKING:
    from torchvision import models

IMAGENET_CLASSES = 1000

StateDict = dict[str, Tensor]


def build_teacher(name: str, *, num_classes: int, weights: str = "none", bn_momentum: float = 0.0) -> nn.Module:
    """Build a teacher with a head for `num_classes`.

    Where the weights' head is for ImageNet's 1000 classes, the new head starts as torchvision initialises it.

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
        mode. In evaluation mode the logits are float32 under autocast too.

    Raises:
        UsageError: The name is unknown, or the path does not exist.
        DataError: The weights are damaged or do not fit.
        StorageError: They cannot be downloaded or read.

    Source: arXiv:2502.16762 §4.1, Table 2.
    Differs: SqueezeNet has no ReLU between its last convolution and the average pool. With it no logit is
        ever negative, and one that is zero on every image gets no gradient: at 32x32, where the pool averages
        a single value, a fresh head is half dead.
    """
    from torchvision import models

    _check_name(name)
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    if name == "squeezenet1_1":
        assert isinstance(model, models.SqueezeNet)
        model.classifier[2] = nn.Identity()
    decide_in_fp32(model.get_submodule(TEACHERS[name]))
    if weights == "imagenet":
        _load(model, name, _download(name))
    elif weights != "none":
        _load(model, name, _read(weights))
    if bn_momentum > 0:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = bn_momentum
    return model


def imagenet_weights(name: str) -> models.WeightsEnum:
    """Return a teacher's ImageNet weights; the file's name in `url` ends in the first digits of its SHA-256.

    They are V1, which all eight have. V2 comes from a stronger training recipe and exists for three of them: it would
    compare recipes, not architectures. The paper is silent.

    Raises:
        UsageError: The name is not in TEACHERS.
    """
    from torchvision import models

    _check_name(name)
    weights: models.WeightsEnum = models.get_model_weights(name)["IMAGENET1K_V1"]
    return weights


def weights_file(name: str) -> Path:
    """Return where torch.hub keeps a teacher's ImageNet weights."""
    return Path(torch.hub.get_dir(), "checkpoints", imagenet_weights(name).url.rsplit("/", 1)[1])


def _check_name(name: str) -> None:
    if name not in TEACHERS:
        raise UsageError(f"teacher {name!r} is unknown; choose one of {', '.join(TEACHERS)}")


def _download(name: str) -> StateDict:
    """Return a teacher's ImageNet weights from torch.hub's cache or, the first time, from their URL."""
    weights, cached = imagenet_weights(name), weights_file(name)
    if cached.parts[0] == "~":  # torch.hub would make a folder of that name here
        raise UsageError(f"teacher {name}: no home directory to keep ImageNet's weights in; {WAY_OUT}, or TORCH_HOME")
    was_cached = cached.exists()
    try:
        # torch.hub announces the download on stdout, which belongs to the caller's own output.
        with contextlib.redirect_stdout(sys.stderr):
            state: StateDict = weights.get_state_dict(
                progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu"
            )
    except Exception as error:  # an unpickler fails in many ways, among them OSError
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the server's answer, and the connection with it
        if was_cached:
            raise DataError(f"teacher {name}: {cached} is damaged; delete it and run again") from error
        if isinstance(error, OSError | http.client.HTTPException):
            raise StorageError(
                f"teacher {name}: no weights from {weights.url} ({error}); `weights: none` trains from random "
                "initialisation, `weights: PATH` loads that file downloaded elsewhere"
            ) from error
        raise DataError(f"teacher {name}: the download of {weights.url} is damaged ({error}); run again") from error
    return state


def _read(path: str) -> StateDict:
    """Read a state dict from a file."""
    if not Path(path).exists():
        raise UsageError(f"weights {path!r} does not exist; choose imagenet, none or the path of a state dict")
    if not (Path(path).is_file() or Path(path).is_dir()):  # reading a device might not end
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
    """Load a state dict into a model, except an ImageNet head where the model has other classes.

    Raises:
        DataError: A key or a shape is not the model's; the message names the first.
    """
    # DenseNet's published weights predate PyTorch's ban of dots in module names.
    state = {re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): state[key] for key in state}
    fresh = model.state_dict()
    for key in (f"{TEACHERS[name]}.weight", f"{TEACHERS[name]}.bias"):
        if key in state and state[key].shape == (IMAGENET_CLASSES, *fresh[key].shape[1:]) != fresh[key].shape:
            state[key] = fresh[key]
    for key in [*fresh, *state]:
        if key not in fresh:
            raise DataError(f"teacher {name}: weights hold the unknown key {key!r}; use a state dict of {name}")
        if key not in state:
            # Weights published before PyTorch 0.4.1 have no such counters, and load_state_dict does without.
            if not key.endswith(".num_batches_tracked"):
                raise DataError(f"teacher {name}: weights lack the key {key!r}; use a state dict of {name}")
        elif state[key].shape != fresh[key].shape:
            raise DataError(
                f"teacher {name}: weights hold {key!r} of shape {tuple(state[key].shape)}, not "
                f"{tuple(fresh[key].shape)}; use a state dict of {name}"
            )
    model.load_state_dict(state)
