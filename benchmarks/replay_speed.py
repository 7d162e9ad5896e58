"""Speed and memory of the samplers, and the replay beside that of other libraries.

    python -m resprout.benchmarks.replay_speed --repeats 5

Everything is timed as a training loop uses it: functions jitted, states donated, every slot written before, the slots on
the host at the end and, where there are priorities, new ones for the slots drawn. Our samplers are timed over whole
epochs of draws, so that a reshuffle is paid for. Beside a peer, runs come in pairs, ours and then the peer's, each in
a process of its own, so that a slow minute of the machine meets both; what is compared is a whole batch of transitions.
"""

import argparse
import csv
import itertools
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from ..replay import (
    COMPILER_OPTIONS,
    Sampler,
    Storage,
    decode,
    masked,
    prioritized,
    reshuffled,
    uniform,
    without_replacement,
)
from ..replay.sampler import no_priorities
from .peer_replay import CHUNK, TASKS, log_normal, microseconds, transitions
from .replay_memory import FRAME, STACK, fill, resident

SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "uniform": uniform,
    "without_replacement": without_replacement,
    "reshuffled": reshuffled,
    "prioritized": prioritized,
    "prioritized, stratified": partial(prioritized, stratified=True),
    "masked": masked,
    "masked, stratified": partial(masked, stratified=True),
}
ATARI_BATCH_SIZE = 32
donating = partial(jax.jit, donate_argnums=0, compiler_options=COMPILER_OPTIONS)
OURS = {"atari": "uniform", "uniform": "uniform", "prioritized": "prioritized"}  # sampler of each of the peers' tasks


class Draws:
    """A sampler all of whose slots are written, as a training loop calls it."""

    def __init__(self, name: str, capacity: int, batch_size: int) -> None:
        sampler = SAMPLERS[name](capacity)
        add, update = donating(sampler.add), donating(sampler.update)
        self._sample = donating(sampler.sample, static_argnums=1)
        self._update = None if sampler.update is no_priorities else update
        self._batch_size = batch_size
        self.state = jax.jit(sampler.init)(jax.random.key(0))
        for slots in chunks(capacity):
            self.state = add(self.state, slots)
        for slots in chunks(capacity) if self._update else ():
            self.state = update(self.state, slots, log_normal(len(slots)))
        # in the loop they come from the gradient step, on the device
        values = np.split(log_normal(16 * batch_size), 16)
        self._priorities = itertools.cycle([jnp.asarray(priorities) for priorities in values])

    def __call__(self) -> NDArray[np.int32]:
        self.state, slots, _ = self._sample(self.state, self._batch_size)
        chosen = np.asarray(slots)
        if self._update:
            self.state = self._update(self.state, slots, next(self._priorities))
        return chosen


def chunks(capacity: int) -> list[NDArray[np.int32]]:
    return np.split(np.arange(capacity, dtype=np.int32), capacity // CHUNK)


def state_bytes(state: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def resident_bytes(name: str, capacity: int, batch_size: int) -> int:
    """By how much this process has grown after an epoch of draws; everything is compiled before, ahead of time."""
    sampler, key = SAMPLERS[name](capacity), jax.random.key(0)
    init = jax.jit(sampler.init).lower(key).compile()
    shape = jax.eval_shape(sampler.init, key)
    add = donating(sampler.add).lower(shape, jax.ShapeDtypeStruct((CHUNK,), jnp.int32)).compile()
    sample = donating(sampler.sample, static_argnums=1).lower(shape, batch_size).compile()
    drawn, priorities = jax.ShapeDtypeStruct((batch_size,), jnp.int32), jnp.ones(batch_size)
    update = donating(sampler.update).lower(shape, drawn, priorities).compile()
    before = resident()
    state = init(key)
    for slots in chunks(capacity):
        state = add(state, slots)
    for _ in range(capacity // batch_size):
        state, drawn, _ = sample(state)
        state = update(state, drawn, priorities)
    jax.block_until_ready(state)
    return resident() - before


class Cost(NamedTuple):
    """Of one of our samplers."""

    sampler: str
    microseconds: float  # of a batch of slots, with the update of its priorities; the mean over an epoch of draws
    state_bytes: int
    resident_bytes: int


def cost(name: str, capacity: int, batch_size: int) -> Cost:
    """In a process of its own: memory that another sampler gave back would hide what this one takes."""
    grown = resident_bytes(name, capacity, batch_size)
    draws = Draws(name, capacity, batch_size)
    return Cost(name, microseconds(draws, capacity // batch_size), state_bytes(draws.state), grown)


class Ours(NamedTuple):
    """Microseconds of one batch, as far as each of these."""

    slots: float  # chosen, and on the host
    host: float  # gathered from the replay
    device: float  # with the stacks of frames assembled, as an update reads it


def our_speed(task: str, capacity: int, batch_size: int, calls: int) -> Ours:
    stack = STACK if task == "atari" else 1
    storage = filled_frames(capacity) if task == "atari" else filled_vectors(capacity)
    draws = Draws(OURS[task], capacity, batch_size)
    finish = jax.jit(decode, static_argnums=1)
    return Ours(
        microseconds(draws, calls),
        microseconds(lambda: storage.gather(draws()), calls),
        microseconds(lambda: jax.block_until_ready(finish(storage.gather(draws()), stack)), calls),
    )


def filled_frames(capacity: int) -> Storage:
    storage = Storage(capacity, (*FRAME[:2], STACK * FRAME[2]), "uint8", frame_stack=STACK)
    fill(storage, capacity, 200.0, np.random.default_rng(0))
    return storage


def filled_vectors(capacity: int) -> Storage:
    columns = transitions(CHUNK)
    observation, action = columns["observation"], columns["action"]
    storage = Storage(capacity, (17,), "float32", action_shape=(6,), action_dtype="float32", num_envs=CHUNK)
    storage.begin(observation)
    going_on = np.zeros(CHUNK, bool)
    for _ in range(capacity // CHUNK):
        storage.add(action, columns["reward"][:, 0], going_on, going_on, observation, observation)
    return storage


def peer_speed(python: Path, task: str, peer: str, capacity: int, batch_size: int, calls: int) -> tuple[str, float]:
    """The peer's name with its version, and its microseconds; RuntimeError with its own last words if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [str(python), "-P", str(Path(__file__).with_name("peer_replay.py")), f"--out={out}"]
        flags = {"task": task, "peer": peer, "capacity": capacity, "batch-size": batch_size, "calls": calls}
        command += [f"--{name}={value}" for name, value in flags.items()]
        done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{peer} failed:\n{done.stderr[-2000:]}")
        result = json.loads(out.read_text())
    return f"{result['peer']} {result['version']}", result["microseconds"]


class Pair(NamedTuple):
    """Two measurements back to back; microseconds of one batch."""

    task: str
    capacity: int
    batch_size: int
    repeat: int
    peer: str
    ours_slots: float
    ours_host: float
    ours_device: float
    peers: float


def median(values: Iterable[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f}"


def with_range(values: list[float], digits: int) -> str:
    return f"{median(values, digits)}\n{min(values):.{digits}f}..{max(values):.{digits}f}"


def cost_table(costs: list[Cost], capacity: int, batch_size: int) -> Table:
    table = Table(
        *("sampler", "us a batch", "beside\nuniform", "state,\nMB", "resident,\nMB"),
        title=f"{batch_size} slots of {capacity:,}, with the update of their priorities; median and range",
        box=SIMPLE,
    )
    by_sampler = {name: [cost for cost in costs if cost.sampler == name] for name in SAMPLERS}
    for name, own in by_sampler.items():
        # of the same round: a slow minute of the machine meets every sampler
        rounds = zip(own, by_sampler["uniform"], strict=True)
        table.add_row(
            name.replace(", ", "\n"),
            with_range([cost.microseconds for cost in own], 0),
            with_range([cost.microseconds / uniform.microseconds for cost, uniform in rounds], 2),
            f"{own[0].state_bytes / 1e6:.1f}",
            median((cost.resident_bytes / 1e6 for cost in own), 1),
        )
    return table


def pair_table(pairs: list[Pair]) -> Table:
    table = Table(
        Column("task\npeer", no_wrap=True),
        *("slots", "host", "device", "peer's", "peer's /\nhost", "peer's /\ndevice"),
        title="us a batch: ours (slots, gathered on the host, on the device) and the peer's; medians, ratios with range",
        box=SIMPLE,
        padding=(0, 0),
    )
    for task, peer in dict.fromkeys((pair.task, pair.peer) for pair in pairs):
        own = [pair for pair in pairs if (pair.task, pair.peer) == (task, peer)]
        table.add_row(
            f"{task}\n{peer.replace('_', '-')}\n{own[0].batch_size} of {own[0].capacity:,}",
            median(pair.ours_slots for pair in own),
            median(pair.ours_host for pair in own),
            median(pair.ours_device for pair in own),
            median(pair.peers for pair in own),
            with_range([pair.peers / pair.ours_host for pair in own], 2),
            with_range([pair.peers / pair.ours_device for pair in own], 2),
        )
    return table


def write_csv(path: Path, rows: list[Any]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0]._fields)
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of our samplers, and pairs beside each peer")
    parser.add_argument("--capacity", type=int, default=1_000_000, help="transitions; a multiple of 1000")
    parser.add_argument("--atari-capacity", type=int, default=100_000, help="transitions beside Stable-Baselines3")
    parser.add_argument("--batch-size", type=int, default=256, help="transitions; 32 beside Stable-Baselines3")
    parser.add_argument("--calls", type=int, default=1_000, help="batches timed in one measurement beside a peer")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--out", type=Path, help="write samplers.csv and peers.csv into this directory")
    args = parser.parse_args()
    if min(args.repeats, args.calls, args.batch_size) < 1:
        parser.error("--repeats, --calls and --batch-size must be at least 1")
    if args.capacity < 1 or args.capacity % CHUNK or args.batch_size > args.capacity:
        parser.error(f"--capacity must be a multiple of {CHUNK} and no less than --batch-size")
    if args.atari_capacity < ATARI_BATCH_SIZE:
        parser.error(f"--atari-capacity must be at least {ATARI_BATCH_SIZE}")
    if not args.peers_python.is_file():
        parser.error(f"no Python at {args.peers_python}; `make bench-replay` installs the peers")
    python, console = args.peers_python.absolute(), Console(highlight=False)

    costs: list[Cost] = []
    pairs: list[Pair] = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for repeat in range(args.repeats):
            for name in SAMPLERS:
                costs.append(processes.submit(cost, name, args.capacity, args.batch_size).result())
                console.print(f"round {repeat + 1} of {args.repeats}: {name} {costs[-1].microseconds:.4g} us")
        for task, peers in TASKS.items():
            capacity = args.atari_capacity if task == "atari" else args.capacity
            batch_size = ATARI_BATCH_SIZE if task == "atari" else args.batch_size
            for peer in peers:
                for repeat in range(args.repeats):
                    ours = processes.submit(our_speed, task, capacity, batch_size, args.calls).result()
                    told, theirs = peer_speed(python, task, peer, capacity, batch_size, args.calls)
                    pairs.append(Pair(task, capacity, batch_size, repeat, told, *ours, theirs))
                    console.print(
                        f"{task} pair {repeat + 1} of {args.repeats}: ours {ours.host:.4g}, {told} {theirs:.4g} us"
                    )
    console.print(cost_table(costs, args.capacity, args.batch_size))
    console.print(pair_table(pairs))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_csv(args.out / "samplers.csv", costs)
        write_csv(args.out / "peers.csv", pairs)


if __name__ == "__main__":
    main()
