"""Runs a suite, each run in a process of its own.

    OUT/ARM/FAMILY-TASK/s0/       run directory; its replay is dropped once the run is finished
    OUT/ARM/FAMILY-TASK/s0.log    what the process said

What is finished is left alone, what was begun goes on where it was, so that the same command can be given again and again.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ..training import Experiment
from ..training.files import final_return, read_record
from ..training.metrics import lenient
from ..training.process import end_with_parent, environment_with, last_words, signals, wait
from ..training.process import start as start_process
from .progress import Pace, SuiteProgress
from .suites import Budget, Suite

POLL = 0.2  # seconds between looks at the running processes
TAIL = 65_536  # bytes of a file of metrics in which its last line is whole


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
    if read_record(config, digest=str)["digest"] != run.experiment.digest():
        raise ValueError(f"{run.directory} holds a run of another experiment; give another --out")
    if not summary.exists():
        return False
    steps = read_record(summary, agent_steps=int)["agent_steps"]
    if steps < run.experiment.steps and not (run.directory / "replay").exists():
        raise ValueError(
            f"{run.directory} was finished at {steps} agent steps without --keep-replay; give another --out"
        )
    if steps >= run.experiment.steps + run.experiment.num_envs:  # the last step is one of every environment
        raise ValueError(f"{run.directory} was finished at {steps} agent steps, which is more; give another --out")
    return bool(steps >= run.experiment.steps)


class Batch(tuple[Run, ...]):
    """What one process trains: a run, or seeds of an arm on a task."""

    def __str__(self) -> str:
        first, *others = self
        return f"{first.arm} {first.task} seeds {' '.join(str(run.seed) for run in self)}" if others else str(first)


def seeds_together(pending: Sequence[Run]) -> list[Batch]:
    """The seeds of an arm on a task as one batch, in the order of the first of each."""
    batches: dict[tuple[str, str], list[Run]] = {}
    for run in pending:
        batches.setdefault((run.arm, run.task), []).append(run)
    return list(map(Batch, batches.values()))


class Failure(NamedTuple):
    run: Run
    last_words: str
    log: Path


@signals(signal.default_int_handler)
def run_all(
    pending: Sequence[Run], jobs: int, keep_replay: bool, console: Console, together: bool = False
) -> list[Failure]:
    """Run what is pending in at most `jobs` processes at a time, each on cores of its own; the runs that failed.

    together: the seeds of an arm on a task in one process, which is faster on an accelerator, but stops with any of them.
    A process that crashes, is killed or stops at a NaN stops no other; the next call goes on with its runs.
    A signal stops all of them, each after a checkpoint; KeyboardInterrupt once they have stopped. If this process is killed they end
    at once, too.
    """
    cores = sorted(os.sched_getaffinity(0))
    batches = seeds_together(pending) if together else [Batch([run]) for run in pending]
    waiting = list(reversed(batches))
    running: dict[int, tuple[Batch, subprocess.Popen[bytes], int]] = {}  # by place: which share of the cores
    failures: list[Failure] = []
    environment = environment_with(1 / max(1, min(jobs, len(batches))))
    try:
        arms = [batch[0].arm for batch in batches]
        with SuiteProgress(arms, jobs, console, lambda batch: pace(batch[0])) as progress:
            while waiting or running:
                for place in range(jobs):
                    if waiting and place not in running:
                        batch = waiting.pop()
                        share = cores[place::jobs] or [cores[place % len(cores)]]
                        log_path(batch[0]).parent.mkdir(parents=True, exist_ok=True)
                        running[place] = (batch, *start([run.experiment for run in batch], share, environment))
                        progress.begin(batch, batch[0].arm)
                time.sleep(POLL)
                progress.show()
                for place, (batch, process, said_before) in list(running.items()):
                    if process.poll() is None:
                        continue
                    wait(process)
                    del running[place]
                    failed = [run for run in batch if process.returncode and not is_finished(run)]
                    if failed:
                        log = log_path(batch[0])
                        words = last_words(log, process.returncode, said_before)
                        failures += [Failure(run, words, log) for run in failed]
                    told = [conclude(run, keep_replay) for run in batch if run not in failed]
                    progress.end(batch, "FAILED" if failed else ", ".join(told), ok=not failed)
    finally:
        for _, process, _ in running.values():
            process.send_signal(signal.SIGINT)
        if stopped := [run for batch, _, _ in running.values() for run in batch]:
            with lenient():
                console.print(f"stopping {len(stopped)} run{'s' * (len(stopped) > 1)}, each after a checkpoint")
        for _, process, _ in running.values():
            wait(process)
        conclude_finished(stopped, keep_replay)
    return failures


def start(
    experiments: Sequence[Experiment[Any]], cores: list[int], environment: dict[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], int]:
    """A process that trains these and ends at the latest when this one does, and the length of its log so far."""
    task = {"experiments": [experiment.to_json() for experiment in experiments], "cores": cores}
    log = Path(str(experiments[0].out)).with_suffix(".log")
    return start_process("resprout.benchmarks.runner", task, log, environment)


def work(task: dict[str, Any]) -> None:
    """What the process does: its runs, each from its newest checkpoint if it was begun before."""
    os.sched_setaffinity(0, task["cores"])  # before JAX counts them
    end_with_parent()
    first, *others = map(Experiment.from_json, task["experiments"])
    train_together([first, *others]) if others else train_one(first)


def train_one(experiment: Experiment[Any]) -> None:
    """Begin a run or go on with it, and say which in the log."""
    from ..training import train
    from ..training.checkpoint import names

    directory = Path(str(experiment.out))
    begun = (directory / "config.json").exists()
    saved = names(directory / "checkpoints")
    print(f"from agent step {int(saved[-1].name) if saved else 0} on {platform.node()}", flush=True)
    train(experiment, resume=directory if begun else None, quiet=True)


def train_together(experiments: Sequence[Experiment[Any]]) -> None:
    """Experiments that differ in their seeds alone, side by side, or one after the other where they cannot be."""
    from ..training.seeds import SeedsApart, train_seeds

    first = experiments[0]
    seeds = [experiment.seed for experiment in experiments]
    print(f"seeds {' '.join(map(str, seeds))} side by side on {platform.node()}", flush=True)
    everything = replace(first, out=str(Path(str(first.out)).parent))
    try:
        train_seeds(everything, seeds, mode="vmap", resume=True, quiet=True)
    except SeedsApart as apart:
        print(f"{apart.reason}: one seed after the other", flush=True)
        for experiment in experiments:
            train_one(experiment)


def conclude(run: Run, keep_replay: bool) -> str:
    """What is left to do when a run is finished, and what to say of it."""
    if not (keep_replay or run.experiment.save_replay):
        shutil.rmtree(run.directory / "replay", ignore_errors=True)
    return final_return(run.directory)


def conclude_finished(stopped: Sequence[Run], keep_replay: bool) -> None:
    """Of runs that were told to stop, those that were over before the signal came."""
    for run in stopped:
        if is_finished(run):
            conclude(run, keep_replay)


def pace(run: Run) -> Pace | None:
    """By the last line of its metrics; None while there is none with a speed."""
    path, steps = run.directory / "metrics.jsonl", run.experiment.steps
    try:
        with path.open("rb") as file:
            file.seek(-min(TAIL, path.stat().st_size), os.SEEK_END)
            line = json.loads(file.read().split(b"\n")[-2])  # the last may be half written
        speed = line["steps_per_second"]
        return Pace(whole=steps / speed, left=max(steps - line["step"], 0) / speed)
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError):  # there is none yet, or none of a speed
        return None


def log_path(run: Run) -> Path:
    return run.directory.with_suffix(".log")


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
