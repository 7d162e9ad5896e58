"""Gymnasium's environments against bare Gymnasium, and exact snapshots."""

import importlib.util
import random
from functools import partial

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from resprout.envs import EnvError, gymnasium_, make
from resprout.envs.backend import env_seeds
from resprout.envs.gymnasium_ import GymnasiumEnv


def rollout(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    spec = env.spec
    steps_taken = []
    for _ in range(steps):
        if spec.discrete:
            actions = rng.integers(0, spec.action_size, spec.num_envs).astype(np.int32)
        else:
            actions = rng.uniform(-1, 1, (spec.num_envs, spec.action_size)).astype(np.float32)
        steps_taken.append(env.step(actions))
    return steps_taken


def assert_equal_steps(left, right):
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_each_environment_steps_as_a_bare_one_and_restarts_in_the_same_step():
    env = make("gym/CartPole-v1", num_envs=2)
    first = env.reset(4)
    singles = [gymnasium.make("CartPole-v1") for _ in range(2)]
    for i, (single, seed) in enumerate(zip(singles, env_seeds(4, 2), strict=True)):
        np.testing.assert_array_equal(first[i], single.reset(seed=seed)[0])
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(120):
        actions = rng.integers(0, 2, 2).astype(np.int32)
        step = env.step(actions)
        for i, single in enumerate(singles):
            observation, reward, terminated, truncated, _ = single.step(int(actions[i]))
            np.testing.assert_array_equal(step.final_observation[i], observation)
            assert (step.reward[i], step.terminated[i], step.truncated[i]) == (reward, terminated, truncated)
            if terminated:
                observation, _ = single.reset()
                ends += 1
            np.testing.assert_array_equal(step.observation[i], observation)
    assert ends > 4


def test_pendulum_is_scaled_and_truncated():
    env = make("gym/Pendulum-v1")
    assert (env.spec.action_low, env.spec.action_high, env.spec.max_episode_steps) == ((-2.0,), (2.0,), 200)
    env.reset(0)
    single = gymnasium.make("Pendulum-v1")
    single.reset(seed=env_seeds(0, 1)[0])
    for count in range(1, 201):
        step = env.step(np.array([[0.5]], np.float32))
        observation, reward, *_ = single.step(np.array([1.0], np.float32))
        np.testing.assert_array_equal(step.final_observation[0], observation)
        assert step.reward[0] == np.float32(reward)
        assert (step.truncated[0], step.terminated[0], step.episode_over[0]) == (count == 200, False, count == 200)


def test_an_end_at_the_time_limit_is_terminal():
    def fall(env):
        env.reset(0)
        for count in range(1, 50):
            step = env.step(np.zeros(1, np.int32))
            if step.episode_over[0]:
                return count, bool(step.terminated[0]), bool(step.truncated[0])
        raise AssertionError("no end")

    count, terminated, truncated = fall(make("gym/CartPole-v1"))
    assert (terminated, truncated) == (True, False)
    entry = gymnasium.spec("CartPole-v1").entry_point
    for limit, expected in ((count, (count, True, False)), (count - 1, (count - 1, False, True))):
        gymnasium.register("Short-v0", entry, max_episode_steps=limit)
        try:
            assert fall(make("gym/Short-v0")) == expected
        finally:
            gymnasium.registry.pop("Short-v0")


SNAPSHOT_IDS = [
    "gym/CartPole-v1",
    "gym/Pendulum-v1",
    "gym/FrozenLake-v1",
    "gym/Hopper-v5",
    "gym/HalfCheetah-v5",
    "gym/Ant-v5",  # its reward reads positions that MuJoCo derived before the step
    "gym/Humanoid-v5",
    "gym/ALE/Breakout-v5",
    "minatar/Breakout",
]


@pytest.mark.parametrize("env_id", SNAPSHOT_IDS)
def test_a_restored_environment_goes_on_bit_for_bit(env_id):
    env = make(env_id, num_envs=2)
    env.reset(0)
    here = rollout(env, 37)[-1].observation
    snapshot = env.snapshot()
    copies = {name: array.copy() for name, array in snapshot.items()}
    onwards = rollout(env, 150, seed=1)
    for name, array in snapshot.items():
        assert array.dtype != object
        np.testing.assert_array_equal(array, copies[name])  # stepping does not reach into a snapshot

    np.testing.assert_array_equal(env.restore(snapshot), here)
    np.testing.assert_array_equal(env.snapshot()["observation"], here)
    assert_equal_steps(rollout(env, 150, seed=1), onwards)

    fresh = make(env_id, num_envs=2, seed=9)
    np.testing.assert_array_equal(fresh.restore(snapshot), here)
    assert_equal_steps(rollout(fresh, 150, seed=1), onwards)
    env.close()
    fresh.close()


def test_the_time_limit_goes_on_counting_after_a_restore():
    env = make("gym/Pendulum-v1")
    env.reset(0)
    rollout(env, 150)
    other = make("gym/Pendulum-v1")
    other.restore(env.snapshot())
    assert [bool(step.truncated[0]) for step in rollout(other, 60)] == [False] * 49 + [True] + [False] * 10


class Made(gymnasium.Env):
    """An environment of a user's, with the spaces asked for."""

    def __init__(self, observation_space, action_space, state=None, render_mode="rgb_array"):
        assert render_mode is not None  # as Panda-gym, whose environments take no None
        self.observation_space, self.action_space, self.state = observation_space, action_space, state
        self.render_mode = render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 1}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


FLOATS = spaces.Box(-1, 1, (2,), np.float32)


@pytest.fixture
def made():
    def register(observation_space=FLOATS, action_space=FLOATS, state=None):
        kwargs = {"observation_space": observation_space, "action_space": action_space, "state": state}
        gymnasium.register("Made-v0", Made, kwargs=kwargs)
        return "gym/Made-v0"

    yield register
    gymnasium.registry.pop("Made-v0", None)


@pytest.mark.parametrize(
    ("space", "shape", "dtype"),
    [
        (spaces.Box(0, 255, (6, 5), np.uint8), (6, 5, 1), "uint8"),
        (spaces.Box(0, 255, (6, 5, 3), np.uint8), (6, 5, 3), "uint8"),
        (spaces.Box(0, 255, (7,), np.uint8), (7,), "float32"),
        (spaces.Box(-1, 1, (7,), np.float64), (7,), "float32"),
        (spaces.Dict(a=spaces.Box(-1, 1, (2, 2)), b=spaces.Discrete(3)), (7,), "float32"),
    ],
)
def test_observations_become_images_or_vectors(made, space, shape, dtype):
    env = make(made(space), num_envs=2)
    assert (env.spec.observation_shape, env.spec.observation_dtype) == (shape, dtype)
    assert env.reset(0).shape == (2, *shape)
    assert env.step(np.zeros((2, 2), np.float32)).observation.dtype == dtype


@pytest.mark.parametrize(
    ("spaces_given", "expected"),
    [
        ({"action_space": spaces.Box(-np.inf, np.inf, (2,))}, "no finite bounds"),
        ({"action_space": spaces.MultiDiscrete([2, 3])}, "only Discrete and float Box"),
        ({"action_space": spaces.Tuple((spaces.Discrete(2), FLOATS))}, "only Discrete and float Box"),
        ({"observation_space": spaces.Sequence(FLOATS)}, "cannot be made one array"),
    ],
)
def test_spaces_that_no_agent_can_use_are_refused_in_one_line(made, spaces_given, expected):
    with pytest.raises(EnvError, match=expected) as raised:
        make(made(**spaces_given))
    assert "\n" not in str(raised.value)


def test_state_of_an_unknown_kind_means_no_snapshot(made):
    for state, captured in ((random.Random(0), False), ({"level": (1, [2.5, "a"]), 3: None}, True)):
        env = make(made(state=state))
        env.reset(0)
        assert (env.snapshot() is not None) == captured
        gymnasium.registry.pop("Made-v0")


def dense(state): ...


def sparse(state): ...


class Chooses(Made):
    """Its rewards are chosen at a reset, by a function."""

    def __init__(self, before=None, **options):
        super().__init__(FLOATS, FLOATS, **options)
        self.chosen = before

    def reset(self, **options):
        self.chosen = sparse
        return super().reset(**options)


class Draws(Made):
    """Its screen is made at a reset."""

    def __init__(self, **options):
        super().__init__(FLOATS, FLOATS, **options)
        self.screen = None

    def reset(self, **options):
        self.screen = self.screen or type("Surface", (), {"__module__": "pygame.surface"})()
        return super().reset(**options)


@pytest.mark.parametrize("before", [None, dense, sparse])
def test_a_function_chosen_at_a_reset_means_no_snapshot(before):
    """An environment made anew would go on with another one, or none."""
    vector = gymnasium.vector.SyncVectorEnv([partial(Chooses, before)], autoreset_mode=AutoresetMode.SAME_STEP)
    env = GymnasiumEnv("gym/Chooses", vector, 0, render=False)
    env.reset()
    assert (env.snapshot() is not None) == (before is sparse)


def test_what_draws_is_left_as_it_is_by_a_restore():
    used, fresh = (
        GymnasiumEnv(
            "gym/Draws", gymnasium.vector.SyncVectorEnv([Draws], autoreset_mode=AutoresetMode.SAME_STEP), 0, False
        )
        for _ in range(2)
    )
    used.reset()
    fresh.restore(used.snapshot())
    assert fresh._vector.envs[0].screen is None
    fresh.reset()
    assert fresh._vector.envs[0].screen is not None


def test_what_a_space_draws_goes_on_after_a_restore(made):
    env_id = made()
    env = make(env_id)
    env.reset(0)
    rollout(env, 3)
    snapshot, onwards = env.snapshot(), rollout(env, 5)
    other = make(env_id)
    other.restore(snapshot)
    assert_equal_steps(rollout(other, 5), onwards)


def test_a_missing_package_is_named():
    if importlib.util.find_spec("Box2D"):
        pytest.skip("Box2D is installed")
    with pytest.raises(EnvError, match=r"pip install .*box2d") as raised:
        make("gym/LunarLander-v3")
    assert "\n" not in str(raised.value)


def test_evaluation_ends_episodes_of_environments_without_a_limit(monkeypatch):
    monkeypatch.setattr(gymnasium_, "LIMIT", 5)
    training, evaluation = (make("gym/CliffWalking-v1", training=training) for training in (True, False))
    assert (training.spec.max_episode_steps, evaluation.spec.max_episode_steps) == (None, 5)
    for env, over in ((training, [False] * 6), (evaluation, [False, False, False, False, True, False])):
        env.reset(0)
        assert [bool(env.step(np.zeros(1, np.int32)).truncated[0]) for _ in range(6)] == over  # against the wall
        env.close()
    for env_id, limit in (
        ("gym/CartPole-v1", 500),
        ("gym/ALE/Breakout-v5", None),
        ("gym/BreakoutNoFrameskip-v4", None),
    ):
        own = make(env_id, training=False)  # ALE counts frames
        assert own.spec.max_episode_steps == limit
        own.close()
