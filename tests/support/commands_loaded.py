"""What the process loads that commands are forked from."""

from __future__ import annotations

import importlib

import torch

for name in ("cli", "prepare", "teacher", "selection", "label", "distill", "shared.fitting", "shared.labelling"):
    importlib.import_module(f"stages.{name}")
# What these import when they are called
LATER = ("labels.replay", "labels.source", "models.counting", "models.folding", "models.students", "models.teachers")
for name in LATER:
    importlib.import_module(f"pipeline.{name}")
torch.set_num_threads(1)
