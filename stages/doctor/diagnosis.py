"""`pipeline doctor`: whether a full run of a recipe can work here, and how much disk and memory it needs.

It checks software, device, project, data and space, and writes nothing but a compiled inner block.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import PipelineError, printable
from pipeline.report.tables import Table
from pipeline.system.text import counted
from stages.doctor.software import FAULTS, OK, PROBLEM, WARNING, Finding, gpus, size_text, software
from stages.shared import options
from stages.shared.hints import with_recipe
from stages.shared.paths import PARAMS

if TYPE_CHECKING:
    from stages.doctor.checks import Task
    from stages.doctor.space import Artefact
    from stages.shared.context import Context

WIDTH = 60  # characters of a reason in a table
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command("doctor")
@options.recipe_option
@options.device_option
@options.json_option
def command(recipe: str | None, device: str | None, as_json: bool) -> None:
    """Check whether a full run can work here, and estimate its disk and memory.

    The exit code is 1 if it cannot. A run itself shows how long it takes, after its first epoch.
    """
    console, topic = options.open_console(), ""

    def tell(finding: Finding) -> None:
        nonlocal topic
        if finding.topic != topic:
            topic = finding.topic
            console.print(f"\n{topic}", style="bold", highlight=False)
        console.print(f"  {finding.mark:8}", style=COLOURS[finding.mark], end="", highlight=False)
        console.print(printable(finding.line), markup=False, highlight=False, soft_wrap=True)

    diagnosis = diagnose(lambda: options.open_context(recipe, device), tell)
    if as_json:
        click.echo(json.dumps(diagnosis.as_json(), indent=2, allow_nan=False))
    else:
        for table in diagnosis.tables():
            console.print(table.to_rich(console.width))
    if diagnosis.num_problems:
        problems = counted(diagnosis.num_problems, "problem")
        raise PipelineError(f"{problems}: a full run cannot work here as things are; see above")


@dataclass
class Diagnosis:
    """The doctor's results.

    Attributes:
        recipe: The recipe's name; None where params.yaml cannot be read.
        findings: Every line, in order.
        artefacts: What a full run writes.
        tasks: What a full run trains and labels.
    """

    recipe: str | None = None
    findings: list[Finding] = field(default_factory=list)
    artefacts: list[Artefact] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)

    @property
    def num_problems(self) -> int:
        """Reasons why a full run cannot work."""
        return sum(finding.mark == PROBLEM for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "recipe": self.recipe,
            "ok": self.num_problems == 0,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "artefacts": [{**dataclasses.asdict(part), "path": str(part.path)} for part in self.artefacts],
            "stages": [{"stage": task.stage, "why": task.why} for task in self.tasks],
        }

    def tables(self) -> list[Table]:
        """Return the tables of space and work, where there is anything in them."""
        space = Table(
            f"What a full run of {self.recipe} writes, estimated",
            ("artefact", "size", "to be written", "where"),
            [(part.name, size_text(part.size), size_text(part.needed), str(part.path)) for part in self.artefacts],
            optional=("where",),
        )
        work = Table(
            f"What `dvc repro` of {self.recipe} trains and labels",
            ("stage", "state"),
            [(task.stage, shorten(task.why or "up to date", WIDTH, placeholder=" ...")) for task in self.tasks],
        )
        return [table for table in (space, work) if table.rows]


def diagnose(open_context: Callable[[], Context], tell: Callable[[Finding], None]) -> Diagnosis:
    """Check everything that a full run depends on.

    Args:
        open_context: Loads params.yaml and chooses recipe and device.
        tell: Called with each finding at once.

    Raises:
        UsageError: There is no such recipe or device.
    """
    diagnosis = Diagnosis()

    def note(findings: list[Finding]) -> None:
        for finding in findings:
            if diagnosis.recipe is not None:
                finding = dataclasses.replace(finding, text=with_recipe(finding.text, diagnosis.recipe))
            diagnosis.findings.append(finding)
            tell(finding)

    note(software())
    if diagnosis.num_problems:
        return diagnosis
    from stages.shared.params import read_params

    try:
        params = read_params(PARAMS)
    except FAULTS as error:
        note([Finding("project", PROBLEM, str(error)), *gpus()])
        return diagnosis
    context = open_context()
    from stages.doctor import checks, space

    diagnosis.recipe = context.recipe.name
    text = f"params.yaml is valid: {len(params.recipes)} recipes; this is {diagnosis.recipe}"
    note([Finding("project", OK, text), *checks.dvc(), checks.locks(), *gpus()])
    note(checks.computing(context))
    findings, prepared = checks.data(context)
    note(findings)
    sizes = space.sizes(context, prepared=prepared)
    if sizes is not None:
        findings = space.foreign_students(context, sizes)
        note(findings)
        if any(finding.mark == PROBLEM for finding in findings):
            return diagnosis  # what follows would need them
    diagnosis.tasks, findings = checks.work(context)
    note([*findings, *checks.weights(context, diagnosis.tasks)])
    if sizes is None:
        text = f"space: nothing is known of {context.recipe.dataset.source}'s images before they are prepared"
        note([Finding("space", WARNING, text)])
        return diagnosis
    diagnosis.artefacts = space.artefacts(context, diagnosis.tasks, sizes)
    note([space.disk(diagnosis.artefacts), *space.memory(context, diagnosis.tasks, sizes)])
    return diagnosis
