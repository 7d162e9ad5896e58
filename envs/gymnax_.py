"""MinAtar and classic control from gymnax, compiled and vectorised, behind the interfaces of `interface.py` and `jax_.py`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from .backend import Actions, held, versions
from .changing_jax import changing, strongly_typed
from .interface import Env, EnvError, EnvSpec, Step

SUFFIX = "-MinAtar"
CONTROL = ("Acrobot-v1", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1")
PIXELS_PER_CELL = 32
Changing = tuple[str, int, bool]  # a task that changes: name, period, signalled
# Black for an empty cell, then one colour for each channel (Seaquest has ten).
COLOURS = np.array(
    [
        (0, 0, 0), (86, 180, 233), (230, 159, 0), (0, 158, 115), (213, 94, 0), (240, 228, 66),
        (0, 114, 178), (204, 121, 167), (153, 153, 153), (255, 255, 255), (128, 0, 0),
    ],
    np.uint8,
)  # fmt: skip


@functools.cache
def names(family: str) -> dict[str, str]:
    """What may follow "minatar/" or "gymnax/" -> gymnax's own id."""
    if family == "gymnax":
        return {name: name for name in CONTROL if name in gymnax.registered_envs}
    return {name.removesuffix(SUFFIX): name for name in gymnax.registered_envs if name.endswith(SUFFIX)}


def make(
    env_id: str, family: str, name: str, num_envs: int, seed: int, protocol: str | None, training: bool, render: bool
) -> Env:
    """One of `names`; `protocol` and `training` do not apply, and drawing costs nothing until done."""
    return GymnaxEnv(env_id, names(family)[name], num_envs, seed)


class _Task(NamedTuple):
    """A game, its functions over N environments compiled once for all."""

    env: Any
    params: Any
    observation_dtype: str
    reset: Callable[..., Any]
    transition: Callable[..., Any]
    step: Callable[..., Any]


@functools.cache
def _compiled(task: str | Changing) -> _Task:
    env, params = gymnax.make(task) if isinstance(task, str) else changing(*task)
    dtype = "uint8" if len(env.observation_space(params).shape) == 3 else "float32"

    def reset(key: jax.Array) -> tuple[Any, jax.Array]:
        key, reset_key = jax.random.split(key)
        observation, state = env.reset(reset_key, params)
        return (key, strongly_typed(state)), observation.astype(dtype)

    def step(carry: Any, action: jax.Array) -> tuple[Any, Step]:
        key, step_key = jax.random.split(carry[0])
        observation, state, reward, terminated, truncated, info = env.step(step_key, carry[1], action, params)
        truncated = jnp.logical_and(truncated, jnp.logical_not(terminated))
        values: dict[str, Any] = {
            "observation": observation.astype(dtype),
            "reward": jnp.asarray(reward, jnp.float32).reshape(()),
            "terminated": terminated,
            "truncated": truncated,
            "final_observation": info["final_observation"].astype(dtype),
            "episode_over": jnp.logical_or(terminated, truncated),
        }
        return (key, state), Step(**values)

    transition = jax.vmap(step)
    return _Task(env, params, dtype, jax.jit(jax.vmap(reset)), transition, jax.jit(transition))


def _host_device() -> jax.Device:
    """The CPU; where JAX was told to do without, the first device there is."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _space(space: Any) -> spaces.Space[Any]:
    """Gymnasium's for gymnax's."""
    if hasattr(space, "n"):
        return spaces.Discrete(int(space.n))
    low, high = (np.broadcast_to(np.asarray(bound, np.float32), space.shape) for bound in (space.low, space.high))
    return spaces.Box(low, high, space.shape, np.float32)


class GymnaxEnv:
    """A game of MinAtar, 10x10 with one channel of 0 or 1 for each kind of object and no sticky actions, unlike the
    original's 0.1; or a task of classic control.

    On the host's call it runs on the CPU whatever the default device: a step is too small to be worth a transfer.
    """

    def __init__(self, env_id: str, task: str | Changing, num_envs: int, seed: int) -> None:
        """task: gymnax's own id, or one of `changing_jax.TASKS` with period and whether it is signalled."""
        env, params, dtype, self._reset, self._transition, self._step = _compiled(task)
        self._seed = seed
        self._device = _host_device()
        self._drawn = getattr(env, "channels", None)  # first channels of a picture; those behind show the task
        self.carry: Any = None
        self._actions = Actions(env_id, _space(env.action_space(params)))
        self.spec = EnvSpec(
            id=env_id,
            num_envs=num_envs,
            observation_shape=tuple(env.observation_space(params).shape),
            observation_dtype=dtype,
            discrete=self._actions.discrete,
            action_size=self._actions.size,
            action_low=self._actions.low,
            action_high=self._actions.high,
            max_episode_steps=int(params.max_steps_in_episode),
            protocol={
                "backend": "gymnax",
                "env": task if isinstance(task, str) else task[0],
                **({"sticky": 0.0, "frame_skip": 1} if dtype == "uint8" else {}),
                **getattr(env, "record", {}),
                "max_episode_steps": int(params.max_steps_in_episode),
                "versions": versions("gymnax", "jax"),
            },
        )

    def transition(self, carry: Any, actions: jax.Array) -> tuple[Any, Step]:
        """Pure: `step` as a function of the state, for loops on the device."""
        if not self.spec.discrete:
            low, high = (np.array([bound], np.float32) for bound in (self.spec.action_low, self.spec.action_high))
            actions = jnp.clip((high + low) / 2 + (high - low) / 2 * actions, low, high)
        result: tuple[Any, Step] = self._transition(carry, actions)
        return result

    def go_on(self, carry: Any, observation: Any) -> None:
        self.carry, self._observation = carry, observation

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        self.carry, observation = self._reset(self._keys(self._seed if seed is None else seed))
        return self._observed(observation)

    def step(self, actions: NDArray[Any]) -> Step:
        chosen = self._actions(actions)
        self.carry, step = self._step(self.carry, chosen.astype(np.int32) if self.spec.discrete else chosen)
        return Step(self._observed(step.observation), *(np.array(part) for part in step[1:]))

    def render(self) -> NDArray[np.uint8]:
        """The topmost channel of each cell, as a colour; 320x320 pixels."""
        if self.spec.observation_dtype != "uint8":
            raise EnvError(f"{self.spec.id} cannot be drawn: gymnax draws nothing of classic control")
        present = np.asarray(self._observation[0]).astype(np.int64)[..., : self._drawn]  # [10, 10, C]
        topmost = (present * np.arange(1, present.shape[-1] + 1)).max(axis=-1)
        picture: NDArray[np.uint8] = COLOURS[topmost].repeat(PIXELS_PER_CELL, axis=0).repeat(PIXELS_PER_CELL, axis=1)
        return picture

    def snapshot(self) -> dict[str, NDArray[Any]]:
        keys, state = self.carry
        leaves = {f"state_{i}": np.array(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        return {"keys": np.array(jax.random.key_data(keys)), "observation": np.array(self._observation), **leaves}

    def restore(self, snapshot: dict[str, NDArray[Any]]) -> NDArray[Any]:
        structure: Any = jax.tree.structure(jax.eval_shape(self._reset, self._keys(0))[0][1])
        leaves = [jax.device_put(snapshot[f"state_{i}"], self._device) for i in range(structure.num_leaves)]
        keys = jax.random.wrap_key_data(jax.device_put(snapshot["keys"], self._device))
        self.carry = keys, jax.tree.unflatten(structure, leaves)
        return self._observed(snapshot["observation"])

    def close(self) -> None:
        """Nothing to free."""

    def _observed(self, observation: Any) -> NDArray[Any]:
        """A copy of the current observations, for `render` and `snapshot` too."""
        copied = held(np.array(observation))
        self._observation = copied
        return copied

    def _keys(self, seed: int) -> jax.Array:
        keys: jax.Array = jax.device_put(jax.random.split(jax.random.key(seed), self.spec.num_envs), self._device)
        return keys
