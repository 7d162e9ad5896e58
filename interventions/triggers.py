"""What a diagnostic must do for an intervention to act."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..agents.learner import Learner, PyTree
from .base import MEASURABLE, Context, Info, Intervention, every, only_if, require, require_schedulable

Measure = Callable[[Learner, Context], jax.Array]


class Trigger(NamedTuple):
    """init() -> state; look(state, learner, context) -> (() bool: act now, state, info)."""

    init: Callable[[], PyTree]
    look: Callable[[PyTree, Learner, Context], tuple[jax.Array, PyTree, Info]]
    spec: str = "trigger"


def threshold(
    diagnostic: str | Measure, *, above: float | None = None, below: float | None = None, rearm: float | None = None
) -> Trigger:
    """Acts at every look that finds the diagnostic above, or below, a level (exactly one of the two).

    diagnostic: a name of `base.MEASURABLE`, or measure(learner, context) -> ().
    rearm: hysteresis. Once it has acted it waits until the diagnostic was at least this far back: at or below `rearm` under
        `above`, at or above it under `below`.
    """
    require((above is None) != (below is None), "threshold: give either above or below")
    level = above if above is not None else below
    assert level is not None
    sign = 1.0 if above is not None else -1.0
    require(math.isfinite(level), f"threshold: the level must be finite, not {level}")
    require(
        rearm is None or sign * rearm <= sign * level, f"threshold: rearm {rearm} lies on the wrong side of {level}"
    )
    measure = _measure(diagnostic)

    def look(armed: PyTree, learner: Learner, context: Context) -> tuple[jax.Array, PyTree, Info]:
        value = measure(learner, context)
        if rearm is not None:
            armed = armed | (sign * value <= sign * rearm)
        fires = armed & (sign * value > sign * level)
        return fires, jnp.asarray(True) if rearm is None else armed & ~fires, {"measured": value}

    again = "" if rearm is None else f",rearm={float(rearm)}"
    spec = f"{_name(diagnostic)}{'>' if sign > 0 else '<'}{float(level)}{again}"
    return Trigger(lambda: jnp.asarray(True), look, spec)


def plateau(diagnostic: str | Measure, *, tolerance: float = 0.001, once: bool = False) -> Trigger:
    """Acts when the diagnostic differs by at most `tolerance` from the look before; never at the first look.

    once: never again after that, as the switch of Ma et al. (2024, arXiv 2310.07418).
    """
    require(0 <= tolerance < math.inf, f"plateau: tolerance must be zero or more and finite, not {tolerance}")
    measure = _measure(diagnostic)

    def look(state: PyTree, learner: Learner, context: Context) -> tuple[jax.Array, PyTree, Info]:
        previous, done = state
        value = jnp.asarray(measure(learner, context), jnp.float32)
        fires = (jnp.abs(value - previous) <= tolerance) & ~done
        return fires, (value, done | fires if once else done), {"measured": value}

    spec = f"plateau({_name(diagnostic)}, tolerance {float(tolerance)}{', once' if once else ''})"
    return Trigger(lambda: (jnp.asarray(jnp.inf, jnp.float32), jnp.asarray(False)), look, spec)


def task_boundary() -> Trigger:
    """Acts at the first look at a new task, `Context.task`; the first task is none. InterventionError where tasks stay."""

    def look(task: PyTree, learner: Learner, context: Context) -> tuple[jax.Array, PyTree, Info]:
        require(context.task is not None, "task_boundary: the task of this environment never changes")
        now = jnp.asarray(context.task, jnp.int32)
        return (task >= 0) & (now != task), now, {}

    return Trigger(lambda: jnp.asarray(-1, jnp.int32), look, "task_boundary")


def when(trigger: Trigger, inner: Intervention, period: int | None = None) -> Intervention:
    """`inner` whenever the trigger says so, looked at every `period` gradient steps (None: as often as `inner` is due).

    A schedule that `inner` has holds beside the trigger: it acts where both let it, and what fires where `inner` is not due
    fires again. InterventionError for methods that keep count at every gradient step, such as averages.
    """
    require_schedulable("when", inner)

    def init(learner: Learner) -> PyTree:
        return trigger.init(), inner.init(learner)

    def update(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        fires, seen, info = trigger.look(state[0], learner, context)
        if inner.due is not None and not context.now:
            due = inner.due(learner, context)
            fires, wasted = fires & due, fires & ~due
            seen = jax.tree.map(lambda old, new: jnp.where(wasted, old, new), state[0], seen)
        learner, own, done = only_if(True if context.now else fires, inner, learner, state[1], context)
        return learner, (seen, own), {"trigger": {"fired": fires, **info}, **done}

    mark = "," if ":" in inner.spec else ":"
    looking = inner._replace(init=init, update=update, period=1)
    scheduled = every(inner.period if period is None else period, looking)
    look = "" if period is None else f",look={period}"
    return scheduled._replace(spec=f"{inner.spec}{mark}when={trigger.spec}{look}")


def _measure(diagnostic: str | Measure) -> Measure:
    if not isinstance(diagnostic, str):
        return diagnostic
    require(
        diagnostic in MEASURABLE, f"there is no diagnostic {diagnostic!r} to act on; there are: {', '.join(MEASURABLE)}"
    )

    def measure(learner: Learner, context: Context) -> jax.Array:
        return context.measure(learner.params, diagnostic)

    return measure


def _name(diagnostic: str | Measure) -> str:
    return diagnostic if isinstance(diagnostic, str) else "measure"
