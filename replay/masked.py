"""Prioritised random reshuffling (RR-M): a slot that was drawn more often than its priority entitles it to is masked."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from . import trees
from .prioritized import check_exponents, new_slots, powers
from .randomness import last_equal, without_repeats
from .sampler import Sampler, compiled

MASK = 1e-8  # factor on a masked priority: drawn only where nothing else is left
# How far `tilt` may go before the state is settled, where each slot was drawn once on average: the wider, the more is
# looked at in vain; the narrower, the more often all is.
REACH = 2e-4
LATER = 512  # a batch of more slots than these is written into the trees before its priorities come
NEVER = float(np.finfo(np.float32).max) / 4  # a progress that is not reached

# Columns of the tree of sums: of priorities, and of priorities as drawn from, masked ones times MASK.
PRIORITY, DRAWABLE = 0, 1
# Columns of the tree of bounds: at or below the progress at which masked slots turn, at a tilt of -reach and of reach, and
# the same of minus the progress at which the others do. A minimum of linear functions is concave, so that between the two
# ends it is not below the line through them.


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
    bounds: trees.Tree  # [., 4]
    waiting: (
        jax.Array
    )  # [LATER] int32: slots drawn last, -1 for none; those left out of the sums are still to be written
    drawn: jax.Array  # [capacity] int32: A
    ledger: jax.Array  # [capacity, 2] float: the debt when last written down, and since what progress
    progress: jax.Array  # () float
    progress_low: jax.Array  # () float: what rounding kept out of it
    tilt: jax.Array  # () float
    reach: jax.Array  # () float: of the tilt, for which the bounds hold
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
        zero = jnp.zeros(())
        return MaskedState(
            key=key,
            sums=trees.empty((capacity, 2), 0.0),
            bounds=trees.empty((capacity, 4), NEVER),
            waiting=jnp.full(LATER, -1, jnp.int32),
            drawn=jnp.zeros(capacity, jnp.int32),
            ledger=jnp.zeros((capacity, 2)),
            progress=zero,
            progress_low=zero,
            tilt=zero,
            reach=zero + REACH,
            all_drawn=zero,
            unsettled=jnp.zeros((), jnp.int32),
            highest=jnp.ones(()),
        )

    def add(state: MaskedState, slots: jax.Array) -> MaskedState:
        slots = new_slots(slots, capacity, reference_off_by_one)
        written, before = slots >= 0, _accounts(state, slots)
        lost = jnp.where(written, _debt(state, before), 0).sum()
        lost_draws = jnp.where(written, before.drawn, 0).sum()
        # The other expectations sum to `remaining + lost` and are to sum to `remaining`, as the draws do.
        remaining = state.all_drawn - lost_draws
        growth = jnp.where(remaining > 0, -lost / (remaining + lost), 0)
        # where no draw remains they are to be 0, which no multiple of them is: all slots are settled before the next draw
        none_left = (remaining == 0) & (lost_draws > 0)
        unsettled = jnp.where(none_left, capacity, state.unsettled)
        tilt = state.tilt + (1 - state.tilt) * growth / (1 + growth)
        # made from `before`, or XLA would copy all that it is read from, not knowing that it is read before it is written
        priority = jnp.where(written, state.highest, before.priority)
        new = Account(priority, jnp.where(written, 0, before.drawn), jnp.where(written, 0, before.debt))
        drawn = _put(state.drawn, slots, new.drawn)
        state = state.replace(drawn=drawn, all_drawn=remaining, tilt=tilt, unsettled=unsettled)
        return _store(state, slots, new)

    def sample(state: MaskedState, batch_size: int) -> tuple[MaskedState, jax.Array, jax.Array]:
        state = with_current_masks(state, batch_size)
        draw = _draw_strata if stratified else _draw_distinct
        key, slots, sums = draw(state.key, state.sums, batch_size)
        slots = jnp.minimum(slots, capacity - 1)  # a slot even if none is written
        # the running sum is kept to twice the precision, as its terms grow ever smaller beside it
        term = batch_size * (1 - state.tilt) / state.sums[-1].sum(0)[PRIORITY] + state.progress_low
        progress = state.progress + term
        progress_low = term - (progress - state.progress)
        state = state.replace(
            key=key,
            sums=sums,
            drawn=state.drawn.at[slots].add(1),
            ledger=state.ledger.at[slots, 0].add(1),
            progress=progress,
            progress_low=progress_low,
            all_drawn=state.all_drawn + batch_size,
            unsettled=state.unsettled + batch_size,
        )
        return _left_out(state, slots), slots, jnp.ones(batch_size, jnp.float32)

    def update(state: MaskedState, slots: jax.Array, priorities: jax.Array) -> MaskedState:
        values = powers(priorities, alpha, minimum, state.highest)
        highest = jnp.maximum(state.highest, jnp.max(values, where=slots >= 0, initial=0))
        slots = without_repeats(slots, capacity)
        account = _accounts(state, slots)._replace(priority=values)
        return _store(state.replace(highest=highest), slots, account)

    return compiled("masked", Sampler(init, add, sample, update), lambda state: state.sums[-1][:, PRIORITY])


class Account(NamedTuple):
    """Of some slots, at the present progress."""

    priority: jax.Array  # [B]
    drawn: jax.Array  # [B] int32
    debt: jax.Array  # [B]: without scale and tilt


def draw_debt(state: MaskedState) -> jax.Array:
    """[capacity]: draws of each slot so far minus those that its priority entitled it to; masked where positive."""
    return _debt(state, _all_accounts(state))


def _debt(state: MaskedState, account: Account) -> jax.Array:
    debt = (account.debt - state.tilt * account.drawn) / (1 - state.tilt)
    return jnp.where(state.all_drawn > 0, debt, 0)  # expectations sum to all draws


def _accounts(state: MaskedState, slots: jax.Array) -> Account:
    return _account(state, state.sums[0][slots], state.drawn[slots], state.ledger[slots])


def _all_accounts(state: MaskedState) -> Account:
    return _account(state, state.sums[0][: len(state.drawn)], state.drawn, state.ledger)


def _account(state: MaskedState, leaves: jax.Array, drawn: jax.Array, ledger: jax.Array) -> Account:
    priority = leaves[:, PRIORITY]
    return Account(priority, drawn, ledger[:, 0] - priority * (state.progress - ledger[:, 1]))


def _put(array: jax.Array, slots: jax.Array, values: jax.Array | int) -> jax.Array:
    return array.at[jnp.where(slots >= 0, slots, len(array))].set(values, mode="drop")


def _store(state: MaskedState, slots: jax.Array, account: Account) -> MaskedState:
    """What was earned so far is written down, and all in the trees that follows."""
    drawable, bounds = _leaves(state, account)
    return _noted(state, slots, account).replace(
        sums=trees.write(state.sums, slots, drawable, jnp.add), bounds=trees.lower(state.bounds, slots, bounds)
    )


def _noted(state: MaskedState, slots: jax.Array, account: Account) -> MaskedState:
    ledger = jnp.stack([account.debt, jnp.broadcast_to(state.progress, account.debt.shape)], axis=1)
    return state.replace(ledger=_put(state.ledger, slots, ledger))


def _left_out(state: MaskedState, slots: jax.Array) -> MaskedState:
    """`slots` are to be written into the trees: at their `update`, or else before the next batch."""
    if len(slots) > len(state.waiting):
        return _store(state, slots, _accounts(state, slots))
    leaves, *nodes = state.sums
    waiting = jnp.full_like(state.waiting, -1).at[: len(slots)].set(slots)
    return state.replace(sums=(leaves.at[slots, DRAWABLE].set(0), *nodes), waiting=waiting)


def _is_waiting(state: MaskedState) -> jax.Array:
    leaves = state.sums[0][state.waiting]
    return ((state.waiting >= 0) & (leaves[:, DRAWABLE] == 0) & (leaves[:, PRIORITY] > 0)).any()


def _write_waiting(state: MaskedState) -> MaskedState:
    state = _store(state, state.waiting, _accounts(state, state.waiting))
    return state.replace(waiting=jnp.full_like(state.waiting, -1))


def _leaves(state: MaskedState, account: Account) -> tuple[jax.Array, jax.Array]:
    """[B, 2] and [B, 4]: what the trees are to hold for slots of these accounts."""
    priority, drawn, debt = account
    is_single = debt.dtype == jnp.float32
    # A debt that is 0 but for rounding is none, so that equal priorities give exact epochs.
    tolerance, precision = (1e-5 if is_single else 1e-9), float(np.finfo(debt.dtype).eps)
    is_masked = _debt(state, account) > tolerance
    tilted = state.reach * drawn
    # Progress at which the debt is the tolerance, early enough to allow for rounding: what is found is looked at exactly.
    wait = (debt[:, None] + jnp.stack([tilted, -tilted], axis=1) - tolerance) / priority[:, None]
    margin = 8 * precision * (state.progress + (jnp.abs(debt) + tilted + tolerance) / priority)[:, None]
    due = jnp.where(is_masked[:, None], state.progress + wait - margin, NEVER)
    may_be_overdue = ~is_masked & (drawn > 0)  # never drawn, it owes nothing at any scale
    overdue = jnp.where(may_be_overdue[:, None], -state.progress - wait - margin, NEVER)
    minima = jnp.where(priority[:, None] > 0, jnp.concatenate([due, overdue], axis=1), NEVER)
    drawable = jnp.where(is_masked, MASK * priority, priority)
    return jnp.stack([priority, drawable], axis=1), jnp.clip(minima, -NEVER, NEVER)


def _must_settle(state: MaskedState) -> jax.Array:
    return (state.unsettled >= len(state.drawn)) | (jnp.abs(state.tilt) > state.reach)


def _settle(state: MaskedState) -> MaskedState:
    """The same state with progress and tilt 0, computed anew for all slots."""
    # or XLA would do at every batch, ahead of the loop, what of this the loop does not change
    state = jax.lax.optimization_barrier(state)
    account, zero = _all_accounts(state), jnp.zeros_like(state.progress)
    account = account._replace(debt=_debt(state, account))
    slots, all_drawn = len(state.drawn), state.drawn.sum(dtype=state.all_drawn.dtype)
    state = state.replace(
        ledger=jnp.stack([account.debt, jnp.zeros_like(account.debt)], axis=1),
        progress=zero,
        progress_low=zero,
        tilt=zero,
        reach=REACH * slots / jnp.maximum(all_drawn, slots),
        all_drawn=all_drawn,
        unsettled=jnp.zeros_like(state.unsettled),
    )
    sums, bounds = _leaves(state, account)
    return state.replace(sums=trees.build(sums, jnp.add, 0.0), bounds=trees.build(bounds, jnp.minimum, NEVER))


def with_current_masks(state: MaskedState, batch_size: int) -> MaskedState:
    """The state with every slot masked or not as its debt says; `batch_size` is about how many turn, at no risk."""
    state = jax.lax.while_loop(_must_settle, _settle, state)
    state = jax.lax.while_loop(_is_waiting, _write_waiting, state)
    width = max(batch_size + batch_size // 4, trees.FAN_OUT)  # as many as are drawn, and a margin

    def turn(carry: tuple[MaskedState, jax.Array]) -> tuple[MaskedState, jax.Array]:
        return _turn(*carry, width)

    # outside of the loop, whose every turn under vmap is a choice between two whole states; one turn is nearly always enough
    first = turn((state, jnp.zeros((), jnp.int32)))
    return jax.lax.while_loop(lambda carry: carry[1] < len(state.drawn), turn, first)[0]


def _turn(state: MaskedState, start: jax.Array, width: int) -> tuple[MaskedState, jax.Array]:
    """The state in which up to `width` slots from `start` on that may have to turn are looked at; where to go on looking."""
    end = jnp.array(len(state.drawn), jnp.int32)
    share = (state.tilt + state.reach) / (2 * state.reach)
    top = next(depth for depth, level in enumerate(state.bounds) if len(level) <= width * trees.FAN_OUT)
    nodes, bounds = jnp.arange(len(state.bounds[top]), dtype=jnp.int32), state.bounds[top]
    path = []
    for depth in reversed(range(top + 1)):
        span = trees.FAN_OUT**depth  # slots below a node
        due, overdue = ((1 - share) * bounds[:, i] + share * bounds[:, i + 1] for i in (0, 2))
        may_turn = (due <= state.progress) | (overdue <= -state.progress)
        chosen = _first(width + 1, may_turn & (nodes >= 0) & ((nodes + 1) * span > start))
        nodes = nodes.at[chosen].get(mode="fill", fill_value=-1)
        # those that find no room are left for another time
        end = jnp.where(nodes[width] >= 0, jnp.minimum(end, nodes[width] * span), end)
        nodes, chosen = nodes[:width], chosen[:width]
        path.append((nodes, chosen, bounds))
        if depth:
            level = state.bounds[depth - 1].reshape(-1, trees.FAN_OUT, bounds.shape[1])
            bounds = level.at[nodes].get(mode="clip").reshape(-1, bounds.shape[1])
            nodes = (nodes[:, None] * trees.FAN_OUT + jnp.arange(trees.FAN_OUT, dtype=jnp.int32)[None]).ravel()

    slots = jnp.where(nodes < end, nodes, -1)
    account = _accounts(state, slots)
    drawable, lowest = _leaves(state, account)
    lowest = jnp.where((slots >= 0)[:, None], lowest, bounds.at[chosen].get(mode="clip"))
    # Every node that was looked at becomes the minimum again of all below it, which is known already.
    levels = list(state.bounds)
    for depth, (nodes, chosen, bounds) in enumerate(reversed(path)):
        levels[depth] = _put(levels[depth], nodes, lowest)
        lowest = trees.above(bounds.at[chosen].set(lowest, mode="drop"), jnp.minimum)
    levels = [*levels[: top + 1], *trees.build(levels[top], jnp.minimum, NEVER)[1:]]
    sums = trees.write(state.sums, slots, drawable, jnp.add)
    return _noted(state, slots, account).replace(sums=sums, bounds=tuple(levels)), end


def _first(size: int, flags: jax.Array) -> jax.Array:
    """[size] int32: where the first of `flags` [N], N a multiple of FAN_OUT, are set, in order; then N."""
    # Within rows by a product, which has nothing of the cost of so long a cumulative sum.
    rows = flags.reshape(-1, trees.FAN_OUT).astype(jnp.float32)
    inside = (rows @ jnp.triu(jnp.ones((trees.FAN_OUT, trees.FAN_OUT), jnp.float32))).astype(jnp.int32)
    before = jnp.cumsum(inside[:, -1], dtype=jnp.int32) - inside[:, -1]
    place = jnp.where(flags, (before[:, None] + inside).ravel() - 1, size)
    return jnp.full(size, len(flags), jnp.int32).at[place].set(jnp.arange(len(flags), dtype=jnp.int32), mode="drop")


Drawn = tuple[jax.Array, jax.Array, trees.Tree]  # another key, slots, the tree with some of these left out


def _draw_strata(key: jax.Array, tree: trees.Tree, batch_size: int) -> Drawn:
    return *trees.draw(key, tree, batch_size, stratified=True, column=DRAWABLE), tree


Choice = tuple[jax.Array, trees.Tree, jax.Array, jax.Array]  # key, tree, slots chosen, how many of them


def _draw_distinct(key: jax.Array, tree: trees.Tree, batch_size: int) -> Drawn:
    """Independent draws; as often as it takes, those that repeat one are drawn again with what is chosen left out.

    Where there are fewer slots than draws, the whole choice is repeated.
    """

    def draw(
        key: jax.Array, tree: trees.Tree, chosen: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        key, drawn = trees.draw(key, tree, batch_size, column=DRAWABLE)
        is_first = last_equal(drawn, len(tree[0]))[0] < 0
        new = is_first & (jnp.arange(batch_size) < batch_size - count)
        place = jnp.where(new, count + jnp.cumsum(new, dtype=jnp.int32) - 1, batch_size)
        return key, chosen.at[place].set(drawn, mode="drop"), count + new.sum(dtype=jnp.int32)

    def redraw(carry: Choice) -> Choice:
        key, tree, chosen, count = carry
        index = jnp.arange(batch_size)
        taken = jnp.where(index < count, chosen, -1)
        tree = trees.write(tree, taken, tree[0][taken].at[:, DRAWABLE].set(0), jnp.add)
        exhausted = tree[-1].sum(0)[DRAWABLE] == 0
        key, drawn, enough = draw(key, tree, chosen, count)
        chosen = jnp.where(exhausted, chosen[index % count], drawn)
        return key, tree, chosen, jnp.where(exhausted, jnp.int32(batch_size), enough)

    key, chosen, count = draw(key, tree, jnp.zeros(batch_size, jnp.int32), jnp.int32(0))
    key, tree, chosen, _ = jax.lax.while_loop(lambda carry: carry[3] < batch_size, redraw, (key, tree, chosen, count))
    return key, chosen, tree
