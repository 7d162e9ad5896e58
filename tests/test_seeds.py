"""Several seeds at once: each is its solo run, in processes bit for bit; over forced devices; and one curve of all."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resprout.agents import ACE, DQN
from resprout.training import Experiment, ExperimentError, checkpoint, placement, train
from resprout.training import seeds as seeds_module
from resprout.training.__main__ import dispatch
from resprout.training.files import final_return
from resprout.training.metrics import plot_seeds, read_metrics
from resprout.training.process import start, wait
from resprout.training.run import Run, TrainingStopped
from resprout.training.seeds import _last_in_common, _note, parse_seeds, read_seeds, train_seeds
from resprout.training.sharing import share_seeds

from .runs import agent_state, assert_close, assert_equal, comparable, refused

SMALL = DQN(warmup=100, batch_size=8, hidden=(16,), target_period=10, epsilon_decay_steps=200, capacity=300)


def small(directory: Path, env: str = "gymnax/CartPole-v1", **changes: Any) -> Experiment:
    fields = {"steps": 300, "log_every": 100, "checkpoint_every": 200, "eval_episodes": 0, "out": str(directory)}
    return Experiment(agent=SMALL, env=env, **fields | changes)


@pytest.mark.slow
def test_vmapped_seeds_are_their_solo_runs_and_go_on(tmp_path: Path) -> None:
    """Up to rounding, with surgery; and stopped half-way, bit for bit as not stopped."""
    changes = {"interventions": ("redo:tau=0.1,period=20,probe=16",)}
    together = small(tmp_path / "together", **changes)
    out = train_seeds(together, (3, 7), mode="vmap", quiet=True)
    assert out == tmp_path / "together" and read_seeds(out) == (3, 7) and (out / "curve.png").stat().st_size > 5_000
    for seed in (3, 7):
        solo = small(tmp_path / f"solo{seed}", **changes, seed=seed)
        train(solo, quiet=True)
        assert_close(agent_state(out / f"s{seed}"), agent_state(tmp_path / f"solo{seed}"), rtol=1e-4, atol=1e-5)
        for left, right in zip(comparable(out / f"s{seed}"), comparable(tmp_path / f"solo{seed}"), strict=True):
            assert left == pytest.approx(right, rel=1e-3, abs=1e-4)
        assert json.loads((out / f"s{seed}" / "config.json").read_text())["experiment"]["seed"] == seed
    assert comparable(out / "s3") != comparable(out / "s7")

    half = dataclasses.replace(together, out=str(tmp_path / "half"))
    train_seeds(dataclasses.replace(half, steps=200), (3, 7), mode="vmap", quiet=True)
    for seed in (3, 7):
        (tmp_path / "half" / f"s{seed}" / "summary.json").unlink()
    train_seeds(half, (3, 7), mode="vmap", resume=True, quiet=True)
    for seed in (3, 7):
        assert_equal(agent_state(out / f"s{seed}"), agent_state(tmp_path / "half" / f"s{seed}"))
    # A kill in the last evaluations leaves a summary of some.
    kept = (tmp_path / "half" / "s3" / "summary.json").read_bytes()
    (tmp_path / "half" / "s7" / "summary.json").unlink()
    train_seeds(half, (3, 7), mode="vmap", resume=True, quiet=True)
    assert (tmp_path / "half" / "s3" / "summary.json").read_bytes() == kept
    assert json.loads((tmp_path / "half" / "s7" / "summary.json").read_text())["agent_steps"] == 300
    assert_equal(agent_state(out / "s7"), agent_state(tmp_path / "half" / "s7"))
    train_seeds(half, (3, 7), mode="vmap", resume=True, quiet=True)  # nothing is left to do
    # A kill between the checkpoints of two seeds leaves them at different steps: all go on from the last in common.
    for seed in (3, 7):
        (tmp_path / "half" / f"s{seed}" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "half" / "s7" / "checkpoints" / f"{300:012d}")
    train_seeds(half, (3, 7), mode="vmap", resume=True, quiet=True)
    for seed in (3, 7):
        assert_equal(agent_state(out / f"s{seed}"), agent_state(tmp_path / "half" / f"s{seed}"))
        assert comparable(out / f"s{seed}") == comparable(tmp_path / "half" / f"s{seed}")
        assert {path.name for path in (tmp_path / "half" / f"s{seed}" / "checkpoints").iterdir()} == {
            f"{step:012d}" for step in (200, 300)
        }
        (tmp_path / "half" / f"s{seed}" / "summary.json").unlink()
    # Or one of them is damaged.
    (tmp_path / "half" / "s3" / "checkpoints" / f"{300:012d}" / "host.json").write_text("{}")
    train_seeds(half, (3, 7), mode="vmap", resume=True, quiet=True)
    for seed in (3, 7):
        assert_equal(agent_state(out / f"s{seed}"), agent_state(tmp_path / "half" / f"s{seed}"))
        (tmp_path / "half" / f"s{seed}" / "summary.json").unlink()
    assert (tmp_path / "half" / "s3" / "checkpoints" / f"damaged-{300:012d}").exists()
    assert not (tmp_path / "half" / "s7" / "checkpoints" / f"damaged-{300:012d}").exists()
    shutil.rmtree(tmp_path / "half" / "s3" / "checkpoints" / f"{200:012d}")
    shutil.rmtree(tmp_path / "half" / "s7" / "checkpoints" / f"{300:012d}")
    with pytest.raises(ExperimentError, match=r"different agent steps \(200, 300\).*processes"):
        train_seeds(dataclasses.replace(half, steps=400), (3, 7), mode="vmap", resume=True, quiet=True)


@pytest.mark.slow
def test_a_kill_between_the_checkpoints_of_two_seeds_keeps_one_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one is all that is kept, as in suites."""
    save = checkpoint.save

    def killed(directory: Path, training: Any, *others: Any) -> Path:
        if training.agent_step == 200 and directory.parent.name == "s7":
            raise KeyboardInterrupt
        return save(directory, training, *others)

    changes = {"checkpoint_every": 100, "keep_checkpoints": 1}
    for name, patched in (("whole", save), ("cut", killed)):
        monkeypatch.setattr(checkpoint, "save", patched)
        with pytest.raises(KeyboardInterrupt) if patched is killed else nullcontext():
            train_seeds(small(tmp_path / name, **changes), (3, 7), mode="vmap", quiet=True)
    monkeypatch.setattr(checkpoint, "save", save)
    saved = {seed: checkpoint.names(tmp_path / "cut" / f"s{seed}" / "checkpoints") for seed in (3, 7)}
    assert [int(path.name) for path in saved[3]] == [100, 200] and [int(path.name) for path in saved[7]] == [100]
    train_seeds(small(tmp_path / "cut", **changes), (3, 7), mode="vmap", resume=True, quiet=True)
    for seed in (3, 7):
        assert_equal(agent_state(tmp_path / "whole" / f"s{seed}"), agent_state(tmp_path / "cut" / f"s{seed}"))
        assert [int(path.name) for path in checkpoint.names(tmp_path / "cut" / f"s{seed}" / "checkpoints")] == [300]


@pytest.mark.slow
def test_seeds_in_processes_are_their_solo_runs_bit_for_bit(tmp_path: Path) -> None:
    """On one core each, as the solo run here: the number of threads decides the order of sums."""
    out = train_seeds(small(tmp_path / "apart", "gym/CartPole-v1"), (0, 1, 2), mode="processes", quiet=True)
    for seed in (0, 1, 2):
        solo = small(tmp_path / f"solo{seed}", "gym/CartPole-v1", seed=seed)
        task = {"experiment": solo.to_json(), "cores": [min(os.sched_getaffinity(0))]}
        assert wait(start("resprout.training.one_seed", task, tmp_path / f"solo{seed}.log")[0]) == 0
        assert comparable(out / f"s{seed}") == comparable(tmp_path / f"solo{seed}")
        assert_equal(agent_state(out / f"s{seed}"), agent_state(tmp_path / f"solo{seed}"))
    before = (out / "s1" / "summary.json").stat().st_mtime_ns
    shutil.rmtree(out / "s2")  # what is finished stays, what is missing is trained
    train_seeds(small(out, "gym/CartPole-v1"), (0, 1, 2), mode="processes", resume=True, quiet=True)
    assert (out / "s1" / "summary.json").stat().st_mtime_ns == before
    assert comparable(out / "s2") == comparable(tmp_path / "solo2")


def run_command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("resprout")), "train", *arguments]


@pytest.mark.slow
def test_a_signal_stops_all_processes_and_all_go_on(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    flags = ("--env", "gym/CartPole-v1", "--agent.warmup", "100", "--eval-episodes", "0", "--log-every", "100")
    command = run_command("dqn", *flags, "--steps", "10000000", "--seeds", "0,1", "--out", str(out))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not any(read_metrics(path) for path in out.glob("s*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and f"resprout train --resume {out}" in said.splitlines()[-1]
    saved = [
        int(checkpoint.newest(path / "checkpoints")[0].name)
        for path in out.glob("s*")
        if (path / "checkpoints").exists()
    ]
    subprocess.run(run_command("--resume", str(out), "--steps", str(max(saved) + 100)), check=True)
    assert all(
        json.loads((out / f"s{seed}" / "summary.json").read_text())["agent_steps"] == max(saved) + 100
        for seed in (0, 1)
    )


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Even if that is killed; the same command then goes on."""
    out = tmp_path / "runs"
    flags = ("--env", "gym/CartPole-v1", "--agent.warmup", "100", "--eval-episodes", "0", "--log-every", "100")
    process = subprocess.Popen(run_command("dqn", *flags, "--steps", "10000000", "--seeds", "0,1", "--out", str(out)))
    while not any(read_metrics(path) for path in out.glob("s*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.1)
    begun = [path.parent for path in out.glob("s*/.lock")]
    process.kill()
    process.wait()
    for directory in begun:
        with (directory / ".lock").open() as lock:  # which a process holds for as long as it lives
            deadline = time.monotonic() + 20
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)


@pytest.mark.parametrize(
    ("saved", "step"),
    [
        (([100, 200], [100, 200]), None),  # all as far
        (([100, 200], [100]), 100),
        (([200, 300], [100, 200], [200]), 200),
        (([100, 200, 300], [100]), None),  # further apart than a kill leaves them: nothing is gone back from
        (([200], [100]), None),  # none in common
        (([100], []), None),
    ],
)
def test_the_agent_step_to_go_back_to(
    saved: tuple[list[int], ...], step: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = [small(tmp_path / f"s{seed}", seed=seed, checkpoint_every=100) for seed in range(len(saved))]
    for own, steps in zip(each, saved, strict=True):
        for number in steps:
            Path(str(own.out), "checkpoints", f"{number:012d}").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "_problem", lambda path, with_replay: None)
    assert _last_in_common(each) == step


def command_of(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


@pytest.mark.slow
def test_seeds_in_processes_can_be_trained_from_any_thread(tmp_path: Path) -> None:
    """Where the program that called owns the signals; one that fails says why, that it was killed too."""
    with ThreadPoolExecutor() as pool:
        pool.submit(train_seeds, small(tmp_path / "a", "gym/CartPole-v1"), (0,), mode="processes", quiet=True).result()
        assert json.loads((tmp_path / "a" / "s0" / "summary.json").read_text())["agent_steps"] == 300
        long = small(tmp_path / "b", "gym/CartPole-v1", steps=10_000_000)
        failing = pool.submit(train_seeds, long, (0,), mode="processes", quiet=True)
        while not (
            found := [
                int(path.name)
                for path in Path("/proc").glob("[0-9]*")
                if str(tmp_path / "b").encode() in command_of(path)
            ]
        ):
            assert not failing.done()
            time.sleep(0.1)
        os.kill(found[0], signal.SIGKILL)
        with pytest.raises(TrainingStopped, match="seed 0 failed: killed by SIGKILL"):
            failing.result()


def test_seeds_of_which_the_first_never_began_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What they were is then in the directory of another."""
    (tmp_path / "s1").mkdir()
    (tmp_path / "seeds.json").write_text(json.dumps({"seeds": [0, 1]}))
    (tmp_path / "s1" / "config.json").write_text(json.dumps({"experiment": small(tmp_path, seed=1).to_json()}))
    assert dispatch(["train", "--resume", str(tmp_path), "--agent.gamma", "0.5"]) == 2
    assert "cannot change agent.gamma (it is 0.99, asked for 0.5)" in capsys.readouterr().err


def test_seeds_of_which_none_has_begun_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What they were is then noted beside their numbers: a stop comes while their processes are still starting."""
    out = tmp_path / "runs"
    out.mkdir()
    _note(out, [small(out / f"s{seed}", seed=seed) for seed in (0, 1)])
    assert dispatch(["train", "--resume", str(out), "--agent.gamma", "0.5"]) == 2
    assert "cannot change agent.gamma (it is 0.99, asked for 0.5)" in capsys.readouterr().err
    assert dispatch(["train", "--resume", str(out), "--seeds-mode", "vmap"]) == 0
    for seed in (0, 1):
        assert json.loads((out / f"s{seed}" / "summary.json").read_text())["agent_steps"] == 300
        assert json.loads((out / f"s{seed}" / "config.json").read_text())["experiment"]["seed"] == seed


DEVICES = """
import sys, pathlib, jax
from resprout.agents import ACE, DQN
from resprout.training import Experiment
from resprout.training.seeds import train_seeds
count = int(sys.argv[1])
assert len(jax.local_devices()) == count
agent = DQN(warmup=100, batch_size=8, hidden=(16,), target_period=10, epsilon_decay_steps=200, capacity=300)
experiment = Experiment(agent=agent, env="gymnax/CartPole-v1", steps=300, log_every=100, checkpoint_every=200,
                        eval_episodes=0, out=sys.argv[2])
train_seeds(experiment, range(4), devices=None, quiet=True)
"""


def test_seeds_over_devices_are_the_seeds_of_one(tmp_path: Path) -> None:
    """Four seeds on 2 forced devices (and, slowly, on 4): all that a device does to its seeds is what one alone does."""
    check_devices(tmp_path, 2)


@pytest.mark.slow
def test_seeds_over_four_devices(tmp_path: Path) -> None:
    check_devices(tmp_path, 4)


def check_devices(tmp_path: Path, count: int) -> None:
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    }
    subprocess.run(
        [sys.executable, "-P", "-c", DEVICES, str(count), str(tmp_path / "over")], check=True, env=environment
    )
    train_seeds(small(tmp_path / "one"), range(4), mode="vmap", quiet=True)
    for seed in range(4):
        one, over = (agent_state(tmp_path / name / f"s{seed}") for name in ("one", "over"))
        assert_close(one, over, rtol=1e-4, atol=1e-5)


def test_the_speed_of_seeds_in_one_loop_is_that_of_the_loop(tmp_path: Path) -> None:
    """Whatever the evaluations of the others take."""
    out = train_seeds(small(tmp_path / "out", steps=2_000, eval_episodes=20), (0, 1), mode="vmap", quiet=True)
    speeds = [json.loads((out / f"s{seed}" / "summary.json").read_text())["steps_per_second"] for seed in (0, 1)]
    assert speeds[0] == speeds[1] > 0


def test_evaluations_of_another_seed_are_no_part_of_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, finish = Run.evaluate, Run.finish
    taken: list[float] = []  # by every evaluation, seconds
    paused: list[float] = []  # of the speed of each seed, before its last evaluation

    def timed(run: Run) -> Any:
        began = time.monotonic()
        result = evaluate(run)
        taken.append(time.monotonic() - began)
        return result

    def noted(run: Run, steps_per_second: float) -> Any:
        paused.append(run.speed.paused)
        return finish(run, steps_per_second)

    monkeypatch.setattr(Run, "evaluate", timed)
    monkeypatch.setattr(Run, "finish", noted)
    changes = {"steps": 2_000, "eval_every": 1_000, "eval_episodes": 1}
    train_seeds(small(tmp_path / "out", **changes), (0, 1), mode="vmap", quiet=True)
    assert paused[0] == paused[1] >= sum(taken[:2]) > 0  # those on the way, of both


@pytest.mark.parametrize("env", ["gym/CartPole-v1", "gymnax/CartPole-v1"])
def test_seeds_in_processes_that_have_no_room_together_are_refused(
    env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    monkeypatch.setattr(placement, "available_memory", lambda: 22_000)
    with pytest.raises(ExperimentError, match=r"3 seeds.* fit"):
        train_seeds(small(tmp_path / "out", env), range(4), mode="processes", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_processes_share_the_cores_and_an_accelerator_by_fours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(9)))
    assert seeds_module._shares(1) == [[core] for core in range(9)]
    assert seeds_module._shares(4) == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 1})
    assert seeds_module._shares(4) == [[1, 3]]
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert seeds_module._shares(4) == [[], []]


def test_processes_on_an_accelerator_are_told_their_cores_and_their_part_of_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two seeds where four processes would have room: as many parts as there are processes."""
    started: list[tuple[list[int], str]] = []

    class Failed:
        returncode = 1

        def __init__(self, command: list[str], env: dict[str, str], **options: Any) -> None:
            started.append((json.loads(command[-1])["cores"], env["XLA_PYTHON_CLIENT_MEM_FRACTION"]))

        def poll(self) -> int:
            return 1

        wait, stdin = poll, None

    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setattr(seeds_module.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(seeds_module.subprocess, "Popen", Failed)
    with pytest.raises(TrainingStopped, match="seed 0, 1 failed"):
        train_seeds(small(tmp_path / "out"), (0, 1), mode="processes", quiet=True)
    assert started == [([0, 4, 8, 12], "0.450"), ([1, 5, 9, 13], "0.450")]


@pytest.mark.parametrize(
    ("text", "said"), [("0,x", "numbers with commas"), ("", "numbers with commas"), ("1,2,1", "a seed twice")]
)
def test_seeds_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(ExperimentError, match=said):
        parse_seeds(text)
    assert parse_seeds("3,1") == (3, 1)


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        (
            {"agent": ACE(warmup=100), "env": "gym/Pendulum-v1"},
            {"mode": "vmap"},
            "fitted for one seed at a time: seeds can train in processes only",
        ),
        (
            {"agent": dataclasses.replace(SMALL, n_step=3, warmup=1)},
            {"mode": "vmap"},
            "before a transition is complete",
        ),
        ({"env": "gym/CartPole-v1"}, {"devices": 2}, "that of gym/CartPole-v1 is on the host"),
        (
            {"agent": dataclasses.replace(SMALL, capacity=2**31 - 1), "steps": 2**31 - 1, "loop": "host"},
            {"mode": "vmap"},
            "replays of 2 seeds: .*cannot fit",
        ),
        ({"interventions": ("adaptive_replay_ratio",)}, {"mode": "vmap"}, "a replay ratio of its own"),
        ({}, {"mode": "processes", "devices": 2}, "leave out --seeds-mode processes"),
        ({}, {"mode": "vmap", "devices": 5}, "--devices must be 1 to"),
        (
            {"agent": dataclasses.replace(SMALL, capacity=2**31 - 1), "steps": 2**31 - 1, "loop": "device"},
            {},
            "does not fit",
        ),
    ],
    ids=lambda value: "",
)
def test_what_cannot_be_creates_nothing(changes: Any, arguments: Any, said: str, tmp_path: Path) -> None:
    experiment = dataclasses.replace(small(tmp_path / "run"), **changes)
    with pytest.raises(ValueError, match=said):
        train_seeds(experiment, (0, 1), quiet=True, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("mode", "said"), [("processes", "false"), ("vmap", "")])
def test_who_starts_processes_leaves_them_memory_of_an_accelerator(
    mode: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a variable that JAX reads before it first looks for one."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
    with pytest.raises(ExperimentError, match="--devices"):
        train_seeds(small(tmp_path / "run"), (0, 1), mode=mode, devices=5, quiet=True)
    assert os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "") == said


def test_devices_share_seeds_equally() -> None:
    assert share_seeds(3, 1) is None
    with pytest.raises(ExperimentError, match="--devices must be 1 to"):
        share_seeds(2, 0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--devices", "2000"), "--devices must be 1 to"),
        (("--seeds-mode", "vmap"), "--seeds-mode is for several seeds"),
        (("--seeds", "0,1", "--seed", "3"), "give one of them"),
        (("--seeds", "0,1", "--devices", "two"), "--devices must be a number or all"),
        (("--seeds", "0,0"), "names a seed twice"),
    ],
)
def test_flags_that_contradict(
    flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert said in refused(tmp_path / "run", capsys, *flags, env="gymnax/CartPole-v1")


def two_curves(out: Path) -> list[Path]:
    """The directories of two seeds in `out`."""
    for index, points in enumerate(([(0, 1.0), (20, 3.0)], [(10, 4.0), (30, 8.0)])):
        (out / f"s{index}").mkdir()
        (out / f"s{index}" / "config.json").write_text('{"experiment": {"env": "e", "agent": {"name": "a"}}}')
        lines = "".join(json.dumps({"step": step, "eval/return": value}) + "\n" for step, value in points)
        (out / f"s{index}" / "metrics.jsonl").write_text(lines)
    return [out / "s0", out / "s1"]


def test_two_processes_may_draw_a_curve_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    save, each = Figure.savefig, two_curves(tmp_path)

    def meanwhile(self: Any, *arguments: Any) -> None:
        save(self, *arguments)
        monkeypatch.setattr(Figure, "savefig", save)
        plot_seeds(tmp_path, each)

    monkeypatch.setattr(Figure, "savefig", meanwhile)
    assert plot_seeds(tmp_path, each) == tmp_path / "curve.png"
    assert {path.name for path in tmp_path.iterdir()} == {"s0", "s1", "curve.png"}


@pytest.mark.parametrize(("value", "said"), [(None, "not evaluated"), (-12.34, "return -12.3"), (7, "return 7.0")])
def test_what_is_said_of_a_finished_run(value: float | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"return": value}))
    assert final_return(tmp_path) == said


def test_a_curve_of_seeds_covers_what_all_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values in between are interpolated: seeds end episodes at different steps."""
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    each = two_curves(tmp_path)

    fill = Axes.fill_between

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        drawn.extend(np.asarray(argument).tolist() for argument in arguments)
        return fill(self, *arguments, **options)

    monkeypatch.setattr(Axes, "fill_between", watched)
    assert plot_seeds(tmp_path, each) == tmp_path / "curve.png"
    assert drawn == [[10, 20], [2.0, 3.0], [4.0, 6.0]]
    (tmp_path / "s1" / "metrics.jsonl").write_text("")
    assert plot_seeds(tmp_path, each) is None
