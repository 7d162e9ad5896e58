"""Numbers for samplers: few calls, the laws that they should have."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32
from scipy import stats

from resprout.replay.randomness import below, random_bits, shuffle_steps, stable_order, threefry, without_repeats


def shuffled_one_by_one(targets, entries):
    """The same shuffle, a step at a time."""
    entries = list(entries)
    for i, target in enumerate(targets):
        entries[i], entries[target] = entries[target], entries[i]
    return entries


shuffled = jax.jit(shuffle_steps, static_argnums=2)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), steps=st.sampled_from([1, 12]), count=st.integers(0, 40))
def test_steps_at_once_are_steps_one_by_one(data, steps, count):
    """Numbers so small that most targets meet; the limit is above what fits into a word with the place as well."""
    random = np.array(data.draw(st.lists(st.integers(0, 11), min_size=steps, max_size=steps)), np.uint32)
    taken = min(steps, count)
    targets = [i + int(random[i]) % (count - i) for i in range(taken)]
    entries = np.arange(100, 100 + max(count, steps))
    expected = shuffled_one_by_one(targets, entries)
    for limit in (40, 2**30):
        result = shuffled(jnp.asarray(random), jnp.int32(count), limit)
        entries_after = entries.copy()
        moved = np.asarray(result.displaced)
        entries_after[np.asarray(result.target)[moved]] = entries[np.asarray(result.origin)[moved]]
        entries_after[:steps] = entries[np.asarray(result.source)]
        np.testing.assert_array_equal(entries_after[:count], expected[:count])


@pytest.mark.parametrize(("count", "steps"), [(4, 4), (4, 6), (5, 2)])
def test_every_choice_in_every_order_is_as_likely(count, steps):
    keys = jax.random.split(jax.random.key(3), 12_000)

    @partial(jax.jit, static_argnums=1)
    def shuffles(keys, steps):
        return jax.vmap(lambda key: shuffle_steps(random_bits(key, (steps,))[1], jnp.int32(count), 8).source)(keys)

    taken = min(count, steps)
    drawn = [tuple(row) for row in np.asarray(shuffles(keys, steps))[:, :taken].tolist()]
    expected = set(itertools.permutations(range(count), taken))
    assert set(drawn) == expected and len(expected) == math.perm(count, taken)
    counts = [drawn.count(order) for order in sorted(expected)]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_threefry_is_the_generator_of_jax():
    key, count = jax.random.key_data(jax.random.key(7)), jnp.arange(10, dtype=jnp.uint32)
    theirs = threefry_2x32(key, jnp.concatenate([count + 5, count]))
    np.testing.assert_array_equal(jnp.concatenate(threefry(key, count + 5, count)), theirs)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_and_numbers_differ_from_call_to_call(impl):
    key, seen = jax.random.key(0, impl=impl), []
    for _ in range(50):
        before = key
        key, bits = random_bits(key, (3, 4))
        assert bits.shape == (3, 4) and bits.dtype == jnp.uint32
        assert jax.random.key_impl(key) == jax.random.key_impl(before)
        seen += [*np.asarray(bits).ravel().tolist(), *np.asarray(jax.random.key_data(key)).tolist()]
    assert len(set(seen)) > 0.99 * len(seen)
    numbers = np.array(seen, np.uint64)
    assert all(abs((numbers >> np.uint64(bit) & np.uint64(1)).mean() - 0.5) < 0.1 for bit in range(32))


def test_numbers_below_a_limit_are_uniform():
    bits = random_bits(jax.random.key(1), (60_000,))[1]
    assert stats.chisquare(np.bincount(below(bits, jnp.int32(7)), minlength=7)).pvalue > 1e-3
    np.testing.assert_array_equal(below(bits, jnp.int32(0)), 0)


@pytest.mark.parametrize("limit", [50, 2**31 - 1])
def test_equal_values_stay_in_their_order(limit):
    values = np.random.default_rng(0).integers(50, size=300)
    order = stable_order(jnp.asarray(values, jnp.int32), limit)
    np.testing.assert_array_equal(order, np.argsort(values, kind="stable"))


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=12), st.sampled_from([7, 2**31 - 1]))
@settings(max_examples=50, deadline=None)
def test_of_equal_slots_the_last_stays(slots, limit):
    found = without_repeats(jnp.array(slots), limit)
    assert found.tolist() == [-1 if slot in slots[place + 1 :] else slot for place, slot in enumerate(slots)]


def test_padding_between_equal_slots_does_not_keep_both():
    """With 24 bits for the slot and 8 for the place, -1 and the last slot of the ring have one word."""
    found = without_repeats(jnp.tile(jnp.array([2**24 - 1, -1]), 128), 2**24)
    assert found.tolist() == [-1] * 254 + [2**24 - 1, -1]
