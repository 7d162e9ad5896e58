"""The replay ratio as something that a diagnostic sets."""

import jax
import jax.numpy as jnp
from flax import struct

from ..agents.learner import Learner, PyTree
from .base import MEASURABLE, Context, Control, Info, Intervention, method, require


class Plateau(struct.PyTreeNode):
    """What Adaptive RR remembers; all ()."""

    previous: jax.Array  # float32: the diagnostic at the last check, at first that of the first gradient step
    total: jax.Array  # float32: sum of the diagnostic over the gradient steps of the window
    count: jax.Array  # int32: those steps
    high: jax.Array  # bool: the ratio is the high one, for good


@method
def adaptive_replay_ratio(
    low: float = 0.5,
    high: float = 2.0,
    every: int = 25_000,
    window: int = 500,
    tolerance: float = 0.001,
    diagnostic: str = "fau",
    layers: tuple[str, ...] = (),
) -> Intervention:
    """Adaptive RR (Ma et al., 2024, arXiv 2310.07418): a low replay ratio until the critic's plasticity has recovered.

    low, high: gradient steps per agent step, the ratio before and after the one switch. Every `every` agent steps the mean of
    the diagnostic over the `window` agent steps before is compared with that of the check before; where they differ by at
    most `tolerance` the ratio becomes high and stays. The first is compared with the value of the first gradient step.

    Defaults are the code's for DeepMind Control, where an episode has 500 agent steps and every 50th is the window. There the
    unit is the episode; here it is the agent step, which holds for episodes of any length, and for as many environments
    as `window` has steps.
    The diagnostic is read off the batch just learnt from, after that gradient step and without a random shift
    (there: before it, shifted), of the critic; learner=NAME reads another network. It costs a forward pass at the gradient
    steps of the window, nothing at others.
    layers: names of its layers, or of modules, that are looked at; all if none. Theirs are those with ReLU: of DrQ-v2's critic
    layers=heads. Which of a Q-network's the paper does not say.
    """
    require(low > 0 and high > 0, f"low and high must be positive, not {low} and {high}")
    require(every > window > 0, f"window must lie in (0, every = {every}), not {window}")
    require(tolerance >= 0, f"tolerance must be zero or more, not {tolerance}")
    require(
        diagnostic in MEASURABLE, f"there is no diagnostic {diagnostic!r} to act on; there are: {', '.join(MEASURABLE)}"
    )

    def init(learner: Learner) -> Plateau:
        zero = jnp.zeros((), jnp.float32)
        return Plateau(jnp.asarray(jnp.nan, jnp.float32), zero, jnp.zeros((), jnp.int32), jnp.asarray(False))

    def update(learner: Learner, state: Plateau, context: Context) -> tuple[Learner, PyTree, Info]:
        first = jnp.asarray(context.gradient_step) == 1

        def look(state: Plateau) -> Plateau:
            value = context.measure(learner.params, diagnostic, layers)
            in_window = inside.astype(jnp.int32)
            return state.replace(
                previous=jnp.where(first, value, state.previous),
                total=state.total + in_window * value,
                count=state.count + in_window,
            )

        # The gradient steps owed by the agent step of the check come before it or after it, as the loop has it: in no window.
        inside = jnp.asarray(context.agent_step) % every >= every - window
        return learner, jax.lax.cond(first | inside, look, lambda state: state, state), {}

    def decide(state: Plateau) -> tuple[Plateau, jax.Array]:
        mean = jnp.where(state.count > 0, state.total / jnp.maximum(state.count, 1), jnp.nan)
        state = next_plateau(state, mean, tolerance)
        return state, jnp.where(state.high, high, low).astype(jnp.float32)

    return Intervention(init, update, control=Control(low, every, decide, window), learners=("critic",))


def next_plateau(state: Plateau, mean: jax.Array, tolerance: float) -> Plateau:
    """After a check that found `mean`; one of no gradient step, NaN, changes nothing."""
    found = ~jnp.isnan(mean)
    return Plateau(
        previous=jnp.where(found, mean, state.previous),
        total=jnp.zeros_like(state.total),
        count=jnp.zeros_like(state.count),
        high=state.high | (jnp.abs(mean - state.previous) <= tolerance),
    )
