"""Where a `Storage` keeps its frames: in the memory of the host, or of the device, where a batch then comes from."""

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from .sampler import COMPILER_OPTIONS

BLOCK = 1024  # frames that go to the device or come from there at once, at most


class Frames(Protocol):
    """`len` places for frames; references are places."""

    def __len__(self) -> int: ...

    def put(self, references: NDArray[np.int32], frames: NDArray[Any]) -> None:
        """Write frames [M, ...] to the places [M], each once."""

    def take(self, references: NDArray[np.int32]) -> Any:
        """Frames [*references.shape, ...], as an array of NumPy or of JAX."""

    def read(self, references: NDArray[np.int32]) -> NDArray[Any]:
        """As `take`, [M] references, on the host: for checkpoints."""


class HostFrames:
    """Places that were never written cost no memory."""

    def __init__(self, count: int, frame: np.dtype[Any]) -> None:
        self._pool = np.zeros(count, frame)

    def __len__(self) -> int:
        return len(self._pool)

    def put(self, references: NDArray[np.int32], frames: NDArray[Any]) -> None:
        self._pool[references] = frames

    def take(self, references: NDArray[np.int32]) -> NDArray[Any]:
        return self._pool.take(references, axis=0)

    read = take


class DeviceFrames:
    """All places are allocated at once, written in place, and gathered without a wait of the host.

    sharding: of the places over devices; on the first when not given.
    """

    def __init__(self, count: int, frame: np.dtype[Any], sharding: jax.sharding.Sharding | None = None) -> None:
        self._frame = frame
        # flat: a last axis of one channel is padded to a whole tile on some devices
        self._pool = jnp.zeros((count, int(np.prod(frame.shape))), frame.base, device=sharding)

    def __len__(self) -> int:
        return len(self._pool)

    @property
    def nbytes(self) -> int:
        return self._pool.nbytes

    def put(self, references: NDArray[np.int32], frames: NDArray[Any]) -> None:
        for begin in range(0, len(references), BLOCK):
            part = slice(begin, begin + BLOCK)
            places = _padded(references[part], len(self))  # out of bounds: not written
            self._pool = _put(self._pool, places, _padded(frames[part].reshape(len(frames[part]), -1), 0))

    def take(self, references: NDArray[np.int32]) -> jax.Array:
        frames: jax.Array = _take(self._pool, np.asarray(references, np.int32), self._frame.shape)
        return frames

    def read(self, references: NDArray[np.int32]) -> NDArray[Any]:
        frames = np.zeros(len(references), self._frame)
        for begin in range(0, len(references), BLOCK):
            part = references[begin : begin + BLOCK]
            frames[begin : begin + BLOCK] = np.asarray(self.take(_padded(part, 0)))[: len(part)]
        return frames


def _padded(rows: NDArray[Any], value: int) -> NDArray[Any]:
    """To the next power of two, so that few shapes are compiled."""
    padded = np.full((1 << (len(rows) - 1).bit_length(), *rows.shape[1:]), value, rows.dtype)
    padded[: len(rows)] = rows
    return padded


@partial(jax.jit, donate_argnums=0, compiler_options=COMPILER_OPTIONS)
def _put(pool: jax.Array, references: jax.Array, frames: jax.Array) -> jax.Array:
    return pool.at[references].set(frames, mode="drop")


@partial(jax.jit, static_argnums=2, compiler_options=COMPILER_OPTIONS)
def _take(pool: jax.Array, references: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return pool.at[references].get(mode="promise_in_bounds").reshape(*references.shape, *shape)
