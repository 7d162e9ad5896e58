"""Sampling in proportion to priorities: PER, LAP, stratified or not."""

import jax
import jax.numpy as jnp
from flax import struct

from . import trees
from .randomness import without_repeats
from .sampler import Sampler, check_capacity, compiled


class PrioritizedState(struct.PyTreeNode):
    key: jax.Array
    tree: trees.Tree  # sums of priorities
    highest: jax.Array  # () float: the highest priority so far, which a new transition gets
    batches: jax.Array  # () int32: drawn so far


def prioritized(
    capacity: int,
    alpha: float = 0.6,
    beta: float = 0.4,
    beta_steps: int = 1_000_000,
    minimum: float = 1e-6,
    stratified: bool = False,
    reference_off_by_one: bool = False,
) -> Sampler:
    """In proportion to max(|priority|, minimum)^alpha (PER: Schaul et al., 2016, eq. 1; LAP: Fujimoto et al., 2020).

    alpha: 0 is uniform. Schaul et al. 0.6; LAP 0.6 on Atari.
    beta: exponent of the importance weights (Schaul et al., section 3.4) at the first batch; it grows linearly to 1 over
        `beta_steps` batches. Weights are divided by the highest of their batch. 0 switches them off: all 1, as in LAP.
    minimum: of |priority|; PER's epsilon (which it adds), LAP's threshold (0.01 in its Atari code).
    stratified: one draw from each of `batch_size` equal parts of the whole priority, instead of independent draws.
    reference_off_by_one: the priority of a new transition goes to the slot after its own, as in the Atari code of LAP
        and of arXiv 2503.02269; slots not yet written can then be drawn.

    A new transition gets the highest priority so far, at first 1. A priority that is not finite counts as that one.
    """
    check_exponents("prioritized", capacity, alpha, minimum)
    if not 0 <= beta <= 1:
        raise ValueError(f"prioritized: beta must be in [0, 1], not {beta}")
    if beta_steps < 1:
        raise ValueError(f"prioritized: beta_steps must be at least 1, not {beta_steps}")

    def init(key: jax.Array) -> PrioritizedState:
        return PrioritizedState(key, trees.empty((capacity,), 0.0), jnp.ones(()), jnp.zeros((), jnp.int32))

    def add(state: PrioritizedState, slots: jax.Array) -> PrioritizedState:
        slots = new_slots(slots, capacity, reference_off_by_one)
        return state.replace(tree=trees.write(state.tree, slots, jnp.full(slots.shape, state.highest), jnp.add))

    def sample(state: PrioritizedState, batch_size: int) -> tuple[PrioritizedState, jax.Array, jax.Array]:
        key, slots = trees.draw(state.key, state.tree, batch_size, stratified)
        slots = jnp.minimum(slots, capacity - 1)  # a slot even if none is written
        if beta:
            drawn = state.tree[0][slots]
            exponent = beta + (1 - beta) * jnp.minimum(state.batches / beta_steps, 1)
            weights = ((drawn.min() / drawn) ** exponent).astype(jnp.float32)
        else:
            weights = jnp.ones(batch_size, jnp.float32)
        return state.replace(key=key, batches=state.batches + 1), slots, weights

    def update(state: PrioritizedState, slots: jax.Array, priorities: jax.Array) -> PrioritizedState:
        values = powers(priorities, alpha, minimum, state.highest)
        highest = jnp.maximum(state.highest, jnp.max(values, where=slots >= 0, initial=0))
        slots = without_repeats(slots, capacity)
        return state.replace(tree=trees.write(state.tree, slots, values, jnp.add), highest=highest)

    return compiled("prioritized", Sampler(init, add, sample, update), lambda state: state.tree[-1])


def check_exponents(name: str, capacity: int, alpha: float, minimum: float) -> None:
    check_capacity(name, capacity)
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"{name}: alpha must be finite and not negative, not {alpha}")
    if not 0 < minimum < float("inf"):
        raise ValueError(f"{name}: minimum must be finite and positive, not {minimum}")


def new_slots(slots: jax.Array, capacity: int, off_by_one: bool) -> jax.Array:
    """Which slots are marked as new when `slots` are written."""
    slots = jnp.asarray(slots, jnp.int32)
    return jnp.where(slots >= 0, (slots + 1) % capacity, slots) if off_by_one else slots


def powers(priorities: jax.Array, alpha: float, minimum: float, highest: jax.Array) -> jax.Array:
    """max(|priority|, minimum)^alpha, and `highest` in place of what is not finite."""
    values = jnp.maximum(jnp.abs(priorities), minimum) ** alpha
    return jnp.where(jnp.isfinite(values), values, highest).astype(highest.dtype)
