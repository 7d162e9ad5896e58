"""Random numbers for samplers, few calls for many: on a CPU a call of the generator costs as much as hundreds of numbers."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # Salmon et al. (2011), table 4


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Another key and uint32 numbers of this shape, all bits random, from one call of the generator."""
    words, size = jax.random.key_data(key), math.prod(shape)
    if words.shape == (2,):
        count = jnp.arange((size + 3) // 2, dtype=jnp.uint32)
        bits = jnp.concatenate(threefry(words, jnp.zeros_like(count), count))
    else:
        bits = jax.random.bits(key, (words.size + size,), jnp.uint32)
    another = bits[: words.size].reshape(words.shape)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # else an old key, which is its data
        another = jax.random.wrap_key_data(another, impl=jax.random.key_impl(key))
    return another, bits[words.size : words.size + size].reshape(shape)


def threefry(key: jax.Array, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 of 20 rounds (Salmon et al., 2011), what JAX's own keys are made for; all arguments and results uint32.

    JAX has it as a loop over rounds, whose turns cost ten times as much on a CPU as what is done in them.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    high, low = high + keys[0], low + keys[1]
    for block in range(5):
        for rotation in ROTATIONS[block % 2]:
            high = high + low
            low = (low << rotation | low >> (32 - rotation)) ^ high
        high, low = high + keys[(block + 1) % 3], low + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return high, low


def below(bits: jax.Array, limit: jax.Array) -> jax.Array:
    """int32 in [0, limit) from uint32 `bits`; 0 if the limit is 0. Chances differ by less than one part in 2^32 / limit."""
    return (bits % jnp.maximum(limit, 1).astype(jnp.uint32)).astype(jnp.int32)


def unit(bits: jax.Array) -> jax.Array:
    """Floats in [0, 1), of JAX's default type, from uint32 `bits`: multiples of 2^-24, or of 2^-32 in double precision."""
    dtype = jnp.zeros(()).dtype
    kept = 32 if dtype == jnp.float64 else 24
    return (bits >> (32 - kept)).astype(dtype) * 2.0**-kept


def stable_order(values: jax.Array, limit: int) -> jax.Array:
    """[B] int32: the places of `values` [B], int32 in [0, limit), from the smallest to the largest; equal ones as they stand."""
    place_bits = max(len(values) - 1, 1).bit_length()
    if (limit - 1).bit_length() + place_bits > 32:
        order: jax.Array = jnp.argsort(values, stable=True)
    else:  # value and place in one word: to sort single words is several times faster than to sort by a key
        words = values.astype(jnp.uint32) << place_bits | jnp.arange(len(values), dtype=jnp.uint32)
        order = (jnp.sort(words) & jnp.uint32((1 << place_bits) - 1)).astype(jnp.int32)
    return order


def last_equal(values: jax.Array, limit: int) -> tuple[jax.Array, jax.Array]:
    """[B] int32: place of the last equal value before this one, or -1; [B] bool: there is none after it."""
    order = stable_order(values, limit)
    again = jnp.concatenate([jnp.zeros(1, bool), values[order[1:]] == values[order[:-1]]])
    before = jnp.where(again, jnp.roll(order, 1), -1)
    return jnp.zeros_like(order).at[order].set(before), jnp.zeros_like(again).at[order].set(~jnp.roll(again, -1))


def without_repeats(slots: jax.Array, limit: int) -> jax.Array:
    """[B] int32: of equal ones all but the last made -1, so that a scatter's result does not hang on its order."""
    slots = jnp.asarray(slots, jnp.int32)
    return jnp.where(last_equal(jnp.where(slots < 0, limit, slots), limit + 1)[1], slots, -1)


class Steps(NamedTuple):
    """What B steps of a shuffle of numbered entries come to."""

    source: jax.Array  # [B] int32: the entry whose content is in entry 0, 1, ... now: B distinct ones in random order
    displaced: jax.Array  # [B] bool: whether one of the first B entries was moved behind them by this step, for good
    origin: jax.Array  # [B] int32: if so, which
    target: jax.Array  # [B] int32: and where to


def shuffle_steps(random: jax.Array, count: jax.Array, limit: int) -> Steps:
    """The first B steps of a shuffle of `count` entries, at most `limit`, from uint32 numbers `random` [B].

    Step i = 0, 1, ... lets entry i change places with a random one that does not stand before it, its target (Fisher and
    Yates, in Durstenfeld's form). Steps from `count` on do nothing. All are taken at once: what is in entry i when its
    turn comes was put there by the last step before it that had i for its target, so it is what was in that step's own
    entry at its turn, and so on back to an entry that had been nobody's target: its origin. Step i finds in its target
    the origin of the last step before it with that same target, and if there is none, what was there at first.
    """
    steps = jnp.arange(len(random), dtype=jnp.int32)
    target = jnp.where(steps < count, steps + below(random, count - steps), steps)
    before, is_last = last_equal(target, max(limit, len(random)))
    moves = target > steps
    origin = jnp.full_like(steps, -1).at[jnp.where(moves, target, len(steps))].max(steps, mode="drop")
    origin = jnp.where(origin >= 0, origin, steps)
    origin = jax.lax.while_loop(lambda o: (o[o] != o).any(), lambda o: o[o], origin)
    return Steps(jnp.where(before >= 0, origin[before], target), is_last & (target >= len(steps)), origin, target)
