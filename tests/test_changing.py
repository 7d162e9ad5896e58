"""Suites of changing tasks: areas, gaps and recovery by hand, and a run of one end to end."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from resprout.benchmarks import changing, report, runner, tables
from resprout.benchmarks import results_ as results
from resprout.benchmarks.suites import SUITES, Suite
from resprout.training.__main__ import dispatch

TASK = "changing/CartPole-physics@100"
WIDTH = 100 // changing.PARTS  # agent steps of a point


def row(arm: str, seed: int, steps: int = 200) -> results.Row:
    texts = {"suite": "changing", "arm": arm, "task": TASK}
    numbers = {"seed": seed, "agent_steps": steps, "gradient_steps": 0, "final_return": np.nan, "episodes": 0}
    where = dict.fromkeys(("protocol", "digest", "commit", "resprout", "jax", "directory", "finished"), "")
    return results.Row(**texts, **numbers, steps_per_second=1.0, peak_memory_bytes=0, **where)


def points(arm: str, seed: int, values: list[float | None]) -> list[results.Point]:
    return [
        results.Point(arm, TASK, seed, WIDTH * part, "episode/return", value)
        for part, value in enumerate(values, start=1)
        if value is not None
    ]


def short_suite(*tasks: str) -> Suite:
    """`changing` on other tasks, of which a run of 200 steps is one."""
    suite = SUITES["changing"]()
    arms = {
        arm: dataclasses.replace(each, agent=dataclasses.replace(each.agent, warmup=50))
        for arm, each in suite.arms.items()
    }
    return dataclasses.replace(suite, arms=arms, tasks=tasks)


@pytest.mark.parametrize(("steps", "turns"), [(300, 3), (200, 2), (299, 2), (100, 1), (99, 0)])
def test_curves_are_cut_at_the_changes_whatever_the_length_of_the_run(steps: int, turns: int) -> None:
    """Points that tell their turn, the last of the run without an episode."""
    values = [1.0 + step // 100 for step in range(0, steps, WIDTH)]
    found = changing.turns_of([row("a", 0, steps)], points("a", 0, [*values[:-1], None]))
    if not turns:
        assert found.get("a", {}) == {}
        return
    cut = found["a"][TASK][0]
    assert cut.shape == (turns, changing.PARTS)
    for turn, each in enumerate(cut, start=1):
        assert set(each[~np.isnan(each)]) == {turn}
    assert np.isnan(cut).sum() == (steps % 100 == 0)


def test_the_area_is_the_mean_of_what_was_measured() -> None:
    found = changing.turns_of([row("a", 0)], points("a", 0, [1.0, None, *[2.0] * 18]))
    assert changing.areas(found) == {"a": {TASK: {0: 37 / 19}}}


def test_turns_are_scaled_by_the_reference_on_the_same_task() -> None:
    """Five turns of four tasks, so that the first task has two: 2 and 6 of the reference are a mean of 4."""
    everywhere = [2.0, 10.0, 1.0, 5.0, 6.0]
    every = [
        *points("a", 0, [value for value in everywhere for _ in range(10)]),
        *points(
            "b",
            0,
            [
                value * factor
                for value, factor in zip(everywhere, (2, 1.2, 1.2, 0.6, 2), strict=True)
                for _ in range(10)
            ],
        ),
    ]
    turns = changing.turns_of([row(arm, 0, 500) for arm in "ab"], every)
    scaled = changing.scaled(turns, [TASK], "a")
    assert scaled["a"][TASK][0].mean(axis=1).tolist() == [0.5, 1, 1, 1, 1.5]
    np.testing.assert_allclose(scaled["b"][TASK][0].mean(axis=1), [1, 1.2, 1.2, 0.6, 3])
    assert changing.areas(scaled)["a"] == {TASK: {0: 1.0}}
    with pytest.raises(ValueError, match=r"a has a mean return of 0 on a task of .*, which cannot be score 1"):
        changing.scaled({"a": {TASK: {0: np.zeros((5, 10))}}}, [TASK], "a")


def test_a_large_return_of_one_task_decides_no_comparison() -> None:
    """b has a fifth more than a on the first two tasks and a fifth less on the third, whose returns are thirty times as large."""
    suite = short_suite(TASK)
    values = {"dqn": [2.0, 2.0, 60.0], "fresh": [2.4, 2.4, 48.0]}
    rows = [row(arm, seed, 300) for arm in values for seed in range(5)]
    every = [
        point
        for arm, seed in ((each.arm, each.seed) for each in rows)
        for point in points(arm, seed, [value for value in values[arm] for _ in range(10)])
    ]
    by_title = {sheet.title: sheet for sheet in tables.sheets(suite, rows, every)}
    (line,) = by_title[next(title for title in by_title if title.startswith(tables.PAIRS))].lines
    assert line[0] == "fresh\n- dqn" and line[2] == "0.067" and line[4] == "higher"  # (0.2 + 0.2 - 0.2) / 3


def test_recovery_is_the_first_part_at_nine_tenths_of_the_fresh_gain() -> None:
    fresh = np.array([[0, 5, 10], [-10, 0, 10], [4, 4, 4]], float)  # levels 9, 8 and 4
    run = np.array([[8, 9, 9], [-5, 7, 7.9], [np.nan, 3, 4]])
    assert changing.recovery(run, fresh).tolist() == [2, np.inf, 3]


def test_where_the_fresh_network_learns_nothing_there_is_nothing_to_recover() -> None:
    fresh = np.array([[4, 4, 4], [4, 9, 5.9], [4, 1, 6], [-4, -3, -2], [-4, -3, -2.1], [0, 0, 0], [np.nan, 1, 2]])
    assert changing.learnt(fresh).tolist() == [False, False, True, True, False, False, False]


def test_the_gap_and_the_time_to_recover_by_hand() -> None:
    """Second turn: fresh gains 0 to 10 (9 is recovered); seed 0 gets there in its eighth part of 10 steps, seed 1 never.

    In units of the fresh network's mean return on the second task, 3.4.
    """
    fresh = [1.0] * 10 + [0, 0, 0, 0, 0, 4, 4, 8, 8, 10]
    every = [
        *points("fresh", 0, fresh),
        *points("fresh", 1, fresh),
        *points("a", 0, [9.0] * 10 + [1.0] * 7 + [9.0] * 3),
        *points("a", 1, [9.0] * 10 + [1.0] * 10),
    ]
    turns = changing.turns_of([row(arm, seed) for arm in ("a", "fresh") for seed in (0, 1)], every)
    by_turn, by_task, change = changing.changing_sheets(turns, ["a", "fresh"], [TASK], "fresh")
    assert by_turn.lines == by_task.lines == [("a", "2", "9.00", "2.20"), ("fresh", "2", "1.00", "3.40")]
    assert by_task.columns[2:] == ("as it is", "gravity 19.6, force_mag 6")
    ((arm, pairs, gap, _, said, steps, missed),) = change.lines
    assert (arm, pairs, gap, said) == ("a", "2", "-0.353", "too few pairs")  # (3.4 - 3.4 + 1 - 3.4) / 2 / 3.4
    assert (steps, missed) == ("90", "50%")  # (80 + 100) / 2
    assert "its first return does not count: 0 of 1." in change.notes[0]
    for run in turns["fresh"][TASK].values():
        run[1] = 3.4  # and learns nothing
    ((*_, steps, missed),) = changing.changing_sheets(turns, ["a", "fresh"], [TASK], "fresh")[-1].lines
    assert (steps, missed) == ("", "")
    assert len(changing.changing_sheets(turns, ["a"], [TASK], "missing")) == 2


def test_runs_without_a_whole_turn_have_no_sheet_and_stop_no_report() -> None:
    other = "changing/minatar-cycle@1000"
    suite, short = short_suite(TASK, other), dataclasses.replace(row("dqn", 0), task=other)
    every = points("dqn", 0, [1.0] * 20)
    turns = changing.turns_of([row("dqn", 0), short], every)
    assert len(changing.changing_sheets(turns, ["dqn"], suite.tasks, "fresh")) == 2
    assert "Changes of task" in report.body("changing", suite, "", [row("dqn", 0), short], every, None)
    assert "No run was evaluated" in report.body("changing", suite, "", [short], [], None)


@pytest.mark.parametrize("name", ["changing", "changing-sac"])
def test_every_arm_differs_from_the_plain_one_and_parts_fit_turns(name: str) -> None:
    suite = SUITES[name]()
    assert suite.fresh in suite.arms and len(suite.arms) >= 10
    for task in suite.tasks:
        for steps in suite.steps.values():
            assert steps % changing.parse(task)[1] == 0
        assert suite.width * changing.PARTS == changing.parse(task)[1]
    assert all(suite.width % arm.log_every == 0 for arm in suite.arms.values())
    assert len({arm.interventions for arm in suite.arms.values()}) == len(suite.arms)


@pytest.mark.slow
def test_a_suite_of_changing_tasks_end_to_end(tmp_path: Path) -> None:
    """Run, summed up from run directories and from the rows that are kept, and in a report."""
    suite = SUITES["changing"]()
    task, steps = "changing/CartPole-physics@25000", 1_000
    short = "changing/CartPole-physics@250"
    arms = {arm: dataclasses.replace(each, log_every=5) for arm, each in suite.arms.items()}
    small = dataclasses.replace(suite, arms=arms, tasks=(short,), steps={"laptop": steps, "paper": steps}, width=25)
    assert task in suite.tasks
    every = runner.runs(small, ["dqn", "fresh"], [short], [0, 1], steps, tmp_path / "out")
    console = Console(file=io.StringIO(), width=200)
    assert not runner.run_all(every, 2, False, console)
    rows, points = tables.gather("changing", small, tmp_path / "out", None)
    made = tables.sheets(small, rows, points)
    assert [sheet.title.partition(":")[0] for sheet in made] == [
        "Episodes of all turns",
        "Episodes of all turns",
        "Differences of paired seeds, episodes of all turns",
        short,
        short,
        short,
    ]
    area = tables.returns_of(small, rows, points)["dqn"][short][0]
    assert tables.rows_sheet(rows, tables.returns_of(small, rows, points)).lines[0][3] == f"{area:.6g}"
    page = report.body("changing", small, "", rows, points, tmp_path / "out")
    assert "Changes of task" in page and "steps to recover" in page and "episodes of all turns" in page
    found, curves = results.read_finished(tmp_path / "out", "changing", small.arms, small.width)
    assert results.add(found, curves, "changing", tmp_path) == 4
    kept = tables.sheets(small, *tables.gather("changing", small, None, tmp_path))
    assert [sheet.title for sheet in kept] == [sheet.title for sheet in made]


def test_the_suites_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["list", "suites"]) == 0
    assert "slippery Ant" in capsys.readouterr().out
