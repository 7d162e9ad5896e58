"""What holds for every backend: ids, errors, seeds, actions."""

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from resprout.envs import ATARI_PROTOCOLS, EnvError, list_envs, make
from resprout.envs.backend import Actions, env_seeds

IDS = [
    "mujoco/Hopper-v5",
    "dmc/walker-run",
    "metaworld/hammer",
    "robotics/AdroitHandDoor-v1",
    "myosuite/MyoHandPyramidsmallRandom-v0",
    "atari/Breakout",
    "gym/CartPole-v1",
    "gym/Pendulum-v1",
    "minatar/Breakout",
]


def random_actions(env, rng):
    spec = env.spec
    if spec.discrete:
        return rng.integers(0, spec.action_size, spec.num_envs).astype(np.int32)
    return rng.uniform(-1, 1, (spec.num_envs, spec.action_size)).astype(np.float32)


def rollout(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [env.step(random_actions(env, rng)) for _ in range(steps)]


def equal_steps(left, right):
    return all(
        np.array_equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("env_id", IDS)
def test_spec_describes_what_reset_and_step_return(env_id):
    env = make(env_id, num_envs=2)
    spec = env.spec
    shape, dtype = (2, *spec.observation_shape), np.dtype(spec.observation_dtype)
    first = env.reset(0)
    assert (first.shape, first.dtype) == (shape, dtype)
    assert json.loads(json.dumps(spec.protocol))["versions"]
    steps = rollout(env, 20)
    kept = [step.observation.copy() for step in steps]
    more = rollout(env, 20)
    for step in steps + more:
        assert (step.observation.shape, step.observation.dtype) == (shape, dtype)
        assert (step.final_observation.shape, step.final_observation.dtype) == (shape, dtype)
        assert (step.reward.shape, step.reward.dtype) == ((2,), np.float32)
        for flags in (step.terminated, step.truncated, step.episode_over):
            assert (flags.shape, flags.dtype) == ((2,), np.bool_)
        assert not (step.terminated & step.truncated).any()
        going_on = ~(step.terminated | step.truncated)
        np.testing.assert_array_equal(step.observation[going_on], step.final_observation[going_on])
    for step, copy in zip(steps, kept, strict=True):
        np.testing.assert_array_equal(step.observation, copy)  # no array is written to again
    env.close()


@pytest.mark.parametrize("env_id", IDS)
def test_one_seed_repeats_and_two_differ(env_id):
    env = make(env_id, num_envs=2, seed=7)
    first = env.reset(7)
    steps = rollout(env, 40)
    np.testing.assert_array_equal(env.reset(7), first)
    assert equal_steps(rollout(env, 40), steps)
    np.testing.assert_array_equal(env.reset(), first)  # the seed of `make`
    env.reset(8)
    assert not equal_steps(rollout(env, 40), steps)
    env.close()


@given(st.integers(0, 2**63), st.integers(1, 9))
def test_env_seeds_are_distinct_and_differ_between_neighbours(seed, num_envs):
    seeds, others = env_seeds(seed, num_envs), env_seeds(seed + 1, num_envs)
    assert len(set(seeds)) == num_envs and set(seeds).isdisjoint(others)
    assert all(0 <= one < 2**31 for one in seeds)
    assert env_seeds(seed, num_envs + 1)[:num_envs] == seeds


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.floats(-3, 3))
def test_actions_reach_both_bounds_and_never_pass_them(low, width, action):
    space = spaces.Box(low, low + width, (1,), np.float64)
    actions = Actions("test/Box", space)
    ends = actions(np.array([[-1.0], [1.0]]))
    np.testing.assert_allclose(ends, [space.low, space.high], rtol=1e-9, atol=1e-9)
    (taken,) = actions(np.array([[action]]))
    assert space.contains(taken)
    np.testing.assert_allclose(taken, low + (np.clip(action, -1, 1) + 1) / 2 * width, rtol=1e-6, atol=1e-6 * width)


def test_symmetric_unit_bounds_leave_an_action_as_it_is():
    tiny = np.array([[1e-30, -0.3]], np.float32)
    np.testing.assert_array_equal(Actions("test/Box", spaces.Box(-1, 1, (2,)))(tiny), tiny)


def test_discrete_actions_count_from_zero_and_are_checked():
    actions = Actions("test/Discrete", spaces.Discrete(3, start=5))
    np.testing.assert_array_equal(actions(np.array([0, 2], np.int32)), [5, 7])
    for wrong in ([3], [-1], [[0]]):
        with pytest.raises(ValueError, match="indices"):
            actions(np.array(wrong))


@pytest.mark.parametrize(
    ("env_id", "options", "expected"),
    [
        ("atari/Brekout", {}, "atari/Brekout: no such environment; nearest: atari/Breakout"),
        ("mujoco/halfcheetah-v5", {}, "nearest: mujoco/HalfCheetah-v5"),
        ("dmc/walker_run", {}, "nearest: dmc/walker-run"),
        ("metaworld/hamer", {}, "nearest: metaworld/hammer"),
        ("minatar/breakout", {}, "nearest: minatar/Breakout"),
        ("gym/CartPol-v1", {}, "nearest: gym/CartPole-v1"),
        ("gym/zzzzzzzzzzzz", {}, "resprout list envs"),
        ("gym/no_such_module:Thing-v0", {}, "no_such_module"),
        ("arcade/Breakout", {}, "atari/NAME, mujoco/NAME"),
        ("Breakout", {}, "no such family"),
        ("atari/", {}, "no such family"),
        ("atari/Breakout", {"num_envs": 0}, "num_envs must be at least 1"),
        ("atari/Breakout", {"seed": -1}, "seed"),
        ("atari/Breakout", {"protocol": "nature"}, "there are dopamine, cleanrl, atari100k"),
        ("mujoco/Hopper-v5", {"protocol": "dopamine"}, "atari/\\* alone"),
    ],
)
def test_what_cannot_be_given_is_said_in_one_line(env_id, options, expected):
    with pytest.raises(EnvError, match=expected) as raised:
        make(env_id, **options)
    assert "\n" not in str(raised.value)


def test_every_family_lists_ids_that_can_be_made():
    listed = list_envs()
    for env_id in IDS:
        assert env_id in listed[env_id.partition("/")[0]]
    for env_id in ("dmc/ball_in_cup-catch", "dmc/humanoid_CMU-run", "dmc/lqr-lqr_2_1", "dmc/cartpole-swingup_sparse"):
        make(env_id)  # dm_control's own names
    assert len(listed["metaworld"]) == 50 and "metaworld/button-press-topdown-wall" in listed["metaworld"]
    assert len(listed["robotics"]) == 157 and len(listed["myosuite"]) == 398
    assert listed["minatar"] == [
        f"minatar/{game}" for game in ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
    ]
    assert "gym/ALE/Breakout-v5" in listed["gym"] and "gym/HalfCheetah-v2" not in listed["gym"]


@pytest.mark.parametrize(
    "env_id", ["atari/Pong", "mujoco/Hopper-v5", "gym/Pendulum-v1", "minatar/Breakout", "changing/Hopper-physics@2"]
)
def test_what_is_written_into_an_observation_changes_no_environment(env_id):
    """It fails where the environment reads the array again."""
    written, left = make(env_id), make(env_id)
    spec = written.spec
    action = np.zeros(1, np.int32) if spec.discrete else np.zeros((1, spec.action_size), np.float32)
    observations = [(written.reset(0), left.reset(0))]
    for _ in range(4):
        with contextlib.suppress(ValueError):
            observations[-1][0][...] = 0
        pair = written.step(action), left.step(action)
        np.testing.assert_array_equal(pair[0].final_observation, pair[1].final_observation)
        kept = [(env.snapshot() or {}).get("observation") for env in (written, left)]
        np.testing.assert_array_equal(*kept)
        observations.append((pair[0].observation, pair[1].observation))


def test_importing_envs_imports_no_backend():
    heavy = "{'jax', 'envpool', 'gymnax', 'gymnasium', 'mujoco', 'ale_py'}"
    code = f"import sys, resprout.envs; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_protocols_state_what_their_papers_do():
    assert [protocol.sticky for protocol in ATARI_PROTOCOLS.values()] == [0.25, 0.0, 0.0]
    assert [protocol.life_loss_ends_episode for protocol in ATARI_PROTOCOLS.values()] == [False, True, True]
    assert {protocol.max_episode_steps * protocol.frame_skip for protocol in ATARI_PROTOCOLS.values()} == {108_000}
    spec = make("atari/Pong", protocol="atari100k").spec
    assert spec.protocol["name"] == "atari100k" and spec.protocol["sticky"] == 0.0 and spec.reward_clip == 1.0


@pytest.mark.parametrize("env_id", ["mujoco/Hopper-v5", "gym/Pendulum-v1"])
def test_without_render_there_is_no_picture(env_id):
    env = make(env_id)
    env.reset(0)
    with pytest.raises(EnvError, match="render=True"):
        env.render()
    env.close()
