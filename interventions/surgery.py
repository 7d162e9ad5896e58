"""The one edit that every method makes: parameters, what the optimiser remembers of them, and the target together."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from ..agents.learner import Learner, PyTree
from ..agents.optimizer import AdamState, forget_ages

Count = Literal["entry", "keep", "zero"]
Target = Literal["keep", "edit", "copy"]
Blend = Callable[[jax.Array, jax.Array], jax.Array]  # of an old leaf and a new one


def replaced(old: jax.Array, new: jax.Array) -> jax.Array:
    """The `Blend` that draws anew."""
    return new


# Fields of optax's own states that hold parameters: schedule-free, Prodigy, Mechanic, DoG, L-BFGS.
COPIES = (".z", ".params0", ".x0", ".init_params", ".params")


class Reference(struct.PyTreeNode):
    """Parameters that an optimiser holds the learner's against, as those at the start; what is drawn anew is so there, too."""

    params: PyTree


def reference_to(params: PyTree) -> Reference:
    """A `Reference` with buffers of its own: a learner that holds one twice could not be donated."""
    return Reference(jax.tree.map(jnp.copy, params))


def edit(
    learner: Learner,
    params: PyTree,
    mask: PyTree,
    *,
    forget: PyTree | None = None,
    count: Count = "entry",
    target: Target = "keep",
    references: bool = True,
) -> Learner:
    """The learner with the entries of `params` where `mask`; all others, and what belongs to them, stay to the bit.

    params: new values; mask: bool. Both have the structure of the learner's parameters, and masks may broadcast.
    forget: of which entries the optimiser forgets its statistics (Adam's mu and nu, a momentum, any array of floats that
        stands under a parameter's name and has its shape; only the shape tells where the parameters are one bare array);
        the edited ones if None.
    count: of gradient steps, by which Adam corrects its bias. entry: `resprout`'s Adam counts anew for the rows and columns
        that are forgotten whole; a count that an optimiser keeps for all entries at once stays. keep: none is touched.
        zero: all start anew, those of entries not edited too.
    target: keep the target's parameters, edit the same entries there, or copy all of the edited learner's.
    references: whether every `Reference` in the optimiser, and every copy of the parameters that optax is known to keep
        (COPIES), gets the new values of these entries, as where they are drawn anew.

    What an optimiser keeps in another form, as Adafactor its factors and optax.flatten everything, stays as it is.
    """
    mask = _like(mask, learner.params)
    forgotten = mask if forget is None else _like(forget, learner.params)
    edited = _where(mask, params, learner.params)
    target_params = learner.target_params
    if target_params is not None and target != "keep":
        target_params = jax.tree.map(jnp.copy, edited) if target == "copy" else _where(mask, params, target_params)
    opt_state = move_references(learner.opt_state, mask, params) if references else learner.opt_state
    return Learner(edited, target_params, forget_statistics(opt_state, forgotten, count))


def forget_statistics(opt_state: PyTree, mask: PyTree, count: Count = "entry") -> PyTree:
    """What an optimiser remembers, with zero where `mask`; see `edit`. mask: bool, the shapes of the parameters."""
    masks = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(mask)}
    anything = jnp.stack([leaf.any() for leaf in masks.values()]).any()

    def of_adam(state: Any) -> Any:
        if not isinstance(state, AdamState):
            return state
        if count == "entry":
            return forget_ages(state, mask)
        return state._replace(ages=jnp.where(anything, 0, state.ages)) if count == "zero" else state

    opt_state = jax.tree.map(of_adam, opt_state, is_leaf=_apart)
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        opt_state, is_leaf=lambda node: isinstance(node, Reference)
    )
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    named = [_parameter_of(name, masks) for name in names]
    parameters = [
        key if key is not None and _statistic(name.removesuffix(key), leaf, masks[key]) else None
        for name, key, (_, leaf) in zip(names, named, leaves, strict=True)
    ]
    # A count stands beside statistics; one that stands alone is a schedule's.
    beside = {
        name.removesuffix(key).rpartition(".")[0]
        for name, key in zip(names, parameters, strict=True)
        if key is not None
    }

    def forgotten(name: str, parameter: str | None, leaf: Any) -> Any:
        if parameter is not None:
            return jnp.where(masks[parameter], jnp.zeros_like(leaf), leaf)
        if count == "zero" and name.endswith(".count") and name.removesuffix(".count") in beside:
            return jnp.where(anything, jnp.zeros_like(leaf), leaf)
        return leaf

    return jax.tree.unflatten(
        structure,
        [forgotten(name, key, leaf) for name, key, (_, leaf) in zip(names, parameters, leaves, strict=True)],
    )


def _parameter_of(name: str, keys: Iterable[str]) -> str | None:
    """The parameter under whose name a leaf of the optimiser's state stands: of several the one with the longest path."""
    return max((key for key in keys if name.endswith(key)), key=len, default=None)


def _statistic(holder: str, leaf: Any, mask: jax.Array) -> bool:
    return (
        not isinstance(leaf, Reference)
        and ".hyperparams" not in holder  # of optax.inject_hyperparams
        and not holder.endswith(COPIES)
        and jnp.shape(leaf) == mask.shape
        and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    )


def _apart(node: Any) -> bool:
    return isinstance(node, AdamState | Reference)


def move_references(opt_state: PyTree, mask: PyTree, params: PyTree, blend: Blend = replaced) -> PyTree:
    """The optimiser's state with what `blend` makes of old entries and `params` where `mask`, in every `Reference` and of COPIES."""
    masks, values = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)} for tree in (mask, params)
    )

    def moved(path: Any, node: Any) -> Any:
        if isinstance(node, Reference):
            return Reference(_where(mask, params, node.params, blend))
        name = jax.tree_util.keystr(path)
        key = _parameter_of(name, masks)
        if isinstance(node, AdamState) or key is None or not name.removesuffix(key).endswith(COPIES):
            return node
        if jnp.shape(node) != jnp.shape(values[key]):
            return node
        return _chosen(masks[key], values[key], node, blend)

    return jax.tree.map_with_path(moved, opt_state, is_leaf=_apart)


def _where(mask: PyTree, new: PyTree, old: PyTree, blend: Blend = replaced) -> PyTree:
    """By their paths, for an old tree may lack some of the leaves, as under optax.masked; its dtypes stay."""
    masks, values = (dict(jax.tree.leaves_with_path(tree)) for tree in (mask, new))

    return jax.tree.map_with_path(lambda path, leaf: _chosen(masks[path], values[path], leaf, blend), old)


def _chosen(mask: jax.Array, new: jax.Array, old: jax.Array, blend: Blend) -> jax.Array:
    return jnp.where(mask, jnp.asarray(blend(old, new), jnp.result_type(old)), old)


def _like(mask: PyTree, params: PyTree) -> PyTree:
    return jax.tree.map(lambda masked, leaf: jnp.broadcast_to(masked, jnp.shape(leaf)), mask, params)
