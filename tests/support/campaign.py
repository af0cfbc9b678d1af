"""The command lines of the campaigns in this folder."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from pipeline.system.runtime import environment
from tests.support.tally import Tally


def run_campaigns(description: str | None, parts: Mapping[str, Callable[[Path], Tally]]) -> None:
    """Run the parts that a command line names, and write the counts after each; exit 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, required=True, help="Where the counts go.")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="Beside what the file has.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
    where, wrong = environment(torch.device("cpu")), 0
    keeps = options.only != list(parts) and options.json.exists()
    campaigns = json.loads(options.json.read_text())["campaigns"] if keeps else {}
    with tempfile.TemporaryDirectory() as name:
        for part in options.only:
            (folder := Path(name) / part).mkdir()
            began = time.monotonic()
            summary = {**parts[part](folder).summary(), "seconds": round(time.monotonic() - began, 1)}
            print(part, json.dumps(summary), flush=True)
            campaigns[part] = {**summary, "run": where}
            wrong = sum(sum(campaign["wrong"].values()) for campaign in campaigns.values())
            options.json.write_text(json.dumps({"wrong": wrong, "campaigns": campaigns}, indent=2) + "\n")
    sys.exit(wrong > 0)
