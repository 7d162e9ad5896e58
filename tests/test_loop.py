"""The loop on an environment of known steps, what reaches the device, the sums, and what an evaluation counts."""

import json
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resprout.agents import DQN, SAC, Agent
from resprout.agents.learner import Batch
from resprout.envs import EnvSpec, Step, make
from resprout.replay import Storage, uniform
from resprout.training import Experiment, train
from resprout.training import run as run_module
from resprout.training.compiled import STREAMS, Compiled, compile_functions, compiler_options, seed_from, streams
from resprout.training.evaluation import evaluate, exploit_function
from resprout.training.host_loop import Training, host_loop
from resprout.training.metrics import Episodes, Totals, read_metrics
from resprout.training.placement import describe_replay

SPEC = EnvSpec("gym/Scripted", 2, (1,), "float32", discrete=True, action_size=5, reward_clip=1.0)
# Of each agent step, for both environments: reward, terminated, truncated, whether a whole game is over.
SCRIPT = [
    ((3.0, -0.5), (False, False), (False, False), (False, False)),
    ((0.25, 1.0), (True, False), (False, False), (False, False)),  # a lost life
    ((1.0, -7.0), (False, False), (False, True), (False, True)),
    ((-2.0, 0.0), (True, False), (False, False), (True, False)),
    ((0.0, 2.0), (False, False), (False, False), (False, False)),
]


class Scripted:
    """Plays SCRIPT. The observations are 0, 1, 2, ..., those that end an episode 100 more; environment 1 has -x."""

    spec = SPEC

    def __init__(self) -> None:
        self.count, self.actions = 0, []

    def observation(self, count: int) -> np.ndarray:
        return np.array([[count], [-count]], np.float32)

    def reset(self, seed: int | None = None) -> np.ndarray:
        return self.observation(0)

    def step(self, actions: np.ndarray) -> Step:
        reward, *flags = map(np.array, SCRIPT[self.count])
        self.actions.append(actions.tolist())
        self.count += 1
        observation = self.observation(self.count)
        ended = (flags[0] | flags[1])[:, None]
        return Step(
            observation,
            reward.astype(np.float32),
            *flags[:2],
            observation + np.sign(observation) * 100 * ended,
            flags[2],
        )


@pytest.mark.parametrize("sync", [True, False])
def test_what_happened_is_what_is_stored_and_learnt(sync: bool) -> None:
    """Two environments, a warm-up of 4 agent steps, then 3 gradient steps in 4 agent steps."""
    seen: dict[str, list[Any]] = {"act": [], "learn": [], "priorities": []}

    def act(agent: int, observation: np.ndarray, agent_step: int) -> np.ndarray:
        seen["act"].append((int(agent_step), agent, observation.ravel().tolist()))
        return np.array([3, 4], np.int32)

    def learn(agent: int, totals: None, columns: Any, weight: Any, *steps: Any) -> tuple[int, None, Any]:
        seen["learn"].append((agent, columns["observation"].ravel().tolist(), weight, *map(int, steps)))
        return agent + 1, totals, f"priorities {agent}"

    def prioritize(sampler: int, slots: np.ndarray, priorities: str) -> int:
        seen["priorities"].append((slots.tolist(), priorities))
        return sampler

    def never(*arguments: Any) -> Any:
        raise AssertionError("nothing was asked to look")

    env, storage = Scripted(), Storage(50, (1,), "float32", num_envs=2, gamma=0.5)
    storage.begin(env.reset())
    t = Training(env, storage, env.reset(), 0, 0, None, Episodes(2), ratio=Fraction(3, 4))
    compiled = Compiled(
        act=act,
        explore=lambda agent_step: np.array([agent_step, 2], np.int32),
        remember=lambda sampler, slots: sampler + len(slots),
        sample=lambda sampler: (sampler, np.array([sampler - 1, 0]), f"weight {sampler}"),
        learn=learn,
        prioritize=prioritize,
        diagnose=never,
        diagnose_all=never,
        interventions=(),
        seed=0,
    )
    agent = DQN(gamma=0.5, warmup=4, batch_size=2, capacity=50)
    host_loop(Experiment(agent=agent, env="gym/Scripted", steps=10, sync=sync), t, compiled, lambda: False)

    assert env.actions == [[0, 2], [2, 2], [3, 4], [3, 4], [3, 4]]
    stored = storage.export(0, 10)
    for name, expected in {
        "observation": [0, 0, 1, -1, 2, -2, 3, -3, 4, -4],
        "action": [0, 2, 2, 2, 3, 4, 3, 4, 3, 4],
        "reward": [1, -0.5, 0.25, 1, 1, -1, -1, 0, 0, 1],  # clipped
        "discount": [0.5, 0.5, 0, 0.5, 0.5, 0.5, 0, 0.5, 0.5, 0.5],  # 0 where it terminated, not where it was cut
        "next_observation": [1, -1, 102, -2, 3, -103, 104, -4, 5, -5],
    }.items():
        np.testing.assert_array_equal(stored[name].ravel(), expected, err_msg=name)
    # Returns are those of whole games, unclipped; that of environment 1 was cut and counts.
    assert t.episodes.line() == {"episode/return": (2.25 - 6.5) / 2, "episode/length": 3.5, "episode/count": 2}
    np.testing.assert_array_equal(t.episodes.running_return, [0, 2])

    # 1.5 gradient steps are owed by each pair of agent steps after the warm-up, so 1, 2, 1 are taken.
    assert [step for step, *_ in seen["act"]] == [4, 6, 8]
    assert [agent for _, agent, _ in seen["act"]] == ([0, 1, 3] if sync else [0, 0, 1])
    assert [observation for *_, observation in seen["act"]] == [[2, -2], [3, -3], [4, -4]]
    taken = 4 if sync else 3
    assert (t.agent_step, t.gradient_step, t.owed) == (10, taken, Fraction(1, 2) + 4 - taken)
    last = [6, 8, 8, 10]  # transitions written when each of the gradient steps samples
    expected = [(i, [stored["observation"].ravel()[n - 1], 0], f"weight {n}", i, n) for i, n in enumerate(last[:taken])]
    assert seen["learn"] == expected
    assert seen["priorities"] == [([n - 1, 0], f"priorities {i}") for i, n in enumerate(last[:taken])]


# What reaches the device.


def counting_agent(actions: int = 2) -> Agent:
    """Answers with the agent step and a draw of its key; learns the sum of the weights and a draw of its key."""

    def act(state: Any, observation: Any, key: Any, agent_step: Any = None) -> Any:
        return jnp.stack([jnp.float32(agent_step), jax.random.uniform(key)]) + 0 * state

    def update(state: Any, batch: Any, key: Any) -> Any:
        metrics = {"b": batch.weight.sum() + batch.observation.sum(), "a": jax.random.uniform(key)}
        return state + 1, metrics, 2 * batch.weight

    return Agent(lambda key: jnp.zeros(()), act, lambda state, observation, key: observation, update, {})


def compiled_for(spec: EnvSpec, **changes: Any) -> Compiled:
    agent: Any = DQN(warmup=10, batch_size=3, capacity=20) if spec.discrete else SAC(warmup=10, batch_size=3)
    experiment = Experiment(agent=agent, env=spec.id, steps=100, **changes)
    return compile_functions(experiment, spec, counting_agent(), uniform(20))


def test_actions_are_told_the_step_and_have_a_key_of_their_own() -> None:
    compiled = compiled_for(SPEC)
    answers = [compiled.act(jnp.zeros(()), jnp.zeros((2, 1)), np.int32(step)) for step in range(5)]
    assert [float(step) for step, _ in answers] == [0, 1, 2, 3, 4]
    assert len({float(draw) for _, draw in answers}) == 5


def test_the_warm_up_explores_everything() -> None:
    explore = compiled_for(SPEC).explore
    discrete = np.stack([explore(np.int32(step)) for step in range(40)])
    assert discrete.shape == (40, 2) and set(discrete.ravel().tolist()) == set(range(5))
    assert not np.array_equal(discrete[:, 0], discrete[:, 1])
    spec = EnvSpec("gym/Continuous", 2, (1,), "float32", discrete=False, action_size=3)
    explore = compiled_for(spec).explore
    continuous = np.stack([explore(np.int32(step)) for step in range(40)])
    assert continuous.shape == (40, 2, 3) and len(np.unique(continuous)) == continuous.size
    assert -1 <= continuous.min() < -0.9 and 0.9 < continuous.max() <= 1


def columns_of(observation: float) -> dict[str, Any]:
    zeros = jnp.zeros(3)
    observations = jnp.full((3, 1), observation)
    return {
        "observation": observations,
        "next_observation": observations,
        "action": jnp.zeros(3, jnp.int32),
        "reward": zeros,
        "discount": zeros,
    }


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_learning_hands_on_weights_and_keys_and_sums_by_name(on_nan: str) -> None:
    compiled = compiled_for(SPEC, on_nan=on_nan)
    state, totals, draws = jnp.zeros(()), Totals.zeros(("a", "b")), []
    for gradient_step, observation in enumerate((0.0, np.inf, 1.0, -np.inf)):
        before = np.array(totals.sums)
        weight = jnp.array([1.0, 2.0, 3.0])
        state, totals, priorities = compiled.learn(
            state, totals, columns_of(observation), weight, np.int32(gradient_step), np.int32(0)
        )
        draws.append(float(totals.sums[0] - before[0]))
        bad = on_nan == "skip" and not np.isfinite(observation)
        np.testing.assert_array_equal(priorities, [0, 0, 0] if bad else [2, 4, 6])
    assert totals.skipped == 2
    if on_nan == "stop":
        assert state == 4 and len(set(draws)) == 4
        assert totals.not_finite() == "b became nan at gradient step 1"
    else:
        assert state == 2
        assert totals.means() == {"a": pytest.approx((draws[0] + draws[2]) / 2), "b": pytest.approx((6 + 9) / 2)}
        assert totals.not_finite() is None


def test_compiler_options_change_no_number_beyond_rounding() -> None:
    """Only what learns from images has any, on a CPU; sums may be taken in another order."""
    images = EnvSpec("gym/Images", 1, (20, 20, 3), "uint8", discrete=True, action_size=4)
    options = compiler_options(images)
    assert options and not compiler_options(SPEC)
    agent = DQN(learning_rate=1e-3, padding="valid").build(EnvSpec("x", 1, (36, 36, 4), "uint8", True, 4))
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (2, 32, 36, 36, 4)).astype(np.uint8)
    ones = np.ones(32, np.float32)
    batch = Batch(frames[0], np.arange(32, dtype=np.int32) % 4, ones, 0.9 * ones, frames[1], ones)
    state, key = agent.init(jax.random.key(0)), jax.random.key(1)
    _, metrics, errors = jax.jit(agent.update)(state, batch, key)
    _, others, other_errors = jax.jit(agent.update, compiler_options=options)(state, batch, key)
    np.testing.assert_allclose(errors, other_errors, rtol=0, atol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, others[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_streams_and_seeds_are_apart() -> None:
    keys = [streams(seed)[name] for seed in (0, 1) for name in STREAMS]
    assert len({np.asarray(jax.random.key_data(key)).tobytes() for key in keys}) == 2 * len(STREAMS)
    seeds = [seed_from(key, counter) for key in keys for counter in (0, 1, 1000)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)


# What is said of a run.


def test_episodes_survive_a_checkpoint() -> None:
    episodes = Episodes(2)
    for reward, over in (((1.0, 2.0), (False, True)), ((4.0, 8.0), (False, False))):
        episodes.add(np.array(reward, np.float32), np.array(over))
    again = Episodes.from_json(json.loads(json.dumps(episodes.to_json())))
    assert again.line() == {"episode/return": 2.0, "episode/length": 1.0, "episode/count": 1}
    assert again.last_return == 2.0 and again.line() == {}
    again.add(np.zeros(2, np.float32), np.ones(2, np.bool_))
    assert again.ended == [(5.0, 3), (8.0, 2)]


def test_a_line_is_the_mean_since_the_last(tmp_path: Path) -> None:
    agent = DQN(warmup=100, batch_size=8, hidden=(16,), capacity=300, replay_ratio=1.0)
    lines = {}
    for every in (1, 5):
        out = tmp_path / str(every)
        options = {"steps": 130, "log_every": every, "eval_episodes": 0, "checkpoint_every": 0, "out": str(out)}
        train(Experiment(agent=agent, env="gym/CartPole-v1", sync=True, **options), quiet=True)
        lines[every] = [line for line in read_metrics(out / "metrics.jsonl") if "critic/loss" in line]
    single = np.array([line["critic/loss"] for line in lines[1]])
    assert len(single) == 30
    np.testing.assert_allclose([line["critic/loss"] for line in lines[5]], single.reshape(6, 5).mean(axis=1), rtol=1e-4)


class Cycles(Scripted):
    """Three environments; i pays 10^i in every step, loses a life every step and ends a game every 2 i + 2 steps."""

    spec = EnvSpec("gym/Cycles", 3, (1,), "float32", discrete=True, action_size=1000)

    def observation(self, count: int) -> np.ndarray:
        return np.full((3, 1), count, np.float32)

    def step(self, actions: np.ndarray) -> Step:
        self.actions.append(actions.tolist())
        self.count += 1
        over = self.count % np.array([2, 4, 6]) == 0
        observation = self.observation(self.count)
        return Step(
            observation, np.float32([1, 10, 100]), np.ones(3, np.bool_), np.zeros(3, np.bool_), observation, over
        )


def test_an_evaluation_plays_each_environments_share_of_whole_games() -> None:
    env = Cycles()

    def exploit(state: Any, observation: Any, key: Any) -> Any:
        return jnp.stack([jnp.int32(observation[0, 0]), *jax.random.randint(key, (2,), 0, 1000)])

    evaluation = evaluate(exploit_function(exploit), None, env, episodes=5, seed=0)
    assert evaluation.returns == [2, 2, 40, 600, 40] and evaluation.lengths == [2, 2, 4, 6, 4]
    assert [action[0] for action in env.actions] == list(range(8))  # the observation it acts on
    assert len({tuple(action[1:]) for action in env.actions}) == 8  # a key of its own for each step
    again = Cycles()
    evaluate(exploit_function(exploit), None, again, episodes=5, seed=0)
    assert env.actions == again.actions


def test_evaluation_does_not_explore_whatever_training_does(tmp_path: Path) -> None:
    agent = DQN(
        warmup=20, batch_size=4, hidden=(4,), capacity=100, epsilon_end=1.0, epsilon_eval=0.0, learning_rate=0.01
    )
    experiment = Experiment(
        agent=agent, env="gym/CartPole-v1", steps=60, sync=True, eval_episodes=3, out=str(tmp_path / "run")
    )
    result = train(experiment, quiet=True)
    seed = seed_from(streams(0)["evaluation"], 60)
    with closing(make("gym/CartPole-v1", num_envs=3)) as env:
        played = agent.build(env.spec).exploit
        assert evaluate(exploit_function(played), result.state, env, 3, seed) == result.evaluation
    assert run_module.evaluate_run(experiment, result.directory, 3, seed) == result.evaluation


def test_environments_are_made_and_begun_as_the_experiment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, made, seeds = run_module.make, [], {True: [], False: []}

    def watched(env_id: str, **options: Any) -> Any:
        made.append((env_id, *(options[name] for name in ("training", "num_envs", "seed", "protocol"))))
        env = original(env_id, **options)
        begin = env.reset
        monkeypatch.setattr(env, "reset", lambda seed: (seeds[options["training"]].append(seed), begin(seed))[1])
        return env

    monkeypatch.setattr(run_module, "make", watched)
    agent = DQN(torso="mlp", hidden=(2,), warmup=25, batch_size=2, capacity=50, n_step=3, gamma=0.5)
    experiment = Experiment(
        agent=agent, env="atari/Breakout", steps=30, num_envs=2, seed=5, protocol="cleanrl", checkpoint_every=15,
        eval_every=20, eval_episodes=2, out=str(tmp_path / "run"),
    )  # fmt: skip
    result = train(experiment, quiet=True)
    run_module.evaluate_run(experiment, result.directory, episodes=1, seed=7)
    assert made == [
        ("atari/Breakout", True, 2, 5, "cleanrl"),
        ("atari/Breakout", False, 2, 5, "cleanrl"),
        ("atari/Breakout", False, 1, 5, "cleanrl"),
    ]
    # EnvPool's state cannot be saved, so that it begins anew at each checkpoint, each time from another seed.
    assert len(seeds[True]) == len(set(seeds[True])) == 3
    assert seeds[False][2] == 7 and len(set(seeds[False])) == 3
    replay = describe_replay(experiment, original("atari/Breakout", num_envs=2).spec).layout
    assert (replay.n_step, replay.gamma, replay.num_envs, replay.frame_stack) == (3, 0.5, 2, 4)


def test_episodes_cut_by_a_checkpoint_are_not_counted(tmp_path: Path) -> None:
    """An episode of Reacher has 50 agent steps, and begins anew after the checkpoint at 70."""
    agent = SAC(hidden=(4,), warmup=130, batch_size=4, capacity=100)
    options = {"checkpoint_every": 70, "log_every": 140, "eval_episodes": 0, "out": str(tmp_path / "run")}
    train(Experiment(agent=agent, env="mujoco/Reacher-v5", steps=140, replay_ratio=0, **options), quiet=True)
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (line["episode/length"], line["episode/count"]) == (50, 2)
