"""Several seeds in one loop on the host: each is its solo run, also where episodes end at different times, and goes on exactly."""

import collections
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from resprout.agents import DQN, SAC
from resprout.envs import make, step_together
from resprout.envs.interface import SplitEnv
from resprout.training import Experiment, checkpoint, compiled, train
from resprout.training import seeds as seeds_module
from resprout.training.compiled import Functions, compile_functions_of_seeds
from resprout.training.metrics import Totals, read_metrics
from resprout.training.seeds import train_seeds

from .runs import agent_state, assert_close, assert_equal, comparable

CART = DQN(
    warmup=100, batch_size=8, hidden=(16,), target_period=10, epsilon_decay_steps=200, capacity=300, n_step=3,
    replay_ratio=1.0,
)  # fmt: skip
CHANGES: dict[str, Any] = {
    "num_envs": 2,
    "replay": "prioritized",
    "interventions": ("redo:tau=0.1,period=20,probe=16",),
}
HOPPER = SAC(warmup=100, batch_size=32, hidden=(32, 32), capacity=1_000)
BREAKOUT = DQN(
    warmup=60, batch_size=8, replay_ratio=0.5, target_period=10, epsilon_decay_steps=200, capacity=300, double=True
)
SEEDS = (3, 7)


def small(directory: Path, agent: Any = CART, env: str = "gym/CartPole-v1", **changes: Any) -> Experiment:
    fields = {"steps": 400, "log_every": 50, "checkpoint_every": 200, "eval_every": 200, "eval_episodes": 1}
    return Experiment(agent=agent, env=env, out=str(directory), **fields | changes)


def assert_solo(together: Experiment, solo: Path, seed: int, tolerance: float) -> None:
    """The run of `seed` in `together` is what a run of its own gives, up to rounding."""
    out = Path(str(together.out), f"s{seed}")
    result = train(dataclasses.replace(together, seed=seed, out=str(solo)), quiet=True)
    assert_close(agent_state(out), agent_state(solo), rtol=10 * tolerance, atol=tolerance)
    for left, right in zip(comparable(out), comparable(solo), strict=True):
        assert left == pytest.approx(right, rel=10 * tolerance, abs=tolerance)
    summary = json.loads((out / "summary.json").read_text())
    same = ("agent_steps", "gradient_steps", "episode_lengths", "digest")
    assert [summary[name] for name in same] == [result.summary[name] for name in same]
    assert summary["episode_returns"] == pytest.approx(result.summary["episode_returns"], rel=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, collections.Counter[str]]:
    """Two seeds with everything on, and how often each function was traced."""
    traces, original = collections.Counter[str](), compiled.functions_of_seeds

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            traces[name] += 1
            return function(*arguments)

        return call

    def watched(*arguments: Any) -> Functions:
        pure = original(*arguments)
        names = [field.name for field in dataclasses.fields(pure)]
        return Functions(**{name: counted(name, getattr(pure, name)) for name in names})

    experiment = small(tmp_path_factory.mktemp("batched") / "together", **CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "functions_of_seeds", watched)
        assert train_seeds(experiment, SEEDS, mode="vmap", quiet=True) == Path(str(experiment.out))
    return experiment, traces


def test_a_whole_run_traces_once(trained: tuple[Experiment, collections.Counter[str]]) -> None:
    """Over lines, evaluations, checkpoints and surgery."""
    # `act` once more, to see which arrays of the state it reads
    assert trained[1] == {"act": 2, "explore": 1, "sample": 1, "learn": 1, "probe": 1, "intervene": 1}


@pytest.mark.parametrize("seed", [7, pytest.param(3, marks=pytest.mark.slow)])
def test_a_seed_is_its_solo_run(
    seed: int, trained: tuple[Experiment, collections.Counter[str]], tmp_path: Path
) -> None:
    """n-step windows, priorities and surgery of 300 gradient steps; poles fall at different times."""
    experiment, _ = trained
    assert_solo(experiment, tmp_path / "solo", seed, 1e-5)
    both = [comparable(Path(str(experiment.out), f"s{seed}")) for seed in SEEDS]
    assert [line["gradient_step"] for line in both[0]] == [line["gradient_step"] for line in both[1]]
    assert any(mine.get("episode/count") != its.get("episode/count") for mine, its in zip(*both, strict=True))
    assert any(line.get("redo/critic/recycled/hidden/dense_0") for line in both[0])


def test_the_last_checkpoint_ends_the_windows_of_all_seeds(tmp_path: Path) -> None:
    """Of environments that cannot be captured, before the gradient steps that the last agent step owes."""
    together = small(
        tmp_path / "together",
        SAC(warmup=100, batch_size=8, hidden=(16, 16), capacity=300, n_step=3),
        "mujoco/InvertedPendulum-v4",
        steps=203,
        checkpoint_every=0,
        eval_every=0,
    )
    train_seeds(together, SEEDS, mode="vmap", quiet=True)
    for seed in SEEDS:
        solo = dataclasses.replace(together, seed=seed, out=str(tmp_path / f"solo{seed}"))
        train(solo, quiet=True)
        mine, its = (comparable(path) for path in (tmp_path / "together" / f"s{seed}", tmp_path / f"solo{seed}"))
        assert mine[-2]["step"] == 203 and "critic/loss" in mine[-2]
        for left, right in zip(mine, its, strict=True):
            assert left == pytest.approx(right, rel=1e-3, abs=1e-4)


def test_seeds_that_stopped_go_on_bit_for_bit(
    trained: tuple[Experiment, collections.Counter[str]], tmp_path: Path
) -> None:
    """From the checkpoint half-way: its own file of metrics, replay, priorities, windows and episodes."""
    experiment, _ = trained
    whole, half = Path(str(experiment.out)), tmp_path / "half"
    shutil.copytree(whole, half)
    for seed in SEEDS:
        shutil.rmtree(half / f"s{seed}" / "checkpoints" / f"{400:012d}")
        (half / f"s{seed}" / "summary.json").unlink()
    train_seeds(dataclasses.replace(experiment, out=str(half)), SEEDS, mode="vmap", resume=True, quiet=True)
    for seed in SEEDS:
        assert_equal(agent_state(whole / f"s{seed}"), agent_state(half / f"s{seed}"))
        assert comparable(whole / f"s{seed}") == comparable(half / f"s{seed}")


SLOW_CASES = {
    "all at once": (
        dataclasses.replace(CART, n_step=1),
        "gym/CartPole-v1",
        {"interventions": ("redo:tau=0.1,period=20", "shrink_and_perturb:period=50", "l2_init"), "diagnose_every": 150},
    ),
    "SAC, EnvPool": (HOPPER, "mujoco/Hopper-v4", {}),
    "SAC, a draw counted, sync": (
        HOPPER,
        "mujoco/Hopper-v4",
        {"sync": True, "count_draws": True, "replay": "reshuffled", "on_nan": "skip", "num_envs": 2},
    ),
    "DQN, frames": (BREAKOUT, "atari/Breakout", {"steps": 200, "checkpoint_every": 100, "eval_episodes": 0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES)
def test_more_seeds_that_are_their_solo_runs(case: str, tmp_path: Path) -> None:
    """EnvPool's episodes begin anew at every checkpoint, the last too. Some hundred gradient steps, fewer from frames."""
    agent, env, changes = SLOW_CASES[case]
    experiment = small(tmp_path / "together", agent, env, **{"eval_episodes": 0} | changes)
    train_seeds(experiment, SEEDS, mode="vmap", quiet=True)
    for seed in SEEDS:
        assert_solo(experiment, tmp_path / f"solo{seed}", seed, 1e-4)


@pytest.mark.parametrize(
    ("env_id", "steps"), [("mujoco/Hopper-v4", 200), ("atari/Breakout", 150), ("gym/Acrobot-v1", 20)]
)
def test_environments_together_are_those_alone(env_id: str, steps: int) -> None:
    """Bit for bit, with episodes and lives that end at different times; EnvPool's step at the same time."""
    protocol = "cleanrl" if env_id.startswith("atari/") else None  # lost lives end episodes
    together, alone = ([make(env_id, num_envs=2, seed=seed, protocol=protocol) for seed in SEEDS] for _ in range(2))
    assert isinstance(together[0], SplitEnv) == (not env_id.startswith("gym/"))
    for env, own in zip(together, alone, strict=True):
        np.testing.assert_array_equal(env.reset(), own.reset())
    generator, ended = np.random.default_rng(0), np.zeros((2, 2), int)
    spec = together[0].spec
    for _ in range(steps):
        actions: Any = generator.uniform(-1, 1, (2, 2, spec.action_size)).astype(np.float32)
        if spec.discrete:
            actions = generator.integers(0, spec.action_size, (2, 2)).astype(np.int32)
        both = step_together(together, actions)
        for seed, step in enumerate(both):
            for left, right in zip(step, alone[seed].step(actions[seed]), strict=True):
                np.testing.assert_array_equal(left, right)
            ended[seed] += step.terminated | step.truncated
    assert env_id.startswith("gym/") or (ended.max() > 0 and len(np.unique(ended)) > 1)
    for env in (*together, *alone):
        env.close()


def test_conditions_stay_conditions_with_several_seeds() -> None:
    """Whether to copy the target depends on the count of gradient steps, which all seeds share."""
    experiment = small(Path("nowhere"), dataclasses.replace(CART, n_step=1))
    spec = make(experiment.env).spec
    agent = experiment.build_agent(spec)
    pure = compile_functions_of_seeds(experiment, spec, agent, experiment.sampler(), SEEDS)
    state = jax.vmap(agent.init)(jax.random.split(jax.random.key(0), 2))
    columns = {
        "observation": np.zeros((2, 8, 4), np.float32),
        "action": np.zeros((2, 8), np.int32),
        "reward": np.zeros((2, 8), np.float32),
        "discount": np.zeros((2, 8), np.float32),
        "next_observation": np.zeros((2, 8, 4), np.float32),
    }
    totals = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), Totals.zeros(("critic/loss",)))
    steps = np.int32(0), np.int32(0)
    traced = str(jax.make_jaxpr(pure.learn)(state, totals, columns, np.ones((2, 8), np.float32), *steps))
    assert len(re.findall(r"\bcond\[", traced)) >= 1


@pytest.mark.parametrize(("backend", "mode"), [("cpu", "processes"), ("gpu", "vmap"), ("tpu", "vmap")])
def test_an_accelerator_trains_them_together(
    backend: str, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert seeds_module._mode(small(tmp_path / "run", **CHANGES), "auto", 1)[0] == mode


@pytest.mark.slow
def test_a_signal_stops_all_seeds_after_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    flags = (
        "--env",
        "mujoco/Hopper-v4",
        "--agent.warmup",
        "100",
        "--agent.hidden",
        "16",
        "16",
        "--agent.batch-size",
        "8",
    )
    command = [str(Path(sys.executable).with_name("resprout")), "train"]
    more = ("--eval-episodes", "0", "--log-every", "100", "--steps", "10000000", "--seeds-mode", "vmap")
    process = subprocess.Popen(
        [*command, "sac", *flags, *more, "--seeds", "0,1", "--out", str(out)], stderr=subprocess.PIPE, text=True
    )
    while not read_metrics(out / "s1" / "metrics.jsonl"):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and f"resprout train --resume {out}" in said.splitlines()[-1]
    saved = [checkpoint.names(out / f"s{seed}" / "checkpoints")[-1].name for seed in (0, 1)]
    assert saved[0] == saved[1]
    steps = int(saved[0]) + 100
    subprocess.run([*command, "--resume", str(out), "--seeds-mode", "vmap", "--steps", str(steps)], check=True)
    for seed in (0, 1):
        assert json.loads((out / f"s{seed}" / "summary.json").read_text())["agent_steps"] == steps
