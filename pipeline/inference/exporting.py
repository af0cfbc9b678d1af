"""Exported models: ONNX, TorchScript and safetensors files, made, run, and compared with PyTorch.

An ONNX or TorchScript file holds a whole pipeline.inference.classifier.PixelsToOutputs: uint8 images `(B, 3, H, W)` in,
probabilities `(B, K)` float32 out, any B. A safetensors file holds the model's weights alone, in float32, or rounded to
bfloat16 at half the size; the model computes in float32 with both.

A TorchScript archive is a program: one from a stranger can read and write files here. ONNX and safetensors files hold
no code.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.errors import DataError, NumericalError, UsageError
from pipeline.inference.classifier import INPUT, OUTPUTS, Classifier, PixelsToOutputs, Runner

OPSET = 18
BATCH_AT_EXPORT = 2
CHECK_BATCHES = (1, BATCH_AT_EXPORT, 5, 64)
"""Sizes of the batches that an export is checked on; the last size is repeated."""
NamedOutputs = Callable[[Tensor], Mapping[str, Tensor]]
"""Maps images `(B, 3, H, W)` uint8 to the outputs by name, `(B, K)` float32 each."""
TOLERANCE = 1e-4
BF16_TOLERANCE = 0.1  # for weights with 8 significant bits; top-1 says what the rounding costs
QUANTIZED_OPERATORS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Agreement:
    """How an exported model compares with PyTorch's.

    Attributes:
        max_difference: Largest difference of a probability.
        max_difference_of_all: Largest difference of any output; of logits as a share of the batch's largest, or of 1 if
            that is more.
        num_images: Images compared.
        batch_sizes: Sizes of their batches.
    """

    max_difference: float
    max_difference_of_all: float
    num_images: int
    batch_sizes: tuple[int, ...]


def to_safetensors(classifier: Classifier, dtype: torch.dtype = torch.float32) -> bytes:
    """Return the module's `state_dict` as a safetensors file, rounded to `dtype` but for integers."""
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in classifier.module.state_dict().items()
    }
    return safetensors.torch.save(tensors)


def to_onnx(classifier: Classifier, metadata: Mapping[str, str]) -> bytes:
    """Export a classifier as an ONNX file for batches of any size.

    Args:
        classifier: On the CPU, in fp32, with plain inner blocks.
        metadata: Written to the file.

    Raises:
        UsageError: The extra `onnx` is not installed, or the model is not one that PyTorch can export.
    """
    _require("onnx", "onnxruntime", "onnxscript")
    module, images = _whole(classifier)
    num_outputs = len(classifier.outputs(images))
    with _exporting("onnx", classifier):
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS[:num_outputs]),
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # The exporter notes Python's stack at every node, with this machine's paths, and shapes that can be inferred.
    for node in model.graph.node:
        del node.metadata_props[:]
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    content: bytes = model.SerializeToString()
    return content


def to_onnx_int8(content: bytes) -> bytes:
    """Quantise the matrix products of an ONNX file to 8 bits: weights by column, activations at run time.

    Weights are unsigned, because products of unsigned with signed bytes overflow on processors without VNNI.
    Convolutions are left out: onnxruntime advises against quantising them dynamically.

    Args:
        content: What `to_onnx` returned.

    Raises:
        UsageError: The model has no product with constant weights, or the extra `onnx` is not installed.
    """
    _require("onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        names = ("plain", "prepared", "quantized")
        plain, prepared, quantized = (Path(folder) / f"{name}.onnx" for name in names)
        plain.write_bytes(content)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantize_dynamic(
            prepared,
            quantized,
            op_types_to_quantize=list(QUANTIZED_OPERATORS),
            per_channel=True,
            weight_type=QuantType.QUInt8,
        )
        quantized_content = quantized.read_bytes()
    if not any(node.op_type == "MatMulInteger" for node in onnx.load_from_string(quantized_content).graph.node):
        raise UsageError("--int8: this model has no matrix product to quantise, only convolutions; leave it out")
    return quantized_content


def to_torchscript(classifier: Classifier) -> bytes:
    """Export a classifier, as `to_onnx` takes it, as a TorchScript archive for batches of any size.

    Raises:
        UsageError: The model is not one that PyTorch can export.
    """
    module, images = _whole(classifier)
    buffer = io.BytesIO()
    with _exporting("torchscript", classifier), _torchscript(), torch.no_grad():
        traced = torch.jit.trace(module, images, check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, buffer)
    return _without_sources(buffer.getvalue())


def run_onnx(content: bytes) -> Runner:
    """Load an ONNX file into onnxruntime, on the CPU, with as many threads as PyTorch has.

    Raises:
        UsageError: onnxruntime is not installed.
        DataError: The content is no ONNX file, or not one that `to_onnx` made.
    """
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime raises classes of its own, which share no base
        raise DataError(f"not a valid ONNX file: {_reason(error)}; export it again") from error
    names = [output.name for output in session.get_outputs()]
    if [entry.name for entry in session.get_inputs()] != [INPUT] or tuple(names) != OUTPUTS[: len(names)]:
        raise DataError("the ONNX file's inputs and outputs are not an export's; export it again")

    def run(images: Tensor) -> Iterable[Tensor]:
        return map(torch.from_numpy, session.run(names, {INPUT: images.contiguous().numpy()}))

    return _runner("ONNX file", run)


def run_torchscript(content: bytes, device: torch.device) -> Runner:
    """Load a TorchScript archive, which is a program: only from someone you trust.

    Raises:
        DataError: The content is no such archive.
    """
    try:
        with _torchscript():
            module = torch.jit.load(io.BytesIO(content), map_location=device)  # type: ignore[no-untyped-call]
    except Exception as error:  # its unpickler and its parser fail in many ways
        raise DataError(f"not a valid TorchScript archive: {_reason(error)}; export it again") from error

    return _runner("TorchScript archive", module)


def _runner(what: str, compute: Callable[[Tensor], Iterable[Tensor]]) -> Runner:
    """Return a Runner whose errors name the file."""

    def run(images: Tensor) -> tuple[Tensor, ...]:
        try:
            return tuple(compute(images))
        except Exception as error:
            raise DataError(f"the {what} cannot be computed: {_reason(error)}; export it again") from error

    return run


def compare(
    reference: NamedOutputs,
    exported: NamedOutputs,
    images: Tensor,
    batch_sizes: Sequence[int] = CHECK_BATCHES,
    tolerance: float = TOLERANCE,
) -> Agreement:
    """Compare an exported model with its original.

    Args:
        reference: The original's `Classifier.outputs`.
        exported: The exported model's.
        images: `(N, 3, H, W)` uint8; reused where the batches need more.
        batch_sizes: Each is used, the last for all remaining images.
        tolerance: Allowed difference of a probability; of a logit as a share of the batch's largest logit, or of 1.

    Raises:
        NumericalError: An output differs by more, or is not finite.
    """
    sizes = list(batch_sizes)
    sizes += [sizes[-1]] * max(0, -(-(len(images) - sum(sizes)) // sizes[-1]))
    start = 0
    worst = dict.fromkeys(OUTPUTS, 0.0)
    for size in sizes:
        batch = images[torch.arange(start, start + size) % len(images)]
        start += size
        expected, outputs = reference(batch), exported(batch)
        if outputs.keys() != expected.keys():
            raise NumericalError(f"its outputs are {', '.join(outputs)}, PyTorch's are {', '.join(expected)}")
        for name, value in expected.items():
            scale = 1.0 if name == OUTPUTS[0] else max(1.0, float(value.abs().max()))
            difference = float((outputs[name] - value).abs().max()) / scale
            if not difference <= tolerance:
                raise NumericalError(
                    f"its {name} differ from PyTorch's by {difference:.2g} in a batch of {size}, more than "
                    f"{tolerance:g}"
                )
            worst[name] = max(worst[name], difference)
    return Agreement(worst[OUTPUTS[0]], max(worst.values()), len(images), tuple(dict.fromkeys(sizes)))


def top1(classifier: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return a model's top-1 accuracy, percent, on images `(B, 3, H, W)` uint8 and labels `(B,)` int64."""
    correct = torch.cat([classifier(images).argmax(dim=1).cpu() == labels for images, labels in batches])
    return 100 * int(correct.sum()) / len(correct)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _require(*names: str) -> None:
    """Raise a UsageError without packages of the extra `onnx`."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"{name} is not installed, and ONNX files need it; run `pip install 'titn-pipeline[onnx]'`"
            )


def _whole(classifier: Classifier) -> tuple[nn.Module, Tensor]:
    """Return the module that maps pixels to outputs, and images to trace it with."""
    assert isinstance(classifier.runner, PixelsToOutputs), "a model is exported from its checkpoint"
    images = torch.zeros(BATCH_AT_EXPORT, 3, classifier.image_size, classifier.image_size, dtype=torch.uint8)
    return classifier.runner, images


@contextlib.contextmanager
def _exporting(format: str, classifier: Classifier) -> Iterator[None]:
    """Turn an error of PyTorch's exporters, which many a model's code gives them, into a line."""
    try:
        yield
    except Exception as error:
        model = classifier.config.get("model")
        raise UsageError(
            f"--format {format}: PyTorch cannot export {model} ({_reason(error)}); leave it out"
        ) from error


@contextlib.contextmanager
def _torchscript() -> Iterator[None]:
    """Hide PyTorch's warnings about TorchScript.

    They say that torch.export replaces it, and that models compare an image's height and width in Python. Those are
    the same for all images, and `compare` checks that batches of any size work.
    """
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", category)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def _without_sources(content: bytes) -> bytes:
    """Drop the entries that name this machine's source files; they only serve error messages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as smaller:
        for entry in archive.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                smaller.writestr(zipfile.ZipInfo(entry.filename), archive.read(entry))
    return buffer.getvalue()
