"""The loop: observation -> action -> transition -> replay -> gradient step, for environments that live on the host."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from ..agents.learner import PyTree
from ..envs import Env
from ..replay import DeviceStorage, Replay, Source, gather_mixed
from .compiled import Compiled
from .experiment import Experiment
from .metrics import Episodes, Totals
from .refitting import Refitting


@dataclass
class Training:
    """All of a run that changes. The replay and the environments are its two parts that are edited in place."""

    env: Env
    storage: Replay
    observation: Any  # [N, ...] what the next action answers to
    agent: PyTree
    sampler: PyTree
    totals: Totals  # metrics on the device, summed since the last line
    episodes: Episodes
    agent_step: int = 0
    gradient_step: int = 0
    owed: Fraction = field(default_factory=Fraction)  # gradient steps
    ratio: Fraction = field(default_factory=Fraction)  # gradient steps per agent step
    past: tuple[Source, ...] = ()  # to learn from beside `storage`; never changes
    memories: list[PyTree] = field(default_factory=list)  # what each intervention remembers
    effects: list[Totals] = field(default_factory=list)  # what each has done since the last line
    refitting: Refitting | None = None  # what the agent has fitted on the host
    dormant: PyTree = None  # units that diagnostics found dormant when they last looked


def learn_owed(t: Training, compiled: Compiled) -> None:
    """Queue the gradient steps that are owed; only the choice of slots is waited for."""
    while t.owed >= 1 and len(t.storage) > 0:
        t.sampler, *drawn = compiled.sample(t.sampler)
        slots, weight = map(np.asarray, drawn)  # for they may lie on another device than the agent
        columns = gather_mixed((t.storage, *t.past), slots)
        steps = np.int32(t.gradient_step), np.int32(t.agent_step)
        t.agent, t.totals, priorities = compiled.learn(t.agent, t.totals, columns, weight, *steps)
        t.sampler = compiled.prioritize(t.sampler, slots, priorities)
        t.gradient_step += 1
        t.owed -= 1
        intervene(t, compiled, columns, weight)


def intervene(t: Training, compiled: Compiled, columns: dict[str, Any], weight: Any) -> None:
    """Queue the interventions that are due; `columns` and `weight` are of the transitions just learnt from."""
    for index, act in enumerate(compiled.interventions):
        if act.due(t.gradient_step):
            seen = columns, weight
            if act.draw is not None:
                assert not isinstance(t.storage, DeviceStorage)
                first, written = np.int32(t.storage.first), np.int32(t.storage.written)
                slots = np.asarray(act.draw(first, written, np.int32(t.gradient_step)))
                seen = t.storage.look(slots), np.ones(slots.shape, np.float32)
            steps = np.int32(t.gradient_step), np.int32(t.agent_step)
            t.agent, t.memories[index], t.effects[index] = act.run(
                t.agent, t.memories[index], t.effects[index], *seen, *steps
            )


def host_loop(
    experiment: Experiment,
    training: Training,
    compiled: Compiled,
    boundary: Callable[[], bool],
) -> None:
    """Train until `experiment.steps`, or until `boundary`, called after every agent step, answers True.

    Unless `experiment.sync`, the gradient steps owed by one agent step are queued right after the next action is, and
    run while the environments step: that action comes from parameters one agent step old, which hides the cost of
    the environments. Their batches see all transitions either way.
    """
    t, warmup = training, experiment.agent.warmup
    clip, num_envs = t.env.spec.reward_clip, t.env.spec.num_envs
    assert not isinstance(t.storage, DeviceStorage)
    while t.agent_step < experiment.steps:
        if t.agent_step < warmup:
            action = compiled.explore(np.int32(t.agent_step))
        else:
            action = compiled.act(t.agent, t.observation, np.int32(t.agent_step))
        if not experiment.sync:
            learn_owed(t, compiled)
        chosen = np.asarray(action)
        step = t.env.step(chosen)
        reward = step.reward if clip is None else np.clip(step.reward, -clip, clip)
        slots = t.storage.add(chosen, reward, step.terminated, step.truncated, step.final_observation, step.observation)
        t.sampler = compiled.remember(t.sampler, slots)
        t.observation = step.observation
        t.agent_step += num_envs
        t.episodes.add(step.reward, step.episode_over)
        if t.agent_step > warmup:
            t.owed += t.ratio * num_envs
        if experiment.sync:
            learn_owed(t, compiled)
        if boundary():
            return
