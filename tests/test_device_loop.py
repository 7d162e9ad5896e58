"""The loop on the device: its ring is `Storage`, its numbers are the host loop's, and what it compiles to copies no ring."""

import dataclasses
import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resprout.agents import ACE, DQN, SAC
from resprout.agents.networks import MinAtarCNN
from resprout.envs import EnvError, JaxEnv, make
from resprout.replay import Layout, Rings, Storage
from resprout.replay.ring import add
from resprout.training import Experiment, ExperimentError, checkpoint, placement, train
from resprout.training import run as run_module
from resprout.training.device_loop import DeviceLoop, next_multiple
from resprout.training.metrics import Episodes
from resprout.training.seeds import train_seeds

from .runs import comparable

SMALL = DQN(warmup=100, batch_size=8, hidden=(16,), target_period=10, epsilon_decay_steps=200, capacity=300)
SAC_SMALL = SAC(warmup=100, batch_size=8, hidden=(16, 16), capacity=300, n_step=3)


def small(directory: Path, env: str = "gymnax/CartPole-v1", agent: Any = SMALL, **changes: Any) -> Experiment:
    """A run of 400 agent steps with a checkpoint at every 200."""
    fields = {"steps": 400, "log_every": 100, "checkpoint_every": 200, "eval_episodes": 0, "out": str(directory)}
    return Experiment(agent=agent, env=env, **fields | changes)


# The ring


@pytest.mark.parametrize(("num_envs", "n_step", "capacity"), [(1, 1, 7), (3, 1, 9), (3, 1, 10), (1, 3, 8), (2, 4, 15)])
def test_a_ring_on_the_device_is_a_storage(num_envs: int, n_step: int, capacity: int) -> None:
    """On random episodes, often shorter than a window and cut or ended: slots, transitions and checkpoints are the same."""
    layout = Layout((2,), "float32", num_envs=num_envs, n_step=n_step, gamma=0.9)
    storage = Storage(capacity, (2,), "float32", num_envs=num_envs, n_step=n_step, gamma=0.9)
    rings = Rings(layout, capacity, seeds=2)  # the other one must stay as it is
    ring, generator = rings[1], np.random.default_rng(0)
    step = jax.jit(lambda state, *arguments: add(layout, state, *arguments))

    def observations() -> np.ndarray:
        return generator.normal(size=(num_envs, 2)).astype(np.float32)

    first = observations()
    storage.begin(first)
    ring.begin(first)
    segments: list[Any] = []
    for count in range(40):
        terminated = generator.random(num_envs) < 0.25
        truncated = ~terminated & (generator.random(num_envs) < 0.25)
        final = observations()
        observation = np.where((terminated | truncated)[:, None], observations(), final)
        action = generator.integers(0, 4, num_envs).astype(np.int32)
        reward = generator.normal(size=num_envs).astype(np.float32)
        transition = (action, reward, terminated, truncated, final, observation)
        state, slots = step(jax.tree.map(lambda leaf: leaf[1], rings.state), *transition)
        rings.state = jax.tree.map(lambda whole, own: whole.at[1].set(own), rings.state, state)
        np.testing.assert_array_equal(slots, storage.add(*transition))
        assert (ring.written, len(ring)) == (storage.written, len(storage))
        if count % 10 == 9:
            start = max(
                storage.written - capacity, int(segments[-1]["start"]) + len(segments[-1]["reward"]) if segments else 0
            )
            segments.append(ring.export(start, ring.written))
            close(segments[-1], storage.export(start, storage.written))
            close(ring.pending(), storage.pending())
    close(ring.gather(np.arange(len(ring))), storage.gather(np.arange(len(storage))))
    close(ring.draw(5, np.random.default_rng(1)), storage.draw(5, np.random.default_rng(1)))
    assert not any(leaf[0].any() for leaf in jax.tree.leaves(rings.state))

    # A checkpoint of either is one of the other.
    for restored in (Rings(layout, capacity)[0], Storage(capacity, (2,), "float32", num_envs=num_envs, n_step=n_step)):
        for segment in segments:
            restored.load(segment)
        restored.restore_pending(ring.pending())
        close(restored.export(restored.written - len(restored), restored.written), segments_of(ring))
    with pytest.raises(ValueError, match="reward does not fit"):
        Rings(layout, capacity)[0].load(segments[0] | {"reward": np.zeros((3, 2), np.float32)})
    with pytest.raises(ValueError, match="holds transitions"):
        ring.export(0, ring.written)
    with pytest.raises(ValueError, match="nothing is written"):
        rings[0].draw(1, np.random.default_rng(0))


def segments_of(ring: Any) -> Any:
    return ring.export(ring.written - len(ring), ring.written)


def close(left: Any, right: Any) -> None:
    """Equal but for rewards, which the device sums in float32."""
    assert left.keys() == right.keys()
    for name in left:
        if "reward" in name:
            np.testing.assert_allclose(left[name], right[name], rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_frames_are_shared_on_the_host_only() -> None:
    with pytest.raises(ValueError, match="on the host only"):
        Rings(Layout((8, 8, 4), "uint8", frame_stack=4), 100)


# The environments


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_a_transition_is_a_step(name: str) -> None:
    """Beyond the bounds, actions are clipped to them; an episode of the pendulum is cut after 200 steps."""
    env = make(f"gymnax/{name}", num_envs=2)
    assert isinstance(env, JaxEnv)
    spec = env.spec
    env.reset(3)
    carry, transition, generator = env.carry, jax.jit(env.transition), np.random.default_rng(0)
    truncated = 0
    for _ in range(205):
        action: Any = generator.integers(0, 2, 2).astype(np.int32)
        if not spec.discrete:
            action = generator.uniform(-1.5, 1.5, (2, spec.action_size)).astype(np.float32)
        carry, expected = transition(carry, action)
        for got, want in zip(env.step(action), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)
        truncated += expected.truncated.sum()
    assert truncated == (0 if spec.discrete else 2)
    saved = env.snapshot()
    assert saved is not None
    after = env.step(action)
    env.restore(saved)
    np.testing.assert_array_equal(env.step(action).observation, after.observation)
    with pytest.raises(EnvError, match="cannot be drawn"):
        env.render()


def test_bounds_of_actions_are_the_tasks() -> None:
    spec = make("gymnax/Pendulum-v1").spec
    assert (spec.discrete, spec.action_size, spec.action_low, spec.action_high) == (False, 1, (-2.0,), (2.0,))


# The network


def test_patches_are_a_convolution() -> None:
    """Values and gradients of MinAtar's torso are those of the same parameters in a convolution proper."""

    class Convolution(nn.Module):
        @nn.compact
        def __call__(self, planes: jax.Array) -> jax.Array:
            return nn.relu(nn.Conv(16, (3, 3), padding="VALID", name="conv_0")(planes.astype(jnp.float32))).reshape(
                4, -1
            )

    planes = jax.random.bernoulli(jax.random.key(0), 0.3, (4, 10, 10, 7)).astype(jnp.uint8)
    params = MinAtarCNN().init(jax.random.key(1), planes)
    targets = jax.random.normal(jax.random.key(2), (4, 1024))

    def loss(params: Any, module: Any) -> jax.Array:
        return jnp.mean((module.apply(params, planes) - targets) ** 2)

    for module in (MinAtarCNN(), Convolution()):
        assert module.apply(params, planes).shape == (4, 1024)
    values = [jax.value_and_grad(loss)(params, module) for module in (MinAtarCNN(), Convolution())]
    for ours, theirs in zip(*map(jax.tree.leaves, values), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


# The numbers of the host loop

CASES = {
    "dqn": ("gymnax/CartPole-v1", SMALL, {"num_envs": 2, "replay_ratio": 0.75}),
    "dqn, reshuffled, surgery": (
        "gymnax/CartPole-v1",
        dataclasses.replace(SMALL, n_step=3),
        {"replay": "reshuffled", "interventions": ("redo:tau=0.1,period=20,probe=16",), "sync": True, "steps": 250},
    ),
    "minatar, c51": (
        "minatar/Breakout",
        dataclasses.replace(SMALL, distribution="c51"),
        {"interventions": ("redo:tau=0.1,period=20",), "steps": 250},
    ),
    "sac, prioritized, ratio 2": (
        "gymnax/Pendulum-v1",
        SAC_SMALL,
        {
            "replay": "prioritized",
            "interventions": ("reset:period=50", "l2_init"),
            "replay_ratio": 2,
            "steps": 200,
        },
    ),
}
SLOW = {"minatar, c51", "sac, prioritized, ratio 2"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_a_seed_gives_what_it_gives_on_the_host(case: str, tmp_path: Path) -> None:
    """The two compilations may round differently; nothing else differs, so all numbers agree to 1e-4."""
    env, agent, changes = CASES[case]
    results = {
        loop: train(small(tmp_path / loop, env, agent, loop=loop, **changes), quiet=True) for loop in ("host", "device")
    }
    for host, device in zip(*(jax.tree.leaves(result.state) for result in results.values()), strict=True):
        np.testing.assert_allclose(host, device, rtol=1e-4, atol=1e-5)
    host_lines, device_lines = (comparable(tmp_path / loop) for loop in results)
    assert len(host_lines) == len(device_lines)
    for host_line, device_line in zip(host_lines, device_lines, strict=True):
        assert host_line == pytest.approx(device_line, rel=1e-4, abs=1e-5)
    counts = ("agent_steps", "gradient_steps")
    assert [results["host"].summary[name] for name in counts] == [results["device"].summary[name] for name in counts]


def test_the_loop_is_chosen_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cart, hopper = make("gymnax/CartPole-v1"), make("gym/CartPole-v1")
    on_device = placement.loop_on_device
    assert on_device(small(tmp_path), cart)
    assert not on_device(small(tmp_path, loop="host"), cart)
    assert not on_device(small(tmp_path), hopper)
    for changes, said in (
        ({"count_draws": True}, "kept on the host"),
        ({"agent": dataclasses.replace(SMALL, n_step=3, warmup=1)}, "before a transition is complete"),
        ({"agent": dataclasses.replace(SMALL, capacity=2**31 - 1), "steps": 2**31 - 1}, "does not fit on the device"),
    ):
        assert not on_device(small(tmp_path, **changes), cart)
        with pytest.raises(ExperimentError, match=f"--loop device: .*{said}"):
            on_device(small(tmp_path, loop="device", **changes), cart)
    with pytest.raises(ExperimentError, match="lives on the host"):
        train(small(tmp_path / "run", "gym/CartPole-v1", loop="device"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_is_fitted_on_the_host_keeps_the_loop_there(tmp_path: Path) -> None:
    ace = ACE(hidden=(8,), batch_size=8, capacity=300, causal_rows=100, warmup=100)
    pendulum = make("gymnax/Pendulum-v1")
    assert not placement.loop_on_device(small(tmp_path, "gymnax/Pendulum-v1", ace), pendulum)
    without = dataclasses.replace(ace, causal_every=0)
    assert placement.loop_on_device(small(tmp_path, "gymnax/Pendulum-v1", without), pendulum)


@pytest.mark.parametrize("diagnose_every", [0, pytest.param(150, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_one_never_stopped(diagnose_every: int, tmp_path: Path) -> None:
    """Also where lines, checkpoints and the end cut the agent steps into other chunks."""
    changes: dict[str, Any] = {"num_envs": 2, "diagnose_every": diagnose_every}
    changes["interventions"] = ("redo:tau=0.1,period=20,probe=16",)
    whole = train(small(tmp_path / "whole", **changes), quiet=True)
    train(small(tmp_path / "halved", **changes, steps=250), quiet=True)
    for path in checkpoint.names(tmp_path / "halved" / "checkpoints"):
        if int(path.name) > 200:
            shutil.rmtree(path)
    (tmp_path / "halved" / "summary.json").unlink()
    resumed = train(small(tmp_path / "halved", **changes), resume=tmp_path / "halved", quiet=True)
    for left, right in zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(left, right)
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "halved")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["experiment"]["loop"] == "auto"


def test_all_steps_at_once_are_the_steps_one_by_one() -> None:
    generator = np.random.default_rng(0)
    rewards, over = generator.normal(size=(50, 3)).astype(np.float32), generator.random((50, 3)) < 0.1
    singly, cut = Episodes(3), Episodes(3)
    for reward, ends in zip(rewards, over, strict=True):
        singly.add(reward, ends)
    for part in (slice(0, 1), slice(1, 1), slice(1, 30), slice(30, 50)):
        cut.add_all(rewards[part], over[part])
    assert singly.to_json() == cut.to_json() and singly.ended


@pytest.mark.parametrize(
    ("step", "every", "num_envs", "due"), [(0, 100, 1, 100), (99, 100, 3, 102), (102, 100, 3, 201)]
)
def test_the_next_step_at_which_something_is_due(step: int, every: int, num_envs: int, due: int) -> None:
    assert next_multiple(step, every, num_envs) == due
    assert due // every != (due - num_envs) // every


# What it compiles to


def loop_for(seeds: int, env: str = "gymnax/CartPole-v1", **changes: Any) -> DeviceLoop:
    experiment = small(Path("nowhere"), env, **changes)
    envs = [make(env, num_envs=experiment.num_envs, seed=seed) for seed in range(seeds)]
    agent = experiment.build_agent(envs[0].spec)
    rings = placement.make_rings(experiment, envs[0].spec, seeds)
    runs = []
    for seed, its in enumerate(envs):
        own = dataclasses.replace(experiment, seed=seed)
        runs.append(run_module.Run(own, Path("nowhere"), its, agent, (), True, ExitStack(), rings, seed))
        runs[-1].training = runs[-1].fresh()
        runs[-1].restart_environments()
    trainings = [run.training for run in runs]
    return DeviceLoop(experiment, range(seeds), trainings, rings, agent, runs[0].sampler)


def arguments(loop: DeviceLoop) -> tuple[Any, ...]:
    return loop.keys, loop.carry, loop._counts(), np.int32(1), np.zeros(loop.length, np.int32)


CAPACITY = 7919  # a number that no other array has


@pytest.mark.parametrize(
    ("seeds", "sync"),
    [(2, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, False), (1, True), (2, True)))],
)
def test_no_step_copies_the_ring(seeds: int, sync: bool) -> None:
    agent = dataclasses.replace(SMALL, capacity=CAPACITY)
    redo = ("redo:tau=0.1,period=20,probe=16",)
    loop = loop_for(seeds, agent=agent, steps=10**6, sync=sync, interventions=redo)
    compiled = loop.advance.lower(*arguments(loop)).compile().as_text()
    assert f"[{CAPACITY}" in compiled or f",{CAPACITY}" in compiled
    copied = [line.strip() for line in compiled.splitlines() if re.search(rf"\[(\d+,)?{CAPACITY}\b.* copy\(", line)]
    assert not copied


def test_conditions_stay_conditions_with_several_seeds() -> None:
    """Whether to explore, to copy the target and to operate depends on counts alone, which all seeds share."""

    def conditions(loop: DeviceLoop) -> int:
        return len(re.findall(r"\bcond\[", str(jax.make_jaxpr(loop.advance)(*arguments(loop)))))

    changes = {"interventions": ("redo:tau=0.1,period=20,probe=16", "shrink_and_perturb:period=30")}
    assert conditions(loop_for(1, **changes)) == conditions(loop_for(2, **changes)) >= 4


@pytest.mark.parametrize("loop", ["device", "host", "vmap"])
def test_a_new_task_of_changing_environments_triggers(loop: str, tmp_path: Path) -> None:
    """Two environments: 50 steps of each are 100 agent steps. Learning begins in the second turn, the first that is seen."""
    experiment = small(
        tmp_path / "run",
        "changing/CartPole-physics@50",
        num_envs=2,
        loop="host" if loop == "host" else "device",
        interventions=("reset:period=10,when=task_boundary",),
        steps=500,
    )
    if loop == "vmap":
        directory = train_seeds(dataclasses.replace(experiment, loop="host"), (0, 1), mode="vmap", quiet=True) / "s1"
    else:
        directory = train(experiment, quiet=True).directory
    lines = {line["step"]: line for line in comparable(directory)}
    fired = {step: line.get("reset/critic/trigger/fired") for step, line in lines.items() if step % 100 == 0}
    assert [bool(fired[step]) for step in (100, 200, 300, 400, 500)] == [False, False, True, True, True]
    assert json.loads((directory / "config.json").read_text())["experiment"]["interventions"] == [
        "reset:period=10,when=task_boundary"
    ]
