"""A disk that fills up in the middle of a run: one line that says so, and all that was there before is still there.

Stands in for the disk: the system's own limit on the size of a file, so that writes fail where and as they would.
"""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from resprout.agents import DQN
from resprout.replay import PastReplay
from resprout.training import Experiment, TrainingStopped, checkpoint, train
from resprout.training.__main__ import dispatch

from .runs import comparable

AGENT = DQN(warmup=100, batch_size=8, hidden=(16,), target_period=10, epsilon_decay_steps=200, capacity=300)
CHECKPOINT = 350  # agent step of the first checkpoint, after which the disk is full


def experiment(directory: Path, log_every: int) -> Experiment:
    """The replay goes to the disk in parts of 299, checkpoints aside: at 299, 350, 649 and 700."""
    return Experiment(
        agent=AGENT,
        env="gym/CartPole-v1",
        steps=700,
        log_every=log_every,
        checkpoint_every=CHECKPOINT,
        eval_episodes=0,
        save_replay=True,
        out=str(directory),
    )


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, directory: Path, room: int | None) -> Iterator[None]:
    """From the first checkpoint on files cannot grow beyond `room` bytes; None: than metrics.jsonl is, and half a line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = checkpoint.save
    fastest = jax.config.values["jax_persistent_cache_min_compile_time_secs"]

    def save_and_fill(*arguments, **keywords):
        saved = save(*arguments, **keywords)
        limit = (directory / "metrics.jsonl").stat().st_size + 40 if room is None else room
        jax.config.update(
            "jax_persistent_cache_min_compile_time_secs", 1e9
        )  # nothing cut short for other tests to find
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return saved

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", save_and_fill)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", fastest)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """A run that nothing happens to: its directory, and its agent at the end."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    return directory, jax.device_get(jax.tree.leaves(train(experiment(directory, 50), quiet=True).state))


@pytest.mark.parametrize(
    ("what", "room"), [("line of metrics at agent step 400", None), ("replay at agent step 649", 3_000)]
)
def test_what_was_written_before_is_still_there(tmp_path, monkeypatch, whole, what, room):
    directory, log_every = tmp_path / "run", 50 if room is None else 10_000
    with full_disk(monkeypatch, directory, room), pytest.raises(TrainingStopped) as stop:
        train(experiment(directory, log_every), quiet=True)
    message = str(stop.value)
    assert message.startswith(f"the {what} could not be written (")
    assert f"last good checkpoint is {directory}/checkpoints/{CHECKPOINT:012d}; make room, then: " in message
    assert message.endswith(f"resprout train --resume {directory}") and "\n" not in message

    good, complaints = checkpoint.newest(directory / "checkpoints")
    assert int(good.name) == CHECKPOINT and not complaints
    past = PastReplay(directory / "replay", checksums=True)
    assert len(past) == CHECKPOINT
    later = PastReplay(whole[0] / "replay", transitions=CHECKPOINT)
    slots = np.arange(CHECKPOINT)
    for name, column in past.gather(slots).items():
        np.testing.assert_array_equal(column, later.gather(slots)[name])
    assert [line["step"] for line in comparable(directory)] == list(range(log_every, CHECKPOINT + 1, log_every))

    resumed = train(experiment(directory, log_every), resume=directory, quiet=True)
    for a, b in zip(jax.device_get(jax.tree.leaves(resumed.state)), whole[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(PastReplay(directory / "replay", checksums=True)) == 700
    if room is None:
        assert comparable(directory) == comparable(whole[0])


def test_the_command_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    flags = ["--steps", "700", "--checkpoint-every", str(CHECKPOINT), "--save-replay", "--log-every", "10000"]
    agent = ["--agent.warmup", "100", "--agent.capacity", "300", "--eval-episodes", "0", "--out", str(directory)]
    with full_disk(monkeypatch, directory, 3_000):
        code = dispatch(["train", "dqn", "--env", "gym/CartPole-v1", *flags, *agent])
    said = capsys.readouterr().err
    last = [line for line in said.splitlines() if line.startswith("resprout:")]
    assert code == 1 and len(last) == 1 and "Traceback" not in said
    assert "the replay at agent step 649 could not be written" in last[0] and "--resume" in last[0]
