"""Norms of weights, gradients and features, and how far weights have moved."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .dormancy import named_leaves, unit_shape
from .layers import LayerGraph

PyTree = Any


def weight_norm(params: PyTree, *, rms: bool = False) -> jax.Array:
    """Euclidean norm of all entries; rms: over the root of their number. -> ()."""
    return weight_distance(params, None, rms=rms)


def weight_norms(params: PyTree) -> dict[str, jax.Array]:
    """Frobenius norm of every array of the parameters: "hidden/kernel" -> (). An ensemble's members count as one."""
    return {
        name.removeprefix("params/"): jnp.linalg.norm(_wide(leaf).ravel())
        for name, leaf in named_leaves(params).items()
    }


def weight_distance(params: PyTree, reference: PyTree, *, rms: bool = False) -> jax.Array:
    """Euclidean distance of the parameters from others, their initial or earlier ones. -> ().

    rms: over the root of their number. A reference of None is the origin.
    """
    params = jax.tree.map(_wide, params)
    leaves = jax.tree.leaves(params if reference is None else jax.tree.map(jnp.subtract, params, reference))
    squares = sum((jnp.square(leaf).sum() for leaf in leaves), jnp.zeros(()))
    return jnp.sqrt(squares / sum(leaf.size for leaf in leaves) if rms else squares)


def grad_norm(gradients: PyTree) -> jax.Array:
    """Euclidean norm of all entries of a gradient, before any clipping where it is given as computed. -> ()."""
    return weight_norm(gradients)


def gradient_spikes(gradients: PyTree, second_moments: PyTree, theta: float = 5000.0) -> jax.Array:
    """Share of entries whose squared gradient exceeds theta times Adam's second moment; Huang et al. (2025, arXiv 2501.06842, SPAM).

    second_moments: as Adam keeps them, not corrected for bias. -> () in [0, 1]. An entry with no moment yet that gets a
    gradient counts.
    """
    spikes = jax.tree.map(lambda g, v: jnp.square(g) > theta * v, gradients, second_moments)
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(spikes)]).mean()


def feature_norm(activations: Mapping[str, jax.Array], graph: LayerGraph | None = None) -> dict[str, jax.Array]:
    """Mean over examples of the Euclidean norm of a layer's activations.

    activations: as in `dormancy` -> name -> (). Places belong to the vector; members of an ensemble are averaged.
    """
    norms = {}
    for name, values in activations.items():
        vectors = _wide(values).reshape(len(values), -1, *unit_shape(name, values, graph))
        norms[name] = jnp.sqrt(jnp.square(vectors).sum(axis=(1, -1))).mean()
    return norms


def _wide(values: jax.Array) -> jax.Array:
    """In float32 or better: squares of halves are soon infinite."""
    return jnp.asarray(values, jnp.promote_types(jnp.result_type(values), jnp.float32))
