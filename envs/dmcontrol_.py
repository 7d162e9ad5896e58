"""Pixels of the DeepMind Control Suite behind the interface of `interface.py`, drawn by dm_control through OpenGL.

Without a screen MuJoCo draws through EGL (MUJOCO_GL says otherwise), in software if it must. Whether it can is tried in a
process of its own, for some of what can go wrong ends the process.
"""

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from .backend import Actions, env_seeds, held, versions
from .capture import UnknownStateError, pack, unpack
from .interface import Env, EnvError, EnvSpec, Step

SIZE = 84  # pixels, of both sides
CHANNELS = 3
FRAME_STACK = 3
ACTION_REPEAT = 2  # frames per agent step
MAX_FRAMES = 1_000  # of an episode
CAMERAS = {"quadruped": 2}  # else 0; Yarats et al. (2022), DrQ-v2's code
PICTURE = (240, 320)  # pixels, of `render`

_PROBE = """
from dm_control import suite
suite.load("point_mass", "easy").physics.render(84, 84, camera_id=0)
"""


@functools.cache
def names(family: str) -> dict[str, tuple[str, str]]:
    """What may follow "family/" -> dm_control's domain and task; EnvError where nothing can be drawn."""
    return {f"{domain}-{task}": (domain, task) for domain, task in _suite().ALL_TASKS}


def make(
    env_id: str, family: str, name: str, num_envs: int, seed: int, protocol: str | None, training: bool, render: bool
) -> Env:
    """One of `names`; `protocol` and `training` do not apply, and drawing is what these environments do anyway."""
    return _PixelEnv(env_id, *names(family)[name], num_envs, seed)


@functools.cache
def _suite() -> Any:
    """dm_control's suite; EnvError where it is not installed or cannot draw."""
    if importlib.util.find_spec("dm_control") is None:
        raise EnvError(
            "dmc-pixels/* needs the package dm-control, on Python below 3.13: pip install 'resprout[pixels]'"
        )
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # before dm_control is imported, which chooses then
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, check=False, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvError(
            f"dmc-pixels/*: MuJoCo cannot draw here (MUJOCO_GL={os.environ.get('MUJOCO_GL')}); install the system "
            f"packages libegl1 libgl1 libgl1-mesa-dri ({said})"
        )
    return importlib.import_module("dm_control.suite")


class _PixelEnv:
    """The last 3 frames of 84 x 84 RGB, [84, 84, 9]; each action is taken for 2 frames, whose rewards are summed."""

    def __init__(self, env_id: str, domain: str, task: str, num_envs: int, seed: int) -> None:
        self._seed = seed
        self._camera = CAMERAS.get(domain, 0)
        self._envs = [_suite().load(domain, task) for _ in range(num_envs)]
        action = self._envs[0].action_spec()
        low, high = (np.broadcast_to(bound, action.shape) for bound in (action.minimum, action.maximum))
        self._actions = Actions(env_id, spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32))
        self._elapsed = np.zeros(num_envs, np.int64)  # agent steps of the running episodes
        limit = MAX_FRAMES // ACTION_REPEAT
        self.spec = EnvSpec(
            id=env_id,
            num_envs=num_envs,
            observation_shape=(SIZE, SIZE, CHANNELS * FRAME_STACK),
            observation_dtype="uint8",
            discrete=False,
            action_size=self._actions.size,
            action_low=self._actions.low,
            action_high=self._actions.high,
            frame_stack=FRAME_STACK,
            max_episode_steps=limit,
            protocol={
                "backend": "dm_control",
                "env": f"{domain}-{task}",
                "sticky": 0.0,
                "frame_skip": ACTION_REPEAT,
                "camera": self._camera,
                "max_episode_steps": limit,
                "renderer": os.environ.get("MUJOCO_GL"),
                "versions": versions("dm-control", "mujoco"),
            },
        )

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        seeds = env_seeds(self._seed if seed is None else seed, len(self._envs))
        for env, own in zip(self._envs, seeds, strict=True):
            env.task.random.seed(own)
        self._observation = held(np.stack([self._first(index) for index in range(len(self._envs))]))
        return self._observation

    def step(self, actions: NDArray[Any]) -> Step:
        count = len(self._envs)
        reward = np.zeros(count, np.float32)
        terminated, over = np.zeros((2, count), np.bool_)
        final_observation = np.empty_like(self._observation)
        final_observation[..., :-CHANNELS] = self._observation[..., CHANNELS:]
        for index, (env, action) in enumerate(zip(self._envs, self._actions(actions), strict=True)):
            for _ in range(ACTION_REPEAT):
                result = env.step(action)
                reward[index] += result.reward
                if result.last():
                    break
            over[index] = result.last()
            terminated[index] = result.last() and result.discount == 0
            final_observation[index, ..., -CHANNELS:] = self._frame(env)
        self._elapsed += 1
        ended = over | (self._elapsed >= MAX_FRAMES // ACTION_REPEAT)
        observation = final_observation
        if ended.any():
            observation = final_observation.copy()
            for ending in ended.nonzero()[0]:
                observation[ending] = self._first(int(ending))
        self._observation = held(observation)
        return Step(observation, reward, terminated, ended & ~terminated, final_observation, ended)

    def render(self) -> NDArray[np.uint8]:
        picture: NDArray[np.uint8] = self._envs[0].physics.render(*PICTURE, camera_id=self._camera)
        return picture

    def snapshot(self) -> dict[str, NDArray[Any]] | None:
        """None if some attribute of the task is neither plain nor known."""
        try:
            packed = pack([_state(env) for env in self._envs])
        except UnknownStateError:
            return None
        return packed | {"observation": self._observation.copy(), "elapsed": self._elapsed.copy()}

    def restore(self, snapshot: dict[str, NDArray[Any]]) -> NDArray[Any]:
        states = unpack(snapshot, [_state(env) for env in self._envs])
        for env, state in zip(self._envs, states, strict=True):
            vars(env).update(state["env"])
            vars(env.task).update(state["task"])
            _redraw_terrain(env.physics)
        self._observation, self._elapsed = held(snapshot["observation"].copy()), snapshot["elapsed"].copy()
        return self._observation

    def close(self) -> None:
        for env in self._envs:
            env.physics.free()
        self._envs = []

    def _first(self, index: int) -> NDArray[np.uint8]:
        """Begin an episode: three times its first frame."""
        self._envs[index].reset()
        self._elapsed[index] = 0
        return np.tile(self._frame(self._envs[index]), FRAME_STACK)

    def _frame(self, env: Any) -> NDArray[np.uint8]:
        frame: NDArray[np.uint8] = env.physics.render(SIZE, SIZE, camera_id=self._camera)
        return frame


def _state(env: Any) -> dict[str, Any]:
    """All of one environment that changes; the model first, for what is derived in the data depends on it."""
    return {
        "model": env.physics.model.ptr,
        "data": env.physics.data.ptr,
        "task": dict(vars(env.task)),
        "env": {name: getattr(env, name) for name in ("_step_count", "_reset_next_step")},
    }


def _redraw_terrain(physics: Any) -> None:
    """Height fields are drawn from a copy, which a task makes anew only when it changes them itself."""
    if physics.model.nhfield:
        import mujoco

        with physics.contexts.gl.make_current() as context:
            for index in range(physics.model.nhfield):
                context.call(mujoco.mjr_uploadHField, physics.model.ptr, physics.contexts.mujoco.ptr, index)
