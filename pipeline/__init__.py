"""A two-stage knowledge-distillation pipeline: CNN teachers, cached labels, small transformer students.

The command line is the package `stages`; everything here can be used without it. docs/titn.ipynb shows how, with
`pipeline.data.datasets.Dataset`, `pipeline.views.views.Views`, `pipeline.labels.cache.LabelCache`,
`pipeline.models.students.build_student`, `pipeline.training.fit.Fit`, `pipeline.training.evaluation.evaluate`.

Source: arXiv:2502.16762.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.system.neighbours import limit_spinning, limit_threads

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from pipeline.inference.classifier import Classifier, Transform

__version__ = "0.1.0"

limit_spinning()  # best before torch is imported, so it stands here
limit_threads()


def load(
    path: Path | str,
    *,
    format: str | None = None,
    device: str | None = "cpu",
    own_code: Collection[str] = (),
) -> tuple[Classifier, Transform]:
    """Load a trained model and the transform that makes images fit it.

        model, transform = pipeline.load("exported")
        probabilities = model(transform("cat.jpg")[None])  # (1, K); model.class_names names the columns

    The file's SHA-256 is checked against the JSON beside it, which finds damage, not malice. Nothing is unpickled. No
    file's code runs, except TorchScript: such an archive is a program, so it is loaded only if `format` asks for it.

    Args:
        path: A directory that `pipeline export` or a stage wrote, or a file in it, whose name says its format.
        format: Of an export: `safetensors`, `safetensors-bf16`, `onnx`, `onnx-int8` or `torchscript`; None takes the
            file that the path names or the first that exists, but never `torchscript`.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; None takes a GPU where there is one. ONNX files run on the CPU.
        own_code: Your own functions, `FILE.py:FUNCTION`, that may be run to build a model that has been trained from
            one of them; without it such a checkpoint is refused.

    Returns:
        The model, images `(B, 3, H, W)` uint8 to probabilities `(B, K)` float32, computed in fp32, whose `module` is
        the nn.Module that was trained; and the transform, a PIL image or a path to `(3, H, W)` uint8.

    Raises:
        UsageError: The path or the format does not exist, the path names a file of another format or a program that
            `format` does not ask for, or the device can't be used.
        DataError: The file is damaged, or no model.
    """
    from pipeline.inference.loading import load

    model = load(path, format=format, device=device, own_code=own_code)
    return model, model.transform
