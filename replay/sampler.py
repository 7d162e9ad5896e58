"""The contract of every sampler: which slots to learn from, as pure functions over an immutable state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SamplerState = Any  # a PyTree; the random key lives in it

# For jax.jit around a sampler: XLA cuts what reads a large array in two for its threads, however little it reads, and to
# hand over one half costs more than both. (Only the outermost function takes options, so that `compiled` cannot have them.)
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}


class Sampler(NamedTuple):
    """Pure, usable under jit, vmap and scan; `capacity` slots numbered from 0.

    init(key) -> state
    add(state, slots [N] int32) -> state: slots just written, in the order written; each slot at most once a call.
        Slots must first be written in the order 0, 1, 2, ..., as a ring does; later rounds may come in any order.
        Negative entries are padding and are skipped, so that a caller can keep N fixed and its jitted functions
        traced once.
    sample(state, batch_size) -> (state, slots [B] int32, weights [B] float32); ValueError on an empty buffer when
        called outside jit (inside, the caller vouches for at least one written slot).
    update(state, slots [B], priorities [B]) -> state; `no_priorities` where they do not exist. Padding as in `add`. Of a slot
        that is there several times the last priority counts.

    Arithmetic is in JAX's default float type: single precision, or double where JAX runs with x64.
    """

    init: Callable[[jax.Array], SamplerState]
    add: Callable[[SamplerState, jax.Array], SamplerState]
    sample: Callable[[SamplerState, int], tuple[SamplerState, jax.Array, jax.Array]]
    update: Callable[[SamplerState, jax.Array, jax.Array], SamplerState]


def no_priorities(state: SamplerState, slots: jax.Array, priorities: jax.Array) -> SamplerState:
    """The `update` of samplers that know none."""
    return state


def check_capacity(name: str, capacity: int) -> None:
    if capacity < 1:
        raise ValueError(f"{name}: capacity must be at least 1, not {capacity}")


def compiled(name: str, sampler: Sampler, written: Callable[[SamplerState], jax.Array]) -> Sampler:
    """`sampler` with its functions compiled, so that to call them outside jit costs no tracing, and the check of `sample`.

    written: of a state, what is all 0 where nothing has been added; what is traced cannot be looked at.
    """
    jitted = jax.jit(sampler.sample, static_argnums=1)

    def sample(state: SamplerState, batch_size: int) -> tuple[SamplerState, jax.Array, jax.Array]:
        present = written(state)
        if not isinstance(present, jax.core.Tracer) and not present.any():
            raise ValueError(f"{name}: cannot sample, nothing has been added yet")
        result: tuple[SamplerState, jax.Array, jax.Array] = jitted(state, batch_size)
        return result

    update = sampler.update if sampler.update is no_priorities else jax.jit(sampler.update)
    return Sampler(jax.jit(sampler.init), jax.jit(sampler.add), sample, update)


def count_written(count: jax.Array, slots: jax.Array) -> jax.Array:
    """() int32: slots 0 .. count - 1 hold a transition once `slots` are written; padding never raises the maximum."""
    return jnp.maximum(count, jnp.max(jnp.asarray(slots, jnp.int32), initial=-1) + 1)
