"""One run over several devices is that of one device, up to the order of sums; with forced devices, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from resprout.agents import DQN
from resprout.training import Experiment, ExperimentError, train
from resprout.training.__main__ import dispatch
from resprout.training.sharing import host_device, share_batch

RUNS = """
import dataclasses, pathlib, shutil, sys
import jax, numpy as np
from resprout.agents import DQN, SAC
from resprout.training import Experiment, run, train
from resprout.training.metrics import read_metrics

jax.config.update("jax_numpy_rank_promotion", "raise")
assert len(jax.local_devices()) == 4
root = pathlib.Path(sys.argv[1])
small = dict(warmup=60, batch_size=16, hidden=(16,), capacity=100)
dqn = DQN(**small, target_period=10, replay_ratio=1.0, epsilon_decay_steps=100)
common = dict(steps=120, log_every=20, checkpoint_every=100, eval_episodes=0)
redo = "redo:tau=0.1,period=25,probe="  # acts on a probe that the devices share equally, or that they do not
RUNS = {
    "dqn": Experiment(agent=dqn, env="gym/CartPole-v1", replay="prioritized", **common,
                      interventions=(redo + "18", "shrink_and_perturb:period=22")),
    # resets: the scores of ReDo can lie so near its threshold that the order of sums decides
    "sac": Experiment(agent=SAC(**small), env="gym/Pendulum-v1", **common, diagnose_every=110,
                      interventions=("reset:period=40,layers=head",)),
    "device": Experiment(agent=dqn, env="gymnax/CartPole-v1", **common, interventions=(redo + "16",)),
    # elu: so can what a rectifier is given
    "frames": Experiment(agent=dataclasses.replace(dqn, torso="mlp", activation="elu"), env="atari/Pong",
                         replay_on="device", **common),
}
original, traces = run.compile_functions, []

def counted(experiment, spec, agent, *rest):
    def update(*arguments):
        traces.append(experiment.out)
        return agent.update(*arguments)
    return original(experiment, spec, agent._replace(update=update), *rest)

run.compile_functions = counted

for name in sys.argv[2:]:
    outs = {devices: str(root / f"{name}{devices}") for devices in (1, 4)}
    each = {devices: dataclasses.replace(RUNS[name], out=out) for devices, out in outs.items()}
    one, four = (train(experiment, devices=devices, quiet=True).state for devices, experiment in each.items())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        assert len(b.sharding.device_set) == 4 and b.is_fully_replicated
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(a).max(initial=0))
    lines = [read_metrics(pathlib.Path(out, "metrics.jsonl")) for out in outs.values()]
    for left, right in zip(*lines, strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() - {"wall_clock", "steps_per_second"}:
            np.testing.assert_allclose(left[key] or 0, right[key] or 0, rtol=1e-3, atol=1e-4, err_msg=key)
    assert traces.count(outs[1]) == traces.count(outs[4])

    shutil.rmtree(pathlib.Path(outs[4], "checkpoints", f"{120:012d}"))
    pathlib.Path(outs[4], "summary.json").unlink()
    again = train(each[4], resume=outs[4], devices=None, quiet=True).state
    for a, b in zip(jax.tree.leaves(four), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
"""


# The second device stands for an accelerator, the first for the CPU beside it.
BESIDE = """
import dataclasses, pathlib, shutil, sys
import jax, numpy as np
from resprout.agents import DQN
from resprout.training import Experiment, compiled, train
from resprout.training.metrics import read_metrics
from resprout.training.run import Run
from resprout.training.seeds import train_seeds

host, accelerator = jax.devices()
jax.config.update("jax_default_device", accelerator)
root, replay, drawn_on = pathlib.Path(sys.argv[1]), sys.argv[2], jax.devices()[int(sys.argv[3])]
small = DQN(warmup=60, batch_size=16, hidden=(16,), capacity=100, target_period=10, replay_ratio=1.0)
common = dict(agent=small, env="gym/CartPole-v1", replay=replay, steps=120, log_every=20, checkpoint_every=100, eval_episodes=0,
              interventions=("redo:tau=0.1,period=25,probe=18",))
devices = []

def agree(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

def run(name, resume=None, seeds=None):
    experiment = Experiment(out=str(root / name), **common)
    if seeds:
        return train_seeds(experiment, seeds, mode="vmap", quiet=True)
    return train(experiment, resume=resume, quiet=True).state

def trained(run, *arguments):
    parts = run.training.sampler, run.training.agent
    devices.append([{leaf.device for leaf in jax.tree.leaves(part)} for part in parts])
    return finish(run, *arguments)

finish, Run.finish = Run.finish, trained
alone = run("alone")
run("seeds-alone", seeds=(0, 1))
assert devices == [[{accelerator}, {accelerator}]] * 3
devices.clear()

compiled.host_device = lambda: host
beside = run("beside")
agree(alone, beside)
shutil.rmtree(root / "beside" / "checkpoints" / f"{120:012d}")
(root / "beside" / "summary.json").unlink()
agree(beside, run("beside", resume=str(root / "beside")))
run("seeds-beside", seeds=(0, 1))
assert devices == [[{drawn_on}, {accelerator}]] * 4, devices
for seed in ("s0", "s1"):
    lines = [[{k: v for k, v in line.items() if k not in ("wall_clock", "steps_per_second")} for line in
              read_metrics(root / f"seeds-{where}" / seed / "metrics.jsonl")] for where in ("alone", "beside")]
    assert lines[0] == lines[1]
"""


def in_child(script: str, *arguments: str, devices: int = 4) -> str:
    """What a process with forced devices says."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-P", "-c", script, *arguments]
    done = subprocess.run(command, check=False, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "names", [("dqn",), pytest.param(("sac", "device", "frames"), marks=pytest.mark.slow)], ids=lambda names: names[0]
)
def test_a_run_over_four_devices_is_that_of_one(names: tuple[str, ...], tmp_path: Path) -> None:
    """Parameters and metrics, with interventions, priorities and diagnostics; resumed over four, bit for bit as not stopped."""
    in_child(RUNS, str(tmp_path), *names)


@pytest.mark.parametrize(("replay", "drawn_on"), [("reshuffled", 0), ("prioritized", 1)])
def test_slots_are_drawn_beside_an_accelerator_unless_they_hang_on_priorities(
    replay: str, drawn_on: int, tmp_path: Path
) -> None:
    """One run, its continuation and seeds in one process: with the numbers that they have where all is on one device."""
    in_child(BESIDE, str(tmp_path), replay, str(drawn_on), devices=2)


SMALL = DQN(warmup=60, batch_size=8, hidden=(8,), target_period=10, capacity=100)


def small(directory: Path, **changes: Any) -> Experiment:
    return Experiment(agent=SMALL, env="gym/CartPole-v1", steps=80, eval_episodes=0, out=str(directory), **changes)


@pytest.mark.parametrize(
    ("default", "backends", "expected"),
    [("cpu", {"cpu"}, None), ("gpu", {"gpu", "cpu"}, "cpu:0"), ("gpu", {"gpu"}, None)],
)
def test_where_jax_is_to_do_without_the_cpu_nothing_is_drawn_there(
    default: str, backends: set[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def local_devices(backend: str) -> list[str]:
        if backend not in backends:
            raise RuntimeError(f"Unknown backend {backend}")
        return [f"{backend}:0"]

    monkeypatch.setattr(jax, "default_backend", lambda: default)
    monkeypatch.setattr(jax, "local_devices", local_devices)
    assert host_device() == expected


def test_one_device_shares_nothing(tmp_path: Path) -> None:
    assert share_batch(small(tmp_path), 1) is None
    with pytest.raises(ExperimentError, match="--devices must be 1 to"):
        share_batch(small(tmp_path), 0)


def test_a_batch_that_does_not_divide_is_said(tmp_path: Path) -> None:
    said = in_child(
        """
import sys
from resprout.training.__main__ import dispatch
flags = "--env", "gym/CartPole-v1", "--devices", "3", "--agent.batch-size", "32", "--out", sys.argv[1]
assert dispatch(["train", "dqn", *flags]) == 2
""",
        str(tmp_path / "run"),
    )
    assert said == "resprout: a batch of 32 cannot be shared equally by 3 devices: give another --agent.batch-size\n"
    assert not list(tmp_path.iterdir())


def test_another_number_of_devices_is_said_when_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(small(run), quiet=True)
    config = json.loads((run / "config.json").read_text())
    assert config["shared_by"] == 1
    (run / "config.json").write_text(json.dumps(config | {"shared_by": 4, "device_kinds": ["abacus"]}))
    assert dispatch(["train", "--resume", str(run), "--steps", "90"]) == 0
    said = capsys.readouterr().err
    assert "devices were 4 and are 1: the run may round otherwise from here on" in said
    assert "kinds of device were ['abacus'] and are ['cpu']: the run may round otherwise from here on" in said
    assert dispatch(["train", "--resume", str(run), "--steps", "100"]) == 0
    assert "round otherwise" not in capsys.readouterr().err
