"""State dicts for teachers: read from files, downloaded, and loaded into a model with another head."""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import sys
import urllib.error
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.errors import DataError, StorageError, UsageError
from pipeline.system.home import WAY_OUT
from pipeline.system.storage import has_file

if TYPE_CHECKING:
    from torchvision import models

StateDict = dict[str, Tensor]

IMAGENET_CLASSES = 1000
NESTINGS = ("state_dict", "model", "model_state_dict", "net", "module")
"""Keys under which training scripts keep a model's state dict beside their own state."""
PREFIXES = ("module.", "model.", "_orig_mod.")
"""What wrappers put before every name: data parallelism, Lightning and the like, torch.compile."""


def read_state_dict(path: str) -> StateDict:
    """Read a state dict from a file.

    Nothing in the file is run: torch's format is read with `weights_only=True`. Of a training script's checkpoint the
    state dict is taken, see NESTINGS; PREFIXES that all names have are taken off.

    Args:
        path: `.safetensors`, or else torch's own format.

    Returns:
        Tensors on the CPU, by name.

    Raises:
        UsageError: The path does not exist.
        DataError: It is no file, or holds no state dict.
        StorageError: It cannot be read.
    """
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
            state: Any = safetensors.torch.load(content)
        else:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler fails in many ways
        raise DataError(f"weights {path!r} is damaged or no state dict; save model.state_dict()") from error
    if isinstance(state, Mapping) and not _is_state_dict(state):
        state = next((state[key] for key in NESTINGS if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not _is_state_dict(state):
        raise DataError(f"weights {path!r} holds more or less than a state dict; save model.state_dict()")
    return dict(zip(_without_prefixes(state), state.values(), strict=True))


def download(model: str, weights: models.WeightsEnum, cached: Path) -> StateDict:
    """Return ImageNet weights from torch.hub's cache or, the first time, from their URL.

    Args:
        model: The teacher's name, for messages.
        weights: Whose `url` ends in the first digits of the file's SHA-256.
        cached: Where torch.hub keeps them.

    Raises:
        UsageError: There is no folder to keep them in.
        DataError: They are damaged.
        StorageError: They cannot be had.
    """
    if cached.parts[0] == "~":  # torch.hub would make a folder of that name here
        raise UsageError(f"teacher {model}: no home directory to keep ImageNet's weights in; {WAY_OUT}, or TORCH_HOME")
    was_cached = has_file(cached)
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
            raise DataError(f"teacher {model}: {cached} is damaged; delete it and run again") from error
        if isinstance(error, OSError | http.client.HTTPException):
            raise StorageError(
                f"teacher {model}: no weights from {weights.url} ({error}); `weights: none` trains from random "
                "initialisation, `weights: PATH` loads that file downloaded elsewhere"
            ) from error
        raise DataError(f"teacher {model}: the download of {weights.url} is damaged ({error}); run again") from error
    return state


def load_state(module: nn.Module, name: str, state: StateDict, heads: Collection[str]) -> bool:
    """Load a state dict into a model, except an ImageNet head where the model has other classes.

    Args:
        module: The model.
        name: The teacher's name, for messages.
        state: See `read_state_dict`.
        heads: Names of the layers that make the logits.

    Returns:
        Whether the head was loaded too.

    Raises:
        DataError: A key or a shape is not the model's; the message names the first.
    """
    # DenseNet's published weights predate PyTorch's ban of dots in module names.
    state = {re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): state[key] for key in state}
    fresh = module.state_dict()
    # `read_state_dict` takes prefixes off; a model whose own names all begin with one needs them back.
    names = dict(zip(_without_prefixes(fresh), fresh, strict=True))
    state = {names.get(key, key): value for key, value in state.items()}
    loads_head = True
    for key in (f"{head}.{part}" for head in heads for part in ("weight", "bias")):
        if key in state and key in fresh:
            if state[key].shape == (IMAGENET_CLASSES, *fresh[key].shape[1:]) != fresh[key].shape:
                state[key], loads_head = fresh[key], False
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
    module.load_state_dict(state)
    return loads_head


def _is_state_dict(tree: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in tree.items())


def _without_prefixes(names: Collection[str]) -> list[str]:
    """Take off PREFIXES, one after the other, as long as all names begin with one."""
    names = list(names)
    while names and (prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in names)), None)):
        names = [name.removeprefix(prefix) for name in names]
    return names
