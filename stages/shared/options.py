"""Options that several commands have, the parsing of their values, and the context that they make."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.config.params import Params
from pipeline.config.recipes import PRECISIONS
from pipeline.errors import UsageError
from pipeline.system.stopping import StopSignal
from stages.shared.context import Context
from stages.shared.params import own_code_here, read_params
from stages.shared.paths import PARAMS, RECORDS
from stages.shared.watching import check_watchers

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.inference.classifier import Classifier

STOP = StopSignal()
MAX_SEED = 2**31 - 1
WATCH = f"{__name__}.watch"  # in click's `meta`
LOG_WIDTH = 180  # columns of a table in a log, where no terminal gives one


class FilePath(click.Path):
    """A path that is not empty; an empty one comes from an unset shell variable, and `Path` would read it as `.`.

    Args:
        must_exist: Whether a path that does not exist is a UsageError.
    """

    def __init__(self, *, must_exist: bool = False) -> None:
        super().__init__(path_type=Path)
        self._must_exist = must_exist

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the path."""
        if not str(value):
            self.fail("an empty path", param, context)
        path = Path(os.fsdecode(super().convert(value, param, context)))
        if self._must_exist:
            try:
                path.stat()
            except OSError as error:
                raise UsageError(f"{path}: {error.strerror}; name what exists") from None
        return path


class TeacherWhat(FilePath):
    """A teacher as stages.shared.labellers.find_member reads it; often a path, so that shells complete it as one."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        """Return the text; `./x` stays a path where a recipe's teacher has the name x."""
        super().convert(value, param, context)
        return os.fsdecode(value)


class FiniteFloat(click.FloatRange):
    """A finite number; NaN would pass any bound, since it compares with none."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the number."""
        number = super().convert(value, param, context)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, context)
        return number


PATH = FilePath()
EXISTING = FilePath(must_exist=True)
TEACHER = TeacherWhat()


def split_names(text: str) -> tuple[str, ...]:
    """Split `a,b` into distinct names."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise UsageError(f"{text!r}: write distinct names separated by commas, as a,b")
    return names


recipe_option = click.option("--recipe", help="A recipe of params.yaml; default: its `recipe`.")
named_recipe_option = click.option("--recipe", help="A recipe of params.yaml; default: the one that the file names.")
teachers_option = click.option(
    "--teachers",
    type=split_names,
    metavar="A,B,...",
    help="Candidates; default: `teachers` of params.yaml, or all if one is missing.",
)
device_option = click.option("--device", help="cpu, cuda or cuda:1; default: a GPU if there is one.")
any_device_option = click.option("--device", help="cpu, cuda, cuda:1 or mps; default: a GPU with CUDA if there is one.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and why; write nothing.")
precision_option = click.option("--precision", type=click.Choice(PRECISIONS), help="Default: the training's.")


def begin_time_limit(context: click.Context, param: click.Parameter, text: str | None) -> None:
    """Start to count the command's time limit; without the option there is none."""
    STOP.limit(math.inf if text is None else parse_duration(text))


time_limit_option = click.option(
    "--time-limit",
    metavar="9m",
    callback=begin_time_limit,
    expose_value=False,
    help="Once this time is over, finish the step, save and exit with code 75; run again to go on.",
)
records_option = click.option(
    "--out", type=PATH, default=RECORDS, show_default=True, help="The file of records; the curves go beside it."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")


settings_option = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="Replace a field of the recipe, as epochs=3; the run goes to data/runs. Repeatable.",
)  # fmt: skip


def note_watchers(context: click.Context, param: click.Parameter, names: tuple[str, ...]) -> None:
    """Check whom `--watch` names, before anything heavy, and leave them to `open_context`."""
    context.meta[WATCH] = check_watchers(names)


watch_option = click.option(
    "--watch",
    multiple=True,
    metavar="WHAT",
    callback=note_watchers,
    expose_value=False,
    help="tensorboard, or MODULE:CLASS of your own, told of each epoch (docs/watching.md). Repeatable.",
)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --fresh, --seed, --set and --watch."""
    command = settings_option(watch_option(command))
    seeds, what = click.IntRange(0, MAX_SEED), "Initialisation and order."
    command = click.option("--seed", default=0, show_default=True, type=seeds, help=what)(command)
    return click.option("--fresh", is_flag=True, help="Start over instead of going on or keeping a result.")(command)


def open_context(
    recipe: str | None = None,
    device: str | None = None,
    *,
    named_by: Callable[[Params], object] | None = None,
) -> Context:
    """Load params.yaml, choose the recipe, open the console, and check a device that is named.

    Under torchrun only rank 0 prints.

    Args:
        recipe: What `--recipe` names; None takes that of `named_by`, else params.yaml's own.
        device: What `--device` names.
        named_by: Returns the recipe that the command's file names; what is no text counts as none.

    Raises:
        UsageError: params.yaml or a name is wrong.
    """
    params = read_params(PARAMS)
    if recipe is None and named_by is not None and isinstance(named := named_by(params), str):
        if named not in params.recipes:
            known = ", ".join(params.recipes)
            raise UsageError(f"recipe {named}, which the file names, is not in params.yaml; give --recipe, of {known}")
        recipe = named
    watch = click.get_current_context().meta.get(WATCH, ())
    context = Context(params, params.select(recipe), open_console(), STOP, device, watch=watch)
    click.get_current_context().find_root().obj = context.recipe.name  # for the hints of errors
    context.console.quiet = not context.ranks.is_main
    if device is not None:
        _ = context.device
    return context


def open_console() -> Console:
    """Return a command's console: standard error where --json takes standard output; wide in a log."""
    return make_console(stderr=bool(click.get_current_context().params.get("as_json")))


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console of plain lines, in a notebook too: wide in a log; a quiet one prints nothing."""
    from rich.console import Console

    console = Console(stderr=stderr, quiet=quiet, force_jupyter=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def load_model(path: Path, device: str | None, precision: str | None) -> Classifier:
    """Load what a command names, and say which of its blocks are plain and why."""
    from pipeline.inference.loading import format_named, load

    model = load(path, format=format_named(path), device=device, precision=precision, own_code=own_code_here())
    tell_plain(model)
    return model


def tell_plain(classifier: Classifier) -> None:
    """Say on standard error which of its blocks are plain and why."""
    blocks = {"inner block": classifier.inner_block, "outer block": classifier.outer_block}
    if told := [f"{block} {way}" for block, way in blocks.items() if way.startswith("plain (")]:
        click.echo(f"{classifier.file}: {'; '.join(told)}", err=True)


def parse_settings(settings: tuple[str, ...], *, soft: float | None = None) -> dict[str, str]:
    """Split KEY=VALUE pairs; `--soft T` is another way to write `--set soft=T`."""
    pairs = {} if soft is None else {"soft": f"{Decimal(str(soft)):f}"}  # YAML's parsers disagree on 1e-05
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key == "soft" and soft is not None:
            raise UsageError(f"--set {setting} --soft {soft:g}: both set the temperature; give one of them")
        if not equals or not key or not value or key in pairs:
            raise UsageError(f"--set {setting}: write each KEY=VALUE once, as epochs=3")
        pairs[key] = value
    return pairs


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `0,1,2` as distinct seeds."""
    seeds = text.split(",")
    if not all(re.fullmatch(r"0|[1-9][0-9]{0,9}", seed) and int(seed) <= MAX_SEED for seed in seeds):
        raise UsageError(f"--seeds {text}: write whole numbers from 0 to {MAX_SEED} separated by commas, as 0,1,2")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text}: write each seed once, as 0,1,2")
    return tuple(map(int, seeds))


def parse_keep(text: str) -> int:
    """Read `argmax` as 0 and `topk=K` as K."""
    if text == "argmax":
        return 0
    topk = re.fullmatch(r"topk=([1-9][0-9]{0,4})", text)
    if topk is None:
        raise UsageError(f"--keep {text}: write argmax or topk=K, as topk=5")
    return int(topk[1])


def kept_name(topk: int) -> str:
    """Write what `parse_keep` reads: what is kept of each answer."""
    return f"topk={topk}" if topk else "argmax"


def parse_views(text: str) -> tuple[int, int | None]:
    """Read `A:B`, `:B` or `A:` as the first view, by default 0, and the one behind the last, by default None."""
    bounds = re.fullmatch(r"([0-9]{0,6}):([0-9]{0,6})", text)
    if bounds is None or text == ":":
        raise UsageError(f"--views {text}: write A:B for the views A to B - 1, as 0:300; or :B, or A:")
    return int(bounds[1] or 0), int(bounds[2]) if bounds[2] else None


def parse_duration(text: str) -> float:
    """Read `9m`, `90s` or `1h30m` as seconds."""
    parts = re.fullmatch(r"(?:([0-9]{1,4})h)?(?:([0-9]{1,5})m)?(?:([0-9]{1,6})s)?", text)
    counts = parts.groups() if parts else ()
    seconds = sum(int(count or 0) * unit for count, unit in zip(counts, (3600, 60, 1), strict=False))
    if seconds < 1:
        raise UsageError(f"--time-limit {text!r}: write a span of time as 9m, 90s or 1h30m")
    return float(seconds)


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """Read `1,8,64` as distinct numbers of images."""
    names = split_names(text)
    sizes = tuple(int(name) for name in names if re.fullmatch(r"[1-9][0-9]{0,4}", name))
    if len(sizes) != len(names):
        raise UsageError(f"--batch-sizes {text}: write whole numbers from 1 to 99999 separated by commas, as 1,8,64")
    return sizes
