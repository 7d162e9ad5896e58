"""ReDo against tables, an independent NumPy version, and random architectures whose outputs must not move by one bit."""

import functools
import itertools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from resprout.agents import learner as learner_module
from resprout.agents.dqn import DQN
from resprout.agents.learner import Learner
from resprout.agents.optimizer import adam, ages_of
from resprout.agents.sac import SAC, critic_network
from resprout.diagnostics import layer_graph
from resprout.interventions import Context, InterventionError, intervene, redo
from resprout.interventions.redo import select_units

from .test_layers import Network, architectures, drawn, normal, prepared, randomised

KEY = jax.random.key(3)
AGE = 7


def seasoned(params, seed=0):
    """A learner in the middle of training: nothing that could be forgotten is zero, and its target is another."""
    state = adam(0.1).init(params)
    moments = state[0]._replace(
        ages=jnp.full_like(state[0].ages, AGE), mu=randomised(params, seed + 1), nu=randomised(params, seed + 2)
    )
    return Learner(params, randomised(params, seed + 3), (moments, *state[1:]))


quickly_compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def fresh_for(learner):
    """What stands for an initialisation where its distribution does not matter; it compiles at once."""
    return randomised(learner.params, seed=99)


def recycled(intervention, learner, apply, *inputs, **options):
    options = {"init_fn": lambda key: fresh_for(learner)} | options
    run = quickly_compiled(lambda learner: intervene(intervention, learner, apply, inputs, KEY, **options))
    return run(learner)


def mlp(params, x):
    """Two hidden ReLU layers and two outputs, or as many as there are."""
    *hidden, head = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ head["kernel"] + head["bias"][None]


def mlp_params(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"layer_{index}": {
            "kernel": jnp.asarray(rng.normal(size=pair), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=pair[1:]), jnp.float32),
        }
        for index, pair in enumerate(itertools.pairwise(sizes))
    }


def reading(units):
    """A network whose hidden activations are its inputs, where these are positive."""
    return {
        "layer_0": {"kernel": jnp.eye(units), "bias": jnp.zeros(units)},
        "layer_1": {"kernel": jnp.ones((units, 1)), "bias": jnp.zeros(1)},
    }


def context_of(learner, apply, inputs, gradient_step):
    """What a loop of one's own gives an intervention."""
    network = learner_module.Network(
        lambda key: fresh_for(learner), apply, lambda batch: inputs, lambda *arguments: jnp.zeros(())
    )
    return Context(KEY, gradient_step, 0, network, inputs)


def chosen(params, after, layer="layer_1"):
    """Units of the hidden layer before `layer` whose outgoing weights were cut."""
    return np.flatnonzero((np.asarray(after.params[layer]["kernel"]) == 0).all(axis=1)).tolist()


# ---- O1 to O3: scores


@pytest.mark.parametrize(
    ("rows", "tau", "units"),
    [
        ([[2, 0, 0.1], [4, 0, 0.3]], 0.0, [1]),  # scores 2.8125, 0, 0.1875
        ([[2, 0, 0.1], [4, 0, 0.3]], 0.1, [1]),
        ([[2, 0, 0.1], [4, 0, 0.3]], 0.2, [1, 2]),
        ([[7, 0.5, 0.5, 0]], 0.25, [1, 2, 3]),  # 3.5, 0.25, 0.25, 0: the threshold is included
        ([[7, 0.5, 0.5, 0]], 0.24, [3]),
    ],
)
def test_o1_scores_by_hand(rows, tau, units):
    x = jnp.asarray(rows, jnp.float32)
    learner = seasoned(reading(x.shape[1]))
    after, info = recycled(redo(tau=tau), learner, mlp, x)
    assert chosen(learner.params, after) == units
    assert info["recycled"]["layer_0"] == len(units)


def test_o2_a_channel_is_a_unit_and_negative_values_count():
    def network(params, x):
        x = lax.conv_general_dilated(x, params["a"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.leaky_relu(x).reshape(x.shape[0], -1) @ params["b"]

    params = {"a": jnp.eye(2).reshape(1, 1, 2, 2), "b": jnp.ones((8, 1))}
    x = jnp.stack([jnp.ones((2, 2)), jnp.array([[2.0, 0.0], [0.0, 0.0]])], axis=-1)[None]
    for tau, count in ((0.66, 0), (0.67, 1)):  # scores 4/3 and 2/3
        after, info = recycled(redo(tau=tau), seasoned(params), network, x)
        assert info["recycled"]["a"] == count
        assert after.params["b"].ravel().tolist() == ([1, 0] * 4 if count else [1] * 8)
    negative = jnp.full((1, 2, 2, 2), -1.0).at[..., 0].set(1.0)  # 1 and -0.01: scores 1.98 and 0.0198
    for tau, count in ((0.0, 0), (0.019, 0), (0.0199, 1)):
        assert recycled(redo(tau=tau), seasoned(params), network, negative)[1]["recycled"]["a"] == count


@pytest.mark.parametrize("scaling", [None, 2.0])
def test_o3_a_layer_that_is_wholly_dead(scaling):
    params = mlp_params(3, 4, 2)
    params["layer_0"]["bias"] = jnp.full(4, -1e3)
    after, info = recycled(redo(tau=0.0, scaling=scaling), seasoned(params), mlp, normal(5, 3), init_fn=None)
    assert info["recycled"]["layer_0"] == 4 and not after.params["layer_0"]["bias"].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert not after.params["layer_1"]["kernel"].any() and after.params["layer_0"]["kernel"].all()


def test_o3_nobody_dormant_changes_no_bit():
    learner = seasoned(reading(3))
    after, info = recycled(redo(tau=0.0), learner, mlp, jnp.ones((4, 3)))
    assert info["recycled"]["layer_0"] == 0
    chex.assert_trees_all_equal(after, learner)


def test_parameters_of_weak_type_are_followed_like_others():
    params = mlp_params(3, 4, 2)
    params["layer_0"]["bias"] = jnp.full(4, -1.0)
    assert params["layer_0"]["bias"].weak_type
    after, info = recycled(redo(tau=9.0), seasoned(params), mlp, normal(5, 3))
    assert info["recycled"]["layer_0"] == 4 and not after.params["layer_1"]["kernel"].any()


def test_scaling_gives_new_weights_the_length_of_the_others():
    params = mlp_params(3, 4, 5, 2)
    params["layer_0"]["bias"] = jnp.asarray([-1e3, 1, -1e3, 1])
    after, _ = recycled(redo(tau=0.0, scaling=0.5), seasoned(params), mlp, normal(5, 3))
    before = np.linalg.norm(params["layer_0"]["kernel"], axis=0)
    lengths = np.linalg.norm(after.params["layer_0"]["kernel"], axis=0)
    np.testing.assert_allclose(lengths[[0, 2]], 0.5 * before[[1, 3]].mean(), rtol=1e-5)
    np.testing.assert_array_equal(lengths[[1, 3]], before[[1, 3]])


def test_scaling_measures_the_lengths_of_each_member():
    network = critic_network(SAC(hidden=(6,)), 3)
    inputs = normal(64, 4), normal(64, 1)
    params = drawn(network, *inputs)
    hidden = params["params"]["hidden"]["dense_0"]
    hidden["kernel"] *= jnp.array([1.0, 100.0, 1.0])[:, None, None]
    hidden["bias"] = hidden["bias"].at[0, 2].set(-1e3).at[2].set(-1e3)  # a unit of the first member, all of the last
    after, info = recycled(redo(tau=0.0, scaling=0.5), seasoned(params), network.apply, *inputs)
    assert info["recycled"]["hidden/dense_0"] == 7
    before = np.linalg.norm(hidden["kernel"], axis=1)
    lengths = np.linalg.norm(after.params["params"]["hidden"]["dense_0"]["kernel"], axis=1)
    np.testing.assert_allclose(lengths[0, 2], 0.5 * np.delete(before[0], 2).mean(), rtol=1e-5)
    np.testing.assert_array_equal(lengths[1], before[1])
    fresh = randomised(params, seed=99)["params"]["hidden"]["dense_0"]["kernel"]
    np.testing.assert_allclose(lengths[2], np.linalg.norm(fresh[2], axis=0), rtol=1e-5)  # no others to measure by


# ---- O4: outputs stay, to the bit, and the entries edited are the right ones


def test_o4_channel_last():
    """Convolution to convolution, through a flatten to a dense layer, and from there to two heads."""
    convolutions = ((3, (2, 2), (1, 2), ""), (2, (2, 1), (2, 1), ""))
    network = Network(jax.nn.relu, "SAME", convolutions, 0, (4,), "dueling")
    x, action = normal(3, 4, 4, 2), normal(3, 2)
    params = drawn(network, x, action)
    for layer, unit in (("conv_0", 1), ("conv_1", 0), ("dense_0", 3)):
        params["params"][layer]["bias"] = (params["params"][layer]["bias"] + 5).at[unit].set(-1e3)
    learner = seasoned(params)
    after, info = recycled(redo(tau=0.0), learner, network.apply, x, action)
    assert {name: int(count) for name, count in info["recycled"].items()} == {"conv_0": 1, "conv_1": 1, "dense_0": 1}
    apply = jax.jit(network.apply)
    for inputs in ((x, action), (normal(3, 4, 4, 2, seed=5), action)):
        np.testing.assert_array_equal(apply(params, *inputs), apply(after.params, *inputs))

    changed = jax.tree.map(lambda a, b: np.asarray(a != b), params, after.params)["params"]
    rows = [(h * 2 + w) * 2 + 0 for h in range(2) for w in range(2)]  # of channel 0 behind the flatten: [2, 2, 2]
    expected = jax.tree.map(np.zeros_like, changed)
    expected["conv_0"]["kernel"][..., 1] = expected["conv_1"]["kernel"][:, :, 1] = True
    expected["conv_1"]["kernel"][..., 0] = expected["dense_0"]["kernel"][rows] = True
    expected["dense_0"]["kernel"][:, 3] = True
    expected["Dense_0"]["kernel"][3] = expected["Dense_1"]["kernel"][3] = True
    for layer, unit in (("conv_0", 1), ("conv_1", 0), ("dense_0", 3)):
        expected[layer]["bias"][unit] = True
    chex.assert_trees_all_equal(changed, expected)
    assert not after.params["params"]["dense_0"]["kernel"][jnp.array(rows)].any()


def test_o4_channel_first():
    """The same and from dense to dense, the weights as PyTorch keeps them: [out, in, h, w] and [out, in]."""

    def network(params, x):
        for layer in ("conv_0", "conv_1"):
            x = lax.conv(x, params[layer]["kernel"], (1, 1), "VALID") + params[layer]["bias"][None, :, None, None]
            x = jax.nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        for layer in ("dense_0", "dense_1"):
            x = jax.nn.relu(jnp.einsum("oi,bi->bo", params[layer]["kernel"], x) + params[layer]["bias"][None])
        return (params["value"] @ x.T).T + (params["advantage"] @ x.T).T

    dead = {"conv_0": 1, "conv_1": 0, "dense_0": 3, "dense_1": 1}
    shapes = {"conv_0": (2, 3, 2, 2), "conv_1": (2, 2, 2, 1), "dense_0": (4, 12), "dense_1": (3, 4)}
    params = {
        layer: {"kernel": jnp.abs(normal(*shape)), "bias": normal(*shape[:1]) + 5} for layer, shape in shapes.items()
    }
    for layer, unit in dead.items():
        params[layer]["bias"] = params[layer]["bias"].at[unit].set(-1e3)
    params |= {"value": normal(1, 3), "advantage": normal(2, 3)}
    x = normal(2, 3, 4, 4)  # [2, 3, 3] behind the first convolution, [2, 2, 3] behind the second
    after, info = recycled(redo(tau=0.0), seasoned(params), network, x)
    assert {name: int(count) for name, count in info["recycled"].items()} == dict.fromkeys(dead, 1)
    apply = jax.jit(network)
    for inputs in (x, normal(2, 3, 4, 4, seed=5)):
        np.testing.assert_array_equal(apply(params, inputs), apply(after.params, inputs))

    changed = jax.tree.map(lambda a, b: np.asarray(a != b), params, after.params)
    expected = jax.tree.map(np.zeros_like, changed)
    for layer, unit in dead.items():
        expected[layer]["kernel"][unit] = expected[layer]["bias"][unit] = True
    expected["conv_1"]["kernel"][:, 1] = True
    expected["dense_0"]["kernel"][:, :6] = True  # column c * H * W + h * W + w of channel 0
    expected["dense_1"]["kernel"][:, 3] = expected["value"][:, 1] = expected["advantage"][:, 1] = True
    chex.assert_trees_all_equal(changed, expected)
    for columns in (
        after.params["dense_0"]["kernel"][:, :6],
        after.params["value"][:, 1],
        after.params["advantage"][:, 1],
    ):
        assert not columns.any()


def dead_somewhere(graph, params, seed):
    """Parameters in which some units of isolated layers are silent on every input."""
    rng = np.random.default_rng(seed)
    dead = {layer.name: rng.random(layer.shape) < 0.4 for layer in graph.layers if layer.isolated}
    masks = quickly_compiled(graph.masks)(dead)
    params = jax.tree.map(lambda leaf, mask: jnp.where(mask, 0, leaf), params, masks.incoming)
    return jax.tree.map(lambda leaf, mask: jnp.where(mask, -jnp.abs(leaf), leaf), params, masks.bias), dead


def check_recycling(network, params, inputs, graph, seed):
    params, dead = dead_somewhere(graph, params, seed)
    learner = seasoned(params, seed)

    fresh_params = fresh_for(learner)

    @quickly_compiled
    def run(learner):
        after, info = intervene(redo(tau=0.0), learner, network.apply, inputs, KEY, init_fn=lambda key: fresh_params)
        return after, info, graph.activations(learner.params, *inputs)

    after, info, activations = run(learner)
    # Some units are silent on these inputs by chance.
    silent = {name: ~np.asarray(activations[name]).any(axis=0) for name in dead}
    silent = {
        name: units.all(axis=0) if units.ndim > len(graph[name].shape) else units for name, units in silent.items()
    }
    assert all((dead[name] <= silent[name]).all() for name in dead)
    assert {name: int(count) for name, count in info["recycled"].items()} == {
        name: units.sum() for name, units in silent.items()
    }

    apply, look = jax.jit(network.apply), quickly_compiled(graph.activations)
    fresh = tuple(normal(*x.shape, seed=seed + 50 + index) for index, x in enumerate(inputs))
    chex.assert_trees_all_equal(apply(params, *inputs), apply(after.params, *inputs))
    if not any(np.asarray(look(params, *fresh)[name])[..., silent[name]].any() for name in silent):
        chex.assert_trees_all_equal(apply(params, *fresh), apply(after.params, *fresh))

    masks = jax.tree.map(np.asarray, quickly_compiled(graph.masks)(silent))
    edited = jax.tree.map(lambda *leaves: np.logical_or.reduce(leaves), *masks)
    outgoing = jax.tree.map(lambda out, leaf: leaf[out], masks.outgoing, after.params)
    assert not any(map(np.any, jax.tree.leaves(outgoing)))
    made = jax.tree.map(lambda own, bias, out: (own | bias) & ~out, masks.incoming, masks.bias, masks.outgoing)
    new, drawn_anew = (jax.tree.map(lambda m, leaf: leaf[m], made, tree) for tree in (after.params, fresh_params))
    chex.assert_trees_all_equal(new, drawn_anew)

    def same_elsewhere(before, after):
        chex.assert_trees_all_equal(*(jax.tree.map(lambda m, x: x[~m], edited, tree) for tree in (before, after)))

    same_elsewhere(params, after.params)
    chex.assert_trees_all_equal(after.target_params, learner.target_params)
    old, new = learner.opt_state[0], after.opt_state[0]
    for moment in ("mu", "nu"):
        same_elsewhere(getattr(old, moment), getattr(new, moment))
        zeroed = jax.tree.map(lambda mask, leaf: leaf[mask], edited, getattr(new, moment))
        assert not any(map(np.any, jax.tree.leaves(zeroed)))
    for mask, ages in zip(jax.tree.leaves(edited), ages_of(new), strict=True):
        # The age of a kernel's entry is the least of its row's and its column's; all others have their own.
        kernel = len(ages) == 2
        forgotten = mask.all(axis=-2, keepdims=True) | mask.all(axis=-1, keepdims=True) if kernel else mask
        age = np.minimum(*map(np.asarray, ages)) if kernel else np.asarray(ages[0])
        np.testing.assert_array_equal(np.broadcast_to(age, mask.shape), np.where(forgotten, 0, AGE))


def check_architecture(architecture, seed):
    network, names = architecture
    params, inputs, graph = prepared(network, seed)
    assert {layer.name: layer.isolated for layer in graph.layers} == names
    if any(names.values()):
        check_recycling(network, params, inputs, graph, seed)
    else:
        with pytest.raises(InterventionError, match="no unit may be recycled"):
            intervene(redo(), seasoned(params), network.apply, inputs, KEY)


@settings(max_examples=3, deadline=None)
@given(architectures(jax.nn.relu), st.integers(0, 99))
def test_recycling_dead_units_of_random_architectures(architecture, seed):
    check_architecture(architecture, seed)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(architectures(jax.nn.relu), st.integers(0, 999))
def test_recycling_dead_units_of_many_architectures(architecture, seed):
    check_architecture(architecture, seed)


SPEC = SimpleNamespace(
    image=SimpleNamespace(id="atari/Image", observation_shape=(36, 37, 2), discrete=True, action_size=3),
    control=SimpleNamespace(id="gym/Control-v0", observation_shape=(4,), discrete=False, action_size=2),
)


@pytest.mark.parametrize(
    ("agent", "spec", "shapes"),
    [
        pytest.param(
            *(DQN(hidden=(5,), width=0.1, distribution="c51", dueling=True), SPEC.image, [(36, 37, 2)]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(DQN(torso="impala", hidden=(5,), width=0.1), SPEC.image, [(36, 37, 2)]),
            marks=pytest.mark.slow,
        ),
        (SAC(hidden=(5, 4), critics=10), SPEC.control, [(4,), (2,)]),
    ],
    ids=["c51 dueling", "impala", "ten critics"],
)
def test_recycling_in_the_agents_networks(agent, spec, shapes):
    made = agent.build(spec).networks["critic"]
    inputs = tuple(normal(2, *shape, seed=seed) for seed, shape in enumerate(shapes))
    params = randomised(jax.eval_shape(made.init, KEY))
    check_recycling(made, params, inputs, layer_graph(made.apply, params, *inputs), seed=1)


# ---- O5 to O9


def test_o5_first_the_outgoing_weights_learn():
    params = mlp_params(3, 4, 4, 2)
    params["layer_0"]["bias"] = jnp.asarray([-1e3, 0, 0, 0])
    x = normal(16, 3)
    after, _ = recycled(redo(tau=0.0), seasoned(params), mlp, x)
    gradient = jax.jit(jax.grad(lambda params: jnp.square(mlp(params, x) - 1).sum()))(after.params)
    assert not gradient["layer_0"]["kernel"][:, 0].any() and float(gradient["layer_0"]["bias"][0]) == 0
    assert gradient["layer_1"]["kernel"][0].any()


def numpy_redo(params, x, tau, fresh):
    """One step by hand: masks from one look, incoming and bias anew, then outgoing zero; and the entries of each kind."""
    (w0, b0), (w1, b1), (w2, b2) = ((np.array(layer["kernel"]), np.array(layer["bias"])) for layer in params.values())
    h0 = np.maximum(x @ w0 + b0, 0)
    h1 = np.maximum(h0 @ w1 + b1, 0)
    d0, d1 = ((means := np.abs(h).mean(axis=0)) / (means.mean() + 1e-9) <= tau for h in (h0, h1))
    w0[:, d0], w1[:, d1] = fresh["layer_0"]["kernel"][:, d0], fresh["layer_1"]["kernel"][:, d1]
    b0[d0], b1[d1] = fresh["layer_0"]["bias"][d0], fresh["layer_1"]["bias"][d1]
    w1[d0], w2[d1] = 0, 0
    edited = {
        "layer_0": np.zeros(w0.shape, bool),
        "layer_1": np.zeros(w1.shape, bool),
        "layer_2": np.zeros(w2.shape, bool),
    }
    edited["layer_0"][:, d0] = edited["layer_1"][:, d1] = edited["layer_1"][d0] = edited["layer_2"][d1] = True
    biases = {"layer_0": d0, "layer_1": d1, "layer_2": np.zeros(2, bool)}
    layers = zip(params, (w0, w1, w2), (b0, b1, b2), strict=True)
    return {name: {"kernel": w, "bias": b} for name, w, b in layers}, edited, biases, (d0, d1)


@pytest.mark.parametrize("forget_bias", [True, False])
def test_o6_o7_equals_an_independent_numpy_version(forget_bias):
    params, x = mlp_params(3, 6, 5, 2, seed=4), normal(8, 3)
    params["layer_0"]["bias"] = params["layer_0"]["bias"].at[2].set(-1e3)
    params["layer_1"]["bias"] = params["layer_1"]["bias"].at[4].set(-1e3)
    fresh = jax.tree.map(np.asarray, mlp_params(3, 6, 5, 2, seed=5))
    learner = seasoned(params)
    after, info = recycled(
        redo(tau=0.4, forget_bias=forget_bias), learner, mlp, x, init_fn=lambda key: jax.tree.map(jnp.asarray, fresh)
    )
    expected, edited, biases, (d0, d1) = numpy_redo(params, np.asarray(x), 0.4, fresh)
    assert d0[2] and d1[4] and not d0.all() and not d1.all()
    chex.assert_trees_all_equal(after.params, expected)
    assert float(after.params["layer_1"]["kernel"][2, 4]) == 0  # between two recycled units
    assert {name: int(count) for name, count in info["recycled"].items()} == {"layer_0": d0.sum(), "layer_1": d1.sum()}
    chex.assert_trees_all_equal(after.target_params, learner.target_params)
    for moment in ("mu", "nu"):
        old, new = (getattr(state.opt_state[0], moment) for state in (learner, after))
        for name in params:
            np.testing.assert_array_equal(new[name]["kernel"], np.where(edited[name], 0, old[name]["kernel"]))
            forgotten = biases[name] & forget_bias
            np.testing.assert_array_equal(new[name]["bias"], np.where(forgotten, 0, old[name]["bias"]))


def test_what_the_paper_s_code_does_is_one_word():
    params, x = mlp_params(3, 6, 5, 2, seed=4), normal(8, 3)
    learner = seasoned(params)
    word = redo(tau=0.4, init="paper", count="paper", target="paper", forget_bias=False)
    spelt = redo(tau=0.4, init="xavier", count="keep", target="keep", forget_bias=False)
    (one, info), (other, _) = (recycled(each, learner, mlp, x) for each in (word, spelt))
    chex.assert_trees_all_equal(one, other)
    assert sum(info["recycled"].values()) > 0
    assert set(one.opt_state[0].ages.tolist()) == {AGE}
    edited, _ = recycled(redo(tau=0.4, count="zero", target="edit"), learner, mlp, x)
    assert set(edited.opt_state[0].ages.tolist()) == {0}
    changed = jax.tree.map(lambda a, b: np.asarray(a != b), learner.params, edited.params)
    in_target = jax.tree.map(lambda a, b: np.asarray(a != b), learner.target_params, edited.target_params)
    chex.assert_trees_all_equal(in_target, changed)


def test_outgoing_weights_drawn_anew():
    learner = seasoned(mlp_params(3, 6, 5, 2, seed=4))
    fresh = fresh_for(learner)
    after, _ = recycled(redo(tau=9.0, outgoing="random"), learner, mlp, normal(8, 3))  # every unit
    for name in fresh:
        np.testing.assert_array_equal(after.params[name]["kernel"], fresh[name]["kernel"])


def test_o8_the_schedule_counts_gradient_steps():
    learner, x = seasoned(reading(3)), jnp.ones((2, 3)).at[:, 1].set(0)
    intervention = redo(tau=0.0, period=4, start=5, stop=16)
    assert intervention.period == 4

    @jax.jit
    def step(gradient_step):
        context = context_of(learner, mlp, (x,), gradient_step)
        after, _, info = intervention.update(learner, (), context)
        return after, info["recycled"]["layer_0"]

    due = [g for g in range(24) if int(step(g)[1])]
    assert due == [8, 12]
    chex.assert_trees_all_equal(step(9)[0], learner)


@pytest.mark.parametrize("init", ["own", "xavier"])
def test_o9_distribution_of_new_weights(init):
    """Of the 1e5 weights of a convolution, by the fans of the whole kernel."""

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(50, (4, 5), name="conv")(x)).reshape(1, -1)
            return nn.Dense(1, name="head")(x)

    x = jnp.ones((1, 2, 2, 100))
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, -1.0), drawn(Layers(), x))
    network = Layers()
    own = {"init_fn": lambda key: network.init(key, x)}
    after, info = recycled(redo(tau=0.0, init=init), seasoned(params), network.apply, x, **own)
    assert {name: int(count) for name, count in info["recycled"].items()} == {"conv": 50}
    conv = np.asarray(after.params["params"]["conv"]["kernel"])
    fans = 4 * 5 * 100, 4 * 5 * 50
    variance = 2 / sum(fans) if init == "xavier" else 1 / fans[0]
    assert conv.size == 100_000 and abs(conv.mean()) < 4 * np.sqrt(variance / conv.size)
    assert abs(conv.var() / variance - 1) < 0.02
    if init == "xavier":
        assert 0.999 < np.abs(conv).max() / np.sqrt(6 / sum(fans)) <= 1
    assert not after.params["params"]["conv"]["bias"].any()


def test_xavier_of_an_ensemble_leaves_biases_zero():
    network = critic_network(SAC(hidden=(6, 5)), 3)
    inputs = normal(4, 4), normal(4, 1)
    learner = seasoned(drawn(network, *inputs))
    after, _ = recycled(redo(tau=9.0, init="xavier"), learner, network.apply, *inputs)
    hidden = after.params["params"]["hidden"]
    assert not hidden["dense_0"]["bias"].any() and not hidden["dense_1"]["bias"].any()
    kernel = np.asarray(hidden["dense_0"]["kernel"])
    assert 0.8 < np.abs(kernel).max() / np.sqrt(6 / (5 + 6)) <= 1
    assert len(np.unique(kernel)) == kernel.size  # members draw their own


def test_members_are_scored_apart():
    network = critic_network(SAC(hidden=(6,)), 2)
    inputs = normal(64, 4), normal(64, 1)
    params = drawn(network, *inputs)
    params["params"]["hidden"]["dense_0"]["bias"] = params["params"]["hidden"]["dense_0"]["bias"].at[1, 2].set(-1e3)
    learner = seasoned(params)
    after, info = recycled(redo(tau=0.0), learner, network.apply, *inputs)
    assert info["recycled"]["hidden/dense_0"] == 1
    changed = np.asarray(after.params["params"]["head"]["kernel"] != params["params"]["head"]["kernel"])
    assert np.argwhere(changed).tolist() == [[1, 2, 0]]


# ---- O10: how units are chosen


SCORES = {
    "dense": jnp.array([0, 0, 0, 0.05, 0.09, 1, 2, 0, 3, 4]),
    "critics": jnp.array([[0, 0, 1, 3], [0.0, 1, 1, 2]]),
}


def test_o10_every_way_to_select_has_the_same_budget():
    picked = {select: select_units(SCORES, 0.1, select, None, KEY) for select in ("lowest", "random", "highest")}
    for units in picked.values():
        assert int(units["dense"].sum()) == 6 and units["critics"].sum(axis=1).tolist() == [2, 1]
    assert np.flatnonzero(picked["lowest"]["dense"]).tolist() == [0, 1, 2, 3, 4, 7]
    assert np.flatnonzero(picked["highest"]["dense"]).tolist()[-4:] == [5, 6, 8, 9]
    assert not np.array_equal(picked["random"]["dense"], picked["lowest"]["dense"])
    for select in ("lowest", "random", "highest"):
        units = select_units(SCORES, 0.1, select, 0.3, KEY)
        assert int(units["dense"].sum()) == 3 and units["critics"].sum(axis=1).tolist() == [1, 1]


def test_o10_ties_are_broken_at_random():
    keys = jax.random.split(KEY, 400)
    pick = jax.jit(jax.vmap(lambda key: select_units({"a": jnp.zeros(4)}, 0.1, "lowest", 0.5, key)["a"]))
    counts = np.asarray(pick(keys)).sum(axis=0)
    assert counts.sum() == 800 and (abs(counts - 200) < 50).all()  # five standard deviations


def test_a_share_that_falls():
    learner, x = seasoned(reading(10)), jnp.arange(1.0, 11.0)[None]

    @quickly_compiled
    def at(step):
        options = {"init_fn": lambda key: fresh_for(learner), "gradient_step": step}
        return intervene(redo(period=1, fraction=0.4, decay=True, stop=100), learner, mlp, (x,), KEY, **options)

    # max(1, round(10 * 0.4 * cos(pi / 2 * g / 100)))
    for step, count in ((1, 4), (50, 3), (60, 2), (90, 1), (99, 1)):
        after, info = at(step)
        assert int(info["recycled"]["layer_0"]) == count and chosen(learner.params, after) == list(range(count))


def test_scores_by_gradient_and_by_utility():
    """Unit 0 speaks loudly to nobody, unit 1 softly to all, unit 2 not at all; unit 3 is average."""
    params, x = reading(4), jnp.array([[9.0, 0.2, 0.0, 1.0]])
    params["layer_1"]["kernel"] = jnp.array([[0.001], [1.0], [1.0], [1.0]])
    learner, loss = seasoned(params), jnp.sum

    def selected(score, tau):
        after, _ = recycled(redo(score=score, tau=tau), learner, mlp, x, loss_fn=loss)
        return chosen(params, after)

    assert selected("activation", 0.1) == [1, 2]  # 9, 0.2, 0, 1 over 2.55
    assert selected("gradient", 0.1) == [0]  # |dL/dh| is the outgoing weight, of silent units too
    assert selected("utility", 0.1) == [0, 2]  # 0.009, 0.2, 0, 1 over 0.30225
    with pytest.raises(InterventionError, match="gradients are read: give a loss_fn"):
        intervene(redo(score="gradient"), learner, mlp, (x,), KEY)


# ---- Layers that are not isolated


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.relu(nn.LayerNorm(name="norm")(nn.Dense(6, name="hidden")(x))))


def test_a_norm_is_reported_and_refused_where_asked():
    x = normal(8, 3)
    params = drawn(Normed(), x)
    params["params"]["norm"]["bias"] = params["params"]["norm"]["bias"].at[4].set(-1e3)
    (layer,) = layer_graph(Normed().apply, params, x).layers
    assert not layer.isolated and layer.normalised_only
    learner = seasoned(params)
    with pytest.raises(InterventionError) as refusal:
        recycled(redo(layers="isolated"), learner, Normed().apply, x)
    assert str(refusal.value) == (
        "redo: no unit may be recycled (hidden: reduce_sum mixes it with other values); layers=all allows more"
    )
    after, info = recycled(redo(tau=0.0), learner, Normed().apply, x)
    assert info["recycled"]["hidden"] == 1
    new, fresh = after.params["params"], fresh_for(learner)["params"]["norm"]
    assert not new["head"]["kernel"][4].any()
    for entry in ("bias", "scale"):
        expected = params["params"]["norm"][entry].at[4].set(fresh[entry][4])
        np.testing.assert_array_equal(new["norm"][entry], expected)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="embed")(x)
        hidden = nn.relu(nn.Dense(6, name="inner")(nn.LayerNorm(name="norm")(x)))
        return nn.Dense(1, name="head")(nn.LayerNorm(name="last")(x + nn.Dense(4, name="outer")(hidden)))


def test_a_residual_stream_is_never_recycled():
    x = normal(8, 3)
    params = drawn(Residual(), x)
    for layers, names in (("private", {"inner"}), ("isolated", {"inner"}), ("all", {"embed", "inner"})):
        act = functools.partial(intervene, redo(layers=layers), apply_fn=Residual().apply, inputs=(x,), key=KEY)
        _, info = jax.eval_shape(act, seasoned(params))
        assert set(info["recycled"]) == names


# ---- O11: the phenomenon


@pytest.mark.slow
def test_o11_targets_that_change_make_units_dormant():
    """An MLP regresses on random targets, fixed or drawn anew every 50 steps; ReDo wakes its units."""
    x = normal(32, 8)
    tx = adam(0.01)
    params = jax.tree.map(lambda leaf: 0.5 * leaf, mlp_params(8, 32, 32, 1))
    graph = layer_graph(mlp, params, x)

    def silent(params):
        return jnp.concatenate([~h.any(axis=0) for h in graph.activations(params, x).values()]).mean()

    @functools.partial(jax.jit, static_argnames=("recycle",))
    def trained(period, recycle):
        def step(learner, index):
            y = 3 * jax.random.normal(jax.random.fold_in(KEY, index // period), (32, 1))
            gradient = jax.grad(lambda params: jnp.square(mlp(params, x) - y).mean())(learner.params)
            updates, state = tx.update(gradient, learner.opt_state)
            learner = Learner(jax.tree.map(jnp.add, learner.params, updates), None, state)
            if recycle:
                due = redo(tau=0.0, period=50).update(learner, (), context_of(learner, mlp, (x,), index + 1))
                learner = due[0]
            return learner, silent(learner.params)

        learner, course = lax.scan(step, Learner(params, None, tx.init(params)), jnp.arange(1500))
        return learner, course

    (_, fixed), (moved, moving), (_, kept) = trained(10**6, False), trained(50, False), trained(50, True)
    asleep = {name: ~h.any(axis=0) for name, h in graph.activations(moved.params, x).items()}
    pruned = jax.tree.map(lambda m, leaf: jnp.where(m, 0, leaf), graph.masks(asleep).outgoing, moved.params)
    np.testing.assert_array_equal(jax.jit(mlp)(pruned, x), jax.jit(mlp)(moved.params, x))
    assert float(fixed[-100:].mean()) < float(fixed[:100].mean()) + 0.02
    assert float(moving[-100:].mean()) > float(fixed[-100:].mean()) + 0.2
    assert float(kept[-100:].mean()) < float(moving[-100:].mean()) - 0.2
