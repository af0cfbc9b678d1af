"""The one fit loop: step, batches, optimiser, evaluation, checkpoints, ranks."""
