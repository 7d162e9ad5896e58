"""ACE against SAC, closed forms and whole runs: weighted entropy, delayed steps, resets, fits beside training."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

from resprout.agents import ACE, SAC, ACEState, Agent, Batch
from resprout.agents.sac import tanh_gaussian
from resprout.interventions.perturb import dormancy_perturb
from resprout.training import PRESETS, Experiment, train
from resprout.training import run as run_module
from resprout.training.checkpoint import names
from resprout.training.intervening import Acting, diagnose, parse_intervention
from resprout.training.metrics import read_metrics


@dataclass(frozen=True)
class Spec:
    id: str = "gym/Probe"
    observation_shape: tuple[int, ...] = (3,)
    discrete: bool = False
    action_size: int = 2


SHARED: dict[str, Any] = {"hidden": (16, 16), "activation": "elu+relu", "initialiser": "xavier", "batch_size": 8}
SMALL = ACE(**SHARED, warmup=20, capacity=200, causal_every=50, causal_rows=40, causal_delay=10)


def test_policy_churn_is_of_a_gradient_step_that_the_actor_takes_part_in() -> None:
    """Whatever step the look comes at, for the actor learns in every second one alone."""
    agent = SMALL.build(Spec())
    state, batch, other = (
        agent.init(jax.random.key(0)),
        random_batch(jax.random.key(1)),
        random_batch(jax.random.key(2)),
    )
    look = jax.jit(
        lambda state: diagnose(agent, state, state, {}, batch, other, jax.random.key(3), ())[0]["policy_churn"]
    )
    churn = [float(look(state.replace(gradient_step=jnp.int32(step)))) for step in range(4)]
    assert churn[0] > 0 and churn == [churn[0]] * 4


def random_batch(key: jax.Array, size: int = 8, observation: int = 3, action: int = 2) -> Batch:
    keys = jax.random.split(key, 5)
    return Batch(
        observation=jax.random.normal(keys[0], (size, observation)),
        action=jax.random.uniform(keys[1], (size, action), minval=-1.0),
        reward=jax.random.normal(keys[2], (size,)),
        discount=0.99 * jax.random.bernoulli(keys[3], 0.7, (size,)),
        next_observation=jax.random.normal(keys[4], (size, observation)),
        weight=jnp.ones(size),
    )


@cache
def compiled(config: Any, spec: Spec = Spec()) -> Agent:
    """The agent, each function compiled once for all tests."""
    agent = config.build(spec)
    return Agent(*map(jax.jit, agent[:4]), *agent[4:])


def assert_equal(left: Any, right: Any) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# The weighted entropy.


def test_with_equal_weights_every_step_it_is_sac_bit_for_bit() -> None:
    ace = compiled(replace(SMALL, target_update_interval=1, separate_heads=False))
    sac = compiled(SAC(**SHARED))
    left, right = (agent.init(jax.random.key(0)) for agent in (ace, sac))
    for step in range(4):
        batch, key = random_batch(jax.random.key(step)), jax.random.key(10 + step)
        left, left_metrics, left_priorities = ace.update(left, batch, key)
        right, right_metrics, right_priorities = sac.update(right, batch, key)
        assert_equal((left_metrics, left_priorities), (right_metrics, right_priorities))
    for name in ("actor", "critic", "temperature", "gradient_step"):
        assert_equal(getattr(left, name), getattr(right, name))
    observation = random_batch(jax.random.key(9)).observation
    skewed = left.replace(causal_weights=jnp.array([1.9, 0.1]))  # which acting does not read
    for function in ("act", "exploit"):
        expected = getattr(sac, function)(right, observation, jax.random.key(3))
        assert_equal(getattr(ace, function)(skewed, observation, jax.random.key(3)), expected)


def test_a_weight_selects_its_dimension() -> None:
    mean, log_std, noise = jnp.array([[0.3, -2.0, 0.1], [-0.5, 0.5, 0.0], [1.0, -0.2, -1.4]])
    u = np.float64(mean) + np.exp(np.float64(log_std)) * np.float64(noise)
    expected = norm.logpdf(u, mean, np.exp(np.float64(log_std))) - np.log(1 - np.tanh(u) ** 2)
    for k, weight in enumerate(3 * jnp.eye(3)):
        np.testing.assert_allclose(tanh_gaussian(mean, log_std, noise, weight)[1], 3 * expected[k], rtol=1e-5)
        slope = jax.grad(lambda log_std, weight=weight: tanh_gaussian(mean, log_std, noise, weight)[1])(log_std)
        assert [j for j in range(3) if slope[j] != 0] == [k]
    np.testing.assert_allclose(tanh_gaussian(mean, log_std, noise)[1], expected.sum(), rtol=1e-5)


def test_target_actor_and_temperature_read_the_weighted_density() -> None:
    """One gradient step by hand, with the noise that the agent draws."""
    agent, batch, key = compiled(SMALL), random_batch(jax.random.key(1)), jax.random.key(2)
    weights = np.array([1.7, 0.3])
    state = agent.init(jax.random.key(0)).replace(causal_weights=jnp.asarray(weights, jnp.float32))
    actor, critic = (agent.networks[name].apply for name in ("actor", "critic"))

    def sampled(observation: jax.Array, key: jax.Array) -> tuple[jax.Array, np.ndarray]:
        mean, log_std = actor(state.actor.params, observation)
        u = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        density = norm.logpdf(u, mean, np.exp(log_std)) - np.log(1 - np.tanh(np.float64(u)) ** 2)
        return jnp.tanh(u), density @ weights

    critic_key, policy_key = jax.random.split(key)
    after, metrics, priorities = agent.update(state, batch, key)
    action, log_prob = sampled(batch.next_observation, jax.random.split(critic_key)[0])
    next_value = critic(state.critic.target_params, batch.next_observation, action).min(axis=0) - log_prob
    target = np.asarray(batch.reward + batch.discount * next_value)
    error = target - np.asarray(critic(state.critic.params, batch.observation, batch.action))
    np.testing.assert_allclose(priorities, np.abs(error).mean(axis=0), rtol=1e-4)
    action, log_prob = sampled(batch.observation, policy_key)
    value = critic(after.critic.params, batch.observation, action).min(axis=0)
    np.testing.assert_allclose(metrics["actor/loss"], (log_prob - value).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["actor/entropy"], -log_prob.mean(), rtol=1e-4)
    slope = optax.tree.get(after.temperature.opt_state, "mu")["log_alpha"] / 0.1  # of Adam, 1 - b1
    np.testing.assert_allclose(slope, -log_prob.mean() - (-2), rtol=1e-4)


@pytest.mark.slow
def test_a_heavier_dimension_keeps_more_entropy() -> None:
    """A bandit of reward a0, alpha fixed: the best density of a0 is as exp(a0 / (alpha w0)), flatter with a larger w0.

    A11 would have it flatter than that of the other actions; those the reward does not read, so that theirs are flat at any weight.
    """
    config = replace(SMALL, learn_temperature=False, initial_temperature=0.1, target_update_interval=1)
    config = replace(config, actor_learning_rate=3e-3, critic_learning_rate=3e-3)
    agent = config.build(Spec(action_size=4))

    @jax.jit
    def spread(weights: jax.Array) -> jax.Array:
        def step(state: ACEState, key: jax.Array) -> tuple[ACEState, None]:
            batch = random_batch(key, 64, 3, 4)
            batch = batch.replace(reward=batch.action[:, 0], discount=jnp.zeros(64))
            return agent.update(state, batch, key)[0], None

        state = agent.init(jax.random.key(0)).replace(causal_weights=weights)
        state = jax.lax.scan(step, state, jax.random.split(jax.random.key(1), 500))[0]
        actions = agent.act(state, jnp.zeros((2_000, 3)), jax.random.key(2))
        return actions.std(axis=0)

    heavy, equal = spread(jnp.array([1.9, 0.7, 0.7, 0.7])), spread(jnp.ones(4))
    assert heavy[0] > 1.2 * equal[0]
    assert min(equal[1:]) > equal[0]  # what the reward does not read stays wide


# Delayed steps.


def test_actor_temperature_and_targets_take_every_second_step() -> None:
    agent, batch = compiled(SMALL), random_batch(jax.random.key(1))
    state, seen = agent.init(jax.random.key(0)), []
    for step in range(5):
        after, metrics, _ = agent.update(state, batch, jax.random.key(step))
        parts = [(s.actor, s.temperature, s.critic.target_params) for s in (state, after)]
        same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, parts), strict=True)]
        assert all(same) if step % 2 else not all(same)
        assert not np.array_equal(*(jax.tree.leaves(s.critic.params)[-1] for s in (state, after)))
        values = [float(metrics[name]) for name in ("actor/loss", "actor/entropy", "actor/grad_norm")]
        assert step % 2 == 0 or values == seen  # those of the step before
        state, seen = after, values
    steps = {name: int(optax.tree.get(getattr(state, name).opt_state, "ages").max()) for name in ("actor", "critic")}
    assert steps == {"actor": 3, "critic": 5}  # ceil(5 / 2)
    np.testing.assert_allclose(metrics["temperature/alpha"], jnp.exp(0), atol=2 * 3e-4 + 1e-6)


def test_polyak_share_is_of_the_new_critics() -> None:
    agent, batch = compiled(SMALL), random_batch(jax.random.key(1))
    before = agent.init(jax.random.key(0))
    after = agent.update(before, batch, jax.random.key(2))[0]
    expected = jax.tree.map(
        lambda new, old: 0.005 * new + 0.995 * old, after.critic.params, before.critic.target_params
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), after.critic.target_params, expected)


# Networks.


def test_networks_of_the_paper() -> None:
    preset = PRESETS["ace_mujoco"].agent
    agent = preset.build(Spec(observation_shape=(17,), action_size=6))
    params = jax.eval_shape(agent.networks["actor"].init, jax.random.key(0))["params"]
    shapes = {
        name: module["kernel"].shape for name, module in {**params["hidden"], **params}.items() if "kernel" in module
    }
    assert shapes == {
        "dense_0": (17, 1024),
        "dense_1": (1024, 1024),
        "dense_2": (1024, 1024),
        "mean": (1024, 6),
        "log_std": (1024, 6),
    }
    critic = jax.eval_shape(agent.networks["critic"].init, jax.random.key(0))["params"]
    assert critic["hidden"]["dense_0"]["kernel"].shape == (2, 23, 1024)


def test_first_layer_is_elu_and_the_others_relu() -> None:
    network = compiled(replace(SMALL, hidden=(16, 16, 16))).networks["actor"]
    params = network.init(jax.random.key(0))
    observation = jax.random.normal(jax.random.key(1), (5, 3))
    layers = jax.device_get(params["params"]["hidden"])
    x, function = np.asarray(observation), lambda x: np.where(x > 0, x, np.expm1(x))
    for name in ("dense_0", "dense_1", "dense_2"):
        x, function = function(x @ layers[name]["kernel"] + layers[name]["bias"]), lambda x: np.maximum(x, 0)
    for head, found in zip(("mean", "log_std"), network.apply(params, observation), strict=True):
        np.testing.assert_allclose(found, x @ params["params"][head]["kernel"], rtol=1e-4, atol=1e-5)


# The reset.


def silenced(state: ACEState, units: int) -> ACEState:
    """No gradient reaches this many units of the last hidden layer of the policy."""
    params = jax.tree.map(lambda leaf: leaf, state.actor.params)
    for head in ("mean", "log_std"):
        kernel = params["params"][head]["kernel"]
        params["params"][head]["kernel"] = kernel.at[:units].set(0)
    params["params"]["hidden"]["dense_1"]["bias"] = jnp.ones(16)  # none is silent but those
    return state.replace(actor=state.actor.replace(params=params))


@pytest.mark.slow
def test_policys_gradient_dormancy_decides_for_policy_and_critics() -> None:
    """Of 16 + 16 hidden units and 2 + 2 of the heads."""
    agent, batch, step = compiled(SMALL), random_batch(jax.random.key(1), size=64), jnp.int32(100_000)
    acting = Acting(dormancy_perturb(of="actor", tau=1e-5), agent, jax.random.key(5))
    act = jax.jit(acting.update)
    trained = agent.update(agent.init(jax.random.key(0)), random_batch(jax.random.key(3)), jax.random.key(4))[0]
    for units, keep in ((0, 0.9), (3, 0.9), (12, 1 - 12 / 36)):
        state = silenced(trained, units).replace(causal_weights=jnp.array([1.5, 0.5]))
        after, _, info = act(state, acting.init(state), batch, step, step)
        for name in ("actor", "critic"):
            np.testing.assert_allclose(info[f"{name}/dormancy"], units / 36, rtol=1e-6)
            np.testing.assert_allclose(info[f"{name}/keep"], keep, rtol=1e-6)
            before, edited = getattr(state, name), getattr(after, name)
            old, new = (learner.params["params"]["hidden"]["dense_1"] for learner in (before, edited))
            np.testing.assert_allclose(new["bias"], keep * old["bias"], rtol=1e-5)
            draw = (new["kernel"] - keep * old["kernel"]) / (1 - keep)
            product = jnp.swapaxes(draw, -1, -2) @ draw
            np.testing.assert_allclose(product, np.broadcast_to(np.eye(16), product.shape), atol=1e-4)  # orthogonal
            for moment in ("mu", "nu", "ages"):
                leaves = jax.tree.leaves(optax.tree.get(edited.opt_state, moment))
                assert leaves and not any(np.any(leaf) for leaf in leaves)
        draws = [
            getattr(after.critic, part)["params"]["hidden"]["dense_0"]["kernel"]
            - keep * getattr(state.critic, part)["params"]["hidden"]["dense_0"]["kernel"]
            for part in ("params", "target_params")
        ]
        assert not np.allclose(*draws, atol=1e-2)  # the target has draws of its own
        assert_equal((after.temperature, after.causal_weights), (state.temperature, state.causal_weights))
    assert_equal(act(state, acting.init(state), batch, step + 1, step)[0], state)
    noisy = jax.jit(Acting(dormancy_perturb(of="actor", tau=0.6), agent, jax.random.key(5)).update)
    for key in range(5):  # where the noise of the loss decides what is dormant, it is one noise for both
        info = noisy(trained, acting.init(trained), random_batch(jax.random.key(key), size=64), step, step)[2]
        assert info["actor/dormancy"] == info["critic/dormancy"] > 0


@pytest.mark.parametrize("name", ["ace_mujoco", "ace_small"])
def test_presets_reset_nine_times_in_a_million_steps(name: str) -> None:
    (reset,) = (parse_intervention(spec) for spec in PRESETS[name].experiment["interventions"])
    acting = Acting(reset, compiled(SMALL), jax.random.key(0))
    gradient_steps = 1_000_000 - PRESETS[name].agent.warmup
    due = [step for step in range(1, gradient_steps + 1) if acting.due(step)]
    assert due == list(range(100_000, 1_000_000, 100_000))


# Fits beside training.


class Levers(gymnasium.Env[Any, Any]):
    """The reward is the first of four levers; episodes have 25 agent steps."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)

    def __init__(self, render_mode: None = None) -> None: ...

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample() * 0, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), float(action[0]), False, False, {}


@pytest.fixture
def levers() -> Iterator[str]:
    gymnasium.register("Levers-v0", Levers, max_episode_steps=25)
    yield "gym/Levers-v0"
    del gymnasium.registry["Levers-v0"]


def small(env: str, out: Path, agent: ACE = SMALL, **changes: Any) -> Experiment:
    fields = {"steps": 170, "log_every": 20, "checkpoint_every": 0, "eval_episodes": 0, "out": str(out)}
    return Experiment(agent=agent, env=env, **fields | changes)


def fits(out: Path) -> dict[int, list[float]]:
    """Agent step -> weights that entered there."""
    lines = read_metrics(out / "metrics.jsonl")
    return {line["step"]: [line[f"causal/weight_{i}"] for i in range(4)] for line in lines if "causal/weight_0" in line}


def without_clock(out: Path) -> list[dict[str, Any]]:
    clock = ("wall_clock", "steps_per_second")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_metrics(out / "metrics.jsonl")]


def test_weights_enter_when_they_are_due_and_nothing_is_traced_again(
    levers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a fit takes longer than its delay, and then the run is the same one."""
    original, traces = run_module.compile_functions, []

    def watched(experiment: Any, spec: Any, agent: Agent, *others: Any) -> Any:
        def update(*arguments: Any) -> Any:
            traces.append(experiment.out)
            return agent.update(*arguments)

        return original(experiment, spec, agent._replace(update=update), *others)

    monkeypatch.setattr(run_module, "compile_functions", watched)
    quick = train(small(levers, tmp_path / "quick"), quiet=True)
    weights = fits(tmp_path / "quick")
    assert list(weights) == [60, 110, 160]  # 10 after each start
    for each in weights.values():
        np.testing.assert_allclose(np.mean(each), 1, rtol=1e-6)
        assert each[0] > 1.5 * max(each[1:])  # the lever that moves the reward
    assert list(quick.state.causal_weights) == weights[160]
    assert (tmp_path / "quick" / "causal.png").stat().st_size > 0

    from resprout.agents import ace

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return fitted(*arguments, **options)

    fitted = ace.causal_weights
    monkeypatch.setattr(ace, "causal_weights", slow)
    assert_equal(train(small(levers, tmp_path / "slow"), quiet=True).state, quick.state)
    assert without_clock(tmp_path / "slow") == without_clock(tmp_path / "quick")
    assert traces == [str(tmp_path / "quick"), str(tmp_path / "slow")]


@pytest.mark.parametrize(("delay", "num_envs", "at"), [(0, 1, [50, 100, 150]), (49, 3, [102, 150])])
def test_weights_enter_by_agent_steps_of_all_environments(
    delay: int, num_envs: int, at: list[int], levers: str, tmp_path: Path
) -> None:
    """A fit still under way when the next one starts enters there."""
    agent = replace(SMALL, causal_delay=delay)
    train(small(levers, tmp_path / "run", agent, num_envs=num_envs), quiet=True)
    assert list(fits(tmp_path / "run")) == at


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [55, pytest.param(45, marks=pytest.mark.slow), pytest.param(60, marks=pytest.mark.slow)]
)
def test_resumed_run_equals_one_never_stopped(step: int, levers: str, tmp_path: Path) -> None:
    """From a checkpoint before a fit, while it is under way and when it enters."""
    whole = train(small(levers, tmp_path / "whole", checkpoint_every=step), quiet=True)
    halved = small(levers, tmp_path / "halved", checkpoint_every=step, keep_checkpoints=9)
    train(halved, quiet=True)
    for path in names(tmp_path / "halved" / "checkpoints")[1:]:
        path.rename(path.with_name(f"gone-{path.name}"))
    (tmp_path / "halved" / "summary.json").unlink()
    resumed = train(halved, resume=tmp_path / "halved", quiet=True)
    assert_equal(whole.state, resumed.state)
    assert without_clock(tmp_path / "whole") == without_clock(tmp_path / "halved")


def test_no_fit_before_there_are_the_rows(levers: str, tmp_path: Path) -> None:
    train(small(levers, tmp_path / "late", replace(SMALL, causal_rows=120)), quiet=True)
    assert list(fits(tmp_path / "late")) == [160]
    never = train(small(levers, tmp_path / "never", replace(SMALL, causal_every=0)), quiet=True)
    assert fits(tmp_path / "never") == {} and not (tmp_path / "never" / "causal.png").exists()
    np.testing.assert_array_equal(never.state.causal_weights, np.ones(4))


def test_a_fit_that_fails_ends_the_run(levers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resprout.agents import ace

    def broken(*arguments: Any, **options: Any) -> Any:
        raise ValueError("a causal fit needs finite numbers")

    monkeypatch.setattr(ace, "causal_weights", broken)
    with pytest.raises(ValueError, match="a causal fit needs finite numbers"):
        train(small(levers, tmp_path / "run"), quiet=True)


# What cannot be.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_step": 3}, "n_step must be 1: what an action causes is read from its own reward, not 3"),
        ({"target_update_interval": 0}, "target_update_interval must be at least 1, not 0"),
        ({"causal_mode": "best"}, "causal_mode must be one of sink, full, not best"),
        ({"causal_sign": "both"}, "causal_sign must be one of signed, absolute, not both"),
        ({"causal_temperature": 0.0}, "causal_temperature must be positive, not 0.0"),
        ({"causal_every": -1}, "causal_every must be at least 0, not -1"),
        ({"causal_delay": 10_000}, "causal_delay must be zero or more and below causal_every = 10000, not 10000"),
        ({"capacity": 5_000}, "causal_rows must be at most the replay's capacity of 5000, not 10000"),
        ({"activation": "elu+rleu"}, "activation must be one of relu, elu"),
    ],
)
def test_a_bad_field_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ACE(**fields)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_the_environment_is_one_line() -> None:
    for spec, message in (
        (Spec(discrete=True, action_size=6), "ACE needs continuous actions; gym/Probe has 6 discrete ones: use DQN"),
        (Spec(observation_shape=(84, 84, 4)), "ACE needs vector observations"),
        (Spec(observation_shape=(37,)), r"causal_rows must be at least 41, for the 39 states and actions of gym/Probe"),
    ):
        with pytest.raises(ValueError, match=message):
            SMALL.build(spec)


def test_an_experiment_survives_its_file() -> None:
    preset = PRESETS["ace_small"]
    experiment = Experiment(agent=preset.agent, env="mujoco/Hopper-v4", **preset.experiment)
    again = Experiment.from_json(json.loads(json.dumps(experiment.to_json())))
    assert again.agent == preset.agent and again.digest() == experiment.digest()
