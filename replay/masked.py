"""Prioritised random reshuffling (RR-M): a slot that was drawn more often than its priority entitles it to is masked."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from . import trees
from .prioritized import check_exponents, new_slots, powers
from .sampler import Sampler, is_first, refuse_empty

MASK = 1e-8  # factor on a masked priority: drawn only where nothing else is left
TILT = 1e-3  # how far `tilt` may go before the state is settled
NEVER = float(np.finfo(np.float32).max) / 4  # a progress that is not reached

# Columns of the two trees. Sums: of priorities, and of priorities as drawn from, masked ones times MASK.
PRIORITY, DRAWABLE = 0, 1
# Minima: of the progress at which masked slots turn, and of minus that of the others; each at a tilt of -TILT and of TILT.
# A minimum of linear functions is concave, so that between the two ends it is not below the line through them.
DUE, OVERDUE = slice(0, 2), slice(2, 4)


class MaskedState(struct.PyTreeNode):
    """Per slot the draws A, and the debt: A minus the draws E that its priority was entitled to.

    E grows at every batch by priority * batch_size / (sum of priorities), for every slot; kept is its running sum, the
    progress, and per slot the progress when its debt was last written down. E is also multiplied now and then, for all
    slots at once; that is the scale, kept as tilt = 1 - 1 / scale. With both, the debt of a slot is now

        scale * (debt - tilt * A - priority * (progress - since)),

    and it is masked while that is positive.
    """

    key: jax.Array
    sums: trees.Tree  # [., 2]
    minima: trees.Tree  # [., 4]
    drawn: jax.Array  # [capacity] int32: A
    debt: jax.Array  # [capacity] float, when last written down
    since: jax.Array  # [capacity] float
    progress: jax.Array  # () float
    progress_low: jax.Array  # () float: what rounding kept out of it
    tilt: jax.Array  # () float
    all_drawn: jax.Array  # () float: sum of A
    unsettled: jax.Array  # () int32: draws since the state was last settled
    highest: jax.Array  # () float: the highest priority so far, which a new transition gets


def masked(
    capacity: int,
    alpha: float = 0.6,
    minimum: float = 0.01,
    stratified: bool = False,
    reference_off_by_one: bool = False,
) -> Sampler:
    """RR-M (Fujita, 2025, arXiv 2503.02269): in proportion to priorities, each slot's count kept to its expectation.

    Before a batch, every slot drawn more often than expected has its priority times 1e-8. The batch is drawn from these
    without replacement (stratified: with replacement, one from each of `batch_size` equal parts); its weights are 1. The
    expectation of every slot then grows by its share of all priorities (unmasked), times the batch size. A slot that is
    written anew starts from 0 with the highest priority so far, at first 1, and the other expectations are multiplied
    so that they still sum to all draws.

    alpha, minimum: priority max(|priority|, minimum)^alpha, as for `prioritized`; defaults of LAP on Atari.
    reference_off_by_one: the priority and the fresh start of a new transition go to the slot after its own, as in the
        paper's code; slots not yet written can then be drawn.

    The paper's code looks at all slots at every batch. Here a tree finds those that come to be masked or unmasked, so
    that a draw costs O(log capacity) amortised: all slots are looked at once every `capacity` draws. Counts that repeat
    a slot of a stratified batch are all counted, which the paper's code misses.
    """
    check_exponents("masked", capacity, alpha, minimum)

    def init(key: jax.Array) -> MaskedState:
        zeros, zero = jnp.zeros(capacity), jnp.zeros(())
        return MaskedState(
            key=key,
            sums=trees.empty((capacity, 2), 0.0),
            minima=trees.empty((capacity, 4), NEVER),
            drawn=jnp.zeros(capacity, jnp.int32),
            debt=zeros,
            since=zeros,
            progress=zero,
            progress_low=zero,
            tilt=zero,
            all_drawn=zero,
            unsettled=jnp.zeros((), jnp.int32),
            highest=jnp.ones(()),
        )

    def add(state: MaskedState, slots: jax.Array) -> MaskedState:
        slots = new_slots(slots, capacity, reference_off_by_one)
        written = slots >= 0
        lost = jnp.where(written, draw_debt(state, slots), 0).sum()
        lost_draws = jnp.where(written, state.drawn[slots], 0).sum()
        # The other expectations sum to `remaining + lost` and are to sum to `remaining`, as the draws do.
        remaining = state.all_drawn - lost_draws
        growth = jnp.where(remaining > 0, -lost / (remaining + lost), 0)
        state = state.replace(
            drawn=_put(state.drawn, slots, 0),
            debt=_put(state.debt, slots, 0),
            since=_put(state.since, slots, state.progress),
            all_drawn=remaining,
            tilt=state.tilt + (1 - state.tilt) * growth / (1 + growth),
        )
        return _write(state, slots, jnp.full(slots.shape, state.highest))

    def sample(state: MaskedState, batch_size: int) -> tuple[MaskedState, jax.Array, jax.Array]:
        refuse_empty("masked", state.sums[-1])
        state = with_current_masks(state, batch_size)
        key, draw_key = jax.random.split(state.key)
        draw = _draw_strata if stratified else _draw_distinct
        slots = draw(draw_key, state.sums, batch_size)
        # the running sum is kept to twice the precision, as its terms grow ever smaller beside it
        term = batch_size * (1 - state.tilt) / trees.root(state.sums, jnp.sum)[PRIORITY] + state.progress_low
        progress = state.progress + term
        progress_low = term - (progress - state.progress)
        state = state.replace(
            key=key,
            drawn=state.drawn.at[slots].add(1),
            debt=state.debt.at[slots].add(1),
            progress=progress,
            progress_low=progress_low,
            all_drawn=state.all_drawn + batch_size,
            unsettled=state.unsettled + batch_size,
        )
        return _write(state, slots, _priority(state, slots)), slots, jnp.ones(batch_size, jnp.float32)

    def update(state: MaskedState, slots: jax.Array, priorities: jax.Array) -> MaskedState:
        values = powers(priorities, alpha, minimum, state.highest)
        highest = jnp.maximum(state.highest, jnp.max(values, where=slots >= 0, initial=0))
        # what the old priority has earned is written down
        debt = state.debt[slots] - _priority(state, slots) * (state.progress - state.since[slots])
        state = state.replace(
            highest=highest,
            debt=_put(state.debt, slots, debt),
            since=_put(state.since, slots, state.progress),
        )
        return _write(state, slots, values)

    return Sampler(init, add, sample, update)


def draw_debt(state: MaskedState, slots: jax.Array) -> jax.Array:
    """[B]: draws of these slots so far minus those that their priorities entitled them to; masked where positive."""
    return _unscaled_debt(state, slots, _priority(state, slots)) / (1 - state.tilt)


def _unscaled_debt(state: MaskedState, slots: jax.Array, priority: jax.Array) -> jax.Array:
    earned = priority * (state.progress - state.since[slots])
    return state.debt[slots] - state.tilt * state.drawn[slots] - earned


def _tolerance(state: MaskedState) -> float:
    """A debt that is 0 but for rounding is none, so that equal priorities give exact epochs."""
    return 1e-5 if state.debt.dtype == jnp.float32 else 1e-9


def _priority(state: MaskedState, slots: jax.Array) -> jax.Array:
    return state.sums[0][slots, PRIORITY]


def _put(array: jax.Array, slots: jax.Array, values: jax.Array | int) -> jax.Array:
    return array.at[jnp.where(slots >= 0, slots, len(array))].set(values, mode="drop")


def _write(state: MaskedState, slots: jax.Array, priorities: jax.Array) -> MaskedState:
    """Priorities of `slots` set, and all that follows from these and from their counts."""
    drawable, minima = _leaves(state, slots, priorities)
    return state.replace(
        sums=trees.write(state.sums, slots, jnp.stack([priorities, drawable], axis=1), jnp.sum),
        minima=trees.write(state.minima, slots, minima, jnp.min),
    )


def _leaves(state: MaskedState, slots: jax.Array, priority: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the trees are to hold for `slots` of these priorities: [B] what to draw by, [B, 4] minima."""
    tolerance, precision = _tolerance(state), float(np.finfo(state.debt.dtype).eps)
    since, debt = state.since[slots], state.debt[slots]
    is_masked = _unscaled_debt(state, slots, priority) > tolerance
    tilted = TILT * state.drawn[slots]
    # Progress at which the debt is the tolerance, early enough to allow for rounding: what is found is looked at exactly.
    at_ends = since[:, None] + (debt[:, None] + jnp.stack([tilted, -tilted], axis=1) - tolerance) / priority[:, None]
    margin = 8 * precision * (since + state.progress + (jnp.abs(debt) + tilted + tolerance) / priority)[:, None]
    due = jnp.where(is_masked[:, None], at_ends - margin, NEVER)
    may_be_overdue = ~is_masked & (state.drawn[slots] > 0)  # never drawn, it owes nothing at any scale
    overdue = jnp.where(may_be_overdue[:, None], -at_ends - margin, NEVER)
    minima = jnp.where(priority[:, None] > 0, jnp.concatenate([due, overdue], axis=1), NEVER)
    return jnp.where(is_masked, MASK * priority, priority), jnp.clip(minima, -NEVER, NEVER)


def _must_settle(state: MaskedState) -> jax.Array:
    return (state.unsettled >= len(state.drawn)) | (jnp.abs(state.tilt) > TILT)


def _settle(state: MaskedState) -> MaskedState:
    """The same state with progress and tilt 0, computed anew for all slots."""
    every = jnp.arange(len(state.drawn), dtype=jnp.int32)
    zero = jnp.zeros_like(state.progress)
    state = state.replace(
        debt=draw_debt(state, every),
        since=jnp.zeros_like(state.since),
        progress=zero,
        progress_low=zero,
        tilt=zero,
        all_drawn=state.drawn.sum(dtype=state.all_drawn.dtype),
        unsettled=jnp.zeros_like(state.unsettled),
    )
    priority = _priority(state, every)
    drawable, minima = _leaves(state, every, priority)
    return state.replace(
        sums=trees.build(jnp.stack([priority, drawable], axis=1), jnp.sum, 0.0),
        minima=trees.build(minima, jnp.min, NEVER),
    )


def with_current_masks(state: MaskedState, batch_size: int) -> MaskedState:
    """The state with every slot masked or not as its debt says; `batch_size` is about how many turn, at no risk."""
    state = jax.lax.while_loop(_must_settle, _settle, state)
    width = max(batch_size, trees.FAN_OUT)

    def turn(carry: tuple[MaskedState, jax.Array]) -> tuple[MaskedState, jax.Array]:
        state, start = carry
        slots, start = _find(state, start, width)
        return _write(state, slots, _priority(state, slots)), start

    start = (state, jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(lambda carry: carry[1] < len(state.drawn), turn, start)[0]


def _find(state: MaskedState, start: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Slots from `start` on that may have to turn: [width] int32 in order, then -1; and where to go on looking."""
    capacity = len(state.drawn)
    end = jnp.array(capacity, jnp.int32)
    share = (state.tilt + TILT) / (2 * TILT)

    def may_turn(values: jax.Array) -> jax.Array:
        lowest = (1 - share) * values[:, 0::2] + share * values[:, 1::2]
        return (lowest <= jnp.stack([state.progress, -state.progress])[None]).any(axis=1)

    nodes = jnp.zeros(1, jnp.int32)
    for depth in reversed(range(len(state.minima))):
        span = trees.FAN_OUT**depth  # slots below a node
        children = (nodes[:, None] * trees.FAN_OUT + jnp.arange(trees.FAN_OUT, dtype=jnp.int32)[None]).ravel()
        wanted = (children >= 0) & ((children + 1) * span > start)
        wanted &= may_turn(state.minima[depth].at[children].get(mode="fill", fill_value=NEVER))
        index = jnp.nonzero(wanted, size=width + 1, fill_value=-1)[0]
        nodes = jnp.where(index >= 0, children[index], -1)
        # those that find no room are left for another time
        end = jnp.where(nodes[width] >= 0, jnp.minimum(end, nodes[width] * span), end)
        nodes = nodes[:width]
    return jnp.where(nodes < end, nodes, -1), end


def _draw_strata(key: jax.Array, sums: trees.Tree, batch_size: int) -> jax.Array:
    fraction_key, draw_key = jax.random.split(key)
    return trees.draw(draw_key, sums, trees.stratified(fraction_key, batch_size), DRAWABLE)


Choice = tuple[jax.Array, trees.Tree, jax.Array, jax.Array]  # key, sums, slots chosen, how many of them


def _draw_distinct(key: jax.Array, sums: trees.Tree, batch_size: int) -> jax.Array:
    """Independent draws; as often as it takes, those that repeat one are drawn again with what is chosen left out.

    Where there are fewer slots than draws, the whole choice is repeated.
    """

    def draw(key: jax.Array, sums: trees.Tree, chosen: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        fraction_key, draw_key = jax.random.split(key)
        drawn = trees.draw(draw_key, sums, jax.random.uniform(fraction_key, (batch_size,)), DRAWABLE)
        new = is_first(drawn) & (jnp.arange(batch_size) < batch_size - count)
        place = jnp.where(new, count + jnp.cumsum(new, dtype=jnp.int32) - 1, batch_size)
        return chosen.at[place].set(drawn, mode="drop"), count + new.sum(dtype=jnp.int32)

    def redraw(carry: Choice) -> Choice:
        key, sums, chosen, count = carry
        key, draw_key = jax.random.split(key)
        index = jnp.arange(batch_size)
        taken = jnp.where(index < count, chosen, -1)
        priority = sums[0][taken, PRIORITY]
        sums = trees.write(sums, taken, jnp.stack([priority, jnp.zeros_like(priority)], axis=1), jnp.sum)
        exhausted = trees.root(sums, jnp.sum)[DRAWABLE] == 0
        drawn, enough = draw(draw_key, sums, chosen, count)
        chosen = jnp.where(exhausted, chosen[index % count], drawn)
        return key, sums, chosen, jnp.where(exhausted, jnp.int32(batch_size), enough)

    key, draw_key = jax.random.split(key)
    first = (key, sums, *draw(draw_key, sums, jnp.zeros(batch_size, jnp.int32), jnp.int32(0)))
    chosen: jax.Array = jax.lax.while_loop(lambda carry: carry[3] < batch_size, redraw, first)[2]
    return chosen
