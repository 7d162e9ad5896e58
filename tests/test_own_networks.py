"""What those meet who bring networks, optimisers and loops of their own."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from resprout.agents import DQN, Learner
from resprout.agents.networks import orthogonal
from resprout.agents.optimizer import adam, age_shapes
from resprout.diagnostics import (
    Probe,
    action_churn,
    effective_rank,
    feature_norm,
    measure,
    policy_churn,
    sharpness,
    value_churn,
    weight_norm,
    weight_norms,
)
from resprout.interventions import (
    Intervention,
    add_churn_penalty,
    add_infer,
    add_l2_init,
    clip_weights,
    context_for,
    continual_backprop,
    intervene,
    project_norms,
    redo,
    reset,
)
from resprout.interventions.parameters import glorot, matrices
from resprout.interventions.perturb import dense_mask
from resprout.interventions.units import compensated
from resprout.replay import Storage, reshuffled
from resprout.training import Experiment

KEY = jax.random.key(0)
INPUTS = jax.random.normal(KEY, (32, 5))
NETWORK = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(16), nn.relu, nn.Dense(3)])


def learner_of(network=NETWORK, inputs=INPUTS, optimizer=None, dtype=jnp.float32) -> Learner:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), network.init(KEY, inputs))
    return Learner(params, None, (optimizer or optax.adam(1e-3)).init(params))


# flax.nnx


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(5, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.norm(self.hidden(x))))


def test_parameters_of_nnx_are_what_their_variables_are_called():
    definition, params = nnx.split(Nnx(nnx.Rngs(0)))
    optimizer = adam(1e-3)
    learner = Learner(params, None, optimizer.init(params))

    def apply(params, x):
        return nnx.merge(definition, params)(x)

    after, _ = intervene(reset(), learner, apply, (INPUTS,), KEY)
    np.testing.assert_array_equal(after.params["norm"]["scale"][...], np.ones(16))
    np.testing.assert_array_equal(after.params["norm"]["bias"][...], np.zeros(16))
    assert set(weight_norms(params)) == {f"{module}/{leaf}" for module, leaf in LEAVES}
    assert set(matrices(params)) == {"hidden/kernel", "head/kernel"}
    assert sorted(map(len, age_shapes(params))) == [1, 1, 1, 1, 2, 2]  # rows and columns of the two kernels
    _, info = intervene(redo(tau=0.5), learner, apply, (INPUTS,), KEY)
    assert set(info["recycled"]) == {"hidden"}


LEAVES = [
    ("hidden", "kernel"),
    ("hidden", "bias"),
    ("norm", "scale"),
    ("norm", "bias"),
    ("head", "kernel"),
    ("head", "bias"),
]


# Optimisers


@pytest.mark.parametrize(
    ("optimizer", "field"), [(optax.contrib.schedule_free_adamw(1e-3), "z"), (optax.contrib.prodigy(), "params0")]
)
def test_copies_of_parameters_in_an_optimiser_become_those_drawn_anew(optimizer, field):
    learner = learner_of(optimizer=optimizer)
    after, _ = intervene(reset(), learner, NETWORK.apply, (INPUTS,), KEY)
    copies = [
        leaf for path, leaf in jax.tree.leaves_with_path(after.opt_state) if f".{field}" in jax.tree_util.keystr(path)
    ]
    assert len(copies) == 6
    jax.tree.map(np.testing.assert_array_equal, copies, jax.tree.leaves(after.params))
    assert not np.array_equal(jax.tree.leaves(after.params)[1], jax.tree.leaves(learner.params)[1])


@pytest.mark.parametrize(
    "made",
    [
        lambda: add_l2_init(1e-3),
        lambda: add_churn_penalty(NETWORK.apply, 1.0, history=2),
        lambda: add_infer(NETWORK.apply),
        lambda: project_norms(drift=0.1, heads=True),
    ],
)
def test_a_learner_can_be_donated_with_what_its_optimiser_remembers(made):
    learner = learner_of(optimizer=optax.chain(made(), optax.adam(1e-3)))
    jax.jit(lambda learner: jax.tree.map(lambda leaf: leaf + 1, learner), donate_argnums=0)(learner)


# Kernels of three axes


class Sequence(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (5,), padding="VALID", name="conv")(x))
        x = nn.relu(nn.Conv(8, (3,), padding="VALID", name="next")(x))
        return nn.Dense(2, name="head")(x.reshape(len(x), -1))


def test_a_convolution_along_one_axis_is_no_ensemble():
    network, series = Sequence(), jax.random.normal(KEY, (4, 12, 16))
    params = network.init(KEY, series)
    assert matrices(params)["params/conv/kernel"].shape == (1, 5 * 16, 16)
    bound = math.sqrt(6 / (5 * 16 + 5 * 16))
    drawn = jnp.abs(glorot(KEY, params)["params"]["conv"]["kernel"])
    assert 0.98 * bound < drawn.max() <= bound
    large = jax.tree.map(lambda leaf: leaf + 10, params)
    steps, _ = clip_weights(1.0).update(jax.tree.map(jnp.zeros_like, params), (), large)
    np.testing.assert_allclose(
        large["params"]["conv"]["kernel"] + steps["params"]["conv"]["kernel"], 80**-0.5, rtol=1e-5
    )
    assert dense_mask(params)["params"] == {
        "conv": {"bias": False, "kernel": False},
        "next": {"bias": False, "kernel": False},
        "head": {"bias": True, "kernel": True},
    }


def test_what_a_constant_channel_brings_moves_into_the_bias_of_a_convolution_along_one_axis():
    network, series = Sequence(), jax.random.normal(KEY, (4, 12, 16))
    params = network.init(KEY, series)
    conv = params["params"]["conv"]
    conv = {"kernel": conv["kernel"].at[..., 0].set(0), "bias": conv["bias"].at[0].set(2.0)}  # channel 0 is always 2
    params = {"params": params["params"] | {"conv": conv}}
    graph = context_for(Learner(params, None, ()), network.apply, (series,), KEY, init_fn=lambda key: params).graph
    name = graph.layers[0].name
    moved = compensated(params, graph, {name: jnp.arange(16) == 0}, {name: jnp.full(16, 2.0)})
    silent = moved["params"]["conv"] | {"bias": conv["bias"].at[0].set(0.0)}
    after = network.apply({"params": moved["params"] | {"conv": silent}}, series)
    np.testing.assert_allclose(after, network.apply(params, series), atol=1e-5)
    replacing = continual_backprop(maturity=0, rate=0.5, compensate=True)
    learner = Learner(params, None, optax.adam(1e-3).init(params))
    context = context_for(learner, network.apply, (series,), KEY, now=True)
    jax.jit(functools.partial(replacing.update, context=context))(learner, replacing.init(learner))  # it can be traced


# Halves


def test_halves_are_drawn_decomposed_and_compensated():
    learner = learner_of(dtype=jnp.bfloat16)
    inputs = INPUTS.astype(jnp.bfloat16)
    assert orthogonal()(KEY, (16, 16), jnp.bfloat16).dtype == jnp.bfloat16
    replacing = continual_backprop(maturity=0, rate=0.5)
    context = context_for(learner, NETWORK.apply, (inputs,), KEY, init_fn=lambda key: NETWORK.init(key, INPUTS))
    after, _, _ = jax.jit(lambda learner: replacing.update(learner, replacing.init(learner), context))(learner)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype(jnp.bfloat16)}
    largest = sharpness(lambda params: (3 * params**2).sum(), jnp.ones(4, jnp.bfloat16), KEY)
    np.testing.assert_allclose(largest, 6, rtol=0.05)


def test_norms_of_halves_are_finite():
    ones = jnp.ones((1000, 100), jnp.float16)
    for norm in (
        weight_norm({"a": ones}),
        weight_norms({"a": ones})["a"],
        feature_norm({"a": ones.reshape(1, -1)})["a"],
    ):
        np.testing.assert_allclose(norm, math.sqrt(100_000), rtol=1e-3)


# What is no number, and what does not fit


def test_ranks_of_what_is_no_number_are_none():
    nothing = jnp.full((32, 5), jnp.nan)
    assert jnp.isnan(effective_rank(nothing)) and effective_rank(jnp.zeros((4, 4))) == 0
    params = NETWORK.init(KEY, INPUTS)
    ranks = ("srank", "approximate_rank", "feature_rank", "effective_rank", "stable_rank")
    assert all(map(jnp.isnan, measure(Probe(NETWORK.apply, params, (nothing,)), ranks).values()))
    assert not any(map(jnp.isnan, measure(Probe(NETWORK.apply, params, (INPUTS,)), ranks).values()))


@pytest.mark.parametrize("churn", [value_churn, policy_churn, action_churn])
def test_churn_is_of_one_shape(churn):
    with pytest.raises(ValueError, match=r"\(2, 1\) before and \(2,\) after"):
        churn(jnp.ones((2, 1)), jnp.ones(2))


def fresh_with(change):
    return lambda key: change(NETWORK.init(key, INPUTS))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: intervene(redo(), learner_of(), NETWORK.apply, INPUTS, KEY), "inputs must be a tuple .* not "),
        (lambda: Probe(NETWORK.apply, {}, INPUTS), "inputs must be a tuple"),
        (
            lambda: add_churn_penalty(NETWORK.apply, 1.0).update({}, (), {}, inputs=INPUTS),
            "inputs must be a tuple",
        ),
        (
            lambda: intervene(
                redo(), learner_of(), NETWORK.apply, (INPUTS,), KEY, init_fn=fresh_with(lambda made: made["params"])
            ),
            "init_fn makes parameters of another structure .* in dict, not params/layers_0/bias",
        ),
        (
            lambda: intervene(
                reset(),
                learner_of(),
                NETWORK.apply,
                (INPUTS,),
                KEY,
                init_fn=lambda key: NETWORK.init(key, INPUTS[:, :4]),
            ),
            r"init_fn makes params/layers_0/kernel of shape \(4, 16\), the learner's is \(5, 16\)",
        ),
        (
            lambda: measure(Probe(NETWORK.apply, {}, (INPUTS,)), ("sranks",)),
            "no diagnostic 'sranks': there are dormant",
        ),
        (lambda: redo(taau=0.1), "redo: .* unexpected keyword argument 'taau'; its fields are tau, "),
        (lambda: redo(tau="0.1"), "redo: '"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(act, message):
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        act()
    assert "\n" not in str(raised.value)


def test_what_is_meant_is_taken_for_it():
    probe = Probe(NETWORK.apply, NETWORK.init(KEY, INPUTS), (INPUTS,))
    assert measure(probe, "fau") == measure(probe, ("fau",))
    assert reset(layers="layers_0").spec == reset(layers=("layers_0",)).spec
    assert redo(period=1e3).spec == redo(period=1000).spec
    alone = Experiment(DQN(), "gym/CartPole-v1", interventions=redo())
    assert isinstance(alone.interventions[0], Intervention)
    written = Experiment(DQN(), "gym/CartPole-v1", interventions="redo")
    assert alone.digest() == written.digest() == Experiment(DQN(), "gym/CartPole-v1", interventions=(redo(),)).digest()
    sampler = reshuffled(10)
    state = jax.jit(sampler.add)(sampler.init(jax.random.PRNGKey(0)), jnp.arange(10))
    _, slots, _ = sampler.sample(state, 10)
    assert sorted(slots.tolist()) == list(range(10))


def test_parameters_of_another_precision_than_fresh_ones_are_followed():
    learner = learner_of(dtype=jnp.bfloat16)
    call = functools.partial(intervene, redo(tau=0.5), learner, NETWORK.apply, (INPUTS,), KEY)
    after, info = call(init_fn=lambda key: NETWORK.init(key, INPUTS))
    assert sum(info["recycled"].values()) > 0
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype(jnp.bfloat16)}


# Storage


@pytest.mark.parametrize("dtype", [bool, int, float])
def test_flags_of_any_type_end_the_episodes_that_they_mark(dtype):
    storage = Storage(40, (1,), "float32", num_envs=3)
    storage.begin(np.zeros((3, 1), np.float32))
    for step in range(1, 5):
        final = np.full((3, 1), step, np.float32)
        observation = final.copy()
        if step == 2:
            observation[2] = 100  # the third environment begins anew
        flags = np.zeros(3, dtype), np.array([0, 0, step == 2]).astype(dtype)
        storage.add(np.zeros(3, int), np.ones(3), *flags, final, observation)
    assert storage.gather([8])["observation"].item() == 100


def test_fractions_are_not_cut_off(tmp_path: Path):
    storage = Storage(10, (3,), "float32", action_shape=(2,))
    zeros = np.zeros((1, 3), np.float32)
    storage.begin(zeros)
    with pytest.raises(ValueError, match="actions are float64 and would be stored as int32: give action_dtype"):
        storage.add(np.array([[0.7, -0.9]]), [1.0], [False], [False], zeros, zeros)
    with pytest.raises(ValueError, match="observations are float32 and would be stored as uint8"):
        Storage(10, (3,), "uint8").begin(zeros)
    assert len(storage) == 0
