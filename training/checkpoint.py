"""Checkpoints that a kill at any instant leaves readable, and from which a run goes on bit for bit.

    checkpoints/000000100000/state/           device arrays: agent, sampler, interventions, metric sums (orbax)
    checkpoints/000000100000/host.npz         host arrays: environments, running episodes of the replay, a fit under way
    checkpoints/000000100000/host.json        counters, episode statistics
    checkpoints/000000100000/manifest.json    size and SHA-256 of every file above and of the replay segments it needs
    replay/000000000000-000000020000/*.npy    transitions by write number, each written once (`PastReplay` reads them)

A checkpoint adds only the transitions that are new since the last one, so its cost goes with them and not with the
size of the replay. Everything is written under a temporary name and renamed when complete. Nothing in it is executed
when read.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ..agents.learner import PyTree
from ..replay import Replay
from ..replay.past import DESCRIPTION, segments, sha256, span
from .host_loop import Training
from .metrics import Episodes

DEVICE_PARTS = ("agent", "sampler", "totals", "memories", "effects", "dormant")  # of Training
SEGMENT = 20_000  # transitions in one replay segment at most: about 140 MB of Atari frames


class CheckpointError(ValueError):
    """No checkpoint can be read, in one line."""


def save(directory: Path, training: Training, snapshot: dict[str, Any] | None, keep: int, metrics_bytes: int) -> Path:
    """Write a checkpoint of `training` under `directory`, then drop all but the newest `keep` and what only they need.

    Transitions go beside it, and stay if the replay is described there, that is, kept for later runs.
    snapshot: of the environments, None if they start new episodes instead.
    """
    directory.mkdir(parents=True, exist_ok=True)
    needed = save_transitions(_replay(directory), training.storage)
    final = directory / f"{training.agent_step:012d}"
    temporary = _fresh(directory / f".{final.name}")
    _save_state(temporary / "state", {part: getattr(training, part) for part in DEVICE_PARTS})
    arrays = {f"pending/{key}": value for key, value in training.storage.pending().items()}
    arrays |= {f"env/{key}": value for key, value in (snapshot or {}).items()}
    arrays |= {
        f"refit/{key}": value for key, value in (training.refitting.pending() if training.refitting else {}).items()
    }
    np.savez(temporary / "host.npz", **arrays)  # type: ignore[arg-type]
    host = {
        "agent_step": training.agent_step,
        "gradient_step": training.gradient_step,
        "owed": str(training.owed),
        "ratio": str(training.ratio),
        "episodes": training.episodes.to_json(),
        "written": training.storage.written,
        "has_snapshot": snapshot is not None,
        "metrics_bytes": metrics_bytes,
    }
    (temporary / "host.json").write_text(json.dumps(host))
    files = {str(path.relative_to(temporary)): _fingerprint(path) for path in _files(temporary)}
    replay = {segment.name: json.loads((segment / "manifest.json").read_text()) for segment in needed}
    write_atomically(temporary / "manifest.json", json.dumps({"files": files, "replay": replay}))
    _publish(temporary, final)
    prune(directory, keep)
    return final


def newest(directory: Path, with_replay: bool = True, until: int | None = None) -> tuple[Path, list[str]]:
    """The newest checkpoint whose every file matches its checksum, and a line for each newer one that does not.

    with_replay: whether its transitions are needed, and so checked, too. until: the last agent step that it may be of.
    """
    damaged: list[str] = []
    for candidate in reversed(names(directory)):
        if until is not None and int(candidate.name) > until:
            continue
        problem = _problem(candidate, with_replay)
        if problem is None:
            return candidate, [f"{line}; trying the one before it" for line in damaged]
        damaged.append(f"checkpoint {candidate} is damaged ({problem})")
    raise CheckpointError("; ".join([f"no readable checkpoint in {directory}", *damaged]))


def names(directory: Path) -> list[Path]:
    """All checkpoints under `directory`, oldest first."""
    return sorted(path for path in directory.glob("[0-9]*") if path.is_dir())


def restore_agent(path: Path, template: PyTree) -> PyTree:
    """Only the agent's state; `template` gives its structure."""
    return _load_state(path / "state", {"agent": template}, partial=True)["agent"]


def restore(path: Path, training: Training, back: bool = False) -> tuple[dict[str, Any] | None, int]:
    """Bring a freshly made `training` to the checkpoint at `path`, all but its environments.

    Later ones are set aside, as damaged; or, of those that are whole, deleted, where it is gone `back` from them. The result is the environments' snapshot (None: they start new episodes) and the length of metrics.jsonl in bytes.
    """
    host = json.loads((path / "host.json").read_text())
    state = _load_state(path / "state", {part: getattr(training, part) for part in DEVICE_PARTS})
    for part in DEVICE_PARTS:
        setattr(training, part, state[part])
    training.agent_step, training.gradient_step = host["agent_step"], host["gradient_step"]
    training.owed, training.ratio = Fraction(host["owed"]), Fraction(host["ratio"])
    training.episodes = Episodes.from_json(host["episodes"])
    restore_transitions(path, training.storage)
    with np.load(path / "host.npz") as arrays:
        training.storage.restore_pending(_under("pending/", arrays))
        if training.refitting:
            training.refitting.restore_pending(_under("refit/", arrays))
        snapshot = _under("env/", arrays) if host["has_snapshot"] else None
    _set_aside_later(path, host["written"], delete=back)
    return snapshot, host["metrics_bytes"]


def restore_transitions(path: Path, storage: Replay) -> None:
    """Bring an empty replay to the checkpoint at `path`, all but its running episodes."""
    for name in sorted(json.loads((path / "manifest.json").read_text())["replay"]):
        segment = _replay(path.parent) / name
        storage.load({file.stem: np.load(file) for file in segment.glob("*.npy")})


def _set_aside_later(path: Path, written: int, delete: bool) -> None:
    """Keep what comes after `path`, damaged or never completed, out of the way of what the run will write again."""
    for later in names(path.parent):
        if later.name > path.name and delete and _problem(later, with_replay=True) is None:
            shutil.rmtree(later)
        elif later.name > path.name:
            shutil.rmtree(later.with_name(f"damaged-{later.name}"), ignore_errors=True)
            later.rename(later.with_name(f"damaged-{later.name}"))
    for segment in reversed(segments(_replay(path.parent))):
        if span(segment)[1] > written:  # hidden at once and deleted below: the others are readable at any instant
            hidden = segment.with_name(f".{segment.name}")
            shutil.rmtree(hidden, ignore_errors=True)
            segment.rename(hidden)
    prune(path.parent, keep=len(names(path.parent)))


def _replay(checkpoints: Path) -> Path:
    return checkpoints.parent / "replay"


def _under(prefix: str, arrays: Any) -> dict[str, Any]:
    return {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` at once: a reader, or a kill, sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save_transitions(directory: Path, storage: Replay) -> list[Path]:
    """Write what is new in the replay; the result is every segment that holds a live transition, oldest first."""
    directory.mkdir(exist_ok=True)
    oldest = max(0, storage.written - storage.capacity)
    kept = [path for path in segments(directory) if span(path)[1] <= storage.written]
    start = max(oldest, max((span(path)[1] for path in kept), default=0))
    while start < storage.written:
        stop = min(start + SEGMENT, storage.written)
        final = directory / f"{start:012d}-{stop:012d}"
        temporary = _fresh(directory / f".{final.name}")
        for name, array in storage.export(start, stop).items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        fingerprints = {path.name: _fingerprint(path) for path in _files(temporary)}
        write_atomically(temporary / "manifest.json", json.dumps(fingerprints))
        _publish(temporary, final)
        kept.append(final)
        start = stop
    return [path for path in kept if span(path)[1] > oldest]


def _save_state(path: Path, state: PyTree) -> None:
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)  # a failed write logs pages, and raises besides
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
            checkpointer.save(path.absolute(), jax.tree.map(np.asarray, _storable(state)))
    except ValueError as error:  # what a full disk is to tensorstore
        raise OSError(str(error).splitlines()[0]) from error
    finally:
        absl.setLevel(level)


def _load_state(path: Path, template: PyTree, partial: bool = False) -> PyTree:
    like = _storable(template)
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    arguments = ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=partial)
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
    with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
        try:
            restored = checkpointer.restore(path.absolute(), args=arguments)
            fits = jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, like, restored))
        except ValueError:  # its files are whole, or `newest` had not chosen it; orbax lists every array
            fits = False
    if not fits:
        raise CheckpointError(f"{path.parent} was written by another version: its arrays are not this agent's")

    def rewrap(like: jax.Array, value: jax.Array) -> jax.Array:
        if like.size == 0:
            return jnp.zeros(like.shape, like.dtype)
        return jax.random.wrap_key_data(value) if _is_key(like) else jnp.asarray(value)

    return jax.tree.map(rewrap, template, restored)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Of several processes, each writes and reads on its own, or not at all."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _storable(state: PyTree) -> PyTree:
    """With the bits of keys, and one element in place of none, for orbax takes neither."""

    def plain(value: jax.Array) -> jax.Array:
        if value.size == 0:
            return jnp.zeros(1)
        return jax.random.key_data(value) if _is_key(value) else value

    return jax.tree.map(plain, state)


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _fingerprint(path: Path) -> list[Any]:
    return [path.stat().st_size, sha256(path)]


def _problem(checkpoint: Path, with_replay: bool) -> str | None:
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        if with_replay and manifest["replay"] and not _replay(checkpoint.parent).exists():
            return "its replay was removed"
        expected = {checkpoint / name: mark for name, mark in manifest["files"].items()}
        for segment, files in manifest["replay"].items() if with_replay else ():
            expected |= {_replay(checkpoint.parent) / segment / name: mark for name, mark in files.items()}
        for path, mark in expected.items():
            if _fingerprint(path) != mark:
                return f"{path.name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _publish(temporary: Path, final: Path) -> None:
    """Give a complete directory its name; an older one of that name was found unusable or is rewritten alike."""
    for path in _files(temporary):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)


def prune(directory: Path, keep: int) -> None:
    """Drop all but the newest `keep` checkpoints, what only they need, and what was never completed."""
    replay = _replay(directory)
    for path in [*names(directory)[:-keep], *directory.glob(".[0-9]*"), *replay.glob(".[0-9]*-[0-9]*")]:
        shutil.rmtree(path)
    if (replay / DESCRIPTION).exists():
        return
    needed = set()
    for path in names(directory):
        try:
            needed |= set(json.loads((path / "manifest.json").read_text())["replay"])
        except (OSError, ValueError, KeyError):
            continue  # damaged: it needs nothing any more
    for segment in segments(replay):
        if segment.name not in needed:
            shutil.rmtree(segment)
