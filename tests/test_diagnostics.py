"""Dormancy in its public meanings, active units, norms and churn: tables by hand, and NumPy beside them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from resprout.diagnostics import (
    action_churn,
    activation_gradients,
    active_units,
    dormancy,
    dormancy_name,
    dormant_fraction,
    dormant_units,
    feature_norm,
    gaussian_churn,
    grad_norm,
    gradient_dormancy,
    gradient_scores,
    gradient_spikes,
    layer_graph,
    persistent_dormancy,
    policy_churn,
    unit_scores,
    unit_utilities,
    value_churn,
    weight_distance,
    weight_norm,
    weight_norms,
)


def array(*rows):
    return jnp.asarray(rows, jnp.float32)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Net(nn.Module):
    """Convolution, dense hidden layers, and a head."""

    hidden: tuple[int, ...] = (6,)
    conv: bool = False

    @nn.compact
    def __call__(self, x):
        if self.conv:
            x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        x = x.reshape(len(x), -1)
        for index, size in enumerate(self.hidden):
            x = nn.relu(nn.Dense(size, name=f"dense_{index}")(x))
        return nn.Dense(3, name="head")(x)


class Critic(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="head")(nn.relu(nn.Dense(5, name="dense")(x)))


Twins = nn.vmap(Critic, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2)


def drawn(network, x, seed=0):
    """A network's function, its parameters with every entry drawn, and its graph."""
    rng = np.random.default_rng(seed)
    params = jax.eval_shape(network.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    return params, layer_graph(network.apply, params, x)


# ---- Scores and dormant units


def test_score_by_hand():
    scores = unit_scores({"layer": array([2, 0, 0.1], [4, 0, 0.3])})
    assert_allclose(scores["layer"], [2.8125, 0, 0.1875], rtol=1e-6)
    for tau, expected in [(0, [0, 1, 0]), (0.1, [0, 1, 0]), (0.2, [0, 1, 1])]:
        assert_array_equal(dormant_units(scores, tau)["layer"], expected)


def test_threshold_is_dormant_unless_strict():
    scores = unit_scores({"layer": array([7, 0.5, 0.5, 0])})
    assert_array_equal(scores["layer"], array(3.5, 0.25, 0.25, 0))
    assert_array_equal(dormant_units(scores, 0.25)["layer"], [0, 1, 1, 1])
    assert_array_equal(dormant_units(scores, 0.25, strict=True)["layer"], [0, 0, 0, 1])


def test_convolution_averages_places_and_magnitudes():
    channels = jnp.stack([jnp.ones((2, 2)), array([0, 2], [0, 0])], axis=-1)[None]
    assert_allclose(unit_scores({"conv": channels})["conv"], [4 / 3, 2 / 3], rtol=1e-6)
    leaky = array([-0.01, 1], [0.01, -1])
    assert_allclose(unit_scores({"layer": leaky})["layer"], [0.02 / 1.01, 2 / 1.01], rtol=1e-6)


def test_silent_layer_is_dormant_and_not_a_number_nowhere():
    silent = {"layer": jnp.zeros((4, 3))}
    scores = unit_scores(silent)
    assert_array_equal(scores["layer"], jnp.zeros(3))
    assert dormancy(silent, 0.0) == 1
    assert dormancy(silent, 0.1, strict=True) == 0  # as DrM's and ACE's code: 0 < 0.1 * 0
    assert not jnp.isnan(jax.grad(lambda h: unit_scores({"layer": h}, epsilon=0)["layer"].sum())(silent["layer"])).any()


def test_what_is_not_a_number_is_no_dormant_unit():
    """Not of its whole layer either: a mean that is NaN tells nothing of anyone."""
    broken = {"layer": jnp.ones((4, 8)).at[1, 2].set(jnp.nan)}
    assert np.isnan(unit_scores(broken)["layer"]).all()
    assert not any(leaf.any() for leaf in dormant_units(unit_scores(broken), 0.0).values())


def test_epsilon_hides_small_activations_but_not_gradients():
    tiny = {"layer": array([1e-12, 3e-12])}
    assert (unit_scores(tiny)["layer"] < 0.01).all()
    assert_allclose(unit_scores(tiny, epsilon=0)["layer"], [0.5, 1.5], rtol=1e-6)


def test_negative_tau():
    with pytest.raises(ValueError, match=r"^tau must be zero or more, not -0\.1$"):
        dormant_units({"layer": jnp.ones(3)}, -0.1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 3), (5, 7)]), st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_fractions_equal_numpy(seed, shape, tau):
    rng, (batch, units) = np.random.default_rng(seed), shape
    dense = rng.normal(size=(batch, units)).astype(np.float32) * rng.integers(0, 2, units).astype(np.float32)
    conv = np.maximum(rng.normal(size=(batch, 2, 3, 4)), 0.5).astype(np.float32) - 0.5
    activations = {"dense": jnp.asarray(dense), "conv": jnp.asarray(conv)}
    means = [np.abs(dense).mean(0), np.abs(conv).mean((0, 1, 2))]
    dormant = [m / (m.mean() + 1e-9) <= tau for m in means]
    assume(not any(np.isclose(m, tau * m.mean(), rtol=1e-5, atol=0).any() for m in means if tau and m.any()))
    assert_allclose(dormancy(activations, tau), np.concatenate(dormant).mean(), rtol=1e-6)
    assert_allclose(dormancy(activations, tau, aggregate="mean"), np.mean([d.mean() for d in dormant]), rtol=1e-6)
    positive = [dense > 0, conv > 0]
    assert_allclose(
        active_units(activations), (positive[0].mean() * units + positive[1].mean() * 4) / (units + 4), atol=1e-6
    )
    values = np.concatenate([p.ravel() for p in positive])
    assert_allclose(active_units(activations, weights="values"), values.mean(), atol=1e-6)


# ---- The public meanings of dormancy


def test_members_are_scored_by_themselves_or_stacked():
    params, graph = drawn(Twins(), normal(16, 4))
    bias = params["params"]["dense"]["bias"].at[0, :3].set(-1e3).at[1, 2:].set(-1e3)
    params["params"]["dense"]["bias"] = bias
    activations = graph.activations(params, normal(16, 4))
    scores = unit_scores(activations, graph)
    assert_allclose(scores["dense"].mean(axis=-1), [1, 1], rtol=1e-6)
    assert_array_equal(dormant_units(scores, 0)["dense"], [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    assert dormancy(activations, 0, graph) == pytest.approx(0.6)
    assert dormancy(activations, 0) == pytest.approx(0.2)  # SimBa: only the unit dormant in both


def test_pooled_units_or_mean_of_layers():
    activations = {"small": array([1, 0]), "large": jnp.ones((1, 8))}
    assert dormancy(activations, 0) == pytest.approx(1 / 10)
    assert dormancy(activations, 0, aggregate="mean") == pytest.approx(1 / 4)


def test_drm_reads_hidden_layers_after_relu_and_the_output_layer():
    network, x, silenced = Net((1024,)), normal(64, 8), 300
    params, graph = drawn(network, x)
    params["params"]["dense_0"]["bias"] = jnp.zeros(1024).at[:silenced].set(-1e6)
    linear = graph.activations(params, x) | {"head": network.apply(params, x)}
    assert_allclose(dormancy(linear, 0.025, strict=True) * (1024 + 3), silenced, rtol=1e-6)
    before = x @ params["params"]["dense_0"]["kernel"] + params["params"]["dense_0"]["bias"][None]
    assert dormancy({"dense_0": before}, 0.025, strict=True) * 1024 == 1024 - silenced  # all but those, before ReLU


def test_gradient_dormancy_is_of_every_dense_layer():
    network, x = Net((6, 5)), normal(32, 4)
    params, graph = drawn(network, x)
    params["params"]["dense_0"]["bias"] = jnp.full(6, 2.0).at[:2].set(-1e3)
    params["params"]["dense_1"]["bias"] = jnp.full(5, 20.0)

    def loss(params):
        return jnp.square(network.apply(params, x)[:, :2]).mean()  # the third output has no gradient

    gradients = jax.jit(jax.grad(loss))(params)
    scores = gradient_scores(graph, gradients)
    assert list(scores) == ["dense_0", "dense_1", "head"]
    for name, score in scores.items():
        norms = np.linalg.norm(gradients["params"][name]["kernel"], axis=0)
        assert_allclose(score, norms / norms.mean(), rtol=1e-5)
    assert_array_equal(dormant_units(scores, 1e-6)["dense_0"], [1, 1, 0, 0, 0, 0])
    assert_array_equal(dormant_units(scores, 1e-6)["head"], [0, 0, 1])
    assert_allclose(gradient_dormancy(graph, gradients, 1e-6), 3 / (6 + 5 + 3), rtol=1e-6)
    nothing = jax.tree.map(jnp.zeros_like, gradients)
    assert gradient_dormancy(graph, nothing) == 1
    assert gradient_dormancy(graph, nothing, strict=True) == 0
    scaled = jax.tree.map(lambda g: g * 1e-12, gradients)
    assert_allclose(gradient_scores(graph, scaled)["dense_1"], scores["dense_1"], rtol=1e-4)


def test_gradient_scores_of_ensembles_and_convolutions():
    x = normal(16, 4)
    params, graph = drawn(Twins(), x)
    gradients = jax.tree.map(lambda p: normal(*p.shape, seed=p.size), params)
    scores = gradient_scores(graph, gradients)
    for name in ("dense", "head"):
        norms = np.linalg.norm(gradients["params"][name]["kernel"], axis=1)
        assert_allclose(scores[name], norms / norms.mean(axis=-1, keepdims=True), rtol=1e-5)
    images = normal(2, 5, 5, 2)
    params, graph = drawn(Net(conv=True), images)
    gradients = jax.tree.map(lambda p: normal(*p.shape, seed=p.size), params)
    norms = np.sqrt(np.square(gradients["params"]["conv"]["kernel"]).sum((0, 1, 2)))
    assert_allclose(gradient_scores(graph, gradients)["conv"], norms / norms.mean(), rtol=1e-5)


def test_gradient_scores_of_a_convolution_that_makes_the_output():
    class Pixels(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(2, (1, 1), name="head")(nn.relu(nn.Conv(3, (3, 3), name="conv")(x)))

    params, graph = drawn(Pixels(), normal(2, 4, 4, 1))
    gradients = jax.tree.map(lambda p: normal(*p.shape, seed=p.size), params)
    norms = np.sqrt(np.square(gradients["params"]["head"]["kernel"]).sum((0, 1, 2)))
    assert_allclose(gradient_scores(graph, gradients)["head"], norms / norms.mean(), rtol=1e-5)


def test_names_say_the_definition():
    assert dormancy_name(tau=0) == "dormant/post/tau0"
    assert dormancy_name() == "dormant/post/tau0.1"
    assert dormancy_name(stacked=True) == "dormant/post/stacked/tau0.1"
    assert dormancy_name(aggregate="mean") == "dormant/post/mean/tau0.1"
    assert dormancy_name("linear", 0.025, strict=True) == "dormant/linear/strict/tau0.025"
    assert dormancy_name("grad", 0.05) == "dormant/grad/tau0.05"


# ---- Gradients by activations, utility


@pytest.mark.parametrize("conv", [False, True])
def test_activation_gradients_are_those_of_each_example(conv):
    network, x = Net(conv=conv), normal(4, 5, 5, 2)
    params, graph = drawn(network, x)
    gradients = activation_gradients(graph, lambda q: jnp.square(q).sum(), params, x)
    hidden = graph.activations(params, x)["dense_0"]
    head = params["params"]["head"]
    outputs = hidden @ head["kernel"] + head["bias"][None]
    assert_allclose(gradients["dense_0"], 2 * outputs @ head["kernel"].T, rtol=1e-4, atol=1e-4)
    assert {n: g.shape for n, g in gradients.items()} == {n: h.shape for n, h in graph.activations(params, x).items()}
    assert_allclose(
        unit_scores(gradients, graph)["dense_0"],
        np.abs(gradients["dense_0"]).mean(0) / np.abs(gradients["dense_0"]).mean(),
        rtol=1e-5,
    )


def test_utility_of_dense_and_convolution():
    x = normal(8, 3, 3, 2)
    network = Net((6,), conv=True)
    params, graph = drawn(network, x)
    weights = params["params"]
    activations = graph.activations(params, x)
    conv = np.asarray(activations["conv"]).reshape(-1, 4)
    outgoing = np.abs(weights["dense_0"]["kernel"]).reshape(3 * 3, 4, 6).sum((0, 2))  # channel-last flatten
    incoming = np.abs(weights["conv"]["kernel"]).sum((0, 1, 2))
    hidden = np.asarray(activations["dense_0"])
    utilities = unit_utilities(graph, params, activations)
    assert_allclose(utilities["conv"], np.abs(conv).mean(0) * outgoing, rtol=1e-5)
    assert_allclose(utilities["dense_0"], hidden.mean(0) * np.abs(weights["head"]["kernel"]).sum(1), rtol=1e-5)
    utilities = unit_utilities(graph, params, activations, centred=True, adaptive=True)
    assert_allclose(utilities["conv"], np.abs(conv - conv.mean(0)).mean(0) * outgoing / incoming, rtol=1e-5)


def test_utility_of_a_unit_without_weights():
    x = normal(8, 4)
    params, graph = drawn(Net(), x)
    params["params"]["dense_0"]["kernel"] = params["params"]["dense_0"]["kernel"].at[:, 0].set(0)
    utilities = unit_utilities(graph, params, graph.activations(params, x), adaptive=True)["dense_0"]
    assert utilities[0] == 0 and jnp.isfinite(utilities).all()


# ---- Persistence, active units


def test_persistent_dormancy_by_hand():
    earlier = {"a": jnp.array([True, True, True, False]), "b": jnp.array([[False], [True]])}
    later = {"b": jnp.array([[False], [True]]), "a": jnp.array([True, False, False, False])}
    assert persistent_dormancy(earlier, later) == 0.5
    assert persistent_dormancy(earlier, later, relative_to="smaller") == 1
    assert persistent_dormancy(later, earlier, relative_to="smaller") == 1
    none = jax.tree.map(jnp.zeros_like, earlier)
    assert persistent_dormancy(none, later) == 0
    assert persistent_dormancy(earlier, none, relative_to="smaller") == 0


@pytest.mark.parametrize(("bias", "expected"), [(1e3, 1.0), (-1e3, 0.0)])
def test_active_units_of_saturated_networks(bias, expected):
    x = normal(16, 5, 5, 2)
    params, graph = drawn(Net(conv=True), x)
    for layer in ("conv", "dense_0"):
        params["params"][layer]["bias"] = jnp.full_like(params["params"][layer]["bias"], bias)
    if expected:
        params["params"]["dense_0"]["kernel"] *= 0.0
    assert active_units(graph.activations(params, x), graph) == expected


def test_active_units_of_a_fresh_network_are_half():
    network, x = Net((256, 256)), normal(256, 8)
    params = jax.jit(network.init)(jax.random.key(0), x)
    graph = layer_graph(network.apply, params, x)
    assert active_units(jax.jit(graph.activations)(params, x)) == pytest.approx(0.5, abs=0.03)


def test_active_units_weigh_members():
    def network(params, x):
        encoder, critics = params
        x = jnp.maximum(x @ encoder, 0)
        return jax.vmap(lambda first, second: jnp.maximum(x @ first, 0) @ second)(*critics)

    params = normal(3, 4), (normal(2, 4, 5), normal(2, 5, 1))
    graph = layer_graph(network, params, normal(1, 3))
    activations = {"0": jnp.ones((1, 4)), "1/0": jnp.zeros((1, 2, 5))}
    assert_allclose(active_units(activations, graph), 4 / (4 + 2 * 5), rtol=1e-6)
    assert_allclose(active_units(activations), 4 / (4 + 5), rtol=1e-6)


def test_activations_of_another_shape():
    _, graph = drawn(Net(), normal(2, 4))
    with pytest.raises(ValueError, match=r"^the units of dense_0 have shape \(6,\), its values \(2, 7\)$"):
        unit_scores({"dense_0": jnp.ones((2, 7))}, graph)
    with pytest.raises(KeyError, match="no layer dense_9"):
        unit_scores({"dense_9": jnp.ones((2, 6))}, graph)


# ---- Norms


def test_norms_by_hand():
    params = {"params": {"a": {"kernel": array([3, 0], [0, 4])}, "b": jnp.asarray(12.0)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert weight_norm(params) == grad_norm(params) == 13
    assert weight_norm(params, rms=True) == pytest.approx(13 / math.sqrt(5))
    assert {name: float(norm) for name, norm in weight_norms(params).items()} == {"a/kernel": 5, "b": 12}
    assert weight_distance(params, zeros) == 13
    assert weight_distance(params, params, rms=True) == 0
    assert weight_distance(params, jax.tree.map(jnp.ones_like, params)) == pytest.approx(
        math.sqrt(4 + 1 + 1 + 9 + 11**2)
    )


def test_feature_norm():
    assert_allclose(feature_norm({"layer": array([3, 4], [0, 1])})["layer"], 3)
    assert_allclose(feature_norm({"conv": jnp.ones((2, 9, 4))})["conv"], 6)
    x = normal(8, 4)
    params, graph = drawn(Twins(), x)
    values = graph.activations(params, x)
    expected = np.linalg.norm(values["dense"], axis=-1).mean()  # of each member
    assert_allclose(feature_norm(values, graph)["dense"], expected, rtol=1e-6)


def test_gradient_spikes_with_adam():
    params, tx = {"w": jnp.zeros(4)}, optax.adam(1e-3)
    _, state = tx.update({"w": jnp.ones(4)}, tx.init(params), params)
    moments = optax.tree.get(state, "nu")  # 0.001 each: a gradient above sqrt(5) is a spike
    assert gradient_spikes({"w": array(2.2, 2.3, -2.3, 0)}, moments) == 0.5
    assert gradient_spikes({"w": array(1, 0, 0, 0)}, tx.init(params)[0].nu) == 0.25


# ---- Churn


def test_churn_by_hand():
    before, after = array([1, 2], [3, 0], [1, 1], [0, 5]), array([2, 1], [4, 0], [1, 1], [0, 5])
    assert value_churn(before, after) == pytest.approx(3 / 8)
    assert policy_churn(before, after) == 0.25
    assert action_churn(array([0, 0], [1, 1]), array([3, 4], [1, 1])) == 2.5


def test_gaussian_churn_equals_quadrature():
    mean, log_std, mean_after, log_std_after = 0.3, -0.2, -0.1, 0.4
    x = np.linspace(-12, 12, 200_001)
    p, q = (
        np.exp(-0.5 * ((x - m) / np.exp(s)) ** 2 - s) / math.sqrt(2 * math.pi)
        for m, s in ((mean, log_std), (mean_after, log_std_after))
    )
    kl = (p * np.log(p / q)).sum() * (x[1] - x[0])
    arguments = [jnp.full((7, 2), value) for value in (mean, log_std, mean_after, log_std_after)]
    assert_allclose(gaussian_churn(*arguments), 2 * kl, rtol=1e-4)
    assert_allclose(gaussian_churn(*arguments[:2], *arguments[:2]), 0, atol=1e-7)


# ---- Transformations


def test_under_jit_grad_and_vmap():
    network, x = Net((6, 5)), normal(8, 4)
    params, graph = drawn(network, x)

    def diagnose(params):
        activations = graph.activations(params, x)
        gradients = activation_gradients(graph, lambda q: jnp.square(q).mean(), params, x)
        units = dormant_units(unit_scores(gradients, graph, epsilon=0), 0.5)
        return {
            "post": dormancy(activations, 0.5, graph),
            "unit_grad": dormant_fraction(units),
            "persistent": persistent_dormancy(units, units),
            "grad": gradient_dormancy(graph, params, 0.5),
            "fau": active_units(activations, graph),
            "utility": unit_utilities(graph, params, activations, centred=True, adaptive=True)["dense_1"].sum(),
            "feature_norm": feature_norm(activations)["dense_0"],
        }

    several = [jax.tree.map(lambda p, s=s: p * s + 0.1, params) for s in (1.0, -0.5, 2.0)]
    compiled, together = jax.jit(diagnose), jax.jit(jax.vmap(diagnose))
    stacked = together(jax.tree.map(lambda *leaves: jnp.stack(leaves), *several))
    for index, one in enumerate(several):
        for name, value in compiled(one).items():
            assert_allclose(stacked[name][index], value, rtol=1e-5, err_msg=name)
    slope = jax.jit(jax.grad(lambda p: unit_scores(graph.activations(p, x), graph)["dense_1"].max()))(params)
    assert jnp.isfinite(weight_norm(slope)) and weight_norm(slope) > 0
