"""Random reshuffling (RR-C): every slot once an epoch, in a new random order each epoch."""

import jax
import jax.numpy as jnp
from flax import struct

from .randomness import random_bits, shuffle_steps
from .sampler import Sampler, check_capacity, compiled, no_priorities

AHEAD = 4096  # draws whose order is drawn at a time: enough for the fixed cost of that to be small beside theirs


class ReshuffledState(struct.PyTreeNode):
    key: jax.Array
    joining_key: jax.Array  # folded with a slot's number, so that it matters not how `add` is chunked
    order: jax.Array  # [capacity] int32: its first `count` entries are the written slots
    passed: jax.Array  # () int32: entries before this one have had their turn in this epoch
    ready: jax.Array  # () int32: those from `passed` up to this one come next; the order of the others is not drawn yet
    count: jax.Array  # () int32: slots 0 .. count - 1 hold a transition
    position: jax.Array  # () int32: the slot that will be written next


def reshuffled(capacity: int, skip_next_write: bool = False) -> Sampler:
    """Epochs over the slots, weights 1 (Fujita, 2025, arXiv 2503.02269, RR-C): in each, every slot exactly once.

    What is shuffled are slots, not transitions: one that is overwritten keeps its place in the order and yields the new
    transition. An epoch goes on across batches, and a batch may straddle two.

    The paper shuffles all `capacity` slots and drops those not yet written when their turn comes. The same law at
    constant cost for a draw, also while the buffer fills: only written slots are in the order, and a new one joins at a
    uniformly random place of it; if that lies before the current one, its first turn is in the next epoch. Nor is an
    epoch shuffled as a whole: its order is drawn a few thousand slots at a time, so that no batch pays for all.

    skip_next_write: never draw the slot that is written next; its turn in the epoch is lost. This is how the paper's
        code protects a buffer whose observations share one array, where that slot is half overwritten. Ours never is.
    """
    check_capacity("reshuffled", capacity)
    if skip_next_write and capacity < 2:
        raise ValueError("reshuffled: skip_next_write needs a capacity of at least 2")

    def init(key: jax.Array) -> ReshuffledState:
        key, joining_key = jax.random.split(key)
        nothing = jnp.zeros((), jnp.int32)
        return ReshuffledState(key, joining_key, jnp.zeros(capacity, jnp.int32), nothing, nothing, nothing, nothing)

    def add(state: ReshuffledState, slots: jax.Array) -> ReshuffledState:
        slots = jnp.asarray(slots, jnp.int32)

        def join(index: jax.Array, state: ReshuffledState) -> ReshuffledState:
            # The new slot's rank among the `count` others is uniform. All parts of the order being random, to change
            # places with a random one of them is to be inserted.
            slot, count = slots[index], state.count
            new = slot == count
            rank = jax.random.randint(jax.random.fold_in(state.joining_key, slot), (), 0, count + 1, jnp.int32)
            missed = new & (rank < state.passed)
            place = jnp.where(missed, state.passed, rank)
            places = jnp.where(new, jnp.stack([count, place]), capacity)  # out of bounds: nothing is written
            order = state.order.at[places[0]].set(state.order[place], mode="drop").at[places[1]].set(slot, mode="drop")
            position = jnp.where(slot >= 0, (slot + 1) % capacity, state.position)
            passed = state.passed + missed
            ready = jnp.maximum(state.ready, passed)
            return state.replace(order=order, passed=passed, ready=ready, count=count + new, position=position)

        joined: ReshuffledState = jax.lax.fori_loop(0, slots.size, join, state)
        return joined

    def take(
        state: ReshuffledState, slots: jax.Array, filled: jax.Array
    ) -> tuple[ReshuffledState, jax.Array, jax.Array]:
        """Fill `slots` from `filled` on with those that are ready; the state and how many are filled then."""
        batch_size, left, wanted = len(slots), state.ready - state.passed, len(slots) - filled
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

        def go_on(
            carry: tuple[ReshuffledState, jax.Array, jax.Array],
        ) -> tuple[ReshuffledState, jax.Array, jax.Array]:
            return take(_make_ready(carry[0]), *carry[1:])

        state, slots, _ = jax.lax.while_loop(unfinished, go_on, carry)
        return state, slots, jnp.ones(batch_size, jnp.float32)

    return compiled("reshuffled", Sampler(init, add, sample, no_priorities), lambda state: state.count)


def _without(state: ReshuffledState, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The next `size` slots that are ready but for `state.position`, whether that is among them, and its place."""
    capacity = len(state.order)
    window = state.passed + jnp.arange(size + 1)
    ahead = state.order[jnp.minimum(window, capacity - 1)]
    drop = (ahead == state.position) & (window < state.ready) & (state.count == capacity)
    at = jnp.where(drop.any(), jnp.argmax(drop), size).astype(jnp.int32)
    index = jnp.arange(size)
    return ahead[index + (index >= at)], drop.any(), at


def _make_ready(state: ReshuffledState) -> ReshuffledState:
    """All that was ready having been drawn: the next part of the epoch, or the first of another one."""
    start = jnp.where(state.passed == state.count, 0, state.passed)
    key, order, size = draw_order(state.key, state.order, start, state.count)
    return state.replace(key=key, order=order, passed=start, ready=start + size)


def draw_order(
    key: jax.Array, order: jax.Array, start: jax.Array, stop: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The next steps of a shuffle of the entries of `order` [N] from `start` up to `stop`.

    Another key; the order; and how many entries from `start` on are now random ones out of all these, AHEAD or what there is.
    """
    capacity = len(order)
    ahead = min(AHEAD, capacity)
    key, random = random_bits(key, (ahead,))
    steps = shuffle_steps(random, stop - start, capacity)
    size = jnp.minimum(stop - start, ahead)
    index = jnp.arange(ahead, dtype=jnp.int32)
    places = jnp.stack([jnp.where(index < size, index, capacity), jnp.where(steps.displaced, steps.target, capacity)])
    # read before any is written, or XLA would copy all of it
    values = order[start + jnp.stack([steps.source, steps.origin])]
    return key, order.at[start + places].set(values, mode="drop"), size
