"""Small label caches for tests: who they belong to, their labels, and how they are made."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config.recipes import ViewRecipe
from pipeline.errors import DataError
from pipeline.labels.cache import SCHEMA_VERSION, Canary, LabelCache, make_identity, make_provenance
from pipeline.labels.file import SEAL_SIZE, make_seal
from pipeline.labels.parts import LabelParts, seal

NUM_SAMPLES = 40
NUM_CLASSES = 7
CANARIES = (Canary(view=0, samples=(3, 0, 39), sha256="c" * 64),)


def identity_of(**changes):
    arguments = {
        "dataset_sha256": "a" * 64,
        "split": "train",
        "view_recipe": ViewRecipe(seed=3, count=4, crop=4, flip=True, rotation=10.0, mixing="cutmix"),
        "class_names": [f"class {index}" for index in range(NUM_CLASSES)],
        "num_samples": NUM_SAMPLES,
    }
    return make_identity(**(arguments | changes))


def provenance_of(**changes):
    arguments = {
        "teacher": "vgg16_bn",
        "checkpoint_sha256": "b" * 64,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.1],
        "precision": "fp32",
        "device": "cpu",
        "versions": {"torch": "2.6.0", "numpy": "1.26.0"},
    }
    return make_provenance(**(arguments | changes))


def row_of(view, num_samples=NUM_SAMPLES, num_classes=NUM_CLASSES):
    return np.random.default_rng(view).integers(0, num_classes, num_samples)


def parts_in(directory, identity=None, provenance=None):
    return LabelParts(directory, identity=identity or identity_of(), provenance=provenance or provenance_of())


def label(directory, path, count, *, adopt=False, parts=None):
    """Do what the command does: label the missing views, then seal."""
    parts = parts or parts_in(directory)
    if adopt:
        parts.adopt(LabelCache.open(path))
    for view in parts.missing(count):
        parts.write(view, row_of(view))
    return seal(path, parts=parts, count=count, clean=clean_of(), canaries=CANARIES)


def sealed_pair(directory):
    """The bytes of a sealed file of four views, and of one of another data set and other labels."""
    label(directory / "parts", directory / "one.h5", 4)
    other = parts_in(directory / "parts", identity_of(dataset_sha256="d" * 64))
    for view in range(4):
        other.write(view, (row_of(view) + 1) % NUM_CLASSES)
    seal(directory / "other.h5", parts=other, count=4, clean=clean_of(), canaries=CANARIES)
    return (directory / "one.h5").read_bytes(), (directory / "other.h5").read_bytes()


def clean_of():
    return {"val": row_of(1000, 5), "test": row_of(1001, 11)}


def flip(data, index, bit):
    """Change one bit of some bytes."""
    return data[:index] + bytes([data[index] ^ (1 << bit)]) + data[index + 1 :]


def reseal(data):
    """Put the right seal on changed content, as a forger would."""
    return make_seal(memoryview(data)[SEAL_SIZE:], SCHEMA_VERSION) + data[SEAL_SIZE:]


def check_damaged(path, damaged, reason=""):
    """Check that a file is refused in one line with its name, the reason and the way out."""
    path.write_bytes(damaged)
    with pytest.raises(DataError) as caught:
        LabelCache.open(path)
    message = str(caught.value)
    assert str(path) in message and reason in message and "--fresh" in message and "\n" not in message
