"""Batches that mix several sources, as in Replay across Experiments (Tirumala et al., 2023, arXiv:2311.15951)."""

from collections.abc import Sequence
from fractions import Fraction
from math import floor
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from .sampler import Sampler, SamplerState, no_priorities
from .storage import Columns


class Part(NamedTuple):
    """One source of a mixture, to the sampler."""

    sampler: Sampler
    capacity: int  # slots
    share: float  # of every batch


class Source(Protocol):
    """What transitions can be gathered from: `Storage`, `PastReplay`."""

    @property
    def capacity(self) -> int: ...

    def gather(self, slots: ArrayLike) -> Columns: ...


def mixture(live: Part, *past: Part) -> Sampler:
    """A fixed share of every batch from each part, by that part's own sampler.

    Slots are numbered source after source, the live one first, so `add` takes the live replay's own slots. The past is
    there whole from the start. A batch holds the live slots first, then those of each past part; how many of each,
    `split` says. Weights are those that each part's sampler gives to its own slots.

    Sampling outside jit raises ValueError while a source is empty, and, traced or not, if a part's share of the batch
    comes to no slot at all. ValueError unless shares are positive and sum to 1.
    """
    parts = (live, *past)
    shares = [part.share for part in parts]
    if not all(0 < share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"mixture: shares must be positive and sum to 1, not {shares}")
    starts = np.cumsum([0, *(part.capacity for part in parts)]).tolist()

    def init(key: jax.Array) -> SamplerState:
        keys = jax.random.split(key, len(parts))
        fresh = [part.sampler.init(part_key) for part, part_key in zip(parts, keys, strict=True)]
        filled = [
            part.sampler.add(state, jnp.arange(part.capacity, dtype=jnp.int32))
            for part, state in zip(past, fresh[1:], strict=True)
        ]
        return (fresh[0], *filled)

    def add(state: SamplerState, slots: jax.Array) -> SamplerState:
        return (live.sampler.add(state[0], slots), *state[1:])

    def sample(state: SamplerState, batch_size: int) -> tuple[SamplerState, jax.Array, jax.Array]:
        sizes = split(batch_size, shares)
        if 0 in sizes:
            raise ValueError(f"mixture: a batch of {batch_size} in shares of {shares} leaves a source with nothing")
        drawn = [part.sampler.sample(old, size) for part, old, size in zip(parts, state, sizes, strict=True)]
        states, slots, weights = zip(*drawn, strict=True)
        return (
            states,
            jnp.concatenate([part_slots + start for part_slots, start in zip(slots, starts[:-1], strict=True)]),
            jnp.concatenate(weights),
        )

    def update(state: SamplerState, slots: jax.Array, priorities: jax.Array) -> SamplerState:
        def own(start: int, stop: int) -> jax.Array:
            return jnp.where((slots >= start) & (slots < stop), slots - start, -1)  # negative slots are padding

        return tuple(
            part.sampler.update(old, own(start, stop), priorities)
            for part, old, start, stop in zip(parts, state, starts[:-1], starts[1:], strict=True)
        )

    any_priorities = any(part.sampler.update is not no_priorities for part in parts)
    return Sampler(init, add, sample, update if any_priorities else no_priorities)


def split(batch_size: int, shares: Sequence[float]) -> list[int]:
    """`batch_size` in whole numbers as close to `shares` as can be: largest remainders, the earlier one at a tie."""
    quotas = [Fraction(share).limit_denominator(1_000_000) * batch_size for share in shares]
    sizes = [floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: sizes[i] - quotas[i])
    for i in by_remainder[: batch_size - sum(sizes)]:
        sizes[i] += 1
    return sizes


def gather_mixed(sources: Sequence[Source], slots: ArrayLike) -> Columns:
    """As `Storage.gather`, for slots [B] numbered as `mixture` does over `sources`, live first; any order will do."""
    if len(sources) == 1:
        return sources[0].gather(slots)
    slots = np.asarray(slots)
    stops = np.cumsum([source.capacity for source in sources])
    owner = np.searchsorted(stops, slots, side="right")
    parts = [
        source.gather(slots[owner == index] - (stops[index] - source.capacity))
        for index, source in enumerate(sources)
        if (owner == index).any()
    ]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if (owner[:-1] <= owner[1:]).all():  # always so after `sample`; else the parts are put back where they belong
        return columns
    place = np.argsort(np.argsort(owner, kind="stable"))
    return {name: column[place] for name, column in columns.items()}
