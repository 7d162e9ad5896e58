"""A process of a suite that is killed costs its run, not the suite, and the next call goes on with that run alone."""

import io
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from resprout.agents import DQN
from resprout.benchmarks import runner
from resprout.benchmarks.suites import Suite
from resprout.training import Experiment, ExperimentError
from resprout.training.process import last_words
from resprout.training.run import new_directory

TASK, STEPS = "gym/CartPole-v1", 3_000
AGENT = DQN(warmup=200, batch_size=8, hidden=(8,), capacity=1_000, epsilon_decay_steps=500)
ARM = Experiment(agent=AGENT, env=TASK, eval_episodes=2, eval_every=0, checkpoint_every=200, keep_checkpoints=2)
SUITE = Suite(arms={"a": ARM}, tasks=(TASK,), seeds=(0, 1, 2), steps={"laptop": STEPS, "paper": STEPS}, baselines={})


def process_of(directory: Path) -> int:
    """The process that trains in `directory`."""
    found = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"resprout.benchmarks.runner" in path.read_bytes() and str(directory).encode() in path.read_bytes()
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
def test_a_killed_run_is_lost_alone_and_gone_on_with(tmp_path):
    every = runner.runs(SUITE, ["a"], [TASK], SUITE.seeds, STEPS, tmp_path)
    victim = every[0]
    reached: list[int] = []

    def kill() -> None:
        while not reached:
            reached.extend(int(path.name) for path in (victim.directory / "checkpoints").glob("[0-9]*"))
            time.sleep(0.05)
        os.kill(process_of(victim.directory), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    console = Console(file=io.StringIO(), width=200)
    (failure,) = runner.run_all(every, jobs=2, keep_replay=False, console=console)
    assert failure.run == victim and failure.last_words == "killed by SIGKILL"
    assert "a gym/CartPole-v1 seed 0: FAILED" in console.file.getvalue() and "[3/3]" in console.file.getvalue()
    assert [runner.is_finished(run) for run in every] == [False, True, True]

    finished = {run: (run.directory / "summary.json").stat().st_mtime_ns for run in every[1:]}
    pending = [run for run in every if not runner.is_finished(run)]
    assert pending == [victim]
    assert runner.run_all(pending, jobs=2, keep_replay=False, console=console) == []
    assert all(runner.is_finished(run) for run in every)
    assert {run: (run.directory / "summary.json").stat().st_mtime_ns for run in every[1:]} == finished
    begun, gone_on = map(int, re.findall(r"from agent step (\d+) on", runner.log_path(victim).read_text()))
    assert begun == 0 and gone_on >= max(reached) > 0
    steps = [json.loads(line)["step"] for line in (victim.directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == STEPS


def test_what_a_kill_in_the_first_instant_leaves_is_no_run_yet(tmp_path):
    experiment = Experiment(agent=AGENT, env=TASK, steps=STEPS, out=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.json.tmp").touch()
    assert new_directory(experiment) == tmp_path / "run"
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(ExperimentError, match="exists already"):
        new_directory(experiment)


def test_last_words_are_those_of_this_process(tmp_path):
    log = tmp_path / "s0.log"
    log.write_text("of an earlier process\n")
    before = log.stat().st_size
    assert last_words(log, 1, before) == "it said nothing"
    assert last_words(log, -9, before) == "killed by SIGKILL"
    log.write_text("of an earlier process\nTraceback\nValueError: of this one\n\n")
    assert last_words(log, 1, before) == "ValueError: of this one"
