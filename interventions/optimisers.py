"""What the optimiser remembers, and how far it steps: fresh statistics, spikes clipped, useful weights spared."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..agents.learner import Learner, PyTree
from ..agents.optimizer import AdamState
from .base import Context, Info, Intervention, InterventionError, every, method, only_if, require
from .surgery import forget_statistics

SpamCount = Literal["zero", "keep"]


@method
def adam_reset(period: int | None = None) -> Intervention:
    """The optimiser forgets all that it knows whenever the target does (Asadi et al., 2023, arXiv 2306.17833).

    Moments and counts become 0, whatever the optimiser is; parameters stay. With a period it is the control for methods
    that reset both, and acts on all of the agent's optimisers, SAC's of the temperature included.
    period: gradient steps; None is at every hard update of the target, which is one after which all parameters equal
        the target's. It is seen where no method before this one in the order given edits one of the two. Looking costs
        a comparison of the smallest array per gradient step; under vmap over seeds, of all of them, and the reset
        itself.
    InterventionError where the period is None and the learner has no target, or one that moves at every step.
    """

    def update(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        return _forget_everything(learner), state, {"reset": jnp.ones((), jnp.int32)}

    return _at_target_updates("adam_reset", period, Intervention(update=update))


@method
def adam_rel(period: int | None = None) -> Intervention:
    """Adam's count of steps starts anew whenever the target changes (Ellis et al., 2024, arXiv 2412.17113, Adam-Rel).

    The moments stay, so that the first steps on the new target are short, and of bounded length whatever the new
    gradients are.
    period: as in `adam_reset`, with the same errors; one more where the optimiser counts no steps beside statistics.
    """

    def update(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        opt_state, counts = forget_counts(learner.opt_state, learner.params)
        if not counts:
            raise InterventionError(f"adam_rel: the optimiser of {context.learner} has no count of steps, as Adam has")
        return learner.replace(opt_state=opt_state), state, {"reset": jnp.ones((), jnp.int32)}

    return _at_target_updates("adam_rel", period, Intervention(update=update))


def forget_counts(opt_state: PyTree, params: PyTree) -> tuple[PyTree, int]:
    """The state with Adam's counts (or ages) at 0 and its moments kept, and how many counts there are.

    A count is that of an optimiser if it stands beside statistics with the structure of the parameters, as in every
    optax state of that kind; those of schedules stay.
    """
    structure: Any = jax.tree.structure(params)
    counts = 0

    def counted(node: Any) -> bool:
        fields = getattr(node, "_fields", ())
        return isinstance(node, AdamState) or (
            "count" in fields
            and any(jax.tree.structure(getattr(node, field)) == structure for field in fields if field != "count")
        )

    def renewed(node: Any) -> Any:
        nonlocal counts
        if not counted(node):
            return node
        counts += 1
        field = "ages" if isinstance(node, AdamState) else "count"
        return node._replace(**{field: jnp.zeros_like(getattr(node, field))})

    return jax.tree.map(renewed, opt_state, is_leaf=counted), counts


def target_is_copy(learner: Learner) -> jax.Array:
    """Whether every parameter equals the target's; the smallest array decides first. -> () bool."""
    pairs = zip(jax.tree.leaves(learner.params), jax.tree.leaves(learner.target_params), strict=True)
    smallest, *others = sorted(pairs, key=lambda pair: pair[0].size)

    def same(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (pair[0] == pair[1]).all()

    def all_same() -> jax.Array:
        return jnp.stack([jnp.ones((), bool), *map(same, others)]).all()

    copied: jax.Array = jax.lax.cond(same(smallest), all_same, lambda: jnp.zeros((), bool))
    return copied


def _at_target_updates(name: str, period: int | None, inner: Intervention) -> Intervention:
    if period is not None:  # of learners without a network, such as SAC's temperature, too
        return every(period, inner._replace(everywhere=True))

    def due(learner: Learner, context: Context) -> jax.Array:
        if learner.target_params is None:
            raise InterventionError(f"{name}: the learner {context.learner} has no target network: give a period")
        return target_is_copy(learner)

    def update(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        return only_if(True if context.now else due(learner, context), inner, learner, state, context)

    def configure(config: Any) -> Any:
        tau = getattr(config, "tau", 1.0)
        if tau < 1:
            raise InterventionError(
                f"{name}: a target that moves at every step (tau {tau}) has no copies: give a period"
            )
        return config

    return inner._replace(update=update, configure=configure, due=due)


class SpamState(NamedTuple):
    age: jax.Array  # () int32: gradient steps since the start or the last reset
    inner: PyTree


@method
def spam(
    period: int = 500, warmup: int = 150, theta: float = 5000.0, delay: int = 20, count: SpamCount = "zero"
) -> Intervention:
    """Adam whose moments start anew, with a warm-up, and whose gradient spikes are clipped (Huang et al., 2025, arXiv
    2501.06842).

    A gradient g with g^2 > theta * v becomes sign(g) * sqrt(theta * v), v being Adam's second moment before this step,
    not corrected. The step that is i gradient steps from a reset is 1 - 0.99 * (1 + cos(pi * i / warmup)) / 2 long,
    i < warmup.
    period: gradient steps between resets. warmup: gradient steps, also at the start.
    delay: gradient steps after a reset without clipping, as moments of none tell no spike; 20 is that of public code.
    count: of steps, at a reset: zero, or keep as public code has it, which gives up to 6.6 times too long steps.
    Where v is 0 nothing is clipped: the paper's rule would hold such an entry at 0 for ever.
    The inner optimiser must keep a second moment `nu`, as Adam and RMSprop; InterventionError if it does not.
    """
    require(warmup >= 0, f"warmup must be zero or more gradient steps, not {warmup}")
    require(theta > 0, f"theta must be positive, not {theta}")
    require(delay >= 0, f"delay must be zero or more gradient steps, not {delay}")

    def update(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        resets = 0

        def renewed(node: Any) -> Any:
            nonlocal resets
            if not isinstance(node, SpamState):
                return node
            resets += 1
            return node._replace(age=jnp.zeros_like(node.age))

        opt_state = jax.tree.map(renewed, learner.opt_state, is_leaf=lambda node: isinstance(node, SpamState))
        if not resets:
            raise InterventionError("spam: the optimiser is not spam's: make it by spam(...).wrap(network, tx)")
        learner = _forget_everything(learner.replace(opt_state=opt_state), count)
        return learner, state, {"reset": jnp.ones((), jnp.int32)}

    return every(period, Intervention(update=update, wrap=lambda network, tx: clip_spikes(tx, theta, warmup, delay)))


def clip_spikes(
    tx: optax.GradientTransformation, theta: float = 5000.0, warmup: int = 150, delay: int = 20
) -> optax.GradientTransformationExtraArgs:
    """`tx` given clipped gradients, its first `warmup` steps shortened; see `spam`, which adds the resets."""
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> SpamState:
        state = SpamState(jnp.zeros((), jnp.int32), inner.init(params))
        _second_moments(state, params)
        return state

    def update(gradient: PyTree, state: SpamState, params: PyTree = None, **extra: Any) -> tuple[PyTree, SpamState]:
        def clipped(g: jax.Array, v: jax.Array) -> jax.Array:
            spike = (jnp.square(g) > theta * v) & (v > 0) & (state.age >= delay)
            return jnp.where(spike, jnp.sign(g) * jnp.sqrt(theta * v), g)

        gradient = jax.tree.map(clipped, gradient, _second_moments(state, gradient))
        steps, inner_state = inner.update(gradient, state.inner, params, **extra)
        if warmup:
            share = jnp.minimum(state.age / warmup, 1.0)
            length = jnp.where(share < 1, 1 - 0.99 * (1 + jnp.cos(jnp.pi * share)) / 2, 1.0)
            steps = jax.tree.map(lambda step: length * step, steps)
        return steps, SpamState(optax.safe_increment(state.age), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


class UpgdState(NamedTuple):
    utility: PyTree  # of every entry of the parameters
    inner: PyTree


@method
def upgd(beta: float = 0.999, noise: float = 1e-5, decay: float = 0.0) -> Intervention:
    """Useful weights are spared, the others perturbed (Elsayed & Mahmood, 2024, arXiv 2404.00781, UPGD).

    U <- beta * U + (1 - beta) * (-g * w) is the utility of each entry, g being the gradient of the loss; the
    optimiser's own step s becomes (s + noise * xi) * (1 - sigmoid(U / max U)) - decay * w, xi standard normal. With SGD
    of learning rate a this is the paper's w <- (1 - a * weight_decay) * w - a * (g + sigma * xi) * (1 - sigmoid(U / max
    U)) at noise = a * sigma, decay = a * weight_decay; with Adam the noise comes behind it, as
    in the authors' adaptive form. An entry without utility takes half its step.
    beta: decay of the utility per gradient step. noise: standard deviation, in units of the parameters, per gradient
        step; 1e-5 is the paper's sigma of 0.001 at a learning rate of 0.01 [from memory]. decay: share of the weights,
        per gradient step.
    The maximum is over all parameters, of all members of an ensemble. The bias correction of the paper's algorithm
    cancels in U / max U; the authors' code leaves it out of max U alone. Where no utility is positive every gate is a
    half at U = 0.
    """
    require(0 <= beta < 1, f"beta must lie in [0, 1), not {beta}")
    require(noise >= 0, f"noise must be zero or more, not {noise}")
    require(0 <= decay < 1, f"decay must lie in [0, 1), not {decay}")
    return Intervention(project=lambda network, tx: gate_by_utility(tx, beta, noise, decay), period=0)


def gate_by_utility(
    tx: optax.GradientTransformation, beta: float = 0.999, noise: float = 1e-5, decay: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """`tx` with its steps gated; see `upgd`. `update` must be given params, and a key unless noise is 0."""
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> UpgdState:
        return UpgdState(optax.tree.zeros_like(params), inner.init(params))

    def update(
        gradient: PyTree, state: UpgdState, params: PyTree = None, *, key: jax.Array | None = None, **extra: Any
    ) -> tuple[PyTree, UpgdState]:
        if params is None:
            raise ValueError("upgd needs the parameters: tx.update(gradient, state, params)")
        if noise and key is None:
            raise InterventionError("upgd: noise needs a key: tx.update(..., key=key)")
        steps, inner_state = inner.update(gradient, state.inner, params, key=key, **extra)
        utility = jax.tree.map(lambda u, g, w: beta * u - (1 - beta) * g * w, state.utility, gradient, params)
        largest = jnp.stack([leaf.max() for leaf in jax.tree.leaves(utility)]).max()
        largest = jnp.where(largest > 0, largest, 1.0)
        if noise and key is not None:
            # The agent draws from `key` too, and so may other transformations.
            drawn = optax.tree.random_like(jax.random.fold_in(key, sum(b"upgd")), params)
            steps = jax.tree.map(lambda step, xi: step + noise * xi, steps, drawn)

        def gated(step: jax.Array, u: jax.Array, w: jax.Array) -> jax.Array:
            return step * (1 - jax.nn.sigmoid(u / largest)) - decay * w

        return jax.tree.map(gated, steps, utility, params), UpgdState(utility, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _forget_everything(learner: Learner, count: SpamCount = "zero") -> Learner:
    everything = jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), bool), learner.params)
    return learner.replace(opt_state=forget_statistics(learner.opt_state, everything, count))


def _second_moments(opt_state: PyTree, like: PyTree) -> PyTree:
    """The first `nu` with the structure of `like`."""
    structure: Any = jax.tree.structure(like)

    def holds(node: Any) -> bool:
        return "nu" in getattr(node, "_fields", ()) and jax.tree.structure(node.nu) == structure

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=holds) if holds(node)]
    if not found:
        raise InterventionError("spam: the optimiser keeps no second moment (nu), as Adam and RMSprop do")
    return found[0].nu
