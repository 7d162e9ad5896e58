"""The contract of every sampler: which slots to learn from, as pure functions over an immutable state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

SamplerState = Any  # a PyTree; the random key lives in it


class Sampler(NamedTuple):
    """Pure, usable under jit, vmap and scan; `capacity` slots numbered from 0.

    init(key) -> state
    add(state, slots [N] int32) -> state: slots just written, in the order written. Negative entries are padding and are
        skipped, so that a caller can keep N fixed and its jitted functions traced once.
    sample(state, batch_size) -> (state, slots [B] int32, weights [B] float32); ValueError on an empty buffer when
        called outside jit (inside, the caller vouches for at least one written slot).
    update(state, slots [B], priorities [B]) -> state; a no-op where priorities do not exist.
    """

    init: Callable[[jax.Array], SamplerState]
    add: Callable[[SamplerState, jax.Array], SamplerState]
    sample: Callable[[SamplerState, int], tuple[SamplerState, jax.Array, jax.Array]]
    update: Callable[[SamplerState, jax.Array, jax.Array], SamplerState]
