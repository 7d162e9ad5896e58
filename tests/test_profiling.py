"""A trace of a run: it is there, can be read, and says which function of ours and which gradient step took how long."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from resprout.agents import DQN
from resprout.training import Experiment, train
from resprout.training.seeds import train_seeds

from .runs import comparable, refused

SMALL = DQN(
    warmup=100, batch_size=8, hidden=(16,), target_period=10, epsilon_decay_steps=200, capacity=300, replay_ratio=1
)


def small(directory: Path, env: str, **changes: Any) -> Experiment:
    fields = {"steps": 200, "log_every": 100, "checkpoint_every": 0, "eval_episodes": 0, "out": str(directory)}
    return Experiment(agent=SMALL, env=env, **fields | changes)


def events(directory: Path) -> list[dict[str, Any]]:
    """Of the trace that Perfetto reads; TensorBoard's lies beside it."""
    (path,) = directory.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    (whole,) = path.parent.glob("*.xplane.pb")
    assert b"jit_" in whole.read_bytes()
    with gzip.open(path, "rt") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def test_a_profile_names_the_gradient_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    experiment = small(run, "gym/CartPole-v1", interventions=("shrink_and_perturb:period=3",))
    train(experiment, profile=6)
    traced = events(run)
    steps = [int(event["args"]["step_num"]) for event in traced if event["name"] == "gradient_step"]
    assert steps == [20, 21, 22, 23, 24, 25]
    names = [event["name"] for event in traced]
    assert {"PjitFunction(learn)", "act", "remember", "sample", "intervene"} <= set(names)
    assert names.count("intervene") == 2 and all(event["dur"] >= 0 for event in traced)
    said = capsys.readouterr().err
    assert f"profile of 6 gradient steps: tensorboard --logdir {run / 'profile'}" in said


def test_a_profile_changes_no_number(tmp_path: Path) -> None:
    for name, steps in (("with", 5), ("without", 0)):
        train(small(tmp_path / name, "gym/CartPole-v1"), quiet=True, profile=steps)
    assert comparable(tmp_path / "with") == comparable(tmp_path / "without")


@pytest.mark.slow
def test_a_profile_of_the_loop_on_the_device_and_one_cut_short(tmp_path: Path) -> None:
    """Chunks end where the trace does; the last one ends with the run."""
    train(small(tmp_path / "whole", "gymnax/CartPole-v1", log_every=1000), quiet=True, profile=30)
    assert "PjitFunction(_advance)" in {event["name"] for event in events(tmp_path / "whole")}
    train(small(tmp_path / "short", "gym/CartPole-v1"), quiet=True, profile=1000)
    assert sum(event["name"] == "gradient_step" for event in events(tmp_path / "short")) == 80


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["host", "device"])
def test_a_profile_of_several_seeds_in_one_loop(loop: str, tmp_path: Path) -> None:
    experiment = small(tmp_path, "gymnax/CartPole-v1", loop=loop, log_every=1000)
    train_seeds(experiment, (0, 1), mode="vmap", quiet=True, profile=6)
    names = [event["name"] for event in events(tmp_path / "s0")]
    assert names.count("gradient_step") == 6 if loop == "host" else "PjitFunction(_advance)" in names
    assert not (tmp_path / "s1" / "profile").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--profile", "-1"), "must not be negative"),
        (("--profile", "5", "--seeds", "0,1", "--seeds-mode", "processes"), "seeds of one process"),
    ],
)
def test_profiles_that_cannot_be(
    flags: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(tmp_path / "run", capsys, *flags)


def test_a_run_too_short_for_a_profile_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small(tmp_path / "run", "gym/CartPole-v1", steps=110), profile=5)
    assert "no profile: the run ended within its first 20 gradient steps" in capsys.readouterr().err
    assert not (tmp_path / "run" / "profile").exists()
