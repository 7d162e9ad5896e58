"""Playing without learning: the return of the policy without exploration (`Agent.exploit`), and its video."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..agents.learner import PyTree
from ..envs import Env


class Evaluation(NamedTuple):
    returns: list[float]  # one per episode, unclipped
    lengths: list[int]  # agent steps

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))


Exploit = Callable[[PyTree, Any, jax.Array, Any], jax.Array]


def exploit_function(exploit: Callable[[PyTree, Any, jax.Array], jax.Array]) -> Exploit:
    """An agent's `exploit` jitted over (state, observation, stream, counter)."""

    def act(state: PyTree, observation: jax.Array, stream: jax.Array, counter: jax.Array) -> jax.Array:
        return exploit(state, observation, jax.random.fold_in(stream, counter))

    return jax.jit(act)


def evaluate(
    exploit: Exploit,
    state: PyTree,
    env: Env,
    episodes: int,
    seed: int,
    on_step: Callable[[Env], None] = lambda env: None,
) -> Evaluation:
    """Play `episodes` whole games from `seed` on all environments of `env`.

    Each environment has its share of the episodes fixed beforehand: counting whichever end first would favour short
    ones. `on_step` is called at the first observation and after each step.
    """
    spec = env.spec
    share = np.full(spec.num_envs, episodes // spec.num_envs)
    share[: episodes % spec.num_envs] += 1
    running_return, running_length = np.zeros(spec.num_envs), np.zeros(spec.num_envs, np.int64)
    returns: list[float] = []
    lengths: list[int] = []
    observation, stream, counter = env.reset(seed), jax.random.key(seed), 0
    on_step(env)
    while share.any():
        step = env.step(np.asarray(exploit(state, observation, stream, np.int32(counter))))
        observation, counter = step.observation, counter + 1
        running_return += step.reward
        running_length += 1
        for index in np.flatnonzero(step.episode_over):
            if share[index]:
                returns.append(float(running_return[index]))
                lengths.append(int(running_length[index]))
                share[index] -= 1
            running_return[index] = running_length[index] = 0
        on_step(env)
    return Evaluation(returns, lengths)


class Video:
    """Frames of the first environment as an H.264 mp4 that players and browsers open."""

    def __init__(self, path: Path, frames_per_second: int = 30) -> None:
        self.path, self.frames_per_second = path, frames_per_second
        self.container: Any = None
        self.stream: Any = None

    def add(self, env: Env) -> None:
        """Film what `env` shows now."""
        import av

        picture = env.render()
        height, width = (size - size % 2 for size in picture.shape[:2])  # yuv420p halves both
        if self.container is None:
            self.container = av.open(str(self.path), "w")
            self.stream = self.container.add_stream("libx264", rate=self.frames_per_second)
            self.stream.height, self.stream.width, self.stream.pix_fmt = height, width, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
        self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        """Finish the file; without a frame there is none."""
        if self.container is not None:
            self.container.mux(self.stream.encode())
            self.container.close()
