"""Speed of the loop on the device: beside rejax, against the replay's capacity, and against the number of seeds.

python -m resprout.benchmarks.device_speed --repeats 3

DQN on minatar/Breakout: a convolution of 16 channels and 128 units, batches of 32, one gradient step per agent step.
Speeds are agent steps per second of all seeds together, learning on, compilation left out. Every run is a process of its
own; ours and the peer's come in pairs, so that a slow minute of the machine meets both.
"""

import argparse
import csv
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..agents import DQN
from ..envs import make
from ..training import Experiment
from ..training.device_loop import DeviceLoop
from ..training.placement import make_rings
from ..training.process import prepare_process
from ..training.run import Run
from ..training.seeds import train_seeds

WARMUP = 100  # agent steps of random actions; few, for only the speed after them is measured
CAPACITIES = (10_000, 100_000, 1_000_000)
SEEDS = (1, 2, 4, 8, 16)
EPSILON = 0.05  # constant, as in peer_rejax.py: random actions are cheaper, so both sides must take equally many


def experiment(env: str, capacity: int, steps: int, out: str) -> Experiment:
    agent = DQN(
        batch_size=32,
        replay_ratio=1.0,
        warmup=WARMUP,
        capacity=capacity,
        target_period=1000,
        epsilon_start=EPSILON,
        epsilon_end=EPSILON,
    )
    return Experiment(agent=agent, env=env, steps=steps, eval_every=0, eval_episodes=0, checkpoint_every=0, out=out)


def vmapped(env: str, capacity: int, seeds: int, steps: int) -> dict[str, float]:
    """Speed of `steps` agent steps of each seed in one loop, after as many chunks as compile everything; in this process."""
    prepare_process()
    steps_at_most = max(capacity, steps + 10 * WARMUP)  # so that the ring has its whole capacity
    common = experiment(env, capacity, steps_at_most, "none")
    envs = [make(env, seed=seed) for seed in range(seeds)]
    agent = common.build_agent(envs[0].spec)
    rings, runs = make_rings(common, envs[0].spec, seeds), []
    for seed, own in enumerate(envs):
        run = Run(dataclasses.replace(common, seed=seed), Path("none"), own, agent, (), True, ExitStack(), rings, seed)
        run.training = run.fresh()
        run.restart_environments()
        runs.append(run)
    loop = DeviceLoop(common, range(seeds), [run.training for run in runs], rings, agent, runs[0].sampler)
    first = runs[0].training
    started = time.monotonic()

    def until(step: int) -> float:
        loop.run(lambda: step, lambda: first.agent_step >= step)
        jax.block_until_ready(first.agent)
        return time.monotonic()

    begun = until(2 * WARMUP)
    ended = until(first.agent_step + steps)
    return {"steps_per_second": seeds * steps / (ended - begun), "compile_seconds": float(np.round(begun - started, 1))}


def processes(env: str, capacity: int, seeds: int, steps: int) -> dict[str, float]:
    """Speed of the same in processes of one core each: the sum of what each says of itself while all learn."""
    with tempfile.TemporaryDirectory() as folder:
        common = experiment(env, capacity, 3 * WARMUP + steps, f"{folder}/runs")
        common = dataclasses.replace(
            common, log_every=WARMUP
        )  # a run's own clock starts at the second line that learns
        out = train_seeds(common, range(seeds), mode="processes", quiet=True)
        summaries = [json.loads((out / f"s{seed}" / "summary.json").read_text()) for seed in range(seeds)]
    at_once = min(seeds, len(os.sched_getaffinity(0)))
    return {"steps_per_second": at_once * statistics.mean(each["steps_per_second"] for each in summaries)}


def in_process(kind: str, env: str, capacity: int, seeds: int, steps: int) -> dict[str, Any]:
    """What `vmapped` or `processes` says in a fresh process; RuntimeError with its last words if it fails."""
    task = json.dumps([kind, env, capacity, seeds, steps])
    command = [sys.executable, "-P", "-m", "resprout.benchmarks.device_speed", "--task", task]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def peer(python: Path, game: str, capacity: int, seeds: int, steps: int, network: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        flags = {"env": f"{game}-MinAtar", "steps": steps, "seeds": seeds, "capacity": capacity, "network": network}
        script = Path(__file__).with_name("peer_rejax.py")
        command = [str(python), "-P", str(script), f"--out={out}", *(f"--{name}={flags[name]}" for name in flags)]
        done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"peer_rejax.py failed:\n{done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(out.read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("peer", "capacity", "seeds"), default=["peer", "capacity", "seeds"]
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; medians are shown")
    parser.add_argument("--steps", type=int, default=2_000, help="agent steps of each seed that are timed")
    parser.add_argument("--game", default="Breakout", help="of MinAtar")
    parser.add_argument("--seeds", type=int, default=8, help="beside the peer and against capacity")
    parser.add_argument("--kinds", nargs="+", choices=("vmapped", "processes"), default=["vmapped", "processes"])
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--csv", type=Path, help="write every run there")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        kind, *rest = json.loads(args.task)
        print(json.dumps({"vmapped": vmapped, "processes": processes}[kind](*rest)))
        return
    if args.repeats < 1 or args.steps < 1:
        parser.error("--repeats and --steps must be at least 1")
    if "peer" in args.parts and not args.peers_python.is_file():
        parser.error(f"no Python at {args.peers_python}; `make bench-peers` installs the peers")
    console, rows, env = Console(), [], f"minatar/{args.game}"
    points = []
    if "peer" in args.parts:
        points.append(("peer", 100_000, args.seeds))
    if "capacity" in args.parts:
        points += [("capacity", capacity, args.seeds) for capacity in CAPACITIES]
    if "seeds" in args.parts:
        points += [("seeds", 100_000, seeds) for seeds in SEEDS]
    for part, capacity, seeds in points:
        for repeat in range(args.repeats):
            calls = {kind: partial(in_process, kind, env, capacity, seeds, args.steps) for kind in args.kinds}
            if part == "peer":
                python = args.peers_python.absolute()
                for network in ("conv", "mlp"):
                    calls[f"rejax {network}"] = partial(peer, python, args.game, capacity, seeds, args.steps, network)
            for kind, call in calls.items():
                result = call()
                rows.append(
                    {"part": part, "capacity": capacity, "seeds": seeds, "kind": kind, "repeat": repeat} | result
                )
                console.print(
                    f"{part} {capacity} slots, {seeds} seeds, {kind}: {result['steps_per_second']:.0f} steps/s"
                )
    table = Table("part", "slots", "seeds", "loop", "agent steps/s of all seeds", box=SIMPLE)
    for key in dict.fromkeys((row["part"], row["capacity"], row["seeds"], row["kind"]) for row in rows):
        speeds = [
            row["steps_per_second"] for row in rows if (row["part"], row["capacity"], row["seeds"], row["kind"]) == key
        ]
        spread = f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
        table.add_row(key[0], f"{key[1]:,}", str(key[2]), key[3], spread)
    console.print(table)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            fields = ("part", "capacity", "seeds", "kind", "repeat", "steps_per_second", "compile_seconds")
            writer = csv.DictWriter(file, fields, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
