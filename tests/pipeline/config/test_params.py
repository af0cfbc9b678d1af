"""params.yaml: what is accepted, what is refused, and that DVC reads the same."""

from __future__ import annotations

import copy
import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline.config.params import Params, load_params, override, parse_params
from pipeline.config.recipes import DatasetRecipe, StudentRecipe, ViewRecipe, deciding_values
from pipeline.errors import UsageError

FILE = Path(__file__).parents[3] / "params.yaml"
TREE = YAML(typ="safe", pure=True).load(FILE.read_text())
PARAMS = load_params(FILE)
STUDENT = StudentRecipe(model="titn", epochs=3, batch_size=8, lr=0.1)


def test_every_recipe_of_the_project_loads() -> None:
    assert list(PARAMS.recipes) == [
        "digits",
        "mnist",
        "cifar10",
        "cifar100",
        "cifar100-best",
        "cifar100-final",
        "cifar100-cpu",
        "cifar100-cpu-long",
        "cifar100-teachers",
        "cifar100-small",
        "mnist-cpu",
        "mnist-small",
        "folder",
        "folder-small",
        "photos",
        "photos-small",
        "imagenet",
        "smoke",
    ]
    assert PARAMS.select(None).name == "digits"


def test_the_cifar100_recipe_is_the_papers() -> None:
    recipe = PARAMS.select("cifar100")
    titn = recipe.students["titn"]
    assert (titn.epochs, titn.batch_size, titn.optimizer, titn.lr) == (600, 1024, "sgd", 0.1)
    assert (titn.momentum, titn.weight_decay, titn.schedule, titn.alpha) == (0.9, 1e-4, "cosine", 0.5)
    assert recipe.views["default"].count == 600
    assert recipe.views["default"].mixing == "cutmix"
    assert recipe.views["mixup"].mixing == "mixup"
    assert recipe.dataset.val_fraction == 0.0
    assert PARAMS.select("mnist").students["titn"].epochs == 350


@pytest.mark.parametrize("name", ["squeezenet1_1", "vgg16", "vgg19"])
def test_teachers_that_die_at_the_papers_rate_get_a_lower_one_and_clipping(name: str) -> None:
    for source in ("cifar100", "cifar10", "mnist"):
        teacher = PARAMS.select(source).teachers[name]
        assert teacher.lr <= 0.01
        assert teacher.clip > 0
    assert PARAMS.select("cifar100").teachers["vgg16_bn"].lr == 0.1


def test_own_values_go_over_shared_ones() -> None:
    tree = copy.deepcopy(TREE)
    tree["recipes"]["smoke"]["students"]["titn"] = {"epochs": 7}
    students = parse_params(tree).recipes["smoke"].students
    assert students["titn"].epochs == 7
    assert students["titn"].model == "titn"
    assert students["tnt"].epochs == TREE["recipes"]["smoke"]["student"]["epochs"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("recipes.smoke.students.titn.epochs", 0, ["recipes.smoke.students.titn.epochs", "0", "1 to"]),
        ("recipes.smoke.students.titn.epochs", 1.5, ["students.titn.epochs", "1.5", "integer"]),
        ("recipes.smoke.students.titn.epochs", True, ["students.titn.epochs", "True", "integer"]),
        ("recipes.smoke.students.titn.lr", "fast", ["students.titn.lr", "'fast'", "number"]),
        ("recipes.smoke.students.titn.lr", float("nan"), ["students.titn.lr", "nan", "allowed"]),
        ("recipes.smoke.students.titn.lr", -0.1, ["students.titn.lr", "-0.1"]),
        ("recipes.smoke.students.titn.optimiser", "sgd", ["optimiser", "unknown key", "optimizer"]),
        ("recipes.smoke.dataset", {"a\nb": 1}, ["'a\\nb'", "unknown key"]),
        ("recipes.smoke.students.titn.optimizer", "lion", ["lion", "sgd, adam, adamw, rmsprop"]),
        ("recipes.smoke.students.titn.views", "mixpu", ["mixpu", "default, mixup"]),
        ("recipes.smoke.students.titn.arguments", [1], ["students.titn.arguments", "[1]", "not a mapping"]),
        ("recipes.smoke.students.titn.arguments", {1: 1}, ["students.titn.arguments", "1", "window: 4"]),
        ("recipes.smoke.students.titn.arguments", {"a": None}, ["students.titn.arguments.a", "None", "a number"]),
        ("recipes.smoke.students.titn.arguments", {"a": float("inf")}, ["titn.arguments.a", "inf", "a number"]),
        ("recipes.smoke.views.default.operations.count", 3, ["operations.count", "one level up"]),
        ("recipes.smoke.views.default.count", None, ["views.default.count", "None"]),
        ("recipes.smoke.dataset", None, ["recipes.smoke.dataset", "not a mapping"]),
        ("recipe", "imagenet21k", ["imagenet", "digits"]),
        ("teachers", ["resnet51"], ["teachers", "resnet51", "in no recipe", "resnet50"]),
        ("view_recipes", ["mixpu"], ["view_recipes", "mixpu", "in no recipe", "mixup"]),
        ("students", {"tint": "default"}, ["students", "tint", "in no recipe", "titn"]),
        ("teachers", ["vgg16", "vgg16"], ["twice"]),
        ("students", {"titn": "mixpu"}, ["students", "'mixpu'", "mixup"]),
        ("extra", 1, ["extra", "unknown key"]),
    ],
)
def test_what_is_not_allowed_is_refused_by_key_value_and_way_out(path: str, value: Any, words: list[str]) -> None:
    tree = copy.deepcopy(TREE)
    *parents, last = path.split(".")
    node = tree
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(UsageError) as error:
        parse_params(tree)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_warm_up_longer_than_the_training_is_refused_with_both_numbers() -> None:
    tree = copy.deepcopy(TREE)
    tree["recipes"]["smoke"]["students"]["titn"] = {"warmup_epochs": 2.5}
    with pytest.raises(UsageError, match=r"smoke\.students\.titn\.warmup_epochs: 2\.5 is more than .*epochs, 2, "):
        parse_params(tree)
    tree["recipes"]["smoke"]["students"]["titn"] = {"warmup_epochs": 2}
    assert parse_params(tree).recipes["smoke"].students["titn"].warmup_epochs == 2.0
    digits = parse_params(tree).recipes["digits"]
    assert override(digits.students["titn"], {"epochs": "1"}, "students.titn").warmup_epochs == 1.0
    with pytest.raises(UsageError, match=r"warmup_epochs: 1\.5 is more than students\.titn\.epochs, 1,"):
        override(digits.students["titn"], {"epochs": "1", "warmup_epochs": "1.5"}, "students.titn")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-03"])
def test_a_number_may_be_written_with_an_exponent(text: str) -> None:
    assert override(STUDENT, {"lr": text}, "students.titn").lr == 0.001


def listing(**lists: Any) -> Params:
    return parse_params({**copy.deepcopy(TREE), **lists})


def test_names_at_the_top_that_the_recipe_lacks_are_no_error() -> None:
    params = listing(recipe="folder-small")  # it has two teachers and no view recipe mixup
    small = params.select(None)
    assert listing(view_recipes=["mixup", "default"]).labelled(small) == ("default",)
    with pytest.raises(UsageError, match="view_recipes: none of mixup is in recipes.folder-small.views; .* default"):
        listing(view_recipes=["mixup"]).labelled(small)


@pytest.mark.parametrize("recipe", ["digits", "photos-small"])  # the one at the top, and one that --recipe names
def test_the_teachers_at_the_top_are_candidates_of_a_recipe_that_has_them_all(recipe: str) -> None:
    small = PARAMS.recipes["photos-small"]
    assert listing(recipe=recipe).candidates(small) == ("mobilenet_v3_large", "resnet18"), "one is in no list"
    chosen = listing(recipe=recipe, teachers=["resnet18"])
    assert chosen.candidates(small) == ("resnet18",)
    assert "-S 'teachers=[mobilenet_v3_large, resnet18]'" in listing().dvc_command(small)


def test_dvc_is_told_why_the_lists_do_not_fit_a_recipe() -> None:
    params = listing(
        teachers=["vgg16_bn", "vgg19"], view_recipes=["default"], students={"tnt": "mixup", "titn-hard": "light"}
    )
    assert listing().faults_of_lists(params.recipes["digits"]) == []
    listing().require_lists(params.recipes["digits"])
    best = params.recipes["cifar100-best"]
    assert params.faults_of_lists(best) == [
        "teachers: 'vgg19' is not in recipes.cifar100-best",
        "students.tnt: 'mixup' differs from recipes.cifar100-best.students.tnt.views ('default')",
        "students.titn-hard: 'light' differs from recipes.cifar100-best.students.titn-hard.views ('default')",
    ]
    light = listing(students={"titn-light": "light"})
    assert light.faults_of_lists(best)[-1] == "students.titn-light: view recipe 'light' is not in view_recipes"
    with pytest.raises(UsageError, match="params.yaml: teachers: 'vgg19' is not in .* dvc exp run -S recipe=cifar"):
        params.require_lists(best)


@pytest.mark.parametrize("recipe", list(TREE["recipes"]))
@pytest.mark.parametrize(
    "lists",
    [
        {},
        {
            "teachers": ["squeezenet1_1"],
            "view_recipes": ["light"],
            "students": {"titn-hard": "light", "vit": "mixup"},
        },
    ],
)
def test_the_line_for_dvc_makes_the_lists_fit(tmp_path: Path, recipe: str, lists: dict[str, Any]) -> None:
    hydra = pytest.importorskip("dvc.utils.hydra", reason="comes with the extra dvc")
    file = tmp_path / "params.yaml"
    recipes = {name: TREE["recipes"][name] for name in {"digits", "cifar100-best", recipe}}  # which have all names
    tree = {**copy.deepcopy(TREE), **lists, "recipes": copy.deepcopy(recipes)}
    YAML().dump(tree, file)
    params = parse_params(tree)
    command, _, *changes = shlex.split(params.dvc_command(params.recipes[recipe]))[1:]
    assert (command, changes[::2]) == ("exp", ["-S"] * 5)
    hydra.apply_overrides(file, changes[1::2])
    changed = load_params(file)
    assert changed.recipe == recipe and changed.faults_of_lists(changed.select(None)) == []
    kept = [name for name in lists.get("students", TREE["students"]) if name in TREE["recipes"][recipe]["students"]]
    assert list(changed.students) == (kept or list(TREE["recipes"][recipe]["students"]))


@pytest.mark.parametrize("name", ["kept", "raw", "runs", "work"])
def test_a_recipe_may_not_be_called_like_a_shared_folder_of_data(name: str) -> None:
    tree = copy.deepcopy(TREE)
    tree["recipes"][name] = tree["recipes"]["smoke"]
    with pytest.raises(UsageError, match=f"recipes.{name}: '{name}' is a folder of data/ that all recipes share"):
        parse_params(tree)


def test_a_missing_key_is_named() -> None:
    tree = copy.deepcopy(TREE)
    del tree["recipes"]["smoke"]["views"]["default"]["count"]
    with pytest.raises(UsageError, match=r"recipes\.smoke\.views\.default\.count: missing"):
        parse_params(tree)


def params_with_lr(tmp_path: Path, scalar: str) -> Params:
    """Load the part of the project's file that has the recipe `smoke`, its teacher's rate written in another way."""
    text = FILE.read_text().replace("recipe: digits", "recipe: smoke")
    top, smoke = text[: text.index("\n  # The bundled")], text[text.index("\n  smoke:") :]
    assert smoke.count("lr: 0.001,") == 1
    file = tmp_path / "params.yaml"
    file.write_text(top + smoke.replace("lr: 0.001,", f"lr: {scalar},"))
    return load_params(file)


@pytest.mark.parametrize(
    ("scalar", "value"),
    [("1e-3", 0.001), ("1E-5", 1e-5), (".5", 0.5), ("1.", 1.0), ("+3", 3.0), ("0x1F", 31.0), ("1_0", 10.0),
     ("010", 10.0)],
)  # fmt: skip
def test_a_number_is_what_dvc_reads(tmp_path: Path, scalar: str, value: float) -> None:
    assert override(STUDENT, {"lr": scalar}, "titn") == dataclasses.replace(STUDENT, lr=value)
    assert params_with_lr(tmp_path, scalar) == params_with_lr(tmp_path, f"{value:.5f}")
    assert params_with_lr(tmp_path, scalar).recipes["smoke"].teachers["vgg16"].lr == value


@pytest.mark.parametrize(
    "scalar",
    ["no", "Yes", "on", "True", "NULL", "1:30", ".inf", ".nan", "1e400", "2026-01-01", "2026-13-45", "1,000", "0o9",
     "9" * 31, "=", "!!float 1", "!!python/object:os.system x", "*alias", "&anchor 0.1", "'0.1'"],
)  # fmt: skip
def test_what_is_no_number_is_refused(tmp_path: Path, scalar: str) -> None:
    with pytest.raises(UsageError):
        params_with_lr(tmp_path, scalar)
    with pytest.raises(UsageError):
        override(STUDENT, {"lr": scalar}, "titn")


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(FILE.read_text() + "\nrecipe: digits\n")
    with pytest.raises(UsageError, match="given twice"):
        load_params(file)


@pytest.mark.parametrize("text", ["", "[", "recipe: digits", "a: &x 1\nb: *x", "\x00", "- 1", "{" * 5000])
def test_a_file_that_is_no_params_file_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        load_params(file)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not found; run the command in the project's folder"):
        load_params(tmp_path / "params.yaml")


def test_dvc_reads_the_same_values() -> None:
    serialize = pytest.importorskip("dvc.utils.serialize", reason="comes with the extra dvc")
    assert serialize.load_yaml(FILE) == TREE


def _paths(tree: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(tree, dict):
        return [prefix]
    return [prefix, *(path for key, value in tree.items() for path in _paths(value, (*prefix, key)))][
        bool(not prefix) :
    ]


ANY = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=75)
@given(path=st.sampled_from(_paths(TREE)), value=ANY)
def test_any_value_anywhere_is_accepted_whole_or_refused_in_one_line(path: tuple[str, ...], value: Any) -> None:
    tree = copy.deepcopy(TREE)
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    try:
        params = parse_params(tree)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert params.recipe in params.recipes


def view_recipe(store: str = "pixels", **operations: Any) -> ViewRecipe:
    tree = copy.deepcopy(TREE)
    smoke = tree["recipes"]["smoke"]
    smoke["dataset"] |= {"source": "folder", "store": store}
    smoke["views"]["default"]["operations"] = operations
    return parse_params(tree).recipes["smoke"].views["default"]


def test_a_resized_crop_is_written_as_spans_and_the_one_left_out_is_filled_in() -> None:
    given = view_recipe("encoded", resized_crop={"scale": [0.35, 1]})
    assert given.resized_crop == {"scale": [0.35, 1.0], "ratio": [3 / 4, 4 / 3]}
    assert deciding_values(given)["resized_crop"] == given.resized_crop
    assert view_recipe("encoded", resized_crop={}) == view_recipe("encoded")
    assert "resized_crop" not in deciding_values(view_recipe())
    assert override(given, {"flip": "true"}, "views") == dataclasses.replace(given, flip=True)


def test_partners_are_pairs_by_default_where_an_image_is_decoded_for_each_view() -> None:
    assert view_recipe("encoded", mixing="both").partner == "paired"
    assert view_recipe("encoded", mixing="both", partner="uniform").partner == "uniform"
    assert view_recipe("encoded").partner == view_recipe(mixing="both").partner == "uniform"
    assert view_recipe(mixing="mixup", partner="paired").partner == "paired"


@pytest.mark.parametrize(
    ("operations", "words"),
    [
        (
            {"resized_crop": {"scale": [0.5, 0.1]}},
            r"resized_crop\.scale: \[0\.5, 0\.1\] is no \[low, high\] from 0\.0001",
        ),
        ({"resized_crop": {"ratio": [1]}}, r"ratio: \[1\] is no .* write it as ratio: \[0\.75, 1\.333\]"),
        ({"resized_crop": {"scale": [True, 1]}}, "scale: .*is no"),
        ({"resized_crop": {"size": [1, 1]}}, "resized_crop.size: unknown key; allowed are scale, ratio"),
        ({"resized_crop": True}, "resized_crop: True is not a mapping"),
        ({"magnitude": 5}, "magnitude: 5 needs autoaugment: randaugment, but it is none; change that, or leave"),
        ({"autoaugment": "cifar10", "magnitudes": "timm"}, "magnitudes: 'timm' needs .* but it is cifar10"),
        ({"autoaugment": "randaugment", "magnitude": 31}, "magnitude: 31 is out of range; allowed is 0 to 30"),
        ({"autoaugment": "randaugment", "magnitude": 11, "magnitudes": "timm"}, "0 to 10 with magnitudes: timm"),
        ({"mixing_probability": 0.5}, "mixing_probability: 0.5 needs mixing: cutmix or mixup or both, but it is none"),
        ({"mixing": "mixup", "cutmix_alpha": 1.0}, "cutmix_alpha: 1.0 needs mixing: cutmix or both, but it is mixup"),
        ({"partner": "paired"}, "partner: 'paired' needs mixing: .* leave partner out"),
    ],
)
def test_operations_that_cannot_be_are_refused_by_key_value_and_way_out(operations: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        view_recipe("encoded", **operations)
    assert "\n" not in str(error.value)


def test_squares_cannot_be_cut() -> None:
    with pytest.raises(
        UsageError, match=r"default\.resized_crop: .* has store: pixels; set dataset.store to encoded, or"
    ):
        view_recipe("pixels", resized_crop={"scale": [0.1, 1.0]})


def test_overrides_are_checked_like_the_file() -> None:
    assert override(STUDENT, {"epochs": "5", "lr": "0.01"}, "titn") == dataclasses.replace(STUDENT, epochs=5, lr=0.01)
    for settings_, words in (
        ({"epochs": "0"}, "titn.epochs"),
        ({"epoch": "5"}, "unknown key"),
        ({"lr": "a: 1\na: 2"}, "--set lr=.* line 2: the key 'a' is given twice; keep one"),
    ):
        with pytest.raises(UsageError, match=words):
            override(STUDENT, settings_, "titn")


def test_a_later_field_at_its_absent_value_leaves_former_results_up_to_date() -> None:
    """Results from before `ema`, `soft` and `arguments` were fields have the same deciding values."""
    plain = StudentRecipe(model="titn", epochs=1, batch_size=8, lr=0.1)
    values = deciding_values(plain)
    assert not {"ema", "soft", "arguments"} & values.keys()
    assert {"model", "epochs", "lr", "micro_batch", "inner_block", "alpha"} <= values.keys()
    used: dict[str, Any] = {"ema": 0.99, "soft": 2.0, "arguments": {"mlp_ratio": 2}}
    assert deciding_values(dataclasses.replace(plain, **used)) == {**values, **used}


def test_where_a_folder_lies_decides_nothing() -> None:
    somewhere, elsewhere = (DatasetRecipe(source="folder", path=path) for path in ("", "my-images"))
    assert deciding_values(somewhere) == deciding_values(elsewhere) and "path" not in deciding_values(elsewhere)


def test_a_teachers_model_is_its_name_unless_given_and_what_it_resolves_to_is_recorded_elsewhere() -> None:
    tree = copy.deepcopy(TREE)
    # One that is finished trains in no epoch, so the warm-up that all teachers share does not matter.
    given = {"model": "torchvision/resnet18", "stem": "cifar", "input_size": 64, "normalization": "model", "epochs": 0}
    tree["recipes"]["digits"]["teachers"]["mine"] = {"batch_size": 8, "lr": 0.1, **given}
    teachers = parse_params(tree).recipes["digits"].teachers
    assert teachers["resnet50"].model == "resnet50"
    assert {key: getattr(teachers["mine"], key) for key in given} == given
    assert teachers["mine"].warmup_epochs == 0.5
    assert not {"model", "stem", "input_size", "normalization"} & deciding_values(teachers["mine"]).keys()
