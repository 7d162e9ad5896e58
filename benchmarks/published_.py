"""Published returns beside which ours are put, each with the protocol that it was measured under.

    published/SUITE.csv           atari, atari100k, mujoco, dmc, dmc-pixels; the columns are the fields of `Published`
    published/field.csv           a few more, of pages and READMEs
    published/human_random.csv    random and human score of 57 Atari games

docs/published.md says where each `source` is from, how its figures were computed, and what not to compare with what.
"""

import csv
import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..envs.atari import ATARI_PROTOCOLS
from ..training import Experiment
from .stats import human_normalised

PUBLISHED = Path(__file__).parent / "published"
HUMAN_RANDOM = "human_random.csv"
FRAMES = {
    "atari": 4,
    "atari100k": 4,
    "dmc": 2,
    "dmc-pixels": 2,
}  # simulator steps in an agent step of a published suite
METRICS = {"train_return": "return of training episodes, ours of evaluations", "success_rate": "a success rate"}
TRAINING = ("dopamine_atari", "dopamine_atari_legacy", "redo_paper", "dreamerv3_scores")  # what their aggregates are of
EVIDENCE = {"memory": "recalled, not read again", "read_off": "read off a plot"}


@dataclass(frozen=True)
class Published:
    """One figure. `task` may be ALL(n), an aggregate over the n tasks that `note` names."""

    source: str
    agent: str
    variant: str
    suite: str
    task: str
    budget: int | None  # in `budget_unit`; None where the source does not say
    budget_unit: str  # agent_steps or frames
    metric: str  # eval_return, train_return, iqm_hns, ...
    mean: float  # the value, whatever the metric
    std: float | None  # over runs, n - 1; docs/published.md names the exceptions
    ci_low: float | None  # of 95 %
    ci_high: float | None
    runs: int | None
    env_version: str
    sticky: float | None  # probability
    life_loss_terminal: bool | None  # in training
    evidence: str  # file, paper, read_off or memory; a test may depend on none of the last
    note: str

    @property
    def agent_steps(self) -> int | None:
        """The budget in decisions."""
        if self.budget is None or self.budget_unit == "agent_steps":
            return self.budget
        return self.budget // FRAMES[self.suite]


@dataclass(frozen=True)
class Column:
    """What a table shows beside an arm of ours: one source, agent, variant, metric and budget, and so one protocol."""

    source: str
    suite: str
    agent: str
    variant: str = ""
    metric: str = "eval_return"
    budget: int | None = None

    def __str__(self) -> str:
        return ", ".join(filter(None, (f"{self.agent} ({self.source})", self.variant)))

    def value(self, task: str) -> Published | None:
        """Of a task of theirs; None if the source has none."""
        return next(iter(self._rows(task)), None)

    def of(self, env_id: str) -> Published | None:
        """Of a task of ours, mujoco/Hopper-v5; where the source has another version of it, that."""
        name = env_id.partition("/")[2]
        bare, _, version = name.rpartition("-v")
        rows = self._rows(name)
        if not rows and version.isdecimal():
            rows = [row for row in self._rows(None) if row.task.rpartition("-v")[0] == bare]
        return next(iter(rows), None)

    def _rows(self, task: str | None) -> list[Published]:
        rows = _by_column().get((self.source, self.suite, self.agent, self.variant, self.metric), [])
        return [row for row in rows if task in (None, row.task) and self.budget in (None, row.budget)]


class Score(NamedTuple):
    """Of a game: what the random policy gets and what a human does."""

    random: float
    human: float


@functools.cache
def published() -> tuple[Published, ...]:
    """Every figure there is."""
    paths = [path for path in sorted(PUBLISHED.glob("*.csv")) if path.name != HUMAN_RANDOM]
    return tuple(row for path in paths for row in _read(path))


@functools.cache
def _by_column() -> dict[tuple[str, ...], list[Published]]:
    found: dict[tuple[str, ...], list[Published]] = defaultdict(list)
    for row in published():
        found[row.source, row.suite, row.agent, row.variant, row.metric].append(row)
    return found


@functools.cache
def human_random() -> dict[str, Score]:
    """By game, Breakout."""
    with (PUBLISHED / HUMAN_RANDOM).open(newline="") as file:
        return {line["game"]: Score(float(line["random"]), float(line["human"])) for line in csv.DictReader(file)}


def normalised(env_id: str, score: float) -> float:
    """Human-normalised score of atari/GAME. ValueError where no human was measured."""
    game = env_id.partition("/")[2]
    if not env_id.startswith("atari/") or game not in human_random():
        raise ValueError(f"{env_id} has no human score to be normalised by")
    return human_normalised(score, *human_random()[game])


def lookup(
    suite: str | None = None,
    task: str | None = None,
    agent: str | None = None,
    variant: str | None = None,
    source: str | None = None,
    metric: str | None = None,
) -> list[Published]:
    """What is known, by whatever is given; what is recalled only (`evidence` memory) last."""
    wanted = {"suite": suite, "task": task, "agent": agent, "variant": variant, "source": source, "metric": metric}
    asked = {name: value for name, value in wanted.items() if value is not None}
    found = [row for row in published() if all(getattr(row, name) == value for name, value in asked.items())]
    return sorted(found, key=lambda row: row.evidence == "memory")


def mismatches(theirs: Published, ours: Experiment[Any]) -> list[str]:
    """In what the protocol of a published figure differs from that of an experiment, and how sure the figure is."""
    family, _, name = ours.env.partition("/")
    said = []
    if family == "atari":
        protocol = ATARI_PROTOCOLS[ours.protocol or "dopamine"]
        if theirs.sticky is None or theirs.life_loss_terminal is None:
            said.append("sticky actions or ends at a lost life not stated")
        if theirs.sticky is not None and theirs.sticky != protocol.sticky:
            said.append(f"sticky actions {theirs.sticky:g}, ours {protocol.sticky:g}")
        if theirs.life_loss_terminal is not None and theirs.life_loss_terminal != protocol.life_loss_ends_episode:
            said.append(
                f"a lost life {'ends' if theirs.life_loss_terminal else 'does not end'} an episode, ours not so"
            )
    elif theirs.env_version and theirs.env_version != name and not theirs.task.startswith("ALL"):
        said.append(f"{theirs.env_version}, ours {name}")
    if theirs.agent_steps != ours.steps:
        length = "not stated" if theirs.agent_steps is None else f"{theirs.agent_steps:,}"
        said.append(f"agent steps {length}, ours {ours.steps:,}")
    aggregate_of_training = theirs.task.startswith("ALL") and theirs.source in TRAINING
    metric = "train_return" if aggregate_of_training else theirs.metric
    said += [METRICS[metric]] if metric in METRICS else []
    said += [text for evidence, text in EVIDENCE.items() if theirs.evidence == evidence]
    return said


def all_mismatches(pairs: Iterable[tuple[Published, Experiment[Any]]]) -> list[str]:
    """Of many, each said once."""
    return list(dict.fromkeys(text for theirs, ours in pairs for text in mismatches(theirs, ours)))


def _read(path: Path) -> Iterable[Published]:
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            yield Published(**{part.name: _value(line[part.name], part.type) for part in dataclasses.fields(Published)})


def _value(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if text == "":
        return None
    if kind == bool | None:
        return {"0": False, "1": True}[text]
    number = float(text)
    return int(number) if kind == int | None and math.isfinite(number) else number
