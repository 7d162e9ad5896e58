"""Runs a suite, each run in a process of its own.

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

from rich.console import Console

from ..training import Experiment
from .suites import Budget, Suite

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
    suite: Suite,
    arms: Sequence[str],
    tasks: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    out: Path,
    budget: Budget = "laptop",
) -> list[Run]:
    """All of them, seed by seed, so that a suite cut short has some of everything. ValueError if one cannot be."""
    return [
        Run(arm, task, seed, suite.experiment(arm, task, seed, steps, str(run_directory(out, arm, task, seed)), budget))
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


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
