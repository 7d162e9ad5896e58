import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resprout.replay import Part, Storage, gather_mixed, mixture, prioritized, uniform
from resprout.replay.mixture import split

SHARES = (0.5, 0.3, 0.2)
CAPACITIES = (40, 10, 25)  # live, then two pasts: slots 0 to 39, 40 to 49, 50 to 74


def mixed(kind=uniform, capacities=CAPACITIES, shares=SHARES):
    return mixture(*(Part(kind(capacity), capacity, share) for capacity, share in zip(capacities, shares, strict=True)))


UNIFORM = mixed()
BATCH = jax.jit(UNIFORM.sample, static_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
def started(sampler, live=7, seed=0):
    slots = jnp.arange(CAPACITIES[0])
    return sampler.add(sampler.init(jax.random.key(seed)), jnp.where(slots < live, slots, -1))


@pytest.mark.parametrize(
    ("batch_size", "shares", "expected"),
    [
        (32, (0.5, 0.5), [16, 16]),
        (33, (0.5, 0.5), [17, 16]),  # a tie goes to the earlier one
        (10, (0.5, 0.3, 0.2), [5, 3, 2]),
        (8, (0.5, 0.3, 0.2), [4, 2, 2]),  # 4, 2.4, 1.6
        (100, (0.29, 0.71), [29, 71]),  # 0.29 * 100 is 28.999999999999996
        (7, (0.5, 1 / 6, 1 / 6, 1 / 6), [4, 1, 1, 1]),  # 3.5, 1.167 three times
        (1, (0.4, 0.6), [0, 1]),
    ],
)
def test_split(batch_size, shares, expected):
    assert split(batch_size, shares) == expected


@given(batch_size=st.integers(1, 1000), parts=st.lists(st.integers(1, 100), min_size=1, max_size=6))
def test_a_split_is_whole_and_nowhere_off_by_one(batch_size, parts):
    shares = [part / sum(parts) for part in parts]
    sizes = split(batch_size, shares)
    assert sum(sizes) == batch_size
    assert all(abs(size - share * batch_size) < 1 for size, share in zip(sizes, shares, strict=True))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31 - 1), live=st.sampled_from([1, 7, 40]), batch_size=st.sampled_from([10, 33]))
def test_every_batch_has_its_shares(seed, live, batch_size):
    _, slots, weights = BATCH(started(UNIFORM, live, seed), batch_size)
    assert slots.shape == weights.shape == (batch_size,)
    assert slots.dtype == jnp.int32 and weights.dtype == jnp.float32
    owner = np.searchsorted([40, 50, 75], slots, side="right")
    assert np.bincount(owner, minlength=3).tolist() == split(batch_size, SHARES)
    assert (np.asarray(slots)[owner == 0] < live).all() and (slots >= 0).all()


def test_the_past_is_there_whole_and_evenly():
    def draw(state, _):
        state, slots, _ = UNIFORM.sample(state, 100)
        return state, slots

    _, slots = jax.lax.scan(draw, started(UNIFORM), length=200)
    counts = np.bincount(np.asarray(slots).ravel(), minlength=75)
    assert (counts[7:40] == 0).all()
    for part, share in ((counts[:7], 0.5), (counts[40:50], 0.3), (counts[50:], 0.2)):
        expected = share * 20_000 / len(part)
        assert ((part - expected) ** 2 / expected).sum() < 3 * len(part)  # chi-square; its mean is len(part) - 1


def test_jit_changes_nothing_and_vmap_equals_each_alone():
    state = started(UNIFORM)
    np.testing.assert_array_equal(UNIFORM.sample(state, 20)[1], BATCH(state, 20)[1])

    def first_batch(key):
        return UNIFORM.sample(UNIFORM.add(UNIFORM.init(key), jnp.arange(5)), 20)[1]

    keys = jax.random.split(jax.random.key(3), 3)
    together, alone = jax.jit(jax.vmap(first_batch))(keys), jax.jit(first_batch)
    for index, key in enumerate(keys):
        np.testing.assert_array_equal(together[index], alone(key))


def test_priorities_reach_the_source_they_belong_to():
    sampler = mixed(prioritized)
    state = started(sampler, live=40)
    slots = jnp.array([74, 3, 40, 49, 39, -1, 50])
    priorities = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    updated = jax.jit(sampler.update)(state, slots, priorities)
    own = {0: ([3, 39], [2.0, 5.0]), 1: ([0, 9], [3.0, 4.0]), 2: ([24, 0], [1.0, 7.0])}
    for index, (part_slots, part_priorities) in own.items():
        update = jax.jit(prioritized(CAPACITIES[index]).update)
        alone = update(state[index], jnp.array(part_slots), jnp.array(part_priorities))
        for expected, found in zip(jax.tree.leaves(alone), jax.tree.leaves(updated[index]), strict=True):
            if not jnp.issubdtype(expected.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(ValueError, match="nothing has been added"):
        UNIFORM.sample(started(UNIFORM, live=0), 10)
    with pytest.raises(ValueError, match="leaves a source with nothing"):
        jax.eval_shape(lambda state: UNIFORM.sample(state, 2), started(UNIFORM))


@pytest.mark.parametrize("shares", [(0.5, 0.4), (0.5, 0.6), (1.2, -0.2), (1.0, 0.0)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="shares must be positive and sum to 1"):
        mixed(capacities=(10, 10), shares=shares)


@settings(deadline=None)
@given(slots=st.lists(st.integers(0, 29), min_size=1, max_size=20))
def test_gather_finds_every_slot_in_any_order(slots):
    sources = []
    for source in range(3):
        storage = Storage(10, (2,), "float32")
        storage.begin(np.zeros((1, 2)))
        for step in range(10):
            reached = np.full((1, 2), 10 * source + step)
            storage.add([source], [10.0 * source + step], [False], [False], reached, reached)
        sources.append(storage)
    columns = gather_mixed(sources, slots)
    np.testing.assert_array_equal(columns["reward"], slots)
    np.testing.assert_array_equal(columns["action"], np.array(slots) // 10)
    np.testing.assert_array_equal(columns["next_observation"], np.stack([slots, slots], axis=1))
    assert columns["reward"].dtype == np.float32
