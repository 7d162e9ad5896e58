"""Suites of changing tasks: areas, gaps and recovery by hand, and a run of one end to end."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from resprout.benchmarks import changing, report, runner, tables
from resprout.benchmarks import results_ as results
from resprout.benchmarks.suites import SUITES
from resprout.training.__main__ import dispatch

TASK = "changing/CartPole-physics@100"
PARTS = 8  # of runs of 200 or 400 agent steps: four or two to a turn


def points(arm: str, seed: int, values: list[float | None], length: int = 200) -> list[results.Point]:
    return [
        results.Point(arm, TASK, seed, length * part // PARTS, "episode/return", value)
        for part, value in enumerate(values, start=1)
        if value is not None
    ]


def test_curves_are_cut_at_the_changes() -> None:
    found = changing.turns_of(points("a", 0, [1, 2, 3, 4, None, 6, 7, 8]), [TASK], PARTS)
    np.testing.assert_array_equal(found["a"][TASK][0], [[1, 2, 3, 4], [np.nan, 6, 7, 8]])
    assert changing.areas(found) == {"a": {TASK: {0: 31 / 7}}}
    four = changing.turns_of(points("a", 0, [1, 2, 3, 4, 5, 6, 7, 8], 400), [TASK], PARTS)
    np.testing.assert_array_equal(four["a"][TASK][0], [[1, 2], [3, 4], [5, 6], [7, 8]])


def test_what_is_no_whole_turn_is_left_out() -> None:
    assert changing.turns_of(points("a", 0, [1.0] * 8, 80), [TASK], PARTS) == {}
    two = changing.turns_of(points("a", 0, [1, 2, 3, 4, 5, 6, 7, 8], 250), [TASK], PARTS)  # 3.2 parts to a turn
    assert two["a"][TASK][0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_recovery_is_the_first_part_at_nine_tenths_of_the_fresh_gain() -> None:
    fresh = np.array([[0, 5, 10], [-10, 0, 10], [4, 4, 4]], float)  # levels 9, 8 and 4
    run = np.array([[8, 9, 9], [-5, 7, 7.9], [np.nan, 3, 4]])
    assert changing.recovery(run, fresh).tolist() == [2, np.inf, 3]


def test_the_gap_and_the_time_to_recover_by_hand() -> None:
    """Second turn: fresh gains 0 to 10 (9 is recovered); seed 0 gets there in its third part of 25 steps, seed 1 never."""
    every = [
        *points("fresh", 0, [0, 0, 0, 0, 0, 4, 8, 10]),
        *points("fresh", 1, [0, 0, 0, 0, 0, 4, 8, 10]),
        *points("a", 0, [9, 9, 9, 9, 1, 1, 9, 9]),
        *points("a", 1, [9, 9, 9, 9, 1, 1, 1, 1]),
    ]
    turns = changing.turns_of(every, [TASK], PARTS)
    by_turn, change = changing.changing_sheets(turns, ["a", "fresh"], [TASK], "fresh")
    assert by_turn.lines == [("a", "2", "9.00", "3.00"), ("fresh", "2", "0.00", "5.50")]
    ((arm, pairs, gap, _, _, steps, missed),) = change.lines
    assert (arm, pairs, gap) == ("a", "2", "-2.500")  # (5 - 5.5 + 1 - 5.5) / 2
    assert (steps, missed) == ("88", "50%")  # (75 + 100) / 2
    assert len(changing.changing_sheets(turns, ["a"], [TASK], "missing")) == 1


@pytest.mark.parametrize("name", ["changing", "changing-sac"])
def test_every_arm_differs_from_the_plain_one_and_parts_fit_turns(name: str) -> None:
    suite = SUITES[name]()
    assert suite.fresh in suite.arms and len(suite.arms) >= 10
    for task in suite.tasks:
        for steps in suite.steps.values():
            assert steps % changing.parse(task)[1] == 0
        assert suite.points * changing.parse(task)[1] % suite.steps["laptop"] == 0
    assert len({arm.interventions for arm in suite.arms.values()}) == len(suite.arms)


@pytest.mark.slow
def test_a_suite_of_changing_tasks_end_to_end(tmp_path: Path) -> None:
    """Run, summed up from run directories and from the rows that are kept, and in a report."""
    suite = SUITES["changing"]()
    task, steps = "changing/CartPole-physics@25000", 1_000
    short = "changing/CartPole-physics@250"
    small = dataclasses.replace(suite, tasks=(short,), steps={"laptop": steps, "paper": steps})
    assert task in suite.tasks
    every = runner.runs(small, ["dqn", "fresh"], [short], [0, 1], steps, tmp_path / "out")
    console = Console(file=io.StringIO(), width=200)
    assert not runner.run_all(every, 2, False, console)
    rows, points = tables.gather("changing", small, tmp_path / "out", None)
    made = tables.sheets(small, rows, points)
    assert [sheet.title.partition(":")[0] for sheet in made] == [
        "Episodes of all turns",
        "Mean return of the runs, and standard deviation",
        "Differences of paired seeds, in the same unit",
        short,
        short,
    ]
    page = report.body("changing", small, "", rows, points, tmp_path / "out")
    assert "Changes of task" in page and "steps to recover" in page and "episodes of all turns" in page
    found, curves = results.read_finished(tmp_path / "out", "changing", small.arms, small.points)
    assert results.add(found, curves, "changing", tmp_path) == 4
    kept = tables.sheets(small, *tables.gather("changing", small, None, tmp_path))
    assert [sheet.title for sheet in kept] == [sheet.title for sheet in made]


def test_the_suites_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["list", "suites"]) == 0
    assert "slippery Ant" in capsys.readouterr().out
