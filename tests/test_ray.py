"""Suites on a real Ray cluster of this machine: nodes that are killed, addresses at which there is none."""

import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from resprout.agents import DQN
from resprout.benchmarks import ray_, runner
from resprout.benchmarks.suites import Suite
from resprout.training import Experiment
from resprout.training import __main__ as command_line

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed; it is an extra")
TASK = "gym/CartPole-v1"
AGENT = DQN(warmup=200, batch_size=8, hidden=(8,), capacity=1_000, epsilon_decay_steps=500)
LONG = Experiment(agent=AGENT, env=TASK, eval_episodes=2, eval_every=0, checkpoint_every=200, keep_checkpoints=2)
SUITE = Suite(arms={"a": LONG}, tasks=(TASK,), seeds=(0, 1, 2), steps={"laptop": 12_000, "paper": 12_000}, baselines={})


# What must be right before anything begins


@pytest.mark.parametrize(
    ("resources", "needs", "places"),
    [
        ([{"CPU": 4}], ray_.Needs(), 4),
        ([{"CPU": 4}, {"CPU": 3}], ray_.Needs(cpus=2), 3),  # no run on parts of two nodes
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8}], ray_.Needs(gpus=1), 2),
        ([{"CPU": 8, "GPU": 2}], ray_.Needs(gpus=0.4), 4),  # two on each GPU
        ([{"CPU": 3, "GPU": 2}], ray_.Needs(gpus=0.5), 3),
        ([{"CPU": 8, "GPU": 5}], ray_.Needs(gpus=2), 2),
    ],
)
def test_places_by_hand(resources, needs, places):
    nodes = [{"Alive": True, "Resources": has} for has in resources]
    assert ray_.count_places([*nodes, {"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}], needs) == places


def test_no_node_is_large_enough():
    with pytest.raises(ValueError, match="no node has 2 CPUs and 1 GPUs for a run; there are: 8 CPUs, 0 GPUs"):
        ray_.count_places([{"Alive": True, "Resources": {"CPU": 8}}], ray_.Needs(2, 1))


def test_cores_are_claimed_once_and_given_back_at_the_end_of_a_process():
    code = "from resprout.benchmarks.ray_ import claim_cores; print(claim_cores(1)); print(claim_cores(10**6))"
    outputs = [
        subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True) for _ in "ab"
    ]
    assert outputs[0].stdout == outputs[1].stdout
    first, none = outputs[0].stdout.split("\n")[:2]
    assert set(json.loads(first)) < os.sched_getaffinity(0) | {-1} and none == "[]"


@pytest.fixture(scope="module")
def silent_port():
    """A server that accepts and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


RUN = ["bench", "run", "errr-minatar", "--arms", "dqn-mu2-wr", "--seeds", "0", "--ray"]


@needs_ray
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        (["nowhere"], "--ray must be local, auto or HOST:PORT, not 'nowhere'"),
        (["http://here:1"], "--ray must be local, auto or HOST:PORT"),
        (["local", "--cpus-per-run", "0"], "--cpus-per-run must be at least 1, not 0"),
        (["local", "--gpus-per-run", "1.5"], "--gpus-per-run must be a fraction of one GPU or a whole number, not 1.5"),
        (["local", "--jobs", "2"], "not allowed with argument --ray"),
        (["local", "--seeds-together"], "--seeds-together is for processes of this machine, not for --ray"),
    ],
)
def test_bad_input_is_one_line_and_creates_nothing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command_line.dispatch([*RUN, *flags]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_ray_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'resprout[ray]'")):
        ray_.check_address("local")


@pytest.mark.parametrize(
    ("gpus", "platforms", "memory"), [(0.0, "cpu", None), (0.5, None, "0.450"), (1.0, None, None), (2.0, None, None)]
)
def test_a_run_is_told_its_part_of_a_gpu(gpus, platforms, memory, tmp_path, monkeypatch):
    told = {}

    def start(experiments, cores, environment):
        told.update(environment)
        return subprocess.Popen(["true"], stdin=subprocess.PIPE), 0

    for name in ("JAX_PLATFORMS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray_, "start", start)
    monkeypatch.setattr(ray_, "claim_cores", lambda count: [])
    (run, *_) = runner.runs(SUITE, ["a"], [TASK], [0], 12_000, tmp_path)
    ray_.work(run.experiment.to_json(), ray_.Needs(gpus=gpus))
    assert (told.get("JAX_PLATFORMS"), told.get("XLA_PYTHON_CLIENT_MEM_FRACTION")) == (platforms, memory)


@needs_ray
@pytest.mark.slow
def test_a_server_that_is_no_cluster_does_not_keep_us(silent_port, monkeypatch):
    monkeypatch.setattr(ray_, "JOIN", 8.0)
    began = time.monotonic()
    with pytest.raises(ValueError, match="within 8 s"):
        ray_.check_address(f"127.0.0.1:{silent_port}")
    assert time.monotonic() - began < 20


# A real cluster


@pytest.fixture
def cluster():
    """Ray's own control plane and, beside a head without CPUs, two nodes with room for one run each."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80_000_000, "include_log_monitor": False, "include_dashboard": False}
    made = Cluster(initialize_head=False)
    patiently(lambda: made.add_node(num_cpus=0, **small))
    made.nodes = [patiently(lambda: made.add_node(num_cpus=1, **small)) for _ in range(2)]
    yield made
    made.shutdown()


def patiently(start):
    """Ray gives a node 30 seconds to start, which a busy machine may exceed."""
    for _ in range(4):
        try:
            return start()
        except Exception as error:  # noqa: BLE001 - it has no type of its own
            last = error
    raise last


def checkpoint_step(directory: Path) -> int:
    return max((int(path.name) for path in (directory / "checkpoints").glob("[0-9]*")), default=0)


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_node_is_killed_half_way_and_its_run_goes_on_elsewhere(cluster, tmp_path):
    out = tmp_path / "runs"
    every = runner.runs(SUITE, ["a"], [TASK], SUITE.seeds, 12_000, out)
    with pytest.raises(ValueError, match="no node has 7 CPUs"):
        ray_.run_all(every, out, cluster.address, ray_.Needs(cpus=7), False, Console(file=io.StringIO()))
    assert not out.exists()

    killed: list[tuple[int, int]] = []  # seed and newest checkpoint

    def kill() -> None:
        """Without warning, as a machine that loses its power: the node of the first run that has a checkpoint, and all on it."""
        while not any(checkpoint_step(run.directory) for run in every):
            time.sleep(0.1)
        victim = next(run for run in every if checkpoint_step(run.directory))
        run = process_of(victim.directory)
        worker, raylet = parent(run), parent(parent(run))
        assert raylet in [node.all_processes["raylet"][0].process.pid for node in cluster.nodes]
        for process in (raylet, worker, run):
            os.kill(process, signal.SIGKILL)
        killed.append((victim.seed, checkpoint_step(victim.directory)))

    threading.Thread(target=kill, daemon=True).start()
    console = Console(file=io.StringIO(), width=200)
    assert ray_.run_all(every, out, cluster.address, ray_.Needs(), False, console) == []
    said = console.file.getvalue()
    assert "[3/3]" in said and killed
    begins = {run.seed: log_begins(run) for run in every}
    ((seed, newest),) = killed
    assert begins[seed][0] == 0 and begins[seed][1] >= newest > 0, begins
    assert all(len(steps) == 1 for other, steps in begins.items() if other != seed), (
        begins
    )  # the other node lost nothing
    for run in every:
        assert runner.is_finished(run) and not (run.directory / "replay").exists()
        lines = [json.loads(line)["step"] for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
        assert lines == sorted(lines) and lines[-1] == 12_000


def process_of(directory: Path) -> int:
    """The process that trains in `directory`."""
    lines = {path: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()}
    (found,) = [path for path, line in lines.items() if b"benchmarks.runner" in line and bytes(directory) in line]
    return int(found.parent.name)


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def log_begins(run: runner.Run) -> list[int]:
    """The agent steps from which a run was begun or gone on with."""
    return [int(step) for step in re.findall(r"from agent step (\d+) on", runner.log_path(run).read_text())]
