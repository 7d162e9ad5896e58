"""Where transitions live on the device: the ring of `Storage` as arrays and pure functions, for loops that are traced whole."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike, NDArray

from .storage import Columns, Layout, Storage


class RingState(struct.PyTreeNode):
    """`capacity` slots and what is on its way there; N environments, n-step windows [N, n] as in `Storage`."""

    columns: dict[str, jax.Array]  # of `Layout.columns` and "begins", [capacity, ...]
    written: jax.Array  # () int32: transitions ever written
    current: jax.Array  # [N, ...]: the observations that the next actions answer to
    length: jax.Array  # [N] int32: agent steps of the running episodes
    open: jax.Array  # [N] int32: windows j < open are in use
    observation: jax.Array  # [N, n, ...]
    action: jax.Array  # [N, n, ...]
    reward: jax.Array  # [N, n] float32: discounted sum so far


def empty_ring(layout: Layout, capacity: int) -> RingState:
    """Nothing written, no episode begun. ValueError where frames are shared, which only `Storage` can."""
    layout.check_capacity(capacity)
    if layout.frame_stack > 1:
        raise ValueError("replay: frames are shared on the host only")
    kinds = {**layout.columns, "begins": np.dtype(np.bool_)}
    observation, action, shape = kinds["observation"], kinds["action"], (layout.num_envs, layout.n_step)
    return RingState(
        columns={name: jnp.zeros((capacity, *kind.shape), kind.base) for name, kind in kinds.items()},
        written=jnp.zeros((), jnp.int32),
        current=jnp.zeros((layout.num_envs, *observation.shape), observation.base),
        length=jnp.zeros(layout.num_envs, jnp.int32),
        open=jnp.zeros(layout.num_envs, jnp.int32),
        observation=jnp.zeros((*shape, *observation.shape), observation.base),
        action=jnp.zeros((*shape, *action.shape), action.base),
        reward=jnp.zeros(shape),
    )


def add(
    layout: Layout,
    state: RingState,
    action: jax.Array,
    reward: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    final_observation: jax.Array,
    observation: jax.Array,
) -> tuple[RingState, jax.Array]:
    """`Storage.add`, pure: the new state and the slots written, [N * n_step] int32, padded with -1.

    The rewards of a window of more than one step are summed in float32, where `Storage` sums in float64.
    """
    discounts = layout.gamma ** np.arange(layout.n_step + 1, dtype=np.float64)
    terminated, truncated = jnp.asarray(terminated, bool), jnp.asarray(truncated, bool)
    ended = terminated | truncated
    length = state.length + 1
    if layout.n_step == 1:  # every step completes one transition of every environment
        written = {
            "observation": state.current,
            "next_observation": final_observation,
            "action": action,
            "reward": reward,
            "discount": np.float32(discounts[1]) * ~terminated,
            "begins": length == 1,
        }
        count: Any = layout.num_envs
        columns = {name: _write_block(column, state.written, written[name]) for name, column in state.columns.items()}
    else:
        state = _moved_on(layout, state, action, reward, discounts)
        oldest_first = np.arange(layout.n_step)[::-1][None]
        full = oldest_first == layout.n_step - 1
        complete = ((oldest_first < state.open[:, None]) & (ended[:, None] | full)).ravel()
        ends = np.arange(layout.num_envs).repeat(layout.n_step)
        age = np.tile(oldest_first[0], layout.num_envs)
        written = {
            "observation": _rows(state.observation),
            "next_observation": final_observation[ends],
            "action": _rows(state.action),
            "reward": _rows(state.reward),
            "discount": discounts[age + 1].astype(np.float32) * ~terminated[ends],
            "begins": age + 1 == length[ends],
        }
        number = state.written + jnp.cumsum(complete, dtype=jnp.int32) - 1
        capacity = len(state.columns["reward"])
        slots = jnp.where(complete, number % capacity, capacity)  # out of bounds: not written
        count = jnp.sum(complete, dtype=jnp.int32)
        columns = {
            name: column.at[slots].set(written[name].astype(column.dtype), mode="drop")
            for name, column in state.columns.items()
        }
        state = state.replace(open=jnp.minimum(jnp.where(ended, 0, state.open), layout.n_step - 1))
    place = jnp.arange(layout.num_envs * layout.n_step, dtype=jnp.int32)
    slots = jnp.where(place < count, (state.written + place) % len(columns["reward"]), -1)
    state = state.replace(
        columns=columns, written=state.written + count, current=observation, length=jnp.where(ended, 0, length)
    )
    return state, slots


def gather(state: RingState, slots: jax.Array) -> dict[str, jax.Array]:
    """`Storage.gather`, pure; slots [B] must have been written."""
    return {
        name: column.at[slots].get(mode="promise_in_bounds")
        for name, column in state.columns.items()
        if name != "begins"
    }


def draw_slots(key: jax.Array, first: jax.Array, written: jax.Array, size: int, capacity: int) -> jax.Array:
    """[size] int32: slots of transitions number `first` to `written` - 1, uniformly and with replacement."""
    return jax.random.randint(key, (size,), first, written, jnp.int32) % capacity


def _write_block(column: jax.Array, written: jax.Array, rows: jax.Array) -> jax.Array:
    """`column` with `rows` in the slots from number `written` on."""
    count, capacity = len(rows), len(column)
    if capacity % count == 0:  # never round the end
        result: jax.Array = jax.lax.dynamic_update_slice_in_dim(
            column, rows.astype(column.dtype), written % capacity, axis=0
        )
        return result
    slots = (written + jnp.arange(count)) % capacity
    return column.at[slots].set(rows.astype(column.dtype), unique_indices=True, mode="promise_in_bounds")


def _moved_on(
    layout: Layout, state: RingState, action: jax.Array, reward: jax.Array, discounts: NDArray[np.float64]
) -> RingState:
    """With a window begun in every environment and `reward` in all."""

    def shifted(values: jax.Array, newest: jax.Array) -> jax.Array:
        return jnp.concatenate([newest[:, None].astype(values.dtype), values[:, :-1]], axis=1)

    sums = shifted(state.reward, jnp.zeros(layout.num_envs))
    return state.replace(
        observation=shifted(state.observation, state.current),
        action=shifted(state.action, action),
        reward=sums + discounts[None, :-1].astype(np.float32) * reward[:, None],
        open=state.open + 1,
    )


def _rows(windows: jax.Array) -> jax.Array:
    """[N, n, ...] -> [N * n, ...]: by environment, oldest first."""
    return windows[:, ::-1].reshape(-1, *windows.shape[2:])


class Rings:
    """Rings of several seeds on the device, along a leading axis; whoever advances them replaces `state`."""

    def __init__(
        self, layout: Layout, capacity: int, seeds: int = 1, sharding: jax.sharding.Sharding | None = None
    ) -> None:
        ring = jax.eval_shape(lambda: empty_ring(layout, capacity))
        self.layout, self.capacity = layout, capacity
        self.state: RingState = jax.tree.map(
            lambda leaf: jnp.zeros((seeds, *leaf.shape), leaf.dtype, device=sharding), ring
        )

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))

    def __getitem__(self, seed: int) -> "DeviceStorage":
        return DeviceStorage(self, seed)


class DeviceStorage:
    """One ring of `Rings` as `Storage` looks from outside: for checkpoints, which are the same, and for who only looks."""

    def __init__(self, rings: Rings, seed: int) -> None:
        self._rings, self._seed = rings, seed
        self.layout, self.capacity = rings.layout, rings.capacity
        self._oldest = 0  # the first transition this ring ever held

    @property
    def written(self) -> int:
        return int(self._rings.state.written[self._seed])

    @property
    def first(self) -> int:
        """Number of the oldest transition still here."""
        return max(self._oldest, self.written - self.capacity)

    def __len__(self) -> int:
        return self.written - self.first

    def begin(self, observation: ArrayLike) -> None:
        """Start an episode in every environment from `observation` [N, ...]."""
        self._set(current=jnp.asarray(observation), length=jnp.zeros(self.layout.num_envs, jnp.int32))

    def gather(self, slots: ArrayLike) -> Columns:
        """As `Storage.gather`."""
        return {name: column for name, column in self._take(slots).items() if name != "begins"}

    def draw(self, size: int, generator: np.random.Generator) -> Columns:
        """As `Storage.draw`."""
        if not len(self):
            raise ValueError("replay: nothing is written yet")
        return self.gather(generator.integers(self.first, self.written, size) % self.capacity)

    def export(self, start: int, stop: int) -> Columns:
        """As `Storage.export`."""
        if not self.first <= start <= stop <= self.written:
            raise ValueError(f"replay: holds transitions {self.first} to {self.written}, not {start} to {stop}")
        return self._take(np.arange(start, stop) % self.capacity) | {"start": np.array(start)}

    def load(self, segment: Columns) -> None:
        """As `Storage.load`."""
        start, written = int(segment["start"]), self.written
        if start < written:
            raise ValueError(f"replay: transition {written} is next, not {start}")
        for name, column in self._rings.state.columns.items():
            saved = segment.get(name)
            if saved is None or saved.shape[1:] != column.shape[2:] or saved.dtype != column.dtype:
                raise ValueError(f"replay: the saved {name} does not fit this replay")
        if start > written:
            self._oldest = start
        stop = start + len(segment["reward"])
        kept = slice(max(0, stop - self.capacity - start), None)
        slots = np.arange(start, stop)[kept] % self.capacity
        rows = {name: segment[name][kept] for name in self._rings.state.columns}
        self._rings.state = _put_rows(self._rings.state, self._seed, slots, rows)
        self._set(written=jnp.int32(stop))

    def pending(self) -> Columns:
        """As `Storage.pending`."""
        state = self._own()
        windows = {name: getattr(state, name) for name in ("open", "observation", "action", "reward")}
        arrays: dict[str, Any] = {"first": self.first, "written": self.written, "running": True}
        arrays |= {"current": state.current, "length": state.length}
        arrays |= {f"window_{name}": values for name, values in windows.items()}
        return {name: np.asarray(values) for name, values in arrays.items()}

    def restore_pending(self, pending: Columns) -> None:
        """As `Storage.restore_pending`."""
        here, there = (self.first, self.written), (int(pending["first"]), int(pending["written"]))
        if here != there:
            raise ValueError(f"replay: needs transitions {there[0]} to {there[1]} loaded, not {here[0]} to {here[1]}")
        names = {"current": "current", "length": "length"}
        names |= {f"window_{name}": name for name in ("open", "observation", "action", "reward")}
        self._set(**{name: jnp.asarray(pending[saved]) for saved, name in names.items()})

    def _own(self) -> RingState:
        """This seed's part but for its columns."""
        own: RingState = jax.tree.map(lambda leaf: leaf[self._seed], self._rings.state.replace(columns={}))
        return own

    def _set(self, **values: jax.Array) -> None:
        state = self._rings.state
        placed = {name: getattr(state, name).at[self._seed].set(value) for name, value in values.items()}
        self._rings.state = state.replace(**placed)

    def _take(self, slots: ArrayLike) -> Columns:
        taken = _take_rows(self._rings.state.columns, self._seed, np.asarray(slots, np.int32))
        return {name: np.asarray(column) for name, column in taken.items()}


@jax.jit
def _take_rows(columns: dict[str, jax.Array], seed: int, slots: jax.Array) -> dict[str, jax.Array]:
    return {name: column[seed, slots] for name, column in columns.items()}


@partial(jax.jit, donate_argnums=0)
def _put_rows(state: RingState, seed: int, slots: jax.Array, rows: dict[str, jax.Array]) -> RingState:
    return state.replace(
        columns={name: column.at[seed, slots].set(rows[name]) for name, column in state.columns.items()}
    )


Replay = Storage | DeviceStorage
