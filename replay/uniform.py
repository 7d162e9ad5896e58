"""Uniform sampling, with replacement and without replacement inside a batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from .sampler import Sampler, check_capacity, compiled, count_written, is_first, no_priorities


class UniformState(struct.PyTreeNode):
    key: jax.Array
    count: jax.Array  # () int32: slots 0 .. count - 1 hold a transition


def uniform(capacity: int) -> Sampler:
    """Every written slot with the same probability at every draw, weights 1; a batch may repeat a slot."""

    def draw(key: jax.Array, count: jax.Array, batch_size: int) -> jax.Array:
        return jax.random.randint(key, (batch_size,), 0, count, jnp.int32)

    return _sampler("uniform", capacity, draw)


def without_replacement(capacity: int) -> Sampler:
    """Every batch a uniformly random choice of distinct written slots, weights 1.

    Where fewer slots than the batch asks for are written, each is drawn as often as any other or once more.
    """

    def draw(key: jax.Array, count: jax.Array, batch_size: int) -> jax.Array:
        # A batch larger than the buffer takes distinct numbers of a multiple of it; which slots come once more is random.
        numbers = jnp.maximum(count, batch_size)
        key, offset_key = jax.random.split(key)

        def redraw(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            key, chosen, kept = carry
            key, draw_key = jax.random.split(key)
            fresh = jax.random.randint(draw_key, (batch_size,), 0, numbers, jnp.int32)
            # those kept stand first, so that nothing fresh can displace them
            order = jnp.argsort(~kept, stable=True)
            chosen = jnp.where(kept, chosen, fresh)[order]
            kept = is_first(chosen)
            return key, chosen, kept

        start = (key, jnp.zeros(batch_size, jnp.int32), jnp.zeros(batch_size, bool))
        _, chosen, _ = jax.lax.while_loop(lambda carry: ~carry[2].all(), redraw, start)
        offset = jnp.where(batch_size > count, jax.random.randint(offset_key, (), 0, numbers, jnp.int32), 0)
        return (chosen + offset) % jnp.maximum(count, 1)

    return _sampler("without_replacement", capacity, draw)


def _sampler(name: str, capacity: int, draw: Callable[[jax.Array, jax.Array, int], jax.Array]) -> Sampler:
    check_capacity(name, capacity)

    def init(key: jax.Array) -> UniformState:
        return UniformState(key=key, count=jnp.zeros((), jnp.int32))

    def add(state: UniformState, slots: jax.Array) -> UniformState:
        return state.replace(count=count_written(state.count, slots))

    def sample(state: UniformState, batch_size: int) -> tuple[UniformState, jax.Array, jax.Array]:
        key, draw_key = jax.random.split(state.key)
        return state.replace(key=key), draw(draw_key, state.count, batch_size), jnp.ones(batch_size, jnp.float32)

    return compiled(name, Sampler(init, add, sample, no_priorities), lambda state: state.count)
