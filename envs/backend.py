"""What every backend needs: seeds of single environments, the conversion of actions, versions for the record."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from gymnasium import Space, spaces
from numpy.typing import NDArray

from .interface import EnvError


def env_seeds(seed: int, num_envs: int) -> list[int]:
    """One seed in [0, 2^31) for each environment, from `seed` alone; neighbouring `seed`s share none."""
    return [int(state >> 1) for state in np.random.SeedSequence(seed).generate_state(num_envs)]


def versions(*packages: str) -> dict[str, str]:
    """Versions of those of `packages` that are installed distributions."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def held(observation: NDArray[Any]) -> NDArray[Any]:
    """An observation that goes to the caller and that the environment itself reads again: writing to it fails."""
    observation.flags.writeable = False
    return observation


class Actions:
    """An environment's action space as agents see it: indices from 0, or vectors in [-1, 1]."""

    def __init__(self, env_id: str, space: Space[Any]) -> None:
        self.low: tuple[float, ...] = ()
        self.high: tuple[float, ...] = ()
        self._dtype = space.dtype
        match space:
            case spaces.Discrete():
                self.discrete = True
                self.size = int(space.n)
                self._start = int(space.start)
            case spaces.Box() if np.issubdtype(space.dtype, np.floating):
                if not space.is_bounded():
                    raise EnvError(f"{env_id}: its actions have no finite bounds, so [-1, 1] cannot be scaled to them")
                low, high = space.low.astype(np.float64), space.high.astype(np.float64)
                self.discrete = False
                self.size = low.size
                self.low, self.high = tuple(low.ravel().tolist()), tuple(high.ravel().tolist())
                self._shape = space.shape
                self._bounds = low, high
                self._center: NDArray[Any] = (high + low) / 2
                self._half_range: NDArray[Any] = (high - low) / 2
            case _:
                raise EnvError(f"{env_id}: its action space is {space}; only Discrete and float Box can be acted in")

    def __call__(self, actions: NDArray[Any]) -> NDArray[Any]:
        """The environment's own actions [N, ...] for an agent's: [N] indices, or [N, A], clipped and scaled."""
        actions = np.asarray(actions)
        if self.discrete:
            if actions.ndim != 1 or actions.min() < 0 or actions.max() >= self.size:
                raise ValueError(f"actions must be indices [N] below {self.size}, not {actions!r}")
            return (actions + self._start).astype(self._dtype)
        if actions.shape[1:] != (self.size,):
            raise ValueError(f"actions must have shape [N, {self.size}], not {list(actions.shape)}")
        scaled = self._center + self._half_range * actions.reshape(-1, *self._shape)
        clipped: NDArray[Any] = np.minimum(np.maximum(scaled, self._bounds[0]), self._bounds[1])
        return clipped.astype(self._dtype)
