"""Running a teacher over views.

A label is the argmax of logits that rounding moves a little. So it is a function of view, checkpoint, precision, kind
of device and whether the model is compiled, all of which the label cache records; and of batch size, threads, memory
layout and folding only where two logits nearly tie. Measured on CIFAR-100's training images with weak teachers
(MobileNetV3 and ResNet-50, 14 and 11 % top-1), 8,192 views each, two CPU cores:

- fp32: no label changed with batch size (7, 64), threads, layout or folding; logits moved by at most 0.00085.
- bf16 against fp32: MobileNetV3 changed 97 and 118 labels (crop and flip; with AutoAugment and CutMix), ResNet-50 26.
  All but 3 of these had a margin below 0.25; the largest was 3.1.
- bf16 throughout, as torchvision builds the model, tied its two largest logits exactly on 1 to 4 % of the views, since
  they have 8 significant bits; so the last layer stays in fp32 (pipeline.models.network), after which none tied.

A batch holds one view only, so that no label depends on where a run was stopped or which rank made it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.data.streaming import HostImages, in_batches
from pipeline.errors import NumericalError, UsageError
from pipeline.labels.answers import ViewLabels
from pipeline.models.network import Network
from pipeline.views.mixing import by_pairs
from pipeline.views.parcel import fetch
from pipeline.views.views import Views


class Teacher(Network):
    """A trained teacher, ready to label.

    Args:
        module: Returns `(B, C)` logits; in evaluation mode, on its device.
        mean: Normalisation of its inputs, pixels in [0, 1].
        std: As mean.
        precision: `fp32` or `bf16`.
        batch_size: Images a forward pass.
        compiled: Whether the module went through torch.compile, see `compile_teacher`.
    """

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float] | Tensor,
        std: Sequence[float] | Tensor,
        precision: str,
        batch_size: int,
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__(module, mean, std, precision)
        self.batch_size = batch_size
        self.compiled = compiled

    def logits(self, inputs: Tensor) -> Tensor:
        """Return `(B, C)` float32 logits of normalised images `(B, 3, H, W)`.

        Raises:
            NumericalError: A logit is not finite; argmax would still return a valid label.
        """
        logits = self._forward(inputs)
        require_finite(torch.isfinite(logits))
        return logits

    def ask(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of pixels, and whether all are finite, without waiting for the device.

        Args:
            images: `(B, 3, H, W)` uint8.

        Returns:
            `(B, C)` float32, and a boolean scalar for `require_finite`, both on the device.
        """
        logits = self._forward(self.normalize(images))
        return logits, torch.isfinite(logits).all()

    def label(self, images: Tensor | HostImages) -> NDArray[np.int64]:
        """Return the argmax labels `(N,)` of uint8 images `(N, 3, H, W)`, on the device or on the host for it.

        Raises:
            NumericalError: A logit is not finite.
        """
        return self.answers(in_batches(images, self.batch_size)).labels

    def answers(self, batches: Iterable[Tensor], topk: int = 0) -> ViewLabels:
        """Answer to batches of images; there is one transfer from the device, after the last batch.

        Args:
            batches: uint8 images `(B, 3, H, W)` each, N in all.
            topk: Most probable classes to keep of each image, K, at most C; 0 keeps the argmax alone.

        Returns:
            Int64 labels `(N,)`, and where asked int32 classes and float16 probabilities, `(N, K)` each.

        Raises:
            NumericalError: A logit is not finite.
        """
        rows, finite = [], []
        for images in batches:
            logits, is_finite = self.ask(images)
            rows.append(_pack(logits, topk))
            finite.append(is_finite)
        are_finite, answers = fetch([torch.stack(finite), torch.cat(rows)])
        require_finite(are_finite)
        return _unpack(answers.numpy(), topk)

    @torch.inference_mode()
    def _forward(self, inputs: Tensor) -> Tensor:
        logits = super().logits(inputs)
        assert isinstance(logits, Tensor), "a teacher has one head"
        return logits.float()


class Ensemble(Teacher):
    """Several teachers that answer as one: the probability of a class is the mean of theirs.

    Its inputs are uint8 images, for each member normalises them itself, and its logits the logarithm of the mean
    probabilities; so whatever a teacher is used for, labels, top-k or online distillation, an ensemble is too.

    Args:
        members: Teachers of the same classes on the same device, in the same precision.
    """

    def __init__(self, members: Sequence[Teacher]) -> None:
        first, batch_size = members[0], min(member.batch_size for member in members)
        is_compiled = all(member.compiled for member in members)
        unchanged = torch.zeros_like(first.mean), torch.ones_like(first.std)
        super().__init__(nn.ModuleList(members), *unchanged, first.precision, batch_size, compiled=is_compiled)
        self.members = tuple(members)

    def normalize(self, images: Tensor) -> Tensor:
        """Return the images as they are, `(B, 3, H, W)` uint8."""
        return images

    @torch.inference_mode()
    def _forward(self, inputs: Tensor) -> Tensor:
        shares = torch.stack([_log_probabilities(member._forward(member.normalize(inputs))) for member in self.members])
        return shares.logsumexp(0) - math.log(len(self.members))


def _log_probabilities(logits: Tensor) -> Tensor:
    """Return the log-softmax of `(B, C)` logits; NaN where one is not finite, which a mean could hide."""
    return logits.log_softmax(1).masked_fill(~torch.isfinite(logits).all(1, keepdim=True), math.nan)


def compile_teacher(teacher: Teacher, image_size: int) -> Teacher:
    """Return a teacher whose module is compiled by torch.compile, which changes its rounding.

    The batch size is symbolic from the start, so that a batch's program depends on its size alone. By default PyTorch
    compiles for the first size, then again for all sizes: the rounding would depend on what was labelled before.

    Args:
        teacher: A teacher that is not compiled.
        image_size: Side of the images, pixels.

    Raises:
        UsageError: torch.compile does not work here.
    """
    module = torch.compile(teacher.module, dynamic=True)
    assert isinstance(module, nn.Module)
    compiled = Teacher(module, teacher.mean, teacher.std, teacher.precision, teacher.batch_size, compiled=True)
    try:
        compiled.logits(torch.zeros(2, 3, image_size, image_size, device=teacher.mean.device))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"label.compile: true: torch.compile fails here ({reason}); set it to false or install a C++ compiler"
        ) from error
    return compiled


def label_view(teacher: Teacher, views: Views, view: int, topk: int = 0) -> ViewLabels:
    """Return the teacher's answers to a whole view.

    Each view begins a new batch, so that batches depend on the batch size alone, not on where a run was stopped or
    which rank labels the view. Those of a view of pairs are labelled pair by pair.

    Raises:
        NumericalError: A logit is not finite.
    """
    order = by_pairs(np.arange(views.num_samples), views.pairs(view))
    parts = torch.split(torch.from_numpy(order), teacher.batch_size)
    with contextlib.closing(views.batches(view, parts)) as batches:
        try:
            return teacher.answers((batch.images for batch in batches), topk).take(np.argsort(order))
        except NumericalError as error:
            raise NumericalError(f"view {view}, {error}") from None


def top_classes(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the most probable classes and their probabilities.

    Args:
        logits: `(B, C)` float32, finite.
        topk: Classes to return, K, in 1..C.

    Returns:
        `(B, K)` int64, the argmax first even among equal logits, and `(B, K)` float32, descending: the softmax over
        all C classes.
    """
    # topk breaks ties in its own way; the label is the argmax's.
    classes = logits.scatter(1, logits.argmax(1, keepdim=True), math.inf).topk(topk, dim=1).indices
    # Vectorised exponentials of equal logits may differ in their last bit.
    return classes, logits.softmax(1).gather(1, classes).cummin(1).values


def require_finite(finite: Tensor) -> None:
    """Raise NumericalError unless all of a boolean tensor is true: logits that were finite."""
    if not finite.all():
        raise NumericalError("labelling: a logit of the teacher is not finite; train the teacher again")


def _pack(logits: Tensor, topk: int) -> Tensor:
    """Return the answers to `(B, C)` logits as one int32 tensor, because each transfer waits for the device."""
    if topk == 0:
        return logits.argmax(1, keepdim=True).int()
    classes, probabilities = top_classes(logits, topk)
    return torch.cat([classes.int(), probabilities.half().view(torch.int16).int()], dim=1)


def _unpack(packed: NDArray[np.int32], topk: int) -> ViewLabels:
    """Undo `_pack`."""
    labels = packed[:, 0].astype(np.int64)
    if topk == 0:
        return ViewLabels(labels)
    classes, bits = np.split(packed, 2, axis=1)
    return ViewLabels(labels, classes, bits.astype(np.int16).view(np.float16))
