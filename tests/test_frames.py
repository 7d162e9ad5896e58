"""Frames on the device are those on the host: in the storage, in a run, and across a checkpoint; and where they go is said."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from resprout.agents import DQN
from resprout.envs import EnvSpec
from resprout.replay import DeviceFrames, Layout, Storage
from resprout.replay import frames as frames_module
from resprout.training import Experiment, ExperimentError, placement, train
from resprout.training import run as run_module
from resprout.training.__main__ import dispatch
from resprout.training.seeds import train_seeds

from .runs import assert_equal, comparable

NUM_ENVS, STACK, CAPACITY = 3, 3, 40
SHAPE = (4, 5, STACK)


def storage(on_device: bool, n_step: int) -> Storage:
    options: dict[str, Any] = {"frame_stack": STACK, "num_envs": NUM_ENVS, "n_step": n_step}
    layout = Layout(SHAPE, "uint8", **options)
    frames = DeviceFrames(layout.frames(CAPACITY), layout.frame) if on_device and layout.frame else None
    return Storage(CAPACITY, SHAPE, "uint8", frames=frames, **options)


def steps(count: int, seed: int = 0) -> Any:
    """First observations, then random agent steps with episodes of about five."""
    random = np.random.default_rng(seed)

    def picture(envs: int = NUM_ENVS) -> Any:
        return random.integers(256, size=(envs, *SHAPE[:2], 1), dtype=np.uint8)

    stacks = np.repeat(picture(), STACK, axis=-1)
    yield stacks
    for _ in range(count):
        final = np.concatenate([stacks[..., 1:], picture()], axis=-1)
        ended = random.random(NUM_ENVS) < 0.2
        terminated = ended & (random.random(NUM_ENVS) < 0.5)
        stacks = np.where(ended[:, None, None, None], np.repeat(picture(), STACK, axis=-1), final)
        action = random.integers(4, size=NUM_ENVS).astype(np.int32)
        yield action, random.normal(size=NUM_ENVS).astype(np.float32), terminated, ended & ~terminated, final, stacks


def same(left: Any, right: Any) -> None:
    assert left.keys() == right.keys()
    for name, column in left.items():
        np.testing.assert_array_equal(np.asarray(column), np.asarray(right[name]), err_msg=name)


@pytest.mark.parametrize("n_step", [1, 3])
def test_a_storage_on_the_device_is_that_on_the_host(n_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, checkpoints in both directions, and what is written after them; blocks of 8 frames, so that there are many."""
    monkeypatch.setattr(frames_module, "BLOCK", 8)
    host, device = storage(False, n_step), storage(True, n_step)
    random = np.random.default_rng(1)
    first, *played = steps(60)
    for each in (host, device):
        each.begin(first)
    for index, step in enumerate(played):
        slots = host.add(*step)
        np.testing.assert_array_equal(slots, device.add(*step))
        if len(host):
            drawn = (host.written - 1 - random.integers(len(host), size=16)) % CAPACITY
            batch = device.gather(drawn)
            same(host.gather(drawn), batch)
            assert isinstance(batch["frames"], jax.Array)  # it stays there
        assert host.frames_in_use == device.frames_in_use
        if index == 40:
            saved = [each.export(each.written - len(each), each.written) for each in (host, device)]
            pending = [each.pending() for each in (host, device)]
            same(*saved)
            same(*pending)
            host, device = storage(False, n_step), storage(True, n_step)
            for each, segment, rest in zip((host, device), reversed(saved), reversed(pending), strict=True):
                each.load(segment)
                each.restore_pending(rest)


def test_frames_on_the_device_are_written_in_place() -> None:
    frames = DeviceFrames(1000, np.dtype((np.uint8, (4, 5, 1))))
    compiled = frames_module._put.lower(frames._pool, np.zeros(8, np.int32), np.zeros((8, 20), np.uint8)).compile()
    assert frames.nbytes == 20_000
    assert not re.search(r"u8\[1000,20\]\S* copy\(", compiled.as_text())


# In a run


AGENT = DQN(warmup=60, batch_size=8, torso="mlp", hidden=(8,), target_period=10, capacity=100, replay_ratio=0.5)


def small(directory: Path, **changes: Any) -> Experiment:
    fields = {"steps": 140, "num_envs": 2, "log_every": 20, "checkpoint_every": 100, "eval_episodes": 0}
    return Experiment(agent=AGENT, env="atari/Pong", out=str(directory), **fields | changes)


def test_a_run_has_the_same_numbers_wherever_its_frames_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And one that is stopped may go on with them elsewhere."""
    results = {place: train(small(tmp_path / place, replay_on=place)) for place in ("host", "device")}
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("replay:")]
    assert re.fullmatch(r"replay: \S+ GB on the host \(.* GB free\) for 100 transitions", said[0])
    assert re.fullmatch(
        r"replay: 0\.00152 GB on the device and \S+ GB on the host \(.* GB free\) for 100 transitions", said[1]
    )
    shutil.rmtree(tmp_path / "device" / "checkpoints" / f"{140:012d}")
    (tmp_path / "device" / "summary.json").unlink()
    resumed = train(small(tmp_path / "device", replay_on="host"), resume=tmp_path / "device", quiet=True)
    for other in (results["device"], resumed):
        assert_equal(results["host"].state, other.state)
    assert comparable(tmp_path / "host") == comparable(tmp_path / "device")


def test_seeds_of_one_process_keep_their_frames_where_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers of the host; and where there is no room for both, there is none for either."""
    placed: list[DeviceFrames] = []

    def noted(*given: Any) -> DeviceFrames:
        placed.append(placement.place_frames(*given))
        return placed[-1]

    monkeypatch.setattr(run_module, "place_frames", noted)
    for place, count in (("host", 0), ("device", 2)):
        train_seeds(small(tmp_path / place, replay_on=place), (0, 1), mode="vmap", quiet=True)
        assert len(placed) == count
    for seed in ("s0", "s1"):
        assert comparable(tmp_path / "host" / seed) == comparable(tmp_path / "device" / seed)
    monkeypatch.setattr(placement, "device_memory", lambda: 2_000_000)
    with pytest.raises(ExperimentError, match=r"frames of 0.00305 GB do not fit"):
        train_seeds(small(tmp_path / "both", replay_on="device"), (0, 1), mode="vmap", quiet=True)
    assert not (tmp_path / "both").exists()


PONG = EnvSpec("atari/Pong", 2, (84, 84, 4), "uint8", discrete=True, action_size=6, frame_stack=4)
VECTORS = EnvSpec("gym/CartPole-v1", 1, (4,), "float32", discrete=True, action_size=2)


def test_where_frames_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU to the host unless asked otherwise; on an accelerator to where they fit."""
    auto = small(tmp_path)
    assert not placement.frames_on_device(auto, PONG)
    assert placement.frames_on_device(dataclasses.replace(auto, replay_on="device"), PONG)
    room = placement.place_frames(auto, PONG)
    assert len(room) == 2 * (100 + 2) + 2 * 6 and room.nbytes == 216 * 84 * 84 == placement.frame_bytes(auto, PONG)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert placement.frames_on_device(auto, PONG)
    assert not placement.frames_on_device(auto, VECTORS)
    assert not placement.frames_on_device(dataclasses.replace(auto, replay_on="host"), PONG)
    monkeypatch.setattr(placement, "device_memory", lambda: 4_000_000)
    assert placement.frames_on_device(auto, PONG, seeds=2) and not placement.frames_on_device(auto, PONG, seeds=3)
    monkeypatch.setattr(placement, "device_memory", lambda: 1_000_000)
    assert not placement.frames_on_device(auto, PONG)
    with pytest.raises(ExperimentError, match=r"frames of 0.00152 GB do not fit on the device \(0.0 GB free\)"):
        placement.frames_on_device(dataclasses.replace(auto, replay_on="device"), PONG)


def test_frames_on_the_device_take_no_room_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several seeds, too: their figure for the device is the sum, and the host needs what is left."""
    experiment = small(tmp_path)
    there = placement.check_memory(experiment, PONG, frames_there=True, seeds=8)
    assert "replays of 8 seeds: 0.0122 GB on the device and " in there  # 8 * 216 * 84 * 84
    monkeypatch.setattr(placement, "available_memory", lambda: 100_000)
    assert placement.check_memory(experiment, PONG, frames_there=True, seeds=8)
    with pytest.raises(ExperimentError, match="cannot fit"):
        placement.check_memory(experiment, PONG, seeds=8)


@pytest.mark.parametrize(
    ("env", "place", "said"),
    [
        ("gym/CartPole-v1", "device", "has no stacks of frames"),
        ("minatar/Breakout", "host", "add --loop host"),
    ],
)
def test_places_that_cannot_be(
    env: str, place: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert dispatch(["train", "dqn", "--env", env, "--out", str(out), "--replay-on", place]) == 2
    said_here = capsys.readouterr().err
    assert said in said_here and said_here.count("\n") == 1 and not out.exists()
