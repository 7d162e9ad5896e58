"""A table that is not drawn yet, and what stands in its cells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .stats import Interval, Scores

ENOUGH = 5  # runs or pairs of a task, below which FEW is said
FEW = f"Intervals from fewer than {ENOUGH} runs or pairs of a task are too narrow to tell a difference by."
MANY = (
    "Each interval is of one comparison: of twenty arms without any effect about one will seem to have some, and about two "
    f"where there are {ENOUGH} pairs of a task."
)


@dataclass(frozen=True)
class Sheet:
    """A table that is not drawn yet."""

    title: str
    columns: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def print(self, console: Console) -> None:
        """On a terminal; title and notes run over its width, not the table's."""
        table = Table(box=SIMPLE)
        for column in self.columns:
            table.add_column(escape(column), overflow="fold")
        for line in self.lines:
            table.add_row(*map(escape, line))
        console.print(self.title, markup=False)
        console.print(table)
        for note in self.notes:
            console.print(note, markup=False)
        if self.notes:
            console.print()

    def markdown(self) -> str:
        rule = "|".join(["", *("---" for _ in self.columns), ""])
        said, *lines = (
            "| " + " | ".join(cell.replace("\n", " ").replace("|", r"\|") for cell in line) + " |"
            for line in (self.columns, *self.lines)
        )
        lines = [f"**{self.title}**", "", said, rule, *lines]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"


def plain(value: float) -> str:
    """A return with as many decimals as its size leaves room for, and never as a power of ten."""
    return f"{value:.{3 if abs(value) < 1 else 2 if abs(value) < 100 else 1}f}"


def score(value: float) -> str:
    """One on the scale of several tasks."""
    return f"{value:.3f}"


def cells(interval: Interval, runs: Scores, shown: Callable[[float], str] = score) -> tuple[str, str]:
    """The estimate and its interval, which a single run of each task has not."""
    if np.isnan(interval.estimate):
        return "", ""
    if all(len(task) < 2 for task in runs):
        return shown(interval.estimate), "none of one run"
    return shown(interval.estimate), f"{shown(interval.low)} to {shown(interval.high)}"


def cell(interval: Interval, runs: Scores, shown: Callable[[float], str] = score) -> str:
    """Both in one."""
    estimate, within = cells(interval, runs, shown)
    return estimate and f"{estimate} ({within})"


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation (n - 1) where there are several."""
    if not values:
        return ""
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


def few(*each: Scores) -> bool:
    """Whether a task of any of them has some runs or pairs, but fewer than ENOUGH."""
    return any(0 < len(task) < ENOUGH for scores in each for task in scores)


def notes_on_pairs(every: Sequence[Scores]) -> tuple[str, ...]:
    """What to say below a table of comparisons, each with the pairs of every task."""
    return (FEW,) * few(*every) + (MANY,) * (len(every) > 1)


def directions(paired: Scores) -> tuple[int, int]:
    """On how many tasks the mean of the paired differences is above zero, and on how many below."""
    means = [float(np.mean(task)) for task in paired if len(task)]
    return sum(mean > 0 for mean in means), sum(mean < 0 for mean in means)


def verdict(interval: Interval, paired: Scores) -> str:
    """What the interval of paired differences says; higher or lower only where most tasks are."""
    if np.isnan(interval.estimate):
        return "no pairs yet"
    if few(paired):
        return "too few pairs"
    if interval.low <= 0 <= interval.high:
        return "no difference shown"
    said, count = ("higher", 0) if interval.low > 0 else ("lower", 1)
    return said if 2 * directions(paired)[count] > sum(len(task) > 0 for task in paired) else "tasks disagree"
