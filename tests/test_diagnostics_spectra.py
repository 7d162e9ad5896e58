"""Ranks, the neural tangent kernel and sharpness: closed cases, NumPy's decompositions and explicit matrices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose, assert_array_equal

from resprout.diagnostics import (
    Probe,
    approximate_rank,
    effective_rank,
    feature_matrix,
    feature_rank,
    layer_graph,
    measure,
    ntk,
    ntk_rank,
    sharpness,
    srank,
    stable_rank,
)

RANKS = [effective_rank, srank, approximate_rank, stable_rank, feature_rank]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def with_singular_values(*values, n=12, seed=0):
    """A matrix [n, len(values)] that has them."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(n, len(values))))[0]
    right = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    return jnp.asarray(left * np.array(values) @ right, jnp.float32)


def test_products_of_a_measured_network_keep_all_bits_of_float32():
    """Where a device would round them: what a program asks for, as CPUs round none."""
    kernels = [normal(6, 8), normal(8, 4)]

    def apply(kernels, x):
        return jnp.maximum(x @ kernels[0], 0) @ kernels[1]

    def look(kernels, x):
        probe = Probe(apply, kernels, (x,), loss=lambda outputs: (outputs**2).sum(), key=jax.random.key(0))
        return measure(probe, ("effective_rank", "ntk_rank", "sharpness"))

    program = str(jax.make_jaxpr(look)(kernels, normal(5, 6)))
    products = program.count("dot_general[")
    assert products > 2 and program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


# ---- Ranks


@pytest.mark.parametrize("rank", RANKS)
def test_closed_cases(rank):
    rank = jax.jit(rank)
    assert rank(jnp.zeros((5, 5))) == 0
    assert_allclose(rank(jnp.eye(5)), 5, rtol=1e-5)
    assert_allclose(rank(jnp.outer(jnp.arange(1.0, 6), jnp.arange(1.0, 6))), 1, rtol=1e-4)


def test_each_rank_by_hand():
    features = with_singular_values(8, 4, 3, 0.1)
    assert_allclose(stable_rank(features), (64 + 16 + 9 + 0.01) / 64, rtol=1e-5)
    assert srank(features) == 3  # 15 / 15.1 is above 0.99
    assert srank(features, delta=0.25) == 2  # 12 / 15.1
    assert srank(features, delta=0.001) == 4
    assert approximate_rank(features, delta=0.25) == 2  # 80 / 89.01
    assert approximate_rank(features, delta=0.3) == 1 and srank(features, delta=0.3) == 2  # 64 / 89.01, 8 / 15.1
    assert feature_rank(features) == 4  # 0.1 / sqrt(12) is 0.029
    assert feature_rank(features, epsilon=0.03) == 3
    assert feature_rank(features * 100, epsilon=0.03) == 4
    p = np.array([8, 4, 3, 0.1]) / 15.1
    assert_allclose(effective_rank(features), np.exp(-(p * np.log(p)).sum()), rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(9, 4), (4, 9), (6, 6), (1, 3)]))
def test_ranks_equal_numpy(seed, shape):
    matrix = np.random.default_rng(seed).normal(size=shape)
    s = np.linalg.svd(matrix, compute_uv=False)
    features = jnp.asarray(matrix, jnp.float32)
    entropy = -sum(v / s.sum() * np.log(v / s.sum()) for v in s)
    assert_allclose(effective_rank(features), np.exp(entropy), rtol=1e-4)
    assert_allclose(stable_rank(features), np.linalg.norm(matrix) ** 2 / s[0] ** 2, rtol=1e-4)
    for rank, values in ((srank, s), (approximate_rank, s**2)):
        shares = np.cumsum(values) / values.sum()
        if np.abs(shares - 0.9).min() > 1e-5:
            assert rank(features, delta=0.1) == np.argmax(shares >= 0.9) + 1
    assert feature_rank(features, epsilon=0.5) == (np.linalg.svd(matrix / np.sqrt(len(matrix)))[1] > 0.5).sum()


def test_centred_effective_rank():
    features = normal(20, 4) + 100
    assert effective_rank(features) < 1.3
    assert_allclose(
        effective_rank(features, centred=True), effective_rank(features - features.mean(0)[None]), rtol=1e-5
    )
    assert effective_rank(features, centred=True) > 3
    assert effective_rank(jnp.ones((5, 3)), centred=True) == 0


def test_ranks_of_members():
    features = jnp.stack([normal(7, 4), jnp.eye(7, 4), jnp.zeros((7, 4))])

    def every(features):
        return [rank(features) for rank in RANKS]

    each = [jax.jit(every)(matrix) for matrix in features]
    for several in (jax.jit(every)(features), jax.jit(jax.vmap(every))(features)):
        assert_allclose(np.stack(several, axis=1), each, rtol=1e-5)


@pytest.mark.parametrize("rank", [effective_rank, partial(effective_rank, centred=True), stable_rank])
def test_gradients_of_ranks(rank):
    features, direction = normal(6, 3), normal(6, 3, seed=1)
    slopes, rank, step = jax.jit(jax.grad(rank)), jax.jit(rank), 1e-2
    slope = (slopes(features) * direction).sum()
    assert_allclose(
        slope, (rank(features + step * direction) - rank(features - step * direction)) / (2 * step), rtol=0.02
    )
    for singular in (jnp.zeros((6, 3)), jnp.ones((6, 3)), jnp.eye(6, 3)):
        assert np.isfinite(slopes(singular)).all()


def test_feature_matrix():
    def network(params, images):
        x = jax.lax.conv(images, params["torso"], (1, 1), "VALID").reshape(len(images), -1)
        return jnp.tanh(x @ params["hidden"]) @ params["head"]

    images = normal(4, 1, 3, 3)
    params = {"torso": normal(3, 1, 2, 2), "hidden": normal(12, 5), "head": normal(5, 1)}
    graph = layer_graph(network, params, images)
    activations = jax.jit(graph.activations)(params, images)  # its names come back sorted: torso last
    assert_array_equal(feature_matrix(activations, graph), activations["hidden"])
    assert_array_equal(feature_matrix(activations, graph, "torso"), activations["torso"].reshape(4, 2 * 2 * 3))

    def critic(params, x):
        return jax.vmap(lambda first, second: jnp.tanh(x @ first) @ second)(*params)

    params, x = (normal(2, 6, 5), normal(2, 5, 1)), normal(4, 6)
    graph = layer_graph(critic, params, x)
    features = feature_matrix(jax.jit(graph.activations)(params, x), graph)
    assert_allclose(features, np.tanh(np.asarray(x) @ np.asarray(params[0])), rtol=1e-5)


# ---- Neural tangent kernel


def test_kernel_of_a_linear_model():
    x, params = normal(5, 3), {"kernel": normal(3, 2), "bias": normal(2)}
    kernel = jax.jit(partial(ntk, lambda p, x: x @ p["kernel"] + p["bias"][None]))(params, x)
    expected = np.kron(x @ x.T + 1, np.eye(2))  # outputs of one example together, independent of each other
    assert_allclose(kernel, expected, rtol=1e-5, atol=1e-5)
    rank = partial(ntk_rank, lambda p, x: x @ p["kernel"], rank=partial(srank, delta=1e-4))
    assert jax.jit(rank)(params, x) == 3 * 2


def test_kernel_equals_explicit_jacobians():
    def critic(params, observation, action):
        x = jnp.concatenate([observation, action], axis=-1)
        return jax.vmap(lambda first, second: (jnp.tanh(x @ first) @ second)[:, 0])(*params)  # [members, B]

    params, observation, action = (normal(2, 5, 4), normal(2, 4, 1)), normal(6, 3), normal(6, 2, seed=1)
    jacobians = jax.jit(jax.jacfwd(critic))(params, observation, action)
    matrix = np.concatenate([np.asarray(j).reshape(2, 6, -1) for j in jacobians], axis=-1)
    matrix = matrix.transpose(1, 0, 2).reshape(12, -1)
    kernel = jax.jit(partial(ntk, critic))(params, observation, action)
    assert_allclose(kernel, matrix @ matrix.T, rtol=1e-4, atol=1e-5)


def test_kernel_of_equal_examples_has_rank_one():
    rank = jax.jit(partial(ntk_rank, lambda p, x: jnp.tanh(x @ p).sum(-1)))
    assert rank(normal(3, 5), jnp.ones((4, 3))) == 1


# ---- Sharpness


@jax.jit
def sharpness_of_quadratic(hessian, params, key):
    def loss(params):
        vector = ravel_pytree(params)[0]
        return 0.5 * vector @ hessian @ vector

    return sharpness(loss, params, key)


@pytest.mark.parametrize(
    "eigenvalues",
    [
        np.linspace(0.1, 7, 9),
        [5, -9, 1, 1, 1, 1, 1, 1, 0],  # a larger negative one
        [-1, -2, -3, -4, -5, -6, -7, -8, -9],
        [3] * 9,  # the first step finds them all
        [-3] * 9,
        [0] * 9,
    ],
)
def test_sharpness_of_quadratics(eigenvalues):
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0]
    hessian = jnp.asarray(basis * np.array(eigenvalues) @ basis.T, jnp.float32)
    value = sharpness_of_quadratic(hessian, {"a": normal(2, 3), "b": normal(3, seed=1)}, jax.random.key(0))
    assert_allclose(value, max(eigenvalues), rtol=1e-4, atol=1e-4)


def test_sharpness_of_a_network_in_few_iterations():
    x, y = normal(32, 4), normal(32, 1, seed=1)

    def loss(params):
        return jnp.square(jnp.tanh(x @ params[0]) @ params[1] - y).mean()

    params = normal(4, 16), normal(16, 1)
    flat, unravel = ravel_pytree(params)
    expected = np.linalg.eigvalsh(jax.jit(jax.hessian(lambda v: loss(unravel(v))))(flat))[-1]
    keys = jax.random.split(jax.random.key(2), 3)
    assert_allclose(jax.jit(jax.vmap(partial(sharpness, loss, params)))(keys), np.full(3, expected), rtol=1e-3)
