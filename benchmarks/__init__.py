"""Benchmarks: how fast ours is beside its peers, measured in one run. See README.md."""
