"""Tables and figures of runs that differ in one thing: with and without the teacher's labels, and by views."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.figures import Panel, Repeats, Row, dots, over_counts
from pipeline.report.intervals import Estimate, estimate, paired_difference
from pipeline.report.page import Item, Missing
from pipeline.report.tables import Figure, Table, number, spread
from stages.reports.comparisons import Comparison, Comparisons, Way
from stages.reports.conditions import conditions

LEFT_OUT = "left out by --no-figures"
MOST_SEEDS = 7  # that have each a marker of its own
NO_TEACHER = "no teacher"
DRAWN = (
    "Filled: the mean over seeds, with its 95 % interval where there are several; hollow: each seed. Under the "
    "conditions of the table below."
)


def compared(comparisons: Comparisons, *, with_figures: bool = True) -> list[Item]:
    """Show every comparison: a figure, then its table.

    Args:
        comparisons: What the runs answer; nothing is shown where they answer nothing.
        with_figures: Whether to draw.

    Raises:
        DataError: A curve is damaged.
    """
    items: list[Item] = []
    for each in comparisons.labels:
        items += [labels_figure(each) if with_figures else Missing(_labels_title(each), LEFT_OUT), labels_table(each)]
    for each in comparisons.views:
        items += [views_figure(each) if with_figures else Missing(_views_title(each), LEFT_OUT), views_table(each)]
    return items


def labels_table(comparison: Comparison) -> Table:
    """Return top-1 without labels, with cached ones and with the teacher asked, and the differences by seed."""
    reference = comparison.controls[0]
    columns = ["labels", "top-1 of", "seeds", "top-1 %", "95 % interval", "less none", "less none: 95 % interval"]
    rows = []
    for measure, name in comparison.measures.items():
        for way in (reference, *comparison.ways):
            values = list(way.top1(measure).values())
            less = None if way is reference else paired_difference(way.top1(measure), reference.top1(measure))
            cells = [way.labels, name, " ".join(map(str, way.runs)), spread(values), _interval(estimate(values))]
            rows.append([*cells, *difference_cells(less)])
    changes = " ".join(_change(comparison, way, reference, f"{way.labels} less none") for way in comparison.ways)
    title = f"Does the teacher's label help? {comparison.title}"
    return Table(title, columns, rows, f"{changes} {_note(comparison)}")


def views_table(comparison: Comparison) -> Table:
    """Return top-1, the last epoch's training loss and agreement by number of views."""
    measures = comparison.measures
    columns = ["views", "seeds"]
    for name in measures.values():
        columns += [f"{name}: top-1 %", f"{name}: 95 % interval"]
    rows = []
    for way in (*comparison.ways, *comparison.controls):
        row = [_views(way, comparison), " ".join(map(str, way.runs))]
        for measure in measures:
            values = list(way.top1(measure).values())
            row += [spread(values), _interval(estimate(values))]
        agreement = spread(way.agreements) if comparison.has_one_teacher else "-"
        rows.append([*row, spread(way.train_losses, 3), agreement])
    fewest, most = comparison.ways[0], comparison.ways[-1]
    change = _change(comparison, most, fewest, f"{most.views} views less {fewest.views}")
    note = f"{change} Training loss: of the last epoch, nats"
    note += "; that without a teacher is of other targets" if comparison.controls else ""
    note += ". Agreement with the teacher: on test, at the best epoch."
    title = f"How does the number of views matter? {comparison.title}"
    intervals = [column for column in columns if column.endswith("interval")]
    columns += ["last train loss", "agreement %"]
    return Table(title, columns, rows, f"{note} {_note(comparison)}", [*reversed(intervals), "agreement %"])


def labels_figure(comparison: Comparison) -> Figure:
    """Draw each way's mean with its interval, and its seeds."""
    title = _labels_title(comparison)
    ways = (*comparison.controls, *comparison.ways)
    seeds = sorted({seed for way in ways for seed in way.runs})
    shown = seeds if len(seeds) <= MOST_SEEDS else []
    rows, data = [], []
    for measure, name in comparison.measures.items():
        for way in ways:
            values = way.top1(measure)
            found = estimate(list(values.values()))
            dots_of = [found.mean, *(values.get(seed) for seed in shown)]
            rows.append(Row(f"labels {way.labels}", dots_of, [found.interval], name))
            data += [[way.labels, name, str(seed), number(value, 4)] for seed, value in values.items()]
    series = ["mean, 95 % interval", *(f"seed {seed}" for seed in shown)]
    png = dots(rows, series, x_label="top-1, %")
    alt = "Dots: top-1 of each seed, without the teacher's labels and with them; lines: the mean's 95 % interval."
    values_table = Table(title, ["labels", "top-1 of", "seed", "top-1 %"], data)
    return Figure(f"labels-{comparison.slug}", title, png, alt, DRAWN, values_table)


def views_figure(comparison: Comparison) -> Figure:
    """Draw top-1 over the number of views, each score in a panel of its own."""
    taught = comparison.ways[0].labels != "none" and comparison.runs[-1].metrics["distilled"]
    parts = [("learns from the teacher" if taught else comparison.student, comparison.ways)]
    if comparison.controls:
        only = f", {comparison.controls[0].views} views" if len(comparison.controls) == 1 else ""
        parts.append((f"{NO_TEACHER}{only}", comparison.controls))
    panels = [
        Panel(heading, [_repeats(name, ways, measure) for name, ways in parts])
        for measure, heading in comparison.measures.items()
    ]
    data = [
        [str(way.views), way.labels, str(seed), *(number(way.top1(key)[seed], 4) for key in comparison.measures),
         number(loss, 6), number(agreement, 4)]
        for way in (*comparison.ways, *comparison.controls)
        for seed, loss, agreement in zip(way.runs, way.train_losses, way.agreements, strict=True)
    ]  # fmt: skip
    title = _views_title(comparison)
    png = over_counts(panels, x_label="number of views", y_label="top-1, %")
    alt = "Lines: mean top-1 over the number of views, with 95 % intervals; a dot for each seed."
    columns = ["views", "labels", "seed", *comparison.measures.values(), "last train loss", "agreement %"]
    values_table = Table(title, columns, data)
    return Figure(f"views-{comparison.slug}", title, png, alt, DRAWN, values_table)


def _labels_title(comparison: Comparison) -> str:
    return f"Top-1 by labels, {comparison.title}"


def _views_title(comparison: Comparison) -> str:
    return f"Top-1 by number of views, {comparison.title}"


def _repeats(name: str, ways: Sequence[Way], measure: str) -> Repeats:
    values = [list(way.top1(measure).values()) for way in ways]
    found = [estimate(each) for each in values]
    views = [way.views or 0 for way in ways]
    return Repeats(name, views, values, [each.mean for each in found], [each.interval for each in found])


def _views(way: Way, comparison: Comparison) -> str:
    own = " (the recipe's)" if way.is_the_recipes else ""
    return f"{way.views}{own}{f', {NO_TEACHER}' if way in comparison.controls else ''}"


def _interval(found: Estimate) -> str:
    return "-" if found.interval is None else f"{found.interval[0]:.2f} to {found.interval[1]:.2f}"


def difference_cells(less: Estimate | None) -> list[str]:
    """Return a difference's mean with deviation and number of pairs, and its interval; dashes without one."""
    if less is None:
        return ["-", "-"]
    if less.deviation is None or less.interval is None:
        return [f"{less.mean:+.2f}", "-"]
    low, high = less.interval
    return [f"{less.mean:+.2f} ± {less.deviation:.2f} ({less.count})", f"{low:+.2f} to {high:+.2f}"]


def _change(comparison: Comparison, way: Way, reference: Way, what: str) -> str:
    """Say in a sentence whether a way's top-1 differs from the reference's by more than the seeds scatter."""
    parts = []
    for measure, name in comparison.measures.items():
        less = paired_difference(way.top1(measure), reference.top1(measure))
        if less is None:
            return f"{what[0].upper()}{what[1:]}: no seed in common, no difference."
        verdict = {
            None: "one pair of seeds, no interval",
            True: "beyond what the seeds scatter, its interval excludes 0",
            False: "within what the seeds scatter, its interval includes 0",
        }[less.excludes_zero]
        parts.append(f"{name} {less.mean:+.2f} points ({verdict})")
    return f"{what[0].upper()}{what[1:]}: {'; '.join(parts)}."


def _note(comparison: Comparison) -> str:
    """Say what an interval is of, what has been left out, and under what conditions all was run."""
    ways = (*comparison.controls, *comparison.ways)
    counts = sorted({len(way.runs) for way in ways})
    several = [str(count) for count in counts if count > 1]
    parts = []
    if several:
        parts.append(
            f"Intervals: Student's t, over {' or '.join(several)} seeds: of initialisation and order alone, not of the "
            "data, which are the same in all; differences are paired by seed."
        )
    if counts[0] == 1:
        parts.append("A single seed has no interval.")
    metrics = comparison.runs[0].metrics
    parts.append(
        f"Equal budget: the same epochs, batch, images and parameters, {metrics['optimizer']} at {metrics['lr']:g}."
    )
    if comparison.left_out:
        runs = "1 run is" if comparison.left_out == 1 else f"{comparison.left_out} runs are"
        parts.append(f"{runs} left out, of another budget or teacher, or of a seed that is there already.")
    return " ".join([*parts, conditions(comparison.runs)])
