"""The time that a run or a suite will still take, and what it says while it runs."""

import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from resprout.agents import DQN
from resprout.benchmarks.progress import Pace, Running, SuiteProgress, time_left
from resprout.benchmarks.runner import Run, pace
from resprout.training import Experiment
from resprout.training.metrics import ProgressDisplay


@pytest.mark.parametrize(
    ("finished", "running", "waiting", "jobs", "seconds"),
    [
        ({}, [Running("a", 5.0)], ["a"], 1, None),  # nothing is known yet
        ({"a": [10.0]}, [], ["a", "a", "a"], 1, 30.0),
        ({"a": [10.0]}, [], ["a", "a", "a"], 2, 20.0),  # two, then one
        ({"a": [10.0, 20.0]}, [Running("a", 5.0)], [], 1, 10.0),  # 15 on average, 5 of them gone
        ({"a": [10.0]}, [Running("a", 12.0)], [], 1, 0.0),  # longer than expected: it may end at any moment
        ({"a": [10.0]}, [Running("a", 4.0)], ["a"], 2, 10.0),  # one place is free at once
        ({"a": [10.0]}, [Running("a", 4.0), Running("a", 1.0)], ["a"], 2, 16.0),  # the first place is free after 6
        ({"a": [10.0], "b": [40.0]}, [], ["a", "b", "c"], 1, 75.0),  # c takes what all take on average, 25
        ({"a": [10.0]}, [], [], 3, 0.0),
        ({}, [Running("a", 50.0, Pace(20.0, 8.0))], ["a"], 1, 28.0),  # not finished, but it said how fast it is
        ({"a": [10.0]}, [Running("a", 1.0, Pace(20.0, 8.0))], ["a"], 1, 23.0),  # and 15 on average
        ({}, [Running("a", 2.0, Pace(20.0, 8.0)), Running("b", 5.0)], [], 2, 15.0),  # b has said nothing: as a
    ],
)
def test_time_left_by_hand(finished, running, waiting, jobs, seconds):
    assert time_left(finished, running, waiting, jobs) == seconds


def say(terminal: bool) -> str:
    console = Console(file=io.StringIO(), width=60, force_terminal=terminal, highlight=False)
    with SuiteProgress(["a", "b", "a"], 2, console, lambda run: None) as progress:
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


def test_the_bar_reads_every_running_run_once_a_second(monkeypatch):
    now, read = 100.0, []
    monkeypatch.setattr("resprout.benchmarks.progress.time.monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=60, force_terminal=True, highlight=False)
    with SuiteProgress(["a", "a"], 2, console, read.append) as progress:
        progress.begin("first", "a")
        progress.begin("second", "a")
        for _ in range(5):
            progress.show()
        assert read == ["first", "second"]
        now += 1
        progress.show()
        progress.show()
        assert read == ["first", "second"] * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"step": 10, "steps_per_second": 4.0}\n{"step": 60, "steps_per_second": 2.0}\n', Pace(50.0, 20.0)),
        ('{"step": 60, "steps_per_second": 2.0}\n{"step": 70, "st', Pace(50.0, 20.0)),
        ('{"step": 120, "steps_per_second": 2.0}\n', Pace(50.0, 0.0)),
        ('{"step": 10, "steps_per_second": null}\n', None),
        ('{"step": 10, "steps_per_second": 0.0}\n', None),
        ('{"step": 10, "st', None),
        ("x" * 100_000 + '\n{"step": 60, "steps_per_second": 2.0}\n', Pace(50.0, 20.0)),
        ("", None),
        (None, None),
    ],
)
def test_the_pace_of_a_run_is_in_its_last_whole_line(text: str | None, expected: Pace | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    experiment = Experiment(agent=DQN(warmup=10), env="gym/CartPole-v1", steps=100, out=str(tmp_path))
    assert pace(Run("a", experiment.env, 0, experiment)) == expected


def test_a_run_that_was_gone_on_with_counts_whole() -> None:
    console = Console(file=io.StringIO(), width=60, highlight=False)
    with SuiteProgress(["a", "a"], 1, console, {"first": Pace(3_600.0, 0.0), "second": None}.get) as progress:
        progress.begin("first", "a")
        progress.end("first", "return 1.0", ok=True)
    assert console.file.getvalue() == "[1/2] first: return 1.0, 0 s; about 1:00:00 left\n"


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


UNREAD = """
import contextlib, io, sys
from resprout.training.metrics import say
sys.stdin.read(1)
with contextlib.redirect_stdout(io.StringIO()):  # a stream that is no file
    say("nobody reads this")
print("kept")
say("nor this")
"""


def test_a_reader_that_has_ended_takes_nothing_from_the_other_stream():
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-P", "-c", UNREAD], **pipes) as process:
        process.stderr.close()
        process.stdin.write(b"x")
        process.stdin.close()
        assert process.stdout.read() == b"kept\n"
        assert process.wait() == 0
