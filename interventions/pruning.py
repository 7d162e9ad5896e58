"""Gradual magnitude pruning: ever more of the smallest weights are set to 0 and stay there."""

from typing import Literal

import jax
import jax.numpy as jnp

from ..agents.learner import Learner, PyTree
from .base import Context, Info, Intervention, Step, method, only_if, require
from .parameters import is_kernel, short_name
from .surgery import edit

Scope = Literal["layer", "global"]


@method
def magnitude_pruning(
    sparsity: float = 0.95,
    start: int = 200_000,
    end: int = 800_000,
    period: int = 1000,
    scope: Scope = "layer",
) -> Intervention:
    """Prune the weights of least magnitude, more and more (Zhu & Gupta, 2017, arXiv 1710.01878, eq. 1).

    The share of pruned weights grows from 0 at `start` to `sparsity` at `end` as 1 - (1 - progress)^3. Pruned weights are 0
    after each gradient step, in the target too, and Adam's moments of them; none comes back. Kernels only: biases and norms
    stay. Obando-Ceron et al. (2024, arXiv 2402.12479) prune value networks to 0.95 between 20 % and 80 % of a run, which
    the defaults are for 1,000,000 gradient steps.

    sparsity: share of a kernel's weights. start, end: gradient steps. period: gradient steps between two prunings.
    scope: layer, the same share of each kernel (all members of an ensemble together); global, of all kernels together.
    """
    require(0 <= sparsity <= 1, f"sparsity must lie in [0, 1], not {sparsity}")
    require(0 <= start < end, f"start and end must be ordered gradient steps, not {start} and {end}")
    require(period >= 1, f"period must be at least 1 gradient step, not {period}")

    def init(learner: Learner) -> PyTree:
        return [jnp.zeros(leaf.shape, bool) for leaf in _kernels(learner.params)]

    def prune(learner: Learner, pruned: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        kernels = _kernels(learner.params)
        share = sparsity_at(context.gradient_step, sparsity, start, end)
        if scope == "layer":
            return learner, [smallest(leaf, old, share) for leaf, old in zip(kernels, pruned, strict=True)], {}
        flat, old = (jnp.concatenate([leaf.ravel() for leaf in part]) for part in (kernels, pruned))
        ends = [sum(leaf.size for leaf in kernels[:i]) for i in range(1, len(kernels))]
        parts = jnp.split(smallest(flat, old, share), ends)
        return learner, [part.reshape(leaf.shape) for part, leaf in zip(parts, kernels, strict=True)], {}

    def update(learner: Learner, pruned: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        step = jnp.asarray(context.gradient_step)
        # Behind the end everything stays: one more pruning may fall there, where the period does not divide it.
        due = True if context.now else (step % period == 0) & (step > start) & (step < end + period)
        _, pruned, _ = only_if(due, Intervention(update=prune), learner, pruned, context)
        masks = iter(pruned)
        mask = jax.tree_util.tree_map_with_path(
            lambda path, leaf: next(masks) if is_kernel(short_name(path), leaf) else jnp.zeros(leaf.shape, bool),
            learner.params,
        )
        nothing = jax.tree.map(jnp.zeros_like, learner.params)
        learner = edit(learner, nothing, mask, count="keep", target="edit")
        share = jnp.concatenate([leaf.ravel() for leaf in pruned]).mean()
        return learner, pruned, {"sparsity": share}

    return Intervention(init, update, remembers=True)


def sparsity_at(gradient_step: Step, sparsity: float, start: int, end: int) -> jax.Array:
    """Share of weights that are pruned after this gradient step; Zhu & Gupta (2017), eq. 1; ()."""
    progress = jnp.clip((jnp.asarray(gradient_step) - start) / (end - start), 0, 1)
    return sparsity * (1 - (1 - progress) ** 3)


def smallest(weights: jax.Array, pruned: jax.Array, share: jax.Array) -> jax.Array:
    """Those pruned already and as many more of least magnitude as make `share` of all, to the nearest; bool, as `weights`."""
    order = jnp.argsort(jnp.where(pruned, -1, jnp.abs(weights)).ravel())
    number = jnp.maximum(jnp.round(share * weights.size).astype(jnp.int32), pruned.sum())
    chosen = jnp.zeros(weights.size, bool).at[order].set(jnp.arange(weights.size) < number)
    return chosen.reshape(weights.shape)


def _kernels(params: PyTree) -> list[jax.Array]:
    flat = jax.tree_util.tree_leaves_with_path(params)
    return [leaf for path, leaf in flat if is_kernel(short_name(path), leaf)]
