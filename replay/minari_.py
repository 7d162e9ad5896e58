"""Minari data sets (https://minari.farama.org) as replays, and replays as Minari data sets."""

import hashlib
import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, iterate

from .past import Description, Episode, PastReplay, PastReplayError, sha256
from .storage import Array, Storage


class MinariData:
    """The local data set `name`; PastReplayError if there is none or it cannot be read."""

    def __init__(self, name: str) -> None:
        self.name = name
        minari = _minari()
        if not (_root() / name / "data").is_dir():
            known = sorted(
                path.parents[1].relative_to(_root()).as_posix() for path in _root().rglob("data/metadata.json")
            )
            there = f"there are: {', '.join(known)}" if known else "there are none"
            raise PastReplayError(f"minari:{name}: no such data set in {_root()}; {there}")
        with _errors_of(name):
            self._dataset = minari.load_dataset(name)

    def __len__(self) -> int:
        """Agent steps."""
        return int(self._dataset.total_steps)

    @cached_property
    def digest(self) -> str:
        """Hash of all files; reads them once."""
        files = sorted(path for path in (_root() / self.name / "data").rglob("*") if path.is_file())
        return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()

    def differences(self, run: Description) -> list[str]:
        """A clause for each thing in which `run`, which would use these data, differs."""
        compared = {
            "observations are": (_observation(self._dataset.observation_space), _observation(observation_space(run))),
            "actions are": (_action(self._dataset.action_space), _action(action_space(run))),
        }
        return [f"{what} {there} there and {here} here" for what, (there, here) in compared.items() if there != here]

    def replay(self, run: Description) -> Storage:
        """All transitions as `run` would have stored them: n-step returns, rewards clipped, frames shared.

        Actions are brought from their bounds to [-1, 1]; what lies outside is clipped. An episode that did not terminate
        counts as truncated. The two must not differ.
        """
        layout = replace(run.layout, num_envs=1)
        with _errors_of(self.name):
            storage = Storage(len(self), **asdict(layout))
            for episode in self._dataset.iterate_episodes():
                observation = self._observations(episode.observations, len(episode) + 1).astype(
                    layout.observation_dtype
                )
                observation = observation.reshape(-1, *layout.observation_shape)
                reward = np.asarray(episode.rewards, np.float32)
                if run.reward_clip is not None:
                    reward = reward.clip(-run.reward_clip, run.reward_clip)
                _add_episode(storage, observation, self._actions(episode.actions), reward, episode.terminations)
        return storage

    def _observations(self, observations: Any, count: int) -> Array:
        """[T + 1, ...], flattened where the space is none of arrays."""
        space = self._dataset.observation_space
        if isinstance(space, spaces.Box):
            return np.asarray(observations)
        return np.stack([spaces.flatten(space, one) for one in iterate(batch_space(space, count), observations)])

    def _actions(self, actions: Array) -> Array:
        space = self._dataset.action_space
        if isinstance(space, spaces.Discrete):
            return (actions - space.start).astype(np.int32)
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        scaled = (2 * actions - (high + low)) / (high - low)
        clipped: Array = scaled.clip(-1, 1).astype(np.float32).reshape(len(actions), -1)
        return clipped


def export_minari(past: PastReplay, name: str, **metadata: Any) -> Path:
    """Write a saved replay of n_step 1 as the local data set `name`, an episode at a time; the result is its folder.

    Spaces are those that the agent saw: observations as stored, whole stacks of frames, float32 or uint8 (kept as they
    are, not as JPEG); actions in the environment's bounds. Rewards are those stored: float32, clipped where the run
    clipped them. An episode within which the run stopped is truncated there.
    metadata: algorithm_name, description ... as of `minari.create_dataset_from_buffers`.
    PastReplayError if the name is taken or malformed. The data set appears when it is complete.
    """
    minari = _minari()
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.dataset.minari_storage import MinariStorage

    try:
        parse_dataset_id(name)
    except (ValueError, TypeError):
        raise PastReplayError(f"{name!r} is no name for a Minari data set; one is written [FOLDER/]NAME-v0") from None
    if (_root() / name / "data").exists():  # the folder alone is what a kill may have left
        raise PastReplayError(f"minari:{name} exists already in {_root()}")
    run = past.description
    space = action_space(run)

    def buffer(episode: Episode) -> Any:
        last = np.arange(len(episode.reward)) == len(episode.reward) - 1
        action = episode.action.astype(space.dtype)
        if isinstance(space, spaces.Box):
            low, high = space.low.astype(np.float64), space.high.astype(np.float64)
            action = ((high + low + (high - low) * episode.action) / 2).astype(np.float32).clip(space.low, space.high)
        return EpisodeBuffer(
            observations=episode.observation,
            actions=action,
            rewards=episode.reward,
            terminations=last & episode.terminated,
            truncations=last & (not episode.terminated),
        )

    episodes = past.episodes()
    temporary = _root() / f".{name.replace('/', '_')}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = MinariStorage.new(temporary, observation_space(run), space, _env_spec(run.env), jpeg_encoding=False)
        storage.update_metadata({"dataset_id": name, "minari_version": minari.__version__, **metadata})
        storage.update_episodes(map(buffer, episodes))
        (_root() / name).mkdir(parents=True, exist_ok=True)
        temporary.rename(_root() / name / "data")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _root() / name


def observation_space(run: Description) -> spaces.Box:
    """As the agent sees it."""
    layout = run.layout
    low, high = (0, 255) if layout.observation_dtype == "uint8" else (-np.inf, np.inf)
    dtype: Any = np.dtype(layout.observation_dtype)
    return spaces.Box(low, high, layout.observation_shape, dtype)


def action_space(run: Description) -> spaces.Space[Any]:
    """As the agent sees it, but for the bounds, which are the environment's."""
    if run.discrete:
        return spaces.Discrete(run.action_size)
    return spaces.Box(np.array(run.action_low, np.float32), np.array(run.action_high, np.float32))


def _observation(space: spaces.Space[Any]) -> str:
    """What an agent sees of it: uint8 for images, else float32; flattened unless it is of arrays."""
    if not isinstance(space, spaces.Box):
        if not space.is_np_flattenable:
            return str(space)
        space = spaces.flatten_space(space)
        assert isinstance(space, spaces.Box)
    image = space.dtype == np.uint8 and len(space.shape) in (2, 3)
    shape = (*space.shape, 1) if image and len(space.shape) == 2 else space.shape
    return f"{'uint8' if image else 'float32'} {shape}"


def _action(space: spaces.Space[Any]) -> str:
    if isinstance(space, spaces.Discrete):
        return f"{space.n} choices"
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating) and space.is_bounded():
        low, high = (bound.astype(np.float32).ravel().tolist() for bound in (space.low, space.high))
        return f"vectors from {low} to {high}"
    return str(space)


def _add_episode(storage: Storage, observation: Array, action: Array, reward: Array, terminated: Array) -> None:
    layout = storage.layout
    if layout.frame_stack > 1:
        channels = layout.observation_shape[-1] // layout.frame_stack
        if (observation[1:, ..., :-channels] != observation[:-1, ..., channels:]).any():
            raise ValueError(f"its observations are not stacks of the last {layout.frame_stack} frames")
    never = np.zeros(1, np.bool_)
    storage.begin(observation[:1])
    for t in range(len(reward)):
        now, reached = slice(t, t + 1), observation[t + 1 : t + 2]
        storage.add(action[now], reward[now], terminated[now], never, reached, reached)
    storage.end()


def _root() -> Path:
    """Where Minari looks; asked of Minari itself, the folder would be made."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def _minari() -> Any:
    try:
        importlib.import_module("h5py")
        return importlib.import_module("minari")
    except ImportError as error:
        raise PastReplayError(
            f"Minari data sets need one more package: pip install 'resprout[minari]' ({error})"
        ) from None


def _env_spec(env: str) -> Any:
    """None where Gymnasium knows no such environment."""
    family, _, name = env.partition("/")
    try:
        return gymnasium.spec(name) if family == "gym" else None
    except gymnasium.error.Error:
        return None


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of Minari, of HDF5 and of what the data hold
        raise PastReplayError(f"minari:{name} cannot be read: {error or type(error).__name__}") from error
