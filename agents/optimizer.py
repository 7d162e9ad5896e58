"""Adam with a step count for each row and column of a kernel, so that a part of a network can start afresh."""

from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .learner import PyTree

Shape = tuple[int, ...]
Ages = tuple[jax.Array, ...]  # of one parameter: arrays that broadcast to it; the age of an entry is their minimum


class AdamState(NamedTuple):
    """As optax.ScaleByAdamState, with ages in place of its one count."""

    ages: jax.Array  # [N] int32: those of every parameter (`ages_of`) in one array, for each costs the loop some time
    mu: PyTree
    nu: PyTree


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Kingma & Ba (2015), algorithm 1, its bias correction by the age of each entry in gradient steps.

    While nothing starts afresh, all ages are optax.scale_by_adam's count and the updates are the same numbers. Where a
    row or a column does (`forget`), its entries take the steps of a new optimiser. Zeroing the moments under one old
    count makes these up to 6.6 times too long, zeroing the count under old moments all others as much too short.
    """

    def init(params: PyTree) -> AdamState:
        size = sum(prod(shape) for shapes in age_shapes(params) for shape in shapes)
        return AdamState(jnp.zeros(size, jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(gradient: PyTree, state: AdamState, params: PyTree = None) -> tuple[PyTree, AdamState]:
        mu = jax.tree.map(lambda g, m: (1 - b1) * g + b1 * m, gradient, state.mu)
        nu = jax.tree.map(lambda g, v: (1 - b2) * g**2 + b2 * v, gradient, state.nu)
        state = AdamState(optax.safe_increment(state.ages), mu, nu)

        def corrected(m: jax.Array, v: jax.Array, ages: Ages) -> jax.Array:
            # 1 - b^age grows with the age, so its minimum is that of the youngest.
            first, second = (_minimum([1 - b**age for age in ages]) for b in (b1, b2))
            return (m / first) / (jnp.sqrt(v / second) + eps)

        steps = map(corrected, jax.tree.leaves(mu), jax.tree.leaves(nu), ages_of(state))
        return jax.tree.unflatten(jax.tree.structure(mu), list(steps)), state

    return optax.GradientTransformation(init, update)


def adam(learning_rate: float, eps: float = 1e-8) -> optax.GradientTransformation:
    """optax.adam with ages."""
    return optax.chain(scale_by_adam(eps=eps), optax.scale_by_learning_rate(learning_rate))


def age_shapes(params: PyTree) -> list[tuple[Shape, ...]]:
    """Of the ages of each parameter: of the rows (inputs) and columns (units) of a kernel, of every entry of any other.

    A kernel is what flax calls so. A bias has no inputs, of an ensemble neither, where it is [members, units].
    """

    def shapes(path: tuple[Any, ...], leaf: Any) -> tuple[Shape, ...]:
        shape = jnp.shape(leaf)
        own = path[:-1] if path[-1:] == (jax.tree_util.GetAttrKey("value"),) else path  # of a variable of flax.nnx
        kernel = len(shape) > 1 and jax.tree_util.keystr(own[-1:], simple=True) == "kernel"
        return ((*shape[:-1], 1), (*shape[:-2], 1, shape[-1])) if kernel else (shape,)

    return [shapes(path, leaf) for path, leaf in jax.tree.leaves_with_path(params)]


def ages_of(state: AdamState) -> list[Ages]:
    """The ages of each parameter, in the order of the leaves."""
    shapes = age_shapes(state.mu)
    ends = np.cumsum([prod(shape) for group in shapes for shape in group])
    parts = iter(jnp.split(state.ages, ends[:-1].tolist()))
    return [tuple(next(parts).reshape(shape) for shape in group) for group in shapes]


def forget_ages(state: AdamState, mask: PyTree) -> AdamState:
    """Age 0 for the rows and columns of kernels that are masked whole, and for each entry of other parameters.

    mask: bool, the structure and shapes of the parameters. An entry of a kernel masked alone keeps its age: no row or
    column can hold it. The state may be that of a part of the parameters,
    as optax.masked has it.
    """
    masks = dict(jax.tree.leaves_with_path(mask))
    own = [masks[path] for path, _ in jax.tree.leaves_with_path(state.mu)]

    def forgotten(masked: jax.Array, age: jax.Array) -> jax.Array:
        axes = tuple(axis for axis, size in enumerate(age.shape) if size != masked.shape[axis])
        return jnp.where(masked.all(axis=axes, keepdims=True), 0, age).ravel()

    pairs = zip(own, ages_of(state), strict=True)
    return state._replace(ages=jnp.concatenate([forgotten(masked, age) for masked, ages in pairs for age in ages]))


def _minimum(values: list[jax.Array]) -> jax.Array:
    smallest = values[0]
    for value in values[1:]:
        smallest = jnp.minimum(smallest, value)
    return smallest
