"""Causal weights against models whose coefficients are known, scikit-learn's LassoLarsIC and lingam."""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LassoLarsIC, LinearRegression

from resprout.agents.causal import (
    adaptive_lasso,
    causal_effects,
    causal_order,
    causal_weights,
    entropy,
    likelihood_ratios,
    softmax_weights,
)


@pytest.fixture(scope="module")
def lingam() -> Any:
    with warnings.catch_warnings():  # of packages that it imports
        warnings.simplefilter("ignore")
        return pytest.importorskip("lingam")


def uniform_data(seed: int, rows: int = 5_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """r = 2 a0 - a1 + 0.5 s0 + noise; a2 and s1 do nothing."""
    generator = np.random.default_rng(seed)
    states, actions = generator.uniform(-1, 1, (rows, 2)), generator.uniform(-1, 1, (rows, 3))
    noise = 0.2 * generator.uniform(-1, 1, rows)
    return states, actions, 2 * actions[:, 0] - actions[:, 1] + 0.5 * states[:, 0] + noise


def chained_data(seed: int, columns: int, rows: int = 2_000) -> np.ndarray:
    """A random linear model without Gaussians, its columns in a random order, in units of their own."""
    generator = np.random.default_rng(seed)
    data = generator.uniform(-1, 1, (rows, columns)) ** 3
    for i in range(columns):
        data[:, i] += data[:, :i] @ generator.uniform(-1.5, 1.5, i)
    return (data * generator.uniform(0.1, 10, columns) + generator.normal(size=columns))[
        :, generator.permutation(columns)
    ]


# The softmax.


def test_softmax_table() -> None:
    np.testing.assert_allclose(softmax_weights([2, -1, 0]), [2.5314, 0.1260, 0.3426], atol=5e-5)
    np.testing.assert_allclose(softmax_weights([0.1, -0.05, 0]), [1.085, 0.934, 0.982], atol=5e-4)
    np.testing.assert_allclose(softmax_weights([2, -1, 0], sign="absolute"), softmax_weights([2, 1, 0]))
    np.testing.assert_allclose(softmax_weights([2, -1, 0], temperature=4), softmax_weights([0.5, -0.25, 0]))
    np.testing.assert_array_equal(softmax_weights([7.0]), [1])


EFFECTS = st.lists(st.floats(-50, 50), min_size=1, max_size=6)


@given(EFFECTS, st.floats(-50, 50), st.randoms())
def test_softmax_properties(effects: list[float], shift: float, random: Any) -> None:
    weights = softmax_weights(effects)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.mean(), 1)
    np.testing.assert_allclose(softmax_weights(np.add(effects, shift)), weights, rtol=1e-9, atol=1e-30)
    order = random.sample(range(len(effects)), len(effects))
    np.testing.assert_allclose(softmax_weights(np.array(effects)[order]), weights[order], rtol=1e-12)


# Effects.


@pytest.mark.parametrize("mode", ["sink", "full"])
def test_known_effects_are_found(mode: Any) -> None:
    found = np.stack([causal_effects(*uniform_data(seed), mode) for seed in range(10)])
    np.testing.assert_allclose(found, np.tile([2, -1, 0], (10, 1)), atol=0.02)
    assert (found[:, 2] == 0).sum() >= 9  # exactly: the criterion drops it
    weights = causal_weights(*uniform_data(0), mode)
    np.testing.assert_allclose(weights, [2.5314, 0.1260, 0.3426], atol=0.03)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 9), st.floats(1e-4, 1e4), st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_effects_have_units(seed: int, reward: float, action: float, offset: float) -> None:
    states, actions, rewards = uniform_data(seed, 300)
    effects = causal_effects(states, actions, rewards)
    again = causal_effects(states * 7 + offset, actions * action - offset, rewards * reward + offset)
    np.testing.assert_allclose(again, effects * reward / action, rtol=1e-5, atol=1e-7 * reward / action)


def test_what_stands_behind_the_reward_has_no_effect_in_full_mode() -> None:
    """An action that follows the reward, as nothing within a transition does, fools sink mode alone."""
    generator = np.random.default_rng(0)
    states, rewards = generator.uniform(-1, 1, (4_000, 1)), generator.uniform(-1, 1, 4_000)
    actions = (rewards + 0.5 * generator.uniform(-1, 1, 4_000))[:, None]
    assert causal_effects(states, actions, rewards)[0] > 0.5
    np.testing.assert_array_equal(causal_effects(states, actions, rewards, "full"), [0])


@pytest.mark.parametrize("seed", range(5))
def test_sink_mode_is_lassolarsic_on_weighted_columns(seed: int) -> None:
    """The estimator of lingam 1.5, which ACE ships: coefficients are the adaptive lasso's own."""
    data = chained_data(seed, 9)
    columns, target = data[:, :-1], data[:, -1]
    weight = np.abs(LinearRegression().fit(columns, target).coef_)
    expected = LassoLarsIC(criterion="bic").fit(columns * weight, target).coef_ * weight
    np.testing.assert_allclose(
        causal_effects(columns[:, :4], columns[:, 4:], target), expected[4:], rtol=1e-8, atol=1e-8
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(5))
def test_sink_mode_with_refit_is_lingam_with_the_reward_as_sink(seed: int, lingam: Any) -> None:
    """lingam 1.12 refits by least squares what its adaptive lasso keeps."""
    data = chained_data(seed, 9)
    knowledge = lingam.utils.make_prior_knowledge(9, sink_variables=[8])
    model = lingam.DirectLiNGAM(prior_knowledge=knowledge).fit(data)
    found = causal_effects(data[:, :4], data[:, 4:-1], data[:, -1], refit=True)
    np.testing.assert_allclose(found, model.adjacency_matrix_[-1, 4:-1], rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(5))
def test_full_mode_is_lingam(seed: int, lingam: Any) -> None:
    data = chained_data(seed, 7)
    model = lingam.DirectLiNGAM().fit(data)
    assert causal_order(data) == model.causal_order_
    found = causal_effects(data[:, :3], data[:, 3:-1], data[:, -1], "full", refit=True)
    np.testing.assert_allclose(found, model.adjacency_matrix_[-1, 3:-1], rtol=1e-8, atol=1e-8)


# Stage A.


def test_a_chain_is_put_in_order() -> None:
    generator = np.random.default_rng(1)
    noise = generator.uniform(-1, 1, (3, 3_000))
    first = noise[0]
    second = 0.8 * first + noise[1]
    data = np.stack([first, second, -0.6 * second + noise[2]])
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        assert [order[i] for i in causal_order(data[order].T)] == [0, 1, 2]
    ratios = likelihood_ratios(data - data.mean(axis=1, keepdims=True))
    assert np.abs(ratios + ratios.T).max() < 1e-12


@pytest.mark.parametrize("position", range(6))
def test_the_reward_comes_after_what_it_depends_on_wherever_it_stands(position: int) -> None:
    states, actions, rewards = uniform_data(3)
    data = np.insert(np.column_stack([states, actions]), position, rewards, axis=1)
    # a2 and s1 stand alone and could go anywhere; what the reward depends on goes before it
    order = causal_order(data)
    causes = [column + (column >= position) for column in (0, 2, 3)]
    assert all(order.index(cause) < order.index(position) for cause in causes)
    assert causal_order(data, until=position) == order[: order.index(position) + 1]


def test_entropy_of_a_gaussian_is_that_of_theory_and_the_greatest() -> None:
    generator = np.random.default_rng(0)
    columns = np.stack(
        [generator.normal(size=200_000), generator.uniform(-1, 1, 200_000), generator.laplace(size=200_000)]
    )
    columns = (columns - columns.mean(axis=1, keepdims=True)) / columns.std(axis=1, keepdims=True)
    gaussian, *others = entropy(columns)
    np.testing.assert_allclose(gaussian, 0.5 * np.log(2 * np.pi * np.e), atol=1e-3)
    assert gaussian > max(others)
    assert np.isfinite(entropy(np.full((1, 4), 1e5)))  # cosh would overflow


# Data that no least squares can do.


@pytest.mark.parametrize("mode", ["sink", "full"])
@pytest.mark.parametrize("value", [0.0, 1 / 3, 0.85, 1e6])
def test_constant_columns_have_no_effect(mode: Any, value: float) -> None:
    states, actions, rewards = uniform_data(0, 2_000)
    constant = np.full((2_000, 1), value, np.float32)
    expected = causal_effects(states, actions, rewards, mode)
    found = causal_effects(
        np.hstack([constant, states]), np.hstack([actions[:, :1], constant, actions[:, 1:]]), rewards, mode
    )
    np.testing.assert_allclose(found, np.insert(expected, 1, 0), atol=1e-9)


@pytest.mark.parametrize("mode", ["sink", "full"])
def test_dependent_columns_are_named_and_have_no_effect(mode: Any) -> None:
    states, actions, rewards = uniform_data(0, 2_000)
    expected = causal_effects(states, actions, rewards, mode)
    copies = np.hstack([actions, actions[:, :1], states @ [[3.0], [-2.0]] + actions[:, 1:2] + 5]).astype(np.float32)
    with pytest.warns(UserWarning, match="linear combinations of the columns before: action 3, action 4$"):
        found = causal_effects(states.astype(np.float32), copies, rewards, mode)
    np.testing.assert_allclose(found[:3], expected, atol=1e-5)
    np.testing.assert_array_equal(found[3:], 0)


def test_long_lists_are_cut() -> None:
    states, actions, rewards = uniform_data(0, 100)
    with pytest.warns(UserWarning, match=r"action 3, .*, action 10 and 4 more$"):
        causal_effects(states, np.hstack([actions] * 5), rewards)


@pytest.mark.parametrize("mode", ["sink", "full"])
def test_a_constant_reward_has_no_causes(mode: Any) -> None:
    states, actions, _ = uniform_data(0, 100)
    np.testing.assert_array_equal(causal_weights(states, actions, np.full(100, 0.85), mode), np.ones(3))


def test_a_reward_without_noise_is_no_trouble() -> None:
    """The release takes a logarithm of 0 here. No order of the three that are linearly dependent is better than another."""
    states, actions, _ = uniform_data(0, 500)
    rewards = 3 * actions[:, 0] - states[:, 1]
    np.testing.assert_allclose(causal_effects(states, actions, rewards), [3, 0, 0], atol=1e-9)
    assert np.isfinite(causal_effects(states, actions, rewards, "full")).all()


def test_nearly_dependent_columns_give_finite_weights() -> None:
    states, actions, rewards = uniform_data(0, 1_000)
    noise = np.random.default_rng(5).normal(size=(1_000, 3))
    for size in (1e-3, 1e-5):
        assert np.isfinite(causal_effects(np.hstack([states, actions + size * noise]), actions, rewards)).all()


def test_adaptive_lasso_reads_lengths_and_angles_alone() -> None:
    data = chained_data(0, 6, 200)
    data -= data.mean(axis=0)
    basis = np.linalg.qr(data, mode="r")
    directly = adaptive_lasso(data[:, :-1], data[:, -1], 200)
    np.testing.assert_allclose(adaptive_lasso(basis[:, :-1], basis[:, -1], 200), directly, rtol=1e-8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 6}, "a causal fit of 2 states and 3 actions needs 7 rows or more, not 6"),
        ({"nan": True}, "a causal fit needs finite numbers; not all are in state 1, reward"),
        ({"mode": "best"}, "mode must be one of sink, full, not best"),
        ({"sign": "both"}, "sign must be one of signed, absolute, not both"),
        ({"temperature": 0}, "temperature must be positive, not 0"),
        ({"flat": True}, r"needs states \[N, S\], actions \[N, A\] and rewards \[N\], not \[50, 2\], \[50\], \[50\]"),
    ],
)
def test_bad_input_is_one_line(changes: dict[str, Any], message: str) -> None:
    states, actions, rewards = uniform_data(0, changes.pop("rows", 50))
    if changes.pop("nan", False):
        states[3, 1], rewards[4] = np.nan, np.inf
    if changes.pop("flat", False):
        actions = actions[:, 0]
    with pytest.raises(ValueError, match=message) as error:
        causal_weights(states, actions, rewards, **changes)
    assert "\n" not in str(error.value)
