"""What a store of very many small JPEGs takes of memory and time: `python -m tests.support.many_files FOLDER N`.

A few files are listed again and again: it is about what each listed image takes. JSON on standard output has `arrays`,
the bytes of the arrays that are needed, `peak`, what memory has grown by at most, and seconds.
"""

from __future__ import annotations

import hashlib
import io
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.config.recipes import DatasetRecipe, ViewRecipe
from pipeline.data.arrays import StoredFile
from pipeline.data.datasets import Dataset, Split, assemble
from pipeline.data.encoded import EncodedImages, Index
from pipeline.data.streaming import HostImages
from pipeline.views.views import Views

SIDE, NUM_DIFFERENT, NUM_CLASSES, NUM_WALKED, BATCH = 16, 64, 1000, 50_000, 1000
VIEWS = ViewRecipe(count=1, crop=2, flip=True)


def small_jpegs() -> list[bytes]:
    """Return NUM_DIFFERENT files of 24 x 20 pixels."""
    rng, files = np.random.default_rng(0), list[bytes]()
    for _ in range(NUM_DIFFERENT):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


def write(folder: Path, num_images: int) -> Path:
    """Write a store that lists N small JPEGs."""
    files = small_jpegs()
    bytes_of_all = folder / "all"
    bytes_of_all.write_bytes(b"".join(files))
    stops, which = np.cumsum([len(file) for file in files]), np.arange(num_images) % NUM_DIFFERENT
    digests = np.frombuffer(b"".join(hashlib.sha256(file).digest() for file in files), np.uint8).reshape(-1, 32)
    index = Index(
        np.stack([stops - [len(file) for file in files], stops], axis=1)[which],
        np.full((num_images, 2), (24, 20), np.int32),
        digests[which],
        np.array([b"train/class/%08d.jpg" % number for number in range(num_images)]),
        np.zeros((num_images, 6), np.int64),
    )
    stored = EncodedImages(StoredFile.opened(bytes_of_all, int(stops[-1])), bytes_of_all, index, image_size=SIDE)
    train = Split(stored, np.arange(num_images) % NUM_CLASSES, index.names)
    test = train.take(np.arange(NUM_CLASSES))
    names = tuple(map(str, range(NUM_CLASSES)))
    assemble("folder", names, train, test, DatasetRecipe(source="folder")).save(folder / "dataset.json")
    return folder / "dataset.json"


def peak() -> int:
    """Return the most memory that this process has had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(path: Path) -> dict[str, float]:
    """Open the store, draw a view, and walk through a part of it as labelling does."""
    before, started = peak(), time.monotonic()
    split = Dataset.load(path).train
    opened = time.monotonic()
    views = Views(HostImages(split.images, torch.device("cpu")), torch.from_numpy(split.labels), VIEWS)
    drawn = views.drawn(0)
    was_drawn = time.monotonic()
    labels = np.empty(len(split), np.uint16)
    order = torch.arange(len(split))
    for batch in views.batches(0, list(order[:NUM_WALKED].split(BATCH))):
        labels[batch.indices.numpy()] = batch.images[:, 0, 0, 0].numpy()
    assert isinstance(split.images, EncodedImages)
    index = split.images.index
    arrays = [index.offsets, index.sizes, index.sha256, index.names, split.labels, labels, order, *drawn.values()]
    uniform = list(vars(views)["_opened"].uniform.values())
    return {
        "arrays": sum(values.nbytes for values in [*arrays, *uniform]),
        "peak": peak() - before,
        "opening": opened - started,
        "drawing": was_drawn - opened,
        "walking": time.monotonic() - was_drawn,
    }


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if len(sys.argv) > 2:
        write(place, int(sys.argv[2]))
    else:
        print(json.dumps(measure(place / "dataset.json")))
