"""Benchmarks: how fast ours is beside its peers, measured in one run. See README.md."""

import pipeline as pipeline  # before torch, whose threads it keeps from spinning
