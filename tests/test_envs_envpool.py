"""EnvPool's environments against bare EnvPool."""

import envpool
import numpy as np
import pytest

from resprout.envs import EnvError, make
from resprout.envs.backend import env_seeds


def bare(task, seed, **options):
    return envpool.make(task, env_type="gymnasium", num_envs=1, seed=[seed], **options)


def test_each_environment_steps_as_a_bare_one_and_its_restart_step_is_never_seen():
    env = make("mujoco/Hopper-v4", num_envs=3)
    first = env.reset(3)
    pools = [bare("Hopper-v4", seed) for seed in env_seeds(3, 3)]
    for i, pool in enumerate(pools):
        np.testing.assert_array_equal(first[i : i + 1], pool.reset()[0].astype(np.float32))
    rng = np.random.default_rng(0)
    ends = np.zeros(3, int)
    for _ in range(150):
        actions = rng.uniform(-1, 1, (3, 3)).astype(np.float32)
        step = env.step(actions)
        for i, pool in enumerate(pools):
            observation, reward, terminated, truncated, _ = pool.step(actions[i : i + 1].astype(np.float64))
            np.testing.assert_array_equal(step.final_observation[i], observation[0].astype(np.float32))
            assert step.reward[i] == reward[0]
            assert (step.terminated[i], step.truncated[i]) == (terminated[0], truncated[0])
            if terminated[0]:
                observation, reward, *_ = pool.step(np.zeros((1, 3)))  # the step that EnvPool ignores
                assert reward[0] == 0
                ends[i] += 1
            np.testing.assert_array_equal(step.observation[i], observation[0].astype(np.float32))
        np.testing.assert_array_equal(step.episode_over, step.terminated)
    assert (ends >= 2).all()
    env.close()


def test_the_time_limit_truncates_and_the_last_observation_is_kept():
    env = make("mujoco/HalfCheetah-v5", num_envs=2)
    env.reset(0)
    actions = np.zeros((2, 6), np.float32)
    for _ in range(999):
        step = env.step(actions)
        assert not (step.terminated | step.truncated).any()
    step = env.step(actions)
    assert step.truncated.all() and step.episode_over.all() and not step.terminated.any()
    assert not np.array_equal(step.observation, step.final_observation)
    assert not env.step(actions).truncated.any()
    env.close()


def test_an_end_at_the_time_limit_is_terminal():
    def first_end(limit):
        env = make("mujoco/Hopper-v5")
        env._limit = limit  # the 1,000 steps of Hopper are never reached by chance in the very step of a fall
        env.reset(0)
        for count in range(1, limit + 1):
            step = env.step(np.ones((1, 3), np.float32))
            if step.episode_over[0]:
                return count, step
        raise AssertionError("no end")

    fall, step = first_end(1000)
    assert fall < 1000 and step.terminated[0]
    count, step = first_end(fall)
    assert (count, step.terminated[0], step.truncated[0]) == (fall, True, False)
    count, step = first_end(fall - 1)
    assert (count, step.terminated[0], step.truncated[0]) == (fall - 1, False, True)


def test_actions_are_scaled_to_the_bounds():
    env = make("mujoco/Pusher-v5")
    assert env.spec.action_low == (-2.0,) * 7 and env.spec.action_high == (2.0,) * 7
    env.reset(0)
    pool = bare("Pusher-v5", env_seeds(0, 1)[0])
    pool.reset()
    for action in (0.25, -1.0, 1.7):
        step = env.step(np.full((1, 7), action, np.float32))
        observation, reward, *_ = pool.step(np.full((1, 7), 2 * min(action, 1.0)))
        np.testing.assert_array_equal(step.observation, observation.astype(np.float32))
        assert step.reward[0] == reward[0]


def test_dmc_observations_are_concatenated_in_the_order_of_their_space():
    env = make("dmc/walker-run")
    pool = bare("WalkerRun-v1", env_seeds(5, 1)[0])
    parts = pool.reset()[0]
    expected = np.concatenate([parts["orientations"][0], [parts["height"][0]], parts["velocity"][0]])
    np.testing.assert_array_equal(env.reset(5)[0], expected.astype(np.float32))


def test_metaworld_shows_its_goal_which_moves():
    env = make("metaworld/reach", num_envs=2)
    goals = env.reset(0)[:, -3:]
    assert (goals != 0).all() and not np.array_equal(*goals)
    np.testing.assert_array_equal(env.step(np.zeros((2, 4), np.float32)).observation[:, -3:], goals)


def test_a_goal_is_part_of_the_observation():
    env = make("robotics/HandReach-v3", num_envs=2)
    pool = envpool.make("HandReach-v3", env_type="gymnasium", num_envs=2, seed=env_seeds(5, 2))
    parts = pool.reset()[0]
    expected = np.concatenate([parts["observation"], parts["achieved_goal"], parts["desired_goal"]], axis=1)
    np.testing.assert_array_equal(env.reset(5), expected.astype(np.float32))
    for _ in range(50):
        step = env.step(np.zeros((2, 20), np.float32))
    assert step.truncated.all() and not np.array_equal(step.observation, step.final_observation)


def test_dicts_inside_dicts_are_concatenated():
    kitchen = make("robotics/FrankaKitchen-v1")
    observation = kitchen.reset(0)
    assert observation.shape == (1, *kitchen.spec.observation_shape) and np.isfinite(observation).all()


def test_envpool_has_no_snapshot():
    env = make("mujoco/Hopper-v5")
    env.reset(0)
    assert env.snapshot() is None
    with pytest.raises(EnvError, match="cannot be restored"):
        env.restore({})


def test_mujoco_draws_or_names_the_packages_to_install():
    try:
        env = make("mujoco/Hopper-v5", render=True)
    except EnvError as error:
        assert "libegl1 libgl1 libgl1-mesa-dri" in str(error) and "\n" not in str(error)
        return
    env.reset(0)
    picture = env.render()
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 1
    env.close()
