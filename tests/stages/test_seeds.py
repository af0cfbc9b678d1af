"""`distill --seeds`: several seeds one after another."""

from __future__ import annotations

import json
import statistics

import pytest

from pipeline.errors import UsageError
from stages.shared.options import parse_seeds
from tests.support.in_process import invoke
from tests.support.project import Project, unseal

COMMAND = ("distill", "--student", "deit", "--labels", "none", "--set", "epochs=1")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.create(tmp_path_factory.mktemp("seeds"), alone=True)
    invoke(project, "prepare")
    return project


def test_seeds_run_one_after_another_and_end_with_their_mean(project: Project) -> None:
    out = invoke(project, *COMMAND, "--seeds", "0,2")
    runs = project.path / "data/runs/smoke"
    seed_runs = [
        json.loads((runs / f"deit-labels-none-epochs-1{suffix}" / "metrics.json").read_text())
        for suffix in ("", "-seed-2")
    ]
    assert [one["seed"] for one in seed_runs] == [0, 2] and seed_runs[0]["best"] != seed_runs[1]["best"]
    assert "deit (seed 1 of 2): epoch 1/1" in out and "deit (seed 2 of 2): epoch 1/1" in out
    assert out.count("left for all seeds") == 1, "after the only epoch of the first run"
    top1 = [one["best"]["top1"] for one in seed_runs]
    said = f"top-1 % of the best epochs {statistics.fmean(top1):.2f} ± {statistics.stdev(top1):.2f} (2), of the last "
    assert said in out.strip().splitlines()[-1]
    again = invoke(project, *COMMAND, "--seeds", "2,0")
    assert again.count("up to date") == 2 and said in again


def test_seeds_that_were_judged_by_other_rules_are_not_averaged_with_the_others(project: Project) -> None:
    invoke(project, *COMMAND, "--seeds", "4,5")
    (file,) = project.path.glob("data/runs/smoke/*seed-5*/metrics.json")
    metrics = json.loads((unseal(file.parent) / file.name).read_text())
    file.write_text(json.dumps({**metrics, "rules": metrics.get("rules", 1) + 1}))
    *_, first, second = invoke(project, *COMMAND, "--seeds", "4,5").strip().splitlines()
    assert "deit, seeds 4, mean" in first and "deit, seeds 5, mean" in second
    assert "±" not in (first + second).replace("mean ±", "")
    assert second.endswith("(apart from the first: judged by other rules)")


def test_one_seed_is_no_spread(project: Project) -> None:
    invoke(project, *COMMAND, "--seed", "2")
    assert "±" not in invoke(project, *COMMAND, "--seeds", "2").splitlines()[-1].partition("(number):")[2]


def test_a_dry_run_of_seeds_trains_none(project: Project) -> None:
    out = invoke(project, *COMMAND, "--seeds", "7,8", "--dry-run")
    assert out.count("not trained") == 2 and "±" not in out
    assert not list(project.path.glob("data/runs/smoke/*seed-7"))


def test_seed_and_seeds_do_not_go_together(project: Project) -> None:
    assert "--seed 0 --seeds 1,2: give one of them" in invoke(
        project, *COMMAND, "--seeds", "1,2", "--seed", "0", code=2
    )


@pytest.mark.parametrize(
    "text", ["", ",", "0,", "1,1", "-1", "01", "1.0", "٣", " 1", "0:3", "a", str(2**31), "9" * 5000]
)
def test_what_are_no_seeds_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--seeds"):
        parse_seeds(text)


def test_the_largest_seed_is_one() -> None:
    assert parse_seeds(f"0,{2**31 - 1}") == (0, 2**31 - 1)
