"""An equivalent, cheaper model for inference: batch norms and repeated inputs folded into neighbouring weights.

Two foldings, both exact but for rounding:

- A batch norm in evaluation mode is an affine map per channel. Where it directly follows a convolution that
  nothing else reads, it becomes that convolution's weights and bias.
- torchvision's VGGs pool their feature map to 7x7. Below 64x64 pixels the map is 1x1, the pooling repeats its 512
  values 49 times, and the first linear layer's 25,088 columns can be added up to 512.

Under autocast the last layer keeps the precision of its weights, see `pipeline.models.network.decide_in_fp32`.

A model that torch.fx cannot trace, as some transformers, stays as it is.

Folded models cannot be trained: a batch norm in training uses the statistics of its batch, and the sum of 49 columns
needs what pipeline.training.column_sum gives it. Checkpoints keep torchvision's shapes.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from pipeline.models.network import decide_in_fp32, last_layers
from pipeline.models.teachers import ResizedInput, repeated_pooling


def fold(model: nn.Module, image_size: int) -> tuple[nn.Module, bool]:
    """Return an equivalent model for inference on square images of one size.

    Args:
        model: Of `(B, 3, H, W)` images, such as any teacher; not changed.
        image_size: Side of the images, pixels. A folded VGG refuses images of another size.

    Returns:
        A copy in evaluation mode, of the model's dtype and on its device, that shares no memory with the model; and
        whether it is folded, which needs a model that torch.fx can trace. A batch norm before its convolution stays, as
        in DenseNet. Under autocast the logits of a folded model are of the weights' dtype.
    """
    if isinstance(model, ResizedInput):
        module, is_folded = fold(model.module, model.input_size)
        return ResizedInput(module, model.input_size).eval(), is_folded
    weight = next(model.parameters())
    # On the CPU in double precision, so that the folded weights are the same on every device.
    folded = copy.deepcopy(model).cpu().eval()
    if (repeated := repeated_pooling(folded, image_size)) is not None:
        layer = repeated.layer
        columns = layer.weight.detach().reshape(layer.out_features, -1, repeated.copies)
        layer.weight = nn.Parameter(columns.sum(2, dtype=torch.float64).to(layer.weight.dtype))
        layer.in_features //= repeated.copies
        repeated.see_once(layer)
    try:
        folded = fuse(folded.double(), inplace=True)
    except Exception:  # tracing fails in as many ways as a model's code is written
        return copy.deepcopy(model).eval(), False
    for last in last_layers(folded):
        decide_in_fp32(last)
    return folded.to(weight.device, weight.dtype).eval(), True
