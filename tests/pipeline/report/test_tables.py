"""Tables and progress."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipeline.config.params import load_params
from pipeline.report import paper
from pipeline.report.progress import CountWatcher, Position, RunWatcher
from pipeline.report.tables import Table, difference, number
from pipeline.system.stopping import StopSignal
from pipeline.system.text import counted
from stages.shared.context import Context
from tests.support.project import ROOT

ROW: dict[str, Any] = {
    "epoch": 1, "lr": 0.1, "train_loss": 1.5, "top1": 50.0, "top5": 90.0, "agreement": None,
}  # fmt: skip


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=200), file


def test_markdown_has_a_row_for_every_row_and_escapes_bars() -> None:
    text = Table("T", ("a", "b"), [("x|y", "1"), ("z", "2")], "note").to_markdown()
    assert text == "## T\n\n| a | b |\n|---|---:|\n| x\\|y | 1 |\n| z | 2 |\n\nnote\n"


def test_a_table_on_a_terminal_shows_brackets_as_they_are() -> None:
    out, file = console(terminal=False)
    out.print(Table("T [1]", ("name", "b"), [("[bold]x", "1")]).to_rich(80))
    assert "[bold]x" in file.getvalue()
    assert "T [1]" in file.getvalue()


def test_a_narrow_terminal_gets_fewer_columns_and_whole_words() -> None:
    table = Table("T", ("name", "needed", "dispensable"), [("x", "1.25", "77")], optional=("dispensable",))
    out, file = console(terminal=False)
    for width, words, missing in ((40, ["needed", "dispensable", "77"], []), (20, ["needed"], ["dispensable", "77"])):
        file.truncate(0)
        out.print(table.to_rich(width))
        assert all(word in file.getvalue() for word in words)
        assert not any(word in file.getvalue() for word in missing)


def test_figures_that_do_not_exist_are_dashes() -> None:
    assert (number(None), number(1.005, 1), difference(1.0, None)) == ("-", "1.0", "-")
    assert difference(75.0, 74.71) == "+0.29"


def test_a_log_gets_one_plain_line_an_epoch() -> None:
    out, file = console(terminal=False)
    with RunWatcher(out, "titn", "val") as watcher:
        watcher.started(2, 10, 0, 0)
        for _ in range(10):
            watcher.stepped()
        watcher.trained(0, 0.0)  # it went on after the epoch's last step
        watcher.epoch_ended(ROW)
        watcher.trained(60, 0.25)
        watcher.epoch_ended({**ROW, "epoch": 2, "agreement": 75.0})
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("titn: epoch 1/2, lr 1.00e-01, train loss 1.5000, val top-1 50.00 %, top-5 90.00 %, ")
    assert "agreement 75.00 %" in lines[1]
    assert lines[1].endswith(", 240 images/s") and "images/s" not in lines[0]


def test_a_resumed_run_says_where_it_goes_on_and_names_show_their_brackets() -> None:
    out, file = console(terminal=False)
    with RunWatcher(out, "titn[red]", "val") as watcher:
        watcher.started(2, 10, 1, 3)
        watcher.warned("at [chance]")
    assert file.getvalue() == "titn[red]: going on from epoch 2, step 3\ntitn[red]: warning: at [chance]\n"


def test_a_line_says_how_long_the_rest_of_the_command_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("pipeline.report.progress.time", SimpleNamespace(monotonic=lambda: clock[0]))
    out, file = console(terminal=False)

    def lines(position: Position | None, *, seconds: float = 30.0, step: int = 0) -> list[str]:
        file.seek(0)
        file.truncate()
        with RunWatcher(out, "vgg16", "test", position) as watcher:
            watcher.started(3, 10, 0, step)
            for epoch in (1, 2, 3):
                clock[0] += seconds
                watcher.trained(100, seconds)
                watcher.epoch_ended({**ROW, "epoch": epoch})
        return [line.partition("images/s")[2] for line in file.getvalue().splitlines() if "images/s" in line]

    assert lines(None) == [", about 60 s left", ", about 30 s left", ""]
    ends = lines(Position("teacher", 2, 8, epochs_after=18))
    assert ends == [f", about {minutes} min left for all teachers" for minutes in (10, 10, 9)]
    assert file.getvalue().startswith("vgg16 (teacher 2 of 8): epoch 1/3, ")
    assert lines(Position("teacher", 8, 8, epochs_after=0), seconds=7200)[1:] == [
        ", about 2 h left for all teachers",
        "",
    ]
    assert lines(None, step=4) == ["", ", about 30 s left", ""], "a part of an epoch tells nothing"


def test_a_count_is_told_at_intervals_and_at_the_end_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("pipeline.report.progress.time", SimpleNamespace(monotonic=lambda: clock[0]))
    out, _ = console(terminal=False)

    def lines(seconds: float, **how: Any) -> list[str]:
        said: list[str] = []
        with CountWatcher(out, said.append, "reading files", "read", "files", 4, **how) as watcher:
            for _ in range(4):
                clock[0] += seconds
                watcher.advance()
        return said

    assert lines(2) == []
    assert lines(2, ends=True) == ["read 4/4 files, 0 files/s"]
    assert lines(6) == [f"read {done}/4 files, 0 files/s{left}" for done, left in ((2, ", about 12 s left"), (4, ""))]
    assert lines(8, rate=("images", 80), ends=True) == [
        "read 2/4 files, 10 images/s, about 16 s left",
        "read 4/4 files, 10 images/s",
    ]


def test_a_count_is_a_bar_on_a_terminal() -> None:
    out, file = console(terminal=True)
    said: list[str] = []
    with CountWatcher(out, said.append, "reading files", "read", "files", 3) as watcher:
        for _ in range(3):
            watcher.advance()
    assert "reading files" in file.getvalue() and "3/3" in file.getvalue() and not said


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("name", ["vit", "mobilenet_v3_large", "a-student-" * 6])
@pytest.mark.parametrize("position", [None, Position("teacher", 2, 8, epochs_after=1800)])
def test_an_epoch_is_one_line_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, width: int, name: str, position: Position | None
) -> None:
    clock = [0.0]
    monkeypatch.setattr("pipeline.report.progress.time", SimpleNamespace(monotonic=lambda: clock[0]))
    file = io.StringIO()
    watcher = RunWatcher(Console(file=file, width=width), name, "test", position)
    watcher.started(300, 10, 0, 0)
    watcher._console = Console(file=file, width=width, force_terminal=True, color_system=None)
    clock[0] += 17.25
    watcher.epoch_ended({**ROW, "epoch": 100, "agreement": 75.0})
    [line] = file.getvalue().splitlines()
    assert len(line) <= width and ": epoch 100/300, " in line and ", test top-1 50.00 %" in line
    if width == 200 and name == "vit":
        assert ", lr 1.00e-01, train loss 1.5000, test top-1 50.00 %, top-5 90.00 %, agreement 75.00 %, 17.2 s" in line
    if width == 80 and name == "mobilenet_v3_large" and position is not None:
        assert line == "mobilenet_v3_large (teacher 2 of 8): epoch 100/300, test top-1 50.00 %"
    if width == 80 and name == "vit" and position is None:
        assert line == "vit: epoch 100/300, train loss 1.5000, test top-1 50.00 %, about 58 min left"


def test_control_characters_reach_no_terminal() -> None:
    table = Table("a\x1b[31m title", ["na\x07me"], [["red\x1b[31m\u202e\r"]], note="beep\x07")
    file = io.StringIO()
    Console(file=file, width=80).print(table.to_rich(80))
    params = load_params(ROOT / "params.yaml")
    Context(params, params.select("smoke"), Console(file=file, width=80), StopSignal()).say("it is \x1b[2J\r\nred")
    assert all(char.isprintable() or char == "\n" for char in file.getvalue())
    assert "red\\x1b[31m\\u202e\\r" in file.getvalue() and "it is \\x1b[2J\\r\\nred" in file.getvalue()


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "image", "0 images"), (1, "bad file", "1 bad file"), (2, "bad file", "2 bad files"), (1, "class", "1 class"),
     (10, "class", "10 classes")],
)  # fmt: skip
def test_a_count_agrees_with_its_noun(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


def test_runs_in_turn_know_their_position() -> None:
    params = load_params(ROOT / "params.yaml")
    context = Context(params, params.select("smoke"), Console(quiet=True), StopSignal())
    positions = [context.position for _ in context.in_turn("seed", ("a", "b", "c"), (0, 5))]
    assert positions == [Position("seed", index, 3, after) for index, after in ((1, 5), (2, 5), (3, 0))]
    assert context.position is None
    assert [context.position for _ in context.in_turn("seed", (0,), ())] == [None], "one run is the whole command"


def test_a_terminal_gets_a_bar() -> None:
    out, file = console(terminal=True)
    with RunWatcher(out, "titn", "val") as watcher:
        watcher.started(1, 10, 0, 0)
        for _ in range(10):
            watcher.stepped()
    assert "10/10" in file.getvalue()


def test_the_papers_table_3_is_as_printed() -> None:
    titn = paper.STUDENTS["cifar100"]["titn"]
    assert (titn.top1, titn.top5, titn.precision, titn.recall, titn.f1) == (74.71, 92.28, 0.72, 0.75, 0.74)
    assert paper.TEACHERS["cifar100"]["vgg16_bn"].top1 == pytest.approx(79.80)
    assert len(paper.TEACHERS["cifar100"]) == 8
