"""What lies behind the figures of a report: by class, by view, and where students look."""

from __future__ import annotations

from pipeline.reporting import Figure, Table
from stages.context import Context
from stages.reports.attention import attention
from stages.reports.classes import by_class
from stages.reports.runs import FinishedRuns
from stages.reports.views import teacher_on_views


def details(context: Context, runs: FinishedRuns) -> list[Figure | Table]:
    """Draw and tabulate details of whatever has been run.

    Args:
        context: The command's setting.
        runs: What has been run.

    Returns:
        By class, by view, attention; without what its inputs are missing for.

    Raises:
        UsageError: matplotlib is not installed.
        DataError: An input is there and damaged, or belongs to something else.
    """
    return [*by_class(runs), *teacher_on_views(context, runs), *attention(context, runs)]
