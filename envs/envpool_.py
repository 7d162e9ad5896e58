"""EnvPool behind the interface of `interface.py`: Atari, and MuJoCo with all that is made of it.

EnvPool restarts an episode in the step after its end, a step that ignores its action. Here that restart happens inside
`step`, for the ended environments alone, so that it never counts and never reaches a replay.
EnvPool's randomness can be neither read nor set: `snapshot` is None, and `reset` builds the environments anew.
"""

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import envpool
import numpy as np
from envpool.registration import registry
from gymnasium import spaces
from numpy.typing import NDArray

from .atari import ATARI_PROTOCOLS
from .backend import Actions, env_seeds, held, versions
from .interface import Env, EnvError, EnvSpec, Step

MODULES = {
    "atari": "envpool.atari",
    "mujoco": "envpool.mujoco.gym",
    "dmc": "envpool.mujoco.dmc",
    "metaworld": "envpool.mujoco.metaworld",
    "robotics": "envpool.mujoco.robotics",
    "myosuite": "envpool.mujoco.myosuite",
}


@functools.cache
def names(family: str) -> dict[str, str]:
    """What may follow "family/" in our ids -> EnvPool's own id."""
    tasks = {task: options for task, (module, _, options) in registry.specs.items() if module == MODULES[family]}
    match family:
        case "atari":
            return {task.removesuffix("-v5"): task for task in tasks}
        case "dmc":
            return {_dmc_name(task, options["task_name"]): task for task, options in tasks.items()}
        case "metaworld":
            return {options["task_name"].removesuffix("-v3"): task for task, options in tasks.items()}
        case "myosuite":
            return {task: task for task in tasks if "/" not in task}  # each is there twice, once as MyoSuite/NAME
        case _:
            return {task: task for task in tasks}


def _dmc_name(task: str, dmc_task: str) -> str:
    """dm_control's name: EnvPool's "BallInCupCatch-v1", which has the task "catch", is "ball_in_cup-catch"."""
    camel_task = "".join(word.capitalize() for word in dmc_task.split("_"))
    camel_domain = task.removesuffix("-v1").removesuffix(camel_task)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", camel_domain).split("_")
    return "_".join(word if word.isupper() else word.lower() for word in words) + f"-{dmc_task}"


def make(
    env_id: str, family: str, name: str, num_envs: int, seed: int, protocol: str | None, training: bool, render: bool
) -> Env:
    """One of `names(family)`; `protocol` and `training` concern Atari alone."""
    task = names(family)[name]
    if family == "atari":
        return _AtariEnv(env_id, task, num_envs, seed, protocol or "dopamine", training, render)
    # EnvPool hides the goal of Meta-World unless told otherwise, though it moves at every reset.
    settings = {"partially_observable": False} if family == "metaworld" else {}
    return _StateEnv(env_id, task, num_envs, seed, render, settings)


class _PoolEnv:
    """What the two environments below share: all but `reset` and `receive`."""

    spec: EnvSpec
    _actions: Actions
    _task: str  # EnvPool's id
    _options: dict[str, Any]  # EnvPool's settings
    _seed: int
    _render: bool
    _context: Any = None  # the graphics context that MuJoCo draws in
    _pool: Any = None

    def _build(self, seed: int | None) -> None:
        """New environments: the only way to start EnvPool's randomness anew."""
        seeds = env_seeds(self._seed if seed is None else seed, self.spec.num_envs)
        drawing = {"render_mode": "rgb_array"} if self._render else {}
        self._pool = envpool.make(
            self._task, env_type="gymnasium", num_envs=self.spec.num_envs, seed=seeds, **self._options, **drawing
        )

    def send(self, actions: NDArray[Any]) -> None:
        self._pool.send(self._actions(actions))

    def receive(self) -> Step:
        raise NotImplementedError

    def step(self, actions: NDArray[Any]) -> Step:
        self.send(actions)
        return self.receive()

    def render(self) -> NDArray[np.uint8]:
        if not self._render:
            raise EnvError(f"{self.spec.id}: made without render=True, so there is no picture")
        if self._context is not None:
            self._context.make_current()
        return np.array(self._pool.render()[0])

    def snapshot(self) -> None:
        return None

    def restore(self, snapshot: dict[str, NDArray[Any]]) -> NDArray[Any]:
        raise EnvError(f"{self.spec.id}: EnvPool's state cannot be captured, so it cannot be restored")

    def close(self) -> None:
        self._pool = None
        if self._context is not None:
            self._context.free()
            self._context = None


class _StateEnv(_PoolEnv):
    """Vector observations and continuous actions; observations in a dict (a goal among them) are concatenated in EnvPool's order."""

    def __init__(
        self, env_id: str, task: str, num_envs: int, seed: int, render: bool, settings: dict[str, Any]
    ) -> None:
        pool_spec = envpool.make_spec(task, **settings)
        self._limit = int(pool_spec.config.max_episode_steps)
        # EnvPool reports one `done` for both kinds of end. With its own limit out of reach, all its ends are terminal.
        self._options = {"max_episode_steps": self._limit + 1, **settings}
        self._task, self._seed, self._render = task, seed, render
        self._actions = Actions(env_id, pool_spec.action_space)
        self._space = space = pool_spec.observation_space
        self.spec = EnvSpec(
            id=env_id,
            num_envs=num_envs,
            observation_shape=(spaces.flatdim(space),),
            observation_dtype="float32",
            discrete=False,
            action_size=self._actions.size,
            action_low=self._actions.low,
            action_high=self._actions.high,
            max_episode_steps=self._limit,
            protocol={
                "backend": "envpool",
                "env": task,
                "sticky": 0.0,
                "frame_skip": getattr(pool_spec.config, "frame_skip", None),  # MyoSuite's depends on the task
                "max_episode_steps": self._limit,
                **settings,
                "versions": versions("envpool"),
            },
        )
        if render:
            if not _can_draw(task):
                packages = "libegl1 libgl1 libgl1-mesa-dri"
                raise EnvError(
                    f"{env_id}: no OpenGL to draw with; install the system packages {packages} (MUJOCO_GL=egl)"
                )
            self._context = _graphics_context()

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        self._build(seed)
        return self._flat(self._pool.reset()[0])

    def receive(self) -> Step:
        raw, reward, terminated, _, info = self._pool.recv()
        final_observation = self._flat(raw)
        truncated = ~terminated & (info["elapsed_step"] >= self._limit)
        ended = terminated | truncated
        observation = final_observation
        if ended.any():
            indices = np.flatnonzero(ended).astype(np.int32)
            observation = final_observation.copy()
            observation[indices] = self._flat(self._pool.reset(indices)[0])
        return Step(observation, reward, terminated, truncated, final_observation, ended)

    def _flat(self, observation: Any) -> NDArray[np.float32]:
        parts = [part.reshape(len(part), -1) for part in _arrays(self._space, observation)]
        whole: NDArray[Any] = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        return np.asarray(whole, np.float32)


def _arrays(space: spaces.Space[Any], observation: Any) -> Iterator[NDArray[Any]]:
    """What an observation holds, in the order of its space."""
    if isinstance(space, spaces.Dict):
        for key, inside in space.items():
            yield from _arrays(inside, observation[key])
    else:
        yield observation


class _AtariEnv(_PoolEnv):
    """One game under one of `ATARI_PROTOCOLS`.

    EnvPool's own stack keeps frames from before a lost life, so frames come singly and are stacked here.
    """

    def __init__(
        self, env_id: str, task: str, num_envs: int, seed: int, protocol: str, training: bool, render: bool
    ) -> None:
        settings = ATARI_PROTOCOLS[protocol]
        self._life_loss_ends_episode = settings.life_loss_ends_episode and training
        self._options = {
            "stack_num": 1,
            "frame_skip": settings.frame_skip,
            "repeat_action_probability": settings.sticky,
            "noop_max": settings.noop_max,
            "use_fire_reset": settings.fire_on_start,
            # Makes EnvPool press FIRE again after a lost life, which an evaluation needs as much: the agent never had to.
            "episodic_life": settings.life_loss_ends_episode and settings.fire_on_start,
            "max_episode_steps": settings.max_episode_steps,
            "reward_clip": False,
            "full_action_space": False,
        }
        self._task, self._seed, self._render = task, seed, render
        pool_spec = envpool.make_spec(task, **self._options)
        self._actions = Actions(env_id, pool_spec.action_space)
        self._stack_shape = (num_envs, settings.frame_stack, *pool_spec.observation_space.shape[1:])
        self.spec = EnvSpec(
            id=env_id,
            num_envs=num_envs,
            observation_shape=(*self._stack_shape[2:], settings.frame_stack),
            observation_dtype="uint8",
            discrete=True,
            action_size=self._actions.size,
            frame_stack=settings.frame_stack,
            reward_clip=settings.reward_clip,
            max_episode_steps=settings.max_episode_steps,
            protocol={
                "backend": "envpool",
                "env": task,
                "name": protocol,
                "training": training,
                **asdict(settings),
                "versions": versions("envpool"),
            },
        )

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        self._build(seed)
        frames, info = self._pool.reset()
        self._lives = info["lives"]
        self._stack = np.broadcast_to(frames, self._stack_shape)
        return np.moveaxis(self._stack, 1, -1)

    def receive(self) -> Step:
        frames, reward, done, timeout, info = self._pool.recv()
        restarting = np.flatnonzero(done | timeout).astype(np.int32)
        lives = info["lives"]
        game_over = info["terminated"].astype(np.bool_)
        timeout = timeout & ~game_over
        # Games show 0 lives for some frames before they end (Qbert), hence 0 < lives, as in CleanRL.
        life_lost = (lives > 0) & (lives < self._lives) & self._life_loss_ends_episode
        terminated = game_over | life_lost
        truncated = timeout & ~terminated
        ended = terminated | truncated

        stack = final_stack = self._pushed(frames)
        if restarting.size:
            # A step rather than `reset`, which would start the whole game anew after a lost life.
            frames = frames.copy()
            frames[restarting], *_, info = self._pool.step(np.zeros(restarting.size, np.int32), restarting)
            lives[restarting] = info["lives"]
            stack = self._pushed(frames)
            final_stack[~ended] = stack[~ended]
        if ended.any():
            stack = stack.copy()
            stack[ended] = frames[ended]  # one frame, broadcast along the stack

        self._stack, self._lives = held(stack), lives
        observation, final_observation = np.moveaxis(stack, 1, -1), np.moveaxis(final_stack, 1, -1)
        return Step(observation, reward, terminated, truncated, final_observation, game_over | timeout)

    def _pushed(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A new stack [N, K, H, W] with `frames` [N, 1, H, W] behind the last K - 1."""
        stack = np.empty(self._stack_shape, np.uint8)
        stack[:, :-1] = self._stack[:, 1:]
        stack[:, -1:] = frames
        return stack


# EnvPool's MuJoCo draws into whichever OpenGL context is current, and ends the process where there is none.
_PROBE = """
import sys, mujoco.egl, envpool
mujoco.egl.GLContext(64, 64).make_current()
pool = envpool.make(sys.argv[1], env_type="gymnasium", num_envs=1, render_mode="rgb_array")
pool.reset()
assert pool.render() is not None
"""


@functools.cache
def _can_draw(task: str) -> bool:
    return subprocess.run([sys.executable, "-c", _PROBE, task], capture_output=True, check=False).returncode == 0


def _graphics_context() -> Any:
    import mujoco.egl  # costs time and chooses PyOpenGL's platform, so only for those who draw

    return mujoco.egl.GLContext(64, 64)
