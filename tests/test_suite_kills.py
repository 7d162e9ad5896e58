"""A process of a suite that is killed costs its run, not the suite, and the next call goes on with that run alone."""

import io
import json
import os
import re
import signal
import subprocess
import sys
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


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_ends_with_the_signal_keeps_no_run_from_its_checkpoint(stream, tmp_path):
    """As of Ctrl-C on `resprout bench run ... | tee log`; the run is a process that takes a second to save."""
    saving = tmp_path / "saving.py"
    saving.write_text(SAVING.format(folder=str(tmp_path)))
    program = STOPPED.format(saving=str(saving), out=str(tmp_path / "out"), stream=stream)
    with subprocess.Popen([sys.executable, "-P", "-c", program], **{stream: subprocess.PIPE}) as process:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.05)
        (process.stdout or process.stderr).close()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    assert (tmp_path / "saved").exists()


SAVING = """
import pathlib, signal, sys, time
from resprout.training.process import end_with_parent
folder = pathlib.Path({folder!r})

def save(number, frame):
    time.sleep(1)
    (folder / "saved").touch()
    sys.exit(130)

signal.signal(signal.SIGINT, save)
end_with_parent()
(folder / "begun").touch()
time.sleep(60)
"""
STOPPED = """
import pathlib, subprocess, sys
from rich.console import Console
from resprout.benchmarks import runner
from resprout.benchmarks.suites import SUITES

def start(experiments, cores, environment):
    return subprocess.Popen([sys.executable, {saving!r}], stdin=subprocess.PIPE, start_new_session=True), 0

runner.start = start
suite = SUITES["redo-minatar"]()
every = runner.runs(suite, ["dqn-rr1"], suite.tasks[:1], [0], 100_000, pathlib.Path({out!r}))
runner.run_all(every, 1, False, Console(file=sys.{stream}))
"""


def test_last_words_are_those_of_this_process(tmp_path):
    log = tmp_path / "s0.log"
    log.write_text("of an earlier process\n")
    before = log.stat().st_size
    assert last_words(log, 1, before) == "it said nothing"
    assert last_words(log, -9, before) == "killed by SIGKILL"
    log.write_text("of an earlier process\nTraceback\nValueError: of this one\n\n")
    assert last_words(log, 1, before) == "ValueError: of this one"
