"""Resets: the whole network, its last layers or named ones start afresh, and their optimiser with them."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ..agents.learner import Learner, PyTree
from ..diagnostics import LayerGraph
from .base import Context, Info, Intervention, every, method, require
from .parameters import glorot, orthogonal, short_name
from .surgery import Count, Target, edit

Init = Literal["own", "xavier", "orthogonal"]


@method
def reset(
    period: int = 200_000,
    last: int | None = None,
    layers: tuple[str, ...] = (),
    init: Init = "own",
    count: Count = "entry",
    target: Target = "copy",
    start: int = 0,
    stop: int | None = None,
) -> Intervention:
    """Draw a network, or layers of it, anew and keep the replay (Nikishin et al., 2022, arXiv 2205.07802).

    With neither last nor layers it is the whole learner, SAC's temperature included, and its optimiser starts as new.

    period, start, stop: gradient steps, as in `every`. Nikishin et al.: SAC 200,000 agent steps (at replay ratio 1 as many
        gradient steps), DrQ the head behind its encoder every 100,000 agent steps of 1,000,000, SPR the last layer every
        20,000 agent steps (40,000 gradient steps at its replay ratio of 2);
        D'Oro et al. (2023), SR-SAC: 2,560,000 gradient steps whatever the replay ratio.
    last: the output layers (all heads together are one) and the last - 1 hidden layers computed before them.
    layers: names in the layer graph, or of modules, whose whole content it is ("torso"); instead of last.
    init: own initialisers; xavier; orthogonal with gain 1. The latter two make biases 0 and scales 1.
    count: of the optimiser, of the entries reset: see `edit`. A whole reset zeroes every count unless it is keep.
    target: copy the online network's parameters there, as Nikishin et al. do where all is drawn anew; edit the same entries, as
        they do where only the head is; or keep it.
    """
    check_layers(last, layers)
    whole = last is None and not layers

    def update(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        params = fresh_params(context, context.stream("reset"), learner.params, init)
        mask = layer_mask(context, learner.params, last, layers)
        learner = edit(learner, params, mask, count="zero" if whole and count == "entry" else count, target=target)
        return learner, state, {"resets": jnp.ones((), jnp.int32)}

    return every(period, Intervention(update=update, everywhere=whole), start, stop)


def fresh_params(context: Context, key: jax.Array, like: PyTree, init: Init) -> PyTree:
    """New parameters of the context's network; see `reset`. A learner without a network has its own initialiser alone."""
    if init == "own" or context.network.apply is None:
        return context.fresh(key)
    return glorot(key, like) if init == "xavier" else orthogonal(key, like)


def layer_mask(context: Context, params: PyTree, last: int | None = None, layers: tuple[str, ...] = ()) -> PyTree:
    """The entries of the layers chosen, as bool with the structure of `params`; all of them if none is chosen.

    InterventionError in one line where there are not so many layers, or none of that name.
    """
    if last is not None:
        hidden = context.graph.layers
        require(last <= len(hidden) + 1, f"last must be at most {len(hidden) + 1} in {context.learner}, not {last}")
        before = owned(context.graph, *(layer.name for layer in hidden[: len(hidden) + 1 - last]))
        anyone = owned(context.graph, *(layer.name for layer in hidden))

        names = {short_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        # A head is a module, or a kernel without one, which has its bias beside it.
        heads = [head.partition("[")[0] for head in context.graph.heads]
        modules = [head.rpartition("/")[0] if head in names else head for head in heads]

        def chosen(path: Any, earlier: jax.Array, known: jax.Array) -> jax.Array:
            # Entries of no hidden unit are the heads', or those of a norm over a residual stream, which is no last layer.
            name = short_name(path)
            at_head = any(_inside(name, module) if module else "/" not in name for module in modules)
            return ~earlier if at_head else known & ~earlier

        return jax.tree_util.tree_map_with_path(chosen, before, anyone)
    if not layers:
        return jax.tree.map(lambda leaf: True, params)
    chosen = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), bool), params)
    for name in layers:
        inside = [layer.name for layer in context.graph.layers if _inside(layer.name, name)]
        under = jax.tree_util.tree_map_with_path(lambda path, leaf, name=name: _inside(short_name(path), name), params)
        known = ", ".join([*(layer.name for layer in context.graph.layers), *context.graph.heads])
        require(
            bool(inside) or any(jax.tree.leaves(under)),
            f"{context.learner} has no layer {name}: there are {known}, and the modules that hold them",
        )
        chosen = union(chosen, under, owned(context.graph, *inside))
    return chosen


def owned(graph: LayerGraph, *names: str) -> PyTree:
    """The entries that make the units of these hidden layers: of kernels, biases and scales."""
    masks = graph.masks(dict.fromkeys(names, jnp.ones((), bool)))
    return union(masks.incoming, masks.bias, masks.scale)


def union(*masks: PyTree) -> PyTree:
    """The entries that any of the masks holds."""
    return jax.tree.map(lambda *leaves: functools.reduce(jnp.logical_or, leaves), *masks)


def check_layers(last: int | None, layers: tuple[str, ...]) -> None:
    require(last is None or last >= 1, f"last must be at least 1 layer, not {last}")
    require(last is None or not layers, "last and layers exclude each other: give one")


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(module + "/")
