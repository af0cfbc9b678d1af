"""docs/label-file.md says what a label file holds, all of it, and its examples run."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.labels.cache import LabelCache
from pipeline.labels.identity import IDENTITY_FIELDS, IDENTITY_OPTIONS, PROVENANCE_FIELDS, PROVENANCE_OPTIONS
from tests.support.label_samples import NUM_CLASSES, NUM_SAMPLES, row_of
from tests.support.markdown import blocks, page

PAGE = page("docs/label-file.md")
READING, SEAL = blocks(PAGE, "python")


@pytest.fixture
def file(sealed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("labels.h5").write_bytes(sealed)
    return tmp_path / "labels.h5"


def test_the_example_reads_the_labels_with_h5py_alone(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "pipeline" not in READING
    names: dict[str, object] = {}
    exec(READING, names)
    labels = names["labels"]
    assert isinstance(labels, np.ndarray) and labels.shape == (4, NUM_SAMPLES)
    assert all(np.array_equal(labels[view], row_of(view, num_classes=NUM_CLASSES)) for view in range(4))
    assert names["identity"] == LabelCache.open(file).identity
    assert f"(4, {NUM_SAMPLES}) uint8 class {labels[0, 0]}" in capsys.readouterr().out


def test_the_examples_notice_a_damaged_row_and_a_damaged_file(file: Path) -> None:
    exec(SEAL, {})
    with h5py.File(file, "r+") as opened:
        opened["labels"][1, 0] ^= 1
    for example in (READING, SEAL):
        with pytest.raises(AssertionError):
            exec(example, {})


def test_the_page_names_every_object_and_attribute(sealed: bytes, tmp_path: Path) -> None:
    cache = LabelCache.from_bytes(sealed)
    (tmp_path / "soft.h5").write_bytes(soft(cache).to_bytes())
    with h5py.File(tmp_path / "soft.h5", "r") as opened:
        names: list[str] = []
        opened.visit(names.append)
        attributes = [*opened.attrs, *opened["identity"].attrs, *opened["provenance"].attrs]
    assert set(attributes) == {"canaries", *IDENTITY_FIELDS, *PROVENANCE_FIELDS}
    assert set(names) >= {"labels", "digest", "topk/classes", "topk/probabilities", "clean/test", "clean/val"}
    for name in {*attributes, *names, *IDENTITY_OPTIONS, *PROVENANCE_OPTIONS, "accuracy"} - {"topk", "clean"}:
        assert f"`{name}`" in PAGE, name
    assert f"`schema_version` | {cache.identity['schema_version']}" in PAGE


def soft(cache: LabelCache) -> LabelCache:
    """A cache that keeps one class of each sample with its probability."""
    return LabelCache(
        labels=cache.labels,
        clean=cache.clean,
        canaries=cache.canaries,
        identity=cache.identity,
        provenance={**cache.provenance, "topk": 1},
        classes=cache.labels[:, :, None],
        probabilities=np.ones((*cache.labels.shape, 1), np.float16),
    )
