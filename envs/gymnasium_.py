"""Any Gymnasium environment behind the interface of `interface.py`."""

import importlib
import importlib.util
import os
import sys
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FlattenObservation, TimeLimit
from numpy.typing import NDArray

from .backend import Actions, env_seeds, held, versions
from .capture import UnknownStateError, capture, functions, restore
from .interface import Env, EnvError, EnvSpec, Step

LIMIT = 27_000  # agent steps, as Atari's episodes have
FRAMES = "max_num_frames_per_episode"  # the limit that ALE's own ids have


def names(family: str) -> dict[str, str]:
    """Registered ids -> themselves, without those that gymnasium keeps only to say that they are gone."""
    for package in ("ale_py", "panda_gym"):  # which register their environments when they are imported
        if importlib.util.find_spec(package) is not None:
            gymnasium.register_envs(importlib.import_module(package))
    return {
        env_id: env_id
        for env_id, spec in gymnasium.registry.items()
        if not getattr(spec.entry_point, "__name__", "").startswith("_raise_")
    }


def make(
    env_id: str, family: str, name: str, num_envs: int, seed: int, protocol: str | None, training: bool, render: bool
) -> Env:
    """`name` as `gymnasium.make` takes it, "module:ID" included; `protocol` does not apply.

    In evaluation an environment without a time limit has one: a policy that never ends its episode would be played for ever.
    """
    return GymnasiumEnv(env_id, make_vector(env_id, name, num_envs, render, None if training else LIMIT), seed, render)


def make_vector(env_id: str, name: str, num_envs: int, render: bool, limit: int | None = None) -> SyncVectorEnv:
    """limit: steps of an episode where the environment has no limit of its own. EnvError in one line if it cannot be made."""
    if render and sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")  # Gymnasium's first choice, GLFW, cannot draw without a screen

    def one() -> gymnasium.Env[Any, Any]:
        drawing: dict[str, Any] = (
            {"render_mode": "rgb_array"} if render else {}
        )  # Panda-gym refuses None, gymnasium's default
        env = gymnasium.make(name, **drawing)
        if limit and env.spec and env.spec.max_episode_steps is None and FRAMES not in env.spec.kwargs:
            env = TimeLimit(env, limit)
        space = env.observation_space
        return FlattenObservation(env) if not isinstance(space, spaces.Box) and space.is_np_flattenable else env

    try:
        return SyncVectorEnv([one] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    except Exception as error:  # a constructor of a user's raises what it likes
        raise EnvError(f"{env_id}: {' '.join(str(error).split()) or type(error).__name__}") from error


class GymnasiumEnv:
    """Gymnasium's vector API, restarting ended episodes in the same step.

    uint8 images stay as they are, [H, W] gaining a channel; all else becomes float32. Dict, tuple and discrete
    observations are flattened as `gymnasium.spaces.flatten` says (one-hot where discrete).
    """

    def __init__(self, env_id: str, vector: SyncVectorEnv, seed: int, render: bool) -> None:
        space = vector.single_observation_space
        if not isinstance(space, spaces.Box):
            raise EnvError(f"{env_id}: its observations are {space}, which cannot be made one array")
        self._vector: Any = vector
        self._seed, self._render = seed, render
        self._functions = functions(vector.envs)
        self._actions = Actions(env_id, vector.single_action_space)
        is_image = space.dtype == np.uint8 and len(space.shape) in (2, 3)
        self._shape = (*space.shape, 1) if is_image and len(space.shape) == 2 else space.shape
        self._dtype = np.dtype(np.uint8 if is_image else np.float32)
        core = vector.envs[0].unwrapped
        packages = {type(part).__module__.partition(".")[0] for part in (core, *vars(core).values())}
        registered = vector.envs[0].spec
        settings = registered.kwargs if registered else {}
        self.spec = EnvSpec(
            id=env_id,
            num_envs=vector.num_envs,
            observation_shape=self._shape,
            observation_dtype=self._dtype.name,
            discrete=self._actions.discrete,
            action_size=self._actions.size,
            action_low=self._actions.low,
            action_high=self._actions.high,
            max_episode_steps=registered.max_episode_steps if registered else None,
            protocol={
                "backend": "gymnasium",
                "env": registered.id if registered else env_id,
                "settings": {key: repr(value) for key, value in settings.items() if key != "render_mode"},
                "versions": versions("gymnasium", *sorted(packages - {"gymnasium"})),
            },
        )

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        seeds = env_seeds(self._seed if seed is None else seed, self.spec.num_envs)
        self._observation = held(self._converted(self._vector.reset(seed=list(seeds))[0]))
        return self._observation

    def step(self, actions: NDArray[Any]) -> Step:
        raw, reward, terminated, truncated, info = self._vector.step(self._actions(actions))
        truncated = truncated & ~terminated
        ended = terminated | truncated
        observation = final_observation = self._converted(raw)
        if ended.any():
            final_observation = observation.copy()
            final_observation[ended] = self._converted(np.stack(info["final_obs"][ended]))
        self._observation = held(observation)
        return Step(observation, reward.astype(np.float32), terminated, truncated, final_observation, ended)

    def render(self) -> NDArray[np.uint8]:
        if not self._render:
            raise EnvError(f"{self.spec.id}: made without render=True, so there is no picture")
        try:
            return np.array(self._vector.envs[0].render(), np.uint8)
        except Exception as error:  # drawing libraries raise types of their own
            raise EnvError(f"{self.spec.id}: cannot be drawn: {' '.join(str(error).split())}") from error

    def snapshot(self) -> dict[str, NDArray[Any]] | None:
        """None if some attribute of the environment or a wrapper is neither plain, nor known, nor static."""
        try:
            return capture(self._vector.envs, self._functions) | {"observation": self._observation.copy()}
        except UnknownStateError:
            return None

    def restore(self, snapshot: dict[str, NDArray[Any]]) -> NDArray[Any]:
        restore(self._vector.envs, snapshot)
        self._observation = held(snapshot["observation"].copy())
        return self._observation

    def close(self) -> None:
        self._vector.close()

    def _converted(self, observation: Any) -> NDArray[Any]:
        array: NDArray[Any] = np.asarray(observation, self._dtype).reshape(-1, *self._shape)
        return array
