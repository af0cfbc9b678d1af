"""The doctor's round: software, device, project, data, space, time. Nothing is written, but a compiled inner block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from pipeline.report.tables import Table
from stages.doctor.software import FAULTS, OK, PROBLEM, WARNING, Finding, size_text, time_text
from stages.doctor.software import gpus, software
from stages.shared.paths import PARAMS

if TYPE_CHECKING:
    from stages.doctor.estimate import Estimate
    from stages.doctor.space import Artefact
    from stages.doctor.work import Job, Sizes
    from stages.shared.context import Context

WIDTH = 60  # characters of a reason in a table


@dataclass
class Diagnosis:
    """What the doctor found.

    Attributes:
        recipe: The recipe's name; None where params.yaml cannot be read.
        findings: Every line.
        artefacts: What a full run writes.
        estimates: What each stage would take.
    """

    recipe: str | None = None
    findings: list[Finding] = field(default_factory=list)
    artefacts: list[Artefact] = field(default_factory=list)
    estimates: list[Estimate] = field(default_factory=list)

    @property
    def num_problems(self) -> int:
        """Things because of which a full run cannot work."""
        return sum(finding.mark == PROBLEM for finding in self.findings)

    @property
    def seconds(self) -> float | None:
        """Of all stages together; None where one that is to be run was not measured."""
        known = [each.seconds for each in self.estimates if each.why is not None]
        return sum(each for each in known if each is not None) if None not in known and self.estimates else None

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "recipe": self.recipe,
            "ok": self.num_problems == 0,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "artefacts": [{**dataclasses.asdict(each), "path": str(each.path)} for each in self.artefacts],
            "stages": [each.as_json() for each in self.estimates],
            "seconds": self.seconds,
        }

    def tables(self) -> list[Table]:
        """Return the tables of space and time, as far as there is anything in them."""
        space = Table(
            f"What a full run of {self.recipe} writes, estimated",
            ("artefact", "size", "to be written", "where"),
            [(each.name, size_text(each.size), size_text(each.needed), str(each.path)) for each in self.artefacts],
            optional=("where",),
        )
        times = Table(
            f"What `dvc repro` of {self.recipe} would take, estimated",
            ("stage", "why", "measured", "time"),
            [
                (each.stage, shorten(each.why or "up to date", WIDTH, placeholder=" ..."), each.measured, each.time)
                for each in self.estimates
            ],
            "Scaled from a few steps on this device, as busy as it is now. Not in it: prepare, select, report, "
            "downloads, torch.compile, saved states, the start of each command.",
        )
        return [*([space] if space.rows else []), *([times] if any(each.why for each in self.estimates) else [])]


def diagnose(
    open_context: Callable[[], Context], tell: Callable[[Finding], None], *, probing: bool = True
) -> Diagnosis:
    """Look at everything that a full run depends on.

    Args:
        open_context: Loads params.yaml and chooses recipe and device.
        tell: Is given each finding as soon as there is one.
        probing: Whether to time a few steps of each model that is not up to date.

    Raises:
        UsageError: There is no such recipe or device.
    """
    found = Diagnosis()

    def note(findings: list[Finding]) -> None:
        found.findings += findings
        for finding in findings:
            tell(finding)

    note(software())
    if found.num_problems:
        return found
    from pipeline.config.params import load_params

    try:
        params = load_params(PARAMS)
    except FAULTS as error:
        note([Finding("project", PROBLEM, str(error)), *gpus()])
        return found
    context = open_context()
    from stages.doctor import computing, project, space, work

    found.recipe = context.recipe.name
    text = f"params.yaml is valid: {len(params.recipes)} recipes; this is {found.recipe}"
    note([Finding("project", OK, text)])
    note([*project.dvc(), *gpus()])
    note(computing.computing(context, trying=probing))
    findings, prepared = project.data(context)
    note(findings)
    jobs, findings = work.work(context, prepared=prepared)
    note([*findings, *project.weights(context, jobs)])
    sizes = work.sizes(context, prepared=prepared)
    if sizes is None:
        text = f"space and time: nothing is known of {context.recipe.dataset.source}'s images before they are prepared"
        note([Finding("space", WARNING, text)])
        return found
    found.artefacts = space.artefacts(context, jobs, sizes)
    note([space.disk(found.artefacts), *space.memory(context, jobs, sizes)])
    _estimate(context, found, jobs, sizes, prepared=prepared, probing=probing, note=note)
    return found


def _estimate(
    context: Context,
    found: Diagnosis,
    jobs: list[Job],
    sizes: Sizes,
    *,
    prepared: bool,
    probing: bool,
    note: Callable[[list[Finding]], None],
) -> None:
    """Time what is to be done, and add it up."""
    from stages.doctor.estimate import estimate, is_busy

    busy = is_busy(context)
    if not probing:
        if any(job.why for job in jobs):
            note([Finding("time", OK, "not estimated (--no-probe)")])
        return
    found.estimates = estimate(context, jobs, sizes, prepared=prepared, note=note)
    if not any(job.why for job in jobs):
        note([Finding("time", OK, "nothing is left to train or to label")])
    elif found.seconds is not None:
        text = f"about {time_text(found.seconds)} for all that is left, an estimate"
        if busy:
            alone = sum(each.seconds_alone for each in found.estimates if each.why)
            text += f"; about {time_text(alone)} if nothing else ran, by the processor time of the steps"
        note([Finding("time", OK, text)])
