"""Tasks that change: each in its turn as it is by itself, cut at the period, alike on host and device."""

from pathlib import Path
from typing import Any

import gymnasium
import gymnax
import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from resprout.agents import DQN
from resprout.envs import EnvError, JaxEnv, Step, make
from resprout.envs.changing_ import parse
from resprout.envs.changing_jax import ORDERS, PHYSICS, changing, permuted, physics
from resprout.envs.changing_mujoco import TASKS
from resprout.training import Experiment, train


def play(env: Any, steps: int, seed: int = 0) -> tuple[NDArray[Any], list[Step]]:
    """First observation, and what `steps` random steps returned."""
    first = env.reset(seed)
    rng = np.random.default_rng(seed)
    shape = (steps, env.spec.num_envs)
    if env.spec.discrete:
        actions = rng.integers(0, env.spec.action_size, shape).astype(np.int32)
    else:
        actions = rng.uniform(-1, 1, (*shape, env.spec.action_size)).astype(np.float32)
    return first, [env.step(action) for action in actions]


def same(left: Step, right: Step) -> None:
    for part, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(part, other)


def test_orders_of_channels_differ_and_begin_with_the_game_s_own() -> None:
    found = [task.order for task in permuted("Breakout")]
    assert found[0] == (0, 1, 2, 3) and len(set(found)) == len(found) == ORDERS
    assert all(order is not None and sorted(order) == [0, 1, 2, 3] for order in found)


@pytest.mark.parametrize("signalled", [False, True])
def test_a_change_cuts_the_episode_and_shows_the_channels_in_another_order(signalled: bool) -> None:
    period = 7
    env = make(f"changing/Breakout-permuted{'-signalled' * signalled}@{period}", num_envs=2)
    assert env.spec.observation_shape == (10, 10, 4 + ORDERS * signalled) and env.spec.action_size == 3
    assert env.spec.protocol["period"] == period and len(env.spec.protocol["tasks"]) == ORDERS
    shown = [env.reset(0)]
    for count in range(1, period * (ORDERS + 1)):
        step = env.step(np.zeros(2, np.int32))
        boundary = count % period == 0
        assert not boundary or (step.truncated | step.terminated).all()
        np.testing.assert_array_equal(step.episode_over, step.truncated | step.terminated)
        if signalled:  # the step that ends a task led to an observation of that task, and the next begins anew
            told = [part[..., 4:].argmax(-1) for part in (step.final_observation, step.observation)]
            assert (told[0] == (count - 1) // period % ORDERS).all() and (told[1] == count // period % ORDERS).all()
        if boundary:
            shown.append(step.observation)
    # the paddle alone stands in the bottom row of a new game: its channel tells the order
    channels = [int(frame[0, 9, :, :4].sum(axis=0).argmax()) for frame in shown]
    assert channels == [task.order.index(0) for task in permuted("Breakout") if task.order] + [0]


def test_the_first_task_is_the_game_itself() -> None:
    inner, params = gymnax.make("Breakout-MinAtar")
    outer, own = changing("Breakout-permuted", 1000, False)
    key = jax.random.key(3)
    observation, state = jax.jit(outer.reset)(key, own)
    game_observation, game = inner.reset(jax.random.fold_in(key, 0), params)
    outer_step = jax.jit(outer.step)
    ended = 0
    for index in range(60):
        np.testing.assert_array_equal(observation, game_observation)
        key = jax.random.fold_in(key, index)
        observation, state, reward, terminated, truncated, _ = outer_step(key, state, index % 3, own)
        play_key, _ = jax.random.split(key)
        game_observation, game, expected, over, cut, _ = inner.step(play_key, game, index % 3, params)
        assert (float(reward), bool(terminated), bool(truncated)) == (float(expected), bool(over), bool(cut))
        ended += bool(terminated)
    assert ended > 1


def test_games_take_turns() -> None:
    env = make("changing/minatar-cycle-signalled@5")
    assert env.spec.observation_shape == (10, 10, 6 + 3) and env.spec.action_size == 5
    first, steps = play(env, 16)
    begun = [first, *(steps[index].observation for index in (4, 9, 14))]
    for turn, observation in enumerate(begun):
        assert (observation[..., 6:].argmax(-1) == turn % 3).all()
        channels = (4, 4, 6)[turn % 3]
        assert observation[..., :channels].any() and not observation[..., channels:6].any()
    np.testing.assert_array_equal(begun[0][0, 9], begun[3][0, 9])  # Breakout again: the paddle where it starts


@pytest.mark.parametrize("name", PHYSICS)
def test_physics_changes_the_motion_and_nothing_else(name: str) -> None:
    tasks = physics(name)
    key = jax.random.key(0)
    _, state = tasks[0].env.reset(key, tasks[0].params)
    action = 1 if name.startswith("CartPole") else np.array([0.5], np.float32)
    moved = {np.asarray(task.env.step_env(key, state, action, task.params)[0]).tobytes() for task in tasks}
    assert len(moved) == len(tasks)
    spec, inner = make(f"changing/{name[:-3]}-physics@3").spec, make(f"gymnax/{name}").spec
    for field in ("observation_shape", "observation_dtype", "discrete", "action_low", "action_high"):
        assert getattr(spec, field) == getattr(inner, field)


def test_the_largest_action_is_the_largest_of_every_task() -> None:
    """Of Pendulum, whose fourth task allows a torque of 3."""
    env = make("changing/Pendulum-physics@5")
    env.reset(0)
    torques = []
    for step in range(5 * 4):
        env.step(np.ones((1, 1), np.float32))
        torques.append(float(env.carry[1].states[step // 5].last_u[0]))  # type: ignore[attr-defined]
    # the last step of a turn begins the next task's episode, with no torque yet
    limits = [task.params.max_torque for task in physics("Pendulum-v1")]
    assert [torques[5 * turn] for turn in range(4)] == limits == [2, 2, 2, 3]


@pytest.mark.parametrize("name", ["Breakout-permuted", "SpaceInvaders-permuted", "minatar-cycle"])
def test_the_picture_is_of_the_game_whether_the_task_is_shown_or_not(name: str) -> None:
    hidden, signalled = (make(f"changing/{name}{end}@3") for end in ("", "-signalled"))
    hidden.reset(0), signalled.reset(0)
    for _ in range(16):
        np.testing.assert_array_equal(hidden.render(), signalled.render())
        for env in (hidden, signalled):
            env.step(np.zeros(1, np.int32))


def test_mujoco_moves_as_a_model_with_that_friction_and_gravity_does() -> None:
    """Each task beside an environment of gymnasium's whose model is changed, from the same state."""
    period = 6
    env = make(f"changing/Hopper-physics@{period}")
    env.reset(0)
    reference: Any = gymnasium.make("Hopper-v5").unwrapped
    reference.reset(seed=0)
    original = reference.model.geom_friction.copy(), reference.model.opt.gravity.copy()
    rng = np.random.default_rng(0)
    for count in range(period * (len(TASKS) + 1) - 1):
        friction, gravity = TASKS[count // period % len(TASKS)]
        reference.model.geom_friction[:] = original[0] * (friction, 1, 1)
        reference.model.opt.gravity[:] = original[1] * gravity
        running = env._vector.envs[0].unwrapped  # type: ignore[attr-defined]
        reference.set_state(running.data.qpos, running.data.qvel)
        reference.data.qacc_warmstart[:] = running.data.qacc_warmstart
        action = rng.uniform(-1, 1, (1, 3)).astype(np.float32)
        step = env.step(action)
        expected = reference.step(action[0])
        np.testing.assert_allclose(step.final_observation[0], expected[0], rtol=1e-4, atol=1e-4)
        assert step.terminated[0] == expected[2]
        assert bool(step.truncated[0]) == ((count + 1) % period == 0 and not expected[2])


@pytest.mark.parametrize("name", ["CartPole-physics", "CartPole-physics-signalled", "Hopper-physics-signalled"])
def test_a_snapshot_goes_on_across_a_change(name: str) -> None:
    env = make(f"changing/{name}@10", num_envs=2)
    _, steps = play(env, 8)
    saved = env.snapshot()
    assert saved is not None
    actions = np.ones((2,) if env.spec.discrete else (2, env.spec.action_size), np.int32 if env.spec.discrete else None)
    once = [env.step(actions) for _ in range(6)]
    again = make(f"changing/{name}@10", num_envs=2)
    np.testing.assert_array_equal(again.restore(saved), steps[-1].observation)
    for expected in once:
        same(expected, again.step(actions))
    assert all(once[1].truncated | once[1].terminated)
    if name.endswith("signalled"):
        told = [step.observation[:, -len(TASKS) :].argmax(-1) for step in once]
        assert [list(task) for task in told] == [[0, 0]] + [[1, 1]] * 5
    play(again, 12)
    same(once[0], [again.restore(saved), again.step(actions)][1])  # back across a change, too


def test_it_trains_on_the_device_as_on_the_host(tmp_path: Path) -> None:
    agent = DQN(hidden=(8,), warmup=20, batch_size=8, capacity=100)
    returns = []
    for loop in ("device", "host"):
        experiment: Experiment[Any] = Experiment(
            agent=agent,
            env="changing/CartPole-physics@25",
            steps=60,
            eval_episodes=0,
            log_every=10,
            loop=loop,
            out=str(tmp_path / loop),
        )
        assert isinstance(make(experiment.env), JaxEnv)
        assert train(experiment, quiet=True).summary["agent_steps"] == 60
        returns.append((tmp_path / loop / "metrics.jsonl").read_text().count("episode/return"))
    assert returns[0] == returns[1] > 0


def test_the_period_is_read_from_the_name() -> None:
    assert parse("changing/minatar-cycle@20000") == ("minatar-cycle", 20_000)
    assert parse("changing/minatar-cycle") == ("minatar-cycle", 50_000)


@pytest.mark.parametrize("name", ["CartPole-physics@0", "CartPole-physics@often", "CartPole-physics@", "cartpole"])
def test_what_cannot_be_made_is_one_line(name: str) -> None:
    with pytest.raises(EnvError, match=r"such as CartPole-physics@50000|nearest: changing/CartPole-physics"):
        make(f"changing/{name}")
