"""MinAtar: gymnax behind the host interface."""

import jax
import numpy as np
import pytest

from resprout.envs import make

SLOW = [pytest.param(game, marks=pytest.mark.slow) for game in ("Asterix", "Seaquest", "SpaceInvaders")]  # to compile


@pytest.mark.parametrize("game", ["Breakout", "Freeway", *SLOW])
def test_observations_are_channels_of_zero_and_one(game):
    env = make(f"minatar/{game}", num_envs=2)
    seen = [env.reset(0)]
    rng = np.random.default_rng(0)
    for _ in range(60):
        seen.append(env.step(rng.integers(0, env.spec.action_size, 2).astype(np.int32)).observation)
    assert seen[0].shape[:3] == (2, 10, 10)
    assert set(np.unique(np.stack(seen))) == {0, 1}
    picture = env.render()
    assert picture.shape == (320, 320, 3) and picture.any()


def test_breakout_restarts_in_the_step_that_ends_it():
    """A game begins in one of two positions, ball left or right; the last frame of a lost one shows the ball at the bottom."""
    env = make("minatar/Breakout", num_envs=2)
    starts = {frame.tobytes() for seed in range(8) for frame in env.reset(seed)}
    assert len(starts) == 2
    env.reset(0)
    ends, total = 0, 0.0
    for _ in range(150):
        step = env.step(np.zeros(2, np.int32))
        total += step.reward.sum()
        for i in np.flatnonzero(step.episode_over):
            ends += 1
            assert step.terminated[i] and step.observation[i].tobytes() in starts
            assert step.final_observation[i, 9, :, 1].any()
    assert ends > 4 and total > 0


def test_the_time_limit_truncates():
    """A game of Freeway has no other end."""
    env = make("minatar/Freeway", num_envs=2)
    env.reset(0)
    limit = env.spec.max_episode_steps
    for count in range(1, limit + 3):
        step = env.step(np.zeros(2, np.int32))
        assert (step.truncated == (count == limit)).all() and not step.terminated.any()


def test_an_end_at_the_time_limit_is_terminal():
    env = make("minatar/Breakout")
    env.reset(0)
    for _ in range(100):
        key, state = env.carry
        if env.step(np.zeros(1, np.int32)).terminated[0]:
            break
    env.carry = key, state.replace(time=np.full_like(state.time, env.spec.max_episode_steps - 1))
    step = env.step(np.zeros(1, np.int32))
    assert (step.terminated[0], step.truncated[0], step.episode_over[0]) == (True, False, True)


def test_a_step_is_compiled_once_even_after_a_restore():
    env = make("minatar/Breakout", num_envs=5)
    compiled_before = env._step._cache_size()
    env.reset(0)
    action = np.zeros(5, np.int32)
    env.step(action)
    env.step(action)
    env.restore(env.snapshot())
    env.step(action)
    assert env._step._cache_size() == compiled_before + 1
    assert jax.tree.leaves(env.carry)[0].devices() == {jax.devices("cpu")[0]}


def test_where_jax_has_no_cpu_the_first_device_steps(monkeypatch):
    """As under JAX_PLATFORMS=cuda."""
    devices = jax.local_devices()

    def local_devices(backend=None):
        if backend == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return devices

    monkeypatch.setattr(jax, "local_devices", local_devices)
    env = make("minatar/Breakout", num_envs=2)
    env.reset(0)
    assert env.step(np.zeros(2, np.int32)).observation.shape == (2, 10, 10, 4)
