"""The simulation of draws per life: its theory against independent sums and simulations, its counts against theory."""

import csv
import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resprout.benchmarks import draw_counts
from resprout.benchmarks.draw_counts import Simulation
from resprout.replay import uniform
from resprout.training import __main__ as command_line

SMALL = Simulation(capacity=640, batch_size=32, period=4, learning_starts=160, lives=640 * 31)
FULL = slice(SMALL.capacity, None)


@pytest.mark.parametrize(
    ("mu", "probabilities"),
    [
        (8, [0, 0, 0, 0, 0, 0, 0, 1 / 6, 2 / 3, 1 / 6, 0]),
        (1, [1 / 6, 2 / 3, 1 / 6, 0]),
        (2.5, [0, 1 / 48, 23 / 48, 23 / 48, 1 / 48]),
        (0.5, [25 / 48, 22 / 48, 1 / 48]),
    ],
)
def test_reshuffled_probabilities_by_hand(mu, probabilities):
    np.testing.assert_allclose(draw_counts.reshuffled_probabilities(mu), probabilities)


@given(st.floats(1, 100))
def test_reshuffled_draws_have_mean_mu_and_variance_one_third(mu):
    probabilities = draw_counts.reshuffled_probabilities(mu)
    assert (probabilities >= 0).all()
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities @ np.arange(len(probabilities)) == pytest.approx(mu)
    assert draw_counts.variance(probabilities) == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.7])
def test_reshuffled_probabilities_against_random_epochs(mu):
    generator = np.random.default_rng(0)
    born = generator.random((200_000, 1))
    turns = np.arange(5) + generator.random((200_000, 5))  # when the slot's turn comes in each of five epochs
    counts = ((turns >= born) & (turns < born + mu)).sum(axis=1)
    expected = draw_counts.reshuffled_probabilities(mu)
    np.testing.assert_allclose(np.bincount(counts, minlength=len(expected)) / 200_000, expected, atol=0.005)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.integers(1, 30), st.integers(0, 99))
def test_expected_draws_are_the_sum_over_all_batches(rows, period, starts, lives, seed):
    capacity = period * (starts + rows)
    simulation = Simulation(
        capacity, batch_size=1, period=period, learning_starts=period * max(starts, 1), lives=capacity + period * lives
    )
    simulation = dataclasses.replace(simulation, seed=seed)
    priorities = draw_counts.priorities(simulation)
    expected = np.zeros(len(priorities))
    for written in range(period, len(priorities) + 1, period):
        present = np.arange(max(0, written - capacity), written)
        if written > simulation.learning_starts:
            expected[present] += simulation.batch_size * priorities[present] / priorities[present].sum()
    np.testing.assert_allclose(draw_counts.expected_draws(simulation, priorities), expected[: simulation.lives])


def test_filling_formula_is_the_sum_over_all_batches():
    simulation = Simulation(capacity=8_000, learning_starts=800, lives=12_000)
    expected = draw_counts.expected_draws(simulation, np.ones(simulation.lives + simulation.capacity))
    formula = draw_counts.filling_mean(simulation, np.arange(simulation.capacity) + 0.5)
    np.testing.assert_allclose(expected[: simulation.capacity], formula, rtol=0.005)
    np.testing.assert_allclose(expected[simulation.capacity :], simulation.draws_per_life)


def test_counts_are_those_of_a_plain_loop():
    simulation = Simulation(capacity=40, batch_size=4, period=4, learning_starts=8, lives=80)
    priorities = np.ones(120, np.float32)
    sampler, key = uniform(40), jax.random.key(7)
    add = jax.jit(sampler.add)
    sample = jax.jit(sampler.sample, static_argnums=1)
    state, transition, drawn = sampler.init(key), np.full(40, -1), []
    for start in range(0, 120, 4):
        slots = np.arange(start, start + 4) % 40
        transition[slots] = np.arange(start, start + 4)
        state = add(state, slots)
        if start >= simulation.learning_starts:
            state, chosen, _ = sample(state, 4)
            drawn.append(transition[np.asarray(chosen)])
    np.testing.assert_array_equal(draw_counts.draw(sampler, simulation, priorities, key), drawn)


@pytest.fixture(scope="module")
def result():
    return draw_counts.simulate(SMALL, list(draw_counts.UNIFORM))


def test_draws_are_unbiased(result):
    for name, counts in result.counts.items():
        assert len(counts) == SMALL.lives
        assert counts[FULL].mean() == pytest.approx(8, abs=0.03), name


def test_reshuffled_counts_are_7_8_and_9(result):
    shares = np.bincount(result.counts["RR-C"][FULL]) / len(result.counts["RR-C"][FULL])
    np.testing.assert_allclose(shares[7:], [1 / 6, 2 / 3, 1 / 6], atol=0.01)
    assert not shares[:7].any()


def test_counts_with_replacement_are_poisson_and_without_it_binomial(result):
    assert result.counts["WR"][FULL].var() == pytest.approx(8, rel=0.04)
    assert result.counts["WOR"][FULL].var() == pytest.approx(8 * (1 - 32 / 640), rel=0.04)


@pytest.mark.slow
def test_excess_of_prioritized_counts():
    result = draw_counts.simulate(SMALL, list(draw_counts.PRIORITIZED))
    excess = {name: (result.counts[name] - result.expected[name])[FULL] for name in result.counts}
    mean = result.expected["PER"][FULL].mean()
    assert excess["PER"].var() == pytest.approx(mean, rel=0.05)  # Poisson, with a mean for every transition
    for name, values in excess.items():
        assert values.mean() == pytest.approx(0, abs=0.1), name
    for masked in ("RR-M", "RR-M+ST"):
        assert excess[masked].var() < 0.2 * excess["PER"].var()


def test_rows_put_theory_beside_the_measured(result):
    rows = {(row.sampler, row.written_from): row for row in result.rows}
    assert len(rows) == len(draw_counts.UNIFORM) * (2 + draw_counts.PARTS)
    row = rows["RR-C", SMALL.capacity]
    assert (row.lives, row.mean_theory, row.least, row.most) == (SMALL.lives - 640, 8, 7, 9)
    assert (row.variance_theory, row.never, row.never_theory) == (pytest.approx(1 / 3), 0, 0)
    row = rows["WR", SMALL.capacity]
    assert row.never_theory == pytest.approx(3.35e-4, rel=0.01)
    for name in draw_counts.UNIFORM:
        row = rows[name, 0]  # written before learning began: the most draws of all
        assert row.mean == pytest.approx(row.mean_theory, abs=4 * (row.mean_theory / row.lives) ** 0.5)
        assert 11 < row.mean_theory == pytest.approx(8 * (np.log(640 / 160) + 80 / 640))


def test_command_prints_and_writes(tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--capacity", "400", "--lives", "1200", "--learning-starts", "40", "--samplers", "WR", "WOR"]
    assert command_line.dispatch(["bench", "run", "errr-counts", *flags, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "mu = 8" in said and "(7.36)" in said  # 8 * (1 - 32 / 400)
    with (out / "draw-counts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["sampler"] for row in rows} == {"WR", "WOR"}
    assert (out / "draw-counts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--capacity", "0"], "capacity must be at least 1"),
        (["--period", "3"], "capacity must be a multiple of the period"),
        (["--lives", "10000"], "lives must be more than capacity"),
        (["--learning-starts", "20"], "learning_starts must lie between"),
        (["--spread", "-1"], "spread must be finite"),
        (["--spread", "nan"], "spread must be finite"),
        (["--samplers", "RRC"], "invalid choice: 'RRC'"),
        (["--capacity", "many"], "invalid int value"),
    ],
)
def test_bad_input_is_one_line_and_creates_nothing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command_line.dispatch(["bench", "run", "errr-counts", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
