"""How cost grows: speed against seeds, capacity, environments and width; and what it takes to get to the first gradient step.

python -m resprout.benchmarks.scaling --out runs/scaling --repeats 3

DQN on minatar/Breakout has its loop on the device, SAC on HalfCheetah-v4 on the host; one of the four changes at a time, and
the others are one seed, 10,000 slots, one environment and the agents' own width. Speeds are agent steps per second of all seeds
together, at one gradient step per agent step, from a full replay, compilation left out. For the start, every agent takes its
first gradient step in a process of its own, with nothing compiled before (cold) and once more with what the first one left in
its cache (warm): seconds from the start of the process, imports included, and the most memory by then.

Every point is a fresh process. OUT/scaling.csv has all runs, OUT/scaling.png their medians and, as bars, their range.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..agents import DQN, SAC
from ..envs import EnvError
from ..training import Experiment
from ..training.batched_loop import BatchedLoop
from ..training.device_loop import DeviceLoop
from ..training.experiment import AGENTS
from ..training.host_loop import Training, host_loop
from ..training.placement import loop_on_device, make_rings
from ..training.process import peak_device_memory, peak_memory, prepare_process
from ..training.run import Run, make_env

WARMUP = 100  # agent steps of random actions; few, for only the speed after them is measured
COMPILED = 2 * WARMUP  # agent steps after which everything is
ENDLESS = 10**9  # agent steps
CAPACITY = 10_000
AXES: dict[str, tuple[int, ...]] = {
    "seeds": (1, 2, 4, 8, 16),
    "capacity": (10_000, 100_000, 1_000_000),
    "envs": (1, 2, 4, 8, 16, 32),
    "width": (64, 128, 256, 512, 1024),
}
QUICK: dict[str, tuple[int, ...]] = {"seeds": (1, 2), "capacity": (1_000,), "envs": (2,), "width": (64,)}
STEPS = {"dqn": 2_000, "sac": 1_000}  # agent steps of each seed that are timed
ENVS = {"dqn": "minatar/Breakout", "sac": "mujoco/HalfCheetah-v4"}
START_ENVS = {
    "dqn": "atari/Breakout",
    "sac": "mujoco/HalfCheetah-v4",
    "ace": "mujoco/HalfCheetah-v4",
    "drqv2": "dmc-pixels/walker-run",
    "drm": "dmc-pixels/walker-run",
}
CACHES = ("cold", "warm")
PARTS = (*AXES, "start")
CHUNK = 50_000  # transitions that are made up at a time
LABELS = {
    "seeds": "seeds",
    "capacity": "slots of the replay",
    "envs": "environments",
    "width": "units of a hidden layer",
}


@dataclass(frozen=True)
class Row:
    """One run."""

    part: str
    agent: str
    env: str
    value: int | str  # of what the part changes; cold or warm
    repeat: int
    steps_per_second: float | None = None
    first_update_seconds: float | None = None
    peak_memory_bytes: int | None = None  # resident, of the whole process
    device_memory_bytes: int | None = None  # the most in use on an accelerator
    device: str = ""


@dataclass(frozen=True)
class Point:
    """What the runs of one point say."""

    part: str
    agent: str
    value: int | str
    median: float
    low: float
    high: float
    memory: float | None  # median bytes


def summarise(rows: Sequence[Row]) -> list[Point]:
    """Medians and ranges, in the order of the first run of each point."""
    points = []
    for part, agent, value in dict.fromkeys((row.part, row.agent, row.value) for row in rows):
        runs = [row for row in rows if (row.part, row.agent, row.value) == (part, agent, value)]
        measured = [row.first_update_seconds if part == "start" else row.steps_per_second for row in runs]
        values = [each for each in measured if each is not None]
        memory = [row.peak_memory_bytes for row in runs if row.peak_memory_bytes is not None]
        middle = statistics.median(memory) if memory else None
        points.append(Point(part, agent, value, statistics.median(values), min(values), max(values), middle))
    return points


def plot(points: Sequence[Point], path: Path) -> None:
    """A panel for each part that was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [part for part in PARTS if any(point.part == part for point in points)]
    figure = Figure(figsize=(4 * len(parts), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        own = [point for point in points if point.part == part]
        _draw_start(axes, own) if part == "start" else _draw_speed(axes, own, LABELS[part])
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(path)


def _draw_speed(axes: Any, points: Sequence[Point], label: str) -> None:
    for agent in dict.fromkeys(point.agent for point in points):
        own = [point for point in points if point.agent == agent]
        x, y = [point.value for point in own], [point.median for point in own]
        ranges = [[point.median - point.low for point in own], [point.high - point.median for point in own]]
        axes.errorbar(x, y, yerr=ranges, fmt="o-", markersize=4, capsize=3, label=f"{agent}, {ENVS.get(agent, '')}")
    values = sorted({point.value for point in points})
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="agent steps/s of all seeds")
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.minorticks_off()


def _draw_start(axes: Any, points: Sequence[Point]) -> None:
    agents = list(dict.fromkeys(point.agent for point in points))
    for shift, cache in zip((-0.2, 0.2), CACHES, strict=True):
        own = [point for point in points if point.value == cache]
        places = [agents.index(point.agent) + shift for point in own]
        ranges = [[point.median - point.low for point in own], [point.high - point.median for point in own]]
        bars = axes.bar(places, [point.median for point in own], 0.4, yerr=ranges, label=cache)
        axes.bar_label(bars, [f"{point.memory / 1e9:.1f} GB" if point.memory else "" for point in own], fontsize=7)
    axes.set(ylabel="seconds to the first gradient step")
    axes.set_xticks(range(len(agents)), agents)


# One point, in a process of its own


def experiment(agent: str, capacity: int = CAPACITY, envs: int = 1, width: int | None = None) -> Experiment:
    """Endless, and never interrupted by lines, evaluations and checkpoints."""
    common: dict[str, Any] = {"replay_ratio": 1.0, "warmup": WARMUP, "capacity": capacity}
    if agent == "dqn":  # random actions are cheaper, so their share is constant
        hidden = None if width is None else (width,)
        config: Any = DQN(hidden=hidden, target_period=1_000, epsilon_start=0.05, epsilon_end=0.05, **common)
    else:
        config = SAC(hidden=SAC().hidden if width is None else (width, width), **common)
    return Experiment(agent=config, env=ENVS[agent], num_envs=envs, **endless())


def endless() -> dict[str, Any]:
    return {"steps": ENDLESS, "log_every": ENDLESS, "eval_every": 0, "eval_episodes": 0, "checkpoint_every": 0}


def speed(common: Experiment, seeds: int, steps: int) -> dict[str, Any]:
    """Agent steps per second of all seeds in one loop, over `steps` of each after everything is compiled."""
    with ExitStack() as stack:
        each = [dataclasses.replace(common, seed=seed) for seed in range(seeds)]
        envs = [stack.enter_context(closing(make_env(own, training=True, num_envs=own.num_envs))) for own in each]
        spec = envs[0].spec
        agent = common.build_agent(spec)
        rings = make_rings(common, spec, seeds) if loop_on_device(common, envs[0]) else None
        runs = []
        for place, (own, env) in enumerate(zip(each, envs, strict=True)):
            run = Run(own, Path("none"), env, agent, (), True, stack, rings, place)
            run.training = run.fresh()
            fill(run)
            run.restart_environments()
            runs.append(run)
        first, trainings = runs[0], [run.training for run in runs]
        loop: DeviceLoop | BatchedLoop | None = None
        if rings is not None:
            loop = DeviceLoop(common, range(seeds), trainings, rings, agent, first.sampler)
        elif seeds > 1:
            loop = BatchedLoop(common, range(seeds), trainings, agent, first.sampler, lambda: False)

        def until(step: int) -> float:
            t: Training = first.training
            if loop is None:
                host_loop(common, t, first.compiled, lambda: t.agent_step >= step)
            else:
                loop.run(lambda: step, lambda: t.agent_step >= step)
            jax.block_until_ready(t.agent)
            return time.monotonic()

        begun = until(COMPILED)
        before = first.training.agent_step
        ended = until(before + steps)
        taken = first.training.agent_step - before
    return {"steps_per_second": seeds * taken / (ended - begun)}


def fill(run: Run) -> None:
    """Make up transitions for every slot of the replay, and let the sampler know."""
    storage, capacity, random = run.training.storage, run.experiment.agent.capacity, np.random.default_rng(0)
    columns = {**storage.layout.columns, "begins": np.dtype(np.bool_)}
    if storage.layout.frame is not None:
        raise ValueError("transitions with frames cannot be made up")
    for start in range(0, capacity, CHUNK):
        count = min(CHUNK, capacity - start)
        made = {
            name: random.integers(0, 2, (count, *kind.shape), np.uint8).astype(kind.base)
            for name, kind in columns.items()
        }
        storage.load({"start": np.array(start), **made})
    run.training.sampler = jax.jit(run.sampler.add)(run.training.sampler, np.arange(capacity, dtype=np.int32))


def start(agent: str, env: str, warmup: int, capacity: int) -> dict[str, Any]:
    """Take the first gradient step of an agent as it is by default; nothing is measured here but memory."""
    config = AGENTS[agent](warmup=warmup, capacity=capacity)
    config = dataclasses.replace(config, replay_ratio=1.0)
    common = Experiment(agent=config, env=env, **endless())
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        made = stack.enter_context(closing(make_env(common, training=True, num_envs=1)))
        run = Run(common, Path(folder), made, common.build_agent(made.spec), (), quiet=True, stack=stack)
        run.begin()
        t = run.training
        host_loop(common, t, run.compiled, lambda: t.gradient_step > 0)
        jax.block_until_ready(t.agent)
        return {"finished": time.time()}


def work(task: dict[str, Any]) -> dict[str, Any]:
    """What one process measures."""
    prepare_process()
    if task["part"] == "start":
        result = start(task["agent"], task["env"], task["warmup"], CAPACITY)
    else:
        changed = {} if task["part"] == "seeds" else {task["part"]: task["value"]}
        seeds = task["value"] if task["part"] == "seeds" else 1
        result = speed(experiment(task["agent"], **changed), seeds, task["steps"])
    result["peak_memory_bytes"] = peak_memory()
    result["device_memory_bytes"] = peak_device_memory()
    result["device"] = jax.devices()[0].device_kind
    return result


# All points


def in_process(task: dict[str, Any], cache: Path | None = None) -> dict[str, Any]:
    """What `work` says in a fresh process; RuntimeError with its last words if it fails.

    cache: instead of the user's folder for what is compiled.
    """
    command = [sys.executable, "-P", "-m", "resprout.benchmarks.scaling", "--task", json.dumps(task)]
    environment = os.environ | ({"XDG_CACHE_HOME": str(cache)} if cache else {})
    begun = time.time()
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"{task['part']} of {task['agent']} failed: {words[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "finished" in result:
        result["first_update_seconds"] = result.pop("finished") - begun
    return result


def plan(parts: Sequence[str], agents: Sequence[str], repeats: int, quick: bool) -> list[dict[str, Any]]:
    """All runs; the repeats of a part are turns, so that a slow minute of the machine meets all of its points."""
    axes, steps, tasks = (QUICK, dict.fromkeys(STEPS, 50), []) if quick else (AXES, STEPS, [])
    for part, repeat in itertools.product(parts, range(repeats)):
        for agent, env in (START_ENVS if part == "start" else ENVS).items():
            if agent not in agents:
                continue
            point = {"part": part, "agent": agent, "env": env, "repeat": repeat}
            if part == "start":
                warmup = 2 * AGENTS[agent]().batch_size
                tasks += [{**point, "value": cache, "warmup": warmup} for cache in CACHES]
            else:
                tasks += [{**point, "value": value, "steps": steps[agent]} for value in axes[part]]
    return tasks


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a new directory for the table and the plot")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--agents", nargs="+", choices=list(START_ENVS), default=list(START_ENVS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each point; medians are drawn")
    parser.add_argument("--quick", action="store_true", help="few points and steps, once: only to see that it works")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.task:
        try:
            print(json.dumps(work(json.loads(asked.task))))
        except EnvError as error:
            sys.exit(str(error))
        return
    if asked.out is None:
        parser.error("where to? --out DIR")
    if asked.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {asked.repeats}")
    if asked.out.exists() and not (asked.out.is_dir() and not any(asked.out.iterdir())):
        parser.error(f"{asked.out} exists already; give another --out")
    asked.out.mkdir(parents=True, exist_ok=True)
    try:
        sys.exit(record(asked))
    except KeyboardInterrupt:
        sys.exit(f"interrupted; the runs so far are in {asked.out / 'scaling.csv'}")


def record(asked: argparse.Namespace) -> str | None:
    """Measure, write and show; what failed, if anything did. The other points are measured all the same."""
    rows: list[Row] = []
    failed, console = [], Console()
    with (asked.out / "scaling.csv").open("w", newline="") as file, tempfile.TemporaryDirectory() as caches:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        for task in plan(asked.parts, asked.agents, 1 if asked.quick else asked.repeats, asked.quick):
            cache = Path(caches, f"{task['agent']}-{task['repeat']}") if task["part"] == "start" else None
            try:
                result = in_process(task, cache)
            except RuntimeError as error:
                failed.append(str(error))
                console.print(str(error), highlight=False)
                continue
            place = {name: task[name] for name in ("part", "agent", "env", "value", "repeat")}
            rows.append(Row(**place, **result))
            writer.writerow(asdict(rows[-1]))
            file.flush()
            console.print(said(rows[-1]), highlight=False)
    if rows:
        points = summarise(rows)
        console.print(table(points))
        plot(points, asked.out / "scaling.png")
        console.print(f"table: {asked.out / 'scaling.csv'}\nplot: {asked.out / 'scaling.png'}", highlight=False)
    return "; ".join(dict.fromkeys(failed)) or None


def said(row: Row) -> str:
    result = f"{row.first_update_seconds:.1f} s" if row.part == "start" else f"{row.steps_per_second:.0f} steps/s"
    return f"{row.part} {row.value}, {row.agent}: {result}"


def table(points: Sequence[Point]) -> Table:
    shown = Table("part", "agent", "value", "agent steps/s or seconds", "peak memory", box=SIMPLE)
    for point in points:
        middle, low, high = (f"{value:.1f}" for value in (point.median, point.low, point.high))
        memory = "" if point.memory is None else f"{point.memory / 1e9:.2f} GB"
        shown.add_row(point.part, point.agent, str(point.value), f"{middle} ({low} to {high})", memory)
    return shown


if __name__ == "__main__":
    main()
