"""The view: a pure function of recipe, seed, view index and sample index, and every operation beneath it."""
