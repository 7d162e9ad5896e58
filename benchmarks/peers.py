"""Speed beside other frameworks on the same task and machine.

python -m resprout.benchmarks.peers --repeats 5

Runs come in pairs, ours and then the peer's, each in a process of its own, so that a slow minute of the machine meets
both. Speed is agent steps per second with learning on; compilation, random warm-up and evaluation are left out on both
sides. The bare-update limit is the speed that our loop would have if environment, replay and acting cost nothing.

sac-seeds: two seeds at once, each in a process on a core of its own as --seeds 0,1 runs them, beside as many processes of the
peer, pinned likewise; the speed is that of both together. sac-one: the same beside one process of the peer, which has all cores.
"""

import argparse
import csv
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..agents import DQN, SAC
from ..agents.learner import Batch
from ..envs import EnvSpec, make
from ..training import Experiment, train
from ..training.compiled import compiler_options
from ..training.process import prepare_process

WARMUP = 1_000  # agent steps of random actions; few, for only the speed after them is measured
WARM_UPDATES = 20  # gradient steps before the bare update is timed
EPSILON = 0.05  # constant, as in peer_sb3.py: random actions are cheaper, so both sides must take equally many


@dataclass(frozen=True)
class Task:
    """One comparison: our experiment, and the peer's script beside this file with its name for the environment."""

    experiment: Experiment[Any]
    script: str
    env: str
    ours: int = 1  # seeds at a time; several are pinned to a core each
    peers: int = 1  # likewise


@dataclass(frozen=True)
class Pair:
    """Two runs back to back; speeds are agent steps per second of all seeds together."""

    task: str
    repeat: int
    peer: str
    ours_per_second: float
    peer_per_second: float
    ratio: float
    bare_update_limit: float  # of the task, measured once


def tasks() -> dict[str, Task]:
    sac = SAC(hidden=(256, 256), batch_size=256, replay_ratio=1.0, warmup=WARMUP)
    dqn = DQN(
        padding="valid",
        batch_size=32,
        replay_ratio=0.25,
        warmup=WARMUP,
        capacity=100_000,
        epsilon_start=EPSILON,
        epsilon_end=EPSILON,
    )
    cheetah = Experiment(agent=sac, env="mujoco/HalfCheetah-v4", steps=5_000)
    breakout = Experiment(agent=dqn, env="atari/Breakout", protocol="cleanrl", steps=4_000)
    return {
        "sac": Task(cheetah, "peer_sbx.py", "HalfCheetah-v4"),
        "sac-seeds": Task(cheetah, "peer_sbx.py", "HalfCheetah-v4", ours=2, peers=2),
        "sac-one": Task(cheetah, "peer_sbx.py", "HalfCheetah-v4", ours=2),
        "dqn": Task(breakout, "peer_sb3.py", "BreakoutNoFrameskip-v4"),
    }


def our_speed(task: Task, seed: int, core: int | None = None) -> float:
    if core is not None:
        os.sched_setaffinity(0, {core})
    with tempfile.TemporaryDirectory() as folder:
        experiment = dataclasses.replace(
            task.experiment, seed=seed, eval_every=0, eval_episodes=0, checkpoint_every=0, out=f"{folder}/run"
        )
        return train(experiment, quiet=True).steps_per_second


def peer_speed(task: Task, seed: int, python: Path, core: int | None = None) -> tuple[str, float]:
    """The peer's name with its version, and its speed; RuntimeError with its own last words if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        numbers = {"steps": task.experiment.steps, "warmup": task.experiment.agent.warmup, "seed": seed}
        flags = [f"--{name}={value}" for name, value in numbers.items()]
        if task.script == "peer_sbx.py":
            flags.append("--eval-episodes=0")
        script = Path(__file__).with_name(task.script)
        command = [str(python), "-P", str(script), f"--env={task.env}", f"--out={out}", *flags]
        command = command if core is None else ["taskset", "--cpu-list", str(core), *command]
        # In a folder of its own: MuJoCo writes a log where it runs.
        done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{task.script} failed:\n{done.stderr[-2000:]}")
        result = json.loads(out.read_text())
    return f"{result['peer']} {result['version']}", result["steps_per_second"]


def random_batch(spec: EnvSpec, size: int) -> Batch:
    """Transitions of the right shapes and types; what is in them does not change what an update costs."""
    generator = np.random.default_rng(0)

    def observations() -> np.ndarray:
        values = generator.integers(0, 256, (size, *spec.observation_shape))
        return values.astype(np.uint8) if spec.observation_dtype == "uint8" else values.astype(np.float32) / 128 - 1

    if spec.discrete:
        action = generator.integers(0, spec.action_size, size).astype(np.int32)
    else:
        action = generator.uniform(-1, 1, (size, spec.action_size)).astype(np.float32)
    numbers = {
        "observation": observations(),
        "action": action,
        "reward": generator.normal(size=size).astype(np.float32),
        "discount": np.full(size, 0.99, np.float32),
        "next_observation": observations(),
        "weight": np.ones(size, np.float32),
    }
    return Batch(**{name: jnp.asarray(value) for name, value in numbers.items()})


def timed_updates(config: Any, spec: EnvSpec) -> Callable[[int], float]:
    """Seconds of that many jitted updates on one batch, each time it is called; the agent goes on where it was."""
    prepare_process()
    agent, key = config.build(spec), jax.random.key(0)
    update = jax.jit(agent.update, donate_argnums=0, compiler_options=compiler_options(spec))
    state, batch = agent.init(key), random_batch(spec, config.batch_size)

    def run(count: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for _ in range(count):
            state, metrics, _ = update(state, batch, key)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - started

    return run


def bare_update_limit(task: Task, seconds: float = 10.0) -> float:
    """Agent steps per second that the jitted update alone, on one batch, would allow at the task's replay ratio."""
    experiment = task.experiment
    env = make(experiment.env, protocol=experiment.protocol)
    run = timed_updates(experiment.agent, env.spec)
    env.close()
    run(WARM_UPDATES)
    updates, taken = 0, 0.0
    while taken < seconds:
        taken += run(WARM_UPDATES)
        updates += WARM_UPDATES
    return updates / taken / experiment.ratio


def all_ours(task: Task, first_seed: int) -> float:
    """Agent steps per second of `task.ours` seeds together."""
    with ProcessPoolExecutor(task.ours, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        running = [
            processes.submit(our_speed, task, first_seed + place, core) for place, core in enumerate(cores(task.ours))
        ]
        return sum(each.result() for each in running)


def all_peers(task: Task, first_seed: int, python: Path) -> tuple[str, float]:
    """The peer's name, and agent steps per second of `task.peers` seeds together."""
    with ThreadPoolExecutor(task.peers) as threads:
        running = [
            threads.submit(peer_speed, task, first_seed + place, python, core)
            for place, core in enumerate(cores(task.peers))
        ]
        names, speeds = zip(*(each.result() for each in running), strict=True)
    return names[0], sum(speeds)


def cores(count: int) -> list[int | None]:
    """One for each of several processes; a single one has all. ValueError where there are too few."""
    if count == 1:
        return [None]
    there = sorted(os.sched_getaffinity(0))
    if len(there) < count:
        raise ValueError(f"{count} seeds at a time need as many cores, and there are {len(there)}")
    return list(there[:count])


def compare(chosen: list[str], repeats: int, python: Path, console: Console) -> list[Pair]:
    pairs = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for name in chosen:
            task = tasks()[name]
            limit = processes.submit(bare_update_limit, task).result()
            for repeat in range(repeats):
                ours = all_ours(task, repeat)
                peer, theirs = all_peers(task, repeat, python)
                pairs.append(Pair(name, repeat, peer, ours, theirs, ours / theirs, limit))
                console.print(f"{name} pair {repeat + 1} of {repeats}: ours {ours:.0f}, {peer} {theirs:.0f} steps/s")
    return pairs


def middle_and_range(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f}\n{min(values):.{digits}f}..{max(values):.{digits}f}"


def summary(pairs: list[Pair]) -> Table:
    """One row per task: medians and, below, the range over the pairs; speeds in agent steps per second."""
    table = Table("task\npeer", "ours", "peer's", "ratio", "bare-update\nlimit", box=SIMPLE)
    for name in dict.fromkeys(pair.task for pair in pairs):
        members = [pair for pair in pairs if pair.task == name]
        table.add_row(
            f"{name} {tasks()[name].experiment.env.partition('/')[2]}\n{members[0].peer}",
            middle_and_range([pair.ours_per_second for pair in members], 0),
            middle_and_range([pair.peer_per_second for pair in members], 0),
            middle_and_range([pair.ratio for pair in members], 2),
            f"{members[0].bare_update_limit:.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(tasks()), default=list(tasks()))
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs for each task")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--csv", type=Path, help="write every pair there")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if not args.peers_python.is_file():
        parser.error(f"no Python at {args.peers_python}; `make bench-peers` installs the peers")
    try:
        for task in map(tasks().__getitem__, args.tasks):
            cores(max(task.ours, task.peers))
    except ValueError as problem:
        parser.error(str(problem))
    console = Console()
    pairs = compare(args.tasks, args.repeats, args.peers_python.absolute(), console)
    console.print(summary(pairs))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            rows = csv.DictWriter(file, [field.name for field in dataclasses.fields(Pair)])
            rows.writeheader()
            rows.writerows(dataclasses.asdict(pair) for pair in pairs)


if __name__ == "__main__":
    main()
