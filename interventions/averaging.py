"""Averages: a slow copy of the parameters follows the fast ones, and from time to time these go back to it."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from ..agents.learner import Learner, PyTree
from .base import Context, Info, Intervention, every, method, require
from .surgery import Count, Target, edit

Forget = Literal["all", "none"]


class Averages(NamedTuple):
    """What is remembered of a learner: PyTrees with the structure of its parameters."""

    slow: PyTree  # running average
    start: PyTree  # parameters when learning began; () where nothing goes back to them


@method
def hare_and_tortoise(
    period: int = 10_000,
    decay: float = 0.999,
    forget: Forget = "all",
    count: Count = "entry",
    target: Target = "copy",
    start: int = 0,
    stop: int | None = None,
) -> Intervention:
    """The fast network, the hare, restarts from its own running average, the tortoise (Lee et al., 2024, arXiv 2406.02596).

    At every gradient step slow <- decay * slow + (1 - decay) * theta; when due, theta <- slow.

    period, start, stop: gradient steps between restarts, as in `every`; the average runs always. The defaults of period and
        decay are ours: the authors' code has no reinforcement learning. What other methods draw anew is old in the average
        for some 1 / (1 - decay) gradient steps: a `reset` due at the same step is given behind this one, or undone by it.
    forget: all or none of the optimiser's statistics, which were gathered elsewhere. count: of the optimiser: see `edit`;
        where all is forgotten every count starts anew unless it is keep.
    target: copy the parameters there, edit them likewise (the same), or keep it.
    """
    return _restarts(period, decay, forget, count, target, start, stop, back_to_start=False)


@method
def elastic_reset(
    period: int = 10_000,
    decay: float = 0.995,
    forget: Forget = "all",
    count: Count = "entry",
    target: Target = "copy",
    start: int = 0,
    stop: int | None = None,
) -> Intervention:
    """theta goes back to its running average, and that to the parameters of the start (Noukhovitch et al., 2023, arXiv 2312.07551).

    At every gradient step slow <- decay * slow + (1 - decay) * theta; when due, theta <- slow and slow <- theta_0.

    period, start, stop: gradient steps between resets, as in `every`; the average runs always. The paper's setting is the
        alignment of language models, where theta_0 is the pretrained one; here it is the initial one, and the defaults of
        period and decay are ours. forget, count, target: as in `hare_and_tortoise`.
    """
    return _restarts(period, decay, forget, count, target, start, stop, back_to_start=True)


def _restarts(
    period: int,
    decay: float,
    forget: Forget,
    count: Count,
    target: Target,
    start: int,
    stop: int | None,
    back_to_start: bool,
) -> Intervention:
    require(0 <= decay <= 1, f"decay must lie in [0, 1], not {decay}")

    def init(learner: Learner) -> Averages:
        return Averages(_copy(learner.params), _copy(learner.params) if back_to_start else ())

    def go_back(learner: Learner, state: Averages, context: Context) -> tuple[Learner, Averages, Info]:
        everything, nothing = (jax.tree.map(lambda leaf, on=on: on, learner.params) for on in (True, False))
        learner = edit(
            learner,
            state.slow,
            everything,
            forget=everything if forget == "all" else nothing,
            count="zero" if forget == "all" and count == "entry" else count,
            target=target,
            references=False,  # nothing is drawn anew
        )
        slow = state.start if back_to_start else state.slow
        return learner, state._replace(slow=slow), {"restarts": jnp.ones((), jnp.int32)}

    restart = every(period, Intervention(update=go_back), start, stop)

    def update(learner: Learner, state: Averages, context: Context) -> tuple[Learner, Averages, Info]:
        slow = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.slow, learner.params)
        return restart.update(learner, state._replace(slow=slow), context)

    return Intervention(init, update, remembers=True)


def _copy(params: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, params)
