"""Tasks that take turns in an environment of gymnax, as one environment of gymnax."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

CYCLE = ("Breakout", "Asterix", "SpaceInvaders")
ORDERS = 5  # of a game's channels, its own first
PHYSICS: dict[str, tuple[dict[str, float], ...]] = {  # gymnax's id -> what each task changes
    "CartPole-v1": ({}, {"gravity": 19.6, "force_mag": 6.0}, {"gravity": 4.9, "force_mag": 20.0}, {"force_mag": 5.0}),
    "Pendulum-v1": ({}, {"g": 14.0}, {"g": 5.0}, {"g": 12.0, "max_torque": 3.0}),
}


class Task(NamedTuple):
    """An environment of gymnax, its parameters, and the order in which its channels are shown."""

    name: str
    env: Any
    params: Any
    order: tuple[int, ...] | None = None


class ChangingState(struct.PyTreeNode):
    step: jax.Array  # () int32: steps of this environment so far
    states: tuple[Any, ...]  # of every task; those whose turn it is not stand still


def cycle() -> tuple[Task, ...]:
    """Games of MinAtar."""
    return tuple(Task(game, *gymnax.make(f"{game}-MinAtar")) for game in CYCLE)


def permuted(game: str) -> tuple[Task, ...]:
    """One game of MinAtar, its channels in different orders, always the same ones."""
    env, params = gymnax.make(f"{game}-MinAtar")
    generator = np.random.default_rng(0)
    orders = [tuple(range(env.observation_space(params).shape[-1]))]
    while len(orders) < ORDERS:
        order = tuple(int(channel) for channel in generator.permutation(len(orders[0])))
        orders += [order] if order not in orders else []
    return tuple(Task(str(order), env, params, order) for order in orders)


def physics(name: str) -> tuple[Task, ...]:
    """A task of classic control with other constants."""
    env, params = gymnax.make(name)
    return tuple(
        Task(
            ", ".join(f"{key} {value:g}" for key, value in change.items()) or "as it is", env, params.replace(**change)
        )
        for change in PHYSICS[name]
    )


TASKS: dict[str, Callable[[], tuple[Task, ...]]] = {
    "minatar-cycle": cycle,
    "Breakout-permuted": functools.partial(permuted, "Breakout"),
    "SpaceInvaders-permuted": functools.partial(permuted, "SpaceInvaders"),
    "CartPole-physics": functools.partial(physics, "CartPole-v1"),
    "Pendulum-physics": functools.partial(physics, "Pendulum-v1"),
}


@functools.cache
def changing(name: str, period: int, signalled: bool) -> tuple["Changing", Any]:
    """As gymnax.make: an environment, and its parameters."""
    env = Changing(TASKS[name](), period, signalled)
    return env, env.params


class Changing:
    """Speaks as an environment of gymnax does; the parameters that it is given are its own, and not looked at.

    Every `period` steps the episode is cut and the next task's begins, the first after the last. Images get the channels of the
    game that has most, those that a game has not staying 0; an action that a game has not does nothing. A continuous action is
    the same share of what each task allows. signalled: the task is shown, by a channel or number for each, 1 for the present one.
    """

    def __init__(self, tasks: tuple[Task, ...], period: int, signalled: bool) -> None:
        self.tasks, self.period, self.signalled = tasks, period, signalled
        limit = max(int(task.params.max_steps_in_episode) for task in tasks)
        self.params = dataclasses.replace(tasks[0].params, max_steps_in_episode=limit)
        inner = [task.env.observation_space(task.params) for task in tasks]
        self.channels, signals = max(space.shape[-1] for space in inner), len(tasks) * signalled
        if len(inner[0].shape) == 1:
            low, high = (
                np.append(np.broadcast_to(bound, self.channels), np.full(signals, extra))
                for bound, extra in ((inner[0].low, 0.0), (inner[0].high, 1.0))
            )
            self._observed = spaces.Box(low, high, (self.channels + signals,))
        else:
            self._observed = spaces.Box(0, 1, (*inner[0].shape[:-1], self.channels + signals))
        acting = [task.env.action_space(task.params) for task in tasks]
        self._counts = [int(space.n) for space in acting] if isinstance(acting[0], spaces.Discrete) else []
        self._acted = spaces.Discrete(max(self._counts)) if self._counts else acting[0]
        self._bounds = [] if self._counts else [(float(space.low), float(space.high)) for space in acting]
        self.record = {"period": period, "tasks": [task.name for task in tasks], "signalled": signalled}

    def action_space(self, params: Any) -> Any:
        return self._acted

    def observation_space(self, params: Any) -> Any:
        return self._observed

    def reset(self, key: jax.Array, params: Any) -> tuple[jax.Array, ChangingState]:
        observation, states = self._begin(key, jnp.zeros((), jnp.int32))
        return observation, ChangingState(jnp.zeros((), jnp.int32), states)

    def step(self, key: jax.Array, state: ChangingState, action: jax.Array, params: Any) -> tuple[Any, ...]:
        play_key, next_key = jax.random.split(key)
        players = [self._player(index) for index in range(len(self.tasks))]
        played = jax.lax.switch(self._task(state.step), players, play_key, state.states, action)
        observation, states, reward, terminated, truncated, final = played
        step = state.step + 1
        changes = step % self.period == 0
        observation, states = jax.lax.cond(
            changes, lambda: self._begin(next_key, self._task(step)), lambda: (observation, states)
        )
        info = {"final_observation": final}
        return observation, ChangingState(step, states), reward, terminated, jnp.logical_or(truncated, changes), info

    def _task(self, step: jax.Array) -> jax.Array:
        return step // self.period % len(self.tasks)

    def _begin(self, key: jax.Array, task: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
        """The first observation of one task, and the first state of each."""
        begun = [each.env.reset(jax.random.fold_in(key, index), each.params) for index, each in enumerate(self.tasks)]
        observations = [self._shown(index, observation) for index, (observation, _) in enumerate(begun)]
        return jnp.stack(observations)[task], tuple(strongly_typed(state) for _, state in begun)

    def _player(self, index: int) -> Callable[..., tuple[Any, ...]]:
        """One step of a task, the others as they are."""
        task = self.tasks[index]

        def play(key: jax.Array, states: tuple[Any, ...], action: jax.Array) -> tuple[Any, ...]:
            chosen = self._chosen(index, action)
            observation, state, reward, terminated, truncated, info = task.env.step(
                key, states[index], chosen, task.params
            )
            others = (*states[:index], strongly_typed(state), *states[index + 1 :])
            final = self._shown(index, info["final_observation"])
            reward = jnp.asarray(reward, jnp.float32).reshape(())
            return self._shown(index, observation), others, reward, terminated, truncated, final

        return play

    def _chosen(self, index: int, action: jax.Array) -> jax.Array:
        """The action of a task for one of `action_space`."""
        if self._counts:
            return jnp.where(action < self._counts[index], action, 0)  # 0 is MinAtar's no-op
        (low, high), (own_low, own_high) = self._bounds[0], self._bounds[index]
        if (low, high) == (own_low, own_high):
            return action
        return own_low + (action - low) / (high - low) * (own_high - own_low)

    def _shown(self, index: int, observation: jax.Array) -> jax.Array:
        """An observation of a task as an agent sees it."""
        order, is_this = self.tasks[index].order, np.eye(len(self.tasks))[index]
        if order is not None:
            observation = observation[..., jnp.array(order)]
        area, missing = observation.shape[:-1], self.channels - observation.shape[-1]
        signal = is_this if self.signalled else is_this[:0]
        more = np.append(np.zeros(missing), signal)
        padding = jnp.broadcast_to(more, (*area, len(more)))
        return jnp.concatenate([observation, padding], axis=-1).astype(jnp.float32)


def strongly_typed(state: Any) -> Any:
    """Numbers written in Python are weakly typed after a reset and not after a step, which would compile twice."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.result_type(leaf).type), state)
