"""RR-M beside a dense version in NumPy that looks at every slot at every batch; oracles M1 to M8 of arXiv 2503.02269."""

import itertools
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resprout.replay import masked, prioritized
from resprout.replay.masked import DRAWABLE, PRIORITY, draw_debt, with_current_masks


class Dense:
    """The paper's algorithm in double precision, told which slots were drawn."""

    def __init__(self, capacity):
        self.priority, self.drawn, self.expected = np.zeros((3, capacity))
        self.highest = 1.0

    def add(self, slots):
        for slot in slots[slots >= 0]:
            self.priority[slot] = self.highest
            if self.expected[slot] > 0:
                self.drawn[slot] = self.expected[slot] = 0
                if self.expected.sum() > 0:
                    self.expected *= self.drawn.sum() / self.expected.sum()

    def masks(self):
        return self.drawn > self.expected + 1e-9

    def sampled(self, slots):
        self.expected += self.priority * len(slots) / self.priority.sum()
        np.add.at(self.drawn, slots, 1)

    def update(self, slots, priorities):
        values = np.maximum(np.abs(priorities), 0.01) ** 0.6
        self.highest = max(self.highest, values.max())
        self.priority[slots] = values


@pytest.fixture(params=[False, True], ids=["single", "double"])
def precision(request):
    """Largest error of a debt."""
    with jax.enable_x64(request.param):
        yield 1e-8 if request.param else 1e-3


def is_masked(state, batch_size):
    """[capacity] bool, as the next batch will find them."""
    leaves = with_current_masks(state, batch_size).sums[0][: len(state.drawn)]
    return leaves[:, DRAWABLE] < leaves[:, PRIORITY]


def filled(sampler, capacity, priorities=None, seed=0):
    slots = jnp.arange(capacity, dtype=jnp.int32)
    state = sampler.add(sampler.init(jax.random.key(seed)), slots)
    return state if priorities is None else sampler.update(state, slots, jnp.asarray(priorities))


def scan(sampler, state, batches, batch_size, look=lambda state: ()):
    """States' `look` before every batch, the batches' slots, and the last state."""

    def body(state, _):
        seen = look(state)
        state, slots, _ = sampler.sample(state, batch_size)
        return state, (seen, slots)

    state, (seen, slots) = jax.jit(partial(jax.lax.scan, body, length=batches))(state)
    return seen, np.asarray(slots), state


def operations(sampler, batch_size):
    """`add`, `sample` (with the masks that it found) and `update`, compiled."""

    def sample(state):
        before = is_masked(state, batch_size)
        state, slots, _ = sampler.sample(state, batch_size)
        return state, slots, before

    return jax.jit(sampler.add), jax.jit(sample), jax.jit(sampler.update)


def saved_and_restored(state):
    """As a checkpoint does it: nothing but the arrays."""
    leaves, structure = jax.tree.flatten(state.replace(key=jax.random.key_data(state.key)))
    state = jax.tree.unflatten(structure, [jnp.asarray(np.array(leaf)) for leaf in leaves])
    return state.replace(key=jax.random.wrap_key_data(state.key))


def some_of(slots, random):
    """Most often all; else with some left out, or with others among them; padding stands for what is left out."""
    kind = random.integers(4)
    if kind == 0:
        return np.where(random.random(len(slots)) < 0.5, slots, -1).astype(np.int32)
    return random.permutation(slots) if kind == 1 else slots


@pytest.mark.parametrize(
    ("capacity", "batch_size", "stratified", "later"),
    [
        (64, 8, False, 512),
        (40, 8, True, 5),
        pytest.param(300, 16, False, 512, marks=pytest.mark.slow),
        pytest.param(40, 8, True, 512, marks=pytest.mark.slow),
    ],
)
def test_the_same_masks_as_the_dense_version_on_a_random_trace(
    precision, monkeypatch, capacity, batch_size, stratified, later
):
    """Adds, batches and updates in any order, updates of a part, of other slots, late or never; saved in between.

    Also M5 and M6: what is written anew starts from nothing, the others' expectations sum to all draws.
    """
    monkeypatch.setattr(sys.modules["resprout.replay.masked"], "LATER", later)
    sampler, random, dense = masked(capacity, stratified=stratified), np.random.default_rng(0), Dense(capacity)
    add, sample, update = operations(sampler, batch_size)
    debts = jax.jit(draw_debt)
    state, written, disagreed, followed = sampler.init(jax.random.key(0)), 0, 0, {}
    slots, before, last = np.arange(1), "add", None
    for turn in range(1200):
        operation = "add" if turn == 0 else random.choice(["add", "sample", "update"], p=[0.25, 0.45, 0.3])
        followed[last, operation] = followed.get((last, operation), 0) + 1
        last = operation
        if operation == "add":
            added = np.full(4, -1, np.int32)
            added[: random.integers(1, 5)] = 0
            added[added == 0] = (written + np.arange((added == 0).sum())) % capacity
            written += (added >= 0).sum()
            state = add(state, added)
            dense.add(added)
        elif operation == "sample":
            state, slots, before = sample(state)
            slots, before = np.asarray(slots), np.asarray(before)
            clear = np.abs(dense.drawn - dense.expected) > 3 * precision  # at a tie the two may round differently
            disagreed += (before != dense.masks())[clear].sum()
            dense.sampled(slots)
        elif len(slots) == batch_size:
            given = some_of(slots, random)
            if random.random() < 0.2:
                given = np.unique(random.integers(min(written, capacity), size=batch_size)).astype(np.int32)
                given = np.append(given, np.full(batch_size - len(given), -1, np.int32))
            priorities = random.lognormal(size=capacity)[
                given
            ]  # as JAX takes them: NumPy's and XLA's powers of single ones differ
            priorities = np.where(given % 5 > 0, priorities, np.nan)
            state = update(state, given, priorities)
            known = (given >= 0) & (given % 5 > 0)  # a priority that is not finite counts as the highest before
            highest = dense.highest
            if known.any():
                dense.update(given[known], priorities[known])
            dense.priority[given[(given >= 0) & ~known]] = highest
        if turn % 50 == 0:
            state = saved_and_restored(state)
        debt = np.asarray(debts(state), np.float64)
        np.testing.assert_allclose(debt, dense.drawn - dense.expected, atol=precision)
        assert abs(debt.sum()) < (1e-6 if precision < 1e-6 else 1e-2)
    assert disagreed == 0
    assert dense.masks().any() and not dense.masks().all()
    assert min(followed[pair] for pair in itertools.product(["add", "sample", "update"], repeat=2)) > 20


def test_expectations_end_with_the_last_draw(precision):
    """Where every slot drawn so far is written anew, nothing was drawn of the others, and nothing expected."""
    sampler, dense = masked(10), Dense(10)
    add, sample, update = operations(sampler, 2)
    state = filled(sampler, 10)
    dense.add(np.arange(10))
    for _ in range(3):
        for _ in range(2):
            state, slots, masks = sample(state)
            np.testing.assert_array_equal(masks, dense.masks())
            dense.sampled(np.asarray(slots))
        for slot in np.flatnonzero(dense.drawn):
            state = add(state, jnp.array([slot], jnp.int32))
            dense.add(np.array([slot]))
            np.testing.assert_allclose(draw_debt(state), dense.drawn - dense.expected, atol=precision)
        assert not dense.drawn.any() and not dense.expected.any()
        for slot in (3, 7):  # nothing is lost with what owes nothing
            state = update(state, jnp.array([slot], jnp.int32), jnp.array([2.0]))
            dense.update(np.array([slot]), np.array([2.0]))
            state = add(state, jnp.array([slot], jnp.int32))
            dense.add(np.array([slot]))
            np.testing.assert_allclose(draw_debt(state), 0, atol=precision)


@pytest.mark.slow
def test_vmapped_traces_are_separate_traces():
    """Three traces at once, in which a batch is followed by other things; in one nothing ever has new priorities."""
    sampler, batch_size, length = masked(40), 6, 60
    random = np.random.default_rng(1)
    kinds = random.integers(3, size=(3, length))
    kinds[:, 0], kinds[1][kinds[1] == 2] = 0, 1

    def step(carry, inputs):
        state, slots, written = carry
        kind, priorities = inputs

        def add(state, slots, written):
            return sampler.add(state, (written + jnp.arange(3, dtype=jnp.int32)) % 40), slots, written + 3

        def sample(state, slots, written):
            state, slots, _ = sampler.sample(state, batch_size)
            return state, slots, written

        def update(state, slots, written):
            return sampler.update(state, slots, priorities), slots, written

        carry = jax.lax.switch(kind, [add, sample, update], state, slots, written)
        return carry, (carry[1], draw_debt(carry[0]))

    def trace(key, kinds, priorities):
        nothing = jnp.full(batch_size, -1, jnp.int32)
        return jax.lax.scan(step, (sampler.init(key), nothing, jnp.int32(0)), (kinds, priorities))[1]

    keys = jax.random.split(jax.random.key(2), 3)
    priorities = random.lognormal(size=(3, length, batch_size)).astype(np.float32)
    together = jax.jit(jax.vmap(trace))(keys, kinds, priorities)
    alone = jax.jit(trace)
    for seed in range(3):
        slots, debts = alone(keys[seed], kinds[seed], priorities[seed])
        np.testing.assert_array_equal(slots, together[0][seed])
        np.testing.assert_allclose(debts, together[1][seed], atol=1e-4)


def test_m1_equal_priorities_are_drawn_in_epochs(precision):
    masks, slots, _ = scan(masked(64), filled(masked(64), 64), 24, 8, lambda state: is_masked(state, 8).sum())
    np.testing.assert_array_equal(masks, np.tile(np.arange(0, 64, 8), 3))
    for epochs in (1, 2, 3):
        np.testing.assert_array_equal(np.bincount(slots[: 8 * epochs].ravel(), minlength=64), epochs)


def test_m2_epochs_that_are_no_whole_number_of_batches(precision):
    masks, slots, _ = scan(masked(10), filled(masked(10), 10), 5, 4, lambda state: is_masked(state, 4).sum())
    np.testing.assert_array_equal(masks, [0, 4, 8, 2, 6])
    counts = [np.bincount(slots[: i + 1].ravel(), minlength=10) for i in range(5)]
    assert [(count.min(), count.max()) for count in counts] == [(0, 1), (0, 1), (1, 2), (1, 2), (2, 2)]


@pytest.mark.slow
def test_m3_m4_counts_stay_near_their_expectation():
    """Lognormal priorities, 500 slots, 4000 batches of 16; prioritised draws with replacement beside it."""
    with jax.enable_x64(True):
        weights = np.random.default_rng(0).lognormal(size=500)

        def debts(state):
            debt = draw_debt(state)
            return jnp.array([debt.sum(), debt.max()])

        sampler = masked(500, alpha=1.0)
        seen, slots, state = scan(sampler, filled(sampler, 500, weights), 4000, 16, debts)
        sums, highest = np.asarray(seen).T
        assert np.abs(sums).max() < 1e-6
        assert highest.max() < 1
        debt = np.asarray(draw_debt(state))
        share = np.maximum(weights, 0.01) / np.maximum(weights, 0.01).sum()
        np.testing.assert_allclose(debt, np.bincount(slots.ravel(), minlength=500) - slots.size * share, atol=1e-6)
        assert 0.5 < np.sqrt((debt**2).mean()) < 0.7 and debt.max() < 1
        assert (np.sort(slots, axis=1)[:, 1:] != np.sort(slots, axis=1)[:, :-1]).all()
        sampler = prioritized(500, alpha=1.0)
        drawn = np.bincount(scan(sampler, filled(sampler, 500, weights), 4000, 16)[1].ravel(), minlength=500)
        difference = drawn - 64_000 * share
        assert 9 < np.sqrt((difference**2).mean()) < 14 and np.abs(difference).max() > 25


@pytest.mark.slow
def test_m3_single_precision_does_not_drift():
    sampler = masked(500, alpha=1.0)
    state = filled(sampler, 500, np.random.default_rng(0).lognormal(size=500).astype(np.float32))
    debt = np.asarray(draw_debt(scan(sampler, state, 4000, 16)[2]), np.float64)
    assert abs(debt.sum()) < 0.05 and debt.max() < 1.001


def test_m5_a_masked_slot_written_anew_can_be_drawn_again():
    sampler = masked(20)
    state, slots, _ = sampler.sample(filled(sampler, 20), 5)
    slot = int(slots[2])
    assert bool(is_masked(state, 5)[slot])
    state = sampler.add(state, jnp.array([slot], jnp.int32))
    assert not bool(is_masked(state, 5)[slot])
    debt = np.asarray(draw_debt(state))
    assert debt[slot] == 0 and abs(debt.sum()) < 1e-5


def test_m7_a_batch_without_an_update_leaves_nothing_out():
    sampler = masked(30)
    slots = scan(sampler, filled(sampler, 30), 60, 8)[1]
    np.testing.assert_array_equal(np.bincount(slots.ravel(), minlength=30), 16)


def test_priorities_whose_masked_form_is_zero_do_not_hang():
    sampler = masked(8, alpha=1.0, minimum=1e-35)
    state = filled(sampler, 8, np.zeros(8, np.float32))
    slots = scan(sampler, state, 6, 5)[1]
    assert slots.shape == (6, 5) and (slots >= 0).all() and (slots < 8).all()


def test_batches_have_no_repeats_where_there_are_enough_slots():
    sampler = masked(40, alpha=1.0)
    heavy = np.full(40, 0.01, np.float32)
    heavy[:3] = 1e6  # alone they would fill every batch
    slots = np.sort(scan(sampler, filled(sampler, 40, heavy), 50, 32)[1], axis=1)
    assert (slots[:, 1:] != slots[:, :-1]).all()


@pytest.mark.slow
def test_what_was_looked_at_is_not_looked_at_again():
    """After the masks are brought up to date, no leaf or node of 300 slots claims that there is something to do below it."""
    sampler = masked(300, alpha=1.0)
    state = filled(sampler, 300, np.random.default_rng(0).lognormal(size=300).astype(np.float32))
    random = np.random.default_rng(1)
    sample, current = jax.jit(sampler.sample, static_argnums=1), jax.jit(with_current_masks, static_argnums=1)
    for _ in range(60):
        state, slots, _ = sample(state, 16)
        state = sampler.update(state, slots, random.lognormal(size=16).astype(np.float32))
    state = current(state, 16)
    assert state.tilt == 0 and len(state.bounds) == 3
    for level in state.bounds:
        assert ((level[:, :2].min(1) <= state.progress) | (level[:, 2:].min(1) <= -state.progress)).sum() <= 1


def test_reference_off_by_one_marks_the_next_slot():
    sampler = masked(4, reference_off_by_one=True)
    state = sampler.add(sampler.init(jax.random.key(0)), jnp.array([0], jnp.int32))
    np.testing.assert_array_equal(state.sums[0][:4, PRIORITY], [0, 1, 0, 0])
    state = sampler.add(state, jnp.array([3, -1], jnp.int32))
    np.testing.assert_array_equal(state.sums[0][:4, PRIORITY], [1, 1, 0, 0])


@pytest.mark.parametrize(("fields", "word"), [({"alpha": -1}, "alpha"), ({"minimum": 0}, "minimum")])
def test_bad_fields_are_refused(fields, word):
    with pytest.raises(ValueError, match=f"masked: {word}"):
        masked(10, **fields)
