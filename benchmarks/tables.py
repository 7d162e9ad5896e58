"""Tables of a suite: interquartile means, means by task, paired differences, and published figures beside ours."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..training import Experiment
from .changing import Turns, areas, changing_sheets, scaled, training_curves, turns_of
from .published_ import Column, Published, all_mismatches, normalised
from .results_ import Point, Row, paths, read_curves, read_finished, read_rows
from .sheet import FEW, Sheet, cell, cells, directions, few, notes_on_pairs, plain, score, spread, verdict
from .stats import (
    Array,
    Statistic,
    differences,
    interquartile_mean,
    mean,
    median,
    optimality_gap,
    probability_of_improvement,
    stratified_interval,
)
from .suites import Budget, Suite

UNIT = "The mean return that a task's returns are divided by is taken as it is: the intervals leave out how well it is known."
PAIRS = "Differences of paired seeds"
TRAINING = "training episodes in the last tenth of each run"

# arm -> task -> seed -> mean return of the last evaluation, or while training
Returns = dict[str, dict[str, dict[int, float]]]


# What is finished


def gather(name: str, suite: Suite, out: Path | None, results: Path | None) -> tuple[list[Row], list[Point]]:
    """Rows and curves of run directories and of a folder of results; a run that is in both counts once, as the results have it.

    ValueError in one line where there are none, or where they are not to be compared.
    """
    table, curves = paths(name, results) if results else (None, None)
    stored = read_rows(table) if table else []
    points = read_curves(curves) if curves and curves.exists() else []
    drawn = {point[:3] for point in points}
    found, fresh = read_finished(out, name, suite.arms, suite.width) if out else ([], [])
    if not stored and not found:
        raise ValueError(f"no finished run in {table}; resprout bench run makes some")
    check_rows(name, suite, [*stored, *found])
    rows = {row.key: row for row in [*found, *stored]}
    wanted = {row.key[1:] for row in rows.values()}
    points += [point for point in fresh if point[:3] not in drawn]
    return sorted(rows.values()), [point for point in points if point[:3] in wanted]


def check_comparable(rows: Sequence[Row]) -> None:
    """ValueError, in one line, unless all have one length, one number of evaluation episodes, and one protocol of Atari."""
    check_alike("of different lengths", "has", {row.agent_steps: row for row in reversed(rows)}, " agent steps")
    check_alike("evaluated at different length", "has", {row.episodes: row for row in reversed(rows)}, " episodes")
    atari = [row for row in rows if row.task.startswith("atari/")]
    check_alike("under different Atari protocols", "is under", {row.protocol: row for row in reversed(atari)})


def check_alike(what: str, verb: str, examples: Mapping[Any, Row], unit: str = "") -> None:
    """ValueError, in one line, where `examples`, a row for each value that there is, has several."""
    if len(examples) > 1:
        said = ", ".join(f"{row.directory} {verb} {value}" for value, row in sorted(examples.items()))
        raise ValueError(f"runs {what} are not compared: {said}{unit}")


def check_rows(name: str, suite: Suite, rows: Sequence[Row]) -> None:
    """ValueError, in one line, for rows that are none of the suite's (another suite, arm, task or configuration) or do not go together.

    All arms are those of one budget. Lengths, evaluations and protocols: `check_comparable`.
    """
    misfits: dict[Budget, Row] = {}  # a row that is not of that budget
    for row in rows:
        if row.suite != name:
            raise ValueError(f"{row.directory} is a run of the suite {row.suite}, not of {name}")
        if row.arm not in suite.arms or row.task not in suite.tasks:
            raise ValueError(f"{row.directory}: {name} has no arm {row.arm} on {row.task}")
        others = [budget for budget in suite.steps if row.digest != ours(suite, row, budget).digest()]
        if len(others) == len(suite.steps):
            raise ValueError(f"{row.directory} has another configuration ({row.digest}) than {row.arm} of {name}")
        misfits |= dict.fromkeys(others, row)
    if len(misfits) == len(suite.steps):
        said = " and ".join(f"{row.directory} is not as at the {budget}'s" for budget, row in misfits.items())
        raise ValueError(f"runs at different budgets are not summed up: {said}")
    check_comparable(rows)


def returns_of(suite: Suite, rows: Sequence[Row], points: Sequence[Point]) -> Returns:
    """Arms in the order of the suite, those without a run left out; runs that were not evaluated are no runs.

    Of tasks that change, the mean return over all turns takes the place of the last evaluation.
    """
    turning = areas(changes(suite, rows, points))
    measured = (turning.get(row.arm, {}).get(row.task, {}).get(row.seed, row.final_return) for row in rows)
    return arranged(suite, rows, measured)


def arranged(suite: Suite, rows: Iterable[Row], values: Iterable[float]) -> Returns:
    """A value of each row, NaN for none, under its arm, task and seed; arms in the order of the suite, without a value left out."""
    returns: Returns = {arm: {task: {} for task in suite.tasks} for arm in suite.arms}
    for row, value in zip(rows, values, strict=True):
        if row.arm not in returns or row.task not in returns[row.arm]:
            raise ValueError(f"{row.directory}: the suite has no arm {row.arm} on {row.task}")
        if not np.isnan(value):
            returns[row.arm][row.task][row.seed] = value
    return {arm: by_task for arm, by_task in returns.items() if any(by_task.values())}


def training_returns(suite: Suite, rows: Sequence[Row], points: Sequence[Point]) -> Returns:
    """Mean over the last tenth of each run's curve of returns while training, as `returns_of`; nothing where tasks change.

    An intervention that disturbs the policy is seen throughout its period there, by the last evaluation at one instant of it alone.
    """
    if suite.fresh:
        return {}
    curves = training_curves(points)

    def at_the_end(row: Row) -> float:
        last = [value for step, value in curves[row.key[1:]].items() if step > 0.9 * row.agent_steps]
        return float(np.mean(last)) if last else np.nan

    return arranged(suite, rows, map(at_the_end, rows))


def changes(suite: Suite, rows: Sequence[Row], points: Sequence[Point]) -> Turns:
    """The curves of runs cut at the changes of their task; empty where tasks stay."""
    return turns_of(rows, points) if suite.fresh else {}


# One scale for several tasks


def scale_arm(returns: Returns, tasks: Sequence[str]) -> str:
    """The first arm that has runs on every one of the `tasks`."""
    complete = [arm for arm, by_task in returns.items() if all(by_task[task] for task in tasks)]
    if not complete:
        raise ValueError("no arm has a finished run on every task, so tasks cannot be brought to one scale yet")
    return complete[0]


def scales(returns: Returns, tasks: Sequence[str]) -> dict[str, float]:
    """What is score 1 on each task: the mean return of the `scale_arm`. ValueError unless it is positive."""
    arm = scale_arm(returns, tasks)
    found = {task: float(np.mean(list(returns[arm][task].values()))) for task in tasks}
    for task, scale in found.items():
        if not scale > 0:
            raise ValueError(f"{arm} has a mean return of {scale:g} on {task}, which cannot be score 1")
    return found


def to_scores(suite: Suite, returns: Returns, tasks: Sequence[str], turns: Turns) -> tuple[Returns, str]:
    """The returns of `whole_seeds` on one scale, and the name of it; turns: of `changes`. ValueError if there is none.

    Those of a single task stay as they are.
    """
    scores, unit = _scaled(suite, returns, tasks, turns)
    return {arm: whole_seeds(by_task) for arm, by_task in scores.items()}, unit


def whole_seeds(by_task: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """The runs of those seeds that every task with runs has; all runs if there is no such seed.

    In an interquartile mean of all runs a task with more of them would count more.
    """
    of_each = [set(runs) for runs in by_task.values() if runs]
    whole = set.intersection(*of_each) if of_each else set()
    if not whole:
        return by_task
    return {task: {seed: value for seed, value in runs.items() if seed in whole} for task, runs in by_task.items()}


def _scaled(suite: Suite, returns: Returns, tasks: Sequence[str], turns: Turns) -> tuple[Returns, str]:
    if suite.human:
        relative = {
            arm: {task: {seed: normalised(task, value) for seed, value in by_task[task].items()} for task in tasks}
            for arm, by_task in returns.items()
        }
        return relative, "human-normalised score"
    if suite.fresh:
        reference = scale_arm(returns, tasks)
        found = areas(scaled(turns, tasks, reference))
        relative = {arm: {task: found.get(arm, {}).get(task, {}) for task in tasks} for arm in returns}
        return relative, f"return / mean return of {reference} on the task whose turn it is"
    if len(tasks) == 1:
        return returns, "return"
    scale, reference = scales(returns, tasks), scale_arm(returns, tasks)
    relative = {
        arm: {task: {seed: value / scale[task] for seed, value in by_task[task].items()} for task in tasks}
        for arm, by_task in returns.items()
    }
    return relative, f"return / mean return of {reference} on the task"


# Sheets


def sheets(suite: Suite, rows: Sequence[Row], points: Sequence[Point]) -> list[Sheet]:
    """All that is said of a suite's rows, and of their curves where its tasks change."""
    returns = returns_of(suite, rows, points)
    tasks = [task for task in suite.tasks if any(by_task[task] for by_task in returns.values())]
    if not tasks:
        raise ValueError("no run was evaluated")
    turns = changes(suite, rows, points)
    means = means_sheet(suite, returns, tasks)
    made = [dataclasses.replace(means, notes=(run_length(rows), *notes_on_rows(rows, returns)))]
    try:
        scores, unit = to_scores(suite, returns, tasks, turns)
    except ValueError as problem:  # the means by task can be told all the same
        made[0] = dataclasses.replace(made[0], notes=(*made[0].notes, f"No interquartile means: {problem}."))
        scores = {}
    else:
        made = [arms_sheet(suite, scores, tasks, unit, returns), *made]
        made += pairs_sheets(suite, scores, unit, tasks, training_returns(suite, rows, points))
    made += turn_sheets(suite, returns, turns, tasks)
    experiments = {(row.arm, row.task): ours(suite, row) for row in rows}
    return made + published_sheets(suite, returns, scores, tasks, experiments)


def measured(suite: Suite) -> str:
    """What `returns_of` are returns of."""
    return "Episodes of all turns" if suite.fresh else "Last evaluation"


def run_length(rows: Sequence[Row]) -> str:
    """Of the runs and of their evaluation, which all have in common."""
    episodes = f", evaluated by {rows[0].episodes:,} episodes" if rows[0].episodes else ""
    return f"Runs of {rows[0].agent_steps:,} agent steps{episodes}."


def notes_on_rows(rows: Sequence[Row], returns: Returns) -> tuple[str, ...]:
    """What to say of runs without a value, and of environments that are of several versions; returns: of `returns_of`."""
    valued = sum(len(runs) for by_task in returns.values() for runs in by_task.values())
    missing = f"{len(rows) - valued} of {len(rows)} runs"
    notes = (f"Left out, for they were not evaluated or lack the curve that tells what they returned: {missing}.",)
    versions: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.environment:
            versions[row.task].add(row.environment)
    several = [f"{task} of {' and of '.join(sorted(each))}" for task, each in versions.items() if len(each) > 1]
    said = (f"≠ Runs under several versions of an environment: {'; '.join(several)}.",)
    return notes * (valued < len(rows)) + said * bool(several)


def turn_sheets(suite: Suite, returns: Returns, turns: Turns, tasks: Sequence[str]) -> list[Sheet]:
    """Returns by turn, gap to a fresh network and recovery; none where tasks stay."""
    return changing_sheets(turns, list(returns), tasks, suite.fresh) if suite.fresh else []


def ours(suite: Suite, row: Row, budget: Budget = "laptop") -> Experiment[Any]:
    """The experiment that the suite has for a row."""
    return suite.experiment(row.arm, row.task, row.seed, row.agent_steps, row.directory, budget)


def arrays(by_task: dict[str, dict[int, float]], tasks: Sequence[str]) -> list[Array]:
    return [np.array(list(by_task[task].values()), np.float64) for task in tasks]


def arms_sheet(suite: Suite, scores: Returns, tasks: Sequence[str], unit: str, returns: Returns) -> Sheet:
    """Interquartile mean of every arm with its interval, and other statistics where there are several tasks.

    returns: those that `scores` are of.
    """
    extra = {"mean": mean, "median": median} if len(tasks) > 1 else {}
    extra |= {"optimality gap": optimality_gap} if suite.human else {}
    lines = []
    for arm, by_task in scores.items():
        runs = [task for task in arrays(by_task, tasks) if len(task)]
        complete = len(runs) == len(tasks)
        lines.append(
            (
                arm if complete else f"{arm} (of {len(runs)} tasks)",
                str(sum(map(len, runs))),
                *cells(stratified_interval(runs), runs),
                *(f"{float(statistic(runs)):.3f}" for statistic in extra.values()),
            )
        )
    columns = ("arm", "runs", "IQM", "95 % interval", *extra)
    notes = (FEW,) * few(*(arrays(by_task, tasks) for by_task in scores.values()))
    kept, all_runs = (
        sum(len(runs) for by_task in of.values() for runs in by_task.values()) for of in (scores, returns)
    )
    notes += ("Over all tasks, here and in what follows: the seeds of an arm that each of its tasks has.",) * (
        kept < all_runs
    )
    notes += (UNIT,) * (not suite.human and (len(tasks) > 1 or suite.fresh is not None))
    return Sheet(f"{measured(suite)}: IQM of {unit}", columns, lines, notes)


def means_sheet(suite: Suite, returns: Returns, tasks: Sequence[str]) -> Sheet:
    """Mean of the runs with their standard deviation; the longer of arms and tasks goes downwards."""
    names = [task.partition("/")[2] for task in tasks]
    most = max(len(by_task[task]) for by_task in returns.values() for task in tasks)

    def told(runs: dict[int, float]) -> str:
        return spread(list(runs.values())) + f" ({of_runs(len(runs))})" * (0 < len(runs) < most)

    grid = [[told(by_task[task]) for task in tasks] for by_task in returns.values()]
    title = f"{measured(suite)}: mean return of {of_runs(most)}, and standard deviation"
    if len(tasks) > len(returns):
        lines = [(name, *column) for name, column in zip(names, zip(*grid, strict=True), strict=True)]
        return Sheet(title, ("task", *returns), lines)
    lines = [(arm, *line) for arm, line in zip(returns, grid, strict=True)]
    return Sheet(title, ("arm", *names), lines)


def of_runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def pairs_sheets(suite: Suite, scores: Returns, unit: str, tasks: Sequence[str], training: Returns) -> list[Sheet]:
    """Differences of paired seeds, of the scores in that unit and of `training_returns`, where there are pairs."""
    made = [differences_sheet(suite, scores, tasks, f"{PAIRS}, {measured(suite).lower()}: {unit}")]
    tasks = [task for task in tasks if any(by_task[task] for by_task in training.values())]
    with suppress(ValueError):  # no arm has a positive return on every task
        scores, unit = to_scores(suite, training, tasks, {})
        made.append(differences_sheet(suite, scores, tasks, f"{PAIRS}, {TRAINING}: {unit}"))
    return [sheet for sheet in made if sheet]


def differences_sheet(suite: Suite, scores: Returns, tasks: Sequence[str], title: str) -> Sheet | None:
    """Every arm less its baseline over the seeds that both have, and how likely a run of it beats one of the baseline."""
    lines, every = [], []
    for arm, baseline in suite.baselines.items():
        if arm in scores and baseline in scores:
            paired = [differences(scores[arm][task], scores[baseline][task]) for task in tasks]
            every.append(paired)
            own, others = arrays(scores[arm], tasks), arrays(scores[baseline], tasks)
            better = cell(probability_of_improvement(own, others), [*own, *others], "{:.2f}".format)
            interval = stratified_interval(paired)
            having = sum(len(pairs) > 0 for pairs in paired)
            ways = ("{} / {}".format(*directions(paired)),) * (len(tasks) > 1)
            part = f"\n(of {having} tasks)" if 0 < having < len(tasks) else ""
            lines.append(
                (
                    *(f"{arm}\n- {baseline}{part}", str(sum(map(len, paired))), *cells(interval, paired)),
                    *(*ways, verdict(interval, paired), better),
                )
            )
    ways = ("tasks up / down",) * (len(tasks) > 1)
    columns = ("arm less baseline", "pairs", "IQM", "95 % interval", *ways, "verdict", "P(better), 95 %")
    return Sheet(title, columns, lines, notes_on_pairs(every)) if lines else None


def published_sheets(
    suite: Suite,
    returns: Returns,
    scores: Returns,
    tasks: Sequence[str],
    experiments: dict[tuple[str, str], Experiment[Any]],
) -> list[Sheet]:
    """Ours beside theirs, a sheet for each protocol of theirs; what differs from our protocol stands below it."""
    groups: dict[tuple[Any, ...], list[tuple[Published, Experiment[Any], tuple[str, ...]]]] = defaultdict(list)
    for arm, column in suite.published.items():
        for theirs, task, our_cell in beside(suite, arm, column, returns, scores, tasks):
            protocol = (theirs.source, theirs.metric, theirs.budget, theirs.sticky, theirs.life_loss_terminal)
            experiment = experiments[arm, task if task in tasks else next(t for a, t in experiments if a == arm)]
            label = task.partition("/")[2] if task in tasks else task
            their_cell = plain(theirs.mean) + (f" ± {plain(theirs.std)}" if theirs.std is not None else "")
            if theirs.ci_low is not None and theirs.ci_high is not None:
                their_cell += f" ({plain(theirs.ci_low)} to {plain(theirs.ci_high)})"
            their_cell += f", {of_runs(theirs.runs)}" if theirs.runs is not None else ""
            their_cell += " [recalled]" if theirs.evidence == "memory" else ""
            name = f"{theirs.agent}, {theirs.variant}" if theirs.variant else theirs.agent
            groups[protocol].append((theirs, experiment, (label, arm, our_cell, name, their_cell)))
    made = []
    for (source, metric, *_), lines in groups.items():
        theirs = lines[0][0]
        length = "a length not stated" if theirs.agent_steps is None else f"{theirs.agent_steps:,} agent steps"
        differs = all_mismatches((theirs, experiment) for theirs, experiment, _ in lines)
        note = (
            f"≠ Their protocol differs: {'; '.join(differs)}."
            if differs
            else "No difference in version, length, sticky actions, ends at a lost life, or training and evaluation."
        )
        made.append(
            Sheet(
                f"Beside {source}: {metric} after {length}" + (" ≠" if differs else ""),
                ("task", "arm", "ours", "theirs", "published"),
                [line for *_, line in lines],
                (note,),
            )
        )
    return made


def beside(
    suite: Suite, arm: str, column: Column, returns: Returns, scores: Returns, tasks: Sequence[str]
) -> Iterable[tuple[Published, str, str]]:
    """(theirs, task or aggregate, ours) wherever both are; an aggregate only when every task of the suite has a run of ours."""
    if arm not in returns:
        return
    for task in tasks:
        theirs = column.of(task)
        if theirs and returns[arm][task]:
            values = list(returns[arm][task].values())
            yield theirs, task, f"{spread(values)}, {of_runs(len(values))}"
    own = scores.get(arm, {}) if suite.human else whole_seeds(returns[arm])
    metrics: dict[str, Statistic] = {"iqm_return": interquartile_mean}
    if suite.human:
        metrics = {"iqm_hns": interquartile_mean, "mean_hns": mean, "median_hns": median}
    if not all(own.get(task) for task in suite.tasks):
        return
    for metric, statistic in metrics.items():
        found = dataclasses.replace(column, metric=metric).value(f"ALL({len(suite.tasks)})")
        if found:
            runs = arrays(own, suite.tasks)
            shown = score if suite.human else plain
            interval = cell(stratified_interval(runs, statistic=statistic), runs, shown)
            own_cell = f"{interval}, {of_runs(min(map(len, runs)))}"
            yield found, f"{metric.partition('_')[0]}, {len(suite.tasks)} tasks", own_cell


def command(name: str, suite: Suite, rows: Sequence[Row]) -> str:
    """The shell command of which these rows are the runs, or "some runs of" it."""
    at_laptop = all(row.digest == ours(suite, row).digest() for row in rows)
    budget: Budget = "laptop" if at_laptop else "paper"
    chosen: dict[str, tuple[Sequence[Any], Iterable[Any]]] = {
        "--steps": ([rows[0].agent_steps], [suite.steps[budget]]),
        "--arms": ([arm for arm in suite.arms if any(row.arm == arm for row in rows)], suite.arms),
        "--tasks": ([task for task in suite.tasks if any(row.task == task for row in rows)], suite.tasks_of(budget)),
        "--seeds": (sorted({row.seed for row in rows}), suite.seeds_of(budget)),
    }
    flags = [" ".join([flag, *map(str, given)]) for flag, (given, usual) in chosen.items() if given != list(usual)]
    line = " ".join([f"resprout bench run {name}", *["--budget paper"] * (not at_laptop), *flags])
    whole = math.prod(len(given) for given, _ in list(chosen.values())[1:])
    return line if len(rows) == whole else f"some runs of {line}"


def rows_sheet(rows: Sequence[Row], returns: Returns) -> Sheet:
    """Where every number comes from; returns: of `returns_of`."""
    columns = (
        "arm",
        "task",
        "seed",
        "return",
        "agent steps",
        "protocol",
        "environment",
        "run directory",
        "digest",
        "commit",
        "finished",
    )
    lines = [
        (
            *(
                row.arm,
                row.task,
                str(row.seed),
                f"{own[row.seed]:.6g}" if row.seed in own else "",
                str(row.agent_steps),
            ),
            *(row.protocol, row.environment, row.directory, row.digest, " ".join(row.commits), row.finished),
        )
        for row in rows
        for own in (returns.get(row.arm, {}).get(row.task, {}),)
    ]
    return Sheet("Runs", columns, lines)
