"""A stand-in for Apple's GPU: tensors without values, of which none may be float64."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STAND_IN = torch.device("meta")


class WithoutFloat64(TorchDispatchMode):
    """Lets PyTorch's meta device stand in for a device without float64; whatever is read from it is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        with self:  # in inference mode compound operations arrive whole
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and value.is_meta and value.dtype == torch.float64:
                raise TypeError(f"{func}: the device has no float64")
        return result
