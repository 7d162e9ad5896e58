"""Processes that meet, on loopback: the run that two train together is that of one, and seeds are shared by turns."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from resprout.training import ExperimentError, checkpoint
from resprout.training.__main__ import dispatch
from resprout.training.metrics import read_metrics
from resprout.training.processes import Processes

from .runs import agent_state, assert_close, comparable, refused


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def meet(*processes: Processes, patience: float = 20.0) -> list[str]:
    """What each says, in threads; "" for one that goes on."""
    said = [""] * len(processes)

    def one(place: int) -> None:
        try:
            processes[place].meet(patience)
        except ExperimentError as error:
            said[place] = str(error)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_processes_meet_in_any_order() -> None:
    address = f"127.0.0.1:{free_port()}"
    assert meet(*(Processes(3, index, address) for index in (2, 0, 1))) == ["", "", ""]
    assert meet(*(Processes(3, index, address) for index in (0, 1, 2))) == ["", "", ""]  # the port is free again


def test_a_stranger_who_calls_is_none_of_them() -> None:
    address = f"127.0.0.1:{free_port()}"
    said: list[str] = []
    meeting = threading.Thread(target=lambda: said.extend(meet(Processes(2, 0, address))))
    meeting.start()
    for greeting in (b"GET / HTTP/1.1", b""):
        while True:
            with (
                contextlib.suppress(ConnectionRefusedError),
                socket.create_connection(Processes(2, 1, address).address) as one,
            ):
                one.sendall(greeting)
                break
    assert meet(Processes(2, 1, address)) == [""]
    meeting.join()
    assert said == [""]


def test_processes_that_disagree_are_all_told() -> None:
    address = f"127.0.0.1:{free_port()}"
    assert (
        meet(Processes(2, 0, address), Processes(3, 1, address)) == ["process 1 of 3 came to meet process 0 of 2"] * 2
    )
    said = meet(*(Processes(3, index, address) for index in (0, 1, 1)))
    assert said == ["process 1 of 3 came to meet process 0 of 3, and so did another 1"] * 3


@pytest.mark.parametrize("index", [0, 1])
def test_nobody_waits_for_ever(index: int) -> None:
    address = f"127.0.0.1:{free_port()}"
    started = time.monotonic()
    (said,) = meet(Processes(2, index, address), patience=0.5)
    assert said == f"process {index} of 2 waited 0.5 s at {address} for the others"
    assert time.monotonic() - started < 5


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        (said,) = meet(Processes(2, 0, address))
    assert said.startswith(f"process 0 cannot meet at {address}:")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num-processes", "2"), "--num-processes needs --coordinator"),
        (("--coordinator", "localhost:1"), "--coordinator needs --num-processes"),
        (("--coordinator", "localhost", "--num-processes", "2"), "must be HOST:PORT, not localhost"),
        (("--coordinator", "a:99999", "--num-processes", "2"), "must be HOST:PORT, not a:99999"),
        (("--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"), "--process-id must be 0 to 1, not 2"),
        (("--num-processes", "0"), "--num-processes must be at least 1, not 0"),
    ],
)
def test_processes_that_cannot_be(
    flags: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(tmp_path / "run", capsys, *flags)


def test_several_processes_need_one_directory(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--coordinator", "a:1", "--num-processes", "2")
    assert dispatch(["train", "dqn", "--env", "gym/CartPole-v1", *flags]) == 2
    assert "need one --out" in capsys.readouterr().err


# Whole runs

FLAGS = ("--agent.warmup", "60", "--agent.batch-size", "16", "--agent.hidden", "16", "--agent.capacity", "100")
RUN = (*FLAGS, "--log-every", "20", "--checkpoint-every", "100", "--eval-episodes", "0")


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("resprout")), "train", *arguments]


def start(*arguments: str, count: int = 2) -> list[subprocess.Popen[str]]:
    """The same command in `count` processes that meet."""
    meeting = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(count))
    return [
        subprocess.Popen(
            [*command(*arguments, *meeting), "--process-id", str(index)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(count)
    ]


def finish(processes: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    try:
        said = ["\n".join(process.communicate(timeout=600)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("env", ["gym/CartPole-v1", "gymnax/CartPole-v1"])
def test_a_run_of_two_processes_is_that_of_one(env: str, tmp_path: Path) -> None:
    """Up to the order of sums, with surgery; and it goes on, in one process or in two."""
    run = ("dqn", "--env", env, *RUN, "--with", "redo:tau=0.1,period=20,probe=16", "--steps", "120")
    assert dispatch(["train", *run, "--out", str(tmp_path / "one")]) == 0
    said = finish(start(*run, "--out", str(tmp_path / "two")))
    assert "run directory" in said[0] and "run directory" not in said[1]
    assert json.loads((tmp_path / "two" / "config.json").read_text())["shared_by"] == 2

    def agree() -> None:
        one, two = tmp_path / "one", tmp_path / "two"
        assert_close(agent_state(one), agent_state(two), rtol=1e-4, atol=2e-5)
        for left, right in zip(comparable(one), comparable(two), strict=True):
            assert left == pytest.approx(right, rel=1e-3, abs=1e-4, nan_ok=True)

    agree()
    finish(start("--resume", str(tmp_path / "two"), "--steps", "160"))
    subprocess.run(command("--resume", str(tmp_path / "one"), "--steps", "160"), check=True)
    agree()
    said = finish(start("--resume", str(tmp_path / "two"), "--steps", "160"), code=2)
    assert "is complete at 160 agent steps" in said[0] and "another process could not begin" in said[1]


@pytest.mark.slow
def test_a_signal_to_one_stops_both_with_one_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    both = start("dqn", "--env", "gym/CartPole-v1", *RUN, "--steps", "10000000", "--out", str(out))
    while not read_metrics(out / "metrics.jsonl"):
        assert all(process.poll() is None for process in both)
        time.sleep(0.1)
    both[1].send_signal(signal.SIGINT)
    said = finish(both, code=130)
    assert all(f"resprout train --resume {out}" in each for each in said)
    steps = max(80, int(checkpoint.newest(out / "checkpoints")[0].name) + 20)  # beyond the warm-up
    assert dispatch(["train", "--resume", str(out), "--steps", str(steps)]) == 0
    assert json.loads((out / "summary.json").read_text())["agent_steps"] == steps


@pytest.mark.slow
@pytest.mark.parametrize(("env", "mode"), [("gymnax/CartPole-v1", "vmap"), ("gym/CartPole-v1", "processes")])
def test_seeds_are_shared_by_turns(env: str, mode: str, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    flags = ("dqn", "--env", env, *FLAGS, "--steps", "300", "--eval-episodes", "0", "--log-every", "100")
    said = finish(start(*flags, "--seeds", "0,1,5", "--seeds-mode", mode, "--out", str(out)))
    assert "s0" in said[0] and "s5" in said[0] and "s1" in said[1]
    assert json.loads((out / "seeds.json").read_text())["seeds"] == [0, 1, 5]
    assert (out / "curve.png").stat().st_size > 5_000
    for seed in (0, 1, 5):
        assert json.loads((out / f"s{seed}" / "summary.json").read_text())["agent_steps"] == 300
        solo = tmp_path / f"solo{seed}"
        assert dispatch(["train", *flags, "--seed", str(seed), "--out", str(solo)]) == 0
        assert_close(agent_state(solo), agent_state(out / f"s{seed}"), rtol=1e-4, atol=2e-5)
    finish(start("--resume", str(out), "--steps", "400", "--seeds-mode", mode))
    assert json.loads((out / "s1" / "summary.json").read_text())["agent_steps"] == 400
