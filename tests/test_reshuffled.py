"""RR-C: oracles E1 to E8 of arXiv 2503.02269's algorithm, and equality in law with a plain version of it."""

import sys
import zlib
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from resprout.replay import reshuffled, uniform, without_replacement


class Reference:
    """The paper's algorithm: a permutation of the whole capacity, slots not yet written dropped at their turn."""

    def __init__(self, capacity, random):
        self.capacity, self.random, self.count, self.remaining = capacity, random, 0, []

    def sample(self, batch_size):
        slots = []
        while len(slots) < batch_size:
            if not self.remaining:
                self.remaining = list(self.random.permutation(self.capacity))
            slot = self.remaining.pop()
            if slot < self.count:
                slots.append(int(slot))
        return slots


reshuffled = cache(reshuffled)  # one sampler for each capacity, compiled once


def filled(sampler, count, seed=0):
    return sampler.add(sampler.init(jax.random.key(seed)), jnp.arange(count, dtype=jnp.int32))


def scan_draws(sampler, state, batches, batch_size):
    def body(state, _):
        state, slots, _ = sampler.sample(state, batch_size)
        return state, slots

    return np.asarray(jax.jit(partial(jax.lax.scan, body, length=batches))(state)[1])


def lives(sampler, capacity, batch_size, period, steps, warmup_lives=2, seed=0):
    """Draws in each finished life of a slot: a ring that one slot is written to a step, a batch every `period` steps."""

    def body(carry, step):
        state, counts = carry
        slot = (step % capacity).astype(jnp.int32)
        state = sampler.add(state, slot[None])
        finished = counts[slot]
        counts = counts.at[slot].set(0)

        def learn(carry):
            state, counts = carry
            state, slots, _ = sampler.sample(state, batch_size)
            return state, counts.at[slots].add(1)

        return jax.lax.cond(step % period == period - 1, learn, lambda carry: carry, (state, counts)), finished

    start = (filled(sampler, capacity, seed), jnp.zeros(capacity, jnp.int32))
    finished = jax.jit(lambda start: jax.lax.scan(body, start, jnp.arange(steps))[1])(start)
    return np.asarray(finished)[warmup_lives * capacity :]


def test_e1_an_epoch_draws_every_slot_once():
    draws = scan_draws(reshuffled(64), filled(reshuffled(64), 64), 8 * 200, 8).reshape(200, 64)
    np.testing.assert_array_equal(np.sort(draws, axis=1), np.broadcast_to(np.arange(64), (200, 64)))
    # where a slot stands in an epoch: uniform, for every slot; 64 * 63 degrees of freedom at 200 epochs, in 8 x 8 groups
    place = np.argsort(draws, axis=1)
    table = np.histogram2d(np.tile(np.arange(64) // 8, 200), place.ravel() // 8, bins=8)[0]
    assert stats.chi2.sf(((table - 200) ** 2 / 200).sum(), 49) > 1e-3
    assert (draws[1:] != draws[:-1]).mean() > 0.9


@pytest.mark.parametrize(("capacity", "batch_size"), [(50, 7), (10, 32), (33, 32)])
def test_e2_counts_never_differ_by_more_than_one(capacity, batch_size):
    draws = scan_draws(reshuffled(capacity), filled(reshuffled(capacity), capacity), 60, batch_size)
    counts = np.zeros(capacity, int)
    for slot in draws.ravel():
        counts[slot] += 1
        assert counts.max() - counts.min() <= 1


def test_e3_lives_in_a_ring():
    counts = lives(reshuffled(640), 640, 32, 4, 640 * 112)
    assert len(counts) >= 7e4
    values, numbers = np.unique(counts, return_counts=True)
    np.testing.assert_array_equal(values, [7, 8, 9])
    np.testing.assert_allclose(numbers / len(counts), [1 / 6, 2 / 3, 1 / 6], atol=0.005)
    assert abs(counts.mean() - 8) < 0.01 and abs(counts.var() - 1 / 3) < 0.01


def test_e3_controls():
    """With replacement Poisson-like, without it in a batch a little narrower; the first also by its share never drawn."""
    capacity = 160
    with_replacement = lives(uniform(capacity), capacity, 32, 4, capacity * 250)
    assert abs(with_replacement.mean() - 8) < 0.05 and abs(with_replacement.var() - 8) < 0.3
    assert 1.5e-4 < (with_replacement == 0).mean() < 6e-4  # e^-8 is 3.4e-4
    without = lives(without_replacement(capacity), capacity, 32, 4, capacity * 250)
    assert abs(without.mean() - 8) < 0.05 and abs(without.var() - 8 * (1 - 32 / capacity)) < 0.3


def test_e3_mean_that_is_no_whole_number():
    counts = lives(reshuffled(640), 640, 10, 4, 640 * 40)
    assert abs(counts.mean() - 2.5) < 0.01 and abs(counts.var() - 1 / 3) < 0.02


def test_e4_only_written_slots_each_once_an_epoch():
    sampler = reshuffled(40)
    state, counts, count = sampler.init(jax.random.key(0)), np.zeros(40, int), 0
    add, sample = jax.jit(sampler.add), jax.jit(sampler.sample, static_argnums=1)
    for _ in range(40):
        state, count = add(state, jnp.array([count], jnp.int32)), count + 1
        state, slots, _ = sample(state, 3)
        np.add.at(counts, np.asarray(slots), 1)
        assert (np.asarray(slots) < count).all()
    assert (counts[:10] > counts[-10:].max()).all()  # older ones had more epochs


def test_e4_a_slot_that_is_passed_waits_for_the_next_epoch():
    sampler = reshuffled(6)
    seen = {True: 0, False: 0}
    for seed in range(40):
        order, ready = jnp.array([3, 1, 4, 0, 2, 0], jnp.int32), jnp.int32(5)
        state = filled(sampler, 5, seed).replace(order=order, ready=ready)
        state, slots, _ = sampler.sample(state, 3)
        np.testing.assert_array_equal(slots, [3, 1, 4])
        state = sampler.add(state, jnp.array([5], jnp.int32))
        left = int(state.count - state.passed)
        missed = left == 2
        seen[missed] += 1
        rest = np.asarray(sampler.sample(state, left)[1])
        assert set(rest.tolist()) == ({0, 2} if missed else {0, 2, 5})
        state, _, _ = sampler.sample(state, left)
        assert set(np.asarray(sampler.sample(state, 6)[1]).tolist()) == set(range(6))
    assert abs(seen[True] - 20) < 14  # half of the six places lie before the current one


def test_growth_follows_the_law_of_the_papers_algorithm():
    """Which slots come in three batches while the buffer grows from 2 to 4 of 5: the same frequencies as the reference's."""
    sampler, trials = reshuffled(5), 20_000

    def play(key):
        state = sampler.add(sampler.init(key), jnp.array([0, 1], jnp.int32))
        drawn = []
        for new in (2, 3, 4):
            state, slots, _ = sampler.sample(state, 2)
            drawn.append(slots)
            state = sampler.add(state, jnp.array([new], jnp.int32))
        return jnp.concatenate(drawn)

    ours = np.asarray(jax.jit(jax.vmap(play))(jax.random.split(jax.random.key(1), trials)))
    random, theirs = np.random.default_rng(0), []
    for _ in range(trials):
        reference, slots = Reference(5, random), []
        for count in (2, 3, 4):
            reference.count = count
            slots += reference.sample(2)
        theirs.append(slots)
    weights = 5 ** np.arange(6)
    a, b = (np.bincount(x @ weights, minlength=5**6) for x in (ours, np.array(theirs)))
    table = np.stack([a, b])[:, a + b > 20]
    assert table.shape[1] > 30
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_an_epoch_longer_than_what_is_drawn_ahead(monkeypatch):
    """Parts of 8 of an order of up to 50, and slots that join while some are ready: still each once an epoch."""
    monkeypatch.setattr(sys.modules["resprout.replay.reshuffled"], "AHEAD", 8)
    sampler = reshuffled.__wrapped__(50)
    draws = scan_draws(sampler, filled(sampler, 50), 120, 5).reshape(12, 50)
    np.testing.assert_array_equal(np.sort(draws, axis=1), np.broadcast_to(np.arange(50), (12, 50)))
    state, drawn, count = filled(sampler, 30), [], 30
    for _ in range(20):
        state, slots, _ = sampler.sample(state, 1)
        state = sampler.add(state, jnp.array([count], jnp.int32))
        drawn, count = [*drawn, int(slots[0])], count + 1
        assert sorted(np.asarray(state.order[:count]).tolist()) == list(range(count))
        assert set(drawn) <= set(np.asarray(state.order[: state.passed]).tolist())
    rest = np.asarray(scan_draws(sampler, state, int(state.count - state.passed), 1)).ravel().tolist()
    assert len(set(rest)) == len(rest) and not set(rest) & set(drawn)


def test_e5_the_slot_written_next_is_not_drawn():
    sampler = reshuffled(8, skip_next_write=True)
    state, position = filled(sampler, 8), 0
    add, sample = jax.jit(sampler.add), jax.jit(sampler.sample, static_argnums=1)
    counts = np.zeros(8, int)
    for _ in range(200):
        state, slots, _ = sample(state, 3)
        assert position not in np.asarray(slots)
        np.add.at(counts, np.asarray(slots), 1)
        state, position = add(state, jnp.array([position], jnp.int32)), (position + 1) % 8
    assert counts.max() < 1.3 * counts.min()


def test_e5_lives_where_the_slot_written_next_is_skipped():
    counts = lives(reshuffled(640, skip_next_write=True), 640, 32, 4, 640 * 60)
    assert abs(counts.mean() - 8) < 0.02 and abs(counts.var() - 0.3365) < 0.02


def test_e6_a_slot_overwritten_keeps_its_turn():
    sampler, payload = reshuffled(12), np.arange(12)
    state = filled(sampler, 12)
    state, first, _ = sampler.sample(state, 5)
    later = next(slot for slot in range(12) if slot not in np.asarray(first))
    state = sampler.add(state, jnp.array([later], jnp.int32))
    payload[later] = 100
    state, rest, _ = sampler.sample(state, 7)
    drawn = [*np.arange(12)[np.asarray(first)], *payload[np.asarray(rest)]]
    assert sorted(drawn) == sorted(payload)


@pytest.mark.parametrize("count", [30, 64])
def test_e7_every_draw_is_uniform(count):
    sampler = reshuffled(64)
    keys = jax.random.split(jax.random.key(2), 4000)
    batch = jax.jit(
        jax.vmap(lambda key: sampler.sample(sampler.add(sampler.init(key), jnp.arange(count, dtype=jnp.int32)), 4)[1])
    )(keys)
    for draw in np.asarray(batch).T:
        assert stats.chisquare(np.bincount(draw, minlength=count)).pvalue > 1e-4


@pytest.mark.parametrize("make", [uniform, without_replacement, reshuffled])
def test_e8_draws_of_what_was_there_before_learning(make):
    """(B / F) (ln(C / max(s, L)) + s / C) for the transition written at step s, learning from step L on."""
    capacity, batch_size, period, learning = 500, 8, 2, 50
    sampler = make(capacity)

    def body(carry, step):
        state, counts = carry
        slot = (step % capacity).astype(jnp.int32)
        old = counts[slot]
        state, counts = sampler.add(state, slot[None]), counts.at[slot].set(0)

        def learn(carry):
            state, slots, _ = sampler.sample(carry[0], batch_size)
            return state, carry[1].at[slots].add(1)

        due = (step >= learning) & (step % period == 0)
        return jax.lax.cond(due, learn, lambda carry: carry, (state, counts)), old

    def run(key):
        start = (sampler.init(key), jnp.zeros(capacity, jnp.int32))
        return jax.lax.scan(body, start, jnp.arange(2 * capacity))[1][capacity:]

    keys = jax.random.split(jax.random.key(zlib.crc32(b"warm-up")), 20)
    counts = np.asarray(jax.jit(lambda keys: jax.lax.map(run, keys))(keys)).mean(axis=0)
    written = np.arange(capacity)
    expected = batch_size / period * (np.log(capacity / np.maximum(written, learning)) + written / capacity)
    for part in (slice(0, 50), slice(50, 200), slice(200, 500)):
        assert abs(counts[part].mean() / expected[part].mean() - 1) < 0.02


def test_the_sequence_goes_on_where_it_was_saved():
    sampler = reshuffled(50)
    state = filled(sampler, 50)
    state, _, _ = sampler.sample(state, 33)
    leaves, structure = jax.tree.flatten(
        state.replace(key=jax.random.key_data(state.key), joining_key=jax.random.key_data(state.joining_key))
    )
    again = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    again = again.replace(
        key=jax.random.wrap_key_data(again.key), joining_key=jax.random.wrap_key_data(again.joining_key)
    )
    np.testing.assert_array_equal(scan_draws(sampler, state, 10, 32), scan_draws(sampler, again, 10, 32))
