"""Published figures: complete, found by name, recomputed where the table holds what they were computed from."""

import csv
import dataclasses

import numpy as np
import pytest

from resprout.agents import DQN, SAC
from resprout.benchmarks.published import (
    HUMAN_RANDOM,
    PUBLISHED,
    Column,
    human_random,
    lookup,
    mismatches,
    normalised,
    published,
)
from resprout.benchmarks.stats import human_normalised, mean, median
from resprout.benchmarks.suites import ARR_GAMES, ATARI_100K, REDO_GAMES
from resprout.envs.atari import ATARI_PROTOCOLS
from resprout.training import Experiment

SETS = {"ALL(26)": ATARI_100K, "ALL(17)": REDO_GAMES}
STATISTICS = {"mean_hns": mean, "median_hns": median}


def test_figures_are_unique_and_their_columns_hold_what_they_may():
    rows = published()
    keys = [
        (row.source, row.agent, row.variant, row.suite, row.task, row.budget, row.budget_unit, row.metric)
        for row in rows
    ]
    assert len(set(keys)) == len(keys) > 2_000
    assert {row.evidence for row in rows} == {"file", "paper", "read_off", "memory"}
    assert {row.budget_unit for row in rows} == {"agent_steps", "frames"}
    assert {row.sticky for row in rows} == {None, 0.0, 0.25}
    assert all(
        row.ci_low <= row.mean <= row.ci_high for row in rows if row.ci_low is not None and row.source != "arr_paper"
    )


def test_nothing_of_a_file_is_lost():
    paths = [path for path in PUBLISHED.glob("*.csv") if path.name != HUMAN_RANDOM]
    fields = [field.name for field in dataclasses.fields(published()[0])]
    for path in paths:
        with path.open(newline="") as file:
            assert csv.DictReader(file).fieldnames == fields
    assert sum(len(path.read_text().splitlines()) - 1 for path in paths) == len(published())


def test_lookup_by_what_is_given():
    (anchor,) = [row for row in lookup("mujoco", "Hopper-v4", "SAC", source="simbav2_repo") if row.budget == 1_000_000]
    assert (anchor.mean, anchor.std, anchor.runs, anchor.agent_steps) == (2787.1, 867.89, 10, 1_000_000)
    assert lookup("mujoco", "Hopper-v4", "DQN") == []
    recalled = [row.evidence == "memory" for row in lookup("atari100k", "Alien")]
    assert recalled == sorted(recalled) and any(recalled)


def test_frames_become_decisions():
    (found,) = [row for row in lookup("atari", "Pong", "DQN", "CNN") if row.budget == 40_000_000]
    assert (found.budget_unit, found.agent_steps) == ("frames", 10_000_000)
    assert (
        Column("arr_paper", "dmc-pixels", "DrQ-v2", "RR 2", budget=2_000_000).of("dmc-pixels/walker-run").agent_steps
        == 1_000_000
    )


def test_another_version_of_a_task_is_found_and_said():
    column = Column("simbav2_repo", "mujoco", "SAC", budget=1_000_000)
    ours = Experiment(agent=SAC(), env="mujoco/Hopper-v5", steps=1_000_000)
    assert mismatches(column.of(ours.env), ours) == ["Hopper-v4, ours Hopper-v5"]
    assert mismatches(column.of("mujoco/Hopper-v4"), dataclasses.replace(ours, env="mujoco/Hopper-v4")) == []
    assert column.of("mujoco/Swimmer-v5") is None


@pytest.mark.parametrize("protocol", ATARI_PROTOCOLS)
def test_protocols_of_atari_are_told_apart(protocol):
    theirs = Column("rliable_100k", "atari100k", "DrQ(eps)").value("Boxing")
    ours = Experiment(agent=DQN(), env="atari/Boxing", protocol=protocol, steps=100_000)
    settings = ATARI_PROTOCOLS[protocol]
    said = mismatches(theirs, ours)
    assert any("sticky" in text for text in said) == (settings.sticky != 0)
    assert any("lost life" in text for text in said) == (not settings.life_loss_ends_episode)
    assert not any("training" in text for text in said)


def test_how_sure_a_figure_is_and_what_it_is_of_is_said():
    ours = Experiment(agent=DQN(), env="atari/Alien", protocol="atari100k", steps=100_000)
    (recalled,) = lookup("atari100k", "Alien", "SR-SPR")
    assert mismatches(recalled, ours) == ["recalled, not read again"]
    (trained,) = [row for row in lookup("atari", "Alien", "DQN", "CNN") if row.budget == 10_000_000]
    assert "return of training episodes, ours of evaluations" in mismatches(trained, ours)
    (plotted,) = lookup("atari", "ALL(17)", "DQN", "RR 2")
    assert "read off a plot" in mismatches(plotted, ours)


def test_human_scores():
    assert len(human_random()) == 57 and human_random()["Boxing"] == (0.1, 12.1)
    assert normalised("atari/Boxing", 12.1) == 1 and normalised("atari/Boxing", 0.1) == 0
    for unknown in ("atari/Carnival", "mujoco/Boxing"):
        with pytest.raises(ValueError, match="has no human score"):
            normalised(unknown, 1.0)


def aggregates():
    """Means and medians over 26 or 17 games whose returns stand in the table, too, but those recalled."""
    for row in published():
        if row.metric in STATISTICS and row.task in SETS and row.evidence != "memory":
            games = ARR_GAMES if row.source == "arr_paper" else SETS[row.task]
            column = Column(row.source, row.suite, row.agent, row.variant, "eval_return", row.budget)
            if row.source == "dopamine_atari":
                column = dataclasses.replace(column, metric="train_return")
            if all((found := column.of(game)) and found.evidence != "memory" for game in games):
                yield pytest.param(row, column, games, id=f"{column}, {row.metric}, {row.task}, {row.budget}")


@pytest.mark.parametrize(("row", "column", "games"), list(aggregates()))
def test_published_aggregates_are_what_our_statistics_make_of_published_returns(row, column, games):
    scores = [human_normalised(column.of(game).mean, *human_random()[game.partition("/")[2]]) for game in games]
    statistic = STATISTICS[row.metric]([np.array([score]) for score in scores])
    assert float(statistic) == pytest.approx(row.mean, abs=6e-4)


def test_so_many_aggregates_can_be_recomputed():
    assert len(list(aggregates())) == 44
