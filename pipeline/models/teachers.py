"""The teachers: the paper's eight CNNs, any classification model of torchvision or timm, and a user's own.

The architectures stay as their libraries have them; the head is replaced by the library's own means. The eight are made
for 224x224 images and take 32x32 ones as they are, where VGG's 7x7 pooling repeats one vector 49 times; only SqueezeNet
loses its last ReLU, see `build_teacher`. Others see images at their own size, see `ResizedInput`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import DataError, StorageError, UsageError
from pipeline.models import TEACHERS
from pipeline.models.network import decide_in_fp32, last_layers, logit_layers
from pipeline.models.own import is_own, load_function
from pipeline.models.weights import IMAGENET_CLASSES, StateDict, download, load_state, read_state_dict

if TYPE_CHECKING:
    from torchvision import models
    from torchvision.models import VGG

Channels = tuple[float, float, float]

KINDS = f"{', '.join(TEACHERS)}, torchvision/NAME, timm/NAME or FILE.py:FUNCTION"
STEMS = ("torchvision.models.resnet", "torchvision.models.densenet")
"""The modules of torchvision whose models `stem: cifar` is for."""
HALF: Channels = (0.5, 0.5, 0.5)
_HEADS = ("fc", "head", "heads.head", "classifier")
_LIBRARY = re.compile(r"(torchvision|timm)/([a-z0-9][a-z0-9_.]*)")
# What torchvision calls the heads that help to train the layers below; see `_torchvision`.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


class TeacherInput(NamedTuple):
    """What a teacher sees.

    Attributes:
        size: Side of the images, pixels.
        mean: Of each channel, pixels in [0, 1].
        std: Of each channel, above 0.
    """

    size: int
    mean: Channels
    std: Channels


class ResizedInput(nn.Module):
    """A model that sees images of any size at its own, resized on their device: bilinear, without antialiasing.

    Args:
        module: Maps `(B, 3, input_size, input_size)` float images to `(B, K)` logits.
        input_size: Side of what it sees, pixels.
    """

    def __init__(self, module: nn.Module, input_size: int) -> None:
        super().__init__()
        self.module = module
        self.input_size = input_size

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images `(B, 3, H, W)`."""
        # Images of this size already stay as they are, bit for bit; asking for the size could not be traced.
        size = (self.input_size, self.input_size)
        logits: Tensor = self.module(nn.functional.interpolate(images, size, mode="bilinear"))
        return logits


def build_teacher(
    model: str,
    *,
    num_classes: int,
    weights: str = "none",
    bn_momentum: float = 0.0,
    input_size: int = 0,
    stem: str = "default",
    finished: bool = False,
) -> nn.Module:
    """Build a teacher with a head for `num_classes`.

    Where the weights' head is for ImageNet's 1000 classes, the new head starts as its library initialises it.

    Args:
        model: A key of TEACHERS; `torchvision/NAME`; `timm/NAME`; or `FILE.py:FUNCTION`, which is run.
        num_classes: Classes K.
        weights: `none` (random; what a user's function returns stays as it is), `imagenet` (torchvision's, downloaded
            once into torch.hub's cache and then checked against the hash in their name, or timm's pretrained ones), or
            the path of a state dict with a head for 1000 or `num_classes` classes, see `read_state_dict`.
        bn_momentum: Weight of the newest batch in every batch norm's running statistics, in [0, 1]; 0 keeps
            the architecture's own. MobileNetV3's 0.01 is too slow for short runs; the others have 0.1.
        input_size: Side at which the model sees the images, pixels, see `ResizedInput`; 0 takes them as they are.
        stem: `cifar` for ResNets, WideResNets, ResNeXts and DenseNets of torchvision: the first convolution is 3x3 with
            stride 1, and no pooling follows it, so that small images stay large.
        finished: Whether to refuse a head that the weights leave random.

    Returns:
        Model of `(B, 3, H, W)` float images to `(B, K)` logits, on the CPU, in training mode; H and W at least 32 for
        the eight, see `require_size` for others. In evaluation mode the logits are float32 under autocast too.

    Raises:
        UsageError: The name is unknown, timm is not installed, the path does not exist, the user's code fails, or the
            arguments don't go together.
        DataError: The weights are damaged or do not fit.
        StorageError: They cannot be downloaded or read.

    Source: arXiv:2502.16762 §4.1, Table 2.
    Differs: SqueezeNet has no ReLU between its last convolution and the average pool. With it no logit is
        ever negative, and one that is zero on every image gets no gradient: at 32x32, where the pool averages
        a single value, a fresh head is half dead.
    """
    _check_options(model, f"teacher {model}", weights=weights, stem=stem)
    library, name = _parts(model)
    if finished and (has := _published_classes(library, name, weights)) not in (None, num_classes):
        raise UsageError(
            f"teacher {model}: weights {weights!r} leave its head for {num_classes} classes random"
            + (f", they are for {has}" if has else "")
            + "; give `weights: PATH`, a state dict with this head, or train it: `epochs` above 0"
        )
    state: StateDict | None = None
    if library == "own":
        module = load_function(model)(num_classes=num_classes)
        heads = [_layer_name(module, layer) for layer in logit_layers(module)]
    elif library == "timm":
        module, heads = _timm(model, name, num_classes, weights)
    else:
        module, heads = _torchvision(model, name, num_classes)
        if stem == "cifar":
            _shrink_stem(module)
        if weights == "imagenet":
            state = download(model, imagenet_weights(model), weights_file(model))
    if weights not in ("imagenet", "none"):
        state = read_state_dict(weights)
    for head in heads:
        decide_in_fp32(module.get_submodule(head))
    if state is not None:
        auxiliary = _AUXILIARY.get(name, ()) if library == "torchvision" else ()
        state = {key: state[key] for key in state if not key.startswith(auxiliary)} if auxiliary else state
        if not load_state(module, model, state, heads) and finished:
            raise DataError(f"teacher {model}: weights {weights!r} have a head for 1000 classes, not {num_classes}")
    if bn_momentum > 0:
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.momentum = bn_momentum
    return ResizedInput(module, input_size) if input_size else module


class RepeatedPooling(NamedTuple):
    """A VGG that pools a 1x1 feature map, so that its first linear layer reads each value several times.

    Attributes:
        vgg: The model.
        layer: Its first linear layer.
        copies: How many times, in succession.
    """

    vgg: VGG
    layer: nn.Linear
    copies: int

    def see_once(self, layer: nn.Module) -> None:
        """Drop the pooling and put a layer that reads each value once in place of the first."""
        self.vgg.avgpool = nn.Identity()
        self.vgg.classifier[0] = layer


def repeated_pooling(teacher: nn.Module, image_size: int) -> RepeatedPooling | None:
    """Find out whether a teacher is a VGG of torchvision whose pooling only repeats what there is.

    Args:
        teacher: Any model; its mode stays.
        image_size: Side of the images, pixels.
    """
    if isinstance(teacher, ResizedInput):
        return repeated_pooling(teacher.module, teacher.input_size)
    torchvision = sys.modules.get("torchvision.models")  # takes seconds to import, and whoever has a VGG has done so
    if torchvision is None or type(teacher) is not torchvision.VGG:
        return None
    vgg: VGG = teacher
    layer, pooling = vgg.classifier[0], vgg.avgpool
    if type(layer) is not nn.Linear or not isinstance(pooling, nn.AdaptiveAvgPool2d):
        return None
    images = torch.zeros(1, 3, image_size, image_size, dtype=layer.weight.dtype, device=layer.weight.device)
    with _evaluating(teacher), torch.no_grad():
        features = vgg.features(images)
        copies = pooling(features)[0, 0].numel()
    is_repeated = features[0, 0].numel() == 1 < copies and layer.in_features == features.numel() * copies
    return RepeatedPooling(vgg, layer, copies) if is_repeated else None


def require_size(teacher: nn.Module, model: str, *, num_classes: int, image_size: int) -> None:
    """Try a teacher on a batch of two images in evaluation mode; the eight need no trial.

    Args:
        teacher: Built by `build_teacher`; its mode stays.
        model: Its name.
        num_classes: Classes K.
        image_size: Side of the images, pixels; with `ResizedInput` that of what it resizes.

    Raises:
        UsageError: The model cannot take images of this size, or its output is not `(2, K)` logits.
    """
    if model in TEACHERS:
        return
    size = teacher.input_size if isinstance(teacher, ResizedInput) else image_size
    parameter = next(teacher.parameters(), torch.empty(0))
    images = torch.zeros(2, 3, image_size, image_size, device=parameter.device)
    try:
        with _evaluating(teacher), torch.no_grad():
            logits = teacher(images)
    except Exception as error:  # a model fails in its own way
        own = _own_input(model).size
        way_out = f"its own is {own}" if own not in (None, size) else "set input_size to one that it takes"
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(
            f"teacher {model}: cannot take images of {size}x{size} pixels ({reason}); {way_out}"
        ) from error
    if not (isinstance(logits, Tensor) and logits.shape == (2, num_classes)):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"teacher {model}: returns {shape} for 2 images, not logits of shape (2, {num_classes})")


def teacher_input(
    model: str,
    *,
    weights: str,
    image_size: int,
    mean: Channels,
    std: Channels,
    input_size: int = 0,
    normalization: str = "auto",
    stem: str = "default",
) -> TeacherInput:
    """Return what a teacher sees: its recipe's values with their defaults resolved.

    A user's function may have attributes `input_size`, `mean` and `std`; what it says is then the model's own.

    Args:
        model: See `build_teacher`.
        weights: See `build_teacher`.
        image_size: Side of the data set's images, pixels.
        mean: The data set's.
        std: The data set's.
        input_size: Pixels; 0 is the data set's for the eight and with `stem: cifar`, the model's own for others.
        normalization: `data`, `model`, or `auto`: the data set's for the eight, the model's own for others where its
            weights are ImageNet's or its function says it, else the data set's.
        stem: See `build_teacher`.

    Raises:
        UsageError: The model is unknown, or has no normalisation of its own.
    """
    takes_data = model in TEACHERS or stem == "cifar"
    says = weights == "imagenet" or is_own(model)
    is_models = normalization == "model" or (normalization == "auto" and says and not takes_data)
    needs_own = is_models or not (takes_data or input_size)
    own = _own_input(model) if needs_own else _Own(None, None, None)
    if normalization == "model" and own.mean is None:
        function = model.rpartition(":")[2]
        raise UsageError(
            f"teacher {model}: normalization: model, and it has none; set {function}.mean and {function}.std in its "
            "file, or choose data"
        )
    channels = (own.mean, own.std) if is_models and own.mean is not None and own.std is not None else (mean, std)
    size = input_size or (image_size if takes_data else own.size or image_size)
    return TeacherInput(size, *channels)


def check_teacher(model: str, path: str, *, weights: str = "none", stem: str = "default") -> None:
    """Check that a teacher's name exists, and that weights and stem are for such a model; a user's file is not run.

    Args:
        model: See `build_teacher`.
        path: Its key, for messages.
        weights: See `build_teacher`.
        stem: See `build_teacher`.

    Raises:
        UsageError: It does not.
    """
    library, name = _parts(model, path)
    if library == "torchvision" and model not in TEACHERS:
        from torchvision import models

        _require_known(name, models.list_models(module=models), model, path)
    elif library == "timm":
        with contextlib.suppress(_TimmMissingError):  # which building it tells
            timm = _import_timm(model)
            if not timm.is_model(name):
                _require_known(name, timm.list_models(), model, path)
            _timm_config(name, model)
    _check_options(model, path, weights=weights, stem=stem)


def imagenet_weights(model: str) -> models.WeightsEnum:
    """Return a torchvision teacher's ImageNet weights; the file's name in `url` ends in digits of its SHA-256.

    The eight's are V1, which all of them have. V2 comes from a stronger training recipe and exists for three of them:
    it would compare recipes, not architectures. The paper is silent. Those of `torchvision/NAME` are what torchvision
    calls DEFAULT, the best that it has.

    Raises:
        UsageError: The model is none of torchvision's.
    """
    from torchvision import models

    library, name = _parts(model)
    assert library == "torchvision"
    entries = models.get_model_weights(name)
    weights: models.WeightsEnum = entries["IMAGENET1K_V1"] if model in TEACHERS else entries["DEFAULT"]
    return weights


def weights_file(model: str) -> Path:
    """Return where torch.hub keeps a torchvision teacher's ImageNet weights."""
    return Path(torch.hub.get_dir(), "checkpoints", imagenet_weights(model).url.rsplit("/", 1)[1])


def is_torchvision(model: str) -> bool:
    """Return whether a teacher is a model of torchvision: one of the eight, or `torchvision/NAME`."""
    return model in TEACHERS or model.startswith("torchvision/")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode within a block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Own(NamedTuple):
    """A model's own input; None where it has none."""

    size: int | None
    mean: Channels | None
    std: Channels | None


class _TimmMissingError(UsageError):
    """timm is not installed."""


def _parts(model: str, path: str | None = None) -> tuple[str, str]:
    """Return a teacher's library (`torchvision`, `timm` or `own`) and its name there.

    Raises:
        UsageError: It is no teacher's name; the message begins with `path`.
    """
    if model in TEACHERS:
        return "torchvision", model
    if is_own(model):
        return "own", model
    match = _LIBRARY.fullmatch(model)
    if match is None:
        if path is None:
            raise UsageError(f"teacher {model!r} is unknown; choose one of {KINDS}")
        raise UsageError(f"{path}: {model!r} is no teacher; choose from {KINDS}")
    return match[1], match[2]


def _require_known(name: str, known: list[str], model: str, path: str) -> None:
    if name not in known:
        library = model.partition("/")[0]
        similar = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(similar)}?" if similar else f"see {library}'s list of models"
        raise UsageError(f"{path}: {library} has no classification model {name!r}; {hint}")


def _check_options(model: str, path: str, *, weights: str, stem: str) -> None:
    """Check that weights and stem are for such a model; the message begins with `path`."""
    if is_own(model) and weights == "imagenet":
        raise UsageError(f"{path}.weights: imagenet: {model} is your own; write none, or the path of a state dict")
    if stem == "default":
        return
    library, name = _parts(model, path)
    if library == "torchvision":
        from torchvision import models

        if name in models.list_models(module=models) and models.get_model_builder(name).__module__ not in STEMS:
            library = "other"
    if library != "torchvision":
        raise UsageError(
            f"{path}.stem: cifar: {model} has none; torchvision's ResNets and DenseNets have, or leave it out"
        )
    if weights == "imagenet":
        raise UsageError(
            f"{path}.stem: cifar: ImageNet's weights are for the default stem; set weights to none or a path, or leave "
            "one of them out"
        )


def _torchvision(model: str, name: str, num_classes: int) -> tuple[nn.Module, list[str]]:
    """Build a model of torchvision with random weights; return it and the names of its heads."""
    from torchvision import models

    check_teacher(model, f"teacher {model}")
    options: dict[str, Any] = {}
    if name in _AUXILIARY:
        # Without auxiliary heads, whose loss the recipe has no weight for; with the initialisation that is theirs.
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": _own_input(f"torchvision/{name}").size}  # 224, but ViT-H's weights are for 518
    module: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if model == "squeezenet1_1":
        assert isinstance(module, models.SqueezeNet)
        module.classifier[2] = nn.Identity()
    return module, [TEACHERS[model] if model in TEACHERS else _head(module)]


def _head(module: nn.Module) -> str:
    """Return the name of the layer of a torchvision model that makes the logits."""
    for name in _HEADS:
        with contextlib.suppress(AttributeError):
            return _layer_name(module, last_layers(module.get_submodule(name))[-1])
    raise AssertionError(f"{type(module).__name__} has no head")


def _layer_name(module: nn.Module, layer: nn.Module) -> str:
    found: str = next(name for name, part in module.named_modules() if part is layer)
    return found


def _shrink_stem(module: nn.Module) -> None:
    """Give a ResNet or a DenseNet its stem for small images: 3x3, stride 1, no pooling."""
    from torchvision import models

    assert isinstance(module, models.ResNet | models.DenseNet)
    is_resnet = isinstance(module, models.ResNet)
    parent, name, pool = (module, "conv1", "maxpool") if is_resnet else (module.features, "conv0", "pool0")
    width = getattr(parent, name).out_channels
    convolution = nn.Conv2d(3, width, 3, stride=1, padding=1, bias=False)
    # As torchvision initialises the convolution whose place it takes.
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out" if is_resnet else "fan_in", nonlinearity="relu")
    setattr(parent, name, convolution)
    setattr(parent, pool, nn.Identity())


def _published_classes(library: str, name: str, weights: str) -> int | None:
    """Return for how many classes the weights' head is, 0 for random weights; None where only the file tells."""
    if weights == "none":
        return None if library == "own" else 0
    if weights != "imagenet":
        return None
    return IMAGENET_CLASSES if library == "torchvision" else int(_timm_config(name, f"timm/{name}").num_classes or 0)


def _own_input(model: str) -> _Own:
    """Return a model's own input, as its library or its function says it."""
    library, name = _parts(model)
    if library == "own":
        return _own_input_of(model, load_function(model))
    if library == "timm":
        config = _timm_config(name, model)
        return _Own(int(max(config.input_size[1:])), _channels(config.mean), _channels(config.std))
    preset = imagenet_weights(model).transforms()
    # With ImageNet's weights torchvision sets transform_input: GoogLeNet and Inception then turn ImageNet's
    # normalisation into that of 0.5/0.5, with which they were trained. Ours do not, so this is their own.
    own = (HALF, HALF) if name in _AUXILIARY else (_channels(preset.mean), _channels(preset.std))
    return _Own(preset.crop_size[0], *own)


def _own_input_of(model: str, function: Callable[..., nn.Module]) -> _Own:
    """Return what the attributes of a user's function say of its model's input."""
    size, mean, std = (getattr(function, name, None) for name in ("input_size", "mean", "std"))
    if size is not None and not (type(size) is int and size > 0):
        raise UsageError(f"model {model!r}: its input_size is {size!r}; write a number of pixels")
    if (mean is None) != (std is None):
        raise UsageError(f"model {model!r}: has one of mean and std; give both or none")
    if mean is None:
        return _Own(size, None, None)
    try:
        channels = _channels(mean), _channels(std)
    except (TypeError, ValueError):
        raise UsageError(f"model {model!r}: mean {mean!r} and std {std!r}; write three numbers for each") from None
    if not all(0 <= value <= 1 for value in channels[0]) or not all(0 < value <= 1 for value in channels[1]):
        raise UsageError(f"model {model!r}: mean {mean!r} and std {std!r} are of pixels in [0, 1], std above 0")
    return _Own(size, *channels)


def _channels(values: Any) -> Channels:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _import_timm(model: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise _TimmMissingError(
            f"teacher {model}: timm is not installed ({error}); install it: pip install 'titn-pipeline[timm]'"
        ) from None
    return timm


@functools.cache
def _timm_config(name: str, model: str) -> Any:
    """Return what timm says of a model's pretrained weights; where it says nothing, of its models in general."""
    timm = _import_timm(model)
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UsageError(f"teacher {model}: {error}; choose a name of timm.list_pretrained()") from None
    return config if config is not None else timm.models.PretrainedCfg()


def _timm(model: str, name: str, num_classes: int, weights: str) -> tuple[nn.Module, list[str]]:
    """Build a model of timm; return it and the names of its heads."""
    check_teacher(model, f"teacher {model}")
    timm = _import_timm(model)
    pretrained = weights == "imagenet"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module: Any = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    except Exception as error:  # of a download, or of a constructor that needs another package
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if not pretrained:
            raise UsageError(f"teacher {model}: timm cannot build it ({reason})") from error
        raise StorageError(
            f"teacher {model}: no weights from timm ({reason}); `weights: none` trains from random initialisation, "
            "`weights: PATH` loads a file downloaded elsewhere"
        ) from error
    get_classifier: Any = module.get_classifier
    classifier = get_classifier()
    parts = classifier if isinstance(classifier, tuple | list) else (classifier,)
    layers = [layer for part in parts for layer in last_layers(part)]
    return module, [_layer_name(module, layer) for layer in layers]
