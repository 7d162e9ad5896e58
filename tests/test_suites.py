"""Suites: what they hold, which runs are left to do, how processes are started and stopped, how runs are summed up."""

import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from resprout.agents import DQN
from resprout.benchmarks import runner
from resprout.benchmarks.suites import SUITES, Suite
from resprout.training import Experiment
from resprout.training import __main__ as command_line

SMALL = DQN(warmup=100, batch_size=8, hidden=(8,), capacity=300, epsilon_decay_steps=100)
CARTPOLE = Experiment(agent=SMALL, env="gym/CartPole-v1", eval_episodes=2, eval_every=0, checkpoint_every=0)
TINY = Suite(
    arms={"a": CARTPOLE, "b": dataclasses.replace(CARTPOLE, replay="reshuffled")},
    tasks=("gym/CartPole-v1", "gym/Acrobot-v1"),
    seeds=(0, 1, 2),
    steps={"laptop": 150, "paper": 300},
    baselines={"b": "a"},
)


def finish(out: Path, arm: str, task: str, seed: int, value: float, steps: int = 150) -> None:
    """What a finished run of TINY leaves, as far as it is read."""
    directory = runner.run_directory(out, arm, task, seed)
    directory.mkdir(parents=True)
    experiment = TINY.experiment(arm, task, seed, steps, str(directory))
    (directory / "config.json").write_text(json.dumps({"digest": experiment.digest()}))
    (directory / "summary.json").write_text(json.dumps({"return": value, "agent_steps": steps}))


def rendered(tables) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


# What a suite holds


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_can_be_run(name):
    suite = SUITES[name]()
    assert SUITES[name].__doc__
    assert len(suite.seeds) >= 10 and set(suite.steps) == {"laptop", "paper"}
    assert set(suite.baselines) | set(suite.baselines.values()) <= set(suite.arms)
    for arm in suite.arms:
        for task in suite.tasks:
            suite.experiment(arm, task, 0, suite.steps["laptop"], "out").sampler()


def test_errr_minatar_changes_nothing_but_the_sampler_between_compared_arms():
    suite = SUITES["errr-minatar"]()
    assert len(suite.arms) == 12 and len(suite.tasks) == 5
    for arm, baseline in suite.baselines.items():
        assert suite.arms[baseline].replay == "uniform" != suite.arms[arm].replay
        assert dataclasses.replace(suite.arms[arm], replay="uniform") == suite.arms[baseline]
    draws = {arm.split("-")[1]: arm_.agent.batch_size * arm_.ratio for arm, arm_ in suite.arms.items()}
    assert draws == {"mu8": 8, "mu2": 2}


# What is left to do


def test_runs_go_seed_by_seed_into_directories_of_their_own(tmp_path):
    every = runner.runs(TINY, ["a", "b"], TINY.tasks, [0, 1], 150, tmp_path)
    assert [run.seed for run in every] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len({run.directory for run in every}) == 8
    run = every[1]
    assert (run.arm, run.task, run.directory) == ("b", "gym/CartPole-v1", tmp_path / "b" / "gym-CartPole-v1" / "s0")
    experiment = run.experiment
    assert (experiment.env, experiment.seed, experiment.steps, experiment.replay) == (run.task, 0, 150, "reshuffled")


def test_a_finished_run_is_left_alone_and_a_begun_one_is_not(tmp_path):
    (run, *_) = runner.runs(TINY, ["a"], TINY.tasks, [0], 150, tmp_path)
    assert not runner.is_finished(run)
    finish(tmp_path, "a", TINY.tasks[0], 0, 1.0)
    assert runner.is_finished(run)
    (run.directory / "summary.json").unlink()
    assert not runner.is_finished(run)


def test_a_longer_run_needs_the_replay_of_the_shorter_one(tmp_path):
    finish(tmp_path, "a", TINY.tasks[0], 0, 1.0)
    (run, *_) = runner.runs(TINY, ["a"], TINY.tasks, [0], 300, tmp_path)
    with pytest.raises(ValueError, match="finished at 150 agent steps without --keep-replay"):
        runner.is_finished(run)
    (run.directory / "replay").mkdir()
    assert not runner.is_finished(run)


def test_a_directory_of_another_experiment_is_refused(tmp_path):
    finish(tmp_path, "a", TINY.tasks[0], 0, 1.0)
    other = dataclasses.replace(TINY, arms={"a": dataclasses.replace(CARTPOLE, num_envs=2)})
    (run, *_) = runner.runs(other, ["a"], TINY.tasks, [0], 150, tmp_path)
    with pytest.raises(ValueError, match="another experiment"):
        runner.is_finished(run)


# Summing up


def test_scores_are_relative_to_the_first_arm_that_has_every_task(tmp_path):
    first, second = TINY.tasks
    finish(tmp_path, "a", first, 0, 50.0)  # `a` has no run on the second task
    for seed, (on_first, on_second) in enumerate([(10.0, 4.0), (30.0, 4.0)]):
        finish(tmp_path, "b", first, seed, on_first)
        finish(tmp_path, "b", second, seed, on_second)
    returns = runner.read_returns(TINY, tmp_path)
    assert returns == {"a": {first: {0: 50.0}, second: {}}, "b": {first: {0: 10.0, 1: 30.0}, second: {0: 4.0, 1: 4.0}}}
    assert runner.scales(returns, TINY.tasks) == {first: 20.0, second: 4.0}
    said = rendered(runner.tables(TINY, returns))
    assert "2.500" in said  # 50 / 20
    assert "-2.000" in said  # (10 - 50) / 20


def test_returns_of_a_single_task_stay_as_they_are(tmp_path):
    for seed, value in enumerate([1.0, -3.0]):
        finish(tmp_path, "a", TINY.tasks[0], seed, value)
        finish(tmp_path, "b", TINY.tasks[0], seed, value + 2)
    said = rendered(runner.tables(TINY, runner.read_returns(TINY, tmp_path)))
    assert "-1.000" in said and "-3.000 to 1.000" in said
    assert "2.000 to 2.000" in said and "no difference shown" not in said


def test_an_interval_around_zero_is_called_no_difference(tmp_path):
    for seed, difference in enumerate([-1.0, 1.0, 0.5]):
        finish(tmp_path, "a", TINY.tasks[0], seed, 5.0)
        finish(tmp_path, "b", TINY.tasks[0], seed, 5.0 + difference)
    assert "no difference shown" in rendered(runner.tables(TINY, runner.read_returns(TINY, tmp_path)))


def test_what_cannot_be_summed_up_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        runner.read_returns(TINY, tmp_path)
    finish(tmp_path, "a", TINY.tasks[0], 0, 0.0)
    with pytest.raises(ValueError, match="no arm has a finished run on every task"):
        runner.scales(runner.read_returns(TINY, tmp_path), TINY.tasks)
    finish(tmp_path, "a", TINY.tasks[1], 0, 1.0)
    with pytest.raises(ValueError, match="mean return of 0 on gym/CartPole-v1, which cannot be score 1"):
        runner.scales(runner.read_returns(TINY, tmp_path), TINY.tasks)
    finish(tmp_path, "a", TINY.tasks[0], 1, 1.0, steps=300)
    with pytest.raises(ValueError, match="different lengths"):
        runner.read_returns(TINY, tmp_path)


# Processes


@pytest.mark.slow
def test_one_failure_stops_nothing_and_is_told(tmp_path):
    broken = dataclasses.replace(TINY, arms={"a": CARTPOLE, "broken": dataclasses.replace(CARTPOLE, protocol="none")})
    every = runner.runs(broken, ["broken", "a"], TINY.tasks[:1], [0], 150, tmp_path)
    console = Console(file=io.StringIO(), width=200)
    (failure,) = runner.run_all(every, jobs=2, keep_replay=False, console=console)
    assert failure.run.arm == "broken"
    assert "EnvError" in failure.last_words and failure.log.read_text()
    assert runner.is_finished(every[1])
    assert not (every[1].directory / "replay").exists()
    assert "FAILED" in console.file.getvalue()
    said = rendered(runner.tables(broken, runner.read_returns(broken, tmp_path)))
    assert "broken" not in said


COMMAND = [sys.executable, "-P", "-m", "resprout.training", "bench", "run", "errr-minatar"]
ONE_GAME = ["--tasks", "minatar/Breakout", "--seeds", "0", "1"]


@pytest.mark.slow
def test_end_to_end_stopped_and_gone_on_with(tmp_path):
    flags = ["--arms", "dqn-mu2-wr", "dqn-mu2-rrc", *ONE_GAME, "--steps", "5500", "--jobs", "2", "--out", str(tmp_path)]
    process = subprocess.Popen([*COMMAND, *flags], stdout=subprocess.PIPE, text=True)
    first = tmp_path / "dqn-mu2-wr" / "minatar-Breakout" / "s0"
    metrics = first / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "stopping 2 runs" in said
    assert not (first / "summary.json").exists() and "interrupted" in first.with_suffix(".log").read_text().lower()

    done = subprocess.run([*COMMAND, *flags], check=True, capture_output=True, text=True)
    assert "4 runs of 5500 agent steps, 0 of them finished" in done.stdout
    assert "- dqn-mu2-wr" in done.stdout and "4/4" in done.stdout
    assert json.loads((first / "summary.json").read_text())["agent_steps"] == 5500
    again = subprocess.run([*COMMAND, *flags], check=True, capture_output=True, text=True)
    assert "4 of them finished" in again.stdout
    assert again.stdout.partition("\n")[2] == done.stdout.partition("[4/4]")[2].partition("\n")[2]  # the same tables
    assert command_line.dispatch(["bench", "table", "errr-minatar", "--out", str(tmp_path)]) == 0


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "resprout bench run|table SUITE"),
        (["run"], "which suite?"),
        (["run", "errr-minatra"], "unknown suite 'errr-minatra' (did you mean errr-minatar"),
        (["table", "errr-counts"], "prints its table itself"),
        (["table", "errr-minatar"], "no finished run in runs/errr-minatar"),
        (["run", "errr-minatar", "--budget", "huge"], "--budget"),
        (["run", "errr-minatar", "--jobs", "0"], "--jobs must be at least 1"),
        (["run", "errr-minatar", "--arms", "dqn"], "--arms"),
        (["run", "errr-minatar", "--tasks", "minatar/Pong"], "--tasks"),
        (["run", "errr-minatar", "--steps", "100"], "warm-up of 5000 agent steps"),
        (["run", "errr-minatar", "--seeds", "-1"], "seed must not be negative"),
    ],
)
def test_bad_input_is_one_line_and_creates_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command_line.dispatch(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("resprout: ") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_and_lists(capsys):
    assert command_line.dispatch(["bench"]) == 0
    assert "resprout bench run SUITE" in capsys.readouterr().out
    assert command_line.dispatch(["list", "suites"]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(listed) == {*SUITES, "errr-counts"}
    assert all("Fujita (2025)" in line for line in listed.values())
