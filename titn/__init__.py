"""Distil a large image classifier into a small transformer, in three lines.

    import titn
    model = titn.distill("my-images", teacher="resnet50", student="titn", epochs=30)
    print(model.predict("cat.jpg"))

`distill` does both stages and returns a trained model; `label` does the first alone and returns the teacher's labels;
`load` loads a trained or exported model. `Dataset`, `Views` and `LabelCache` are the pieces between: images with
splits, their augmented views, and the teacher's label of each image in each view. docs/titn.ipynb shows them. More is
in the packages `pipeline` (the library) and `stages` (the commands).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeline import __version__, load  # before torch, whose threads it keeps from spinning

if TYPE_CHECKING:
    from pipeline.data.datasets import Dataset
    from pipeline.labels.cache import LabelCache
    from pipeline.views.views import Views
    from stages.python import TrainedModel, distill, label

__all__ = ["Dataset", "LabelCache", "TrainedModel", "Views", "__version__", "distill", "label", "load"]

# Imported when they are first used: PyTorch takes seconds.
_HOMES = {
    "Dataset": "pipeline.data.datasets",
    "LabelCache": "pipeline.labels.cache",
    "TrainedModel": "stages.python",
    "Views": "pipeline.views.views",
    "distill": "stages.python",
    "label": "stages.python",
}

if not TYPE_CHECKING:  # or a checker would take any name for one of this module

    def __getattr__(name: str) -> Any:
        """Import what is asked for, once."""
        if name not in _HOMES:
            raise AttributeError(f"module 'titn' has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(_HOMES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
