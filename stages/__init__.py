"""The commands: each reads named inputs, calls the library and writes named outputs."""

import pipeline as pipeline  # before torch, whose threads it keeps from spinning
