"""What interventions and diagnostics cost in steps per second.

python -m resprout.benchmarks.intervention_cost --repeats 5

Runs come in pairs in processes of their own, without and with ReDo every 1,000 gradient steps and all default diagnostics
every 1,000 gradient steps. Speed is agent steps per second between the first time that both are due, when everything is
compiled, and the end. Where a machine's speed wanders by more than a few percent such pairs cannot see what they are for, so
the last column is measured within one process: the seconds of one event, ReDo and a line of diagnostics, beside those of 1,000
gradient steps of the loop, by turns; medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..training import Experiment
from ..training.experiment import AGENTS
from ..training.host_loop import host_loop, intervene
from ..training.run import Run, make_env

PERIOD = 1_000  # gradient steps
BLOCK = 25  # gradient steps between two events of which the time is taken


@dataclass(frozen=True)
class Task:
    """A run without interventions."""

    agent: str
    env: str
    steps_per_update: int  # agent steps
    probe: int  # transitions that ReDo reads; Sokar et al. (2023), table 1

    @property
    def redo(self) -> str:
        return f"redo:period={PERIOD},probe={self.probe}"


WARMUP, CAPACITY = 1_000, 50_000
TASKS = {
    "SAC HalfCheetah-v4": Task("sac", "mujoco/HalfCheetah-v4", 1, 256),
    "DQN Breakout": Task("dqn", "atari/Breakout", 4, 64),
}


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="pairs for each task")
    parser.add_argument("--events", type=int, default=3, help="times that both are due while it is timed")
    parser.add_argument("--turns", type=int, default=15, help="events timed within one process")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    asked = parser.parse_args()
    rows = []
    for name in asked.tasks:
        pairs = [
            (measure(TASKS[name], asked.events, False), measure(TASKS[name], asked.events, True))
            for _ in range(asked.repeats)
        ]
        cost = event_cost(TASKS[name], asked.turns)
        without, with_both = (statistics.median(speeds) for speeds in zip(*pairs, strict=True))
        ratios = [acting / plain for plain, acting in pairs]
        rows.append((name, without, with_both, statistics.median(ratios), min(ratios), max(ratios), cost))
    table = Table(title="agent steps per second, medians of pairs", box=SIMPLE)
    for heading in ("task", "without", "with", "with / without", "range", "an event / 1,000 gradient steps"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for name, without, with_both, ratio, low, high, (event, block) in rows:
        pair = f"{without:.1f}", f"{with_both:.1f}", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}"
        table.add_row(name, *pair, f"{event:.3f} s / {block:.1f} s = {event / block:.2%}")
    Console(width=140).print(table)


def measure(task: Task, events: int, acting: bool) -> float:
    """Agent steps per second of one run."""
    period = PERIOD * task.steps_per_update
    steps = WARMUP + period * (events + 1) + task.steps_per_update
    flags = [task.agent, "--env", task.env, "--steps", str(steps), "--eval-episodes", "0"]
    flags += ["--agent.warmup", str(WARMUP), "--agent.capacity", str(CAPACITY)]
    flags += ["--checkpoint-every", "0", "--log-every", str(period // 10)]
    if acting:
        flags += ["--with", task.redo, "--diagnose-every", str(period)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-P", "-m", "resprout.training", "train", *flags, "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # A line stands every tenth of a period; the one behind the first event comes after all that is compiled.
    timed = [(line["step"], line["wall_clock"]) for line in lines if line["step"] > WARMUP + period + period // 10]
    (first, start), (last, end) = timed[0], timed[-1]
    return float((last - first) / (end - start))


def event_cost(task: Task, turns: int) -> tuple[float, float]:
    """Seconds of one event, ReDo and a line of diagnostics, and of PERIOD gradient steps with all that goes with them."""
    experiment = Experiment(
        agent=AGENTS[task.agent](warmup=WARMUP, capacity=CAPACITY),
        env=task.env,
        interventions=(task.redo,),
        diagnose_every=PERIOD * task.steps_per_update,
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        env = stack.enter_context(closing(make_env(experiment, training=True, num_envs=1)))
        run = Run(experiment, Path(folder) / "run", env, experiment.build_agent(env.spec), (), quiet=True, stack=stack)
        run.begin()
        t = run.training

        def learn(gradient_steps: int) -> None:
            goal = t.gradient_step + gradient_steps
            host_loop(experiment, t, run.compiled, lambda: t.gradient_step >= goal)
            jax.block_until_ready(t.agent)

        def event() -> None:
            taken, t.gradient_step = t.gradient_step, PERIOD  # when it is due
            intervene(t, run.compiled, {}, None)
            run.diagnose()
            jax.block_until_ready(t.agent)
            t.gradient_step = taken

        def seconds(action: Callable[[], None]) -> float:
            started = time.perf_counter()
            action()
            return time.perf_counter() - started

        learn(BLOCK)
        event()  # compiles
        turn = [(seconds(event), seconds(lambda: learn(BLOCK))) for _ in range(turns)]
    events, blocks = (statistics.median(times) for times in zip(*turn, strict=True))
    return events, blocks * PERIOD / BLOCK


if __name__ == "__main__":
    main()
