"""Architectures as interventions: the configurations they make, networks that learn, and the layer graph on each."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resprout.agents import DQN, SAC, Batch, Learner
from resprout.agents.dqn import q_network
from resprout.agents.sac import actor_network, critic_network
from resprout.diagnostics import layer_graph
from resprout.diagnostics.dormancy import activation_gradients
from resprout.interventions import InterventionError, chain, intervene, redo
from resprout.interventions.architectures import crelu, deep_fourier, helu, layer_norm, smooth_leaky

FAST = {"xla_backend_optimization_level": 0}  # to compile
PLANES = SimpleNamespace(id="minatar/Planes", observation_shape=(5, 4, 2), discrete=True, action_size=3)
IMAGE = SimpleNamespace(id="atari/Image", observation_shape=(9, 8, 2), discrete=True, action_size=3)
CONTROL = SimpleNamespace(id="gym/Control-v0", observation_shape=(4,), discrete=False, action_size=2)
METHODS = {
    "crelu": crelu(),
    "fourier": deep_fourier(),
    "helu": helu(),
    "smooth_leaky": smooth_leaky(),
    "layer_norm": layer_norm(),
}


def configured(intervention, config):
    assert intervention.period == 0
    return intervention.configure(config)


# ---- Configurations


@pytest.mark.parametrize(
    ("intervention", "spec", "changes"),
    [
        (layer_norm(), "layer_norm", {"layer_norm": True}),
        (crelu(), "crelu", {"activation": "crelu"}),
        (crelu(width_matched=True), "crelu:width_matched=true", {"activation": "crelu", "width_matched": True}),
        (
            deep_fourier(width_matched=True),
            "deep_fourier:width_matched=true",
            {"activation": "fourier", "width_matched": True},
        ),
        (helu(), "helu", {"activation": "helu:alpha=0.05"}),
        (helu(alpha=0.2), "helu:alpha=0.2", {"activation": "helu:alpha=0.2"}),
        (
            smooth_leaky(alpha=0.3, sharpness=2.0),
            "smooth_leaky:alpha=0.3,sharpness=2.0",
            {"activation": "smooth_leaky:alpha=0.3,sharpness=2.0"},
        ),
        (chain(layer_norm(), crelu()), "chain(layer_norm; crelu)", {"layer_norm": True, "activation": "crelu"}),
    ],
)
@pytest.mark.parametrize("config", [DQN(gamma=0.9), SAC(gamma=0.9)])
def test_fields_that_are_set(intervention, spec, changes, config):
    assert configured(intervention, config) == dataclasses.replace(config, **changes)
    assert intervention.spec == spec


def test_layer_norm_of_critics_actor_or_both():
    for chosen in ({}, {"actor": True}, {"actor": True, "critic": False}):
        config = configured(layer_norm(**chosen), SAC(hidden=(3,)))
        actor, critic = actor_network(config, CONTROL), critic_network(config, 2)
        x, action = jnp.zeros((1, 4)), jnp.zeros((1, 2))
        parts = [
            jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]["hidden"].keys()
            for network, inputs in ((actor, (x,)), (critic, (x, action)))
        ]
        assert ["norm_0" in part for part in parts] == [chosen.get("actor", False), chosen.get("critic", True)]


class Tabular:
    """A config without a network."""


@pytest.mark.parametrize(
    ("intervention", "config", "message"),
    [
        (crelu(), Tabular(), "Tabular has no activation; it is a field of DQN, SAC"),
        (layer_norm(), Tabular(), "Tabular has no layer_norm; it is a field of DQN, SAC"),
        (layer_norm(actor=True), DQN(), "DQN has no actor_layer_norm; it is a field of SAC"),
        (helu(), DQN(activation="tanh"), "activation is tanh already; helu:alpha=0.05 would replace it"),
        (chain(crelu(), deep_fourier()), SAC(), "activation is crelu already; fourier would replace it"),
        (
            chain(crelu(width_matched=True), crelu()),
            SAC(),
            "width_matched is True already; False would replace it",
        ),
    ],
)
def test_where_they_do_not_apply(intervention, config, message):
    with pytest.raises(InterventionError) as error:
        intervention.configure(config)
    assert str(error.value).startswith(message.partition("it is a field")[0]) and "\n" not in str(error.value)
    named = str(error.value).partition("it is a field of ")[2].split(", ")
    assert set(message.partition("it is a field of ")[2].split(", ")) <= set(named)  # other agents may have it too


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: helu(alpha=0.0), "helu: alpha must be positive, not 0.0"),
        (lambda: smooth_leaky(alpha=1.0), "smooth_leaky: alpha must be between 0 and 1, not 1.0"),
        (lambda: smooth_leaky(sharpness=float("nan")), "smooth_leaky: sharpness must be finite, not nan"),
        (lambda: layer_norm(critic=False), "layer_norm: critic or actor must be true"),
    ],
)
def test_impossible_fields(make, message):
    with pytest.raises(InterventionError) as error:
        make()
    assert str(error.value) == message


# ---- The layer graph


def drawn(network, *inputs):
    """Parameters all of which are drawn, biases and scales too."""
    rng = np.random.default_rng(0)
    forms = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32), forms)


def case(method, network):
    """Network, parameters and inputs of a small agent with the method."""
    rng = np.random.default_rng(1)
    if network == "critic":
        module = critic_network(configured(METHODS[method], SAC(hidden=(6, 5))), 2)
        inputs = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(3, 2)).astype(np.float32)
    else:
        spec = {"minatar": PLANES, "nature": IMAGE}[network]
        config = configured(METHODS[method], DQN(torso=network, width=0.1, hidden=(40,)))
        module = q_network(config, spec)
        inputs = (rng.normal(size=(3, *spec.observation_shape)).astype(np.float32),)
    return module, drawn(module, *inputs), inputs


def differing(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)


def union(*masks):
    return jax.tree.map(lambda *leaves: np.logical_or.reduce(leaves), *masks)


def where(mask, new, old):
    return jax.tree.map(np.where, mask, new, old)


@pytest.mark.parametrize("network", ["critic", "minatar", "nature"])
@pytest.mark.parametrize("method", METHODS)
def test_units_that_are_cut_or_silent(method, network):
    module, params, inputs = case(method, network)
    graph, apply = layer_graph(module.apply, params, *inputs), jax.jit(module.apply, compiler_options=FAST)
    # cos(0) is 1 and a norm mixes the units of its layer; all else leaves units alone and silent ones at 0.
    isolated = method not in ("fourier", "layer_norm")
    assert [layer.isolated for layer in graph.layers] == [isolated] * len(graph.layers)
    chosen = {layer.name: np.arange(layer.units).reshape(layer.shape) % 3 == 0 for layer in graph.layers}
    incoming, bias, scale, outgoing = graph.masks(chosen)
    zero = jax.tree.map(jnp.zeros_like, params)

    # Cut: whatever feeds a unit, or what its norm makes of it alone, is of no effect; the weights between two are cut.
    cut = where(outgoing, zero, params)
    own = union(incoming, bias, scale)
    if method == "layer_norm":
        own = jax.tree_util.tree_map_with_path(lambda path, mask: mask & ("norm_" in jax.tree_util.keystr(path)), own)
    changed = where(outgoing, zero, where(own, differing(params, 2), params))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(cut), strict=True))
    np.testing.assert_array_equal(apply(cut, *inputs), apply(changed, *inputs))
    assert not np.allclose(apply(cut, *inputs), apply(params, *inputs))

    # Silent: preactivation 0. Its outgoing weights are of no effect, but for those of a unit whose cosine is then 1.
    silent = where(union(incoming, bias, scale), zero, params)
    other = where(union(incoming, bias, scale), zero, where(outgoing, differing(params, 3), params))
    same = np.array_equal(apply(silent, *inputs), apply(other, *inputs))
    assert same == (method != "fourier")


def test_both_rows_of_a_unit_belong_to_it():
    module, params, inputs = case("crelu", "nature")
    graph = layer_graph(module.apply, params, *inputs)
    kernels = params["params"]
    for name, reader, channels in (("conv_0", "conv_1", 4), ("conv_1", "conv_2", 7), ("conv_2", None, 7)):
        path = f"params/torso/{reader}/kernel" if reader else "params/hidden/dense_0/kernel"
        kernel = kernels["torso"][reader]["kernel"] if reader else kernels["hidden"]["dense_0"]["kernel"]
        owners = graph[f"torso/{name}"].outgoing[path]
        # Channels 0, ..., C - 1 are relu(x), the next C relu(-x); behind the flatten so at each place, channel-last.
        expected = np.arange(kernel.shape[-2]) % channels
        np.testing.assert_array_equal(
            np.broadcast_to(owners, kernel.shape)[..., 0], np.broadcast_to(expected, kernel.shape[:-1])
        )
        assert kernel.shape[-2] % (2 * channels) == 0
    shapes = {name: leaf.shape for name, leaf in graph.activations(params, *inputs).items()}
    assert shapes == {  # both activations of every place: 3 x 2, 2 x 1 and 2 x 1 are left of 9 x 8 pixels
        "torso/conv_0": (3, 2 * 6, 4),
        "torso/conv_1": (3, 2 * 2, 7),
        "torso/conv_2": (3, 2 * 2, 7),
        "hidden/dense_0": (3, 2, 4),
    }


def test_owners_of_norms():
    module, params, inputs = case("layer_norm", "minatar")
    convolution, dense = layer_graph(module.apply, params, *inputs).layers
    assert set(convolution.bias) == {"params/torso/conv_0/bias", "params/torso/norm_0/bias"}
    assert set(convolution.scale) == {"params/torso/norm_0/scale"}
    np.testing.assert_array_equal(convolution.scale["params/torso/norm_0/scale"], [0, 1])
    assert set(dense.scale) == {"params/hidden/norm_0/scale"} and "reduce_sum mixes it" in dense.reason


def test_the_graph_keeps_the_backward_slope_of_helu():
    module = critic_network(configured(helu(alpha=0.3), SAC(hidden=(6, 5))), 2)
    inputs = jnp.ones((3, 4)) * jnp.array([[0.1], [-0.2], [0.3]]), jnp.full((3, 2), 0.2)
    params = drawn(module, *inputs)
    graph = layer_graph(module.apply, params, *inputs)
    gradients = jax.jit(lambda params: activation_gradients(graph, jnp.sum, params, *inputs))(params)
    numbers = jax.tree.map(np.asarray, params["params"])
    first, second, head = numbers["hidden"]["dense_0"], numbers["hidden"]["dense_1"], numbers["head"]
    x = np.concatenate(inputs, axis=1)
    below = 0
    for member in range(2):
        h = np.maximum(x @ first["kernel"][member] + first["bias"][member], 0)
        z = h @ second["kernel"][member] + second["bias"][member]
        below += np.sum((z > -0.3) & (z <= 0))
        expected = ((z > -0.3) * head["kernel"][member][:, 0]) @ second["kernel"][member].T
        np.testing.assert_allclose(gradients["hidden/dense_0"][:, member], expected, rtol=1e-5, atol=1e-6)
    assert below > 0  # where ReLU has no slope


def test_no_unit_of_fourier_networks_is_recycled():
    module, params, inputs = case("fourier", "minatar")
    with pytest.raises(InterventionError, match=r"redo: no unit may be recycled .*may make it other than zero"):
        intervene(redo(), Learner(params, None, ()), module.apply, inputs, jax.random.key(0))


# ---- Gradient steps


def batch_of(observation, action):
    rng = np.random.default_rng(0)
    size = len(observation)
    reward, discount, weight = rng.normal(size=size).astype(np.float32), np.full(size, 0.9, np.float32), np.ones(size)
    following = rng.permutation(observation.ravel()).reshape(observation.shape)
    return Batch(observation, action, reward, discount, following, weight.astype(np.float32))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("agent", ["dqn", "sac"])
def test_a_gradient_step_moves_every_kernel(agent, method):
    rng = np.random.default_rng(0)
    if agent == "dqn":
        config = DQN(hidden=(6,), width=0.2, learning_rate=0.01)
        spec, action = PLANES, np.arange(4, dtype=np.int32) % 3
    else:
        config, spec, action = SAC(hidden=(6, 4)), CONTROL, rng.uniform(-1, 1, (4, 2)).astype(np.float32)
    observation = rng.normal(size=(4, *spec.observation_shape)).astype(np.float32)
    built = configured(METHODS[method], config).build(spec)

    def drawn_state(path, form):
        if "opt_state" in jax.tree_util.keystr(path) or form.dtype == jnp.int32:
            return jnp.zeros(form.shape, form.dtype)
        return jnp.asarray(0.5 * rng.normal(size=form.shape), form.dtype)

    key = jax.random.key(0)
    before = jax.tree_util.tree_map_with_path(drawn_state, jax.eval_shape(built.init, key))
    update = jax.jit(built.update, compiler_options=FAST)
    after, metrics, priorities = update(before, batch_of(observation, action), key)
    for name in set(built.networks) - {"temperature"}:
        old, new = getattr(before, name).params, getattr(after, name).params
        for (path, was), now in zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True):
            assert np.all(np.isfinite(now)), path
            assert "kernel" not in jax.tree_util.keystr(path) or np.any(was != now), path
    assert all(np.isfinite(value) for value in metrics.values()) and np.all(np.isfinite(priorities))
