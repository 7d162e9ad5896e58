"""The loop and the run around it, on real environments: counts, one trace, exact resume, interruption, bad numbers."""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from resprout.agents import DQN, SAC
from resprout.training import Experiment, ExperimentError, TrainingStopped, checkpoint, train
from resprout.training import run as run_module
from resprout.training.metrics import MetricsFile, read_metrics
from resprout.training.process import signals

from .runs import assert_equal, comparable

DQN_SMALL = DQN(warmup=100, batch_size=8, hidden=(16,), target_period=10, epsilon_decay_steps=200, capacity=300)
SAC_SMALL = SAC(warmup=100, batch_size=8, hidden=(16, 16), capacity=300, n_step=3)


def small(agent: Any, env: str, directory: Path, **changes: Any) -> Experiment:
    """A run of 400 agent steps with a checkpoint at every 200."""
    fields = {"steps": 400, "log_every": 100, "checkpoint_every": 200, "eval_episodes": 0, "out": str(directory)}
    return Experiment(agent=agent, env=env, **fields | changes)


def cut_after(directory: Path, step: int) -> None:
    """Leave a run directory as a kill -9 right after the checkpoint at `step` would."""
    for path in checkpoint.names(directory / "checkpoints"):
        if int(path.name) > step:
            shutil.rmtree(path)
    (directory / "summary.json").unlink()


@pytest.mark.parametrize(
    ("agent", "env", "changes"),
    [
        pytest.param(DQN_SMALL, "minatar/Breakout", {"num_envs": 2}, marks=pytest.mark.slow),
        (DQN(**{**vars(DQN_SMALL), "n_step": 3}), "gym/CartPole-v1", {}),
        pytest.param(
            DQN(**{**vars(DQN_SMALL), "double": True, "dueling": True}),
            "atari/Pong",
            {"steps": 300, "checkpoint_every": 150},
            marks=pytest.mark.slow,
        ),
        pytest.param(SAC_SMALL, "gym/Pendulum-v1", {"sync": True}, marks=pytest.mark.slow),
        pytest.param(SAC_SMALL, "gym/Hopper-v5", {"num_envs": 2}, marks=pytest.mark.slow),
        pytest.param(SAC_SMALL, "mujoco/Hopper-v5", {}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resumed_run_equals_one_never_stopped(agent: Any, env: str, changes: Any, tmp_path: Path) -> None:
    whole = train(small(agent, env, tmp_path / "whole", **changes), quiet=True)
    halved = small(agent, env, tmp_path / "halved", **changes)
    train(halved, quiet=True)
    cut_after(tmp_path / "halved", halved.checkpoint_every)
    resumed = train(halved, resume=tmp_path / "halved", quiet=True)
    assert_equal(whole.state, resumed.state)
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "halved")


@pytest.mark.parametrize("env", ["gym/CartPole-v1", pytest.param("minatar/Asterix", marks=pytest.mark.slow)])
def test_a_finished_run_goes_on_as_if_it_had_been_longer(env: str, tmp_path: Path) -> None:
    """These environments are captured whole, so a checkpoint anywhere leaves the run as it was."""
    whole = train(small(DQN_SMALL, env, tmp_path / "whole", checkpoint_every=0), quiet=True)
    train(small(DQN_SMALL, env, tmp_path / "half", checkpoint_every=0, steps=250), quiet=True)
    longer = small(DQN_SMALL, env, tmp_path / "half", checkpoint_every=0)
    resumed = train(longer, resume=tmp_path / "half", quiet=True)
    assert_equal(whole.state, resumed.state)
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "half")


def test_a_longer_run_has_the_evaluation_at_the_end_of_the_shorter_one(tmp_path: Path) -> None:
    """As a run that was so long from the beginning has; the last one of the shorter run came after the owed gradient steps."""
    changes: dict[str, Any] = {"checkpoint_every": 0, "eval_every": 125, "eval_episodes": 2}
    train(small(DQN_SMALL, "gym/CartPole-v1", tmp_path / "whole", **changes), quiet=True)
    train(small(DQN_SMALL, "gym/CartPole-v1", tmp_path / "half", steps=250, **changes), quiet=True)
    longer = small(DQN_SMALL, "gym/CartPole-v1", tmp_path / "half", **changes)
    train(longer, resume=tmp_path / "half", quiet=True)
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "half")
    evaluated = [line["step"] for line in comparable(tmp_path / "half") if "eval/return" in line]
    assert 250 in evaluated and len(evaluated) == len(set(evaluated))


def test_a_terminal_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bar goes on, and what a program prints after training is on its standard output still."""
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    before = sys.stdout
    train(small(DQN_SMALL, "gym/CartPole-v1", tmp_path / "run"))
    assert sys.stdout is before
    for thread in threading.enumerate():
        if "Refresh" in type(thread).__name__:
            thread.join(timeout=10)  # told to end, and not waited for
            assert not thread.is_alive()


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("resprout")), *arguments]


CLI_RUNS = {
    "dqn": ("dqn", "--env", "minatar/Breakout", "--agent.warmup", "100", "--agent.capacity", "5000"),
    "sac": (
        "sac",
        "--env",
        "mujoco/Hopper-v5",
        "--agent.warmup",
        "100",
        "--agent.hidden",
        "16",
        "16",
        "--agent.batch-size",
        "32",
    ),
}
# a fit starts at agent step 1,400 and enters at 2,090: the checkpoint at 1,500 holds it
FIT = ("--agent.causal-every", "700", "--agent.causal-rows", "500", "--agent.causal-delay", "690")
CLI_RUNS["ace"] = ("ace", *CLI_RUNS["sac"][1:], *FIT)


@pytest.mark.slow
@pytest.mark.parametrize("agent", CLI_RUNS)
def test_kill_nine_then_resume_equals_one_never_stopped(agent: str, tmp_path: Path) -> None:
    flags = ("--steps", "3000", "--checkpoint-every", "1500", "--eval-episodes", "0")
    subprocess.run(command("train", *CLI_RUNS[agent], *flags, "--out", str(tmp_path / "whole")), check=True)
    killed = subprocess.Popen(command("train", *CLI_RUNS[agent], *flags, "--out", str(tmp_path / "killed")))
    first = tmp_path / "killed" / "checkpoints" / f"{1500:012d}"
    while not first.exists():
        assert killed.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    subprocess.run(command("train", "--resume", str(tmp_path / "killed")), check=True)
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "killed")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    states = []
    for name in ("whole", "killed"):
        path, complaints = checkpoint.newest(tmp_path / name / "checkpoints")
        assert not complaints
        with ocp.StandardCheckpointer() as checkpointer:
            states.append(checkpointer.restore(path / "state"))
    assert_equal(*states)
    assert config["digest"] == json.loads((tmp_path / "killed" / "config.json").read_text())["digest"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_says_how_to_go_on(number: int, code: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ("--steps", "10000000", "--eval-episodes", "0", "--log-every", "100", "--out", str(out))
    process = subprocess.Popen(command("train", *CLI_RUNS["dqn"], *flags), stderr=subprocess.PIPE, text=True)
    while not read_metrics(out / "metrics.jsonl"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert f"resprout train --resume {out}" in said.splitlines()[-1]
    step = int(checkpoint.newest(out / "checkpoints")[0].name)
    subprocess.run(command("train", "--resume", str(out), "--steps", str(step + 200)), check=True)
    assert json.loads((out / "summary.json").read_text())["agent_steps"] == step + 200


def test_a_signal_in_the_last_checkpoint_stops_once_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        save(*arguments)

    run = small(DQN_SMALL, "gym/CartPole-v1", tmp_path / "run", checkpoint_every=0)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", interrupted)
        with pytest.raises(run_module.Interrupted) as stop:
            train(run, quiet=True)
    assert stop.value.exit_code == 143 and int(checkpoint.newest(tmp_path / "run" / "checkpoints")[0].name) == 400
    assert not (tmp_path / "run" / "summary.json").exists()
    train(run, resume=tmp_path / "run", quiet=True)
    train(dataclasses.replace(run, out=str(tmp_path / "whole")), quiet=True)
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")


def test_fewer_steps_than_were_taken_are_refused(tmp_path: Path) -> None:
    """Also where the replay would be smaller, too, as on the device."""
    run = small(DQN(warmup=100, batch_size=8, hidden=(16,), capacity=1_000), "gymnax/CartPole-v1", tmp_path / "run")
    train(run, quiet=True)
    with pytest.raises(ExperimentError, match="is complete at 400 agent steps; give more --steps"):
        train(dataclasses.replace(run, steps=200), resume=tmp_path / "run", quiet=True)


def test_the_commit_is_that_of_a_checkout_which_knows_the_code(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    file, other = tmp_path / "run.py", tmp_path / "other.py"
    monkeypatch.setattr(run_module, "__file__", str(file))
    for path in (file, other):
        path.write_text("")
    assert run_module._git_commit() is None
    git("init", "--quiet")
    git("add", "other.py")
    git("commit", "--quiet", "--message", "other")
    assert run_module._git_commit() is None  # as of a package installed inside a project of somebody's
    git("add", "run.py")
    git("commit", "--quiet", "--message", "run")
    git("tag", "v1")
    head = git("rev-parse", "HEAD")
    assert run_module._git_commit() == head
    other.write_text("changed")
    assert run_module._git_commit() == f"{head}+dirty"


def test_a_signal_in_an_evaluation_ends_it_and_whoever_goes_on_begins_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, games = run_module.evaluate, []

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        games.append("begun")
        result = evaluate(*arguments)
        games.append("ended")
        return result

    run = small(DQN_SMALL, "gym/CartPole-v1", tmp_path / "run", eval_every=200, eval_episodes=2)
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "evaluate", interrupted)
        with pytest.raises(run_module.Interrupted):
            train(run, quiet=True)
    assert games == ["begun"]
    assert int(checkpoint.newest(tmp_path / "run" / "checkpoints")[0].name) == 200
    assert not any("eval/return" in line for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    train(run, resume=tmp_path / "run", quiet=True)
    train(dataclasses.replace(run, out=str(tmp_path / "whole")), quiet=True)
    lines = comparable(tmp_path / "run")
    assert sorted(lines, key=str) == sorted(comparable(tmp_path / "whole"), key=str)
    assert any("eval/return" in line and line["step"] == 200 for line in lines)


@pytest.mark.parametrize("closed", ["stderr", "both"])
def test_a_reader_that_ends_with_the_signal_does_not_keep_a_run_from_its_checkpoint(
    closed: str, tmp_path: Path
) -> None:
    """As of Ctrl-C on `resprout train ... 2>&1 | tee log`, which ends both."""
    out = tmp_path / "run"
    flags = ("--steps", "10000000", "--eval-episodes", "0", "--log-every", "100", "--out", str(out))
    streams = {"stderr": subprocess.PIPE} | ({"stdout": subprocess.PIPE} if closed == "both" else {})
    with subprocess.Popen(command("train", *CLI_RUNS["dqn"], *flags), **streams) as process:
        while not read_metrics(out / "metrics.jsonl"):
            assert process.poll() is None
            time.sleep(0.05)
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert checkpoint.newest(out / "checkpoints")[1] == []


def test_a_terminal_that_is_closed_ends_a_run_after_a_checkpoint(tmp_path: Path) -> None:
    """As that of a lost connection: nothing more can be said there, and the shell sends SIGHUP once more."""
    out = tmp_path / "run"
    flags = ("--steps", "10000000", "--eval-episodes", "0", "--log-every", "100", "--out", str(out))
    owning = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    started = [sys.executable, "-c", owning, *command("train", *CLI_RUNS["dqn"], *flags)]
    ours, theirs = os.openpty()
    with subprocess.Popen(started, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        os.set_blocking(ours, False)
        while not read_metrics(out / "metrics.jsonl"):
            assert process.poll() is None
            with contextlib.suppress(BlockingIOError):  # nothing new; unread, it would have the run wait
                os.read(ours, 65_536)
            time.sleep(0.05)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert checkpoint.newest(out / "checkpoints")[1] == []


def test_the_first_hang_up_counts_and_none_where_they_are_ignored() -> None:
    received: list[int] = []
    before = signal.getsignal(signal.SIGHUP)
    with signals(lambda number, frame: received.append(number)):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
    assert received == [signal.SIGHUP] and signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        with signals(lambda number, frame: received.append(number)) as previous:
            signal.raise_signal(signal.SIGHUP)
        assert received == [signal.SIGHUP] and signal.SIGHUP not in previous
    finally:
        signal.signal(signal.SIGHUP, before)


SLEEPY = """
import time
from pathlib import Path
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Sleepy(CartPoleEnv):
    taken = 0

    def step(self, action):
        self.taken += 1
        if self.taken > 300:
            Path("asleep").touch()
            time.sleep(600)
        return super().step(action)

gymnasium.register("Sleepy-v0", Sleepy, max_episode_steps=500)
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_run_at_once(second: int, tmp_path: Path) -> None:
    """Of either kind, and in a job that a shell has started in the background, where SIGINT is ignored from the start."""
    out = tmp_path / "run"
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    flags = ("--steps", "10000", "--log-every", "100", "--eval-episodes", "0", "--env", "gym/sleepy:Sleepy-v0")
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    run = command("train", "dqn", "--agent.warmup", "100", *flags, "--sync", "--out", str(out))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    started = [sys.executable, "-c", ignoring, *run]
    with subprocess.Popen(started, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        assert process.stderr is not None
        while not (tmp_path / "asleep").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert any("once more to stop at once" in line for line in iter(process.stderr.readline, ""))
        process.send_signal(second)
        assert process.wait(timeout=60) == -second


@pytest.mark.parametrize(("ratio", "num_envs"), [(0.25, 1), (0.3, 2), (2.0, 1), (0.1, 3)])
@pytest.mark.parametrize("sync", [True, False])
def test_replay_ratio_is_paid_exactly(ratio: float, num_envs: int, sync: bool, tmp_path: Path) -> None:
    experiment = small(
        DQN_SMALL, "gym/CartPole-v1", tmp_path / "run", replay_ratio=ratio, num_envs=num_envs, sync=sync, steps=402
    )
    result = train(experiment, quiet=True)
    learning_steps = sum(num_envs for step in range(num_envs, 403, num_envs) if step > DQN_SMALL.warmup)
    assert result.summary["gradient_steps"] == int(learning_steps * ratio + 1e-9)


@pytest.mark.parametrize("sync", [True, False])
def test_an_action_is_at_most_one_agent_step_behind(
    sync: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = run_module.compile_functions, []

    def watched(*arguments: Any) -> Any:
        compiled = original(*arguments)

        def act(state: Any, observation: Any, agent_step: Any) -> Any:
            seen.append((int(agent_step), int(state.gradient_step)))
            return compiled.act(state, observation, agent_step)

        return dataclasses.replace(compiled, act=act)

    monkeypatch.setattr(run_module, "compile_functions", watched)
    train(small(DQN_SMALL, "gym/CartPole-v1", tmp_path / "run", replay_ratio=2, sync=sync, steps=150), quiet=True)
    behind = 0 if sync else 1
    assert seen == [(step, 2 * max(0, step - DQN_SMALL.warmup - behind)) for step in range(DQN_SMALL.warmup, 150)]


def test_functions_are_traced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = run_module.compile_functions, collections.Counter[str]()

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return call

    def watched(experiment: Any, spec: Any, agent: Any, sampler: Any, *rest: Any) -> Any:
        agent = agent._replace(act=counted("act", agent.act), update=counted("update", agent.update))
        sampler = sampler._replace(add=counted("add", sampler.add), sample=counted("sample", sampler.sample))
        return original(experiment, spec, agent, sampler, *rest)

    monkeypatch.setattr(run_module, "compile_functions", watched)
    agent = DQN(**{**vars(DQN_SMALL), "n_step": 3})  # episode ends write several transitions at once
    train(small(agent, "gym/CartPole-v1", tmp_path / "run", num_envs=2), quiet=True)
    # `act` once more, to see which arrays of the state it reads
    assert calls == {"act": 2, "update": 1, "add": 1, "sample": 1}


@pytest.mark.slow
def test_watching_leaves_training_bit_identical(tmp_path: Path) -> None:
    plain = train(small(SAC_SMALL, "gym/Pendulum-v1", tmp_path / "plain"), quiet=True)
    watched = small(
        SAC_SMALL, "gym/Pendulum-v1", tmp_path / "watched", eval_every=50, eval_episodes=2, log_every=30,
        checkpoint_every=70,
    )  # fmt: skip
    assert_equal(plain.state, train(watched, quiet=True).state)


def test_seeds_repeat_and_differ(tmp_path: Path) -> None:
    runs = [
        train(small(DQN_SMALL, "gym/CartPole-v1", tmp_path / str(index), seed=seed), quiet=True)
        for index, seed in enumerate((3, 3, 4))
    ]
    assert_equal(runs[0].state, runs[1].state)
    lines = [comparable(run.directory) for run in runs]
    assert lines[0] == lines[1] != lines[2]
    kernels = [jax.tree.leaves(run.state.critic.params)[-1] for run in runs]
    assert not np.array_equal(kernels[0], kernels[2])


DIVERGING = DQN(**{**vars(DQN_SMALL), "learning_rate": 1e30, "loss": "mse"})


def test_a_metric_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match=r"critic/\w+ became (nan|inf) at gradient step \d+; .*checkpoint"):
        train(small(DIVERGING, "gym/CartPole-v1", tmp_path / "run"), quiet=True)


def test_gradient_steps_that_are_not_finite_can_be_skipped(tmp_path: Path) -> None:
    result = train(small(DIVERGING, "gym/CartPole-v1", tmp_path / "run", on_nan="skip"), quiet=True)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state))
    assert sum(line["updates/skipped"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")) > 0


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    experiment = small(DQN_SMALL, "gym/CartPole-v1", tmp_path / "run")
    whole = train(experiment, quiet=True)
    last = checkpoint.names(tmp_path / "run" / "checkpoints")[-1]
    victim = max((path for path in (last / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    resumed = train(experiment, resume=tmp_path / "run")
    assert f"checkpoint {last} is damaged" in capfd.readouterr().err
    assert_equal(whole.state, resumed.state)
    for path in checkpoint.names(tmp_path / "run" / "checkpoints"):
        (path / "manifest.json").write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match="no readable checkpoint"):
        train(experiment, resume=tmp_path / "run", quiet=True)


def test_a_checkpoint_costs_what_is_new(tmp_path: Path) -> None:
    """Each transition is written once, however many checkpoints hold it, and goes when none does."""
    agent = DQN(**{**vars(DQN_SMALL), "capacity": 250})
    experiment = small(agent, "minatar/Breakout", tmp_path / "run", checkpoint_every=50, keep_checkpoints=1)
    written: dict[str, int] = {}
    original = checkpoint._publish

    def publish(temporary: Path, final: Path) -> None:
        assert final.name not in written
        written[final.name] = 1
        original(temporary, final)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_publish", publish)
        train(experiment, quiet=True)
    spans = [tuple(map(int, name.split("-"))) for name in written if "-" in name]
    assert spans == [(start, start + 50) for start in range(0, 400, 50)]
    left = sorted(path.name for path in (tmp_path / "run" / "replay").iterdir())
    assert left == [f"{start:012d}-{start + 50:012d}" for start in range(150, 400, 50)]


def test_a_disk_that_is_full_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the disk: the state of the second checkpoint cannot be written."""
    original = checkpoint._save_state

    def save_state(path: Path, state: Any) -> None:
        if path.parent.name == f".{400:012d}":
            raise OSError(errno.ENOSPC, "No space left on device")  # tensorstore's ValueError becomes one as well
        original(path, state)

    whole = train(small(DQN_SMALL, "gym/CartPole-v1", tmp_path / "whole", steps=600), quiet=True)
    experiment = small(DQN_SMALL, "gym/CartPole-v1", tmp_path / "run", steps=600)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_save_state", save_state)
        with pytest.raises(TrainingStopped, match=r"No space left.*last good checkpoint is .*000200; make room"):
            train(experiment, quiet=True)
    assert_equal(whole.state, train(experiment, resume=tmp_path / "run", quiet=True).state)


def test_a_write_that_fails_is_an_os_error(tmp_path: Path) -> None:
    """Files may not grow beyond a megabyte, and the state is one of three."""
    state = {"x": np.random.default_rng(0).random(400_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large|os_error_code='27'|EFBIG"):
            checkpoint._save_state(tmp_path / "state", state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_another_process_or_experiment_is_kept_out(tmp_path: Path) -> None:
    experiment = small(DQN_SMALL, "gym/CartPole-v1", tmp_path / "run", steps=150)
    train(experiment, quiet=True)
    other = dataclasses.replace(experiment, seed=1, steps=300)
    with pytest.raises(ExperimentError, match="is a run of another experiment"):
        train(other, resume=tmp_path / "run", quiet=True)
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ExperimentError, match="in use by another process"):
            train(dataclasses.replace(experiment, steps=300), resume=tmp_path / "run", quiet=True)


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x"')
    assert read_metrics(path) == [{"step": 1}]
    file = MetricsFile(path, keep_bytes=12)
    file.write({"step": 3})
    file.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]


def test_a_run_stopped_in_its_last_evaluation_is_finished_by_resume(tmp_path: Path) -> None:
    experiment = small(DQN_SMALL, "gym/CartPole-v1", tmp_path / "run", eval_episodes=2)
    whole = train(experiment, quiet=True)
    (tmp_path / "run" / "summary.json").unlink()
    resumed = train(experiment, resume=tmp_path / "run", quiet=True)
    assert resumed.evaluation == whole.evaluation
    assert_equal(whole.state, resumed.state)


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    experiment = small(DQN_SMALL, "gym/CartPole-v1", tmp_path / "run", steps=150)
    train(experiment, quiet=True)
    with pytest.raises(ExperimentError, match="complete at 150 agent steps; give more --steps"):
        train(experiment, resume=tmp_path / "run", quiet=True)


def test_experiment_survives_its_file() -> None:
    experiment = Experiment(agent=SAC(hidden=(8, 9)), env="mujoco/Hopper-v5", replay_ratio=0.5)
    assert Experiment.from_json(json.loads(json.dumps(experiment.to_json()))) == experiment
