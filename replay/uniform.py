"""Uniform sampling, with replacement and without replacement inside a batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from .randomness import below, random_bits, shuffle_steps
from .sampler import Sampler, check_capacity, compiled, count_written, no_priorities


class UniformState(struct.PyTreeNode):
    key: jax.Array
    count: jax.Array  # () int32: slots 0 .. count - 1 hold a transition


def uniform(capacity: int) -> Sampler:
    """Every written slot with the same probability at every draw, weights 1; a batch may repeat a slot."""

    def draw(key: jax.Array, count: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
        key, random = random_bits(key, (batch_size,))
        return key, below(random, count)

    return _sampler("uniform", capacity, draw)


def without_replacement(capacity: int) -> Sampler:
    """Every batch a uniformly random choice of distinct written slots, weights 1.

    Where fewer slots than the batch asks for are written, each is drawn as often as any other or once more.
    """

    def draw(key: jax.Array, count: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
        # A batch larger than the buffer takes distinct numbers of a multiple of it; which slots come once more is random.
        numbers = jnp.maximum(count, batch_size)
        key, random = random_bits(key, (batch_size + 1,))
        chosen = shuffle_steps(random[1:], numbers, max(capacity, batch_size)).source
        offset = jnp.where(batch_size > count, below(random[0], count), 0)
        return key, (chosen + offset) % jnp.maximum(count, 1)

    return _sampler("without_replacement", capacity, draw)


def _sampler(
    name: str, capacity: int, draw: Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]
) -> Sampler:
    check_capacity(name, capacity)

    def init(key: jax.Array) -> UniformState:
        return UniformState(key=key, count=jnp.zeros((), jnp.int32))

    def add(state: UniformState, slots: jax.Array) -> UniformState:
        return state.replace(count=count_written(state.count, slots))

    def sample(state: UniformState, batch_size: int) -> tuple[UniformState, jax.Array, jax.Array]:
        key, slots = draw(state.key, state.count, batch_size)
        return state.replace(key=key), slots, jnp.ones(batch_size, jnp.float32)

    return compiled(name, Sampler(init, add, sample, no_priorities), lambda state: state.count)
