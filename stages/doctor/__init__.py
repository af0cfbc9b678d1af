"""`pipeline doctor`: whether a full run of a recipe can work here, what it needs, and how long it would take."""

from __future__ import annotations

import json

import click

from pipeline.errors import PipelineError
from stages.doctor.diagnosis import diagnose
from stages.doctor.software import Finding
from stages.shared.options import device_option, json_option, open_console, open_context, recipe_option

COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command("doctor")
@recipe_option
@device_option
@json_option
@click.option(
    "--probe/--no-probe", default=True, show_default=True, help="Time a few steps of each model to be trained."
)
def command(recipe: str | None, device: str | None, as_json: bool, probe: bool) -> None:
    """Check whether a full run can work here, and estimate its disk, memory and time.

    The exit code is 1 if it cannot.
    """
    console, topic = open_console(), ""

    def tell(finding: Finding) -> None:
        nonlocal topic
        if finding.topic != topic:
            topic = finding.topic
            console.print(f"\n{topic}", style="bold", highlight=False)
        console.print(f"  {finding.mark:8}", style=COLOURS[finding.mark], end="", highlight=False)
        console.print(finding.line, markup=False, highlight=False, soft_wrap=True)

    diagnosis = diagnose(lambda: open_context(recipe, device), tell, probing=probe)
    if as_json:
        click.echo(json.dumps(diagnosis.as_json(), indent=2, allow_nan=False))
    else:
        for table in diagnosis.tables():
            console.print(table.to_rich(console.width))
    if diagnosis.num_problems:
        word = "problem" if diagnosis.num_problems == 1 else "problems"
        raise PipelineError(f"{diagnosis.num_problems} {word}: a full run cannot work here as things are; see above")
