"""A part of a slice that ends as its arguments say: `python -m tests.support.slice_part HOW REPORT [NOTE]`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

ROW = {"what": "titn, an epoch of 9 images", "ours": 0.5, "peer": None, "peer_name": "-", "unit": "s"}
REPORT = {
    "environment": {"device": "a GPU", "device_type": "cuda"},
    "missing": ["kornia"],
    "rows": [{**ROW, "ratio": None, "goal": None, "spread": {"ours": [0.4, 0.6]}, "batch_size": 3}],
    "peaks": {"bandwidth": 1.0},
}

if __name__ == "__main__":
    how, report, *note = sys.argv[1:]
    if note:
        Path(note[0]).write_text(str(os.getpid()))
    print(f"this is {how}", flush=True)
    if how == "crash":
        os.kill(os.getpid(), signal.SIGABRT)
    if how == "hang":
        time.sleep(60)
    if how in ("good", "late"):
        Path(report).write_text(json.dumps(REPORT))
    if how == "damaged":
        Path(report).write_text('{"rows": [{"what"')
    if how in ("fail", "late"):
        sys.exit("it cannot be done")
