"""Units replaced one at a time, on what is remembered of each: continual backpropagation and self-normalised resets."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..agents.learner import Learner, PyTree
from ..diagnostics import Layer, LayerGraph
from ..diagnostics.dormancy import Units, named_leaves, unit_utilities
from .base import Context, Info, Intervention, InterventionError, every, method, require
from .parameters import in_ensemble
from .redo import recyclable, recycle
from .surgery import Count

BINS = 24  # of inter-firing times: 1, 2 to 3, 4 to 7, ... gradient steps


class Memory(NamedTuple):
    """Of continual backpropagation, [N] each: the units of all layers, one after the other, and unused places behind."""

    utility: jax.Array  # running averages, from zero
    mean: jax.Array  # of the activation
    age: jax.Array  # int32: gradient steps
    owed: jax.Array  # replacements that its layer has earned and not yet had, the same for all units of a member


class Silence(NamedTuple):
    """Of self-normalised resets; as `Memory`."""

    steps: jax.Array  # [N] int32: gradient steps since the unit fired
    times: jax.Array  # [N, BINS] decayed counts of its inter-firing times


@method
def continual_backprop(
    rate: float = 1e-4,
    maturity: int = 10_000,
    decay: float = 0.99,
    compensate: bool = True,
    period: int = 1,
    count: Count = "entry",
    start: int = 0,
    stop: int | None = None,
) -> Intervention:
    """Replace a few mature units of least utility all the time (Dohare et al., 2024, Nature 632, arXiv 2306.13812).

    A unit's utility is a running average of E|h| * sum|outgoing weights| over the transitions just learnt from. A replaced
    unit gets fresh incoming weights and outgoing ones of 0. Defaults are those of their reinforcement learning. A unit
    that another method redraws keeps its age and its averages here.

    rate: of the mature units of a layer (a member of an ensemble), replaced per gradient step; fractions add up.
    maturity: gradient steps that a unit lives at least. decay: of the running averages, corrected for their start.
    compensate: the bias of each consumer takes over mean activation * outgoing weight, so that outputs keep their mean;
        averaged over the places of a convolution. A consumer whose bias does not stand beside its kernel goes without, and so
        does every one in a network that reads units in several forms, each with a mean of its own (CReLU). The authors'
        code sets the mean to 0 before it is used, which makes it compensate=false.
    period, start, stop: gradient steps between two looks, as in `every`; the paper's is 1. At each, a forward pass.
    count: of the optimiser, of the entries replaced: see `edit`.
    """
    require(0 <= rate <= 1, f"rate must lie in [0, 1], not {rate}")
    require(maturity >= 0, f"maturity must be zero or more, not {maturity}")
    require(0 <= decay < 1, f"decay must lie in [0, 1), not {decay}")

    def init(learner: Learner) -> Memory:
        size = capacity(learner.params)
        return Memory(jnp.zeros(size), jnp.zeros(size), jnp.zeros(size, jnp.int32), jnp.zeros(size))

    def update(learner: Learner, state: Memory, context: Context) -> tuple[Learner, Memory, Info]:
        layers = recyclable(context.graph, "continual_backprop")
        activations = context.activations(learner.params)
        utilities = unit_utilities(context.graph, learner.params, activations)
        memory = {name: Memory(*parts) for name, parts in _split(context.graph, state).items()}
        leaves = named_leaves(learner.params)
        several = any(in_several_forms(layer, activations[layer.name], leaves) for layer in context.graph.layers)
        replaced: Units = {}
        means: Units = {}
        for layer in layers:
            old, h = memory[layer.name], activations[layer.name]
            age = old.age + period
            utility = decay * old.utility + (1 - decay) * utilities[layer.name]
            mean = decay * old.mean + (1 - decay) * h.mean(axis=tuple(range(h.ndim - len(layer.shape))))
            seen = 1 - decay ** (age / period)
            mature = age > maturity
            owed = old.owed + period * rate * mature.sum(axis=-1, keepdims=True)
            rank = jnp.argsort(jnp.argsort(jnp.where(mature, utility / seen, jnp.inf), axis=-1), axis=-1)
            chosen = mature & (rank < jnp.floor(owed))
            owed = owed - chosen.sum(axis=-1, keepdims=True)
            replaced[layer.name], means[layer.name] = chosen, mean / seen  # before the chosen ones start anew
            utility, mean, age = (jnp.where(chosen, 0, value) for value in (utility, mean, age))
            memory[layer.name] = Memory(utility, mean, age, owed)

        def renew(learner: Learner) -> Learner:
            if compensate and not several:
                # What moves to a bias is not drawn anew: its statistics and references stay.
                learner = learner.replace(params=compensated(learner.params, context.graph, replaced, means))
            return recycle(learner, context, replaced, context.stream("continual_backprop"), count=count)

        learner = _if_any(replaced, renew, learner)
        return learner, Memory(*_join(memory, state)), {"replaced": {name: x.sum() for name, x in replaced.items()}}

    return every(period, Intervention(init, update), start, stop)._replace(remembers=True)


@method
def self_normalized_resets(
    eta: float = 0.02,
    decay: float = 0.999,
    longest: int = 10_000,
    count: Count = "entry",
    start: int = 0,
    stop: int | None = None,
) -> Intervention:
    """Reset a unit that is silent for longer than it ever was, but for a share eta (Farias & Jozefiak, 2025, arXiv 2410.20098).

    A unit fires at a gradient step if its activation is positive for any of the transitions just learnt from, at any place;
    it is reset, incoming weights fresh and outgoing ones 0, when the time since it last fired exceeds the (1 - eta)
    quantile of its own inter-firing times. Costs a forward pass at each gradient step.

    eta: share of inter-firing times that are longer. decay: of the counts of those times, at each firing.
    longest: gradient steps of silence after which any unit is reset, and for which a unit waits that has not fired
        1 / eta times yet. count: of the optimiser, of the entries reset: see `edit`.
    start, stop: gradient steps, as in `every`.

    Deviations: times are in gradient steps, not examples, and counted in powers of two, so that a quantile is the upper end
    of its bin; counts decay where the authors' code starts them anew; those of a reset unit start anew.
    """
    require(0 < eta < 1, f"eta must lie in (0, 1), not {eta}")
    require(0 < decay <= 1, f"decay must lie in (0, 1], not {decay}")
    require(decay == 1 or 1 / (1 - decay) > 1 / eta, f"decay must be above 1 - eta = {1 - eta:g}, not {decay}")
    require(longest >= 1, f"longest must be at least 1 gradient step, not {longest}")

    def init(learner: Learner) -> Silence:
        size = capacity(learner.params)
        return Silence(jnp.zeros(size, jnp.int32), jnp.zeros((size, BINS)))

    def update(learner: Learner, state: Silence, context: Context) -> tuple[Learner, Silence, Info]:
        activations = context.activations(learner.params)
        memory = {name: Silence(*parts) for name, parts in _split(context.graph, state).items()}
        silent: Units = {}
        for layer in recyclable(context.graph, "self_normalized_resets"):
            old, h = memory[layer.name], activations[layer.name]
            fired = (h > 0).any(axis=tuple(range(h.ndim - len(layer.shape))))
            completed = jax.nn.one_hot(jnp.floor(jnp.log2(old.steps + 1.0)).astype(jnp.int32), BINS)
            times = jnp.where(fired[..., None], decay * old.times + completed, old.times)
            steps = jnp.where(fired, 0, old.steps + 1)
            chosen = (steps >= jnp.minimum(quantile(times, 1 - eta), longest)) & ~fired
            silent[layer.name] = chosen
            memory[layer.name] = Silence(jnp.where(chosen, 0, steps), jnp.where(chosen[..., None], 0, times))

        def renew(learner: Learner) -> Learner:
            return recycle(learner, context, silent, context.stream("self_normalized_resets"), count=count)

        learner = _if_any(silent, renew, learner)
        return learner, Silence(*_join(memory, state)), {"reset": {name: x.sum() for name, x in silent.items()}}

    def quantile(times: jax.Array, share: float) -> jax.Array:
        """The last time of the bin in which it lies, [...]; infinite while too few times are known."""
        cumulative = jnp.cumsum(times, axis=-1)
        total = cumulative[..., -1:]
        bin_of = jnp.argmax(cumulative >= share * total, axis=-1)
        return jnp.where(total[..., 0] * eta >= 1, 2.0 ** (bin_of + 1) - 1, jnp.inf)

    return every(1, Intervention(init, update), start, stop)._replace(remembers=True)


def in_several_forms(layer: Layer, activations: jax.Array, leaves: Mapping[str, Any]) -> bool:
    """Whether what reads a unit reads more than one value of it in one place."""

    def convolution(kernel: str) -> bool:
        return leaves[kernel].ndim >= 4 or (leaves[kernel].ndim == 3 and not in_ensemble(kernel, leaves))

    if not any(map(convolution, layer.incoming)):
        return activations.ndim > 1 + len(layer.shape)
    readers = [owners for kernel, owners in layer.outgoing.items() if convolution(kernel)]
    columns = [owners.reshape(-1, *owners.shape[-2:])[0, :, 0] for owners in readers]  # whose each input channel is
    return any(np.unique(column[column >= 0], return_counts=True)[1].max(initial=0) > 1 for column in columns)


def compensated(params: PyTree, graph: LayerGraph, units: Units, means: Units) -> PyTree:
    """Parameters whose biases hold what `units` [*shape] bring their consumers at their `means`; see `continual_backprop`."""
    leaves = named_leaves(params)
    old = dict(leaves)
    for name, chosen in units.items():
        lost = jnp.append(jnp.where(chosen, means[name], 0).ravel(), 0)  # the last stands for no unit, -1
        for kernel, owners in graph[name].outgoing.items():
            bias = _bias_of(kernel, old)
            if bias is not None and owners.shape[-1] == 1:  # else its outputs do not lie along the last axis
                inputs = tuple(range(old[bias].ndim - 1, old[kernel].ndim - 1))  # behind those of the members
                added = (old[kernel] * lost[owners]).sum(axis=inputs)
                leaves[bias] = leaves[bias] + added.astype(leaves[bias].dtype)
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def _bias_of(kernel: str, leaves: dict[str, Any]) -> str | None:
    """The one leaf beside a kernel that has its units' shape."""
    shape = leaves[kernel].shape
    fits = shape[:1] + shape[-1:] if in_ensemble(kernel, leaves) else shape[-1:]
    module = kernel.rpartition("/")[0]
    beside = [name for name, leaf in leaves.items() if name.rpartition("/")[0] == module and leaf.shape == fits]
    return beside[0] if len(beside) == 1 else None


def capacity(params: PyTree) -> int:
    """No fewer than the hidden units of any network with these parameters, which are columns or rows of its kernels."""
    return sum(leaf.size // min(leaf.shape[-2:]) for leaf in jax.tree.leaves(params) if leaf.ndim >= 2)


def _split(graph: LayerGraph, state: Any) -> dict[str, list[jax.Array]]:
    """Of each layer its part of every array of the state, [*shape, ...]."""
    parts, first = {}, 0
    for layer in graph.layers:
        end = first + layer.units
        parts[layer.name] = [leaf[first:end].reshape(*layer.shape, *leaf.shape[1:]) for leaf in state]
        first = end
    if first > len(state[0]):
        raise InterventionError(f"{first} hidden units are more than the kernels' shapes tell: {len(state[0])}")
    return parts


def _join(parts: dict[str, Any], state: Any) -> list[jax.Array]:
    """The arrays of the state with these parts of the layers, in their order."""

    def joined(index: int, old: jax.Array) -> jax.Array:
        shapes = (part[0].shape for part in parts.values())
        columns = [
            jnp.broadcast_to(part[index], (*shape, *old.shape[1:])).reshape(-1, *old.shape[1:])
            for part, shape in zip(parts.values(), shapes, strict=True)
        ]
        new = jnp.concatenate(columns).astype(old.dtype)
        return jnp.concatenate([new, old[len(new) :]])

    return [joined(index, old) for index, old in enumerate(state)]


def _if_any(units: Units, renew: Any, learner: Learner) -> Learner:
    """The learner renewed if any unit is chosen."""
    anything = jnp.stack([chosen.any() for chosen in units.values()]).any()
    renewed: Learner = jax.lax.cond(anything, renew, lambda learner: learner, learner)
    return renewed
