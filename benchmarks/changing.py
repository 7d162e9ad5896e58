"""What suites of changing tasks measure: the return on each task in its turn, the gap to a fresh network, recovery.

All from the mean return of the episodes that ended in equal parts of a run (`results_.Point`), ten to a turn. The area
under the curve of a turn is the mean over its parts. Tasks that take turns have returns of different size, so turns are brought
to one scale (`scaled`) before a mean over them is compared.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..envs.changing_ import parse, sequence
from .results_ import Point, Row
from .sheet import Sheet, cells, notes_on_pairs, verdict
from .stats import Array, differences, stratified_interval

METRIC = "episode/return"
PARTS = 10  # of a turn
RECOVERED = 0.9  # share of the fresh network's gain in a turn
LEARNT = 0.5  # share of its return in a turn's first part that it must gain for recovery to mean something

Turns = dict[str, dict[str, dict[int, Array]]]  # arm -> task -> seed -> [turns, PARTS] return, NaN for none


def training_curves(points: Iterable[Point]) -> dict[tuple[str, str, int], dict[int, float]]:
    """Arm, task, seed -> agent step -> mean return of the training episodes of a part; empty for a run without any."""
    curves: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for point in points:
        if point.metric == METRIC:
            curves[point[:3]][point.step] = point.value
    return curves


def turns_of(rows: Iterable[Row], points: Sequence[Point]) -> Turns:
    """The curves of runs cut at the changes of their task; a last turn that was not whole is left out."""
    curves = training_curves(points)
    turns: Turns = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        curve, period = curves[row.key[1:]], parse(row.task)[1]
        ends = [period * part // PARTS for part in range(1, row.agent_steps // period * PARTS + 1)]
        if curve and ends:
            turns[row.arm][row.task][row.seed] = np.array([curve.get(end, np.nan) for end in ends]).reshape(-1, PARTS)
    return {arm: dict(by_task) for arm, by_task in turns.items()}


def areas(turns: Turns) -> dict[str, dict[str, dict[int, float]]]:
    """arm -> task -> seed -> mean return over all turns."""
    return {
        arm: {task: {seed: float(mean(run)) for seed, run in runs.items()} for task, runs in by_task.items()}
        for arm, by_task in turns.items()
    }


def scaled(turns: Turns, tasks: Sequence[str], reference: str) -> Turns:
    """Every turn over the mean return that `reference` has, in all its runs and turns, on the task whose turn it is.

    ValueError unless that is positive.
    """
    found: Turns = defaultdict(lambda: defaultdict(dict))
    for task in tasks:
        level = levels(np.stack(list(turns[reference][task].values())), task)
        if not np.all(level > 0):
            raise ValueError(
                f"{reference} has a mean return of {min(level):g} on a task of {task}, which cannot be score 1"
            )
        for arm, by_task in turns.items():
            for seed, run in by_task.get(task, {}).items():
                found[arm][task][seed] = run / np.resize(level, len(run))[:, None]
    return {arm: dict(by_task) for arm, by_task in found.items()}


def levels(runs: Array, task: str) -> Array:
    """Mean return on each task of the sequence that had a turn; runs: [runs, turns, parts]."""
    length = min(len(sequence(task)), runs.shape[1])
    return np.array([mean(runs[:, which :: len(sequence(task))]) for which in range(length)])


def mean(values: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Of what was measured; NaN where nothing was."""
    count = (~np.isnan(values)).sum(axis=axis)
    total: Array = np.nansum(values, axis=axis) / np.where(count, count, np.nan)
    return total


def recovery(run: Array, fresh: Array) -> Array:
    """[turns]: parts of a turn up to the first whose return is RECOVERED of the way from `fresh`'s first part to its last.

    run, fresh: [turns, parts]. Infinity where no part of the turn reaches it.
    """
    first, last = fresh[:, :1], fresh[:, -1:]
    reached = run >= first + RECOVERED * (last - first)
    return np.where(reached.any(axis=1), reached.argmax(axis=1) + 1.0, np.inf)


def learnt(fresh: Array) -> NDArray[np.bool_]:
    """[turns]: whether `fresh`, [turns, parts], gains enough (LEARNT) for the level of `recovery` to be more than noise."""
    first, gain = fresh[:, 0], fresh[:, -1] - fresh[:, 0]
    enough: NDArray[np.bool_] = (gain > 0) & (gain >= LEARNT * abs(first))
    return enough


def changing_sheets(turns: Turns, arms: Sequence[str], tasks: Sequence[str], fresh: str) -> list[Sheet]:
    """Returns by turn, and what a change costs each arm beside `fresh`, the arm whose networks begin anew at every change."""
    tasks = [task for task in tasks if any(turns.get(arm, {}).get(task) for arm in arms)]
    made = [sheet for task in tasks for sheet in turns_sheets(turns, arms, task)]
    others = [arm for arm in arms if arm != fresh]
    return made + [change_sheet(turns, others, task, fresh) for task in tasks if turns.get(fresh, {}).get(task)]


def turns_sheets(turns: Turns, arms: Sequence[str], task: str) -> list[Sheet]:
    """Mean over the seeds of the areas, of each turn and of each task that takes turns."""
    runs = {arm: np.stack(list(turns[arm][task].values())) for arm in arms if turns.get(arm, {}).get(task)}
    by_turn = {arm: mean(each, axis=(0, 2)) for arm, each in runs.items()}
    by_task = {arm: levels(each, task) for arm, each in runs.items()}
    made = []
    for title, values, names in (
        ("each turn", by_turn, [f"turn {turn}" for turn in range(1, max(map(len, by_turn.values())) + 1)]),
        ("all turns of each task", by_task, sequence(task)[: max(map(len, by_task.values()))]),
    ):
        lines = [(arm, str(len(runs[arm])), *(f"{value:.2f}" for value in each)) for arm, each in values.items()]
        made.append(Sheet(f"{task}: mean return of the episodes of {title}", ("arm", "runs", *names), lines))
    return made


def change_sheet(turns: Turns, arms: Sequence[str], task: str, fresh: str) -> Sheet:
    """After the first turn: gap to the fresh network of the same seed, and how soon its gain is caught up with."""
    period, lines, every = parse(task)[1], [], []
    try:
        measured, unit = scaled(turns, [task], fresh), f"{fresh}'s mean return on the task whose turn it is"
    except ValueError:
        measured, unit = turns, "raw return"
    level = mean(np.stack(list(turns[fresh][task].values())), axis=0)[1:]
    counts = learnt(level)
    for arm in arms:
        own, theirs = (
            {seed: float(mean(run[1:])) for seed, run in measured.get(each, {}).get(task, {}).items()}
            for each in (arm, fresh)
        )
        gaps = [differences(own, theirs)]
        if not len(gaps[0]):
            continue
        every.append(gaps)
        waits = np.concatenate([recovery(run[1:], level)[counts] for run in turns[arm][task].values()]) * period / PARTS
        interval = stratified_interval(gaps)
        lines.append(
            (
                *(arm, str(len(gaps[0])), *cells(interval, gaps), verdict(interval, gaps)),
                *(
                    (f"{np.minimum(waits, period).mean():,.0f}", f"{np.isinf(waits).mean():.0%}")
                    if len(waits)
                    else ("", "")
                ),
            )
        )
    columns = ("arm", "pairs", f"IQM less {fresh}", "95 % interval", "verdict", "steps to recover", "not in the turn")
    note = (
        f"Interquartile means of paired differences of returns, in units of {unit}. "
        f"To recover is to reach {RECOVERED:.0%} of what {fresh} gains in that turn; a turn of {period:,} steps in which that "
        f"does not happen counts whole, one in which {fresh} gains less than {LEARNT:.0%} of its first return does not count: "
        f"{(~counts).sum()} of {len(counts)}."
    )
    return Sheet(f"{task}: after a change", columns, lines, (note, *notes_on_pairs(every)))
