"""Finished runs as small tables that go into the repository: a row for each run, and thinned points of its curves.

    results/SUITE.csv           a line per run; the columns are the fields of `Row`
    results/SUITE-curves.csv    a line per run and twentieth of it (`POINTS`); a column per metric, empty where nothing was measured

From these two, tables and reports are made without the run directories, and each row says from which directory,
configuration and commit it came.
"""

import csv
import dataclasses
import datetime
import fcntl
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..training.checkpoint import write_atomically
from ..training.metrics import read_metrics

SCHEMAS = 1, 2  # of rows, those that are read; the last is written. 1 had no `environment`
CURVES_SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
POINTS = 20  # of a curve, each of as many equal parts of a run; unless the suite says how many agent steps one is of
RETURNS = ("eval/return", "episode/return")
CURVES = (  # beside these a metric is kept if its name begins so
    "dormant/post/tau0/",
    "dormant/post/tau0.1/",
    "fau/",
    "srank/",
    "effective_rank/",
)
RATIO = "/replay_ratio"  # ... or ends so: what Adaptive RR has set


@dataclass(frozen=True, order=True)
class Row:
    """A finished run. `digest` hashes all that training depends on, the task and the seed included."""

    suite: str
    arm: str
    task: str
    seed: int
    agent_steps: int
    gradient_steps: int
    final_return: float  # mean of the last evaluation; NaN if there was none
    episodes: int  # of that evaluation
    steps_per_second: float  # agent steps while learning; NaN if there were too few to tell
    peak_memory_bytes: int
    protocol: str  # of Atari; empty elsewhere
    digest: str
    commit: str  # +dirty: with changes since; several, oldest first, if it changed on the way; empty: no checkout
    resprout: str  # version
    jax: str  # version
    directory: str  # OUT/ARM/FAMILY-TASK/sSEED, its last four parts
    finished: str  # date, UTC
    environment: str = ""  # packages behind it and their versions

    @property
    def commits(self) -> list[str]:
        """Twelve digits of each."""
        return [each[:12] + each[40:] for each in self.commit.split()]

    @property
    def same(self) -> tuple[str, str, str, str]:
        """What rows of one and the same run agree in."""
        return self.digest, self.commit, self.directory, self.finished

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What there is one row of."""
        return self.suite, self.arm, self.task, self.seed


class Point(NamedTuple):
    """The mean of a metric over one part of a run, of training returns over its episodes, at the agent step where that part ends."""

    arm: str
    task: str
    seed: int
    step: int
    metric: str
    value: float


Check = Callable[[Sequence[Row]], None]
COLUMNS = tuple(part.name for part in dataclasses.fields(Row))
POSITION = ("arm", "task", "seed", "step")  # columns of the curves before the metrics


def row_of(directory: Path, suite: str, arm: str) -> Row:
    """Of a finished run. ValueError, in one line, if it is none."""
    with _finished(directory):
        config = json.loads((directory / "config.json").read_text())
        summary = json.loads((directory / "summary.json").read_text())
        experiment, versions = config["experiment"], config["versions"]
        task, atari = experiment["env"], experiment["env"].startswith("atari/")
        behind = config["environment"]["protocol"].get("versions", {})
        clock = max(line["wall_clock"] for line in read_metrics(directory / "metrics.jsonl"))
        return Row(
            suite=suite,
            arm=arm,
            task=task,
            seed=experiment["seed"],
            agent_steps=int(summary["agent_steps"]),
            gradient_steps=int(summary["gradient_steps"]),
            final_return=number(summary["return"]),
            episodes=len(summary["episode_returns"]),
            steps_per_second=number(summary["steps_per_second"]),
            peak_memory_bytes=summary["peak_memory_bytes"],
            protocol=(experiment["protocol"] or "dopamine") if atari else "",
            digest=config["digest"],
            commit=config["git_commit"] or "",
            resprout=versions["resprout"] or "",
            jax=versions["jax"] or "",
            directory="/".join(directory.absolute().parts[1:][-4:]),
            finished=datetime.datetime.fromtimestamp(clock, datetime.UTC).date().isoformat(),
            environment=", ".join(f"{package} {version}" for package, version in behind.items()),
        )


@contextmanager
def _finished(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{directory} is no finished run ({type(error).__name__}: {error})") from None


def number(value: float | None) -> float:
    """Of a summary, where None stands for what is not finite."""
    return float("nan") if value is None else float(value)


def curve_points(directory: Path, row: Row, width: int | None = None) -> list[Point]:
    """The metrics of a run that a report draws, thinned to parts of `width` agent steps; None: of a twentieth of it."""
    span = width * POINTS if width else row.agent_steps  # agent steps of as many points
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    weights: dict[tuple[int, str], list[int]] = defaultdict(list)
    with _finished(directory):
        for line in read_metrics(directory / "metrics.jsonl"):
            part = max(-(-min(line["step"], row.agent_steps) * POINTS // span), 1)  # by where it ends
            for metric, value in line.items():
                kept = metric in RETURNS or metric.startswith(CURVES) or metric.endswith(RATIO)
                if kept and value is not None:
                    place = min(part * span // POINTS, row.agent_steps), metric
                    found[place].append(float(value))
                    weights[place].append(line["episode/count"] if metric == "episode/return" else 1)
        return [
            Point(row.arm, row.task, row.seed, *place, float(np.average(values, weights=weights[place])))
            for place, values in sorted(found.items())
        ]


def paths(suite: str, folder: Path = RESULTS) -> tuple[Path, Path]:
    """Where the rows of a suite are, and where its curves."""
    return folder / f"{suite}.csv", folder / f"{suite}-curves.csv"


def read_rows(path: Path) -> list[Row]:
    """ValueError, in one line, if there is no such file, it is none of ours, or it has a run twice."""
    lines = _read(path, ("schema", *(column for column in COLUMNS if column != "environment")), SCHEMAS)
    read: dict[Any, Any] = {str: str, int: int, float: lambda text: _finite(text) if text else float("nan")}
    with _read_as(path):
        rows = [Row(*(read[part.type](line.get(part.name, "")) for part in dataclasses.fields(Row))) for line in lines]
    _check_once(path, [row.key for row in rows])
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Sorted, so that the file says the same whatever the order; whole or not at all."""
    lines = [
        {"schema": SCHEMAS[-1]} | {key: _text(value) for key, value in dataclasses.asdict(row).items()}
        for row in sorted(rows, key=lambda row: row.key)
    ]
    _write(path, ("schema", *COLUMNS), lines)


def read_curves(path: Path) -> list[Point]:
    """ValueError, in one line, if there is no such file, it is none of ours, or it has a part of a run twice."""
    lines = _read(path, ("schema", *POSITION), (CURVES_SCHEMA,))
    _check_once(path, [tuple(line[column] for column in POSITION) for line in lines])
    with _read_as(path):
        return [
            Point(line["arm"], line["task"], int(line["seed"]), int(line["step"]), metric, _finite(value))
            for line in lines
            for metric, value in line.items()
            if metric not in ("schema", *POSITION) and value
        ]


def write_curves(path: Path, points: Iterable[Point]) -> None:
    """Sorted, five digits; whole or not at all."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for point in points:
        place = point[:4]
        line = lines.setdefault(place, {"schema": CURVES_SCHEMA} | dict(zip(POSITION, place, strict=True)))
        line[point.metric] = f"{point.value:.5g}"
    metrics = sorted({metric for line in lines.values() for metric in line} - {"schema", *POSITION})
    _write(path, ("schema", *POSITION, *metrics), [lines[place] for place in sorted(lines)])


@contextmanager
def _read_as(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} holds a value that cannot be read: {error}") from None


def _finite(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _check_once(path: Path, keys: Sequence[tuple[Any, ...]]) -> None:
    """ValueError, in one line, for what two lines of a file say."""
    lines: dict[tuple[Any, ...], int] = {}
    for line, key in enumerate(keys, start=2):
        if lines.setdefault(key, line) != line:
            raise ValueError(f"{path}, lines {lines[key]} and {line}: {' '.join(map(str, key))} is there twice")


# Adding to them


def read_finished(
    path: Path, name: str, arms: Iterable[str], width: int | None = None
) -> tuple[list[Row], list[Point]]:
    """Rows and curves of a directory that `bench run` made, or of somebody's SUITE.csv and the curves beside it.

    width: agent steps of a point of the curves, as in `curve_points`.
    """
    if path.suffix == ".csv":
        curves = path.with_name(f"{path.stem}-curves.csv")
        rows, points = read_rows(path), read_curves(curves) if curves.exists() else []
    else:
        rows, points = [], []
        for arm in arms:
            for summary in sorted((path / arm).glob("*/s*/summary.json")):
                row = row_of(summary.parent, name, arm)
                if same := [other.directory for other in rows if other.key == row.key]:
                    raise ValueError(f"{same[0]} and {row.directory} are runs of the same arm, task and seed")
                rows.append(row)
                points += curve_points(summary.parent, row, width)
    if not rows:
        raise ValueError(f"no finished run in {path}; resprout bench run makes some")
    return rows, points


def add(rows: Sequence[Row], points: Sequence[Point], name: str, folder: Path, check: Check = lambda rows: None) -> int:
    """Put rows into a folder's results, and their curves; the result is how many are new. What is there already stays.

    A run that is there without its curve gets it. check: raises ValueError, and nothing is written, unless all rows, old and new, go together.
    """
    table, curves = paths(name, folder)
    check(rows)  # before a folder is made
    with _alone_in(folder):
        old = read_rows(table) if table.exists() else []
        check([*old, *rows])
        known = {row.key for row in old}
        new = {row.key: row for row in rows if row.key not in known}
        stored = read_curves(curves) if curves.exists() else []
        drawn = [point for point in stored if (name, *point[:3]) not in new]
        kept = {row.key: row.same for row in [*old, *new.values()]}
        wanting = {row.key[1:] for row in rows if row.same == kept[row.key]} - {point[:3] for point in drawn}
        drawn += [point for point in points if point[:3] in wanting]
        write_curves(curves, drawn)  # first, so that no row waits for a curve that was given
        write_rows(table, [*old, *new.values()])
    return len(new)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Made if it is missing; whoever else adds to it waits."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _text(value: Any) -> Any:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.10g}"
    return value


def _write(path: Path, columns: Sequence[str], lines: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def _read(path: Path, columns: Sequence[str], schemas: Sequence[int]) -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"there are no results at {path}; resprout bench add writes them")
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            lines = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table of results: {error}") from None
    if missing:
        raise ValueError(f"{path} is no table of results: it has no column {', '.join(missing)}")
    for index, line in enumerate(lines, start=2):
        if None in line or None in line.values():
            raise ValueError(f"{path}, line {index}: not as many values as columns")
        if line["schema"] not in map(str, schemas):
            known = " or ".join(map(str, schemas))
            raise ValueError(
                f"{path}, line {index}: schema {line['schema']!r} is not {known}, which this version reads"
            )
    return lines
