"""The setting of a command: params.yaml, console, device, data set, stop signal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.config.params import Params
from pipeline.config.recipes import Recipe, deciding_values
from pipeline.errors import DataError, UsageError, printable
from pipeline.system.canonical import compare
from pipeline.system.neighbours import Neighbours
from pipeline.system.stopping import StopSignal
from pipeline.system.storage import read_json
from stages.shared.dvc_file import can_commit
from stages.shared.hints import with_recipe
from stages.shared.paths import Paths

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from pipeline.data.datasets import Dataset
    from pipeline.report.progress import Position
    from pipeline.report.tables import Table
    from pipeline.system.runtime import Ranks
    from pipeline.training.distributed import Group

T = TypeVar("T")


@dataclass
class Context:
    """The setting of one command.

    Attributes:
        params: All of params.yaml.
        recipe: The recipe that the command works on.
        console: For output to people.
        stop: SIGINT, SIGTERM and the time limit.
        device_name: The device that --device names; None chooses one.
        position: Which of the command's runs is under way, see `in_turn`.
        watch: Who follows each run, as `--watch` names them.
        project: The project's folder, see Paths.
        neighbours: Watches what other processes take of the machine, from the command's beginning.
    """

    params: Params
    recipe: Recipe
    console: Console
    stop: StopSignal
    device_name: str | None = None
    position: Position | None = None
    watch: tuple[str, ...] = ()
    project: Path = Path()
    neighbours: Neighbours = field(default_factory=Neighbours)
    _changed: list[str] = field(default_factory=list)
    _group: Group | None = None
    _loaded: tuple[tuple[int, ...], Dataset] | None = None

    @property
    def paths(self) -> Paths:
        """Where the recipe's files lie."""
        return Paths(self.recipe.name, self.project)

    @property
    def device(self) -> torch.device:
        """The device to train, label or examine on.

        Raises:
            UsageError: It is not here, or it is an Apple GPU.
        """
        from pipeline.system.runtime import resolve_device

        if self.device_name is not None and self.device_name.partition(":")[0] == "mps":
            raise UsageError(
                f"--device {self.device_name}: Apple's GPUs have no float64, which views and training need; leave it "
                "out or use cpu; predict, evaluate and bench take it"
            )
        return resolve_device(self.device_name)

    @property
    def ranks(self) -> Ranks:
        """This process among those that torchrun or RANK and WORLD_SIZE name; without them it is alone."""
        from pipeline.system.runtime import current_ranks

        return current_ranks()

    @contextlib.contextmanager
    def joined(self) -> Iterator[Group]:
        """Join torchrun's group until the outermost such block ends; without torchrun this process is alone.

        Raises:
            UsageError: The device or the environment allows no group.
            PipelineError: Another rank has ended.
        """
        from pipeline.training.distributed import join

        if self._group is not None:
            yield self._group
            return
        with join(self.device) as group:
            self._group = group
            try:
                yield group
            finally:
                self._group = None

    def in_turn(self, label: str, items: Sequence[T], epochs: Sequence[int]) -> Iterator[T]:
        """Yield a command's runs one after the other; the progress of each says which of how many it is.

        Args:
            label: What the runs are, in the singular, as `teacher`.
            items: What to yield.
            epochs: Epochs that each but the first has yet to train, 0 where it is up to date.
        """
        from pipeline.report.progress import Position

        for index, item in enumerate(items):
            if len(items) > 1:
                self.position = Position(label, index + 1, len(items), sum(epochs[index:]))
            yield item
        self.position = None

    def say(self, message: str) -> None:
        """Print one line, unwrapped, without markup and safe for a terminal; its hints name the recipe."""
        line = printable(with_recipe(message, self.recipe.name))
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def show(self, table: Table) -> None:
        """Print a table."""
        self.console.print(table.to_rich(self.console.width))

    def dataset(self) -> Dataset:
        """Load the prepared data set; images too large for RAM stay in their files, and encoded ones always do.

        Raises:
            DataError: It is missing, not valid, or prepared with other settings than the recipe's.
        """
        from pipeline.data.datasets import Dataset
        from pipeline.data.file import FORMER_FILE
        from pipeline.system.runtime import resident_limit

        if not self.paths.is_prepared:
            way_out = f"run `pipeline prepare --recipe {self.recipe.name}`"
            if (former := self.paths.dataset.with_name(FORMER_FILE)).exists():
                raise DataError(f"{former}: of a former layout; {way_out} again")
            raise DataError(f"{self.paths.dataset}: no prepared data; {way_out}")
        summary = read_json(self.paths.prepared / "summary.json")
        prepared = summary.get("settings") if isinstance(summary, dict) else None
        if not isinstance(prepared, dict):
            raise DataError(
                f"{self.paths.prepared / 'summary.json'}: not what `prepare` writes; "
                f"run `pipeline prepare --recipe {self.recipe.name}` again"
            )
        for difference in compare(prepared, deciding_values(self.recipe.dataset)):
            raise DataError(
                f"{self.paths.dataset}: prepared with {difference.path} {difference.before}, but recipe "
                f"{self.recipe.name} asks for {difference.after}; "
                f"run `pipeline prepare --recipe {self.recipe.name}` again"
            )
        # Kept while the file is the same: a large one takes minutes to verify.
        stat = self.paths.dataset.stat()
        version = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._loaded is None or self._loaded[0] != version:
            dataset = Dataset.load(self.paths.dataset, resident_limit())
            # Pixels that a former version prepared do not name their rule.
            self._loaded = (version, replace(dataset, resize=self.recipe.dataset.resize))
        return self._loaded[1]

    def changed(self, stage: str) -> None:
        """Note that an output of a DVC stage was replaced."""
        if stage not in self._changed:
            self._changed.append(stage)

    def end(self) -> None:
        """Name the command by which DVC adopts the replaced outputs; without it, DVC's next run restores its copies."""
        if not self._changed or not (self.project / ".dvc").is_dir() or "DVC_STAGE" in os.environ:
            return
        stages = [stage for stage in self._changed if can_commit(stage, self.recipe.name, self.params, self.project)]
        if stages:
            self.say(f"DVC keeps its own copy until you adopt this one: dvc commit -f {' '.join(stages)}")
