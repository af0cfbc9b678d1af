"""`pipeline bench CHECKPOINT...`: what trained models cost and how fast they answer here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UsageError
from pipeline.inference.exporting import ROUNDED
from pipeline.inference.loading import build_model
from pipeline.inference.prediction import Network, Predictor
from pipeline.inference.speed import Speed
from pipeline.models.counting import flops_per_image, num_parameters, paper_macs
from pipeline.report.tables import Table, number
from pipeline.system.runtime import device_name, environment
from stages.trained import load_trained


def load(
    paths: Sequence[Path], device: str | None, precision: str
) -> tuple[dict[str, Predictor], list[dict[str, Any]]]:
    """Load models and count what they cost.

    Args:
        paths: As of stages.trained.load_trained.
        device: As of stages.trained.load_trained.
        precision: `auto`, `fp32` or `bf16`.

    Returns:
        Path to model, and for each a row of plain JSON values: checkpoint, model, kind, format, precision, device,
        inner_block, image_size, num_classes, parameters, file_bytes, paper_macs and flops_per_image (of one image),
        top1 (of its own evaluation while it was trained, percent; None of a quantised one).

    Raises:
        UsageError: A path does not exist, or is named twice.
        DataError: A path holds no valid checkpoint.
    """
    predictors: dict[str, Predictor] = {}
    rows = []
    for path in paths:
        if str(path) in predictors:
            raise UsageError(f"{path}: named twice; name each checkpoint once")
        trained = load_trained(path, device, precision)
        predictors[str(path)], described = trained.predictor, trained.description
        with torch.device("meta"):
            model = build_model(described.kind, described.model, described.arguments)
        scores = trained.meta.get("scores")
        rows.append(
            {
                "checkpoint": str(path),
                "model": described.model,
                "kind": described.kind,
                "format": trained.format,
                "precision": trained.precision,
                "device": trained.predictor.device.type,
                "inner_block": _inner_block(trained.predictor),
                "image_size": described.image_size,
                "num_classes": len(described.class_names),
                "parameters": num_parameters(model),
                "file_bytes": trained.file.stat().st_size,
                "paper_macs": paper_macs(model, described.image_size),
                "flops_per_image": flops_per_image(model, described.image_size),
                "top1": scores.get("top1") if isinstance(scores, dict) and trained.format not in ROUNDED else None,
            }
        )
    return predictors, rows


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use so many CPU threads for one operation; None leaves its choice."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def conditions(device: torch.device, rounds: int) -> dict[str, Any]:
    """Say where and how is measured, as plain JSON values."""
    return {
        **environment(device),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "rounds": rounds,
    }


def costs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of what the models cost."""
    columns = (
        "checkpoint",
        "model",
        "top-1 %",
        "parameters",
        "file, MB",
        "MACs, M",
        "FLOPs, M",
        "inner block",
        "precision",
        "on",
        "image",
    )
    cells = [
        [
            row["checkpoint"],
            row["model"],
            number(row["top1"]),
            f"{row['parameters']:,}",
            number(row["file_bytes"] / 1e6, 1),
            number(row["paper_macs"] / 1e6, 1),
            number(row["flops_per_image"] / 1e6, 1),
            (row["inner_block"] or "-").partition(" ")[0],
            row["precision"],
            row["device"],
            str(row["image_size"]),
        ]
        for row in rows
    ]
    note = (
        "Top-1 on what its own recipe evaluates on. MACs by the paper's convention, FLOPs by PyTorch's counter, both "
        "of one image and the plain formulation."
    )
    return Table("What they cost", columns, cells, note)


def speed_table(speeds: Sequence[Speed], where: Mapping[str, Any], device: torch.device) -> Table:
    """Return the table of how fast the models answer."""
    columns = ["checkpoint", "batch", "median, ms", "quartiles, ms", "p95, ms", "images/s"]
    rows = []
    for each in speeds:
        figures = [number(each.median_ms), " to ".join(map(number, each.quartiles_ms)), number(each.p95_ms)]
        row = [each.name, str(each.batch_size), *figures, f"{each.images_per_second:,.0f}"]
        rows.append(row if each.peak_bytes is None else [*row, number(each.peak_bytes / 2**20, 0)])
    if device.type == "cuda":
        columns.append("memory, MiB")
    note = (
        f"From uint8 pixels in RAM to probabilities in RAM, in turns, {where['rounds']} rounds. {device_name(device)}, "
        f"load {where['load_average']} at the start, torch {where['versions']['torch']}, "
        f"{where['date']} UTC."
    )
    return Table("How fast they answer", columns, rows, note)


def _inner_block(predictor: Predictor) -> str | None:
    """Say how a checkpoint's inner blocks are computed; None of an export."""
    from pipeline.models.students import Student, use_inner_block

    network = predictor.network
    if not isinstance(network, Network):
        return None
    if not isinstance(network.model, Student):
        return "none"
    return use_inner_block(network.model, "auto", predictor.device)
