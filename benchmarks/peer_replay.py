"""Time of one batch from a peer's replay; run by path with the peers' Python, writes one JSON file.

What is timed is all that a user waits for: a whole batch and, where there are priorities, their update. Transitions of
`atari` are 84 x 84 frames in stacks of 4; the others have the shapes of HalfCheetah's.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

WARM_CALLS = 20  # not timed; all is compiled by then
CHUNK = 1_000  # transitions added at once
Batch = Callable[[], object]


def transitions(size: int, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    shapes = {"observation": (17,), "action": (6,), "reward": (1,), "discount": (1,), "next_observation": (17,)}
    return {name: generator.normal(size=(size, *shape)).astype(np.float32) for name, shape in shapes.items()}


def log_normal(size: int) -> Any:
    return np.random.default_rng(1).lognormal(size=size).astype(np.float32)


def stable_baselines3(task: str, capacity: int, batch_size: int) -> Batch:
    from gymnasium.spaces import Box, Discrete
    from stable_baselines3.common.buffers import ReplayBuffer

    buffer = ReplayBuffer(
        capacity,
        Box(0, 255, (4, 84, 84), np.uint8),
        Discrete(4),
        device="cpu",
        optimize_memory_usage=True,
        handle_timeout_termination=False,  # optimize_memory_usage demands it
    )
    frames = np.random.default_rng(0).integers(256, size=(1024, 84, 84), dtype=np.uint8)
    action, reward, done = np.zeros(1), np.zeros(1), np.zeros(1)
    for step in range(capacity):
        stack = np.arange(step, step + 5) % len(frames)
        buffer.add(frames[None, stack[:4]], frames[None, stack[1:]], action, reward, done, [{}])
    return lambda: buffer.sample(batch_size)


def cpprb(task: str, capacity: int, batch_size: int) -> Batch:
    from cpprb import PrioritizedReplayBuffer, ReplayBuffer

    columns = {name: {"shape": column.shape[1:]} for name, column in transitions(1).items()}
    buffer = (ReplayBuffer if task == "uniform" else PrioritizedReplayBuffer)(capacity, columns)
    for start in range(0, capacity, CHUNK):
        size = min(CHUNK, capacity - start)
        if task == "uniform":
            buffer.add(**transitions(size))
        else:
            buffer.add(**transitions(size), priorities=log_normal(size))
    if task == "uniform":
        return lambda: buffer.sample(batch_size)
    priorities = log_normal(batch_size)

    def sample_and_update() -> None:
        batch = buffer.sample(batch_size)
        buffer.update_priorities(batch["indexes"], priorities)

    return sample_and_update


def flashbax(task: str, capacity: int, batch_size: int) -> Batch:
    import flashbax
    import jax

    make = flashbax.make_item_buffer if task == "uniform" else flashbax.make_prioritised_item_buffer
    buffer = make(capacity, batch_size, batch_size, add_batches=True)
    state = buffer.init({name: column[0] for name, column in transitions(1).items()})
    add = jax.jit(buffer.add, donate_argnums=0)
    sample = jax.jit(buffer.sample)
    for start in range(0, capacity, CHUNK):
        state = add(state, transitions(min(CHUNK, capacity - start)))
    keys = itertools.cycle(list(jax.random.split(jax.random.key(0), 1_000)))  # split before: that is not charged
    if task == "uniform":
        return lambda: jax.block_until_ready(sample(state, next(keys)))

    set_priorities = jax.jit(buffer.set_priorities, donate_argnums=0)
    given = log_normal(capacity)
    for start in range(0, capacity, CHUNK):
        indices = np.arange(start, min(start + CHUNK, capacity))
        state = set_priorities(state, indices, given[indices])
    priorities = jax.numpy.asarray(log_normal(batch_size))

    def sample_and_update() -> None:
        nonlocal state
        batch = sample(state, next(keys))
        state = set_priorities(state, batch.indices, priorities)
        jax.block_until_ready((batch, state))

    return sample_and_update


PEERS = {"stable_baselines3": stable_baselines3, "cpprb": cpprb, "flashbax": flashbax}
TASKS = {"atari": ("stable_baselines3",), "uniform": ("cpprb", "flashbax"), "prioritized": ("cpprb", "flashbax")}


def microseconds(batch: Batch, calls: int) -> float:
    """Of one call, the mean of `calls`."""
    for _ in range(WARM_CALLS):
        batch()
    started = time.perf_counter()
    for _ in range(calls):
        batch()
    return 1e6 * (time.perf_counter() - started) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--capacity", type=int, required=True, help="transitions; all are written before")
    parser.add_argument("--batch-size", type=int, required=True, help="transitions")
    parser.add_argument("--calls", type=int, required=True, help="batches that are timed")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    if args.peer not in TASKS[args.task]:
        parser.error(f"{args.peer} is not compared on {args.task}; there are: {', '.join(TASKS[args.task])}")
    spent = microseconds(PEERS[args.peer](args.task, args.capacity, args.batch_size), args.calls)
    args.out.write_text(
        json.dumps({"peer": args.peer, "version": version(args.peer), "task": args.task, "microseconds": spent})
    )


if __name__ == "__main__":
    main()
