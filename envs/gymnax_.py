"""MinAtar from gymnax, compiled and vectorised, behind the host interface of `interface.py`."""

import functools
from collections.abc import Callable
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from .backend import Actions, versions
from .interface import Env, EnvSpec, Step

SUFFIX = "-MinAtar"
PIXELS_PER_CELL = 32
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
    """What may follow "minatar/" -> gymnax's own id."""
    return {name.removesuffix(SUFFIX): name for name in gymnax.registered_envs if name.endswith(SUFFIX)}


def make(
    env_id: str, family: str, name: str, num_envs: int, seed: int, protocol: str | None, training: bool, render: bool
) -> Env:
    """One of `names`; `protocol` and `training` do not apply, and drawing costs nothing until done."""
    return _MinAtarEnv(env_id, names(family)[name], num_envs, seed)


@functools.cache
def _compiled(task: str) -> tuple[Any, Any, Callable[..., Any], Callable[..., Any]]:
    """gymnax's environment, its parameters, and `reset` and `step` over N environments, compiled once for all."""
    env, params = gymnax.make(task)

    def reset(key: jax.Array) -> tuple[Any, jax.Array]:
        key, reset_key = jax.random.split(key)
        observation, state = env.reset(reset_key, params)
        # Without this, numbers written in Python are weakly typed here and not after a step, which compiles twice.
        state = jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.result_type(leaf).type), state)
        return (key, state), observation.astype(jnp.uint8)

    def step(carry: Any, action: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        key, step_key = jax.random.split(carry[0])
        observation, state, reward, terminated, truncated, info = env.step(step_key, carry[1], action, params)
        final_observation = info["final_observation"].astype(jnp.uint8)
        truncated = jnp.logical_and(truncated, jnp.logical_not(terminated))
        return (key, state), (observation.astype(jnp.uint8), reward, terminated, truncated, final_observation)

    return env, params, jax.jit(jax.vmap(reset)), jax.jit(jax.vmap(step))


class _MinAtarEnv:
    """A 10x10 game, one channel of 0 or 1 for each kind of object; no sticky actions, unlike the original's 0.1.

    It runs on the CPU whatever the default device: a step is too small to be worth a transfer.
    """

    def __init__(self, env_id: str, task: str, num_envs: int, seed: int) -> None:
        env, params, self._reset, self._step = _compiled(task)
        self._seed = seed
        self._device = jax.devices("cpu")[0]
        self._actions = Actions(env_id, spaces.Discrete(env.num_actions))
        self.spec = EnvSpec(
            id=env_id,
            num_envs=num_envs,
            observation_shape=tuple(env.observation_space(params).shape),
            observation_dtype="uint8",
            discrete=True,
            action_size=self._actions.size,
            max_episode_steps=int(params.max_steps_in_episode),
            protocol={
                "backend": "gymnax",
                "env": task,
                "sticky": 0.0,
                "frame_skip": 1,
                "max_episode_steps": int(params.max_steps_in_episode),
                "versions": versions("gymnax", "jax"),
            },
        )

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        self._carry, observation = self._reset(self._keys(self._seed if seed is None else seed))
        self._observation = np.array(observation)
        return self._observation

    def step(self, actions: NDArray[Any]) -> Step:
        self._carry, results = self._step(self._carry, self._actions(actions).astype(np.int32))
        observation, reward, terminated, truncated, final_observation = (np.array(result) for result in results)
        self._observation = observation
        return Step(
            observation, reward.astype(np.float32), terminated, truncated, final_observation, terminated | truncated
        )

    def render(self) -> NDArray[np.uint8]:
        """The topmost channel of each cell, as a colour; 320x320 pixels."""
        present = self._observation[0].astype(np.int64)  # [10, 10, C]
        topmost = (present * np.arange(1, present.shape[-1] + 1)).max(axis=-1)
        picture: NDArray[np.uint8] = COLOURS[topmost].repeat(PIXELS_PER_CELL, axis=0).repeat(PIXELS_PER_CELL, axis=1)
        return picture

    def snapshot(self) -> dict[str, NDArray[Any]]:
        keys, state = self._carry
        leaves = {f"state_{i}": np.array(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        return {"keys": np.array(jax.random.key_data(keys)), "observation": self._observation.copy(), **leaves}

    def restore(self, snapshot: dict[str, NDArray[Any]]) -> NDArray[Any]:
        structure: Any = jax.tree.structure(jax.eval_shape(self._reset, self._keys(0))[0][1])
        leaves = [jax.device_put(snapshot[f"state_{i}"], self._device) for i in range(structure.num_leaves)]
        keys = jax.random.wrap_key_data(jax.device_put(snapshot["keys"], self._device))
        self._carry = keys, jax.tree.unflatten(structure, leaves)
        self._observation = snapshot["observation"].copy()
        return self._observation

    def close(self) -> None:
        """Nothing to free."""

    def _keys(self, seed: int) -> jax.Array:
        keys: jax.Array = jax.device_put(jax.random.split(jax.random.key(seed), self.spec.num_envs), self._device)
        return keys
