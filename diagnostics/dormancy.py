"""Dormancy: scores of hidden units, the sets of dormant ones and their shares, by every meaning in use.

"Dormant ratio" is several quantities in public code; each is one call here, with the name that its metric has or would have (linear):

    ReDo (Sokar et al., 2023)   dormancy(activations, 0.1, graph)                           dormant/post/tau0.1
    SimBa's metrics             dormancy(activations, 0.1)                                  dormant/post/stacked/tau0.1
    Plasticine                  dormancy(activations, 0.1, graph, aggregate="mean")         dormant/post/mean/tau0.1
    DrM (Xu et al., 2024)       dormancy(linear, 0.025, strict=True)                        dormant/linear/strict/tau0.025
    ACE (Ji et al., 2024)       gradient_dormancy(graph, gradients, 0.05)                   dormant/grad/tau0.05
      its code                  gradient_dormancy(graph, gradients, 0.05, strict=True)      dormant/grad/strict/tau0.05

`activations` is what `LayerGraph.activations` gives: name -> [B, *shape] or [B, n, *shape], `shape` being a layer's
(units,) or (members, units). Where `graph` is left out the last axis are the units and all others are averaged, which
is right for one network and stacks an ensemble's members into the batch (a unit is dormant if it is in all of them).

DrM's hooks see the hidden layers after their in-place ReLU, a layer before LayerNorm as it leaves the kernel, and the
output layer before tanh: `linear` is `activations | {"head": outputs}` for a network without LayerNorm.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .labels import Shape
from .layers import Layer, LayerGraph, Owners, leaf_name

PyTree = Any
Units = dict[str, jax.Array]  # name of a layer -> a value of each unit, [*shape]
Aggregate = Literal["pooled", "mean"]

EPSILON = 1e-9  # beside a layer's mean, in Dopamine


def unit_scores(
    activations: Mapping[str, jax.Array], graph: LayerGraph | None = None, *, epsilon: float = EPSILON
) -> Units:
    """Score E|h_i| / (mean_k E|h_k| + epsilon) of every unit; Sokar et al. (2023, arXiv 2302.12902), eq. 1.

    The mean is that of the layer, of each member by itself, so scores average to 1 (Dopamine; the paper's text says that
    they sum to it). Expectations are over examples and places. Units of a layer without any activation have score 0.

    Of `activation_gradients` it is the score of ReGraMa (Liu et al., 2025, arXiv 2505.24061): give epsilon=0, because the
    scale of a gradient means nothing.
    """
    return {name: _relative(jnp.abs(h).mean(axis=0), epsilon) for name, h in _by_unit(activations, graph).items()}


def activation_gradients(graph: LayerGraph, loss: Any, params: PyTree, *inputs: Any) -> dict[str, jax.Array]:
    """Gradient of loss(outputs) by every activation, in the form of `LayerGraph.activations`; one backward pass.

    loss: outputs of the graph's function -> (). Of a mean over examples, entry b is 1/B of example b's own gradient.
    """
    forms = jax.eval_shape(graph.activations, params, *inputs)
    zeros = {name: jnp.zeros(form.shape, form.dtype) for name, form in forms.items()}
    gradients: dict[str, jax.Array] = jax.grad(lambda offsets: loss(graph.perturbed(params, offsets, *inputs)))(zeros)
    return gradients


def gradient_scores(graph: LayerGraph, gradients: PyTree) -> Units:
    """Norm of the gradient of each unit's incoming weights over its layer's mean; Ji et al. (2024), definition 3.8.

    gradients: of the loss of a batch, with the structure of the parameters; biases are left out, as in their code. Output
    layers are included: their kernels must be [inputs, units] or [height, width, inputs, units], behind the members of an
    ensemble if there are any; ValueError names one that is neither.
    """
    leaves = named_leaves(gradients)
    squares = {name: jnp.square(leaf) for name, leaf in leaves.items()}
    totals = {layer.name: _totals(layer, layer.incoming, squares) for layer in graph.layers}
    for name in graph.heads:
        kernel = squares[_kernel(name, leaves)]
        totals[name] = kernel.sum(axis=-2 if kernel.ndim < 4 else (-4, -3, -2))
    return {name: _relative(jnp.sqrt(total), 0.0) for name, total in totals.items()}


def unit_utilities(
    graph: LayerGraph,
    params: PyTree,
    activations: Mapping[str, jax.Array],
    *,
    centred: bool = False,
    adaptive: bool = False,
) -> Units:
    """Contribution E|h_i| * sum|outgoing weights| of every unit; Dohare et al. (2024), continual backpropagation.

    centred: E|h_i - E h_i| instead; adaptive: over sum|incoming weights|. Both together are the utility of Dopamine's
    `cbp` and of Dohare et al. (2021). Of one batch, without a running average, and not relative to the layer.
    """
    sizes = {name: jnp.abs(leaf) for name, leaf in named_leaves(params).items()}
    utilities = {}
    for name, h in _by_unit(activations, graph).items():
        layer = graph[name]
        if centred:
            h = h - h.mean(axis=0, keepdims=True)
        utilities[name] = jnp.abs(h).mean(axis=0) * _totals(layer, layer.outgoing, sizes)
        if adaptive:
            utilities[name] = _ratio(utilities[name], _totals(layer, layer.incoming, sizes))
    return utilities


def dormant_units(scores: Mapping[str, jax.Array], tau: float | jax.Array = 0.1, *, strict: bool = False) -> Units:
    """Units whose score is at most tau: name -> bool [*shape]; Sokar et al. (2023), def. 3.1.

    All units of a silent layer are dormant. strict: below tau, as in the code of DrM and ACE, which compares with tau times
    the layer's mean, so that no unit of a silent layer is dormant. ValueError if tau is negative.
    """
    if isinstance(tau, int | float) and tau < 0:
        raise ValueError(f"tau must be zero or more, not {tau}")
    if strict:
        return {name: (score < tau) & (score > 0).any(axis=-1, keepdims=True) for name, score in scores.items()}
    return {name: score <= tau for name, score in scores.items()}


def dormant_fraction(dormant: Mapping[str, jax.Array], aggregate: Aggregate = "pooled") -> jax.Array:
    """Share of dormant units: of all, or the mean of the layers' shares, where small layers weigh more. -> () in [0, 1]."""
    if aggregate == "mean":
        return jnp.stack([units.mean() for units in dormant.values()]).mean()
    return jnp.concatenate([units.ravel() for units in dormant.values()]).mean()


def dormancy(
    activations: Mapping[str, jax.Array],
    tau: float | jax.Array = 0.1,
    graph: LayerGraph | None = None,
    *,
    strict: bool = False,
    aggregate: Aggregate = "pooled",
) -> jax.Array:
    """Share of hidden units whose mean |activation| is at most tau of their layer's mean; Sokar et al. (2023), ReDo.

    -> () in [0, 1]. `strict` as in `dormant_units`, `aggregate` as in `dormant_fraction`.
    """
    return dormant_fraction(dormant_units(unit_scores(activations, graph), tau, strict=strict), aggregate)


def gradient_dormancy(
    graph: LayerGraph,
    gradients: PyTree,
    tau: float | jax.Array = 0.05,
    *,
    strict: bool = False,
    aggregate: Aggregate = "pooled",
) -> jax.Array:
    """Share of units whose weights' gradient norm is at most tau of their layer's mean; Ji et al. (2024, ACE), def. 3.9.

    -> () in [0, 1]; see `gradient_scores`. tau is their call's, 0.025 their function's default.
    """
    return dormant_fraction(dormant_units(gradient_scores(graph, gradients), tau, strict=strict), aggregate)


def dormancy_name(
    reads: str = "post",
    tau: float = 0.1,
    *,
    stacked: bool = False,
    strict: bool = False,
    aggregate: Aggregate = "pooled",
) -> str:
    """Name of the metric, in which every choice that is not ReDo's is said.

    reads: post (activations), linear (DrM's), grad (gradients of weights), or unit_grad (of activations).

    >>> dormancy_name(), dormancy_name("linear", 0.025, strict=True)
    ('dormant/post/tau0.1', 'dormant/linear/strict/tau0.025')
    """
    choices = {"stacked": stacked, "mean": aggregate == "mean", "strict": strict}
    return "/".join(["dormant", reads, *(name for name, chosen in choices.items() if chosen), f"tau{tau:g}"])


def persistent_dormancy(
    earlier: Mapping[str, jax.Array],
    later: Mapping[str, jax.Array],
    relative_to: Literal["earlier", "smaller"] = "earlier",
) -> jax.Array:
    """Overlap of two dormant sets over the size of the earlier (Dopamine) or smaller one (Sokar et al., 2023).

    Both as `dormant_units` gives them, of all layers together -> () in [0, 1], 0 where the set to compare with is empty.
    """
    before, after = (jnp.concatenate([sets[name].ravel() for name in earlier]) for sets in (earlier, later))
    size = before.sum() if relative_to == "earlier" else jnp.minimum(before.sum(), after.sum())
    return (before & after).sum() / jnp.maximum(size, 1)


def active_units(
    activations: Mapping[str, jax.Array],
    graph: LayerGraph | None = None,
    *,
    weights: Literal["units", "values"] = "units",
) -> jax.Array:
    """Fraction of active units: share of positive activations; Ma et al. (2024, arXiv 2310.07418). -> () in [0, 1].

    A layer weighs as much as it has units, a convolution's being channels. weights="values": as it has activations, every
    place being one, as in Ma et al.'s encoder. The two agree wherever layers have as many places.
    """
    positive = {name: h > 0 for name, h in _by_unit(activations, graph).items()}
    sizes = {name: h[0].size if weights == "units" else h.size for name, h in positive.items()}
    return sum((h.mean() * sizes[name] for name, h in positive.items()), jnp.zeros(())) / sum(sizes.values())


def unit_shape(name: str, values: jax.Array, graph: LayerGraph | None) -> Shape:
    """The last axes of `values` that number units: those of the graph's layer, else the last.

    KeyError names a layer that the graph has not, ValueError one whose units have another shape.
    """
    if graph is None:
        return values.shape[-1:]
    shape = graph[name].shape
    if values.shape[-len(shape) :] != shape:
        raise ValueError(f"the units of {name} have shape {shape}, its values {values.shape}")
    return shape


def _by_unit(activations: Mapping[str, jax.Array], graph: LayerGraph | None) -> dict[str, jax.Array]:
    """name -> [examples * places, *shape] in float32 or better."""
    return {
        name: h.astype(jnp.promote_types(h.dtype, jnp.float32)).reshape(-1, *unit_shape(name, h, graph))
        for name, h in activations.items()
    }


def _relative(values: jax.Array, epsilon: float) -> jax.Array:
    """Values over their mean along the last axis."""
    return _ratio(values, values.mean(axis=-1, keepdims=True) + epsilon)


def _ratio(values: jax.Array, divisors: jax.Array) -> jax.Array:
    """Quotients of numbers that are not negative, 0 where the divisor is; NaN stays NaN, which is dormant nowhere."""
    return jnp.where(divisors == 0, 0, values) / jnp.where(divisors == 0, 1, divisors)


def named_leaves(tree: PyTree) -> dict[str, jax.Array]:
    """Leaves by the names that the layer graph gives them."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _totals(layer: Layer, owners: Owners, leaves: Mapping[str, jax.Array]) -> jax.Array:
    """Sum over the entries that belong to each unit, [*shape]."""
    total = jnp.zeros(layer.units + 1)  # the last is that of entries of no unit, -1
    for name, owner in owners.items():
        shared = tuple(axis for axis, size in enumerate(owner.shape) if size == 1)
        total = total.at[owner].add(leaves[name].sum(axis=shared, keepdims=True))
    return total[:-1].reshape(layer.shape)


def _kernel(name: str, leaves: Mapping[str, jax.Array]) -> str:
    """The leaf that is the kernel of an output layer."""
    short = {path: path.removeprefix("params/") for path in leaves}
    own = [path for path in leaves if name in (short[path], short[path].rpartition("/")[0])]
    kernel = max(own, key=lambda path: leaves[path].ndim, default="")
    if kernel and leaves[kernel].ndim in (2, 3, 4, 5):
        return kernel
    raise ValueError(f"the output layer {name} has no kernel of a dense layer or a convolution")
