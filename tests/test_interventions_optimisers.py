"""Optimisers against NumPy versions and fresh ones; projections against their bounds and norms."""

import functools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resprout.agents.dqn import DQN
from resprout.agents.learner import Batch, Learner, Network
from resprout.agents.optimizer import adam
from resprout.agents.sac import SAC
from resprout.interventions.base import Context, InterventionError, intervene
from resprout.interventions.optimisers import adam_rel, adam_reset, clip_spikes, spam, target_is_copy, upgd
from resprout.interventions.projections import normalize_and_project, weight_clipping

KEY = jax.random.key(0)


def apply(params, x):
    hidden, head = params["params"]["hidden"], params["params"]["head"]
    return jax.nn.relu(x @ hidden["kernel"] + hidden["bias"][None]) @ head["kernel"] + head["bias"][None]


def drawn(seed=0, size=0.5):
    rng = np.random.default_rng(seed)
    shapes = {"hidden": {"kernel": (4, 5), "bias": (5,)}, "head": {"kernel": (5, 2), "bias": (2,)}}
    return {
        "params": jax.tree.map(
            lambda shape: jnp.asarray(size * rng.normal(size=shape), jnp.float32),
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )
    }


NETWORK = Network(init=lambda key: drawn(), apply=apply, inputs=lambda batch: (), loss=lambda *arguments: jnp.zeros(()))
INPUTS = (jnp.ones((3, 4)),)


def context(learner="critic", step=1, now=False):
    return Context(KEY, step, 0, NETWORK, INPUTS, learner=learner, now=now)


@functools.partial(jax.jit, static_argnums=0)
def trained(tx):
    params = drawn()
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(drawn(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return Learner(params, jax.tree.map(jnp.zeros_like, params), state)


@functools.partial(jax.jit, static_argnums=0)
def done_now(intervention, learner):
    return intervene(intervention, learner, apply, INPUTS, KEY)


def assert_equal(first, second):
    chex.assert_trees_all_equal(first, second)


# ---- Optimiser resets


@pytest.mark.parametrize(
    "tx",
    [adam(0.1), optax.adam(0.1), optax.rmsprop(0.1, centered=True, momentum=0.9)],
    ids=["ours", "optax", "rmsprop"],
)
def test_reset_is_a_new_optimiser(tx):
    before = trained(tx)
    after, info = done_now(adam_reset(), before)
    assert int(info["reset"]) == 1
    assert_equal(after.opt_state, tx.init(before.params))
    assert_equal((after.params, after.target_params), (before.params, before.target_params))


def test_reset_keeps_the_count_of_a_schedule():
    before = trained(optax.adam(optax.linear_schedule(0.1, 0.01, 100)))
    after, _ = done_now(adam_reset(), before)
    assert int(after.opt_state[0].count) == 0 and int(after.opt_state[1].count) == 3


@pytest.mark.parametrize("tx", [adam(0.1), optax.adam(0.1)], ids=["ours", "optax"])
def test_adam_rel_forgets_the_count_alone(tx):
    before = trained(tx)
    after, _ = done_now(adam_rel(), before)
    old, new = before.opt_state[0], after.opt_state[0]
    assert_equal((new.mu, new.nu), (old.mu, old.nu))
    assert not np.any(new[0])  # ages, or the count
    g = drawn(9)
    updates, _ = jax.jit(tx.update)(g, after.opt_state, after.params)

    def first_step(m, v, g):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        return -0.1 * (m / 0.1) / (np.sqrt(v / 0.001) + 1e-8)

    chex.assert_trees_all_close(updates, jax.tree.map(first_step, old.mu, old.nu, g), rtol=1e-5)


def test_adam_rel_keeps_the_count_of_a_schedule():
    before = trained(optax.adam(optax.linear_schedule(0.1, 0.01, 100)))
    after, _ = done_now(adam_rel(), before)
    assert int(after.opt_state[0].count) == 0 and int(after.opt_state[1].count) == 3


def test_adam_rel_needs_a_count():
    with pytest.raises(InterventionError, match=r"adam_rel: the optimiser of critic has no count"):
        adam_rel(period=1).update(trained(optax.rmsprop(0.1)), (), context())


@pytest.mark.parametrize("made", [adam_reset, adam_rel])
def test_hard_target_updates_are_seen(made):
    space = SimpleNamespace(id="probe", observation_shape=(3,), discrete=True, action_size=2)
    agent = DQN(hidden=(4,), target_period=3).build(space)
    rng = np.random.default_rng(0)
    batch = Batch(
        *(jnp.asarray(rng.normal(size=(6, 3)), jnp.float32), jnp.zeros(6, jnp.int32), jnp.ones(6), jnp.full(6, 0.9)),
        *(jnp.asarray(rng.normal(size=(6, 3)), jnp.float32), jnp.ones(6)),
    )

    def run(intervention):
        assert intervention.configure is None or intervention.configure(DQN()) == DQN()

        @jax.jit
        def step(state, index):
            state, _, _ = agent.update(state, batch, jax.random.key(index))
            given = Context(KEY, index, 0, agent.networks["critic"], (batch.observation,), "critic")
            critic, _, info = intervention.update(state.critic, (), given)
            return state.replace(critic=critic), info["reset"]

        state, resets = agent.init(KEY), []
        for index in range(1, 8):
            state, reset = step(state, index)
            resets.append(int(reset))
        return state, resets

    seen, resets = run(made())
    assert resets == [0, 0, 1, 0, 0, 1, 0]
    timed, same = run(made(period=3))
    assert same == resets
    assert_equal(seen, timed)


def test_a_copy_is_equal_in_every_array():
    params = drawn()
    assert target_is_copy(Learner(params, params, ()))
    other = {"params": {**params["params"], "hidden": drawn(1)["params"]["hidden"]}}  # the smallest array is the same
    assert not target_is_copy(Learner(params, other, ()))
    assert not target_is_copy(Learner(params, drawn(1), ()))


@pytest.mark.parametrize("made", [adam_reset, adam_rel, spam])
def test_never_due_changes_nothing(made):
    intervention = made(period=1000)
    tx = intervention.wrap(NETWORK, adam(0.1)) if intervention.wrap else adam(0.1)
    before = trained(tx)
    after, _, info = jax.jit(lambda learner, step: intervention.update(learner, (), context(step=step)))(before, 999)
    assert int(info["reset"]) == 0
    assert_equal(after, before)


def test_resets_of_seeds_are_apart():
    """Under vmap each seed follows its own target."""
    one = trained(adam(0.1))
    seeds = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, one.replace(target_params=one.params))
    after, _, info = jax.jit(jax.vmap(lambda learner: adam_reset().update(learner, (), context())))(seeds)
    assert info["reset"].tolist() == [0, 1]
    assert_equal(jax.tree.map(lambda leaf: leaf[0], after), one)
    assert_equal(jax.tree.map(lambda leaf: leaf[1], after.opt_state), adam(0.1).init(one.params))


@pytest.mark.parametrize("made", [adam_reset, adam_rel])
def test_what_has_no_hard_target_updates(made):
    name = made().name
    with pytest.raises(InterventionError, match=rf"{name}: the learner actor has no target network: give a period"):
        made().update(trained(adam(0.1)).replace(target_params=None), (), context("actor"))
    with pytest.raises(InterventionError, match=rf"{name}: .*\(tau 0.005\).*give a period"):
        made().configure(SAC())
    assert made(period=5).configure is None


@pytest.mark.parametrize("made", [adam_reset, adam_rel])
def test_with_a_period_all_optimisers_are_meant(made):
    """SAC's temperature has an optimiser and no network."""
    without = NETWORK._replace(apply=None)
    assert made(period=5).acts_on("temperature", without) and not made().acts_on("temperature", without)
    before = trained(adam(0.1)).replace(target_params=None)
    after, _, _ = made(period=5).update(before, (), context("temperature", step=5))
    assert np.any(before.opt_state[0].ages) and not np.any(after.opt_state[0].ages)


# ---- SPAM


def spam_in_numpy(gradients, period, warmup, theta, delay, count, rate=0.1):
    """Of one entry: its steps, by the words of the paper."""
    m = v = 0.0
    taken = age = 0
    steps = []
    for index, g in enumerate(gradients, start=1):
        if age >= delay and v > 0 and g**2 > theta * v:
            g = np.sign(g) * np.sqrt(theta * v)
        m, v, taken = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, taken + 1
        length = 1 - 0.99 * (1 + np.cos(np.pi * age / warmup)) / 2 if age < warmup else 1.0
        steps.append(-rate * length * m / (1 - 0.9**taken) / (np.sqrt(v / (1 - 0.999**taken)) + 1e-8))
        age += 1
        if index % period == 0:
            m, v, age = 0.0, 0.0, 0
            taken = 0 if count == "zero" else taken
    return np.array(steps)


@pytest.mark.parametrize("count", ["zero", "keep"])
def test_spam_is_the_numpy_version(count):
    fields = {"period": 10, "warmup": 4, "theta": 1500.0, "delay": 2, "count": count}
    intervention = spam(**fields)
    tx = intervention.wrap(NETWORK, optax.chain(optax.clip_by_global_norm(1e6), adam(0.1)))
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(25, 3)) * np.where(rng.uniform(size=(25, 3)) < 0.2, 300.0, 1.0)
    gradients[:8, 2] = 0.0  # its first gradient comes when it has no moment yet

    @jax.jit
    def step(learner, g, index):
        updates, opt_state = tx.update({"w": g}, learner.opt_state, learner.params)
        learner = learner.replace(opt_state=opt_state)
        return intervention.update(learner, (), context(step=index))[0], updates["w"]

    params = {"w": jnp.zeros(3)}
    learner, steps = Learner(params, None, tx.init(params)), []
    for index, g in enumerate(gradients, start=1):
        learner, update = step(learner, jnp.asarray(g, jnp.float32), index)
        steps.append(update)
    wanted = np.stack([spam_in_numpy(column, **fields) for column in gradients.T], axis=1)
    unclipped = np.stack([spam_in_numpy(column, **{**fields, "theta": 1e30}) for column in gradients.T], axis=1)
    np.testing.assert_allclose(np.stack(steps), wanted, rtol=2e-4)
    assert np.abs(wanted - unclipped).max() > 1e-3  # some gradients were spikes


def test_spam_without_spikes_or_resets_is_adam():
    plain, wrapped = adam(0.1), clip_spikes(adam(0.1), theta=1e30, warmup=0)
    chex.assert_trees_all_close(trained(wrapped).params, trained(plain).params, rtol=1e-6)


def test_spam_needs_a_second_moment_and_its_own_optimiser():
    with pytest.raises(InterventionError, match=r"spam: the optimiser keeps no second moment"):
        spam().wrap(NETWORK, optax.sgd(0.1, momentum=0.9)).init(drawn())
    with pytest.raises(InterventionError, match=r"spam: the optimiser is not spam's"):
        spam(period=1).update(trained(adam(0.1)), (), context())


# ---- UPGD


def test_upgd_with_sgd_is_the_papers_rule():
    rate, weight_decay, beta = 0.1, 0.01, 0.9
    tx = upgd(beta=beta, noise=0.0, decay=rate * weight_decay).project(NETWORK, optax.sgd(rate))
    params = drawn()
    state, update = tx.init(params), jax.jit(tx.update)
    weights = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)]).astype(np.float64)
    utility = np.zeros_like(weights)
    for step in range(1, 5):
        gradient = drawn(step)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        g = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
        utility = beta * utility + (1 - beta) * -g * weights
        corrected = utility / (1 - beta**step)
        gate = 1 - 1 / (1 + np.exp(-corrected / corrected.max()))
        weights = (1 - rate * weight_decay) * weights - rate * g * gate
    np.testing.assert_allclose(
        np.concatenate([x.ravel() for x in jax.tree.leaves(params)]), weights, rtol=1e-5, atol=1e-6
    )


def test_upgd_by_hand():
    """Utilities -g * w are 2 (the largest), 0 and -2."""
    params, gradient = {"w": jnp.array([1.0, 1.0, 1.0])}, {"w": jnp.array([-2.0, 0.0, 2.0])}
    tx = upgd(noise=0.0).project(NETWORK, optax.sgd(1.0))
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [2 * 0.26894143, 0.0, -2 * 0.73105857], rtol=1e-5)


def test_upgd_noise_is_gated():
    params = {"w": jnp.ones((100, 50))}
    gradient = {"w": jnp.zeros((100, 50)).at[0].set(-1.0)}  # the first row has all the utility
    tx = upgd(noise=0.01).project(NETWORK, optax.sgd(0.0))
    first, other = (jax.jit(tx.update)(gradient, tx.init(params), params, key=jax.random.key(i))[0] for i in range(2))
    xi = np.asarray(first["w"]) / 0.01 / np.where(np.arange(100) == 0, 0.26894143, 0.5)[:, None]
    assert abs(xi.mean()) < 0.06 and abs(xi.std() - 1) < 0.04 and abs(xi[0].std() - 1) < 0.4
    assert abs(np.corrcoef(first["w"].ravel(), other["w"].ravel())[0, 1]) < 0.06
    with pytest.raises(InterventionError, match="upgd: noise needs a key"):
        tx.update(gradient, tx.init(params), params)


# ---- Projections


def ensemble():
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (2, 3, 3, 2, 4), "bias": (2, 4)},
        "dense": {"kernel": (2, 4, 5), "bias": (2, 5)},
        "norm": {"scale": (2, 5), "bias": (2, 5)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def test_weights_are_clipped_to_their_fan_in():
    params = ensemble()
    tx = weight_clipping(kappa=0.5).project(NETWORK, optax.sgd(1.0))
    gradient = jax.tree.map(lambda leaf: -0.1 * jnp.ones_like(leaf), params)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    for module, fan_in in {"conv": 18, "dense": 4}.items():
        bound = 0.5 / np.sqrt(fan_in)
        for name, leaf in new[module].items():
            np.testing.assert_allclose(leaf, np.clip(params[module][name] + 0.1, -bound, bound), atol=1e-6)
            assert np.abs(leaf).max() <= bound + 1e-6 < np.abs(params[module][name]).max()
    assert_equal(new["norm"], jax.tree.map(lambda leaf: leaf + jnp.float32(0.1), params["norm"]))


def test_weights_within_the_bounds_are_left_to_the_optimiser():
    tx = weight_clipping(kappa=100.0).project(NETWORK, adam(0.01))
    chex.assert_trees_all_close(trained(tx).params, trained(adam(0.01)).params, rtol=1e-6)


def norms_of_members(leaf):
    return np.sqrt(np.square(np.asarray(leaf)).reshape(2, -1).sum(axis=1))


def test_norms_return_every_period():
    params = ensemble()
    params["dense"]["kernel"] = params["dense"]["kernel"].at[1].set(0.0)  # a member that starts at 0 is free
    tx = normalize_and_project(period=2, drift=0.25, heads=True).project(NETWORK, optax.sgd(1.0))
    state, update = tx.init(params), jax.jit(tx.update)
    gradient = jax.tree.map(lambda leaf: 0.1 * jnp.ones_like(leaf), params)
    updates, state = update(gradient, state, params)
    once = optax.apply_updates(params, updates)
    assert_equal(updates, jax.tree.map(lambda g: -g, gradient))
    updates, state = update(gradient, state, once)
    twice = optax.apply_updates(once, updates)
    np.testing.assert_allclose(
        norms_of_members(twice["conv"]["kernel"]), norms_of_members(params["conv"]["kernel"]), rtol=1e-5
    )
    dense, start = norms_of_members(twice["dense"]["kernel"]), norms_of_members(params["dense"]["kernel"])
    np.testing.assert_allclose(dense, [start[0], 0.2 * np.sqrt(20)], rtol=1e-5)
    free = np.asarray(params["conv"]["kernel"][0] - 0.2)  # the direction is the optimiser's
    np.testing.assert_allclose(
        twice["conv"]["kernel"][0],
        free * norms_of_members(params["conv"]["kernel"])[0] / np.linalg.norm(free),
        atol=1e-5,
    )
    np.testing.assert_allclose(twice["norm"]["scale"], params["norm"]["scale"] - 0.75 * 0.2, atol=1e-6)


def test_heads_are_known_by_the_graph():
    """In the order of names the head is the first kernel, not the last."""
    tx = normalize_and_project().project(NETWORK, optax.sgd(1.0))
    params, gradient = drawn(), drawn(1)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params, inputs=INPUTS, key=KEY)
    assert_equal(updates["params"]["head"], jax.tree.map(lambda g: -g, gradient["params"]["head"]))
    hidden = params["params"]["hidden"]["kernel"] + updates["params"]["hidden"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(hidden), np.linalg.norm(params["params"]["hidden"]["kernel"]), rtol=1e-5)
    assert_equal(updates["params"]["hidden"]["bias"], -gradient["params"]["hidden"]["bias"])


@pytest.mark.parametrize(
    ("made", "fields", "message"),
    [
        (adam_reset, {"period": 0}, "adam_reset: period must be at least 1 gradient step, not 0"),
        (adam_rel, {"period": -1}, "adam_rel: period must be at least 1 gradient step, not -1"),
        (spam, {"period": 0}, "spam: period must be at least 1"),
        (spam, {"warmup": -1}, "spam: warmup must be zero or more"),
        (spam, {"theta": 0.0}, "spam: theta must be positive, not 0.0"),
        (spam, {"delay": -1}, "spam: delay must be zero or more"),
        (spam, {"count": "paper"}, "spam: count must be one of zero, keep, not paper"),
        (upgd, {"beta": 1.0}, r"upgd: beta must lie in \[0, 1\), not 1.0"),
        (upgd, {"noise": -1.0}, "upgd: noise must be zero or more"),
        (upgd, {"decay": 1.0}, "upgd: decay must lie"),
        (weight_clipping, {"kappa": 0.0}, "weight_clipping: kappa must be positive, not 0.0"),
        (normalize_and_project, {"period": 0}, "normalize_and_project: period must be at least 1"),
        (normalize_and_project, {"drift": 2.0}, "normalize_and_project: drift must lie"),
    ],
)
def test_bad_values(made, fields, message):
    with pytest.raises(InterventionError, match=message):
        made(**fields)
