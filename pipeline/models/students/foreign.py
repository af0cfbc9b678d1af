"""Students that are no class of ours: any classifier of timm, and what a user's own function builds.

timm is imported only where one of its models is named, and never downloads: weights are random.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UsageError, one_line
from pipeline.models.network import last_layers, logit_layers
from pipeline.models.own import code_sha256, is_own, load_function
from pipeline.models.students.layers import Student

TIMM = "timm/"
NUM_TRIED = 2
"""Images of the batch that a student is tried on: batch norm cannot train on one."""
_NAME = re.compile(rf"{TIMM}[a-z0-9][a-z0-9_.]*")
_OURS = ("num_classes", "image_size")
# What create_model takes for itself: a checkpoint's JSON must not make us read, download or run anything.
_TIMMS = (
    "model_name", "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "features_only", "img_size",
)  # fmt: skip


class ForeignStudent(Student):
    """A model of timm or of a user's function.

    A timm model with a head for distillation gives the logits of both heads, in evaluation too, where it would return
    their mean.

    Args:
        module: Maps normalised images to the logits of one head or of two, `(B, K)` each.
    """

    module: Any

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        if hasattr(module, "set_distilled_training"):
            self.module.set_distilled_training(True)

    def train(self, mode: bool = True) -> ForeignStudent:
        """Set training or evaluation mode.

        Of timm's layers that return both heads in training alone only the parts are set.
        """
        super().train(mode)
        for layer in self.modules():
            if getattr(layer, "distilled_training", False):
                layer.training = True
        return self

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Classify images.

        Args:
            images: `(B, 3, image_size, image_size)` float, normalised.

        Returns:
            `(B, K)` class logits, or class logits and distillation logits.
        """
        outputs: Tensor | tuple[Tensor, ...] | list[Tensor] = self.module(images)
        if not isinstance(outputs, tuple | list):
            return outputs
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @property
    def logit_layers(self) -> list[nn.Module]:
        """The layers that make the logits, as timm's models say, or as a student's names do."""
        heads = self.module.get_classifier() if hasattr(self.module, "get_classifier") else None
        known = [head for head in (heads if isinstance(heads, tuple) else (heads,)) if isinstance(head, nn.Module)]
        return [layer for head in known for layer in last_layers(head)] or logit_layers(self.module)


def is_foreign(model: str) -> bool:
    """Return whether a student's model is one of timm or of a user's function."""
    return model.startswith(TIMM) or is_own(model)


def check_foreign(model: str, path: str) -> None:
    """Check that timm, where it is installed, has a model. A user's file is not looked at: building the model tells.

    Args:
        model: `timm/NAME` or `FILE.py:FUNCTION`.
        path: Its key, for messages.

    Raises:
        UsageError: It has not, or the name is none.
    """
    if is_own(model):
        return
    if _NAME.fullmatch(model) is None:
        raise UsageError(f"{path}: {model!r} is no name of timm's; write it as timm/vit_tiny_patch16_224")
    if importlib.util.find_spec("timm") is None:
        return
    timm, name = _timm(model), model.removeprefix(TIMM)
    if not timm.is_model(name):
        near = [f"{TIMM}{other}" for other in difflib.get_close_matches(name, timm.list_models())]
        resembling = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() names all"
        raise UsageError(f"{path}: timm has no model {name!r}{resembling}")


def check_foreign_arguments(model: str, arguments: Mapping[str, Any], path: str) -> None:
    """Check the arguments that a recipe or a checkpoint gives to timm or to a user's function.

    Raises:
        UsageError: An argument is given by us, is not for the model itself, or is no plain value.
    """
    for key, value in arguments.items():
        if type(value) not in (int, float, str, bool):
            raise UsageError(f"{path}.{key}: {value!r} is not a number, a text, true or false")
        if key in _OURS or (not is_own(model) and (key in _TIMMS or key.startswith("pretrained"))):
            raise UsageError(f"{path}.{key}: {value!r} is no argument that a recipe may give to {model}; leave it out")


def build_foreign(model: str, *, num_classes: int, image_size: int, **arguments: Any) -> ForeignStudent:
    """Build a student of timm, or by a user's function, which is run.

    Args:
        model: `timm/NAME` or `FILE.py:FUNCTION`.
        num_classes: Classes K.
        image_size: Side of the images, pixels. A timm model that has no such argument takes images of any size.
        arguments: Others.

    Raises:
        UsageError: It cannot be built.
    """
    if is_own(model):
        return ForeignStudent(load_function(model)(num_classes=num_classes, image_size=image_size, **arguments))
    check_foreign(model, "model")
    check_foreign_arguments(model, arguments, "arguments")
    build = functools.partial(_timm(model).create_model, model.removeprefix(TIMM), num_classes=num_classes, **arguments)
    try:
        try:
            return ForeignStudent(build(img_size=image_size))
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return ForeignStudent(build())
    except Exception as error:  # whatever timm's constructors raise
        given = "".join(f", {key}={value!r}" for key, value in arguments.items())
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        raise UsageError(f"model {model} cannot be built for images of {image_size} pixels{given}: {reason}") from error


def num_heads(model: str, arguments: Mapping[str, Any]) -> int:
    """Return how many heads a student has, 1 or 2: it is built and tried on a batch, once a process.

    PyTorch's generator is as before.

    Args:
        model: `timm/NAME` or `FILE.py:FUNCTION`.
        arguments: Of `build_foreign`.

    Raises:
        UsageError: It cannot be built, fails, or gives no logits.
    """
    return _num_heads(model, json.dumps(dict(arguments), sort_keys=True), code_sha256(model))


@functools.cache
def _num_heads(model: str, arguments: str, code: str | None) -> int:
    given = json.loads(arguments)
    with torch.random.fork_rng(devices=[]):
        student = build_foreign(model, **given)
        return _try(student, model, given["num_classes"], given["image_size"])


def _try(student: nn.Module, model: str, num_classes: int, image_size: int) -> int:
    """Try a student on images of noise in training and evaluation mode; return its number of heads."""
    images = torch.randn(NUM_TRIED, 3, image_size, image_size)
    needed = f"needed are logits {(NUM_TRIED, num_classes)}, or two of them, of the class and the distillation head"
    counts = []
    for mode in ("training", "evaluation"):
        student.train(mode == "training")
        where = f"model {model} in {mode} mode, for images {tuple(images.shape)}"
        try:
            with torch.no_grad():
                outputs = student(images)
        except Exception as error:  # whatever a user's code raises
            raise UsageError(f"{where}: {type(error).__name__}: {one_line(str(error))}") from error
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        if not all(isinstance(head, Tensor) and head.is_floating_point() for head in heads):
            kinds = ", ".join(type(head).__name__ for head in heads)
            raise UsageError(f"{where}: it returns {kinds}; {needed}")
        if len(heads) > 2 or any(head.shape != (NUM_TRIED, num_classes) for head in heads):
            shapes = ", ".join(str(tuple(head.shape)) for head in heads)
            raise UsageError(f"{where}: it returns {shapes}; {needed}")
        counts.append(len(heads))
    if counts[0] != counts[1]:
        raise UsageError(
            f"model {model} has {counts[0]} outputs in training mode and {counts[1]} in evaluation mode; return both "
            "heads, or the class head alone, in both modes"
        )
    return counts[0]


def _timm(model: str) -> Any:
    """Import timm."""
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"model {model} needs timm, which is not installed; run `pip install 'titn-pipeline[timm]'`")
    import timm

    return timm
