"""How far a suite is: runs done and left, and the time that the rest will take, judged by the runs that are finished or at work."""

import datetime
import heapq
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Pace(NamedTuple):
    """Of a running run, by its newest line of metrics: seconds that a whole one takes at this speed, and that are left."""

    whole: float
    left: float


class Running(NamedTuple):
    arm: str
    seconds: float  # so far
    pace: Pace | None = None


def time_left(
    finished: Mapping[str, Sequence[float]], running: Sequence[Running], waiting: Sequence[str], jobs: int
) -> float | None:
    """Seconds until all is done; None before a run is finished or has told its pace.

    finished: seconds of the runs of each arm; waiting: arms in the order in which `jobs` places take them. A run takes what
    its own pace says; or what its arm takes on average, finished or at work; or all arms together if nothing is known of its own.
    """
    known = {arm: list(seconds) for arm, seconds in finished.items()}
    for run in running:
        if run.pace:
            known.setdefault(run.arm, []).append(run.pace.whole)
    everything = [seconds for arm in known.values() for seconds in arm]
    if not everything:
        return None
    overall = statistics.mean(everything)
    expected = {arm: statistics.mean(seconds) for arm, seconds in known.items() if seconds}
    busy = [run.pace.left if run.pace else max(expected.get(run.arm, overall) - run.seconds, 0.0) for run in running]
    places = busy + [0.0] * (jobs - len(busy))
    heapq.heapify(places)
    for arm in waiting:
        heapq.heapreplace(places, places[0] + expected.get(arm, overall))
    return max(places)


class SuiteProgress:
    """A live bar on a terminal; elsewhere only the line that every run leaves. Arms are named in the order of the runs."""

    def __init__(self, arms: Sequence[str], jobs: int, console: Console, pace: Callable[[Any], Pace | None]) -> None:
        self.total, self.jobs, self.console, self.pace = len(arms), jobs, console, pace
        self.waiting = list(arms)
        self.running: dict[object, tuple[str, float]] = {}  # arm and when it began, by whatever names the run
        self.finished: dict[str, list[float]] = defaultdict(list)
        self.ended = self.failed = 0
        self.bar: Progress | None = None
        self.drawn = -math.inf  # when the bar was last brought up to date
        if console.is_terminal and arms:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True)
            self.task = self.bar.add_task("runs", total=len(arms), note="")

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def begin(self, run: object, arm: str) -> None:
        """A run that was waiting has a place."""
        self.waiting.remove(arm)
        self.running[run] = arm, time.monotonic()

    def end(self, run: object, told: str, ok: bool) -> None:
        """A run is over, in whatever way; `told` goes on the line that it leaves."""
        arm, began = self.running.pop(run)
        seconds = time.monotonic() - began
        self.ended += 1
        if ok:
            pace = self.pace(run)  # a run that was gone on with took less than a whole one does
            self.finished[arm].append(max(seconds, pace.whole) if pace else seconds)
        else:
            self.failed += 1
        left = self.left()
        rest = f"; {left} left" if left else ""
        self.console.print(
            f"[{self.ended}/{self.total}] {run}: {told}, {seconds:.0f} s{rest}", markup=False, soft_wrap=True
        )
        self._draw()

    def show(self) -> None:
        """Bring the bar up to date, once a second however often it is called: each time reads a file of every running run."""
        if time.monotonic() - self.drawn >= 1:
            self._draw()

    def _draw(self) -> None:
        if self.bar:
            self.drawn = time.monotonic()
            left, failed = self.left(), f", {self.failed} FAILED" if self.failed else ""
            note = f"{len(self.running)} running{failed}" + (f", {left} left" if left else "")
            self.bar.update(self.task, completed=self.ended, note=note)

    def left(self) -> str | None:
        """About 0:12:30; None where nothing is left, or nothing can be said yet."""
        if not (self.running or self.waiting):
            return None
        now = time.monotonic()
        running = [Running(arm, now - began, self.pace(run)) for run, (arm, began) in self.running.items()]
        seconds = time_left(self.finished, running, self.waiting, self.jobs)
        return None if seconds is None else f"about {datetime.timedelta(seconds=round(seconds))}"
