"""Perturbations: parameters move a share of the way to freshly drawn ones, by a fixed or a measured amount."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from ..agents.learner import Learner, PyTree
from ..diagnostics.dormancy import dormant_fraction, dormant_units, gradient_dormancy, unit_scores
from .base import Context, Info, Intervention, every, method, require
from .parameters import in_ensemble, is_kernel, short_name
from .resets import Init, check_layers, fresh_params, layer_mask
from .surgery import Count, edit, move_references

Forget = Literal["edited", "all", "none"]
MixedTarget = Literal["keep", "edit", "own", "copy"]
Measure = Literal["gradient", "activation", "state"]
Entries = Literal["dense", "all"]


@method
def shrink_and_perturb(
    shrink: float = 0.8,
    perturb: float | None = None,
    period: int = 20_000,
    last: int | None = None,
    layers: tuple[str, ...] = (),
    init: Init = "own",
    forget: Forget = "edited",
    count: Count = "entry",
    target: MixedTarget = "edit",
    start: int = 0,
    stop: int | None = None,
) -> Intervention:
    """theta <- shrink * theta + perturb * fresh (Ash & Adams, 2020, arXiv 1910.08475).

    shrink: 0.8 for the encoder of SR-SPR (D'Oro et al., 2023), 0.5 for BBF's (Schwarzer et al., 2023, arXiv 2305.19452).
    perturb: None is 1 - shrink, as in both. Ash & Adams add small Gaussian noise instead of fresh initial parameters.
    period, start, stop: gradient steps, as in `every`. The soft form (Juliani & Ash, 2024, arXiv 2405.19153) is
        period=1,shrink=0.999999,forget=none.
    last, layers, init: which entries and how fresh ones are drawn, as in `reset`; all entries if neither is given.
    forget: whose statistics the optimiser forgets: of the edited entries, of all (its counts start anew), or none.
    count: of the optimiser, of the entries forgotten: see `edit`.
    target: edit it likewise with the same fresh parameters, so that the two stay as far apart as shrink says; with its
        own, independent ones; copy the edited parameters there; or keep it.
    """
    require(0 <= shrink <= 1, f"shrink must lie in [0, 1], not {shrink}")
    require(perturb is None or perturb >= 0, f"perturb must be zero or more, not {perturb}")
    check_layers(last, layers)
    require(period != 1 or forget == "none", "an optimiser that forgets at every step cannot learn: give forget=none")
    share = 1 - shrink if perturb is None else perturb

    def update(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        mask = layer_mask(context, learner.params, last, layers)
        key = context.stream("shrink_and_perturb")
        return (
            mix(learner, context, key, shrink, share, mask, init, forget, count, target),
            state,
            {"keep": jnp.full((), shrink)},
        )

    return every(period, Intervention(update=update), start, stop)


@method
def dormancy_perturb(
    measure: Measure = "gradient",
    tau: float = 0.05,
    strict: bool = True,
    k: float = 1.0,
    low: float = 0.2,
    high: float = 0.9,
    of: str | None = None,
    period: int = 100_000,
    entries: Entries = "dense",
    init: Init = "orthogonal",
    forget: Forget = "all",
    count: Count = "entry",
    target: MixedTarget = "own",
    start: int = 0,
    stop: int | None = None,
) -> Intervention:
    """theta <- keep * theta + (1 - keep) * fresh with keep = clip(1 - k * dormancy, low, high), the rule of ACE and DrM.

    Defaults are ACE's (Ji et al., 2024, arXiv 2402.14528) but for `of`: with of=actor every learner is perturbed by its
    policy's dormancy. In the paper high is 1, in its code 0.9: a tenth of every weight is replaced whatever the dormancy.
    DrM (Xu et al., 2024, arXiv 2310.19668), whose agent knows its dormancy: measure=state,k=2,high=1,period=50000, which are
    its 100,000 agent steps; high is 0.9 or 0.6 for hard tasks. Of other agents measure=activation,tau=0.025,of=actor.

    measure: gradient, the norms of the loss's gradients by the units' weights after the gradient step (ACE's code: the
        gradient of that step), output layers included; activation, E|h| of the hidden units as they are read and of every
        output [B, ..., units] of the network; state, the `dormancy` that the agent's state carries, where tau, strict and
        of do not count.
    tau, strict: a unit is dormant at, or if strict below, tau of its layer's mean. k: dimensionless.
    of: the learner whose dormancy on the same transitions it is; None: each its own.
    entries: dense, kernels and biases of dense layers, the heads' too; convolutions and norms stay. all: every entry.
    period, start, stop: gradient steps, as in `every`. init: as in `reset`. forget, count, target: as in
        `shrink_and_perturb`; with target=own the two networks disagree by the difference of two draws, as in both codes.
    """
    require(tau >= 0, f"tau must be zero or more, not {tau}")
    require(k >= 0, f"k must be zero or more, not {k}")
    require(0 <= low <= high <= 1, f"low and high must be ordered in [0, 1], not {low} and {high}")

    def update(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        if measure == "state":
            require(hasattr(context.state, "dormancy"), "measure=state needs an agent whose state has a dormancy: drm")
            dormancy = context.state.dormancy
        else:
            measured, params = (context, learner.params) if of is None else other(context, of)
            dormancy = dormancy_of(measured, params, measure, tau, strict)
        keep = jnp.clip(1 - k * dormancy, low, high)
        mask = dense_mask(learner.params) if entries == "dense" else jax.tree.map(lambda leaf: True, learner.params)
        key = context.stream("dormancy_perturb")
        learner = mix(learner, context, key, keep, 1 - keep, mask, init, forget, count, target)
        return learner, state, {"dormancy": dormancy, "keep": keep}

    return every(period, Intervention(update=update), start, stop)


def other(context: Context, name: str) -> tuple[Context, PyTree]:
    """The transitions as a learner of the agent sees them, with a key that all learners share, and its parameters."""
    having = [learner for learner, network in context.networks.items() if network.apply is not None]
    require(name in having, f"of must be one of {', '.join(having) or 'no others'}, not {name}")
    network = context.networks[name]
    given = network.inputs_in(context.state, context.batch)
    key = context.key if context.common_key is None else context.common_key
    seen = dataclasses.replace(context, key=key, learner=name, network=network, given=given)
    return seen, getattr(context.state, name).params


def dormancy_of(context: Context, params: PyTree, measure: Measure, tau: float, strict: bool) -> jax.Array:
    """Share of dormant units of the context's network; () in [0, 1]. See `dormancy_perturb`."""
    if measure == "gradient":
        return gradient_dormancy(context.graph, context.gradients(params), tau, strict=strict)
    assert context.network.apply is not None
    outputs = {
        f"output {i}": leaf for i, leaf in enumerate(jax.tree.leaves(context.network.apply(params, *context.inputs)))
    }
    batch_size = jax.tree.leaves(context.inputs)[0].shape[0]
    heads = {name: leaf for name, leaf in outputs.items() if leaf.ndim > 1 and leaf.shape[0] == batch_size}
    scores = unit_scores(context.activations(params), context.graph) | unit_scores(heads)
    return dormant_fraction(dormant_units(scores, tau, strict=strict))


def dense_mask(params: PyTree) -> PyTree:
    """The kernels of dense layers, of 2 axes or 3 in an ensemble, and what stands beside them under the same module."""
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    named = {short_name(path): leaf for path, leaf in flat}
    modules = [short_name(path).rpartition("/")[0] for path, _ in flat]
    dense = {
        module
        for module, (path, leaf) in zip(modules, flat, strict=True)
        if is_kernel(short_name(path), leaf)
        and (leaf.ndim == 2 or (leaf.ndim == 3 and in_ensemble(short_name(path), named)))
    }
    return jax.tree.unflatten(structure, [module in dense for module in modules])


def mix(
    learner: Learner,
    context: Context,
    key: jax.Array,
    keep: jax.Array | float,
    share: jax.Array | float,
    mask: PyTree,
    init: Init,
    forget: Forget,
    count: Count,
    target: MixedTarget,
) -> Learner:
    """The learner with keep * theta + share * fresh where `mask`; see `shrink_and_perturb`."""
    own_key, target_key = jax.random.split(key)
    fresh = fresh_params(context, own_key, learner.params, init)

    def blend(old: jax.Array, new: jax.Array) -> jax.Array:
        return (keep * old + share * new).astype(old.dtype)

    forgotten = {"edited": None, "all": _everywhere(learner.params, True), "none": _everywhere(learner.params, False)}
    edited = edit(
        learner,
        jax.tree.map(blend, learner.params, fresh),
        mask,
        forget=forgotten[forget],
        count="zero" if forget == "all" and count == "entry" else count,
        target="copy" if target == "copy" else "keep",
        references=False,
    )
    edited = edited.replace(opt_state=move_references(edited.opt_state, mask, fresh, blend))
    if learner.target_params is None or target in ("keep", "copy"):
        return edited
    theirs = fresh if target == "edit" else fresh_params(context, target_key, learner.params, init)
    mixed = jax.tree.map(blend, learner.target_params, theirs)
    alone = edit(Learner(learner.target_params, None, ()), mixed, mask)
    return edited.replace(target_params=alone.params)


def _everywhere(params: PyTree, value: bool) -> PyTree:
    return jax.tree.map(lambda leaf: value, params)
