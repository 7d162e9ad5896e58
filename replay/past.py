"""Replays of runs that are over, kept on the disk and read from there.

replay/replay.json                        what the transitions are: `Description`
replay/000000000000-000000020000/*.npy    transitions by write number, as `Storage.export` gives them
replay/000000000000-000000020000/manifest.json    size and SHA-256 of each of these files
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .storage import Array, Columns, Layout, decode

DESCRIPTION = "replay.json"
FORMAT = 1


class PastReplayError(ValueError):
    """A saved replay that cannot be used, in one line."""


@dataclass(frozen=True)
class Description:
    """What must agree, but for the name of the environment and how many there were, for two replays to be mixed."""

    layout: Layout
    env: str
    action_size: int  # number of actions if discrete, else the action's dimension
    action_low: tuple[float, ...]  # what a stored -1 stands for in the environment; () if actions are discrete
    action_high: tuple[float, ...]  # and a stored 1
    reward_clip: float | None  # rewards are stored clipped to this

    @property
    def discrete(self) -> bool:
        return not self.action_low

    def differences(self, other: "Description") -> list[str]:
        """A clause for each thing in which `other`, the run that would use this replay, differs."""
        there, here = self._compared(), other._compared()
        return [f"{name} is {there[name]} there and {here[name]} here" for name in there if there[name] != here[name]]

    def _compared(self) -> dict[str, Any]:
        values = {**asdict(self.layout), **asdict(self)}
        for name in ("action_low", "action_high"):  # some spaces state theirs in single precision, some in double
            values[name] = np.float32(values[name]).tolist()
        return {name: value for name, value in values.items() if name not in ("layout", "env", "num_envs")}

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Description":
        def thaw(values: dict[str, Any]) -> dict[str, Any]:
            return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

        rest = {key: value for key, value in data.items() if key not in ("format", "layout")}
        return cls(layout=Layout(**thaw(data["layout"])), **thaw(rest))


def segments(directory: Path) -> list[Path]:
    """The complete segments of a replay, oldest first."""
    return sorted(path for path in directory.glob("[0-9]*-[0-9]*") if path.is_dir())


def span(segment: Path) -> tuple[int, int]:
    """Write numbers of the transitions in a segment: from the first up to, not including, the second."""
    start, stop = segment.name.split("-")
    return int(start), int(stop)


class PastReplay:
    """The replay that a run left in `directory`, as a source to gather from; slot w is the transition written w-th.

    Files are mapped, not read: only what `gather` touches takes memory, and that the system may take back.
    transitions: use only that many, the first written; they must end where a segment does.
    checksums: read every file once and compare its SHA-256; otherwise only sizes, shapes and dtypes are compared.
    PastReplayError if anything is missing, cut short or not what `replay.json` says.
    """

    def __init__(self, directory: str | Path, *, transitions: int | None = None, checksums: bool = False) -> None:
        self.directory = Path(directory)
        try:
            data = json.loads((self.directory / DESCRIPTION).read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"it has format {data['format']}, this version reads {FORMAT}")
            self.description = Description.from_json(data)
        except FileNotFoundError:
            inside = self.directory / "replay"  # of a run directory
            told = f"it is in {inside}" if (inside / DESCRIPTION).exists() else "--save-replay keeps one"
            raise PastReplayError(f"{self.directory}: no saved replay there; {told}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PastReplayError(f"{self.directory}: {DESCRIPTION} cannot be read ({error})") from error
        self._manifests: list[bytes] = []
        self._segments: list[Columns] = []
        stops: list[int] = []
        for path in segments(self.directory):
            here, (start, stop) = stops[-1] if stops else 0, span(path)
            if here == transitions:
                break
            if start != here:
                raise PastReplayError(f"{self.directory}: transitions {here} to {start} are missing")
            self._segments.append(self._open(path, stop - start, checksums))
            stops.append(stop)
        self._stops = np.array(stops, np.int64)
        self.capacity = stops[-1] if stops else 0
        if transitions is not None and self.capacity != transitions:
            raise PastReplayError(f"{self.directory}: {self.capacity} transitions, not the {transitions} asked for")
        if not stops:
            raise PastReplayError(f"{self.directory}: it holds no transitions")

    def __len__(self) -> int:
        return self.capacity

    @cached_property
    def digest(self) -> str:
        """Hash of all content, by the checksums that were written with it; opening does not compare those."""
        return hashlib.sha256(b"".join(self._manifests)).hexdigest()

    def gather(self, slots: ArrayLike) -> Columns:
        """As `Storage.gather`, the same columns; IndexError for slots that are not there."""
        slots = np.asarray(slots, np.intp)
        if slots.size and not 0 <= slots.min() <= slots.max() < self.capacity:
            raise IndexError(f"{self.directory}: slots must be below {self.capacity}")
        layout = self.description.layout
        columns = {name: np.empty(len(slots), dtype) for name, dtype in layout.columns.items()}
        if layout.frame is not None:
            references = columns.pop("references")
            columns["frames"] = np.empty(references.shape, layout.frame)
        owner = np.searchsorted(self._stops, slots, side="right")
        for index in np.unique(owner):
            segment, where = self._segments[index], (owner == index).nonzero()[0]
            rows = slots[where] - (self._stops[index] - len(segment["reward"]))
            places = dict.fromkeys(columns, rows)
            if "frames" in columns:
                places["frames"] = np.searchsorted(segment["frame_ids"], segment["references"].take(rows, axis=0))
            for name, column in columns.items():
                column[where] = segment[name].take(places[name], axis=0)
        return columns

    def episodes(self) -> Iterator["Episode"]:
        """One environment after the other, each from its first episode to its last.

        ValueError unless transitions are single agent steps whose ends can be told, that is n_step 1 and gamma above 0.
        """
        layout = self.description.layout
        if layout.n_step > 1 or layout.gamma == 0:
            raise ValueError(
                f"{self.directory}: episodes can be read back from n_step 1 and a gamma above 0 only, "
                f"not from n_step {layout.n_step} and gamma {layout.gamma}"
            )
        begins = np.concatenate([segment["begins"] for segment in self._segments])
        for env in range(layout.num_envs):
            numbers = np.arange(env, self.capacity, layout.num_envs)  # each agent step writes one for each environment
            for episode in np.split(numbers, begins[numbers].nonzero()[0][1:]):
                columns = decode(self.gather(episode), layout.frame_stack)
                yield Episode(
                    np.concatenate([columns["observation"], columns["next_observation"][-1:]]),
                    columns["action"],
                    columns["reward"],
                    bool(columns["discount"][-1] == 0),
                )

    def _open(self, path: Path, count: int, checksums: bool) -> Columns:
        """The columns of a segment, mapped."""
        layout = self.description.layout
        try:
            manifest = (path / "manifest.json").read_bytes()
            for name, (size, checksum) in json.loads(manifest).items():
                if (path / name).stat().st_size != size:
                    raise ValueError(f"{name} has {(path / name).stat().st_size} bytes, not {size}")
                if checksums and sha256(path / name) != checksum:
                    raise ValueError(f"{name} does not match its checksum")
            dtypes = {**layout.columns, "begins": np.dtype(np.bool_)}
            if layout.frame is not None:
                dtypes |= {"frame_ids": np.dtype(np.int32), "frames": layout.frame}
            columns = {name: np.asarray(np.load(path / f"{name}.npy", mmap_mode="r")) for name in dtypes}
            for name, dtype in dtypes.items():
                rows = len(columns["frame_ids"]) if name.startswith("frame") else count
                found, expected = (columns[name].dtype, columns[name].shape), (dtype.base, (rows, *dtype.shape))
                if found != expected:
                    raise ValueError(f"{name} is {found[0]} {found[1]}, not {expected[0]} {expected[1]}")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise PastReplayError(f"{path}: {error}") from error
        self._manifests.append(manifest)
        return columns


class Episode(NamedTuple):
    """T agent steps of one environment; one that did not terminate was truncated, or the run stopped within it."""

    observation: Array  # [T + 1, ...]
    action: Array  # [T, ...] as stored
    reward: Array  # [T] float32
    terminated: bool


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
