import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from resprout.replay import prioritized, trees


def filled(sampler, priorities, seed=0):
    slots = jnp.arange(len(priorities), dtype=jnp.int32)
    return sampler.update(sampler.add(sampler.init(jax.random.key(seed)), slots), slots, jnp.asarray(priorities))


def draws(sampler, state, batches, batch_size):
    def body(state, _):
        state, slots, _ = sampler.sample(state, batch_size)
        return state, slots

    return np.asarray(jax.jit(lambda state: jax.lax.scan(body, state, length=batches)[1])(state))


@pytest.mark.parametrize("stratified", [False, True])
def test_in_proportion_to_the_priorities(stratified):
    priorities = np.random.default_rng(0).lognormal(sigma=2, size=300).astype(np.float32)
    sampler = prioritized(300, alpha=0.6, stratified=stratified)
    slots = draws(sampler, filled(sampler, priorities), 3000, 64)
    chances = priorities**0.6 / (priorities**0.6).sum()
    counts = np.bincount(slots.ravel(), minlength=300)
    statistic = ((counts - slots.size * chances) ** 2 / (slots.size * chances)).sum()
    assert statistic < stats.chi2.ppf(0.999, 299)
    assert stratified or statistic > stats.chi2.ppf(0.001, 299)


def test_stratified_draws_once_from_every_part():
    sampler = prioritized(64, alpha=1.0, stratified=True)
    slots = draws(sampler, filled(sampler, np.ones(64, np.float32)), 100, 64)
    np.testing.assert_array_equal(np.sort(slots, axis=1), np.broadcast_to(np.arange(64), (100, 64)))


def test_a_million_equal_slots_are_drawn_equally():
    """24 bits of one random number would be wrong by six percent; the chances of neighbours are counted in 64 groups."""
    count = 1_000_000
    tree = trees.build(jnp.ones(count), jnp.add, 0.0)
    slots = np.asarray(jax.jit(trees.draw, static_argnums=2)(jax.random.key(0), tree, 640_000)[1])
    for group in (slots % 64, slots // 15_625):
        assert stats.chisquare(np.bincount(group, minlength=64)).pvalue > 1e-3


@settings(deadline=None, max_examples=20)
@given(size=st.sampled_from([1, 16, 17, 300]), seed=st.integers(0, 1000), zeros=st.floats(0, 0.99))
def test_what_is_zero_is_never_drawn(size, seed, zeros):
    random = np.random.default_rng(seed)
    leaves = np.where(random.random(size) < zeros, 0, 10.0 ** random.uniform(-8, 8, size)).astype(np.float32)
    leaves[random.integers(size)] = 1e-8
    fraction = np.concatenate([random.random(200), [0, 1 - 2**-23, 1]]).astype(np.float32)
    tree = trees.build(jnp.asarray(leaves), jnp.add, 0.0)
    low_bits = jax.random.uniform(jax.random.key(seed), (len(tree), len(fraction)))
    slots = trees.find(tree, jnp.asarray(fraction), low_bits)
    assert (leaves[np.asarray(slots)] > 0).all()


def updated(tree, writes, batch_size, seed):
    """A tree after `writes` batches of random writes, the leaves in NumPy beside it."""

    def body(tree, key):
        slot_key, value_key = jax.random.split(key)
        slots = jax.random.randint(slot_key, (batch_size,), 0, len(tree[0]), jnp.int32)
        values = jnp.exp(jax.random.normal(value_key, (batch_size,)) * 3)
        values = values[jnp.argmax(slots[:, None] == slots[None], axis=1)]  # equal slots, equal values
        return trees.write(tree, slots, values, jnp.add), None

    return jax.jit(lambda tree: jax.lax.scan(body, tree, jax.random.split(jax.random.key(seed), writes))[0])(tree)


def test_m6_sums_do_not_drift():
    """1e6 writes: the same tree, bit for bit, as one made from its leaves; in double precision to 1e-9 of their sum."""
    tree = updated(trees.empty((4096,), 0.0), 2000, 500, 0)
    for level, fresh in zip(tree, jax.jit(lambda leaves: trees.build(leaves, jnp.add, 0.0))(tree[0]), strict=True):
        np.testing.assert_allclose(level, fresh, rtol=1e-6)
    assert abs(float(tree[-1].sum()) / np.asarray(tree[0], np.float64).sum() - 1) < 1e-6
    with jax.enable_x64(True):
        tree = updated(trees.empty((4096,), 0.0), 2000, 500, 0)
        assert abs(float(tree[-1].sum()) / np.asarray(tree[0]).sum() - 1) < 1e-9


def test_weights_and_their_exponent():
    """(p_min / p)^beta, beta from 0.5 to 1 over two batches; Schaul et al., section 3.4."""
    sampler = prioritized(2, alpha=1.0, beta=0.5, beta_steps=2)
    state = filled(sampler, np.array([1, 4], np.float32))
    for exponent in (0.5, 0.75, 1.0, 1.0):
        state, slots, weights = sampler.sample(state, 32)
        assert set(np.asarray(slots).tolist()) == {0, 1}
        np.testing.assert_allclose(weights, np.where(np.asarray(slots) == 0, 1, 0.25**exponent), rtol=1e-6)


def test_no_weights_without_beta():
    sampler = prioritized(2, alpha=1.0, beta=0)
    assert (sampler.sample(filled(sampler, np.array([1, 4], np.float32)), 32)[2] == 1).all()


def test_what_is_new_gets_the_highest_priority_so_far():
    sampler = prioritized(5, alpha=0.5)
    state = sampler.add(sampler.init(jax.random.key(0)), jnp.array([0, 1], jnp.int32))
    np.testing.assert_allclose(state.tree[0][:5], [1, 1, 0, 0, 0])
    state = sampler.update(state, jnp.array([1, 0, -1]), jnp.array([-9.0, 4.0, 100.0]))  # the last is padding
    state = sampler.add(state, jnp.array([2], jnp.int32))
    state = sampler.update(state, jnp.array([0]), jnp.array([0.0]))
    state = sampler.add(state, jnp.array([3], jnp.int32))
    np.testing.assert_allclose(state.tree[0][:5], [1e-3, 3, 3, 3, 0])
    state = sampler.update(state, jnp.array([1, 2]), jnp.array([jnp.nan, jnp.inf]))
    np.testing.assert_allclose(state.tree[0][:5], [1e-3, 3, 3, 3, 0])


def test_lap_priorities():
    """max(|error|, 0.01)^0.6, by hand."""
    sampler = prioritized(3, alpha=0.6, beta=0, minimum=0.01)
    state = filled(sampler, np.array([0.001, -0.5, 2.0], np.float32))
    np.testing.assert_allclose(state.tree[0][:3], [0.0630957, 0.6597540, 1.5157166], rtol=1e-5)


def test_reference_off_by_one():
    sampler = prioritized(3, reference_off_by_one=True)
    state = sampler.add(sampler.init(jax.random.key(0)), jnp.array([0, 1], jnp.int32))
    np.testing.assert_array_equal(state.tree[0][:3], [0, 1, 1])
    assert float(sampler.add(state, jnp.array([2], jnp.int32)).tree[0][0]) == 1


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"alpha": -0.1}, "alpha"),
        ({"beta": 1.1}, "beta"),
        ({"beta_steps": 0}, "beta_steps"),
        ({"minimum": 0}, "minimum"),
    ],
)
def test_bad_fields_are_refused(fields, word):
    with pytest.raises(ValueError, match=f"prioritized: {word}"):
        prioritized(10, **fields)
