"""Which of two epochs, or of two models, is the better one: without PyTorch, which `select` has no need of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def standing(scores: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """Return what the better of two epochs, or of two models, has more of: the metric, then minus the loss.

    Args:
        scores: The fields of pipeline.training.metrics.Scores, on the split that decides.
        metric: Which of them decides. What is not finite, or a loss that is not there, is worse than any number.
    """
    values = scores[metric], -scores.get("loss", math.inf)
    metric_value, gain = (value if math.isfinite(value) else -math.inf for value in values)
    return metric_value, gain
