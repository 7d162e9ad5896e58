"""Error functions against hand-made tables, probe environments with known values, and the promises of `Agent`."""

from dataclasses import dataclass, fields, replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from resprout.agents.augmentation import random_intensity, random_shift, shift
from resprout.agents.dqn import (
    DQN,
    INITIALISERS,
    augment,
    categorical_cross_entropy,
    categorical_projection,
    epsilon,
    epsilon_greedy,
    q_network,
    scale_by_deviation,
    td_error,
    td_loss,
)
from resprout.agents.learner import Batch

KEY = jax.random.key(0)


@dataclass(frozen=True)
class Space:
    """The part of an environment's description that an agent reads."""

    id: str = "probe"
    observation_shape: tuple[int, ...] = (1,)
    discrete: bool = True
    action_size: int = 2


IMAGES = Space("minatar/Probe", (12, 12, 2), action_size=3)


def random_batch(space, size=8, seed=0):
    rng = np.random.default_rng(seed)
    pixels = len(space.observation_shape) == 3
    observations = rng.integers(0, 256, (2, size, *space.observation_shape), dtype=np.uint8)
    if not pixels:
        observations = rng.normal(size=observations.shape).astype(np.float32)
    return Batch(
        observation=jnp.asarray(observations[0]),
        action=jnp.asarray(rng.integers(0, space.action_size, size), jnp.int32),
        reward=jnp.asarray(3 * rng.normal(size=size), jnp.float32),
        discount=jnp.asarray(0.9 * rng.integers(0, 2, size), jnp.float32),
        next_observation=jnp.asarray(observations[1]),
        weight=jnp.asarray(rng.uniform(0.5, 1.0, size), jnp.float32),
    )


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q_tm1", "a_tm1", "r_t", "discount_t", "q_t_target", "q_t_selector", "expected"),
    [
        ([1.0, 2.0], 0, 0.0, 0.5, [4.0, 2.0], [4.0, 2.0], 1.0),  # 0.5 * 4 - 1
        ([1.0, 2.0], 1, 0.0, 0.5, [4.0, 2.0], [4.0, 2.0], 0.0),  # 0.5 * 4 - 2
        ([1.0, 2.0], 1, -1.0, 0.5, [-4.0, -2.0], [-4.0, -2.0], -4.0),  # -1 - 0.5 * 2 - 2
        ([1.0, 2.0], 1, 3.0, 0.0, [4.0, 2.0], [4.0, 2.0], 1.0),  # terminal: 3 - 2
        ([1.0, 2.0], 0, 3.0, 0.0, [1e9, 0.0], [1e9, 0.0], 2.0),  # terminal: what comes after has no say
        ([1.0, 2.0], 0, 0.0, 0.5, [4.0, 2.0], [0.0, 9.0], 0.0),  # double: the online network prefers action 1, worth 2
        ([1.0, 2.0], 0, 1.0, 1.0, [4.0, -2.0], [0.0, 0.1], -2.0),  # double: 1 - 2 - 1
        ([1.0, 2.0], 1, 1.0, 1.0, [4.0, 4.0], [7.0, 7.0], 3.0),  # a tie
        ([0.0], 0, 0.25, 0.125, [8.0], [8.0], 1.25),  # one action
    ],
)
def test_td_error(q_tm1, a_tm1, r_t, discount_t, q_t_target, q_t_selector, expected):
    error = td_error(*map(jnp.asarray, (q_tm1, a_tm1, r_t, discount_t, q_t_target, q_t_selector)))
    assert error == expected


def test_td_error_has_no_gradient_through_the_target():
    arguments = jnp.array([1.0, 2.0]), jnp.array(1), jnp.array(0.5), jnp.array(0.9), jnp.array([3.0, 1.0])
    gradients = jax.grad(td_error, argnums=(0, 4, 5))(*arguments, jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(gradients[0], [0, -1])
    np.testing.assert_array_equal(gradients[1:], np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("loss", "expected", "slope"),
    [
        ("mse", [4.5, 0.02, 0.0, 0.08, 2.0], [-3.0, -0.2, 0.0, 0.4, 2.0]),
        ("huber", [1.25, 0.01, 0.0, 0.04, 0.75], [-0.5, -0.1, 0.0, 0.2, 0.5]),
        # no weights; linear from 0.25 on: 0.25 * 3 - 0.25^2 / 2
        ("lap", [0.71875, 0.02, 0.0, 0.06875, 0.46875], [-0.25, -0.2, 0.0, 0.25, 0.25]),
    ],
)
def test_loss_and_its_slope_by_hand(loss, expected, slope):
    def total(error):
        losses = td_loss(DQN(loss=loss, lap_threshold=0.25), error, jnp.array([0.5, 0.5, 1.0, 0.5, 0.5]))
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(jnp.array([-3.0, -0.2, 0.0, 0.4, 2.0]))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-6)


@pytest.mark.parametrize(
    ("returns", "probabilities", "expected"),
    [
        ([-1.0, 0.0, 1.0], [0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),  # on the support: unchanged
        ([-0.5, 0.25, 1.0], [0.2, 0.4, 0.4], [0.1, 0.1 + 0.3, 0.1 + 0.4]),  # split in proportion to closeness
        ([-3.0, 0.0, 3.0], [0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),  # beyond the ends: clipped to them
        ([0.5, 0.5, 0.5], [0.2, 0.3, 0.5], [0.0, 0.5, 0.5]),  # terminal: one return, whatever came after
        ([2.0, 2.0, 2.0], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]),  # terminal, beyond the end
    ],
)
def test_categorical_projection_by_hand(returns, probabilities, expected):
    projected = categorical_projection(*map(jnp.asarray, (returns, probabilities, [-1.0, 0.0, 1.0])))
    np.testing.assert_allclose(projected, expected, atol=1e-7)


def reference_projection(returns, probabilities, v_min, v_max):
    """Bellemare et al. (2017), algorithm 1, one atom after the other in double precision."""
    last = len(returns) - 1
    projected = np.zeros(len(returns))
    for value, probability in zip(returns, probabilities, strict=True):
        position = (min(max(value, v_min), v_max) - v_min) / (v_max - v_min) * last
        lower = min(int(np.floor(position)), last)
        upper = min(lower + 1, last)
        projected[lower] += probability * (1 - (position - lower))
        projected[upper] += probability * (position - lower)
    return projected


project = jax.jit(categorical_projection)


@settings(max_examples=100, deadline=None)
@given(
    returns=hnp.arrays(np.float32, 7, elements=st.floats(-30, 30, width=32)),
    masses=hnp.arrays(np.float64, 7, elements=st.floats(0.01, 1)),
    v_min=st.floats(-20, 0),
    size=st.floats(1, 20),
)
def test_categorical_projection_is_algorithm_1(returns, masses, v_min, size):
    probabilities = masses / masses.sum()
    projected = np.asarray(project(returns, probabilities, np.linspace(v_min, v_min + size, 7)))
    np.testing.assert_allclose(projected, reference_projection(returns, probabilities, v_min, v_min + size), atol=2e-4)
    assert projected.sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("a_tm1", "r_t", "discount_t", "q_t_selector", "target"),
    [
        (0, 0.0, 1.0, [1.0, 0.0], [0.5, 0.25, 0.25]),  # the target's first action, unmoved
        (1, 0.0, 1.0, [1.0, 0.0], [0.5, 0.25, 0.25]),
        (0, 0.0, 1.0, [0.0, 1.0], [0.0, 0.0, 1.0]),  # double: the selector prefers the second action
        (0, 0.5, 0.0, [1.0, 0.0], [0.0, 0.5, 0.5]),  # terminal
        (1, 0.0, 0.5, [1.0, 0.0], [0.25, 0.25 + 0.25 + 0.125, 0.125]),  # returns -0.5, 0, 0.5
    ],
)
def test_categorical_cross_entropy(a_tm1, r_t, discount_t, q_t_selector, target):
    log_probabilities = np.log([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    logits_t_target = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1e-30, 1e-30, 1.0]]))
    arguments = map(jnp.asarray, (a_tm1, r_t, discount_t))
    cross_entropy = categorical_cross_entropy(
        jnp.asarray(log_probabilities + 3.0),
        *arguments,
        logits_t_target,
        jnp.asarray(q_t_selector),
        jnp.arange(-1.0, 2.0),
    )
    assert cross_entropy == pytest.approx(-np.dot(target, log_probabilities[a_tm1]), rel=1e-5)


# --- exploration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent_step", "expected"),
    [(0, 1.0), (20_000, 1.0), (20_001, 1 - 0.99 / 250_000), (145_000, 0.505), (270_000, 0.01), (2_000_000_000, 0.01)],
)
def test_epsilon_falls_from_the_end_of_the_warm_up(agent_step, expected):
    assert epsilon(DQN(), jnp.int32(agent_step)) == pytest.approx(expected, abs=1e-7)


def test_epsilon_greedy_mixes_the_best_with_the_uniform():
    q_values = jnp.tile(jnp.array([0.0, 2.0, 2.0, 1.0]), (8000, 1))
    np.testing.assert_array_equal(epsilon_greedy(KEY, q_values, 0.0), np.ones(8000))
    shares = np.bincount(epsilon_greedy(KEY, q_values, 0.4), minlength=4) / 8000
    np.testing.assert_allclose(shares, [0.1, 0.7, 0.1, 0.1], atol=0.02)  # three standard deviations are 0.015


def test_act_follows_the_schedule_and_exploit_does_not():
    config = DQN(epsilon_end=0.0, epsilon_eval=0.0, warmup=10, epsilon_decay_steps=10, hidden=(4,))
    agent = config.build(Space(action_size=5))
    observation = jnp.linspace(-1, 1, 1000)[:, None]
    state, act = jax.jit(agent.init)(KEY), jax.jit(agent.act)
    best = jax.jit(agent.exploit)(state, observation, KEY)
    assert best.dtype == jnp.int32
    np.testing.assert_array_equal(act(state, observation, KEY), best)
    np.testing.assert_array_equal(act(state, observation, KEY, 20), best)
    assert np.mean(act(state, observation, KEY, 10) == best) == pytest.approx(1 / 5, abs=0.05)
    assert np.mean(act(state, observation, KEY, 15) == best) == pytest.approx(3 / 5, abs=0.05)
    careless = jax.jit(replace(config, epsilon_eval=1.0).build(Space(action_size=5)).exploit)
    assert np.mean(careless(state, observation, KEY) == best) == pytest.approx(1 / 5, abs=0.05)


# --- learning: probe environments of two states (observations -1 and 1) and two actions -------------------------------

GAMMA = 0.5
TERMINAL = -1
VARIANTS = {
    "dqn": DQN(),
    "mse": DQN(loss="mse"),
    "no lag": DQN(target_period=1),
    "polyak": DQN(tau=0.1, target_period=1),
    "double dueling": DQN(double=True, dueling=True),
    "c51": DQN(distribution="c51", atoms=25, v_min=-3, v_max=3, double=True, dueling=True),
}
PROBES = {  # reward [state, action], next state [state, action], value [state, action]
    "constant reward": (np.ones((2, 2)), np.full((2, 2), TERMINAL), np.ones((2, 2))),
    "reward by observation": ([[-1, -1], [1, 1]], np.full((2, 2), TERMINAL), [[-1, -1], [1, 1]]),
    "discounting": ([[0, 0], [1, 1]], [[1, 1], [TERMINAL, TERMINAL]], [[GAMMA, GAMMA], [1, 1]]),
    "reward by action": ([[-1, 1], [-1, 1]], np.full((2, 2), TERMINAL), [[-1, 1], [-1, 1]]),
    "reward by both": ([[1, -1], [-1, 1]], np.full((2, 2), TERMINAL), [[1, -1], [-1, 1]]),
    "endless": ([[1, 0], [0, 0]], [[0, TERMINAL], [0, 1]], [[2, 0], [1, 0.5]]),
}


@pytest.fixture(scope="module", params=VARIANTS)
def learn(request):
    """Trains one variant on any probe; the result is (agent, state, learned values)."""
    config = replace(
        VARIANTS[request.param],
        gamma=GAMMA,
        hidden=(32,),
        learning_rate=0.01,
        adam_eps=1e-8,
        target_period=min(VARIANTS[request.param].target_period, 10),
        epsilon_eval=0.0,
    )
    agent = config.build(Space())
    observations = jnp.array([[-1.0], [1.0]])

    @jax.jit
    def train(reward, next_state):
        def step(state, key):
            place_key, act_key, update_key = jax.random.split(key, 3)
            place = jax.random.randint(place_key, (32,), 0, 2)
            action = agent.act(state, observations[place], act_key, 0)
            arrival = next_state[place, action]
            batch = Batch(
                observation=observations[place],
                action=action,
                reward=reward[place, action],
                discount=jnp.where(arrival == TERMINAL, 0.0, GAMMA),
                next_observation=observations[arrival],
                weight=jnp.ones(32),
            )
            return agent.update(state, batch, update_key)[0], None

        state, _ = jax.lax.scan(step, agent.init(KEY), jax.random.split(KEY, 800))
        outputs = q_network(config, Space()).apply(state.critic.params, observations)
        if config.distribution == "c51":
            outputs = jax.nn.softmax(outputs) @ jnp.linspace(config.v_min, config.v_max, config.atoms)
        return outputs, agent.exploit(state, observations, KEY)

    return train


@pytest.mark.parametrize("probe", PROBES)
def test_probe_environment_is_solved(learn, probe):
    reward, next_state, value = map(np.asarray, PROBES[probe])
    learned, best = learn(jnp.asarray(reward, jnp.float32), jnp.asarray(next_state, jnp.int32))
    np.testing.assert_allclose(learned, value, atol=0.1)
    if probe in ("reward by action", "reward by both", "endless"):
        np.testing.assert_array_equal(best, value.argmax(axis=1))


# --- one gradient step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "double"), [("huber", False), ("huber", True), ("mse", False), ("lap", True)])
def test_update_measures_what_it_says(loss, double):
    space = Space(observation_shape=(3,))
    config = DQN(loss=loss, double=double, hidden=(8,), lap_threshold=1.0)
    agent, network = config.build(space), q_network(config, space)
    state, batch = jax.jit(agent.init)(KEY), random_batch(space)
    state = state.replace(
        critic=state.critic.replace(target_params=jax.jit(agent.init)(jax.random.key(1)).critic.params)
    )
    new_state, metrics, priorities = jax.tree.map(np.asarray, jax.jit(agent.update)(state, batch, KEY))
    batch = jax.tree.map(np.asarray, batch)

    apply = jax.jit(network.apply)
    rows = np.arange(8)
    q = np.asarray(apply(state.critic.params, batch.observation))[rows, batch.action]
    q_next_online = np.asarray(apply(state.critic.params, batch.next_observation))
    q_next = np.asarray(apply(state.critic.target_params, batch.next_observation))
    chosen = (q_next_online if double else q_next).argmax(axis=1)
    target = batch.reward + batch.discount * q_next[rows, chosen]
    error = target - q
    losses = error**2 if loss == "mse" else np.where(abs(error) < 1, error**2 / 2, abs(error) - 0.5)
    assert (abs(error) < 1).any() and (abs(error) > 1).any()
    weight = 1 if loss == "lap" else batch.weight
    assert metrics["critic/loss"] == pytest.approx(np.mean(weight * losses), rel=1e-5)
    assert metrics["critic/q_mean"] == pytest.approx(q.mean(), rel=1e-5)
    assert metrics["critic/target_mean"] == pytest.approx(target.mean(), rel=1e-5)
    assert metrics["critic/td_error_abs"] == pytest.approx(abs(error).mean(), rel=1e-5)
    np.testing.assert_allclose(priorities, abs(error), rtol=1e-4)
    # Adam's first mean is a tenth of the gradient.
    mean = new_state.critic.opt_state[1][0].mu
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(mean)))
    assert metrics["critic/grad_norm"] == pytest.approx(10 * norm, rel=1e-4)


@pytest.mark.parametrize("double", [False, True])
def test_c51_priority_is_the_cross_entropy(double):
    config = DQN(distribution="c51", atoms=11, hidden=(8,), double=double)
    agent, network, batch = config.build(Space()), q_network(config, Space()), random_batch(Space())
    batch = batch.replace(discount=jnp.full(8, 0.9))
    init = jax.jit(agent.init)
    state = init(KEY)
    # Five times the parameters, for distributions that differ between actions.
    params, target_params = (jax.tree.map(lambda leaf: 5 * leaf, init(jax.random.key(i)).critic.params) for i in (0, 3))
    state = state.replace(critic=state.critic.replace(params=params, target_params=target_params))
    _, metrics, priorities = jax.jit(agent.update)(state, batch, KEY)
    np.testing.assert_allclose(metrics["critic/loss"], np.mean(batch.weight * priorities), rtol=1e-5)

    apply, support = jax.jit(network.apply), jnp.linspace(-10, 10, 11)
    logits_t = apply(target_params, batch.next_observation)
    selector = apply(params, batch.next_observation) if double else logits_t
    choices = [np.argmax(jax.nn.softmax(logits) @ support, axis=1) for logits in (logits_t, selector)]
    assert np.sum(choices[0] != choices[1]) == (7 if double else 0)
    expected = jax.vmap(categorical_cross_entropy, in_axes=(0, 0, 0, 0, 0, 0, None))(
        *(apply(params, batch.observation), batch.action, batch.reward, batch.discount),
        *(logits_t, jax.nn.softmax(selector) @ support, support),
    )
    np.testing.assert_allclose(priorities, expected, rtol=1e-4)


def test_gradient_norm_is_clipped():
    agent = DQN(hidden=(8,), max_grad_norm=1e-3).build(Space())
    state, metrics, _ = jax.jit(agent.update)(jax.jit(agent.init)(KEY), random_batch(Space()), KEY)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(state.critic.opt_state[1][0].mu)))
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-4)
    assert metrics["critic/grad_norm"] > 1e-3


def test_rmsprop_is_the_centred_one_of_pytorch():
    gradients = np.random.default_rng(0).normal(size=(50, 3)) * [1, 1e-3, 1e-6]
    transform = scale_by_deviation(decay=0.95, eps=1e-5)
    state, mean, square = transform.init(jnp.zeros(3)), np.zeros(3), np.zeros(3)
    for gradient in gradients:
        update, state = transform.update(jnp.asarray(gradient, jnp.float32), state)
        mean = 0.95 * mean + 0.05 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        np.testing.assert_allclose(update, gradient / (np.sqrt(square - mean**2) + 1e-5), rtol=1e-3)


def test_rmsprop_takes_a_gradient_that_stands_still():
    transform = scale_by_deviation(decay=0.95, eps=1e-5)
    gradient = jnp.linspace(-0.01, 0.01, 101)
    state, update = transform.init(gradient), jax.jit(transform.update)
    for _ in range(500):
        scaled, state = update(gradient, state)
    assert np.isfinite(scaled).all()
    np.testing.assert_allclose(np.sign(scaled), np.sign(gradient))


def test_the_optimizer_is_the_one_asked_for():
    for config, moment in ((DQN(), 0.1), (DQN(optimizer="rmsprop", learning_rate=1e-3), 0.05)):
        agent = replace(config, hidden=(4,)).build(Space())
        state = jax.jit(agent.init)(KEY)
        after, _, _ = jax.jit(agent.update)(state, random_batch(Space()), KEY)
        for new, old, mu in zip(
            *map(jax.tree.leaves, (after.critic.params, state.critic.params, optax.tree.get(after.critic, "mu"))),
            strict=True,
        ):
            gradient = np.float64(mu) / moment
            # RMSprop's variance after one step is 0.05 of the square less 0.05^2 of it; Adam's is corrected to all of it
            deviation = abs(gradient) * (np.sqrt(0.05 - 0.05**2) if config.optimizer == "rmsprop" else 1)
            eps = config.rmsprop_eps if config.optimizer == "rmsprop" else config.adam_eps
            np.testing.assert_allclose(
                new - old, -config.learning_rate * gradient / (deviation + eps), rtol=1e-2, atol=1e-7
            )


def run(agent, state, steps):
    """States after each of `steps` updates, the first included."""
    update, states = jax.jit(agent.update), [state]
    for step in range(steps):
        states.append(update(states[-1], random_batch(Space(), seed=step), KEY)[0])
    return [jax.tree.map(np.asarray, state) for state in states]


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_target_is_copied_every_period_and_only_then():
    agent = DQN(hidden=(4,), target_period=3).build(Space())
    states = run(agent, jax.jit(agent.init)(KEY), 7)
    for step, state in enumerate(states):
        assert state.gradient_step == step
        assert equal(state.critic.target_params, states[step - step % 3].critic.params)
        assert step == 0 or not equal(state.critic.params, states[step - 1].critic.params)


@pytest.mark.parametrize("period", [1, 2])
def test_polyak_target(period):
    agent = DQN(hidden=(4,), target_period=period, tau=0.25).build(Space())
    states = run(agent, jax.jit(agent.init)(KEY), period)
    first, before, last = states[0].critic, states[-2].critic, states[-1].critic
    assert equal(before.target_params, first.target_params)
    for target, old, new in zip(
        *map(jax.tree.leaves, (last.target_params, first.target_params, last.params)), strict=True
    ):
        np.testing.assert_allclose(target, 0.25 * new + 0.75 * old, rtol=1e-5)


@pytest.mark.parametrize("double", [False, True])
def test_a_target_without_lag_is_the_online_network(double):
    without_lag = DQN(hidden=(4,), target_period=1, double=double).build(Space())
    states = run(without_lag, jax.jit(without_lag.init)(KEY), 3)
    copied = DQN(hidden=(4,), target_period=1000, double=double).build(Space())
    state, update = jax.jit(copied.init)(KEY), jax.jit(copied.update)
    for step in range(3):
        state = state.replace(critic=state.critic.replace(target_params=state.critic.params))
        state, _, _ = update(state, random_batch(Space(), seed=step), KEY)
    assert states[-1].critic.target_params is None
    for expected, actual in zip(
        jax.tree.leaves(state.critic.params), jax.tree.leaves(states[-1].critic.params), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_update_is_traced_once_and_takes_a_donated_state():
    agent = DQN(hidden=(4,)).build(Space())
    traces = []

    def counted(state, batch, key):
        traces.append(1)
        return agent.update(state, batch, key)

    update = jax.jit(counted, donate_argnums=0)
    state = agent.init(KEY)
    for step in range(4):
        previous, (state, _, _) = state, update(state, random_batch(Space(), seed=step), jax.random.key(step))
    assert len(traces) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(previous))


@pytest.mark.parametrize("changes", [{}, {"distribution": "c51", "tau": 0.5}], ids=["copied", "averaged"])
def test_a_program_for_a_gpu_has_no_condition_and_no_loop(changes, monkeypatch):
    """Either stops it until the host has read whether to go on; and its targets are those that a CPU has."""
    agent, batch = DQN(hidden=(8,), target_period=2, **changes).build(IMAGES), random_batch(IMAGES)
    targets, stops = {}, {}
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        update, state = jax.jit(lambda *arguments: agent.update(*arguments)), agent.init(KEY)
        program = str(update.trace(state, batch, KEY).jaxpr)
        stops[backend] = [word for word in ("cond[", "while[", "scan[") if word in program]
        for _ in range(3):  # in between, when due, and in between
            state = update(state, batch, KEY)[0]
            targets.setdefault(backend, []).append(state.critic.target_params)
    assert stops == {"cpu": ["cond["], "gpu": []}
    chex.assert_trees_all_close(*targets.values(), rtol=1e-6, atol=1e-6)
    assert equal(targets["gpu"][1], targets["gpu"][2]) and not equal(targets["gpu"][0], targets["gpu"][1])


def test_one_key_repeats_and_two_keys_differ():
    agent = DQN(torso="minatar", random_shift=2, hidden=(4,)).build(IMAGES)
    init, update = jax.jit(agent.init), jax.jit(agent.update)
    state, batch = init(KEY), random_batch(IMAGES)
    assert equal(state, init(KEY))
    assert not equal(state, init(jax.random.key(1)))
    assert equal(update(state, batch, KEY), update(state, batch, KEY))
    assert not equal(update(state, batch, KEY), update(state, batch, jax.random.key(1)))


def test_seeds_may_be_vmapped():
    agent = DQN(hidden=(4,), target_period=2).build(Space())
    keys = jax.random.split(KEY, 3)
    batch = random_batch(Space())
    states = jax.vmap(agent.init)(keys)
    together, _, _ = jax.jit(jax.vmap(agent.update, in_axes=(0, None, 0)))(states, batch, keys)
    alone, _, _ = jax.jit(agent.update)(jax.tree.map(lambda leaf: leaf[1], states), batch, keys[1])
    for expected, actual in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(actual[1], expected, rtol=1e-4, atol=1e-6)


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [1, 4])
def test_shift_is_a_crop_of_the_padded_image(pad):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 9, 7, 3), dtype=np.uint8)
    offsets = rng.integers(0, 2 * pad + 1, (20, 2))
    offsets[:2] = [[0, 2 * pad], [pad, pad]]
    shifted = shift(jnp.asarray(images), jnp.asarray(offsets), pad)
    assert shifted.dtype == jnp.uint8
    for image, (row, column), actual in zip(images, offsets, shifted, strict=True):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        np.testing.assert_array_equal(actual, padded[row : row + 9, column : column + 7])
    np.testing.assert_array_equal(shifted[1], images[1])


def test_random_shift_reaches_every_offset_and_zero_moves_nothing():
    rows, columns = np.mgrid[:9, :9]
    image = np.stack([rows, columns], axis=-1).astype(np.uint8)
    images = jnp.asarray(np.broadcast_to(image, (600, 9, 9, 2)))
    centres = np.asarray(random_shift(KEY, images, 2))[:, 4, 4].astype(int) - 4
    assert {tuple(centre) for centre in centres} == {(row, column) for row in range(-2, 3) for column in range(-2, 3)}
    np.testing.assert_array_equal(random_shift(KEY, images, 0), images)


def test_intensity_is_one_bounded_factor_per_image():
    factors = np.asarray(random_intensity(KEY, jnp.ones((4000, 2, 2, 1)), 0.05))
    assert (factors == factors[:, :1, :1]).all()
    assert factors.min() == pytest.approx(0.9) and factors.max() == pytest.approx(1.1)  # clipped at two deviations
    assert factors.std() == pytest.approx(0.05 * 0.959, abs=0.002)  # of a normal clipped at two deviations


def test_augment_scales_pixels_before_it_brightens_them():
    images = jnp.full((3, 12, 12, 2), 255, jnp.uint8)
    brightened = augment(DQN(random_shift=2, intensity=0.05), KEY, images)
    assert brightened.dtype == jnp.float32
    assert brightened.min() >= 0.9 and brightened.max() <= 1.1
    assert augment(DQN(), KEY, images) is images


@pytest.mark.parametrize(
    ("config", "differs"),
    [
        (DQN(torso="mlp"), False),
        (DQN(torso="mlp", random_shift=2), True),
        pytest.param(DQN(torso="nature", width=0.1, intensity=0.05), True, marks=pytest.mark.slow),
    ],
)
def test_both_observations_are_augmented_and_independently(config, differs):
    """With one action, no reward and no discount the error is what the augmentations differ by."""
    space = replace(IMAGES, observation_shape=(16, 16, 2), action_size=1)
    batch = random_batch(space)
    batch = batch.replace(next_observation=batch.observation, reward=jnp.zeros(8), discount=jnp.ones(8))
    agent = replace(config, hidden=()).build(space)
    errors = np.asarray(jax.jit(agent.update)(jax.jit(agent.init)(KEY), batch, KEY)[2])
    assert (errors > 1e-6).all() if differs else (errors == 0).all()


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, 0) for name in ("n_step", "width", "learning_rate", "adam_eps", "target_period", "tau")],
        *[
            (name, -1)
            for name in ("epsilon_decay_steps", "batch_size", "replay_ratio", "capacity", "random_shift", "warmup")
        ],
        *[("gamma", 1.1), ("gamma", -0.1), ("gamma", float("nan")), ("tau", 1.5), ("epsilon_start", 2)],
        *[("epsilon_end", -0.1), ("epsilon_eval", 1.01), ("intensity", -0.05), ("max_grad_norm", 0.0)],
        *[("atoms", 1), ("v_min", 10.0), ("v_max", -10.0), ("hidden", (64, 0)), ("loss", "mae"), ("torso", "resnet")],
        *[("distribution", "iqn"), ("padding", "full"), ("learning_rate", float("nan")), ("optimizer", "sgd")],
        *[("lap_threshold", 0.0), ("rmsprop_decay", 1.0), ("rmsprop_decay", -0.1), ("rmsprop_eps", 0.0)],
    ],
)
def test_impossible_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name if name != "v_max" else "v_min") as error:
        DQN(**{name: value})
    assert "\n" not in str(error.value)


def test_lap_has_no_categorical_form():
    with pytest.raises(ValueError, match=r"^loss must be huber or mse beside distribution c51, not lap$"):
        DQN(loss="lap", distribution="c51")


@pytest.mark.parametrize(
    ("config", "space", "message"),
    [
        (DQN(), Space("mujoco/Ant-v5", (27,), False, 8), "mujoco/Ant-v5 has 8 continuous ones: use SAC"),
        (DQN(torso="nature"), Space(), r"torso nature needs \[H, W, C\] observations; probe has \[1\]"),
        (DQN(torso="nature", padding="valid"), IMAGES, "36 pixels; minatar/Probe has 12 x 12"),
        (DQN(random_shift=4), Space(), "random_shift needs"),
        (DQN(intensity=0.05), IMAGES, "intensity needs a torso that reads pixels"),
        (DQN(torso="impala", intensity=0.05), IMAGES, "intensity is for pixels; minatar/Probe has cells of 0 or 1"),
    ],
)
def test_what_an_environment_cannot_have_is_refused(config, space, message):
    with pytest.raises(ValueError, match=message) as error:
        config.build(space)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("torso", ["nature", "impala"])
def test_torsos_of_pixels_see_the_cells_of_a_grid(torso):
    """As they see the pictures of which these are the cells, 255 for every 1."""
    planes = jax.random.bernoulli(KEY, 0.1, (4, 12, 12, 2)).astype(jnp.uint8)
    of_grid = q_network(DQN(torso=torso, width=0.1), IMAGES).torso
    params = of_grid.init(KEY, planes)
    seen = of_grid.apply(params, planes)
    np.testing.assert_array_equal(seen, of_grid.clone(highest=255).apply(params, 255 * planes))
    assert np.asarray(seen).std() > 0.01
    assert q_network(DQN(torso=torso, width=0.1), Space("atari/Pong", (84, 84, 4))).torso.highest == 255


@pytest.mark.parametrize(
    ("space", "layers", "hidden"),
    [
        (Space("atari/Pong", (84, 84, 4)), {"conv_0", "conv_1", "conv_2"}, (7744, 512)),
        (Space("gym/Small", (32, 32, 3)), {"conv_0", "conv_1", "conv_2"}, (1024, 512)),
        (Space("minatar/Breakout", (10, 10, 4)), {"conv_0"}, (1024, 128)),
        (Space("changing/minatar-cycle", (10, 10, 6)), {"conv_0"}, (1024, 128)),
        (Space("gym/Vector", (5,)), set(), (5, 256)),
    ],
)
def test_torso_follows_the_environment(space, layers, hidden):
    agent = DQN().build(space)
    parameters = jax.eval_shape(agent.init, KEY).critic.params["params"]
    assert set(parameters.get("torso", {})) == layers
    assert parameters["hidden"]["dense_0"]["kernel"].shape == hidden


def test_initialisers_have_their_variances():
    inputs, outputs = 9 * 30, 9 * 40
    for name, variance in {
        "xavier": 2 / (inputs + outputs),
        "lecun": 1 / inputs,
        "rainbow": 1 / (np.sqrt(3) * inputs),
        "pytorch": 1 / (3 * inputs),
    }.items():
        assert np.var(INITIALISERS[name](KEY, (3, 3, 30, 40))) == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize(("torso", "kernels"), [("nature", 6), ("impala", 18), ("minatar", 4), ("mlp", 4)])
def test_the_initialiser_is_that_of_every_kernel(torso, kernels, monkeypatch):
    drawn = []

    def initialiser(key, shape, dtype=jnp.float32):
        drawn.append(shape)
        return jnp.zeros(shape, dtype)

    monkeypatch.setitem(INITIALISERS, "pytorch", initialiser)
    network = q_network(DQN(torso=torso, initialiser="pytorch", dueling=True), Space("gym/Image", (12, 12, 3)))
    params = jax.eval_shape(network.init, KEY, jnp.zeros((1, 12, 12, 3)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(params) if len(leaf.shape) > 1]
    assert len(shapes) == kernels and sorted(drawn, key=str) == sorted(shapes, key=str)


def test_width_is_that_of_every_hidden_layer():
    network = q_network(DQN(torso="minatar", width=0.3, hidden=(64, 32)), IMAGES)
    params = jax.eval_shape(network.init, KEY, jnp.zeros((1, 12, 12, 2)))["params"]
    kernels = [params["torso"]["conv_0"], *params["hidden"].values(), params["head"]]
    assert [layer["kernel"].shape[-1] for layer in kernels] == [5, 20, 10, 3]


def test_every_field_is_a_documented_flag(capsys):
    arguments = ["--hidden", "64", "32", "--double", "--loss", "mse", "--max-grad-norm", "10"]
    assert tyro.cli(DQN, args=arguments) == DQN(hidden=(64, 32), double=True, loss="mse", max_grad_norm=10.0)
    with pytest.raises(SystemExit):
        tyro.cli(DQN, args=["--help"])
    text = capsys.readouterr().out
    for field in fields(DQN):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "gradient steps; Dopamine's 8000 agent steps" in " ".join(text.replace("│", " ").split())
