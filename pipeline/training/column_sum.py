"""A linear layer that reads one vector several times over, trained as the sum of its columns.

torchvision's VGGs pool their feature map to 7x7. Below 64x64 pixels the map is 1x1, and the first linear layer reads
the same 512 values n = 49 times: y = (W_1 + ... + W_n) x + b. So all W_j have one gradient G, and differ by D_j, what
weight decay has left of their differences at the start. `ColumnSum` trains P = (W_1 + ... + W_n) / √n in their place.
It is an orthonormal coordinate of the W_j, so that but for rounding

- the gradient of P is √n G, of the norm of n times G: clipping sees the norm that it saw;
- SGD, which is linear in gradient, momentum and weight, does to P what it does to the W_j;
- AdamW moves every W_j by the same, and so P by √n times that. Its quotient of moments is that of G where `eps` is √n
  times as large, and its decay that of the W_j where `weight_decay` times the learning rate is, see `build_optimizer`.

Adam and RMSprop divide by moments of gradient and decay together, which differ from column to column: for them a layer
stays plain.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.views.parcel import fetch

SUMMABLE = ("sgd", "adamw")
"""The optimisers that do to the sum what they do to the columns."""


class ColumnSum(nn.Module):
    """A linear layer of a repeated vector, as the sum of its columns.

    It loads the layer's own state dict beside its own, and `published` gives the layer's own back.

    Args:
        layer: Reads each of its C values `copies` times in succession. It gives its memory away.
        copies: n, above 1; in_features is C n.

    Attributes:
        weight: P, `(out_features, C)`.
        bias: As in the layer.
        rest: D, `(out_features, C n)`, never trained: the columns less their mean, at the start.
        rest_weight: How much of it is left, `(1, 1)`. Its gradient is 0, so that the optimiser decays it as it would
            each value of D.
    """

    def __init__(self, layer: nn.Linear, copies: int) -> None:
        super().__init__()
        self.copies, self.scale = copies, math.sqrt(copies)
        weight, rest = self._split(layer.weight.detach().contiguous())
        trained = layer.weight.requires_grad
        self.weight = nn.Parameter(weight, requires_grad=trained)
        self.bias = layer.bias
        self.rest = nn.Parameter(rest, requires_grad=False)
        self.rest_weight = nn.Parameter(weight.new_ones(1, 1), requires_grad=trained)

    def forward(self, values: Tensor) -> Tensor:
        """Return the layer's output `(B, out_features)` of values `(B, C)` that it would read n times."""
        bias = 0 * self.rest_weight[0] + (0 if self.bias is None else self.bias)
        return torch.addmm(bias, values, self.weight.t(), alpha=self.scale)

    def published(self) -> dict[str, Tensor]:
        """Return the layer's own state dict, as new tensors."""
        columns = self.rest.detach() * self.rest_weight.detach()
        repeated = columns.view(len(columns), -1, self.copies)
        repeated.add_(self.weight.detach().unsqueeze(2), alpha=1 / self.scale)
        return {"weight": columns} | ({} if self.bias is None else {"bias": self.bias.detach().clone()})

    def _split(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return P of W, `(out_features, C n)`, and W less its mean over the copies, in W's memory."""
        repeated = columns.view(len(columns), -1, self.copies)
        weight = (repeated.sum(2, dtype=torch.float64) / self.scale).to(columns.dtype)
        repeated.sub_(weight.unsqueeze(2), alpha=1 / self.scale)
        return weight, columns

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}weight")
        if saved is not None and saved.shape == self.rest.shape:
            weight, differences = self._split(saved.clone(memory_format=torch.contiguous_format))
            own = {"weight": weight, "rest": differences, "rest_weight": saved.new_ones(1, 1)}
            state_dict |= {f"{prefix}{name}": tensor for name, tensor in own.items()}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def column_sums(model: nn.Module) -> dict[str, ColumnSum]:
    """Return a model's layers of this kind by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ColumnSum)}


def published(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's weights on the CPU, of the names and shapes that they have without a `ColumnSum`."""
    sums = {f"{name}.": module for name, module in column_sums(model).items()}
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(sums))}
    tensors = dict(zip(kept, fetch([*kept.values()]), strict=True))
    for prefix, module in sums.items():
        tensors |= {f"{prefix}{name}": tensor.cpu() for name, tensor in module.published().items()}
    return tensors
