"""Strict loading of params.yaml into recipes.

params.yaml is read as DVC reads it. Unknown keys, wrong types and values out of range are refused, naming the key, the
value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from pipeline.config.recipes import (
    ENCODED,
    DatasetRecipe,
    FitRecipe,
    LabelRecipe,
    Recipe,
    RecipeSection,
    SelectRecipe,
    StudentRecipe,
    TeacherRecipe,
    ViewRecipe,
)
from pipeline.errors import StorageError, UsageError
from pipeline.system.storage import read_if_exists

T = TypeVar("T", bound=RecipeSection)

RESERVED = frozenset({"kept", "raw", "runs", "work"})
"""What no recipe may be called: data/ has folders of these names beside those of the recipes."""
MAX_BYTES = 100_000
MAX_DIGITS = 30  # of an integer; every range ends below
MAX_LEVELS = 20  # of nesting; params.yaml has six
TIMM_MAX_MAGNITUDE = 10
_ODD = re.compile("[\x85\u2028\u2029]|(?m:^%)")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")


@dataclass(frozen=True)
class Params:
    """The whole of params.yaml.

    The lists at the top serve every recipe: a command takes the names that its recipe has. DVC, which runs a stage for
    each name, needs lists that fit: see `faults_of_lists`.

    Attributes:
        recipe: Name of the default recipe.
        teachers: Names of the candidate teachers, in the order of the tables.
        view_recipes: Names of the view recipes that `dvc repro` labels.
        students: For each student that `dvc repro` trains, the name of the view recipe it trains on.
        recipes: Every recipe by name.
    """

    recipe: str
    teachers: tuple[str, ...]
    view_recipes: tuple[str, ...]
    students: Mapping[str, str]
    recipes: Mapping[str, Recipe]

    def select(self, name: str | None) -> Recipe:
        """Return the recipe called `name`, or the default one.

        Raises:
            UsageError: There is no such recipe.
        """
        name = self.recipe if name is None else name
        if name not in self.recipes:
            raise UsageError(f"--recipe {name}: no such recipe in params.yaml; choose from {', '.join(self.recipes)}")
        return self.recipes[name]

    def candidates(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the candidate teachers of a recipe: those of `teachers`, or all of its own where it lacks one.

        A list with other names was written for another recipe, and would leave some of this one's out without a word.
        """
        return self.teachers if set(self.teachers) <= recipe.teachers.keys() else tuple(recipe.teachers)

    def labelled(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the view recipes of a recipe that are labelled: those of `view_recipes` that it has.

        Raises:
            UsageError: It has none of them.
        """
        return _those_in(self.view_recipes, recipe.views, "view_recipes", f"recipes.{recipe.name}.views")

    def faults_of_lists(self, recipe: Recipe) -> list[str]:
        """Say why `dvc repro` cannot run a recipe with the lists at the top; empty where it can.

        DVC runs a stage for each name of `teachers`, `view_recipes` and `students`, and fails at the first that the
        recipe lacks, once those before it have been trained.
        """
        path, faults = f"recipes.{recipe.name}", []
        for key, names, known in (
            ("teachers", self.teachers, recipe.teachers),
            ("view_recipes", self.view_recipes, recipe.views),
            ("students", self.students, recipe.students),
        ):
            faults += [f"{key}: {name!r} is not in {path}" for name in names if name not in known]
        for name, views in self.students.items():
            if name in recipe.students and views != (own := recipe.students[name].views):
                faults.append(f"students.{name}: {views!r} differs from {path}.students.{name}.views ({own!r})")
            elif views in recipe.views and views not in self.view_recipes:
                faults.append(f"students.{name}: view recipe {views!r} is not in view_recipes")
        return faults

    def dvc_command(self, recipe: Recipe) -> str:
        """Return the line by which DVC runs a recipe: its candidates, and those students and views that the lists have.

        Of a list of which the recipe has no name, all of the recipe's take its place.
        """
        teachers = self.candidates(recipe)
        students = [name for name in self.students if name in recipe.students] or list(recipe.students)
        views = [name for name in self.view_recipes if name in recipe.views]
        views = list(dict.fromkeys([*views, *(recipe.students[name].views for name in students)]))
        pairs = ", ".join(f"{name}: {recipe.students[name].views}" for name in students)
        lists = f"-S 'teachers=[{', '.join(teachers)}]' -S 'view_recipes=[{', '.join(views)}]'"
        # `students={...}` alone would add to the students there.
        return f"dvc exp run -S recipe={recipe.name} {lists} -S '~students' -S '+students={{{pairs}}}'"

    def require_lists(self, recipe: Recipe) -> None:
        """Check that `dvc repro` can run a recipe with the lists at the top.

        Raises:
            UsageError: It cannot; the message ends with the line that does.
        """
        if faults := self.faults_of_lists(recipe):
            raise UsageError(f"params.yaml: {'; '.join(faults)}; run this instead: {self.dvc_command(recipe)}")


def load_params(path: Path) -> Params:
    """Load and check params.yaml.

    Args:
        path: The file.

    Raises:
        UsageError: The file is missing, is not YAML, or holds something that is not allowed.
    """
    try:
        raw = read_if_exists(path)
    except StorageError as error:
        raise UsageError(str(error)) from None
    if raw is None:
        raise UsageError(f"{path}: not found; run the command in the project's folder, or make one: `pipeline init`")
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{path}: {len(raw)} bytes; at most {MAX_BYTES} are allowed")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8: {error}") from None
    return parse_params(load_yaml(text, f"{path}"))


def parse_params(tree: Any) -> Params:
    """Build Params from the plain mappings, lists and scalars of params.yaml.

    Raises:
        UsageError: Something in it is not allowed; the message names the key, the value and what is.
    """
    keys = [field.name for field in dataclasses.fields(Params)]
    top = _section(tree, "params.yaml", keys, required=keys)
    for name in RESERVED & _mapping(top["recipes"], "recipes").keys():
        raise UsageError(f"recipes.{name}: {name!r} is a folder of data/ that all recipes share; call it otherwise")
    recipes = {_name(name, "recipes"): _recipe(name, section) for name, section in top["recipes"].items()}
    params = Params(
        recipe=_name(top["recipe"], "recipe"),
        teachers=_names(top["teachers"], "teachers"),
        view_recipes=_names(top["view_recipes"], "view_recipes"),
        students={
            _name(student, "students"): _name(views, f"students.{student}")
            for student, views in _mapping(top["students"], "students").items()
        },
        recipes=recipes,
    )
    _check_references(params)
    return params


def override(recipe: T, settings: Mapping[str, str], key: str) -> T:
    """Return a copy of a dataclass with fields replaced by values written as in params.yaml.

    Args:
        recipe: A frozen dataclass of pipeline.config.recipes.
        settings: Field name to YAML scalar, as `{"epochs": "3"}`.
        key: What the dataclass is called in messages.

    Raises:
        UsageError: No such field, or a value that is not allowed.
    """
    parsed = {name: load_yaml(text, f"--set {name}={text}") for name, text in settings.items()}
    return _build(type(recipe), {**dataclasses.asdict(recipe), **parsed}, key)


def _recipe(name: str, section: Any) -> Recipe:
    """Build one recipe; `teacher` and `student` hold what `teachers` and `students` share."""
    path = f"recipes.{name}"
    optional = ("teacher", "student", "select", "label")
    required = ("dataset", "views", "teachers", "students")
    parts = _section(section, path, (*required, *optional), required=required)

    def family(cls: type[T], kind: str, extra: Any) -> dict[str, T]:
        shared = _mapping(parts.get(kind, {}), f"{path}.{kind}")
        members = _mapping(parts[f"{kind}s"], f"{path}.{kind}s")
        return {
            _name(member, f"{path}.{kind}s"): _build(
                cls,
                {**extra(member), **shared, **_mapping(fields, f"{path}.{kind}s.{member}")},
                f"{path}.{kind}s.{member}",
            )
            for member, fields in members.items()
        }

    dataset = _build(DatasetRecipe, parts["dataset"], f"{path}.dataset")
    recipe = Recipe(
        name=name,
        dataset=dataset,
        views={
            _name(view, f"{path}.views"): _view_recipe(fields, f"{path}.views.{view}", dataset.store)
            for view, fields in _mapping(parts["views"], f"{path}.views").items()
        },
        teachers=family(TeacherRecipe, "teacher", lambda member: {"model": member}),
        select=_build(SelectRecipe, parts.get("select", {}), f"{path}.select"),
        label=_build(LabelRecipe, parts.get("label", {}), f"{path}.label"),
        students=family(StudentRecipe, "student", lambda member: {"model": member}),
    )
    if "default" not in recipe.views:
        raise UsageError(f"{path}.views.default: missing; teachers train on this view recipe")
    for member, student in recipe.students.items():
        where = f"{path}.students.{member}"
        if student.views not in recipe.views:
            raise UsageError(
                f"{where}.views: {student.views!r} is no view recipe; choose from {', '.join(recipe.views)}"
            )
        if student.soft and not recipe.label.topk:
            raise UsageError(
                f"{where}.soft: {student.soft:g} needs the teacher's probabilities, and "
                f"{path}.label.topk is 0; keep some, as label: {{topk: 5}}, or set soft to 0"
            )
    return recipe


def _view_recipe(section: Any, path: str, store: str) -> ViewRecipe:
    """Build a view recipe, whose operations are a section of their own: teachers depend on them, not on the count.

    Args:
        section: Of params.yaml.
        path: Its keys.
        store: How the data set is stored, which decides whether partners are pairs by default.
    """
    parts = _section(section, path, ("count", "seed", "operations"), required=("count", "seed", "operations"))
    operations = _mapping(parts["operations"], f"{path}.operations")
    for key in ("count", "seed"):
        if key in operations:
            raise UsageError(f"{path}.operations.{key}: belongs one level up, at {path}.{key}")
    if store == ENCODED and operations.get("mixing", "none") != "none":
        operations = {"partner": "paired", **operations}
    recipe = _build(ViewRecipe, {**operations, "count": parts["count"], "seed": parts["seed"]}, path)
    if recipe.resized_crop and store != ENCODED:
        raise UsageError(
            f"{path}.resized_crop: {dict(recipe.resized_crop)} needs the images' own sizes, and the data set has "
            f"store: {store}; set dataset.store to encoded, or leave it out"
        )
    if recipe.magnitudes == "timm" and recipe.magnitude > TIMM_MAX_MAGNITUDE:
        raise UsageError(
            f"{path}.magnitude: {recipe.magnitude} is out of range; allowed is 0 to {TIMM_MAX_MAGNITUDE} with "
            "magnitudes: timm"
        )
    return recipe


def _check_references(params: Params) -> None:
    """Check that the default recipe exists, and that each name at the top is in some recipe."""
    params.select(params.recipe)
    recipes = params.recipes.values()
    for key, names, known in (
        ("teachers", params.teachers, {name for recipe in recipes for name in recipe.teachers}),
        ("view_recipes", params.view_recipes, {name for recipe in recipes for name in recipe.views}),
        ("students", params.students, {name for recipe in recipes for name in recipe.students}),
        ("students", params.students.values(), {name for recipe in recipes for name in recipe.views}),
    ):
        for name in names:
            if name not in known:
                raise UsageError(f"{key}: {name!r} is in no recipe; choose from {', '.join(sorted(known))}")


def _those_in(names: typing.Iterable[str], known: typing.Collection[str], key: str, path: str) -> tuple[str, ...]:
    found = tuple(name for name in names if name in known)
    if not found:
        raise UsageError(f"{key}: none of {', '.join(names)} is in {path}; its own are {', '.join(known)}")
    return found


def _without_removed(cls: type[RecipeSection], values: Any, path: str) -> dict[str, Any]:
    """Drop removed fields that have the value `absent`; refuse any other value."""
    kept = dict(_mapping(values, path))
    for old in cls.removed:
        if old.name in kept and (value := kept.pop(old.name)) != old.absent:
            raise UsageError(f"{path}.{old.name}: {value!r} is no longer possible, only {old.absent!r}; leave it out")
    return kept


def _build(cls: type[T], values: Any, path: str) -> T:
    """Build a recipe dataclass from a mapping, checking every value."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    required = [name for name, field in fields.items() if field.default is field.default_factory]  # both are MISSING
    values = _section(_without_removed(cls, values, path), path, tuple(fields), required=required)
    types = _types(cls)  # type: ignore[arg-type]  # mypy takes the class for one of its instances, without a hash
    built = cls(**{name: _value(value, types[name], fields[name], f"{path}.{name}") for name, value in values.items()})
    for name, field in fields.items():
        other, allowed = field.metadata.get("needs", ("", ()))
        value = getattr(built, name)
        if other and value != field.metadata["absent"] and (chosen := getattr(built, other)) not in allowed:
            raise UsageError(
                f"{path}.{name}: {value!r} needs {other}: {' or '.join(allowed)}, but it is {chosen}; change that, or "
                f"leave {name} out"
            )
    if isinstance(built, FitRecipe) and built.warmup_epochs > built.epochs > 0:
        raise UsageError(
            f"{path}.warmup_epochs: {built.warmup_epochs:g} is more than {path}.epochs, {built.epochs}, so that lr is "
            "never reached; make it smaller"
        )
    if isinstance(built, DatasetRecipe) and built.max_side and built.store != "encoded":
        raise UsageError(
            f"{path}.max_side: {built.max_side} is of an encoded store; add store: encoded, or leave it out"
        )
    return built


@functools.cache
def _types(cls: type[RecipeSection]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _value(value: Any, expected: Any, field: dataclasses.Field[Any], path: str) -> Any:
    """Check one value's type, then its range or choices."""
    if "spans" in field.metadata:
        return _spans(value, field.metadata["spans"], path)
    if typing.get_origin(expected) is Mapping:
        return _arguments(value, path)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise UsageError(f"{path}: {value!r} is not {_TYPE_NAMES[expected]}")
    if "range" in field.metadata:
        (low, high), off = field.metadata["range"], field.metadata["off"]
        if not (math.isfinite(value) and (low <= value <= high or value == off)):
            beside = "" if off is None else f", or {off:g}"
            raise UsageError(f"{path}: {value!r} is out of range; allowed is {low} to {high}{beside}")
    if "choices" in field.metadata and value not in field.metadata["choices"]:
        raise UsageError(f"{path}: {value!r} is not allowed; choose from {', '.join(field.metadata['choices'])}")
    return value


def _arguments(value: Any, path: str) -> dict[str, int | float | str | bool]:
    """Check that a value is a mapping of names to plain values; the types are checked elsewhere."""
    arguments = _mapping(value, path)
    for name, argument in arguments.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(f"{path}: {name!r} is no argument's name; write it as {path}: {{window: 4}}")
        if type(argument) not in _TYPE_NAMES or (type(argument) is float and not math.isfinite(argument)):
            raise UsageError(f"{path}.{name}: {argument!r} is not a number, a text, true or false")
    return arguments


def _spans(value: Any, limits: Mapping[str, Any], path: str) -> dict[str, list[float]]:
    """Check a mapping of names to [low, high], and fill in the names that it lacks; an empty one stays so."""
    given, spans = _section(value, path, limits, required=()), {}
    for name, ((lowest, highest), default) in limits.items():
        ends = given.get(name, default)
        is_pair = isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)
        if not (is_pair and lowest <= ends[0] <= ends[1] <= highest):
            raise UsageError(
                f"{path}.{name}: {ends!r} is no [low, high] from {lowest} to {highest}; write it as "
                f"{name}: [{default[0]:.4g}, {default[1]:.4g}]"
            )
        spans[name] = [float(end) for end in ends]
    return spans if given else {}


_TYPE_NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


def _section(value: Any, path: str, allowed: typing.Iterable[str], *, required: typing.Iterable[str]) -> dict[str, Any]:
    """Check that a value is a mapping of allowed keys with all required ones."""
    mapping = _mapping(value, path)
    allowed = tuple(allowed)
    for key in mapping:
        if key not in allowed:
            shown = key if str(key).isidentifier() else repr(key)
            raise UsageError(f"{path}.{shown}: unknown key; allowed are {', '.join(allowed)}")
    for key in required:
        if key not in mapping:
            raise UsageError(f"{path}.{key}: missing; add it")
    return mapping


def _mapping(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{path}: {value!r} is not a mapping of keys to values")
    return value


def _names(value: Any, path: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{path}: {value!r} is not a list of names")
    names = tuple(_name(item, path) for item in value)
    if len(set(names)) != len(names):
        raise UsageError(f"{path}: {value!r} names something twice")
    return names


def _name(value: Any, path: str) -> str:
    if not isinstance(value, str) or not _NAME.match(value):
        raise UsageError(f"{path}: {value!r} is not a name (lower-case letters, digits, - and _, at most 64)")
    return value


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML with DVC's parser, refusing what params.yaml does not need.

    Aliases, anchors, tags, directives, keys that are no text, keys given twice, integers of more than MAX_DIGITS digits
    and more than MAX_LEVELS levels are refused.

    Args:
        text: YAML 1.2.
        where: The file or option that it comes from, for messages.

    Returns:
        Mappings, lists and scalars.

    Raises:
        UsageError: It is not valid YAML or holds what is refused.
    """
    odd = _ODD.search(text)
    if odd is not None:
        line, what = text.count("\n", 0, odd.start()) + 1, "begins a directive" if odd[0] == "%" else "may end a line"
        raise UsageError(f"{where} line {line}: {odd[0]!a} {what} of YAML; remove it")
    parser = YAML(typ="safe", pure=True)
    parser.Composer = _StrictComposer
    try:
        return parser.load(text)
    except _Refused as error:
        raise UsageError(f"{where} line {error.problem_mark.line + 1}: {error.problem}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(filter(None, (error.context, error.problem)))
        raise UsageError(f"{where} line {mark.line + 1}: not valid YAML: {reason}; mend the line") from None
    except (YAMLError, ValueError, IndexError) as error:
        raise UsageError(f"{where}: not valid YAML: {' '.join(str(error).split()) or type(error).__name__}") from None


class _Refused(ComposerError):
    """Valid YAML that params.yaml does not need."""


class _StrictComposer(Composer):
    """A composer with the restrictions of `load_yaml`."""

    levels = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node:
        event = self.parser.peek_event()
        if getattr(event, "anchor", None) is not None:
            _refuse(event, f"the anchor or alias {event.anchor}; write the value out")
        if getattr(event, "tag", None) is not None:
            _refuse(event, f"the tag {event.tag}; write the value alone")
        self.levels += 1
        if self.levels > MAX_LEVELS:
            _refuse(event, "nested too deeply; params.yaml has six levels")
        node: Node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def compose_scalar_node(self, anchor: str | None) -> ScalarNode:
        node: ScalarNode = super().compose_scalar_node(anchor)
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
            _refuse(node, f"{node.value} has more than {MAX_DIGITS} digits")
        return node

    def compose_mapping_node(self, anchor: str | None) -> MappingNode:
        mapping: MappingNode = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in mapping.value:
            if not isinstance(key, ScalarNode):
                _refuse(key, f"a {key.id} as a key; keys are names")
            if key.tag != "tag:yaml.org,2002:str":
                _refuse(key, f"the key {key.value!r} is not a plain name; quote it")
            if key.value in keys:
                _refuse(key, f"the key {key.value!r} is given twice; keep one")
            keys.add(key.value)
        return mapping


def _refuse(part: Any, problem: str) -> NoReturn:
    raise _Refused(None, None, problem, part.start_mark)
