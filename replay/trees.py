"""Trees over slots whose nodes hold the sum, or the minimum, of what is below them; drawing in proportion to a sum.

A tree is a tuple of levels, the leaves first: level l is [n_l, ...] with node i over nodes FAN_OUT * i .. of level
l - 1. A node that is written is computed anew from all its children, never by adding a difference: rounding does not
build up, however many writes there are.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .randomness import random_bits, unit

FAN_OUT = 16  # children of a node: as single-precision numbers they fill one cache line

Tree = tuple[jax.Array, ...]
Combine = Callable[[jax.Array, jax.Array], jax.Array]  # of two nodes, such as jnp.add


def build(leaves: jax.Array, combine: Combine, fill: jax.Array | float) -> Tree:
    """The tree over `leaves` [N, ...]; `fill` [...] is neutral to `combine`. Levels are padded to multiples of FAN_OUT."""
    levels = []
    while True:
        levels.append(_padded(leaves, fill))
        if len(leaves) <= FAN_OUT:
            return tuple(levels)
        leaves = above(levels[-1], combine)


def empty(shape: tuple[int, ...], fill: jax.Array | float) -> Tree:
    """The tree over leaves [N, ...] that are all `fill`, without the reductions, which XLA would spend minutes folding."""
    levels = [jnp.broadcast_to(fill, (shape[0] + -shape[0] % FAN_OUT, *shape[1:])).astype(float)]
    while len(levels[-1]) > FAN_OUT:
        nodes = len(levels[-1]) // FAN_OUT
        levels.append(jnp.broadcast_to(fill, (nodes + -nodes % FAN_OUT, *shape[1:])).astype(float))
    return tuple(levels)


def above(level: jax.Array, combine: Combine) -> jax.Array:
    """[N, ...]: the nodes over a level [N * FAN_OUT, ...]."""
    children = level.reshape(-1, FAN_OUT, *level.shape[1:])
    return functools.reduce(combine, [children[:, k] for k in range(FAN_OUT)])


def write(tree: Tree, slots: jax.Array, values: jax.Array, combine: Combine) -> Tree:
    """Leaves `slots` [B] set to `values` [B, ...]; negative slots are skipped. Equal slots must bring equal values."""
    levels: list[jax.Array] = []
    for level in tree:
        if levels and len(level) <= len(slots):  # all of it is less work than a node for each slot
            values = above(levels[-1], combine)
            levels.append(level.at[: len(values)].set(values))
            continue
        nodes = jnp.where(slots >= 0, slots // FAN_OUT ** len(levels), len(level))  # out of bounds: not written
        if levels:
            values = functools.reduce(combine, list(_children_of(nodes, levels[-1])))
        levels.append(level.at[nodes].set(values.astype(level.dtype), mode="drop"))
    return tuple(levels)


def lower(tree: Tree, slots: jax.Array, values: jax.Array) -> Tree:
    """Leaves `slots` [B] set to `values` [B, ...]; nodes above are lowered to these where they are higher, never raised.

    So they stay at or below the minimum of what is below them, at a fraction of the cost of `write`. Slots as there.
    """
    leaves, *nodes = tree
    lowered = [leaves.at[jnp.where(slots >= 0, slots, len(leaves))].set(values, mode="drop")]
    for depth, level in enumerate(nodes, start=1):
        places = jnp.where(slots >= 0, slots // FAN_OUT**depth, len(level))
        lowered.append(level.at[places].min(values, mode="drop"))
    return tuple(lowered)


def draw(
    key: jax.Array, tree: Tree, batch_size: int, stratified: bool = False, column: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Another key, and [B] int32: leaves of a tree of sums, each with the chance of its share.

    stratified: one from each of B equal parts of the whole sum, instead of independent draws. column, result: as for `find`.
    """
    key, bits = random_bits(key, (2 + len(tree), batch_size))
    high, low, *low_bits = unit(bits)
    fraction = high + low * 2.0**-32  # what of it single precision can hold
    if stratified:
        fraction = (jnp.arange(batch_size) + fraction) / batch_size
    return key, find(tree, fraction, jnp.stack(low_bits), column)


def find(tree: Tree, fraction: jax.Array, low_bits: jax.Array, column: int | None = None) -> jax.Array:
    """[B] int32: the leaves of a tree of sums at which the sum of all up to and including them exceeds this `fraction`.

    fraction: [B] in [0, 1) of the whole sum. low_bits: [L, B] for the L levels, random in [0, 1). column: which one, where
        leaves are [N, F]. A leaf that is 0 is never the result; where all are, the result may lie in the padding.

    Going down, a fraction keeps ever fewer of its random bits, so those lost at a level are drawn anew: of a million equal leaves
    all but those at the ends of the root's children have chances within 0.1 %, where 24 bits alone would be wrong by several
    percent; those few are 3.5 % off in single precision.
    """
    spacing = float(np.finfo(fraction.dtype).eps)
    fraction = jnp.minimum(fraction, 1 - spacing)  # it may have been rounded to 1
    nodes = jnp.zeros(fraction.shape, jnp.int32)
    for level, low in zip(reversed(tree), low_bits, strict=True):
        children = _children_of(nodes, level, column)
        # One after the other, so that a child of 0 adds nothing and no rounding can let it be chosen.
        ends = jnp.stack(list(itertools.accumulate(children)))
        sought = fraction * ends[-1]
        is_before = ends <= sought[None]
        start = jnp.where(is_before, ends, 0).max(axis=0)
        end = jnp.where(is_before, jnp.inf, ends).min(axis=0)
        fraction = jnp.minimum((sought - start + low * spacing * ends[-1]) / (end - start), 1 - spacing)
        child = jnp.minimum(is_before.sum(axis=0, dtype=jnp.int32), FAN_OUT - 1)
        nodes = nodes * FAN_OUT + child
    return nodes


def _padded(leaves: jax.Array, fill: jax.Array | float) -> jax.Array:
    missing = jnp.broadcast_to(fill, (-len(leaves) % FAN_OUT, *leaves.shape[1:]))
    return jnp.concatenate([leaves, missing.astype(leaves.dtype)])


def _children_of(nodes: jax.Array, level: jax.Array, column: int | None = None) -> jax.Array:
    """[FAN_OUT, B, ...] of the level below; in this order what is done over the children is done to whole vectors."""
    children = nodes[None] * FAN_OUT + jnp.arange(FAN_OUT, dtype=jnp.int32)[:, None]
    return level.at[children if column is None else (children, column)].get(mode="clip")
