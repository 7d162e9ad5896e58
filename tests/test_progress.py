"""The time that a run or a suite will still take, and what it says while it runs."""

import io
import math

import pytest
from rich.console import Console

from resprout.benchmarks.progress import SuiteProgress, time_left
from resprout.training.metrics import ProgressDisplay


@pytest.mark.parametrize(
    ("finished", "running", "waiting", "jobs", "seconds"),
    [
        ({}, [("a", 5.0)], ["a"], 1, None),  # nothing is known yet
        ({"a": [10.0]}, [], ["a", "a", "a"], 1, 30.0),
        ({"a": [10.0]}, [], ["a", "a", "a"], 2, 20.0),  # two, then one
        ({"a": [10.0, 20.0]}, [("a", 5.0)], [], 1, 10.0),  # 15 on average, 5 of them gone
        ({"a": [10.0]}, [("a", 12.0)], [], 1, 0.0),  # longer than expected: it may end at any moment
        ({"a": [10.0]}, [("a", 4.0)], ["a"], 2, 10.0),  # one place is free at once
        ({"a": [10.0]}, [("a", 4.0), ("a", 1.0)], ["a"], 2, 16.0),  # the first place is free after 6
        ({"a": [10.0], "b": [40.0]}, [], ["a", "b", "c"], 1, 75.0),  # c takes what all take on average, 25
        ({"a": [10.0]}, [], [], 3, 0.0),
    ],
)
def test_time_left_by_hand(finished, running, waiting, jobs, seconds):
    assert time_left(finished, running, waiting, jobs) == seconds


def say(terminal: bool) -> str:
    console = Console(file=io.StringIO(), width=60, force_terminal=terminal, highlight=False)
    with SuiteProgress(["a", "b", "a"], 2, console) as progress:
        progress.begin("a on a task with a long name seed 0", "a")
        progress.begin("b", "b")
        progress.show()
        progress.end("b", "FAILED", ok=False)
        progress.end("a on a task with a long name seed 0", "return 3.0", ok=True)
        progress.begin("third", "a")
        progress.end("third", "return 2.0", ok=True)
    return console.file.getvalue()


def test_a_line_for_each_run_where_there_is_no_terminal():
    assert say(terminal=False).splitlines() == [
        "[1/3] b: FAILED, 0 s",
        "[2/3] a on a task with a long name seed 0: return 3.0, 0 s; about 0:00:00 left",
        "[3/3] third: return 2.0, 0 s",
    ]


def test_a_terminal_has_a_bar_as_well():
    said = say(terminal=True)
    assert "[3/3] third: return 2.0" in said
    assert "1/3" in said and "FAILED" in said and "\x1b[" in said


def test_the_speed_is_that_of_the_last_half_minute(monkeypatch):
    """An evaluation of 20 seconds between steps 100 and 110, and neither a rate of its length alone nor one of the start."""
    clock = iter([0.0, 0.0, 10.0, 30.0, 40.0, 50.0])
    monkeypatch.setattr("resprout.training.metrics.time.monotonic", lambda: next(clock))
    display = ProgressDisplay(1_000, 0, quiet=True)
    rates = []
    for step in (100, 110, 210, 310):
        display.update(step, math.nan)
        rates.append(display.rate)
    assert rates == [10, 110 / 30, 110 / 30, 210 / 40]
