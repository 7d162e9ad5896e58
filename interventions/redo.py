"""ReDo and its relatives: dormant units are recycled, their incoming weights drawn anew and their outgoing ones cut."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from ..agents.learner import Learner, PyTree
from ..diagnostics import Layer, LayerGraph
from ..diagnostics.dormancy import Units, dormant_units, named_leaves, unit_scores, unit_utilities
from .base import Context, Info, Intervention, InterventionError, every, method, require
from .parameters import glorot
from .surgery import edit

Score = Literal["activation", "gradient", "utility"]
Select = Literal["lowest", "random", "highest"]
Layers = Literal["private", "isolated", "all"]
Init = Literal["own", "xavier", "paper"]
Outgoing = Literal["zero", "random"]
CountChoice = Literal["entry", "keep", "zero", "paper"]
TargetChoice = Literal["keep", "edit", "paper"]

PAPER = {"init": "xavier", "count": "keep", "target": "keep"}  # what `paper` stands for


@method
def redo(
    tau: float = 0.1,
    period: int = 1000,
    score: Score = "activation",
    select: Select = "lowest",
    fraction: float | None = None,
    decay: bool = False,
    layers: Layers = "private",
    init: Init = "own",
    outgoing: Outgoing = "zero",
    scaling: float | None = None,
    count: CountChoice = "entry",
    forget_bias: bool = True,
    target: TargetChoice = "keep",
    probe: int = 256,
    start: int = 0,
    stop: int | None = None,
) -> Intervention:
    """Recycle dormant units (Sokar et al., 2023, arXiv 2302.12902, algorithm 1); with score=gradient it is ReGraMa.

    All masks come from one look at the network; incoming entries are drawn anew before outgoing ones are cut, so that the
    weight between two recycled units is 0. At tau 0 the outputs of a network of isolated layers stay as they are, to the bit.

    tau: a unit is dormant if its score is at most this share of its layer's mean (of each member of an ensemble).
    period, start, stop: gradient steps, as in `every`. probe: transitions of a fresh draw that are looked at; the paper 64
        on Atari and 256 on MuJoCo.
    score: activation, E|h|; gradient, E|dL/dh| (Liu et al., 2025, arXiv 2505.24061, ReGraMa); utility, E|h| * sum|w_out|.
    select: lowest scores; random units, the control; highest (the paper's inverted). As many as are dormant in this network,
        which become many times more where they are not the ones recycled; or, where fraction is given, that share of each layer
        (one unit at least), ties broken at random: for equal budgets of what is compared.
    decay: the fraction falls to 0 at stop as a cosine does (NeuronRecyclerScheduled).
    layers: private, those isolated or only normalised (a norm mixes units, so outputs can change), never a residual
        stream; isolated; all.
    init: own initialisers; xavier, as the authors' code has it for every network.
    outgoing: zero, or random as the paper's ablation.
    scaling: length of the new incoming weights, in mean lengths of the layer's others (of that member); None leaves them.
    count: Adam's, of the entries recycled: see `edit`. forget_bias: Adam's moments of the biases too.
    target: keep it, or edit it likewise.
    Scores are of the parameters after the gradient step; ReDo for SAC took the activations of the step itself. Gradient steps
    are counted from the first; the authors' code counts those of the warm-up too, which moves the first event.
    `paper` as a value, and forget_bias=false, are what the authors' code does; its row order behind a flatten is a defect
    that is not offered.
    """
    require(tau >= 0, f"tau must be zero or more, not {tau}")
    require(probe >= 1, f"probe must be at least 1 transition, not {probe}")
    require(fraction is None or 0 < fraction <= 1, f"fraction must lie in (0, 1], not {fraction}")
    require(not decay or (fraction is not None and stop is not None), "decay needs fraction and stop")
    require(scaling is None or scaling > 0, f"scaling must be positive, not {scaling}")

    def update(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        chosen_layers = recyclable(context.graph, layers=layers)
        scores = unit_scores_of(context, learner.params, score)
        scores = {layer.name: scores[layer.name] for layer in chosen_layers}
        key = context.stream("redo")
        share: float | jax.Array | None = fraction
        if fraction is not None and decay and stop is not None:
            share = fraction * jnp.cos(jnp.pi / 2 * jnp.asarray(context.gradient_step) / stop)
        units = select_units(scores, tau, select, share, jax.random.fold_in(key, 0))
        learner = recycle(
            learner,
            context,
            units,
            jax.random.fold_in(key, 1),
            init=PAPER["init"] if init == "paper" else init,
            outgoing=outgoing,
            scaling=scaling,
            count=PAPER["count"] if count == "paper" else count,
            forget_bias=forget_bias,
            target=PAPER["target"] if target == "paper" else target,
        )
        return learner, state, {"recycled": {name: chosen.sum() for name, chosen in units.items()}}

    return every(period, Intervention(update=update, probe=probe), start, stop)


def unit_scores_of(context: Context, params: PyTree, score: Score) -> Units:
    """Scores relative to the mean of the layer, name -> [*shape]; see `redo`."""
    if score == "gradient":
        return unit_scores(context.activation_gradients(params), context.graph, epsilon=0.0)
    activations = context.activations(params)
    if score == "activation":
        return unit_scores(activations, context.graph)
    utilities = unit_utilities(context.graph, params, activations)
    return {name: u / jnp.maximum(u.mean(axis=-1, keepdims=True), 1e-30) for name, u in utilities.items()}


def select_units(
    scores: Units, tau: float, select: Select, fraction: float | jax.Array | None, key: jax.Array
) -> Units:
    """Units to recycle, name -> bool [*shape], the same number of them in each member of a layer whatever `select` is."""
    dormant = dormant_units(scores, tau)
    if select == "lowest" and fraction is None:
        return dormant

    def chosen(name: str, key: jax.Array) -> jax.Array:
        values = scores[name]
        ties, shuffled = (jax.random.uniform(k, values.shape) for k in jax.random.split(key))
        first = {"lowest": values, "random": shuffled, "highest": -values}[select]
        rank = jnp.argsort(jnp.lexsort((ties, first), axis=-1), axis=-1)
        if fraction is None:
            return rank < dormant[name].sum(axis=-1, keepdims=True)
        return rank < jnp.maximum(jnp.round(values.shape[-1] * jnp.asarray(fraction)), 1)

    return {name: chosen(name, jax.random.fold_in(key, index)) for index, name in enumerate(scores)}


def recycle(
    learner: Learner,
    context: Context,
    units: Units,
    key: jax.Array,
    *,
    init: str = "own",
    outgoing: str = "zero",
    scaling: float | None = None,
    count: Any = "entry",
    forget_bias: bool = True,
    target: Any = "keep",
) -> Learner:
    """The learner with fresh incoming entries and cut outgoing ones of `units`, name -> bool [*shape]; see `redo`."""
    masks = context.graph.masks(units)
    fresh = glorot(key, learner.params) if init == "xavier" else context.fresh(key)
    if scaling is not None:
        fresh = _scaled(fresh, learner.params, context.graph, units, scaling)
    cut = fresh if outgoing == "random" else jax.tree.map(jnp.zeros_like, fresh)
    params = jax.tree.map(jnp.where, masks.outgoing, cut, fresh)
    weights = _union(masks.incoming, masks.outgoing)
    everything = _union(weights, masks.bias, masks.scale)
    return edit(learner, params, everything, forget=everything if forget_bias else weights, count=count, target=target)


def recyclable(graph: LayerGraph, name: str = "redo", layers: Layers = "private") -> list[Layer]:
    """The layers whose units may be recycled, see `redo`; InterventionError in one line, of the method `name`, says why none may."""

    def allowed(layer: Layer) -> bool:
        if layers == "all":
            return bool(layer.outgoing)
        return layer.isolated or (layers == "private" and layer.normalised_only)

    chosen = [layer for layer in graph.layers if allowed(layer)]
    if not chosen:
        why = "; ".join(f"{layer.name}: {layer.reason or 'nothing reads it'}" for layer in graph.layers)
        more = "; layers=all allows more" if name == "redo" else ""
        raise InterventionError(f"{name}: no unit may be recycled ({why or 'there is no hidden layer'}){more}")
    return chosen


def _scaled(fresh: PyTree, params: PyTree, graph: LayerGraph, units: Units, scaling: float) -> PyTree:
    """Fresh kernels whose units' incoming weights are `scaling` mean lengths long: of those kept in their member, if any."""
    leaves, new = named_leaves(params), named_leaves(fresh)
    for name, chosen in units.items():
        for leaf, owners in graph[name].incoming.items():
            layer = graph[name]
            ids = jnp.broadcast_to(jnp.where(owners < 0, layer.units, owners), new[leaf].shape).ravel()

            def lengths(kernel: jax.Array, ids: jax.Array = ids, layer: Layer = layer) -> jax.Array:
                squares = jnp.zeros(layer.units).at[ids].add(jnp.square(kernel).ravel(), mode="drop")
                return jnp.sqrt(squares).reshape(layer.shape)

            kept = jnp.where(chosen, 0.0, 1.0)
            others = kept.sum(axis=-1, keepdims=True)
            mean = (kept * lengths(leaves[leaf])).sum(axis=-1, keepdims=True) / jnp.maximum(others, 1.0)
            own = lengths(new[leaf])
            factor = jnp.where((others > 0) & (own > 0), scaling * mean / jnp.maximum(own, 1e-30), 1.0).ravel()
            new[leaf] = new[leaf] * factor.at[ids].get(mode="fill", fill_value=1.0).reshape(new[leaf].shape)
    return jax.tree.unflatten(jax.tree.structure(fresh), list(new.values()))


def _union(first: PyTree, *others: PyTree) -> PyTree:
    for other in others:
        first = jax.tree.map(jnp.logical_or, first, other)
    return first
