"""Churn: how much the outputs for the same inputs differ before and after updates."""

import jax
import jax.numpy as jnp


def _check_shapes(before: jax.Array, after: jax.Array) -> None:
    """ValueError unless they are the same: one would be broadcast."""
    if jnp.shape(before) != jnp.shape(after):
        raise ValueError(
            f"churn is of outputs of one shape, not {jnp.shape(before)} before and {jnp.shape(after)} after"
        )


def value_churn(before: jax.Array, after: jax.Array) -> jax.Array:
    """Mean absolute change of the values of held-out states; Tang & Berseth (2024, arXiv 2409.04792). -> ().

    before, after: same shape, any; of all actions or of those taken, as they are given.
    """
    _check_shapes(before, after)
    return jnp.abs(after - before).mean()


def policy_churn(before: jax.Array, after: jax.Array) -> jax.Array:
    """Share of states whose greedy action changed; Schaul et al. (2022, arXiv 2206.00730). -> () in [0, 1].

    before, after: [..., actions] values or logits; of equal ones the first is greedy.
    """
    _check_shapes(before, after)
    return jnp.mean(before.argmax(axis=-1) != after.argmax(axis=-1))


def action_churn(before: jax.Array, after: jax.Array) -> jax.Array:
    """Mean Euclidean change of the policy's mean action; Tang & Berseth (2024), for continuous control. -> ().

    before, after: [..., action dimensions].
    """
    _check_shapes(before, after)
    return jnp.mean(jnp.linalg.norm(after - before, axis=-1))


def gaussian_churn(
    mean_before: jax.Array, log_std_before: jax.Array, mean_after: jax.Array, log_std_after: jax.Array
) -> jax.Array:
    """Mean KL divergence KL(before || after) of diagonal Gaussian policies, in nats; closed form. -> ().

    All [..., action dimensions]. tanh of both leaves it as it is.
    """
    variance_ratio = jnp.exp(2 * (log_std_before - log_std_after))
    shift = jnp.square((mean_before - mean_after) * jnp.exp(-log_std_after))
    return (0.5 * (variance_ratio + shift - 1) + log_std_after - log_std_before).sum(axis=-1).mean()
