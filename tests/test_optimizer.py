"""Adam with ages: optax's Adam until a part starts afresh, and there the steps of a new optimiser."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resprout.agents.optimizer import adam, ages_of, forget_ages, scale_by_adam


def params():
    return {
        "kernel": jnp.ones((3, 3, 4, 5)),
        "bias": jnp.ones(5),
        "members": {"kernel": jnp.ones((2, 4, 3)), "bias": jnp.ones((2, 3))},
        "scale": jnp.ones(()),
    }


def gradients(step, like):
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(step), len(leaves))
    return structure.unflatten([jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize("eps", [1e-8, 1.5e-4])
def test_is_the_adam_of_optax_while_nothing_starts_afresh(eps):
    ours, theirs = adam(1e-3, eps), optax.adam(1e-3, eps=eps)
    states = [tx.init(params()) for tx in (ours, theirs)]
    updates = [jax.jit(tx.update) for tx in (ours, theirs)]
    for step in range(50):
        gradient = gradients(step, params())
        (mine, states[0]), (other, states[1]) = (
            update(gradient, state) for update, state in zip(updates, states, strict=True)
        )
        # The root of 1 - b2^t takes over some 6e-5 of float32's rounding in the first steps, of theirs and of ours.
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), mine, other)


def test_rows_and_columns_that_start_afresh_take_the_steps_of_a_new_optimiser():
    tx, start = scale_by_adam(), params()
    update = jax.jit(tx.update)
    state, new = tx.init(start), tx.init(start)
    for step in range(200):
        _, state = update(gradients(step, start), state)
    mask = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), start)
    mask["kernel"] = mask["kernel"].at[..., 2].set(True).at[:, :, 1].set(True)
    members = mask["members"]
    mask["members"] = {"kernel": members["kernel"].at[1, 3].set(True), "bias": members["bias"].at[1, 2].set(True)}
    mask["bias"] = mask["bias"].at[0].set(True)
    zero = jax.tree.map(lambda moment, masked: jnp.where(masked, 0, moment), (state.mu, state.nu), (mask, mask))
    state = forget_ages(state._replace(mu=zero[0], nu=zero[1]), mask)
    never = state
    for step in range(30):
        gradient = gradients(1000 + step, start)
        mine, state = update(gradient, state)
        fresh, new = update(gradient, new)
        jax.tree.map(lambda m, f, masked: np.testing.assert_array_equal(m[masked], f[masked]), mine, fresh, mask)
    assert (
        jax.tree.leaves(never.ages == 0)[0].sum() == 9 + 9 + 1 + 1 + 1
    )  # 3 x 3 columns and rows, a member's row, two biases


def test_an_entry_masked_alone_keeps_its_age():
    tx, start = scale_by_adam(), {"kernel": jnp.ones((4, 5))}
    _, state = tx.update(start, tx.init(start))
    mask = {"kernel": jnp.zeros((4, 5), bool).at[1, 2].set(True)}
    assert (forget_ages(state, mask).ages == state.ages).all()


def test_ages_are_of_the_inputs_and_the_units_of_a_kernel_and_of_the_entries_of_all_else():
    state = scale_by_adam().init(params())
    shapes = [[age.shape for age in ages] for ages in ages_of(state)]  # bias, kernel, members' bias and kernel, scale
    assert shapes == [[(5,)], [(3, 3, 4, 1), (3, 3, 1, 5)], [(2, 3)], [(2, 4, 1), (2, 1, 3)], [()]]


@pytest.mark.parametrize(("steps", "factor"), [(1, 3.16), (12, 6.6), (100, 3.2), (1000, 1.26)])
def test_moments_zeroed_under_an_old_count_overshoot(steps, factor):
    """lr (1 - b1^t) / sqrt(1 - b2^t) of a constant gradient, against the step of length lr with ages forgotten."""
    tx, start = scale_by_adam(), {"weight": jnp.ones(1)}
    state = tx.init(start)._replace(ages=jnp.array([1_000_000], jnp.int32))
    fresh = tx.init(start)
    for _ in range(steps):
        long, state = tx.update(start, state)
        right, fresh = tx.update(start, fresh)
    assert float(long["weight"][0] / right["weight"][0]) == pytest.approx(factor, rel=0.02)
