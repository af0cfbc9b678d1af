"""The jobs of a table, a figure, an ablation or everything, and their order; nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.params import load_params
from pipeline.config.recipes import TeacherRecipe
from pipeline.errors import UsageError
from stages.jobs import sweep_settings
from stages.reproduce import Scope, plan
from tests.support.in_process import invoke
from tests.support.project import ROOT, Project

TEACHERS = ("densenet121", "mobilenet_v3_large", "resnet50", "wide_resnet50_2", "squeezenet1_1", "vgg16", "vgg19")
STUDENTS = ("titn", "vit", "deit", "tnt")
TAUGHT = ["teacher vgg16_bn", "selection of vgg16_bn"]
LABELS, MIXUP = "labels of the views default", "labels of the views mixup"


def titles(**choice: Any) -> list[str]:
    return [f"{job.recipe} {job.title}" for job in plan(load_params(ROOT / "params.yaml"), Scope(**choice))]


def of(recipe: str, *parts: str) -> list[str]:
    return [f"{recipe} {part}" for part in parts]


def students(*names: str, seed: int = 0) -> list[str]:
    return [f"student {name}, seed {seed}" for name in names]


CIFAR100 = [*TAUGHT, LABELS, *students(*STUDENTS, "titn-large-patch"), MIXUP, *students("titn-mixup")]
REST = [*(f"teacher {name}" for name in TEACHERS), "selection from 8 teachers"]
CIFAR10 = [*TAUGHT, LABELS, *students(*STUDENTS, "titn-large-patch")]
MNIST = [*TAUGHT, LABELS, *students(*STUDENTS)]
SWEEP = ["teacher vgg16_bn with adam", "teacher vgg16_bn with rmsprop"]


def test_everything_comes_in_the_order_of_its_worth() -> None:
    assert titles() == [
        *of("cifar100", *CIFAR100, *REST),
        *of("cifar10", *CIFAR10),
        *of("mnist", *MNIST),
        *of("cifar100", *SWEEP),
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"table": 1}, []),
        ({"table": 2}, of("cifar100", *TAUGHT, *REST)),
        ({"table": 3}, of("cifar100", *CIFAR100)),
        ({"table": 4}, of("cifar10", *CIFAR10)),
        ({"table": 5}, of("mnist", *MNIST)),
        ({"table": 6}, of("cifar10", *TAUGHT, LABELS, *students("titn"))),
        ({"figure": 4}, of("cifar100", *TAUGHT, *REST)),
        ({"figure": 5}, of("cifar100", *TAUGHT, *SWEEP)),
        ({"figure": 6}, of("cifar100", *TAUGHT, LABELS, *students(*STUDENTS))),
        ({"figure": 7}, of("cifar10", *TAUGHT, LABELS, *students(*STUDENTS))),
        ({"figure": 8}, of("mnist", *TAUGHT, LABELS, *students(*STUDENTS))),
        ({"recipe": "cifar100"}, of("cifar100", *CIFAR100, *REST, *SWEEP)),
        ({"student": "titn-mixup"}, of("cifar100", *TAUGHT, MIXUP, *students("titn-mixup"))),
    ],
    ids=str,
)
def test_the_jobs_of_each_table_and_figure(choice: dict[str, Any], expected: list[str]) -> None:
    assert titles(**choice) == expected


def test_another_recipe_compares_all_its_teachers_before_it_labels() -> None:
    planned = titles(recipe="cifar100-small", table=3)
    candidates = ("densenet121", "squeezenet1_1", "mobilenet_v3_large")
    assert planned[:3] == of("cifar100-small", *(f"teacher {name}" for name in candidates))
    assert planned[3:] == of(
        "cifar100-small", "selection from 3 teachers", LABELS, *students(*("titn", "tnt", "deit", "vit")),
        *students("titn-large-patch"),
    )  # fmt: skip


def test_a_recipe_of_ours_on_the_papers_data_compares_its_teachers_first_too() -> None:
    planned = titles(recipe="cifar100-best", student="titn")
    assert planned == of(
        "cifar100-best", "teacher resnet18", "teacher resnet50", "teacher vgg16_bn", "selection from 3 teachers",
        LABELS, *students("titn"),
    )  # fmt: skip


def test_seeds_go_round_all_students_one_after_another() -> None:
    expected = [*students("titn", *STUDENTS[1:]), *students("titn", *STUDENTS[1:], seed=1)]
    assert titles(table=5, seeds=(0, 1))[3:] == of("mnist", *expected)


def test_ablations_differ_in_one_thing_alone() -> None:
    labels = [
        f"student titn{ways}, seed {seed}" for seed in (0, 1) for ways in ("", ", labels none", ", labels online")
    ]
    assert titles(ablation="labels", seeds=(0, 1)) == of("cifar100", *TAUGHT, LABELS, *labels)
    views = [f"student deit{count}, seed 0" for count in (", 1 view", ", 2 views", ", 5 views", "")]
    assert titles(ablation="views", student="deit", recipe="mnist") == of("mnist", *TAUGHT, LABELS, *views)
    rates = [f"student vit{rate}, seed 0" for rate in ("", ", drop_path 0.1", ", drop_path 0.2")]
    assert titles(ablation="drop_path", student="vit", recipe="mnist") == of("mnist", *TAUGHT, LABELS, *rates)
    candidates = ("densenet121", "squeezenet1_1", "mobilenet_v3_large")
    assert titles(ablation="ensemble", recipe="cifar100-small") == of(
        "cifar100-small", *(f"teacher {name}" for name in candidates), "selection from 3 teachers", LABELS,
        f"{LABELS} by {' and '.join(candidates)}", *students("titn"), "student titn, labels of ensemble, seed 0",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"table": 7}, "--table 7: the paper has Tables 1 to 6"),
        ({"figure": 3}, "those of results are 4, 5, 6, 7, 8"),
        ({"table": 3, "figure": 6}, "--table 3 and --figure 6"),
        ({"recipe": "cifar1000"}, "cifar1000"),
        ({"student": "titan"}, "choose from titn"),
        ({"table": 2, "student": "titn"}, "--student titn"),
        ({"ablation": "labels", "student": "vit"}, "no distillation head"),
    ],
    ids=str,
)
def test_what_there_is_not_is_refused(choice: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        titles(**choice)


def test_data_that_are_not_there_are_named_with_the_command_and_nothing_is_written(tmp_path: Path) -> None:
    project = Project.create(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    out = invoke(project, "reproduce", "--table", "4", "--dry-run")
    assert "cifar10 teacher vgg16_bn: needs data" in out and "0 of 8 jobs are done" in out
    assert "no run decides" in invoke(project, "reproduce", "--table", "1")
    out = invoke(project, "reproduce", "--recipe", "smoke", "--dry-run")
    assert "selection from 2 teachers: select by top1 (no data yet)" in out and "cannot run" not in out
    out = invoke(project, "reproduce", code=3).splitlines()[-1]
    for name in ("cifar100", "cifar10", "mnist"):
        assert f"recipe {name} left out" in out and f"`pipeline prepare --recipe {name} --download`" in out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        ("sgd", "sgd", {}),
        ("sgd", "adam", {"optimizer": "adam", "lr": "0.001"}),
        ("sgd", "adamw", {"optimizer": "adamw", "lr": "0.001", "weight_decay": "0.05"}),
        ("adamw", "sgd", {"optimizer": "sgd", "lr": "0.1", "weight_decay": "0.0001"}),
        ("adamw", "rmsprop", {"optimizer": "rmsprop", "lr": "0.0001", "weight_decay": "0.0001"}),
    ],
)
def test_adamws_weight_decay_is_not_taken_for_an_l2_penalty(own: str, other: str, expected: dict[str, str]) -> None:
    teacher = TeacherRecipe(model="vgg16", epochs=1, batch_size=8, lr=0.1, optimizer=own, weight_decay=0.03)
    assert sweep_settings(teacher, other) == expected
