"""DrM: its ratios against tables, its parts against closed forms, its step against DrQ-v2's, and its perturbation."""

from dataclasses import replace
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resprout.agents import DrM, DrQv2, DrQv2State
from resprout.agents.drm import (
    NEVER,
    DormancyAlgorithm,
    dormant_ratio,
    expectile_loss,
    exploitation,
    exploration,
)
from resprout.agents.drqv2 import Algorithm, standard_deviation
from resprout.agents.learner import as_given
from resprout.interventions import dormancy_perturb, plasticity_injection
from resprout.training import PRESETS
from resprout.training.intervening import Acting, build_agent, parse_intervention

from .test_drqv2 import KEY, Spec, random_batch, tree_equal

SIZES = {"channels": 4, "features": 6, "hidden": (8, 8), "random_shift": 2, "batch_size": 16, "warmup": 20}
SMALL = DrM(**SIZES, capacity=300)
NETWORKS = ("encoder", "actor", "critic", "value")


@cache
def small():
    algorithm = DormancyAlgorithm(SMALL, Spec(), as_given)
    return algorithm, jax.jit(algorithm.init)(KEY), jax.jit(algorithm.update)


# C1, C2: the ratio and what it turns


def layers_by_hand(params, features):
    """Outputs of the actor's linear layers, those of the hidden ones before and after ReLU."""
    p = jax.tree.map(np.asarray, params["params"])

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    trunk = dense(np.asarray(features), p["trunk"]["dense"])
    centred = trunk - trunk.mean(axis=1, keepdims=True)
    x = np.tanh(centred / np.sqrt(trunk.var(axis=1, keepdims=True) + 1e-5))
    before, after = [], []
    for name in ("dense_0", "dense_1"):
        before.append(dense(x, p["hidden"][name]))
        x = np.maximum(before[-1], 0)
        after.append(x)
    return trunk, before, after, dense(x, p["head"])


def share(outputs, tau):
    sizes = [np.abs(output).mean(axis=0) for output in outputs]
    return np.concatenate([size < tau * size.mean() for size in sizes]).mean()


def test_c1_silent_hidden_units_count_exactly_and_after_relu():
    algorithm, state, _ = small()
    features = algorithm.encode(state, random_batch().observation)
    params = jax.tree.map(np.array, state.actor.params)
    params["params"]["hidden"]["dense_1"]["bias"][:3] = -1e6
    trunk, before, after, head = layers_by_hand(params, features)
    for tau in (0.025, 0.6):
        found = dormant_ratio(algorithm.actor, params, features, tau)
        assert found == pytest.approx(share([trunk, *after, head], tau))
        assert found != pytest.approx(share([trunk, *before, head], tau))
    assert dormant_ratio(algorithm.actor, params, features, 0.025) == pytest.approx(3 / (6 + 8 + 8 + 2))
    assert dormant_ratio(algorithm.actor, state.actor.params, features, 0.0) == 0


def test_c2_tables():
    for beta, std in ((1, 0.9997), (0.5, 0.953), (0.3, 0.731), (0.2, 0.5), (0.1, 0.269), (0, 0.119)):
        assert exploration(SMALL, beta) == pytest.approx(std, abs=1e-3)
        assert exploration(replace(SMALL, noise_scale=0.8), beta) == pytest.approx(0.8 * std, abs=1e-3)
    for beta, trust in ((0.3, 0.004), (0.2, 0.3), (0.1, 0.596)):
        assert exploitation(SMALL, beta) == pytest.approx(trust, abs=1e-3)


def test_c2_once_awake_the_noise_is_at_least_the_schedule_from_there():
    algorithm, state, _ = small()
    assert state.awake_since == NEVER and state.dormancy == 1
    asleep = state.replace(dormancy=jnp.asarray(0.1))
    assert algorithm.deviation(asleep, 5_000) == pytest.approx(0.269, abs=1e-3)
    awake = asleep.replace(awake_since=jnp.int32(4_000))
    for step in (4_000, 104_000, 400_000, 504_000, 900_000):
        scheduled = float(standard_deviation(SMALL, step - 4_000))
        assert algorithm.deviation(awake, step) == pytest.approx(max(0.269, scheduled), abs=1e-3)
    assert algorithm.deviation(awake, None) == pytest.approx(0.269, abs=1e-3)
    assert algorithm.deviation(awake.replace(dormancy=jnp.asarray(0.9)), 900_000) == pytest.approx(0.999, abs=1e-3)


@pytest.mark.slow
def test_it_wakes_once_after_the_warm_up():
    """A fresh actor has hardly a dormant unit: the first gradient step after the warm-up wakes it, and none again."""
    _, state, update = small()
    course = []
    for agent_step in (20, 21, 30):
        state, metrics, _ = update(state.replace(agent_step=jnp.int32(agent_step)), random_batch(), KEY)
        course.append(int(state.awake_since))
        assert state.dormancy == metrics["actor/dormancy"] < 0.2
    assert course == [NEVER, 21, 21]


# C4, C5: the value network and the step


def test_c4_expectiles():
    """.5 is half of the squared error; .9 of as many zeros as ones is .9: .9 (1 - v) = .1 v."""
    error = jnp.array([-2.0, 0.0, 3.0])
    np.testing.assert_allclose(expectile_loss(error, 0.5), 0.5 * error**2)
    np.testing.assert_allclose(jax.grad(lambda e: expectile_loss(e, 0.9).sum())(error), [-3.6, 0, 0.6], rtol=1e-5)
    targets, value = jnp.array([0.0, 1.0]), jnp.asarray(0.5)
    descend = jax.jit(lambda v: v - jax.grad(lambda v: expectile_loss(v - targets, 0.9).mean())(v))
    for _ in range(60):
        value = descend(value)
    assert value == pytest.approx(0.9, abs=1e-4)


def test_what_is_bootstrapped_from_is_a_mixture_of_two_values():
    algorithm, state, _ = small()
    features, std = algorithm.encode(state, random_batch().observation), jnp.asarray(0.3)
    value = algorithm.apply("value", state.value.params, features)
    q = Algorithm.next_values(algorithm, state, features, std, KEY)
    for beta, trust in ((0.0, 0.6), (0.2, 0.3), (1.0, 0.0)):
        mixed = algorithm.next_values(state.replace(dormancy=jnp.asarray(beta)), features, std, KEY)
        np.testing.assert_allclose(mixed, trust * value + (1 - trust) * q, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_c5_without_trust_a_step_is_drqv2s_with_the_same_noise():
    """At one fixed deviation, which an awake DrM has where its schedule lies above what its dormant ratio asks for."""
    config = replace(SMALL, trust=0.0, std_start=0.9, std_end=0.9)
    plain = DrQv2(**SIZES, capacity=300, std_start=0.9, std_end=0.9)
    ours, theirs = DormancyAlgorithm(config, Spec(), as_given), Algorithm(plain, Spec(), as_given)
    state = small()[1]
    shared = {name: getattr(state, name) for name in ("encoder", "actor", "critic", "agent_step", "gradient_step")}
    other = DrQv2State(**shared)
    state = state.replace(awake_since=jnp.int32(0), agent_step=jnp.int32(50))
    batch = random_batch()
    state, metrics, priorities = jax.jit(ours.update)(state, batch, KEY)
    other, expected, other_priorities = jax.jit(theirs.update)(other, batch, KEY)
    assert metrics["actor/dormancy"] < 0.2 and metrics["value/trust"] == 0
    for name in ("encoder", "actor", "critic"):
        chex.assert_trees_all_close(getattr(state, name), getattr(other, name), rtol=1e-5, atol=1e-7)
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-4
    )
    np.testing.assert_allclose(priorities, other_priorities, rtol=1e-4)
    assert metrics["value/loss"] > 0


def test_the_value_network_learns_the_critics_values_before_the_critic_moves():
    algorithm, state, update = small()
    batch = random_batch()
    after, metrics, _ = update(state, batch, KEY)
    features = algorithm.view(state, batch, jax.random.split(KEY, 3)[0]).features
    q = algorithm.apply("critic", state.critic.params, features, batch.action).min(axis=0)
    error = np.asarray(algorithm.apply("value", state.value.params, features) - q)
    loss = np.mean(np.asarray(batch.weight) * np.where(error <= 0, 0.9, 0.1) * error**2)
    assert metrics["value/loss"] == pytest.approx(loss, rel=1e-4)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.value.params, state.value.params)
    assert max(jax.tree.leaves(moved)) == pytest.approx(1e-4, rel=1e-2)  # Adam's first step


# C3: the perturbation


@cache
def perturbing():
    intervention = parse_intervention(PRESETS["drm_dmc"].experiment["interventions"][0])
    acting = Acting(intervention, small()[0].agent, KEY)
    return acting, jax.jit(acting.update)


@pytest.mark.parametrize(("beta", "keep"), [(0.0, 1.0), (0.3, 0.4), (0.9, 0.2)])
def test_c3_perturbation_mixes_linear_layers_and_forgets_all_moments(beta, keep):
    acting, perturb = perturbing()
    _, state, update = small()
    batch = random_batch()
    state = update(state, batch, KEY)[0].replace(dormancy=jnp.asarray(beta))
    ones = jax.tree.map(
        lambda leaf: leaf + 1 if leaf.ndim == 1 else leaf, state.critic.params
    )  # biases of zero tell little
    state = state.replace(critic=state.critic.replace(params=ones))
    assert acting.intervention.period == 50_000
    assert acting.learners == ["encoder", "actor", "critic", "value"]
    after, _, info = perturb(state, acting.init(state), batch, jnp.int32(50_000), jnp.int32(102_000))
    assert info["critic/keep"] == pytest.approx(keep) and info["actor/dormancy"] == pytest.approx(beta)
    tree_equal(after.encoder.params, state.encoder.params)
    pairs = [(getattr(after, name).params, getattr(state, name).params) for name in NETWORKS]
    pairs.append((after.critic.target_params, state.critic.target_params))
    for now, before in pairs:
        for path, old in jax.tree.leaves_with_path(before):
            name, new = jax.tree_util.keystr(path), dict(jax.tree.leaves_with_path(now))[path]
            if "norm" in name or "conv" in name:
                np.testing.assert_array_equal(new, old)
            elif "bias" in name:
                np.testing.assert_allclose(new, keep * old, rtol=1e-5)
            elif keep < 1:
                mixed_in = (np.asarray(new) - keep * np.asarray(old)) / (1 - keep)
                for fresh in mixed_in.reshape(-1, *mixed_in.shape[-2:]):  # of each member of an ensemble
                    product = fresh.T @ fresh if fresh.shape[0] >= fresh.shape[1] else fresh @ fresh.T
                    np.testing.assert_allclose(product, np.eye(len(product)), atol=1e-3)
            else:
                np.testing.assert_allclose(new, old, rtol=1e-6)
    for name in NETWORKS:
        for leaf in jax.tree.leaves(getattr(after, name).opt_state):
            np.testing.assert_array_equal(leaf, 0)
        assert any(np.any(leaf) for leaf in jax.tree.leaves(getattr(state, name).opt_state))
    if keep < 1:  # a draw of its own for the target
        drawn = [
            np.asarray(new["params"]["trunk"]["dense"]["kernel"] - keep * old["params"]["trunk"]["dense"]["kernel"])
            for new, old in (pairs[2], pairs[4])
        ]
        assert not np.allclose(*drawn, atol=1e-3)


def test_the_state_must_carry_a_dormancy():
    agent = DrQv2(**SIZES, capacity=300).build(Spec())
    acting = Acting(dormancy_perturb(measure="state", period=1), agent, KEY)

    def perturbed(key):
        state = agent.init(key)
        return acting.update(state, acting.init(state), random_batch(), 1, 1)

    with pytest.raises(ValueError, match="measure=state needs an agent whose state has a dormancy: drm"):
        jax.eval_shape(perturbed, KEY)


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trust": 1.5}, r"trust must be in \[0, 1\], not 1.5"),
        ({"expectile": 1.0}, "expectile must be between 0 and 1, not 1.0"),
        ({"noise_temperature": 0.0}, "noise_temperature must be positive, not 0.0"),
        ({"features": 0}, "features must be positive, not 0"),
    ],
)
def test_bad_fields_are_one_line(fields, message):
    with pytest.raises(ValueError, match=message):
        DrM(**fields)


def test_what_does_not_fit_is_one_line():
    with pytest.raises(ValueError, match="DrM needs continuous actions; gym/Probe has 2 discrete ones: use DQN"):
        SMALL.build(Spec(discrete=True))
    with pytest.raises(ValueError, match="nothing may rebuild the actor's network"):
        build_agent(SMALL, Spec(), (plasticity_injection(),))
