"""Runs a suite, each run in a process of its own, and sums up what is finished.

    OUT/ARM/FAMILY-TASK/s0/       run directory; its replay is dropped once the run is finished
    OUT/ARM/FAMILY-TASK/s0.log    what the process said

What is finished is left alone, what was begun goes on where it was, so that the same command can be given again and again.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..training import Experiment
from .stats import Interval, differences, stratified_interval
from .suites import Suite

POLL = 0.2  # seconds between looks at the running processes


@dataclass(frozen=True)
class Run:
    """One arm on one task with one seed."""

    arm: str
    task: str
    seed: int
    experiment: Experiment[Any]

    @property
    def directory(self) -> Path:
        assert self.experiment.out
        return Path(self.experiment.out)

    def __str__(self) -> str:
        return f"{self.arm} {self.task} seed {self.seed}"


def run_directory(out: Path, arm: str, task: str, seed: int) -> Path:
    return out / arm / task.replace("/", "-") / f"s{seed}"


def runs(
    suite: Suite, arms: Sequence[str], tasks: Sequence[str], seeds: Sequence[int], steps: int, out: Path
) -> list[Run]:
    """All of them, seed by seed, so that a suite cut short has some of everything. ValueError if one cannot be."""
    return [
        Run(arm, task, seed, suite.experiment(arm, task, seed, steps, str(run_directory(out, arm, task, seed))))
        for seed in seeds
        for task in tasks
        for arm in arms
    ]


def is_finished(run: Run) -> bool:
    """Whether nothing is left to do; ValueError if its directory holds what cannot become this run."""
    config, summary = run.directory / "config.json", run.directory / "summary.json"
    if not config.exists():
        return False
    if json.loads(config.read_text())["digest"] != run.experiment.digest():
        raise ValueError(f"{run.directory} holds a run of another experiment; give another --out")
    if not summary.exists():
        return False
    steps = json.loads(summary.read_text())["agent_steps"]
    if steps < run.experiment.steps and not (run.directory / "replay").exists():
        raise ValueError(
            f"{run.directory} was finished at {steps} agent steps without --keep-replay; give another --out"
        )
    return bool(steps >= run.experiment.steps)


class Failure(NamedTuple):
    run: Run
    last_words: str
    log: Path


def run_all(pending: Sequence[Run], jobs: int, keep_replay: bool, console: Console) -> list[Failure]:
    """Run what is pending, at most `jobs` at a time, each on cores of its own; the runs that failed.

    A signal stops all of them, each after a checkpoint; KeyboardInterrupt once they have stopped.
    """
    cores = sorted(os.sched_getaffinity(0))
    waiting = list(reversed(pending))
    running: dict[int, tuple[Run, subprocess.Popen[bytes], float]] = {}  # by place: which share of the cores
    failures: list[Failure] = []
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            for place in range(jobs):
                if waiting and place not in running:
                    run = waiting.pop()
                    share = cores[place::jobs] or [cores[place % len(cores)]]
                    running[place] = (run, start(run, share), time.monotonic())
            time.sleep(POLL)
            for place, (run, process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[place]
                done = len(pending) - len(waiting) - len(running)
                if process.returncode:
                    failures.append(Failure(run, last_line(log_path(run)), log_path(run)))
                    told = "FAILED"
                else:
                    told = f"return {final_return(run.directory):.1f}"
                    if not (keep_replay or run.experiment.save_replay):
                        shutil.rmtree(run.directory / "replay")
                console.print(
                    f"[{done}/{len(pending)}] {run}: {told}, {time.monotonic() - started:.0f} s", markup=False
                )
    finally:
        signal.signal(signal.SIGTERM, previous)
        if running:
            console.print(f"stopping {len(running)} runs, each after a checkpoint")
        for _, process, _ in running.values():
            process.send_signal(signal.SIGINT)
        for _, process, _ in running.values():
            process.wait()
    return failures


def start(run: Run, cores: list[int]) -> subprocess.Popen[bytes]:
    """A process in a session of its own: a Ctrl-C of the terminal does not reach it, only our signal does."""
    task = {"experiment": run.experiment.to_json(), "cores": cores}
    command = [sys.executable, "-P", "-m", "resprout.benchmarks.runner", json.dumps(task)]
    log_path(run).parent.mkdir(parents=True, exist_ok=True)
    with log_path(run).open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def work(task: dict[str, Any]) -> None:
    """What the process does: one run, from its newest checkpoint if it was begun before."""
    os.sched_setaffinity(0, task["cores"])  # before JAX counts them
    from ..training import train

    experiment = Experiment.from_json(task["experiment"])
    begun = Path(str(experiment.out), "config.json").exists()
    train(experiment, resume=experiment.out if begun else None, quiet=True)


def log_path(run: Run) -> Path:
    return run.directory.with_suffix(".log")


def last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def final_return(directory: Path) -> float:
    """Mean return of the last evaluation; NaN if there was none."""
    value = json.loads((directory / "summary.json").read_text())["return"]
    return float("nan") if value is None else float(value)


# What is finished, summed up

Returns = dict[str, dict[str, dict[int, float]]]  # arm -> task -> seed -> mean return of the last evaluation


def read_returns(suite: Suite, out: Path) -> Returns:
    """Of all finished runs. ValueError where there are none, or where they are not of one length."""
    returns: Returns = {arm: {task: {} for task in suite.tasks} for arm in suite.arms}
    lengths: dict[int, Path] = {}
    for arm in suite.arms:
        for task in suite.tasks:
            for summary in sorted(run_directory(out, arm, task, 0).parent.glob("s*/summary.json")):
                lengths.setdefault(json.loads(summary.read_text())["agent_steps"], summary.parent)
                returns[arm][task][int(summary.parent.name[1:])] = final_return(summary.parent)
    if not lengths:
        raise ValueError(f"no finished run in {out}; resprout bench run makes some")
    if len(lengths) > 1:
        said = ", ".join(f"{path} has {steps}" for steps, path in sorted(lengths.items()))
        raise ValueError(f"runs of different lengths are not compared: {said} agent steps")
    return {arm: by_task for arm, by_task in returns.items() if any(by_task.values())}


def scale_arm(returns: Returns, tasks: Sequence[str]) -> str | None:
    """The first arm that has runs on every one of the `tasks`; None for a single task, whose returns stay as they are."""
    if len(tasks) == 1:
        return None
    complete = [arm for arm, by_task in returns.items() if all(by_task[task] for task in tasks)]
    if not complete:
        raise ValueError("no arm has a finished run on every task, so tasks cannot be brought to one scale yet")
    return complete[0]


def scales(returns: Returns, tasks: Sequence[str]) -> dict[str, float]:
    """What is score 1 on each task: the mean return of the `scale_arm`. ValueError unless it is positive."""
    arm = scale_arm(returns, tasks)
    found = {task: 1.0 if arm is None else float(np.mean(list(returns[arm][task].values()))) for task in tasks}
    for task, scale in found.items():
        if not scale > 0:
            raise ValueError(f"{arm} has a mean return of {scale:g} on {task}, which cannot be score 1")
    return found


def tables(suite: Suite, returns: Returns) -> list[Table]:
    """Interquartile mean of every arm, its mean on every task, and its differences to its baseline; 95 % intervals."""
    tasks = [task for task in suite.tasks if any(by_task[task] for by_task in returns.values())]
    scale, reference = scales(returns, tasks), scale_arm(returns, tasks)
    unit = "return" if reference is None else f"return / mean return of {reference} on the task"
    arms = Table(*("arm", "runs", "IQM", "95 % interval"), title=f"Last evaluation: IQM of {unit}", box=SIMPLE)
    means = Table("arm", *(task.partition("/")[2] for task in tasks), title="Mean return of the runs", box=SIMPLE)
    for arm, by_task in returns.items():
        interval = stratified_interval([np.array(list(by_task[task].values())) / scale[task] for task in tasks])
        arms.add_row(arm, str(sum(len(seeds) for seeds in by_task.values())), *cells(interval))
        means.add_row(arm, *(f"{np.mean(list(by_task[task].values())):.1f}" if by_task[task] else "" for task in tasks))
    pairs = Table(
        *("arm less baseline", "pairs", "IQM", "95 % interval", ""),
        title="Differences of paired seeds, in the same unit",
        box=SIMPLE,
    )
    for arm, baseline in suite.baselines.items():
        if arm in returns and baseline in returns:
            paired = [differences(returns[arm][task], returns[baseline][task]) / scale[task] for task in tasks]
            interval = stratified_interval(paired)
            pairs.add_row(f"{arm}\n- {baseline}", str(sum(map(len, paired))), *cells(interval), verdict(interval))
    return [arms, means, pairs]


def cells(interval: Interval) -> tuple[str, str]:
    return f"{interval.estimate:.3f}", f"{interval.low:.3f} to {interval.high:.3f}"


def verdict(interval: Interval) -> str:
    if np.isnan(interval.estimate):
        return "no pairs yet"
    return "no difference shown" if interval.low <= 0 <= interval.high else ""


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
