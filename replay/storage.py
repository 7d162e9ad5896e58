"""Where transitions live on the host: rings of NumPy columns, image frames stored once, n-step returns on the way in."""

import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .frames import Frames, HostFrames

Array = NDArray[Any]
Columns = dict[str, Array]

FREE = np.iinfo(np.int64).min  # stamp of a frame that is not in use
HELD = np.iinfo(np.int64).max  # stamp of a frame that no written transition refers to yet
EXPECTED_EPISODE_LENGTH = (
    100  # agent steps; for the expected memory only: each episode costs one frame more than its steps
)


class Memory(NamedTuple):
    """Bytes resident once the ring is full."""

    expected: int  # with episodes of 100 agent steps or longer
    worst_case: int  # with episodes of one agent step, each of which needs two frames


@dataclass(frozen=True)
class Layout:
    """What a transition is made of, and how transitions come; the options that `Storage` and `memory` share.

    observation_shape, observation_dtype: of one environment. With `frame_stack` S > 1 an observation is S frames along
        the last axis, oldest first; a frame is stored once and transitions refer to it, so that every written slot is
        a whole transition.
    n_step: a transition spans m = n_step agent steps, or fewer where its episode ended. Its reward is the sum of
        gamma^k r_k for k < m (accumulated in float64, stored as float32) and its discount gamma^m, or 0 if the episode
        terminated. Each agent step begins exactly one transition. (Sutton & Barto, 2018, eq. 7.1.)

    ValueError for sizes below 1 and for a last axis that `frame_stack` does not divide.
    """

    observation_shape: tuple[int, ...]
    observation_dtype: DTypeLike  # as its name, once made
    _: KW_ONLY
    frame_stack: int = 1
    action_shape: tuple[int, ...] = ()
    action_dtype: DTypeLike = "int32"
    num_envs: int = 1
    n_step: int = 1
    gamma: float = 0.99

    def __post_init__(self) -> None:
        for name in ("frame_stack", "num_envs", "n_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"replay: {name} must be at least 1, not {getattr(self, name)}")
        for name in ("observation_dtype", "action_dtype"):
            object.__setattr__(self, name, np.dtype(getattr(self, name)).name)
        shape, stack = self.observation_shape, self.frame_stack
        if stack > 1 and (not shape or shape[-1] % stack):
            raise ValueError(f"replay: {stack} frames do not divide the last axis of observations {shape}")

    @property
    def columns(self) -> dict[str, np.dtype[Any]]:
        """Of a transition, by name; `references` stand for observations where frames are shared."""
        columns = {
            "action": np.dtype((self.action_dtype, self.action_shape)),
            "reward": np.dtype(np.float32),
            "discount": np.dtype(np.float32),
        }
        if self.frame_stack > 1:
            # The first frame_stack references are the observation, the last the next; one step apart they overlap.
            references = self.frame_stack + 1 if self.n_step == 1 else 2 * self.frame_stack
            return {"references": np.dtype((np.int32, (references,))), **columns}
        observation = np.dtype((self.observation_dtype, self.observation_shape))
        return {"observation": observation, "next_observation": observation, **columns}

    @property
    def frame(self) -> np.dtype[Any] | None:
        """None where observations are stored as they are."""
        if self.frame_stack == 1:
            return None
        *height_and_width, channels = self.observation_shape
        return np.dtype((self.observation_dtype, (*height_and_width, channels // self.frame_stack)))

    def frames(self, capacity: int) -> int:
        """Most frames that can be in use at once."""
        if self.frame_stack == 1:
            return 0
        # Two frames for each transition, written or pending, and what the running episodes' stacks reach back to.
        return 2 * (capacity + self.num_envs * self.n_step) + self.num_envs * (self.frame_stack + 2)

    def check_capacity(self, capacity: int) -> None:
        # Between two writes that refer to one frame lie fewer writes than this, so a frame still needed is never freed.
        least = self.num_envs * (2 * self.n_step - 1)
        if capacity < least:
            raise ValueError(f"replay: capacity must be at least num_envs * (2 * n_step - 1) = {least}, not {capacity}")


def memory(
    capacity: int,
    observation_shape: tuple[int, ...],
    observation_dtype: DTypeLike,
    *,
    count_draws: bool = False,
    frames: bool = True,
    **options: Any,
) -> Memory:
    """What a `Storage` built with the same arguments will occupy; allocates nothing. ValueError as for `Storage`.

    frames: whether to count the frames themselves, too, where they are shared.
    """
    layout = Layout(observation_shape, observation_dtype, **options)
    layout.check_capacity(capacity)
    row = sum(column.itemsize for column in layout.columns.values()) + np.dtype(np.bool_).itemsize  # begins
    rings = capacity * (row + count_draws * np.dtype(np.int32).itemsize)
    if layout.frame is None:
        return Memory(rings, rings)
    places = layout.frames(capacity)
    fixed = rings + places * np.dtype(np.int64).itemsize  # a stamp for each frame
    expected_places = places - capacity + capacity // EXPECTED_EPISODE_LENGTH
    size = layout.frame.itemsize if frames else 0
    return Memory(fixed + expected_places * size, fixed + places * size)


def available_memory() -> int:
    """Bytes that can be allocated now without swapping, within the limit of the control group if there is one.

    Where the system does not say what is available (not Linux), all of the physical memory.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup")
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            available = min(available, int((group / limit).read_text()) - int((group / usage).read_text()))
        except (OSError, ValueError):  # no such file, or the limit is "max"
            continue
    return max(available, 0)


class _Windows:
    """The n-step windows [N, n] not yet complete: window j of an environment began j + 1 agent steps ago."""

    def __init__(self, num_envs: int, n_step: int, observation: np.dtype[Any], action: np.dtype[Any], gamma: float):
        self.age = np.arange(n_step)
        self.discount = gamma ** np.arange(n_step + 1, dtype=np.float64)
        self.open = np.zeros(num_envs, np.int64)  # windows j < open are in use
        self.observation = np.zeros((num_envs, n_step), observation)
        self.action = np.zeros((num_envs, n_step), action)
        self.reward = np.zeros((num_envs, n_step), np.float64)  # discounted sum so far

    @property
    def state(self) -> Columns:
        return {"open": self.open, "observation": self.observation, "action": self.action, "reward": self.reward}

    def step(self, observation: Array, action: Array, reward: Array, ending: NDArray[np.bool_]) -> "_Complete":
        """Begin a window in every environment; what is complete with this step."""
        if len(self.age) == 1:  # nothing ever waits
            return _Complete(np.arange(len(ending)), np.ones(len(ending), np.int64), observation, action, reward)
        for values in (self.observation, self.action, self.reward):
            values[:, 1:] = values[:, :-1]
        self.observation[:, 0] = observation
        self.action[:, 0] = action
        self.reward[:, 0] = 0.0
        self.reward += self.discount[:-1] * reward[:, None]
        self.open += 1
        return self.flush(ending)

    def flush(self, ending: NDArray[np.bool_]) -> "_Complete":
        """The windows that are full and all those of `ending` environments: by environment, oldest first."""
        oldest_first = self.age[::-1]
        complete = (oldest_first < self.open[:, None]) & (ending[:, None] | (oldest_first == self.age[-1]))
        env, position = complete.nonzero()
        age = oldest_first[position]
        self.open[ending] = 0
        np.minimum(self.open, self.age[-1], out=self.open)
        return _Complete(env, age + 1, self.observation[env, age], self.action[env, age], self.reward[env, age])


class _Complete(NamedTuple):
    """Windows to be written; M of them."""

    env: NDArray[np.int64]
    length: NDArray[np.int64]  # agent steps
    observation: Array  # [M, ...] in stored form
    action: Array
    reward: Array


class _Draws:
    """How often each slot was drawn in its present life, and how often in the lives that are over."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.of_slot = np.zeros(capacity, np.int32)
        self.finished = np.zeros(0, np.int64)  # lives by number of draws
        self.first = np.iinfo(np.int64).max  # number of the first transition whose life is counted

    def count(self, slots: NDArray[np.intp], written: int) -> None:
        self.first = min(self.first, max(written, self.capacity))
        np.add.at(self.of_slot, slots, 1)

    def overwrite(self, where: Any, numbers: NDArray[np.int64]) -> None:
        """Transitions `numbers` are being written to the slots `where`."""
        over = np.bincount(self.of_slot[where][numbers - self.capacity >= self.first], minlength=len(self.finished))
        over[: len(self.finished)] += self.finished
        self.finished = over
        self.of_slot[where] = 0

    @property
    def state(self) -> Columns:
        return {"of_slot": self.of_slot.copy(), "finished": self.finished, "first": np.array(self.first)}

    def restore(self, state: Columns) -> None:
        self.of_slot[:] = state["of_slot"]
        self.finished, self.first = state["finished"], int(state["first"])


class Storage:
    """The last `capacity` transitions of `num_envs` environments; transition number w is in slot w % capacity.

    options: the fields of `Layout` from `frame_stack` on.
    count_draws: count how often `gather` is asked for each transition, for `lifetime_draws`.
    frames: what keeps the frames where they are shared, with as many places as `Layout.frames` says for the most transitions
        that will be written; the host does when not given.

    ValueError as for `Layout`, and for a capacity below num_envs * (2 * n_step - 1).
    """

    def __init__(
        self,
        capacity: int,
        observation_shape: tuple[int, ...],
        observation_dtype: DTypeLike,
        *,
        count_draws: bool = False,
        frames: Frames | None = None,
        **options: Any,
    ) -> None:
        self.layout = layout = Layout(observation_shape, observation_dtype, **options)
        layout.check_capacity(capacity)
        self.capacity = capacity
        self.written = 0  # transitions ever written
        self._oldest = 0  # the first transition this ring ever held
        self._columns = {name: np.zeros(capacity, dtype) for name, dtype in layout.columns.items()}
        dtypes = {"observation": np.dtype(layout.observation_dtype), "action": np.dtype(layout.action_dtype)}
        self._whole = {name: dtype for name, dtype in dtypes.items() if dtype.kind in "iub"}  # no place for fractions
        self._begins = np.zeros(capacity, np.bool_)  # whether the transition is the first of an episode
        self._draws = _Draws(capacity) if count_draws else None
        self._stack = layout.frame_stack
        self._channels = 0 if layout.frame is None else layout.frame.shape[-1]
        # Zeros that were never touched cost no memory: resident are the frames that were in use at once.
        self._pool = frames
        if layout.frame is not None and frames is None:
            self._pool = HostFrames(layout.frames(capacity), layout.frame)
        # Per frame: number of the last transition written that refers to it; HELD before the first; FREE.
        self._stamp = np.full(0 if self._pool is None else len(self._pool), FREE)
        self._free: list[int] = []  # freed frames, reused last first, before any frame from `_top` on
        self._top = 0

        # Observations below are in stored form: references [S] where frames are shared, else the observation itself.
        observation = np.dtype((np.int32, (self._stack,))) if layout.frame else layout.columns["observation"]
        self._running = False
        self._current = np.zeros(layout.num_envs, observation)
        self._length = np.zeros(layout.num_envs, np.int64)  # agent steps of the running episodes
        self._windows = _Windows(layout.num_envs, layout.n_step, observation, layout.columns["action"], layout.gamma)

    def __len__(self) -> int:
        return self.written - self.first

    @property
    def frames_in_use(self) -> int:
        """Distinct frames that written transitions and running episodes refer to; 0 where none are shared."""
        return self._top - len(self._free)

    @property
    def lifetime_draws(self) -> NDArray[np.int64]:
        """h[k]: how many transitions were drawn k times between being written and being overwritten.

        Counted are lives in the steady state: of transitions written after the first draw and into a full ring, and
        overwritten by now. ValueError without `count_draws`.
        """
        if self._draws is None:
            raise ValueError("replay: built without count_draws")
        return self._draws.finished.copy()

    @property
    def first(self) -> int:
        """Number of the oldest transition still here."""
        return max(self._oldest, self.written - self.capacity)

    def begin(self, observation: Array) -> None:
        """Start an episode in every environment from `observation` [N, ...]; ValueError while episodes are running."""
        if self._running:
            raise ValueError("replay: begin() while episodes are running; end() comes first")
        self._check("observation", observation)
        self._current[:] = self._started(observation)
        self._running = True

    def add(
        self,
        action: ArrayLike,
        reward: ArrayLike,
        terminated: ArrayLike,
        truncated: ArrayLike,
        final_observation: Array,
        observation: Array,
    ) -> NDArray[np.int32]:
        """One agent step of the N environments, as `Step` of envs gives it; rewards are stored as they are given.

        Result: [N * n_step] int32, the slots of the transitions that became complete, in the order written (by
        environment, then by age), then -1. ValueError before `begin`, and for fractions where whole numbers are stored.
        """
        if not self._running:
            raise ValueError("replay: add() before begin()")
        terminated = np.asarray(terminated, np.bool_)
        ended = terminated | np.asarray(truncated, np.bool_)
        action = np.asarray(action)
        self._check("action", action)
        self._check("observation", final_observation)
        reached = final_observation if self._pool is None else self._extended(final_observation)
        self._length += 1
        complete = self._windows.step(self._current, action, np.asarray(reward), ended)
        slots = self._write(complete, terminated, reached)
        self._current[:] = reached
        if ended.any():
            self._current[ended] = self._started(observation[ended])
            self._length[ended] = 0
        return slots

    def _check(self, name: str, values: ArrayLike) -> None:
        """ValueError where storing would cut off fractions."""
        if name in self._whole and (given := np.asarray(values).dtype).kind == "f":
            kept = self._whole[name]
            raise ValueError(f"replay: {name}s are {given} and would be stored as {kept}: give {name}_dtype")

    def end(self) -> NDArray[np.int32]:
        """Truncate every running episode where it is; `begin` follows. Result as of `add`."""
        if not self._running:
            raise ValueError("replay: end() before begin()")
        everywhere = np.ones(len(self._current), np.bool_)
        slots = self._write(self._windows.flush(everywhere), ~everywhere, self._current)
        if self._pool is not None:
            self._release(self._current[self._stamp[self._current] == HELD])
        self._length[:] = 0
        self._running = False
        return slots

    def gather(self, slots: ArrayLike) -> Columns:
        """The transitions in `slots` [B] as fresh arrays, for `decode` to finish on the device.

        action [B, ...]; reward, discount [B] float32; and either observation, next_observation [B, ...] or, where
        frames are shared, frames [B, L, ...]: the first S are the observation, the last S the next observation (with
        n_step 1 they overlap, L = S + 1; otherwise L = 2 S). Frames that are kept on the device stay there. Slots must
        have been written.
        """
        slots = np.asarray(slots, np.intp)
        if self._draws is not None:
            self._draws.count(slots, self.written)
        return self.look(slots)

    def look(self, slots: NDArray[Any]) -> Columns:
        """As `gather`, for those who only look: `count_draws` does not count these."""
        columns = {name: column.take(slots, axis=0) for name, column in self._columns.items()}
        if self._pool is not None:
            columns["frames"] = self._pool.take(columns.pop("references"))
        return columns

    def draw(self, size: int, generator: np.random.Generator) -> Columns:
        """`size` transitions, uniformly and with replacement, as `gather` gives them; `count_draws` does not count these.

        For those who only look: no sampler knows of it. ValueError if nothing is written.
        """
        if not len(self):
            raise ValueError("replay: nothing is written yet")
        return self.look(generator.integers(self.first, self.written, size) % self.capacity)

    def export(self, start: int, stop: int) -> Columns:
        """Transitions number start .. stop - 1 with the frames they refer to, as plain arrays for `load`.

        ValueError unless all of them are in the ring. Peak memory is that of the result: export a large ring in parts.
        """
        if not self.first <= start <= stop <= self.written:
            raise ValueError(f"replay: holds transitions {self.first} to {self.written}, not {start} to {stop}")
        slots = np.arange(start, stop) % self.capacity
        segment = {name: column.take(slots, axis=0) for name, column in self._rings.items()}
        segment["start"] = np.array(start)
        if self._pool is not None:
            segment |= self._frames(segment["references"])
        return segment

    def load(self, segment: Columns) -> None:
        """Write the transitions of `export` under their old numbers; `restore_pending` or `begin` follows the last one.

        In the order exported, into a storage built with the same arguments. A segment that starts later than the last
        one stopped forgets all before it. ValueError if it starts earlier, does not fit, or episodes are running.
        """
        start = int(segment["start"])
        if self._running or start < self.written:
            raise ValueError(f"replay: transition {self.written} is next, with no episode running, not {start}")
        for name, column in self._rings.items():
            saved = segment.get(name)
            if saved is None or saved.shape[1:] != column.shape[1:] or saved.dtype != column.dtype:
                raise ValueError(f"replay: the saved {name} does not fit this replay")
        if start > self.written:
            self._oldest = start
        numbers = np.arange(start, start + len(segment["reward"]))
        for name, column in self._rings.items():
            column[numbers % self.capacity] = segment[name]
        self.written = start + len(numbers)
        if self._pool is not None:
            self._restore_frames(segment)
            self._stamp[segment["references"]] = numbers[:, None]
            self._find_free()

    def pending(self) -> Columns:
        """What `export` leaves out, as plain arrays: the running episodes, unfinished windows and counts of draws."""
        pending = {
            "first": np.array(self.first),
            "written": np.array(self.written),
            "running": np.array(self._running),
        }
        pending["current"] = self._current.copy()
        pending["length"] = self._length.copy()
        pending |= {f"window_{name}": values.copy() for name, values in self._windows.state.items()}
        if self._draws is not None:
            pending |= {f"draws_{name}": values for name, values in self._draws.state.items()}
        if self._pool is not None:
            pending |= self._frames(self._references_held())
        return pending

    def restore_pending(self, pending: Columns) -> None:
        """Go on exactly where `pending` was taken; ValueError unless what was written before it has been loaded."""
        here, there = (self.first, self.written), (int(pending["first"]), int(pending["written"]))
        if self._running or here != there:
            raise ValueError(f"replay: needs transitions {there[0]} to {there[1]} loaded, not {here[0]} to {here[1]}")
        self._running = bool(pending["running"])
        self._current[:] = pending["current"]
        self._length[:] = pending["length"]
        for name, values in self._windows.state.items():
            values[:] = pending[f"window_{name}"]
        if self._draws is not None:
            self._draws.restore({name: pending[f"draws_{name}"] for name in self._draws.state})
        if self._pool is not None:
            self._restore_frames(pending)
            held = self._references_held()
            self._stamp[held] = np.where(self._in_use(self._stamp[held]), self._stamp[held], HELD)
            self._find_free()

    @property
    def _rings(self) -> Columns:
        return {**self._columns, "begins": self._begins}

    def _write(self, complete: _Complete, terminated: NDArray[np.bool_], reached: Array) -> NDArray[np.int32]:
        """Write windows that end with the observation `reached` of their environment."""
        env, count = complete.env, len(complete.env)
        numbers = np.arange(self.written, self.written + count)
        slots = np.full(self._windows.reward.size, -1, np.int32)
        slots[:count] = numbers % self.capacity
        first = self.written % self.capacity
        # a slice is written faster than an array of slots, but cannot go round the end of the ring
        where = slice(first, first + count) if first + count <= self.capacity else slots[:count]
        columns = self._columns
        if self._pool is None:
            columns["observation"][where] = complete.observation
            columns["next_observation"][where] = reached[env]
        else:
            overwritten = columns["references"][where].copy()
            columns["references"][where, : self._stack] = complete.observation
            columns["references"][where, -self._stack :] = reached[env]
            self._stamp[columns["references"][where]] = numbers[:, None]
            # frames that the transitions now overwritten were the last to refer to
            self._release(overwritten[self._stamp[overwritten] == (numbers - self.capacity)[:, None]])
        columns["action"][where] = complete.action
        columns["reward"][where] = complete.reward
        columns["discount"][where] = self._windows.discount[complete.length] * ~terminated[env]
        self._begins[where] = complete.length == self._length[env]
        if self._draws is not None:
            self._draws.overwrite(where, numbers)
        self.written += count
        return slots

    def _new_frames(self, frames: Array) -> NDArray[np.int32]:
        """Store M frames; their references [M]."""
        assert self._pool is not None
        count = len(frames)
        missing = count - len(self._free)
        if missing > 0:
            if self._top + missing > len(self._pool):
                raise ValueError("replay: too many frames; an episode must start with frame_stack copies of its first")
            self._free[:0] = range(self._top + missing - 1, self._top - 1, -1)
            self._top += missing
        references = np.array(self._free[-count:], np.int32)
        del self._free[-count:]
        self._pool.put(references, frames)
        self._stamp[references] = HELD
        return references

    def _release(self, references: NDArray[np.int32]) -> None:
        self._stamp[references] = FREE
        self._free.extend(dict.fromkeys(references.tolist()))

    def _extended(self, observation: Array) -> NDArray[np.int32]:
        """The current stacks moved on by the newest frame of `observation`; references [N, S]."""
        stacks = np.empty_like(self._current)
        stacks[:, :-1] = self._current[:, 1:]
        stacks[:, -1] = self._new_frames(observation[..., -self._channels :])
        return stacks

    def _started(self, observation: Array) -> Array:
        """Whole new observations [M, ...] in stored form; equal neighbours in a stack are one frame."""
        if self._pool is None:
            return observation
        frames = np.stack(np.split(observation, self._stack, axis=-1), axis=1)
        new = np.ones(frames.shape[:2], np.bool_)
        new[:, 1:] = (frames[:, 1:] != frames[:, :-1]).any(axis=tuple(range(2, frames.ndim)))
        references: Array = self._new_frames(frames[new])[new.cumsum() - 1]
        return references.reshape(new.shape)

    def _references_held(self) -> NDArray[np.int32]:
        """Every reference of the running episodes: their stacks and the unfinished windows."""
        if not self._running:
            return np.zeros(0, np.int32)
        in_use = self._windows.age < self._windows.open[:, None]
        return np.concatenate([self._current.ravel(), self._windows.observation[in_use].ravel()])

    def _frames(self, references: NDArray[np.int32]) -> Columns:
        assert self._pool is not None
        frame_ids = np.unique(references)
        return {"frame_ids": frame_ids, "frames": self._pool.read(frame_ids)}

    def _restore_frames(self, saved: Columns) -> None:
        # A frame goes back to its old place. If an older transition refers to another frame there, that transition was
        # overwritten before this frame was stored, and so it will be again before the end of this segment.
        assert self._pool is not None
        self._pool.put(saved["frame_ids"], saved["frames"])

    def _in_use(self, stamp: NDArray[np.int64]) -> NDArray[np.bool_]:
        return stamp >= self.first

    def _find_free(self) -> None:
        in_use = self._in_use(self._stamp)
        self._stamp[~in_use] = FREE
        used = in_use.nonzero()[0]
        self._top = int(used[-1]) + 1 if len(used) else 0
        self._free = (~in_use[: self._top]).nonzero()[0][::-1].tolist()


def decode(columns: dict[str, Any], frame_stack: int) -> dict[str, Any]:
    """What `gather` gave, as an agent's batch has it; pure, for arrays of NumPy and, under jit too, of JAX.

    Splits frames [B, L, ..., C] into observation and next_observation [B, ..., S * C], oldest frame first along the
    last axis. Without frames (frame_stack 1) the identity.
    """
    if frame_stack == 1:
        return columns
    columns = dict(columns)
    frames = columns.pop("frames")
    channels = frame_stack * frames.shape[-1]
    *others, last = range(2, frames.ndim)
    stacked = frames.transpose(0, *others, 1, last)
    stacked = stacked.reshape(*stacked.shape[:-2], -1)
    return {**columns, "observation": stacked[..., :channels], "next_observation": stacked[..., -channels:]}
