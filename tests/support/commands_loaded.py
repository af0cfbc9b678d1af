"""What the process loads that commands are forked from."""

from __future__ import annotations

import importlib

import torch

for name in ("cli", "prepare", "teacher", "selection", "label", "distill", "shared.fitting", "shared.labelling"):
    importlib.import_module(f"stages.{name}")
torch.set_num_threads(1)
