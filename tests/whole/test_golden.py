"""The first 20 losses of every student on the CPU, against tests/whole/golden/<student>_cpu.json.

They change only where an architecture or its initialisation changes. A change that is meant is recorded with
`pytest tests/whole/test_golden.py --update-golden`, on a machine and PyTorch that the file then names.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from pipeline.models.students import STUDENTS, build_student

GOLDEN = Path(__file__).parent / "golden"
NUM_STEPS = 20
BATCH_SIZE = 8
NUM_CLASSES = 10

# One batch learnt by heart at the recipes' rate of 0.1 is chaotic: a difference of 1e-7 between two instruction
# sets or between float32 and float64 has grown to more than 1 after 20 steps. At 0.01 it stays below 1e-4 there
# (ATEN_CPU_CAPABILITY avx512, avx2 and default, float32 and float64), and below 2e-6 in the first five steps.
LEARNING_RATE = 0.01
EARLY_STEPS, EARLY_TOLERANCE, LATE_TOLERANCE = 5, 2e-5, 1e-3


def train(name: str) -> list[float]:
    """Return the mean cross-entropy of all heads before each of 20 steps of SGD on one batch."""
    torch.manual_seed(0)
    student = build_student(name, num_classes=NUM_CLASSES)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH_SIZE, 3, 32, 32, generator=generator)
    labels = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator)
    optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE, momentum=0.9)
    losses = []
    for _ in range(NUM_STEPS):
        output = student(images)
        heads = output if student.has_distillation_head else (output,)
        loss = torch.stack([cross_entropy(logits, labels) for logits in heads]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def machine() -> dict[str, str]:
    """Name what the losses were computed on."""
    return {
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@pytest.mark.parametrize("name", STUDENTS)
def test_the_first_20_losses_are_the_golden_ones(name: str, request: pytest.FixtureRequest) -> None:
    path = GOLDEN / f"{name}_cpu.json"
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps({"computed_on": machine(), "losses": train(name)}, indent=2) + "\n")
        return
    check(name)


def check(name: str) -> None:
    """Compare a student's losses with the golden ones."""
    losses = train(name)
    golden = json.loads((GOLDEN / f"{name}_cpu.json").read_text())
    assert len(golden["losses"]) == NUM_STEPS
    for step, (ours, expected) in enumerate(zip(losses, golden["losses"], strict=True)):
        tolerance = EARLY_TOLERANCE if step < EARLY_STEPS else LATE_TOLERANCE
        assert ours == pytest.approx(expected, abs=tolerance), (
            f"step {step} of {name}; the golden losses were computed on {golden['computed_on']}"
        )
