"""The description of a finished run: what is part of it, and what leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest

from stages.shared.runs import changes, describe_finished, differences

META: dict[str, Any] = {
    "kind": "student", "model": "titn", "arguments": {"num_classes": 10}, "recipe": "digits", "mean": [0.5],
    "image_size": 32,
    "dataset_sha256": "d" * 64, "training": {"lr": 0.2, "precision": "auto"}, "seed": 3, "version": "0.1.0",
    "inputs": {"views": {"count": 4}, "labels": "cached", "teacher": "t" * 64}, "fingerprint": "f" * 64,
}  # fmt: skip
METRICS: dict[str, Any] = {"distilled": True, "precision": "bf16", "seed": 3}


def test_it_holds_what_decides_and_nothing_else() -> None:
    assert describe_finished(META, METRICS) == {
        "kind": "student", "model": "titn", "arguments": {"num_classes": 10}, "dataset_sha256": "d" * 64,
        "training": {"lr": 0.2, "precision": "bf16"}, "seed": 3, "version": "0.1.0", "rules": 1,
        "inputs": {"views": {"count": 4}, "labels": "cached", "teacher": "t" * 64},
    }  # fmt: skip
    again = {**META, "recipe": "digits-2", "training": {"precision": "bf16", "lr": 0.20}, "fingerprint": "0" * 64}
    assert describe_finished(again, METRICS) == describe_finished(META, METRICS)
    described = describe_finished(META, {**METRICS, "rules": 2})
    assert described is not None and described["rules"] == 2


def test_a_student_without_a_teachers_labels_has_no_teacher() -> None:
    described = describe_finished(META, {**METRICS, "distilled": False})
    assert described is not None and described["inputs"] == {"views": {"count": 4}, "labels": "none"}


def test_photographs_shown_otherwise_are_another_setting_though_their_files_are_the_same() -> None:
    photographs = {**META, "exif": "upright", "decoders": {"pillow": "12.0.0"}}
    squeezed, cropped = (describe_finished(meta, METRICS) for meta in (photographs, {**photographs, "resize": "crop"}))
    assert squeezed is not None and squeezed["rendition"] == {"image_size": 32, "resize": "squeeze"}
    assert cropped is not None and differences(squeezed, cropped) == ["resize squeeze -> crop"]


def test_students_of_two_label_files_are_never_seeds_of_one_setting() -> None:
    def described(name: str, *, distilled: bool) -> Any:
        inputs = {**META["inputs"], "teacher_labels": name}
        return describe_finished({**META, "inputs": inputs}, {**METRICS, "distilled": distilled})

    ours, theirs = described("ours", distilled=True), described("theirs", distilled=True)
    assert ours != theirs != describe_finished(META, METRICS)
    assert differences(ours, theirs) == ["teacher_labels ours -> theirs"]
    assert described("ours", distilled=False) == describe_finished(META, {**METRICS, "distilled": False})


@pytest.mark.parametrize("meta", [None, [], {}, {**META, "training": 1}, {**META, "dataset_sha256": None}])
def test_a_checkpoint_that_does_not_say_has_none(meta: object) -> None:
    assert describe_finished(meta, METRICS) is None


def test_differences_of_two_descriptions_in_words() -> None:
    former = describe_finished(META, METRICS)
    now = describe_finished({**META, "training": {"lr": 0.1, "clip": 1.0}}, {**METRICS, "distilled": False, "rules": 2})
    assert former is not None and now is not None
    said = ["lr 0.2 -> 0.1", "clip none -> 1", "labels cached -> none", "judged by other rules"]
    assert differences(former, now) == said
    assert changes(former, now) == ["lr 0.1", "clip 1", "labels none", "judged by other rules"]
