"""Past data that a run mixes into its batches: what `replay_from` names, found and checked."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..replay import PastReplay, Storage, available_memory, memory
from ..replay.minari_ import MinariData
from ..replay.mixture import split
from ..replay.past import Description

MINARI = "minari:"
PAST_SHARE = 0.5  # of a batch, where no fraction is given: Tirumala et al. (2023), arXiv:2311.15951


class SourceError(ValueError):
    """Past data that cannot be used, in one line."""


@dataclass(frozen=True)
class Past:
    """A source that was opened."""

    name: str
    share: float  # of every batch
    replay: PastReplay | Storage
    digest: str  # of its content

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "share": self.share, "transitions": len(self.replay), "digest": self.digest}


def parse_sources(sources: Sequence[str], batch_size: int) -> dict[str, float]:
    """Name -> share of every batch; what is left is the run's own.

    SourceError for fractions outside (0, 1), that sum to 1 or more, or that leave a source or the run itself without a
    place in the batch.
    """
    given: dict[str, float | None] = {}
    for text in sources:
        name, _, last = text.rpartition(":")
        try:
            name, fraction = (name, float(last)) if name else (text, None)
        except ValueError:  # the last part is none, but belongs to the name
            name, fraction = text, None
        if name in given:
            raise SourceError(f"replay_from: {name} is there twice")
        if fraction is not None and not 0 < fraction < 1:
            raise SourceError(f"replay_from: the fraction of {name} must be between 0 and 1, not {last}")
        given[name] = fraction
    total = sum(fraction for fraction in given.values() if fraction is not None)
    if total >= 1:
        raise SourceError(f"replay_from: fractions that sum to {total:g} leave nothing of the batch for the run itself")
    others = [name for name, fraction in given.items() if fraction is None]
    rest = PAST_SHARE - total
    if others and rest <= 0:
        raise SourceError(
            f"replay_from: {', '.join(others)} would share what the fractions given leave of {PAST_SHARE}, which is nothing"
        )
    shares = {name: rest / len(others) if fraction is None else fraction for name, fraction in given.items()}
    if 0 in split(batch_size, [1 - sum(shares.values()), *shares.values()]):
        raise SourceError(f"replay_from: a batch of {batch_size} is too small for shares of {list(shares.values())}")
    return shares


def open_sources(
    sources: Sequence[str], batch_size: int, run: Description, recorded: Sequence[dict[str, Any]] = ()
) -> tuple[Past, ...]:
    """Each source with its share, after every check; a Minari data set is read into memory.

    recorded: what `Past.to_json` gave when the run began, if it is one that goes on. A past run may have grown since, but
        what was there must be the same.
    SourceError, PastReplayError (ValueError as well) say what does not fit.
    """
    shares = parse_sources(sources, batch_size)
    recorded_by_name = {record["name"]: record for record in recorded}
    sizes = split(batch_size, [1 - sum(shares.values()), *shares.values()])[1:]
    opened = []
    for (name, share), size in zip(shares.items(), sizes, strict=True):
        before = recorded_by_name.get(name)
        data: MinariData | PastReplay
        if name.startswith(MINARI):
            data = MinariData(name.removeprefix(MINARI))
            differences = data.differences(run)
        else:
            data = PastReplay(Path(name) / "replay", transitions=before["transitions"] if before else None)
            differences = data.description.differences(run)
        if differences:
            raise SourceError(f"{name} does not fit this run: {'; '.join(differences)}")
        if len(data) < size:
            raise SourceError(f"{name} holds {len(data)} transitions, fewer than its {size} of each batch")
        if before and before["digest"] != data.digest:
            raise SourceError(f"{name} is not what it was when the run began")
        replay = data if isinstance(data, PastReplay) else _read(data, run)
        opened.append(Past(name, share, replay, data.digest))
    return tuple(opened)


def _read(data: MinariData, run: Description) -> Storage:
    """Into memory, if it fits."""
    needed = memory(len(data), **asdict(run.layout)).expected
    if needed > 0.95 * available_memory():
        raise SourceError(
            f"{MINARI}{data.name}: {needed / 1e9:.3g} GB for {len(data):,} transitions cannot fit in memory"
        )
    return data.replay(run)
