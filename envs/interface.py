"""The one interface behind which every environment stands."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class EnvError(ValueError):
    """An environment that cannot be given, in one line that says what can."""


@dataclass(frozen=True)
class EnvSpec:
    """What a vector of environments looks like to an agent and to the replay."""

    id: str  # as asked for, e.g. "atari/Breakout"
    num_envs: int
    observation_shape: tuple[int, ...]  # of one environment; images are [H, W, C], stacked frames on C, oldest first
    observation_dtype: str  # "uint8" or "float32"
    discrete: bool
    action_size: int  # number of actions if discrete, else the action's dimension
    action_low: tuple[float, ...] = ()  # bounds of the underlying space; agents always act in [-1, 1]
    action_high: tuple[float, ...] = ()
    frame_stack: int = 1  # frames along the last axis of an observation; after a reset all are the first frame
    reward_clip: float | None = None  # what a learner should clip rewards to; `step` itself never clips
    max_episode_steps: int | None = None  # agent steps until truncation
    protocol: dict[str, Any] = field(default_factory=dict)  # resolved settings and package versions, for the record


class Step(NamedTuple):
    """What one call of `step` returns; N environments; arrays are the caller's to keep, observations not to change."""

    observation: NDArray[Any]  # [N, ...] to act on next: the first of a new episode where one ended
    reward: NDArray[np.float32]  # [N], unclipped
    terminated: NDArray[np.bool_]  # [N]: nothing comes after (a lost life too, under a protocol that says so)
    truncated: NDArray[np.bool_]  # [N]: cut short; never true together with `terminated`
    final_observation: NDArray[Any]  # [N, ...]: what this step led to; equals `observation` but where an episode ended
    episode_over: NDArray[np.bool_]  # [N]: a whole game ended, which is when a return is reported; a lost life is not


class Env(Protocol):
    """N environments stepped together; episodes restart by themselves inside `step`."""

    @property
    def spec(self) -> EnvSpec: ...

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        """First observations [N, ...]. All randomness starts anew from `seed` (None: the one given to `make`)."""
        ...

    def step(self, actions: NDArray[Any]) -> Step:
        """Take `actions`: [N] int32 if discrete, else [N, A] float32 in [-1, 1] (clipped, then scaled to the bounds)."""
        ...

    def render(self) -> NDArray[np.uint8]:
        """Picture of the first environment, [H, W, 3]; EnvError in one line where none can be drawn."""
        ...

    def snapshot(self) -> dict[str, NDArray[Any]] | None:
        """Complete state as plain arrays, so that `restore` goes on bit for bit; None where it cannot be captured."""
        ...

    def restore(self, snapshot: dict[str, NDArray[Any]]) -> NDArray[Any]:
        """Return to a snapshot; the result is the current observations [N, ...]."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class SplitEnv(Env, Protocol):
    """An `Env` whose `step` comes in two halves, and that steps by itself in between."""

    def send(self, actions: NDArray[Any]) -> None: ...

    def receive(self) -> Step:
        """Once for every `send`."""
        ...


def step_together(envs: Sequence[Env], actions: NDArray[Any]) -> list[Step]:
    """What `step` of each of `envs` gives for its own of `actions` [envs, N, ...]; those that can step at the same time do."""
    for env, own in zip(envs, actions, strict=True):
        if isinstance(env, SplitEnv):
            env.send(own)
    return [
        env.receive() if isinstance(env, SplitEnv) else env.step(own) for env, own in zip(envs, actions, strict=True)
    ]
