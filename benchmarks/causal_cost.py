"""What ACE's causal weights cost: seconds of a fit and of an update, and steps per second of a run.

python -m resprout.benchmarks.causal_cost fit
python -m resprout.benchmarks.causal_cost update --repeats 15
python -m resprout.benchmarks.causal_cost run --repeats 5

fit: on transitions of uniformly random actions, as the first fit of a run is; the median of the repeats and their range.
run: pairs of runs in processes of their own, SAC and ACE with SAC's networks, batches and delays and without resets, so that
the weighted density and the fits are what is left. Speed is agent steps per second over 10,000 agent steps with learning, among
which one fit starts and enters.
update: gradient steps of the same two on one batch, by turns within one process: what pairs of runs cannot see where a
machine's speed wanders. The fit is beside training, so the update is what is left of the cost.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..agents import ACE, SAC
from ..agents.causal import CONSTANT, causal_weights
from ..envs import make
from .peers import timed_updates

FIT_ENVS = ("mujoco/HalfCheetah-v4", "metaworld/hammer", "dmc/dog-run", "mujoco/Humanoid-v4")
NUM_ENVS = 10
TURN = 100  # gradient steps
WARM_UP = 1_000  # agent steps after the warm-up that are not timed: by then everything is compiled
NETWORKS = ("--agent.hidden", "256", "256", "--agent.batch-size", "256")
SAME = ("--agent.target-update-interval", "1", "--agent.no-separate-heads", "--agent.activation", "relu")


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fit", "update", "run"))
    parser.add_argument("--repeats", type=int, default=5, help="fits, or pairs of turns or runs, for each environment")
    parser.add_argument("--envs", nargs="+", help="other environments")
    parser.add_argument("--mode", default="sink", choices=("sink", "full"), help="of the fits")
    asked = parser.parse_args()
    if asked.what == "fit":
        fit_table(asked.envs or FIT_ENVS, asked.mode, asked.repeats)
    elif asked.what == "update":
        update_table(asked.envs or FIT_ENVS[:1], asked.repeats)
    else:
        run_table(asked.envs or FIT_ENVS[:1], asked.repeats)


def fit_table(envs: list[str] | tuple[str, ...], mode: str, repeats: int) -> None:
    rows = ACE().causal_rows
    table = Table(title=f"seconds of a fit to {rows:,} transitions, {mode} mode", box=SIMPLE)
    for heading in ("environment", "columns", "constant", "median", "range"):
        table.add_column(heading, justify="left" if heading == "environment" else "right")
    for env in envs:
        states, actions, rewards = transitions(env, rows)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                causal_weights(states, actions, rewards, mode)  # type: ignore[arg-type]
            seconds.append(time.perf_counter() - started)
        for warning in said:
            print(f"{env}: {warning.message}")
        columns = np.column_stack([states, actions, rewards]).astype(np.float64)
        constant = int((columns.std(axis=0) < CONSTANT * np.maximum(1, np.abs(columns).max(axis=0))).sum())
        span = f"{min(seconds):.3f} to {max(seconds):.3f}"
        table.add_row(env, str(columns.shape[1]), str(constant), f"{statistics.median(seconds):.3f}", span)
    Console(width=100).print(table)


def transitions(env_id: str, rows: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """States [rows, S], actions [rows, A] in [-1, 1] and rewards [rows] of uniformly random actions."""
    generator, columns = np.random.default_rng(0), []
    with closing(make(env_id, num_envs=NUM_ENVS, seed=0)) as env:
        observation = env.reset(seed=0)
        for _ in range(rows // NUM_ENVS):
            action = generator.uniform(-1, 1, (NUM_ENVS, env.spec.action_size)).astype(np.float32)
            step = env.step(action)
            columns.append((observation, action, step.reward))
            observation = step.observation
    states, actions, rewards = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    return states, actions, rewards


def update_table(envs: list[str] | tuple[str, ...], repeats: int) -> None:
    agents: tuple[Any, ...] = (
        SAC(initialiser="xavier"),
        ACE(hidden=(256, 256), batch_size=256, target_update_interval=1, separate_heads=False, activation="relu"),
    )

    def pairs(env_id: str) -> list[tuple[float, float]]:
        with closing(make(env_id)) as env:
            sac, ace = (timed_updates(agent, env.spec) for agent in agents)
        for compiling in (sac, ace):
            compiling(TURN)
        return [(1_000 * sac(TURN) / TURN, 1_000 * ace(TURN) / TURN) for _ in range(repeats)]

    print_pairs(f"milliseconds of an update, medians of {repeats} pairs of turns", envs, pairs, digits=2)


def run_table(envs: list[str] | tuple[str, ...], repeats: int) -> None:
    def pairs(env: str) -> list[tuple[float, float]]:
        plain = ("--agent.initialiser", "xavier")
        return [(speed("sac", env, plain), speed("ace", env, SAME)) for _ in range(repeats)]

    print_pairs("agent steps per second, medians of pairs", envs, pairs, digits=1)


def print_pairs(
    title: str, envs: list[str] | tuple[str, ...], pairs_of: Callable[[str], list[tuple[float, float]]], digits: int
) -> None:
    """Medians of (SAC, ACE), and of their ratio with its range, for every environment."""
    table = Table(title=title, box=SIMPLE)
    for heading in ("environment", "SAC", "ACE", "ACE / SAC", "range"):
        table.add_column(heading, justify="left" if heading == "environment" else "right")
    for env in envs:
        pairs = pairs_of(env)
        ratios = [ace / sac for sac, ace in pairs]
        sac, ace = (statistics.median(values) for values in zip(*pairs, strict=True))
        span = f"{min(ratios):.3f} to {max(ratios):.3f}"
        table.add_row(env, f"{sac:.{digits}f}", f"{ace:.{digits}f}", f"{statistics.median(ratios):.3f}", span)
    Console(width=100).print(table)


def speed(agent: str, env: str, flags: tuple[str, ...]) -> float:
    """Agent steps per second of one run."""
    config = ACE()
    first = config.warmup + WARM_UP
    steps = first + config.causal_every
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-P", "-m", "resprout.training", "train", agent, "--env", env, *NETWORKS, *flags]
        command += [
            "--steps",
            str(steps),
            "--eval-episodes",
            "0",
            "--checkpoint-every",
            "0",
            "--log-every",
            str(WARM_UP),
        ]
        subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    start, end = (next(line["wall_clock"] for line in lines if line["step"] == step) for step in (first, steps))
    return config.causal_every / float(end - start)


if __name__ == "__main__":
    main()
