"""The loop: observation -> action -> transition -> replay -> gradient step, for environments that live on the host."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..agents.learner import Agent, Batch, PyTree
from ..envs import Env, EnvSpec
from ..replay import Sampler, Storage, decode
from .experiment import Experiment
from .metrics import Episodes, Totals

STREAMS = ("environment", "action", "sampler", "agent", "intervention", "diagnostics", "evaluation")


def streams(seed: int) -> dict[str, jax.Array]:
    """The named random streams of a run; a draw is a function of its stream and a counter, so none holds a state."""
    root = jax.random.key(seed)
    return {name: jax.random.fold_in(root, index) for index, name in enumerate(STREAMS)}


def seed_from(stream: jax.Array, counter: int) -> int:
    """A seed in [0, 2^31) for things that want a number."""
    return int(jax.random.bits(jax.random.fold_in(stream, counter)) >> 1)


@dataclass
class Training:
    """All of a run that changes. The replay and the environments are its two parts that are edited in place."""

    env: Env
    storage: Storage
    observation: Any  # [N, ...] what the next action answers to
    agent: PyTree
    sampler: PyTree
    totals: Totals  # metrics on the device, summed since the last line
    episodes: Episodes
    agent_step: int = 0
    gradient_step: int = 0
    owed: Fraction = field(default_factory=Fraction)  # gradient steps


@dataclass(frozen=True)
class Compiled:
    """The functions of a run that reach the device, each traced once."""

    act: Callable[..., jax.Array]
    explore: Callable[..., jax.Array]
    remember: Callable[..., PyTree]
    sample: Callable[..., tuple[PyTree, jax.Array, jax.Array]]
    learn: Callable[..., tuple[PyTree, Totals, jax.Array]]


def compile_functions(experiment: Experiment, spec: EnvSpec, agent: Agent, sampler: Sampler) -> Compiled:
    """Jitted and donating; keys are folded from a stream and a counter inside, so the host splits none."""
    keys = streams(experiment.seed)

    def act(state: PyTree, observation: jax.Array, agent_step: jax.Array) -> jax.Array:
        return agent.act(state, observation, jax.random.fold_in(keys["action"], agent_step), agent_step)

    def explore(agent_step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(keys["action"], agent_step)
        if spec.discrete:
            return jax.random.randint(key, (spec.num_envs,), 0, spec.action_size)
        return jax.random.uniform(key, (spec.num_envs, spec.action_size), minval=-1.0, maxval=1.0)

    def sample(state: PyTree) -> tuple[PyTree, jax.Array, jax.Array]:
        return sampler.sample(state, experiment.agent.batch_size)

    def learn(
        state: PyTree, totals: Totals, columns: dict[str, jax.Array], weight: jax.Array, gradient_step: jax.Array
    ) -> tuple[PyTree, Totals, jax.Array]:
        batch = Batch(**decode(columns, spec.frame_stack), weight=weight)
        key = jax.random.fold_in(keys["agent"], gradient_step)
        new_state, metrics, priorities = agent.update(state, batch, key)
        finite = jnp.all(jnp.isfinite(jnp.stack(list(metrics.values()))))
        if experiment.on_nan == "skip":
            new_state = jax.tree.map(partial(jnp.where, finite), new_state, state)
            metrics = {name: jnp.where(finite, value, 0.0) for name, value in metrics.items()}
            priorities = jnp.where(finite, priorities, 0.0)
        return new_state, totals.add(metrics, finite, gradient_step), priorities

    return Compiled(
        act=jax.jit(act),
        explore=jax.jit(explore),
        remember=jax.jit(sampler.add, donate_argnums=0),
        sample=jax.jit(sample, donate_argnums=0),
        learn=jax.jit(learn, donate_argnums=(0, 1)),
    )


def learn_owed(t: Training, compiled: Compiled, sampler: Sampler) -> None:
    """Queue the gradient steps that are owed; only the choice of slots is waited for."""
    while t.owed >= 1 and len(t.storage) > 0:
        t.sampler, slots, weight = compiled.sample(t.sampler)
        columns = t.storage.gather(np.asarray(slots))
        t.agent, t.totals, priorities = compiled.learn(t.agent, t.totals, columns, weight, np.int32(t.gradient_step))
        t.sampler = sampler.update(t.sampler, slots, priorities)
        t.gradient_step += 1
        t.owed -= 1


def host_loop(
    experiment: Experiment,
    training: Training,
    compiled: Compiled,
    sampler: Sampler,
    boundary: Callable[[], bool],
) -> None:
    """Train until `experiment.steps`, or until `boundary`, called after every agent step, answers True.

    Unless `experiment.sync`, the gradient steps owed by one agent step are queued right after the next action is, and
    run while the environments step: that action comes from parameters one agent step old, which hides the cost of
    the environments. Their batches see all transitions either way.
    """
    t, clip, warmup = training, training.env.spec.reward_clip, experiment.agent.warmup
    ratio = Fraction(experiment.ratio).limit_denominator(1_000_000)
    while t.agent_step < experiment.steps:
        if t.agent_step < warmup:
            action = compiled.explore(np.int32(t.agent_step))
        else:
            action = compiled.act(t.agent, t.observation, np.int32(t.agent_step))
        if not experiment.sync:
            learn_owed(t, compiled, sampler)
        chosen = np.asarray(action)
        step = t.env.step(chosen)
        reward = step.reward if clip is None else np.clip(step.reward, -clip, clip)
        slots = t.storage.add(chosen, reward, step.terminated, step.truncated, step.final_observation, step.observation)
        t.sampler = compiled.remember(t.sampler, slots)
        t.observation = step.observation
        t.agent_step += len(chosen)
        t.episodes.add(step.reward, step.episode_over)
        if t.agent_step > warmup:
            t.owed += ratio * len(chosen)
        if experiment.sync:
            learn_owed(t, compiled, sampler)
        if boundary():
            return
