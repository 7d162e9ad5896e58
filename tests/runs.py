"""What a run left in its directory, for comparison with another's; and flags with which there is none."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from resprout.envs import make
from resprout.training import Experiment, checkpoint
from resprout.training.__main__ import dispatch
from resprout.training.metrics import read_metrics


def comparable(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the clock."""
    clock = ("wall_clock", "steps_per_second")
    return [
        {key: value for key, value in line.items() if key not in clock}
        for line in read_metrics(directory / "metrics.jsonl")
    ]


def agent_state(directory: Path) -> Any:
    """The agent in the newest checkpoint, which must be whole."""
    experiment = Experiment.from_json(json.loads((directory / "config.json").read_text())["experiment"])
    agent = experiment.build_agent(make(experiment.env, num_envs=experiment.num_envs).spec)
    path, complaints = checkpoint.newest(directory / "checkpoints")
    assert not complaints
    return checkpoint.restore_agent(path, jax.jit(agent.init)(jax.random.key(0)))


def assert_equal(left: Any, right: Any) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_close(left: Any, right: Any, **tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance)


def refused(out: Path, capsys: pytest.CaptureFixture[str], *flags: str, env: str = "gym/CartPole-v1") -> str:
    """What `resprout train dqn` says to `flags` that it does not take: exit code 2, and nothing created."""
    assert dispatch(["train", "dqn", "--env", env, "--out", str(out), *flags]) == 2
    assert not out.exists()
    return capsys.readouterr().err
