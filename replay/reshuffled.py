"""Random reshuffling (RR-C): every slot once an epoch, in a new random order each epoch."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from .sampler import Sampler, check_capacity, compiled, no_priorities

SHUFFLE_GROWTH = (
    4  # sizes for which the shuffle is compiled: a buffer still filling pays for at most this many times its own
)


class ReshuffledState(struct.PyTreeNode):
    key: jax.Array
    joining_key: jax.Array  # folded with a slot's number, so that it matters not how `add` is chunked
    order: jax.Array  # [capacity] int32: its first `count` entries are the written slots
    passed: jax.Array  # () int32: entries before this one have had their turn in this epoch
    count: jax.Array  # () int32: slots 0 .. count - 1 hold a transition
    position: jax.Array  # () int32: the slot that will be written next


def reshuffled(capacity: int, skip_next_write: bool = False) -> Sampler:
    """Epochs over the slots, weights 1 (Fujita, 2025, arXiv 2503.02269, RR-C): in each, every slot exactly once.

    What is shuffled are slots, not transitions: one that is overwritten keeps its place in the order and yields the new
    transition. An epoch goes on across batches, and a batch may straddle two.

    The paper shuffles all `capacity` slots and drops those not yet written when their turn comes. The same law at
    constant cost for a draw, also while the buffer fills: only written slots are in the order, and a new one joins at a
    uniformly random place of it; if that lies before the current one, its first turn is in the next epoch.

    skip_next_write: never draw the slot that is written next; its turn in the epoch is lost. This is how the paper's
        code protects a buffer whose observations share one array, where that slot is half overwritten. Ours never is.
    """
    check_capacity("reshuffled", capacity)
    if skip_next_write and capacity < 2:
        raise ValueError("reshuffled: skip_next_write needs a capacity of at least 2")

    def init(key: jax.Array) -> ReshuffledState:
        key, joining_key = jax.random.split(key)
        nothing = jnp.zeros((), jnp.int32)
        return ReshuffledState(key, joining_key, jnp.zeros(capacity, jnp.int32), nothing, nothing, nothing)

    def add(state: ReshuffledState, slots: jax.Array) -> ReshuffledState:
        slots = jnp.asarray(slots, jnp.int32)

        def join(index: jax.Array, state: ReshuffledState) -> ReshuffledState:
            # The new slot's rank among the `count` others is uniform. Both parts of the order being random, to change
            # places with a random one of them is to be inserted.
            slot, count = slots[index], state.count
            new = slot == count
            rank = jax.random.randint(jax.random.fold_in(state.joining_key, slot), (), 0, count + 1, jnp.int32)
            missed = new & (rank < state.passed)
            place = jnp.where(missed, state.passed, rank)
            places = jnp.where(new, jnp.stack([count, place]), capacity)  # out of bounds: nothing is written
            order = state.order.at[places[0]].set(state.order[place], mode="drop").at[places[1]].set(slot, mode="drop")
            position = jnp.where(slot >= 0, (slot + 1) % capacity, state.position)
            return state.replace(order=order, passed=state.passed + missed, count=count + new, position=position)

        joined: ReshuffledState = jax.lax.fori_loop(0, slots.size, join, state)
        return joined

    def take(
        state: ReshuffledState, slots: jax.Array, filled: jax.Array
    ) -> tuple[ReshuffledState, jax.Array, jax.Array]:
        """Fill `slots` from `filled` on with what is left of the epoch; the state and how many are filled then."""
        batch_size, left, wanted = len(slots), state.count - state.passed, len(slots) - filled
        index = jnp.arange(batch_size, dtype=jnp.int32)
        if skip_next_write:
            ahead, dropped, dropped_at = _without(state, batch_size)
        else:
            ahead = state.order[jnp.minimum(state.passed + index, capacity - 1)]
            dropped, dropped_at = jnp.bool_(False), jnp.int32(batch_size)
        taken = jnp.minimum(wanted, left - dropped)
        # a turn is lost when the draws go past it
        consumed = jnp.where(taken < wanted, left, taken + (dropped_at < taken))
        slots = jnp.where(index < filled, slots, ahead[jnp.maximum(index - filled, 0)])
        return state.replace(passed=state.passed + consumed), slots, filled + taken

    def sample(state: ReshuffledState, batch_size: int) -> tuple[ReshuffledState, jax.Array, jax.Array]:
        slots = jnp.zeros(batch_size, jnp.int32)
        carry = take(state, slots, jnp.int32(0))

        def unfinished(carry: tuple[ReshuffledState, jax.Array, jax.Array]) -> jax.Array:
            return (carry[2] < batch_size) & (carry[0].count > 0)

        def next_epoch(
            carry: tuple[ReshuffledState, jax.Array, jax.Array],
        ) -> tuple[ReshuffledState, jax.Array, jax.Array]:
            state, slots, filled = carry
            key, shuffle_key = jax.random.split(state.key)
            order = shuffle_prefix(shuffle_key, state.order, state.count)
            return take(state.replace(key=key, order=order, passed=jnp.zeros((), jnp.int32)), slots, filled)

        state, slots, _ = jax.lax.while_loop(unfinished, next_epoch, carry)
        return state, slots, jnp.ones(batch_size, jnp.float32)

    return compiled("reshuffled", Sampler(init, add, sample, no_priorities), lambda state: state.count)


def _without(state: ReshuffledState, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The next `size` slots of the epoch but for `state.position`, whether that is among them, and its place."""
    capacity = len(state.order)
    window = state.passed + jnp.arange(size + 1)
    ahead = state.order[jnp.minimum(window, capacity - 1)]
    drop = (ahead == state.position) & (window < state.count) & (state.count == capacity)
    at = jnp.where(drop.any(), jnp.argmax(drop), size).astype(jnp.int32)
    index = jnp.arange(size)
    return ahead[index + (index >= at)], drop.any(), at


def shuffle_prefix(key: jax.Array, order: jax.Array, count: jax.Array) -> jax.Array:
    """`order` [N] with its first `count` entries in random order; the cost goes with `count`, not with N."""
    capacity = len(order)
    sizes = [1]
    while sizes[-1] < capacity:
        sizes.append(min(SHUFFLE_GROWTH * sizes[-1], capacity))

    def shuffle(size: int, order: jax.Array) -> jax.Array:
        return order.at[:size].set(_shuffle(key, order[:size], count))

    enough = jnp.searchsorted(jnp.array(sizes), count)
    shuffled: jax.Array = jax.lax.switch(enough, [partial(shuffle, size) for size in sizes], order)
    return shuffled


def _shuffle(key: jax.Array, values: jax.Array, count: jax.Array) -> jax.Array:
    """Sorted by random numbers, a few bits of them at a time: with the place below them in one word.

    Sorting single words is several times faster than sorting by a key; the place also keeps each pass stable. Like
    jax.random.permutation, enough passes that pairs left unshuffled by a tie are rare: at most one expected.
    """
    size = len(values)
    place_bits = max(size - 1, 1).bit_length()
    random_bits = 32 - place_bits
    place = jnp.arange(size, dtype=jnp.uint32)

    def one_pass(number: int, values: jax.Array) -> jax.Array:
        bits = jax.random.bits(jax.random.fold_in(key, number), (size,), jnp.uint32)
        words = (bits << place_bits) | place
        # all of the largest, so that they stay behind the others and in their order
        words = jnp.where(place < count, words, jnp.uint32(0xFFFFFFFF << place_bits & 0xFFFFFFFF) | place)
        return values[(jnp.sort(words) & jnp.uint32((1 << place_bits) - 1)).astype(jnp.int32)]

    shuffled: jax.Array = jax.lax.fori_loop(0, math.ceil(2 * place_bits / random_bits), one_pass, values)
    return shuffled
