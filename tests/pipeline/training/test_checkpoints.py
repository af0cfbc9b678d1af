"""Checkpoints: round trip, damage, and the resumable state."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError, StorageError, UsageError
from pipeline.system.canonical import fingerprint
from pipeline.system.storage import write_atomic
from pipeline.training.checkpoints import RunState, load_checkpoint, load_weights, save_checkpoint

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "count": torch.tensor(3),
    "half": torch.ones(2).bfloat16(),
}


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    digest = save_checkpoint(tmp_path / "run", "best", TENSORS, {"name": "x"})
    for path in (tmp_path / "run", tmp_path / "run" / "best.safetensors"):
        checkpoint = load_checkpoint(path)
        assert checkpoint.meta == {"name": "x", "sha256": digest}
        assert checkpoint.tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert torch.equal(checkpoint.tensors[name], tensor)
            assert checkpoint.tensors[name].dtype == tensor.dtype


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, "a", TENSORS, {})
    second = save_checkpoint(tmp_path, "b", dict(reversed(TENSORS.items())), {})
    assert first == second


def test_any_changed_byte_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "best", TENSORS, {})
    file = tmp_path / "best.safetensors"
    data = file.read_bytes()
    for position in range(0, len(data), 7):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(DataError, match="SHA-256"):
            load_checkpoint(tmp_path)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    file = tmp_path / "best.safetensors"
    payload = b"cpathlib\nPath\n(S'" + str(ran).encode() + b"'\ntR(S'touch'\ni__builtin__\ngetattr\n."
    file.write_bytes(payload)
    (tmp_path / "best.json").write_text(json.dumps({"sha256": hashlib.sha256(payload).hexdigest()}))
    with pytest.raises(DataError, match="not a safetensors file"):
        load_checkpoint(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("missing", ["best.safetensors", "best.json"])
def test_a_checkpoint_without_its_other_half_is_refused(tmp_path: Path, missing: str) -> None:
    save_checkpoint(tmp_path, "best", TENSORS, {})
    (tmp_path / missing).unlink()
    with pytest.raises(DataError, match=missing.replace(".", r"\.")):
        load_checkpoint(tmp_path)


def test_a_path_that_does_not_exist_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere")


def test_the_newest_state_of_the_same_run_is_resumed(tmp_path: Path) -> None:
    state = RunState(tmp_path / "run", fingerprint({"seed": 1}))
    assert state.load() is None
    for step in range(5):
        state.save({"step": torch.tensor(step)}, {"step": step}, {})
    state.wait()
    again = RunState(tmp_path / "run", fingerprint({"seed": 1})).load()
    assert again is not None
    assert again.meta["step"] == 4
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == 2


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path: Path) -> None:
    state = RunState(tmp_path, "f")
    for step in range(3):
        state.save({"step": torch.tensor(step)}, {"step": step}, {})
    state.wait()
    newest = max(tmp_path.glob("*.json"), key=lambda file: json.loads(file.read_text())["serial"])
    newest.with_suffix(".safetensors").write_bytes(b"cut")
    reopened = RunState(tmp_path, "f")
    older = reopened.load()
    assert older is not None
    assert older.meta["step"] == 1
    reopened.save({"step": torch.tensor(9)}, {"step": 9}, {})
    reopened.wait()
    newest_again = RunState(tmp_path, "f").load()
    assert newest_again is not None
    assert newest_again.meta["step"] == 9


@pytest.mark.parametrize("key", ["epoch", "step", "serial", "best_epoch", "curve", "best", "sha256"])
def test_any_change_of_a_states_json_is_told_and_the_state_before_is_taken(tmp_path: Path, key: str) -> None:
    state = RunState(tmp_path, "f")
    for step in (1, 2):
        state.save({"w": torch.tensor(step)}, {"epoch": 3, "step": step, "best_epoch": 2, "curve": [0.5]}, {})
    state.wait()
    file = tmp_path / "state-a.json"  # the second
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, key: [0.25] if key == "curve" else 9}))
    reopened = RunState(tmp_path, "f")
    peeked, loaded = reopened.peek(), reopened.load()
    assert peeked is not None and loaded is not None and loaded.meta == peeked
    assert loaded.meta["step"] == 1 and reopened.damaged == ["state-a"]
    del content["seal"]  # as older versions wrote it
    file.write_text(json.dumps(content))
    former = RunState(tmp_path, "f")
    loaded = former.load()
    assert loaded is not None and loaded.meta["step"] == 2 and not former.damaged


def test_where_every_state_is_damaged_the_user_decides_about_starting_over(tmp_path: Path) -> None:
    state = RunState(tmp_path, "f")
    for step in (1, 2):
        state.save({"w": torch.tensor(step)}, {"step": step}, {})
    state.wait()
    (tmp_path / "state-a.json").write_text("{")
    (tmp_path / "state-b.safetensors").write_bytes(b"cut")
    with pytest.raises(
        DataError, match=f"{tmp_path}: state-a, state-b damaged.*copy the files again.*--fresh starts over"
    ):
        RunState(tmp_path, "f").load()


def test_a_run_may_go_on_while_its_state_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_end = threading.Event(), threading.Event()

    def write(path: Path, data: bytes) -> None:
        began.set()
        assert may_end.wait(30)
        write_atomic(path, data)

    monkeypatch.setattr("pipeline.training.checkpoints.write_atomic", write)
    state, weights, curve = RunState(tmp_path, "f"), torch.ones(3), [1]
    state.save({"weights": weights}, {"curve": curve}, {})
    assert began.wait(30)
    weights.zero_()
    curve.append(2)
    may_end.set()
    state.wait()
    saved = RunState(tmp_path, "f").load()
    assert saved is not None
    assert torch.equal(saved.tensors["weights"], torch.ones(3)) and saved.meta["curve"] == [1]


def test_a_state_that_cannot_be_written_is_told_at_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = RunState(tmp_path, "f")
    state.save({"step": torch.tensor(0)}, {}, {})
    state.wait()

    def fail(path: Path, data: bytes) -> None:
        raise StorageError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.checkpoints.write_atomic", fail)
        state.save({"step": torch.tensor(1)}, {}, {})
        with pytest.raises(StorageError, match="disk full"):
            state.wait()
    state.save({"step": torch.tensor(2)}, {}, {})
    state.wait()
    saved = RunState(tmp_path, "f").load()
    assert saved is not None and saved.tensors["step"] == 2


def bests(directory: Path) -> dict[str, int]:
    """Return the files of best weights, each with its inode, which every writing changes."""
    return {file.name: file.stat().st_ino for file in directory.glob("best-*")}


def test_the_best_weights_are_a_file_that_is_written_once_and_goes_with_the_last_state_that_names_it(
    tmp_path: Path,
) -> None:
    state, first, second = RunState(tmp_path, "f"), {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    best_files, serials = [], itertools.count()

    def save(state: RunState, best: Mapping[str, torch.Tensor]) -> None:
        state.save({"step": torch.tensor(0)}, {"step": next(serials)}, best)
        state.wait()
        best_files.append(bests(tmp_path))

    save(state, {})
    (tmp_path / f".state-b.safetensors.{'0' * 16}.tmp").write_bytes(b"of a killed writer")
    save(state, first)
    save(state, first)
    assert not best_files[0] and best_files[1] == best_files[2] and len(best_files[1]) == 1
    save(state, second)
    assert len(best_files[3]) == 2 and best_files[3].items() >= best_files[1].items()
    save(state, second)
    assert best_files[4].items() == best_files[3].items() - best_files[1].items()
    reopened = RunState(tmp_path, "f")
    loaded = reopened.load()
    assert loaded is not None and torch.equal(loaded.best["w"], second["w"]) and loaded.tensors.keys() == {"step"}
    digest = hashlib.sha256(next(tmp_path.glob("best-*")).read_bytes()).hexdigest()
    assert loaded.meta["best"] == digest and [*best_files[4]] == [f"best-{digest[:12]}.safetensors"]
    save(reopened, loaded.best)
    assert best_files[5] == best_files[4], "what has been loaded is there"
    save(RunState(tmp_path, "another run"), first)
    assert best_files[6].keys() == best_files[3].keys(), (
        "a state of another run keeps its best until it is written over"
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        [*best_files[3], *(f"state-{slot}.{kind}" for slot in "ab" for kind in ("json", "safetensors"))]
    )


@pytest.mark.parametrize("damage", [None, b"", b"cut"])
def test_a_state_whose_best_is_damaged_or_missing_falls_back_to_the_one_before(
    tmp_path: Path, damage: bytes | None
) -> None:
    state = RunState(tmp_path, "f")
    for step in range(2):
        state.save({}, {"step": step}, {"w": torch.tensor(step)})
    state.wait()
    newest = RunState(tmp_path, "f").load()
    assert newest is not None and newest.meta["step"] == 1 and newest.best["w"] == 1
    file = tmp_path / f"best-{newest.meta['best'][:12]}.safetensors"
    file.unlink()
    if damage is not None:
        file.write_bytes(damage)
    reopened = RunState(tmp_path, "f")
    older, seen = reopened.load(), reopened.peek()
    assert older is not None and older.meta["step"] == 0 and older.best["w"] == 0
    assert seen == older.meta
    reopened.save({}, {"step": 1}, {"w": torch.tensor(1)})
    reopened.wait()
    mended = RunState(tmp_path, "f").load()
    assert mended is not None and mended.meta["step"] == 1 and mended.best["w"] == 1


def test_another_runs_state_is_never_resumed(tmp_path: Path) -> None:
    state = RunState(tmp_path, fingerprint({"seed": 1}))
    state.save({}, {}, {})
    state.wait()
    assert RunState(tmp_path, fingerprint({"seed": 2})).load() is None


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "best", torch.nn.Linear(3, 2).state_dict(), {})
    checkpoint = load_checkpoint(tmp_path)
    with pytest.raises(DataError, match=r"weight is \(2, 3\)"):
        load_weights(torch.nn.Linear(4, 2), checkpoint)
    with pytest.raises(DataError, match="tensor bias is not in the model"):
        load_weights(torch.nn.Linear(3, 2, bias=False), checkpoint)
    target = torch.nn.Linear(3, 2)
    load_weights(target, checkpoint)
    assert torch.equal(target.weight, checkpoint.tensors["weight"])
