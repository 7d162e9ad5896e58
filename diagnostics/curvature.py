"""Curvature: the empirical neural tangent kernel and the sharpness of a loss. Both are costly: opt in."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from .rank import srank

PyTree = Any

BREAKDOWN = 1e-6  # of a product's norm: what is left of it then is rounding, and the Krylov space is complete


def ntk(apply_fn: Callable[..., Any], params: PyTree, *inputs: Any) -> jax.Array:
    """Empirical neural tangent kernel J J^T, J = d outputs / d params; Jacot et al. (2018, arXiv 1806.07572).

    inputs: n examples along the first axis, each evaluated by itself; `apply_fn` returns k numbers of each example, in any
    PyTree: values of all actions, or those of the actions taken. -> [n * k, n * k], outputs of one example together.

    Costs n * k backward passes of one example and n * k * (number of parameters) numbers of memory: n <= 128.
    """

    def outputs(params: PyTree, *example: Any) -> jax.Array:
        return ravel_pytree(apply_fn(params, *jax.tree.map(lambda x: x[None], example)))[0]

    jacobians = jax.vmap(jax.jacrev(outputs), in_axes=(None, *(0 for _ in inputs)))(params, *inputs)
    rows = [leaf.reshape(leaf.shape[0] * leaf.shape[1], -1) for leaf in jax.tree.leaves(jacobians)]
    return jnp.sum(jnp.stack([jnp.matmul(row, row.T, precision="highest") for row in rows]), axis=0)


def ntk_rank(
    apply_fn: Callable[..., Any], params: PyTree, *inputs: Any, rank: Callable[[jax.Array], jax.Array] = srank
) -> jax.Array:
    """Rank of the empirical neural tangent kernel; Tang & Berseth (2025, arXiv 2506.00592, C-CHAIN). -> ().

    rank: srank or effective_rank, of the kernel itself. Inputs and cost as in `ntk`.
    """
    return rank(ntk(apply_fn, params, *inputs))


def sharpness(
    loss: Callable[[PyTree], jax.Array], params: PyTree, key: jax.Array, *, iterations: int = 20
) -> jax.Array:
    """Largest eigenvalue of the Hessian of loss(params), by Lanczos iterations; as Cohen et al. (2021, arXiv 2103.00065).

    loss: params -> (); what it holds fixed (batch, targets, weights of examples) is part of the definition. -> ().
    Lanczos rather than power iterations: as costly, sooner converged, and not misled by a larger negative eigenvalue.

    Costs `iterations` Hessian-vector products, each about two gradients, and `iterations` times the parameters in memory.
    """
    point, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda vector: loss(unravel(vector)))
    steps = min(iterations, point.size)

    def step(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[Any, Any]:
        basis, vector = carry
        basis = basis.at[index].set(vector)
        product = jax.jvp(gradient, (point,), (vector,))[1]
        residual = product
        for _ in range(2):  # once more, since what rounding leaves of the basis grows
            residual = residual - (basis @ residual) @ basis
        size = jnp.linalg.norm(residual)
        size = jnp.where(size > BREAKDOWN * jnp.linalg.norm(product), size, 0)
        following = jnp.where(size > 0, residual, 0) / jnp.where(size > 0, size, 1)
        return (basis, following), (vector @ product, size)

    start = jax.random.normal(key, point.shape, point.dtype)
    carry = (jnp.zeros((steps, point.size), point.dtype), start / jnp.linalg.norm(start))
    _, (diagonal, beside) = jax.lax.scan(step, carry, jnp.arange(steps))
    # Rows behind a breakdown are empty; the first Rayleigh quotient in their place is no larger than the answer.
    reached = jnp.concatenate([jnp.ones(1, bool), jnp.cumprod(beside[:-1] > 0).astype(bool)])
    diagonal = jnp.where(reached, diagonal, diagonal[0])
    tridiagonal = jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
    wide = jnp.promote_types(tridiagonal.dtype, jnp.float32)
    return jnp.max(jnp.linalg.eigvalsh(tridiagonal.astype(wide)))
