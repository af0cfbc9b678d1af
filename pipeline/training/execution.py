"""How a run is computed here, which affects its results by rounding only. The run's first line shows it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.config.recipes import FitRecipe, StudentRecipe
from pipeline.errors import UsageError
from pipeline.system.runtime import device_name, resolve_precision
from pipeline.training.distributed import ALONE, Group
from pipeline.views import guard

CPU_MICRO_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is computed.

    Attributes:
        precision: `fp32` or `bf16`.
        step: `eager`; or `graph`, replayed from a CUDA graph, for one process on a CUDA device.
        compiled: Whether torch.compile prepares the model.
        micro_batch: Most samples in a forward pass; None is a rank's whole share of a batch.
        inner_block: The result of pipeline.models.students.use_inner_block.
        outer_block: The result of pipeline.models.students.use_outer_block.
        column_sum: Whether a layer is trained as the sum of its columns, see pipeline.training.column_sum.
        group: The ranks that train the model together. Each has all of the data, and the same seed.
    """

    precision: str = "fp32"
    step: str = "eager"
    compiled: bool = False
    micro_batch: int | None = None
    inner_block: str = "none"
    outer_block: str = "none"
    column_sum: bool = False
    group: Group = ALONE

    @classmethod
    def of(
        cls,
        recipe: FitRecipe,
        device: torch.device,
        group: Group = ALONE,
        *,
        inner_block: str = "none",
        outer_block: str = "none",
        column_sum: bool = False,
        whole: bool = False,
    ) -> Execution:
        """Resolve what a recipe leaves to the device.

        Args:
            recipe: The recipe.
            device: Where the model is trained.
            group: The ranks.
            inner_block: See the attribute.
            outer_block: See the attribute.
            column_sum: See the attribute.
            whole: Whether parts of a batch would give other results, as with batch norm.

        Raises:
            UsageError: It asks for a CUDA graph, and there is no CUDA device, or more than one process; or for parts of
                a batch that must be whole.
        """
        can_capture = device.type == "cuda" and group.is_alone
        if recipe.step == "graph" and not can_capture:
            where = f"on {device}" if device.type != "cuda" else f"with {group.world_size} processes"
            raise UsageError(f"step: graph: there are no CUDA graphs {where}; use auto or eager")
        micro_batch = None
        if isinstance(recipe, StudentRecipe):
            micro_batch = recipe.micro_batch or (CPU_MICRO_BATCH if device.type == "cpu" and not whole else None)
            if whole and recipe.micro_batch:
                raise UsageError(
                    f"micro_batch: {recipe.micro_batch}: the model has batch norm, which needs whole ones; set it to 0"
                )
        return cls(
            precision=resolve_precision(recipe.precision, device),
            step="graph" if can_capture and recipe.step != "eager" else "eager",
            compiled=recipe.compile,
            micro_batch=micro_batch,
            inner_block=inner_block,
            outer_block=outer_block,
            column_sum=column_sum,
            group=group,
        )

    def describe(self, device: torch.device, batch_size: int, ema: float = 0.0, busy: str | None = None) -> str:
        """Describe it in one line, with the batch size and the decay of the weights' moving average.

        `busy` says what other processes leave of the machine, see pipeline.system.neighbours.Neighbours.
        """
        parts = [device_name(device), *([busy] if busy else []), self.precision]
        blocks = {"inner block": self.inner_block, "outer block": self.outer_block}
        parts += [f"{block} {way}" for block, way in blocks.items() if way != "none"]
        if device.type == "cpu" and (why_not := guard.why_not()) is not None:
            parts.append(f"views plain ({why_not})")
        if self.column_sum:
            parts.append("first linear layer as its column sum")
        if self.step == "graph":
            parts.append("CUDA graph")
        if self.compiled:
            parts.append("torch.compile")
        batch = f"batch {batch_size}"
        if self.micro_batch is not None and self.micro_batch < batch_size:
            batch += f" in parts of {self.micro_batch}"
        parts.append(batch)
        if ema:
            parts.append(f"EMA {ema:g}")
        return "; ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Return all but the group as plain JSON values."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "group"]
        return {name: getattr(self, name) for name in names}

    @contextlib.contextmanager
    def compiling(self, model: nn.Module) -> Iterator[None]:
        """Compile a model if the recipe asks for it; the first step within the block shows whether that works.

        Raises:
            UsageError: torch.compile fails.
        """
        if not self.compiled:
            yield
            return
        from torch._dynamo.exc import TorchDynamoException  # takes a second to import

        model.compile()
        try:
            yield
        except TorchDynamoException as error:
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise UsageError(
                f"compile: true: torch.compile fails here ({reason}); set it to false or install a C++ compiler"
            ) from error
