"""Trees over slots whose nodes hold the sum, or the minimum, of what is below them; drawing in proportion to a sum.

A tree is a tuple of levels, the leaves first: level l is [n_l, ...] with node i over nodes FAN_OUT * i .. of level
l - 1. A node that is written is computed anew from all its children, never by adding a difference: rounding does not
build up, however many writes there are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

FAN_OUT = 16  # children of a node: as single-precision numbers they fill one cache line

Tree = tuple[jax.Array, ...]
Reduce = Callable[..., jax.Array]  # (nodes, axis) -> without that axis, such as jnp.sum


def build(leaves: jax.Array, reduce: Reduce, fill: jax.Array | float) -> Tree:
    """The tree over `leaves` [N, ...]; `fill` [...] is neutral to `reduce`. Levels are padded to multiples of FAN_OUT."""
    levels = []
    while True:
        levels.append(_padded(leaves, fill))
        if len(leaves) <= FAN_OUT:
            return tuple(levels)
        leaves = reduce(_children(levels[-1]), axis=1)


def empty(shape: tuple[int, ...], fill: jax.Array | float) -> Tree:
    """The tree over leaves [N, ...] that are all `fill`, without the reductions, which XLA would spend minutes folding."""
    levels = [jnp.broadcast_to(fill, (shape[0] + -shape[0] % FAN_OUT, *shape[1:])).astype(float)]
    while len(levels[-1]) > FAN_OUT:
        nodes = len(levels[-1]) // FAN_OUT
        levels.append(jnp.broadcast_to(fill, (nodes + -nodes % FAN_OUT, *shape[1:])).astype(float))
    return tuple(levels)


def write(tree: Tree, slots: jax.Array, values: jax.Array, reduce: Reduce) -> Tree:
    """Leaves `slots` [B] set to `values` [B, ...]; negative slots are skipped. Equal slots must bring equal values."""
    levels: list[jax.Array] = []
    for level in tree:
        nodes = jnp.where(slots >= 0, slots // FAN_OUT ** len(levels), len(level))  # out of bounds: not written
        if levels:
            values = reduce(_children(levels[-1]).at[nodes].get(mode="clip"), axis=1)
        levels.append(level.at[nodes].set(values.astype(level.dtype), mode="drop"))
    return tuple(levels)


def draw(key: jax.Array, tree: Tree, fraction: jax.Array, column: int | None = None) -> jax.Array:
    """[B] int32: the leaves of a tree of sums at which the sum of all up to and including them exceeds this `fraction`.

    fraction: [B] in [0, 1) of the whole sum. column: which one, where leaves are [N, F]. A leaf that is 0 is never the
        result; where all are, the result may lie in the padding.

    Going down, a fraction keeps ever fewer of its random bits, so those lost at a level are drawn anew: the chances of a
    leaf are exact to rounding however many leaves there are, where 24 bits alone would be wrong by several percent at 1e6.
    """
    spacing = float(np.finfo(fraction.dtype).eps)
    fresh = jax.random.uniform(key, (len(tree), *fraction.shape), fraction.dtype)
    nodes = jnp.zeros(fraction.shape, jnp.int32)
    for level, low_bits in zip(reversed(tree), fresh, strict=True):
        children = _children(level)[nodes]
        if column is not None:
            children = children[..., column]
        # One after the other, so that a child of 0 adds nothing and no rounding can let it be chosen.
        ends = [children[:, 0]]
        for index in range(1, FAN_OUT):
            ends.append(ends[-1] + children[:, index])
        sought = fraction * ends[-1]
        child = jnp.minimum(sum((end <= sought).astype(jnp.int32) for end in ends), FAN_OUT - 1)
        below = jnp.where(jnp.arange(FAN_OUT)[None] < child[:, None], children, 0).sum(axis=1)
        own = jnp.take_along_axis(children, child[:, None], axis=1)[:, 0]
        fraction = jnp.clip((sought - below + low_bits * spacing * ends[-1]) / own, 0, 1 - spacing)
        nodes = nodes * FAN_OUT + child
    return nodes


def stratified(key: jax.Array, batch_size: int) -> jax.Array:
    """[B] fractions, one uniformly random in each of B equal parts of [0, 1)."""
    return (jnp.arange(batch_size) + jax.random.uniform(key, (batch_size,))) / batch_size


def _padded(leaves: jax.Array, fill: jax.Array | float) -> jax.Array:
    missing = jnp.broadcast_to(fill, (-len(leaves) % FAN_OUT, *leaves.shape[1:]))
    return jnp.concatenate([leaves, missing.astype(leaves.dtype)])


def _children(level: jax.Array) -> jax.Array:
    return level.reshape(-1, FAN_OUT, *level.shape[1:])
