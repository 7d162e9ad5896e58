"""Resident memory and speed of the replay on Atari-shaped transitions: what is announced against what is measured.

    python -m resprout.benchmarks.replay_memory --capacity 200000

Frames are random; where an episode ends is random too, so that frames are freed and reused in no regular order.
"""

import os
import time
from pathlib import Path

import numpy as np
import tyro

from ..replay import Storage, memory

FRAME = (84, 84, 1)
STACK = 4
BATCH_SIZE = 32


def resident() -> int:
    """Bytes of this process in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fill(storage: Storage, transitions: int, episode_length: float, random: np.random.Generator) -> float:
    """Write this many transitions of episodes with geometrically distributed lengths; seconds spent inside `add`."""
    frames = random.integers(256, size=(1024, *FRAME), dtype=np.uint8)

    def first() -> np.ndarray:
        return np.tile(frames[random.integers(len(frames))], STACK)[None]

    spent = 0.0
    going_on, ended = np.array([False]), np.array([True])
    observation = first()
    storage.begin(observation)
    for _ in range(transitions):
        newest = frames[None, random.integers(len(frames))]
        reached = np.concatenate([observation[..., 1:], newest], axis=-1)
        terminated = ended if random.random() < 1 / episode_length else going_on
        observation = first() if terminated else reached
        start = time.perf_counter()
        storage.add([0], [0.0], terminated, going_on, reached, observation)
        spent += time.perf_counter() - start
    storage.end()
    return spent


def main(capacity: int = 200_000, episode_length: float = 200.0, rounds: int = 2, seed: int = 0) -> None:
    """Fill a replay several times over and print expected and measured bytes.

    capacity: transitions.
    episode_length: mean, in agent steps.
    rounds: times the ring is filled.
    """
    shape = (*FRAME[:2], STACK * FRAME[2])
    expected, worst_case = memory(capacity, shape, "uint8", frame_stack=STACK)
    print(f"expected   {expected / 1e9:.3f} GB for {capacity} transitions (at worst {worst_case / 1e9:.3f} GB)")
    random = np.random.default_rng(seed)
    before = resident()
    storage = Storage(capacity, shape, "uint8", frame_stack=STACK)
    for i in range(rounds):
        spent = fill(storage, capacity, episode_length, random)
        grown = resident() - before
        print(f"round {i + 1}    {grown / 1e9:.3f} GB measured; add {1e6 * spent / capacity:.0f} us")
    draws = random.integers(len(storage), size=(1000, BATCH_SIZE))
    start = time.perf_counter()
    for slots in draws:
        storage.gather(slots)
    print(f"gather     {1e6 * (time.perf_counter() - start) / len(draws):.0f} us for {BATCH_SIZE} transitions")
    print(f"scaled     {grown / capacity * 1e6 / 1e9:.3f} GB for 1000000 transitions, from what was measured")
    print(
        f"expected   {memory(1_000_000, shape, 'uint8', frame_stack=STACK).expected / 1e9:.3f} GB for 1000000 transitions"
    )


if __name__ == "__main__":
    tyro.cli(main)
