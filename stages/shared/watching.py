"""The option `--watch`, and who follows a run."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import Interrupted, UsageError
from pipeline.report.watching import LOG, RunLog, TensorBoard, WatchedRun, Watchers, describe

if TYPE_CHECKING:
    import torch

    from pipeline.report.progress import RunWatcher
    from pipeline.training.execution import Execution
    from stages.shared.context import Context
    from stages.shared.runs import Run

TENSORBOARD = "tensorboard"
_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_CLASS = re.compile(rf"(?P<module>{_NAME}):(?P<name>{_NAME})", re.ASCII)


def check_watchers(names: Sequence[str]) -> tuple[str, ...]:
    """Return each of the names that `--watch` was given once.

    Raises:
        UsageError: For one of them there is nothing, see `_maker`.
    """
    for name in names:
        _maker(name)
    return tuple(dict.fromkeys(names))


def watch(
    context: Context, run: Run, execution: Execution, device: torch.device, shown: RunWatcher
) -> tuple[Watchers, RunLog | None]:
    """Return all who follow a run, and its log; on rank 0 alone whom the user asked for, and the log.

    Args:
        context: Its `watch` names whom the user asked for.
        run: What is about to be trained.
        execution: How it is computed.
        device: Where.
        shown: Who shows it on the console.

    Raises:
        UsageError: One of those that the user asked for cannot be made.
    """
    from pipeline.system.runtime import device_name

    group, recipe, guests = execution.group, str(run.description["recipe"]), {}
    told = WatchedRun(
        name=run.name,
        kind=str(run.description["kind"]),
        recipe=recipe,
        seed=run.seed,
        fingerprint=run.fingerprint,
        folder=run.out,
        settings=dataclasses.asdict(run.recipe),
        device=device_name(device),
        precision=execution.precision,
        ranks=group.world_size,
    )

    def make() -> None:
        # `tensorboard --logdir data/work` finds those of every run.
        events = context.paths.work(TENSORBOARD, *run.work.parts[-2:])
        for name in context.watch:
            try:
                guests[name] = _maker(name)(told, events)
            except (Interrupted, UsageError):
                raise
            except (Exception, SystemExit) as error:
                reason = describe(error)
                raise UsageError(f"--watch {name}: cannot be made ({reason}); mend it, or leave it out") from error

    group.on_main(make)
    if not group.is_main:
        return Watchers(shown), None
    log = RunLog(run.work / LOG, told, shown.warned)
    return Watchers(shown, log, guests=guests), log


def _maker(name: str) -> Callable[[WatchedRun, Path], object]:
    """Return what makes the watcher of `--watch NAME`, given the run and a folder for TensorBoard's files.

    The module of a class is looked for among the installed ones, then in the working directory, and imported.

    Raises:
        UsageError: There is no such class, importing it fails, or the package tensorboard is not installed.
    """
    if name == TENSORBOARD:
        if importlib.util.find_spec(TENSORBOARD) is None:
            raise UsageError(f"--watch {name}: not installed; run `pip install 'titn-pipeline[tensorboard]'`")
        return lambda run, folder: TensorBoard(folder, run)
    match = _CLASS.fullmatch(name)
    if match is None or match["module"].endswith(".py"):
        example = "as my_watcher:Lines for the class Lines of my_watcher.py"
        raise UsageError(f"--watch {name}: write tensorboard, or MODULE:CLASS, {example}")
    if not {"", here := str(Path.cwd())} & {*sys.path}:
        sys.path.append(here)  # `python -m` looks there, `pipeline` does not
    try:
        found: Any = functools.reduce(getattr, match["name"].split("."), importlib.import_module(match["module"]))
    except Interrupted:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"--watch {name}: cannot be imported ({describe(error)})") from error
    if not callable(found):
        raise UsageError(f"--watch {name}: of type {type(found).__name__}; name a class")
    return lambda run, folder: found(run)
