"""Atari protocols, played."""

import envpool
import numpy as np
import pytest

from resprout.envs import ATARI_PROTOCOLS, make
from resprout.envs.backend import env_seeds


def play(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [env.step(rng.integers(0, env.spec.action_size, env.spec.num_envs).astype(np.int32)) for _ in range(steps)]


def is_one_frame(stack):
    return np.array_equal(stack, np.broadcast_to(stack[..., :1], stack.shape))


@pytest.mark.parametrize("protocol", ATARI_PROTOCOLS)
@pytest.mark.parametrize("training", [True, False])
def test_every_step_pushes_one_frame_and_every_start_is_one_frame(protocol, training):
    env = make("atari/Breakout", num_envs=2, protocol=protocol, training=training)
    previous = env.reset(0)
    assert is_one_frame(previous)
    ends = 0
    for step in play(env, 300):
        np.testing.assert_array_equal(step.final_observation[..., :-1], previous[..., 1:])
        for i, ended in enumerate(step.terminated | step.truncated):
            ends += ended
            if ended:
                assert is_one_frame(step.observation[i])
            else:
                np.testing.assert_array_equal(step.observation[i], step.final_observation[i])
        previous = step.observation
    assert ends >= 2
    env.close()


PROTOCOLS = {  # in EnvPool's terms: sticky, no-op frames at most, FIRE at a start, FIRE after a lost life
    "dopamine": (0.25, 1, False, False),
    "cleanrl": (0.0, 30, True, True),
    "atari100k": (0.0, 30, False, False),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_is_bare_envpool_with_its_settings(protocol):
    sticky, noop_max, fire, life = PROTOCOLS[protocol]
    env = make("atari/Breakout", num_envs=3, protocol=protocol)
    pool = envpool.make(
        "Breakout-v5", env_type="gymnasium", num_envs=3, seed=env_seeds(2, 3), stack_num=1, frame_skip=4,
        repeat_action_probability=sticky, noop_max=noop_max, use_fire_reset=fire, episodic_life=life,
        max_episode_steps=27_000, reward_clip=False, full_action_space=False,
    )  # fmt: skip
    np.testing.assert_array_equal(env.reset(2)[..., -1], pool.reset()[0][:, 0])
    rng, restarts = np.random.default_rng(0), 0
    while restarts < 2:
        actions = rng.integers(0, 4, 3).astype(np.int32)
        step, (frames, reward, done, *_) = env.step(actions), pool.step(actions)
        if done.any():
            restarts += 1
            frames[done] = pool.step(np.zeros(done.sum(), np.int32), np.flatnonzero(done).astype(np.int32))[0]
        np.testing.assert_array_equal(step.observation[..., -1], frames[:, 0])
        np.testing.assert_array_equal(step.reward, reward)


@pytest.mark.parametrize(("protocol", "ends_in_a_game"), [("dopamine", 1), ("cleanrl", 5), ("atari100k", 5)])
def test_a_lost_life_ends_an_episode_in_training_alone_and_never_a_game(protocol, ends_in_a_game):
    """A game of Breakout has five lives."""
    for training, expected in ((True, ends_in_a_game), (False, 1)):
        env = make("atari/Breakout", protocol=protocol, training=training)
        env.reset(1)
        ends, games = 0, []
        for step in play(env, 800):
            ends += int(step.terminated[0])
            assert not step.truncated[0]
            if step.episode_over[0]:
                assert step.terminated[0]
                games.append(ends)
                ends = 0
        assert len(games) >= 2 and set(games) == {expected}
        env.close()


def test_after_a_lost_life_the_game_goes_on_from_the_same_frame_under_atari100k():
    env = make("atari/Breakout", protocol="atari100k")
    env.reset(0)
    lost = [step for step in play(env, 200) if step.terminated[0] and not step.episode_over[0]]
    assert lost
    for step in lost:
        np.testing.assert_array_equal(step.observation[0, ..., -1], step.final_observation[0, ..., -1])


@pytest.mark.parametrize(("protocol", "ends"), [("cleanrl", True), ("dopamine", False)])
def test_fire_is_pressed_for_the_agent_under_cleanrl_even_in_evaluation(protocol, ends):
    """Without FIRE no ball is served, and a game of doing nothing never ends."""
    env = make("atari/Breakout", protocol=protocol, training=False)
    env.reset(0)
    noop = np.zeros(1, np.int32)
    assert any(env.step(noop).episode_over[0] for _ in range(400)) == ends


@pytest.mark.parametrize("protocol", ATARI_PROTOCOLS)
def test_the_cap_truncates_a_whole_game(protocol):
    env = make("atari/Pong", num_envs=2, protocol=protocol)
    assert env._options["max_episode_steps"] == 27_000
    env._options["max_episode_steps"] = 30  # in place of 27,000, to see the end
    env.reset(0)
    for count, step in enumerate(play(env, 65), start=1):
        at_cap = count in (30, 60)
        assert (step.truncated == at_cap).all() and (step.episode_over == at_cap).all() and not step.terminated.any()
        if at_cap:
            assert is_one_frame(step.observation[0]) and not is_one_frame(step.final_observation[0])


def test_rewards_are_not_clipped():
    env = make("atari/SpaceInvaders")
    env.reset(0)
    assert env.spec.reward_clip == 1.0
    assert max(step.reward[0] for step in play(env, 300)) >= 5  # the least an invader is worth


def test_sticky_actions_make_seeds_differ_where_nothing_else_does():
    """Dopamine's start is one fixed frame; what follows the same actions differs by the sticky ones alone."""
    env = make("atari/Breakout")
    start = env.reset(0)
    steps = play(env, 60)
    np.testing.assert_array_equal(env.reset(1), start)
    assert any(not np.array_equal(a.observation, b.observation) for a, b in zip(steps, play(env, 60), strict=True))


def test_a_game_is_drawn_in_colour():
    env = make("atari/Breakout", num_envs=2, render=True)
    env.reset(0)
    picture = env.render()
    assert picture.shape == (210, 160, 3) and picture.dtype == np.uint8 and picture.std() > 1
