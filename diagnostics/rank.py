"""Ranks of feature matrices [..., n, d]: n examples, d features; one singular value decomposition each.

Where features are NaN the ranks that are whole numbers are 0; `measure` says NaN.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from .dormancy import unit_shape
from .layers import LayerGraph


def effective_rank(features: jax.Array, *, centred: bool = False) -> jax.Array:
    """exp of the entropy of s / sum(s), s the singular values; Roy & Vetterli (2007). [..., n, d] -> [...].

    centred: of the features less their mean over examples. In [1, min(n, d)], or 0 for a matrix of zeros.
    """
    return effective_rank_of(singular_values(features - features.mean(axis=-2, keepdims=True) if centred else features))


def effective_rank_of(s: jax.Array) -> jax.Array:
    """`effective_rank` of a matrix with the singular values s, [..., k] -> [...]."""
    total = s.sum(axis=-1, keepdims=True)  # NaN stays NaN
    p = s / jnp.where(total == 0, 1, total)
    entropy = -(p * jnp.log(jnp.where(p > 0, p, 1))).sum(axis=-1)
    return jnp.where(total[..., 0] == 0, 0, jnp.exp(entropy))


def srank(features: jax.Array, delta: float = 0.01) -> jax.Array:
    """Smallest k whose largest k singular values hold 1 - delta of their sum; Kumar et al. (2021, arXiv 2010.14498).

    [..., n, d] -> [...] int32 in [0, min(n, d)], 0 for a matrix of zeros. Give n >= d, or the rank is that of the sample.
    """
    return leading(singular_values(features), delta)


def approximate_rank(features: jax.Array, delta: float = 0.01) -> jax.Array:
    """As srank, but of the squared singular values (variance explained); Yang et al. (2020, arXiv 1909.12255).

    [..., n, d] -> [...] int32.
    """
    return leading(jnp.square(singular_values(features)), delta)


def stable_rank(features: jax.Array) -> jax.Array:
    """Squared Frobenius norm over squared spectral norm; Rudelson & Vershynin (2007). [..., n, d] -> [...].

    In [1, min(n, d)], or 0 for a matrix of zeros. Plasticine gives this name to what is srank here.
    """
    return stable_rank_of(singular_values(features))


def stable_rank_of(s: jax.Array) -> jax.Array:
    """`stable_rank` of a matrix with the singular values s, largest first, [..., k] -> [...]."""
    squares = jnp.square(s)
    return squares.sum(axis=-1) / jnp.where(squares[..., 0] > 0, squares[..., 0], 1)


def feature_rank(features: jax.Array, epsilon: float = 0.01) -> jax.Array:
    """Number of singular values of features / sqrt(n) above epsilon; Lyle et al. (2022, arXiv 2204.09560).

    [..., n, d] -> [...] int32. It grows with the scale of the features.
    """
    return jnp.sum(singular_values(features) / features.shape[-2] ** 0.5 > epsilon, axis=-1, dtype=jnp.int32)


def feature_matrix(activations: Mapping[str, jax.Array], graph: LayerGraph, name: str | None = None) -> jax.Array:
    """Activations of one layer, by default the last computed, as features: [n, d], or [members, n, d] of an ensemble.

    activations: as in `dormancy`. The places of a convolution are features.
    """
    name = graph.layers[-1].name if name is None else name
    values = activations[name]
    *members, units = unit_shape(name, values, graph)
    by_member = values.reshape(len(values), -1, *members, units)
    axes = range(2, 2 + len(members))
    return by_member.transpose(*axes, 0, 1, by_member.ndim - 1).reshape(*members, len(values), -1)


def singular_values(matrix: jax.Array) -> jax.Array:
    """Largest first, in float32 or better."""
    values = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    return jnp.linalg.svd(values, compute_uv=False)


def leading(values: jax.Array, delta: float = 0.01) -> jax.Array:
    """How many of the first values hold 1 - delta of the sum."""
    total = values.sum(axis=-1, keepdims=True)
    below = (jnp.cumsum(values, axis=-1) < (1 - delta) * total).sum(axis=-1, dtype=jnp.int32)
    return jnp.where(total[..., 0] > 0, jnp.minimum(below + 1, values.shape[-1]), 0)
