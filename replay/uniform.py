"""Uniform sampling with replacement."""

import jax
import jax.numpy as jnp
from flax import struct

from .sampler import Sampler


class UniformState(struct.PyTreeNode):
    key: jax.Array
    count: jax.Array  # () int32: slots 0 .. count - 1 hold a transition


def uniform(capacity: int) -> Sampler:
    """Every written slot with the same probability at every draw, weights 1; a batch may repeat a slot.

    Slots must first be written in the order 0, 1, 2, ..., as a ring does; later rounds may come in any order.
    """
    if capacity < 1:
        raise ValueError(f"uniform: capacity must be at least 1, not {capacity}")

    def init(key: jax.Array) -> UniformState:
        return UniformState(key=key, count=jnp.zeros((), jnp.int32))

    def add(state: UniformState, slots: jax.Array) -> UniformState:
        # padding (negative) never raises the maximum
        highest = jnp.max(jnp.asarray(slots, jnp.int32), initial=-1)
        return state.replace(count=jnp.maximum(state.count, highest + 1))

    def sample(state: UniformState, batch_size: int) -> tuple[UniformState, jax.Array, jax.Array]:
        if not isinstance(state.count, jax.core.Tracer) and state.count == 0:
            raise ValueError("uniform: cannot sample, nothing has been added yet")
        key, draw_key = jax.random.split(state.key)
        slots = jax.random.randint(draw_key, (batch_size,), 0, state.count, jnp.int32)
        return state.replace(key=key), slots, jnp.ones(batch_size, jnp.float32)

    def update(state: UniformState, slots: jax.Array, priorities: jax.Array) -> UniformState:
        return state

    return Sampler(init, add, sample, update)
