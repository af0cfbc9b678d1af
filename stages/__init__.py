"""The commands: each reads named inputs, calls the library and writes named outputs."""

import os

# Two OpenMP threads that spin while they wait collapse as soon as other work shares the cores. libgomp reads this
# when torch loads it, so it must be set before the first import of torch.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
