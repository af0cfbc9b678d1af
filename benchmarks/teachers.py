"""Teachers against the common ways to train torchvision's: `python -m benchmarks.teachers`."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

from benchmarks import built_teachers, steps, training
from benchmarks.measure import Row, begin, compare, option_parser, positive
from benchmarks.synthetic import SIZE
from pipeline.config.recipes import TeacherRecipe
from pipeline.inference.speed import interleave
from pipeline.losses import objective
from pipeline.models import TEACHERS
from pipeline.models.teachers import repeated_pooling
from pipeline.system.runtime import keep_freed_memory, resolve_precision
from pipeline.training.batches import Batch
from pipeline.training.column_sum import ColumnSum
from pipeline.training.cpu_convolutions import use_cpu_convolutions
from pipeline.training.optimization import build_optimizer

QUICK = "squeezenet1_1"


@dataclass(frozen=True)
class Setting:
    """A way of running a teacher without this project.

    Attributes:
        precision: `fp32`, or `bf16` for bfloat16 autocast.
        channels_last: Whether the weights are channels last; else NCHW, as torchvision builds them.
        compiled: Whether torch.compile is used.
    """

    precision: str
    channels_last: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """The setting, as the tables name it."""
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"torchvision {self.precision} {layout} {'compiled' if self.compiled else 'eager'}"


COMMON = Setting("fp32")
EVERY_COLUMN = "ours without the column sum"
EAGER = (COMMON, Setting("bf16"), Setting("bf16", channels_last=True))
COMPILED = (Setting("fp32", compiled=True), Setting("bf16", channels_last=True, compiled=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__, threads=2)
    parser.add_argument("--batch-size", type=positive, help="default: 32 on a CPU, 1024 on a GPU, 32 with --quick")
    parser.add_argument("--steps", type=positive, help="of a timed turn; default: 1 on a CPU, 5 on a GPU")
    parser.add_argument("--teachers", help=f"separated by commas; default: all eight, {QUICK} with --quick")
    parser.add_argument(
        "--compile", action="store_true", help="compare with compiled models on a CPU, too; on a GPU it always is"
    )
    parser.add_argument("--only", help="settings of peers to compare with, separated by commas; default: all")
    options = parser.parse_args(arguments)
    chosen = options.teachers.split(",") if options.teachers else [QUICK] if options.quick else list(TEACHERS)
    for name in chosen:
        if name not in TEACHERS:
            parser.error(f"--teachers {name}: is no teacher; choose from {', '.join(TEACHERS)}")
    report = begin("Teachers", options, rounds=(3, 5, 7), batch_size=(32, 32, 1024), steps=(1, 1, 5))
    if options.device.type == "cpu":
        keep_freed_memory()  # as training does
    compiled = options.compile or (options.device.type != "cpu" and not options.quick)
    settings = [*EAGER, *(COMPILED if compiled else ())]
    if options.only:
        settings = [setting for setting in settings if setting.name in options.only.split(",")]
    batch = steps.synthetic_batch(options.batch_size, options.device)
    for name in chosen:
        report.rows += teacher_rows(name, batch, settings, options)
    report.finish(Console(), options.json)


def teacher_rows(name: str, batch: Batch, settings: Sequence[Setting], options: argparse.Namespace) -> list[Row]:
    """Compare training step and forward pass of one teacher with every setting."""
    model, precision = built_teachers.build(name), resolve_precision("auto", options.device)
    compared = []
    for operation in ("training step", "forward"):
        turns = {"ours": our_turn(name, model, batch, operation, precision)}
        turns |= {setting.name: plain_turn(name, model, batch, operation, setting) for setting in settings}
        peers = [setting.name for setting in settings]
        if operation == "training step" and repeated_pooling(model, SIZE) is not None:
            peers.append(EVERY_COLUMN)
            turns[EVERY_COLUMN] = our_turn(name, model, batch, operation, precision, summed=False)
        repeated = {who: steps.repeated(run, options.steps) for who, run in turns.items()}
        seconds = interleave(repeated, rounds=options.rounds, device=options.device)
        torch._dynamo.reset()
        compared += [
            compare(
                f"{name}, {operation} at batch {options.batch_size}",
                1e3 * seconds["ours"] / options.steps,
                1e3 * seconds[peer] / options.steps,
                peer,
                unit="ms",
                higher_is_better=False,
                ours_name=f"{precision} channels_last eager",
            )
            for peer in peers
        ]
    return compared


def our_turn(
    name: str, model: nn.Module, batch: Batch, operation: str, precision: str, *, summed: bool = True
) -> Callable[[], object]:
    """Return a training step or forward pass as `pipeline teacher` does it, with column sums where it takes them."""
    copied = _copy(model, batch, channels_last=True)
    if summed and (repeated := repeated_pooling(copied, SIZE)) is not None:
        repeated.see_once(ColumnSum(repeated.layer, repeated.copies))
    if operation == "forward":
        return steps.forward_pass(copied.eval(), batch, precision=precision)
    recipe = _recipe(name)
    use_cpu_convolutions(copied)
    optimizer = steps.at_rest(build_optimizer(copied.train(), recipe))
    loss = objective(recipe)
    return steps.our_step(copied, batch, recipe=recipe, objective=loss, optimizer=optimizer, precision=precision)


def plain_turn(name: str, model: nn.Module, batch: Batch, operation: str, setting: Setting) -> Callable[[], object]:
    """Return the same in a setting of torchvision's users, with the default torch.optim.SGD."""
    copied, recipe = _copy(model, batch, channels_last=setting.channels_last), _recipe(name)
    if setting.compiled:
        copied.compile(dynamic=False)
    if operation == "forward":
        return steps.forward_pass(copied.eval(), batch, precision=setting.precision)
    optimizer = torch.optim.SGD(
        copied.train().parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    return steps.plain_step(copied, batch, optimizer=steps.at_rest(optimizer), precision=setting.precision)


def _copy(model: nn.Module, batch: Batch, *, channels_last: bool) -> nn.Module:
    copied = copy.deepcopy(model).to(batch.images.device)
    return copied.to(memory_format=torch.channels_last) if channels_last else copied


def _recipe(name: str) -> TeacherRecipe:
    return training.recipe().teachers[name]


if __name__ == "__main__":
    main()
