"""DeepMind Control from pixels: dm_control drawn through EGL, and whole runs of DrQ-v2 on it."""

import json
import os
import subprocess
import sys
from ctypes.util import find_library

import numpy as np
import pytest

from resprout.agents import DrQv2
from resprout.envs import EnvError, make
from resprout.replay import Storage, decode
from resprout.training import Experiment, train
from resprout.training.intervening import Acting

from .runs import assert_equal, comparable
from .test_envs import equal_steps, random_actions, rollout
from .test_training import cut_after


@pytest.fixture(scope="module")
def drawn() -> None:
    """Skips, and says why, where nothing can be drawn."""
    try:
        make("dmc-pixels/point_mass-easy").close()
    except EnvError as error:
        pytest.skip(str(error))


draws = pytest.mark.usefixtures("drawn")

TINY = DrQv2(
    channels=2, features=4, hidden=(8,), batch_size=4, warmup=20, capacity=500, std_steps=40, random_shift=2, n_step=3
)


@draws
def test_spec_and_steps():
    env = make("dmc-pixels/cartpole-swingup", num_envs=2, seed=3)
    spec = env.spec
    assert (spec.observation_shape, spec.observation_dtype, spec.frame_stack) == ((84, 84, 9), "uint8", 3)
    assert (spec.discrete, spec.action_size, spec.max_episode_steps) == (False, 1, 500)
    assert json.loads(json.dumps(spec.protocol))["versions"].keys() == {"dm-control", "mujoco"}
    first = env.reset(7)
    assert first.shape == (2, 84, 84, 9) and first.dtype == np.uint8 and first.std() > 5
    for index in (3, 6):
        np.testing.assert_array_equal(first[..., index : index + 3], first[..., :3])
    assert not np.array_equal(first[0], first[1])
    steps = rollout(env, 5)
    before = first
    for step in steps:  # oldest frame first: the two newest of the observation before are the two oldest of this
        np.testing.assert_array_equal(step.observation[..., :6], before[..., 3:])
        assert (step.observation[..., 6:] != before[..., 6:]).any() and step.reward.dtype == np.float32
        before = step.observation
    np.testing.assert_array_equal(env.reset(7), first)
    assert equal_steps(rollout(env, 5), steps)
    np.testing.assert_array_equal(env.reset(), env.reset(3))  # the seed of `make`
    assert not np.array_equal(env.reset(8), first)
    assert env.render().shape == (240, 320, 3)
    env.close()


@draws
def test_the_frame_is_dm_controls_and_the_action_is_repeated():
    """Two of dm_control's own steps with the action scaled to its bounds; rewards summed."""
    from dm_control import suite

    env = make("dmc-pixels/walker-run", seed=1)
    env.reset(5)
    own = suite.load("walker", "run")
    own.reset()
    inner = env._envs[0]
    with own.physics.reset_context():
        own.physics.set_state(inner.physics.get_state())
    action = np.linspace(-1.5, 1, 6)[None]
    step = env.step(action)
    results = [own.step(np.clip(action[0], -1, 1)) for _ in range(2)]
    assert step.reward[0] == pytest.approx(sum(result.reward for result in results), rel=1e-5)
    np.testing.assert_array_equal(step.observation[0, ..., 6:], own.physics.render(84, 84, camera_id=0))
    assert make("dmc-pixels/quadruped-walk").spec.protocol["camera"] == 2
    env.close()


# In a process of its own, which EnvPool ends where there is no OpenGL.
ENVPOOL = """
import numpy as np
import mujoco.egl

context = mujoco.egl.GLContext(84, 84)
context.make_current()
import envpool
from dm_control import suite

options = {"env_type": "gymnasium", "num_envs": 1, "seed": 3}
drawing = {"from_pixels": True, "render_width": 84, "render_height": 84, "render_camera_id": 0}
vectors, images = envpool.make("CartpoleSwingup-v1", **options), envpool.make("CartpoleSwingup-v1", **options, **drawing)
state, theirs = vectors.reset()[0], images.reset()[0]
env = suite.load("cartpole", "swingup")
env.reset()
for _ in range(5):
    (x, cosine, sine), velocity = state["position"][0], state["velocity"][0]
    with env.physics.reset_context():
        env.physics.data.qpos[:] = x, np.arctan2(sine, cosine)
        env.physics.data.qvel[:] = velocity
    ours = env.physics.render(84, 84, camera_id=0).astype(int)
    difference = np.abs(ours - theirs[0].transpose(1, 2, 0))
    print(difference.mean(), difference.max(), ours.std())
    state, theirs = vectors.step(np.array([[0.9]]))[0], images.step(np.array([[0.9]]))[0]
"""


@draws
@pytest.mark.slow
def test_envpools_own_pixels_are_nearly_the_same(tmp_path):
    """Of 255 levels; where it cannot draw, its process ends and there is nothing to compare."""
    environment = os.environ | {"MUJOCO_GL": "egl"}
    command = [sys.executable, "-P", "-c", ENVPOOL]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path)
    if done.returncode < 0:
        pytest.skip("EnvPool cannot draw here: its process ended")
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # with -s: mean and largest difference, and the spread of ours
    means, largest, spreads = np.array([line.split() for line in done.stdout.splitlines()], float).T
    assert len(means) == 5 and spreads.min() > 10
    assert means.max() < 1 and largest.max() < 16


@draws
def test_a_thousand_frames_are_truncated_and_the_last_observation_is_kept():
    env = make("dmc-pixels/point_mass-easy", num_envs=2)
    env.reset(0)
    env._elapsed[0] += 498  # the second goes on
    env._envs[0]._step_count = 996
    before = env.step(np.zeros((2, 2))).observation
    step = env.step(np.ones((2, 2)))
    assert step.truncated.tolist() == [True, False] and not step.terminated.any()
    assert step.episode_over.tolist() == [True, False]
    np.testing.assert_array_equal(step.final_observation[..., :6], before[..., 3:])
    np.testing.assert_array_equal(step.observation[1], step.final_observation[1])
    np.testing.assert_array_equal(step.observation[0, ..., :3], step.observation[0, ..., 6:])  # begins anew
    assert not env.step(np.zeros((2, 2))).truncated.any()
    env.close()


SLOW = ("finger-turn_easy", "quadruped-escape", "manipulator-bring_ball", "cheetah-run")  # targets, terrain, props


@draws
@pytest.mark.parametrize("task", ["reacher-easy", *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)])
def test_a_snapshot_goes_on_to_the_bit_in_another_environment(task):
    env = make(f"dmc-pixels/{task}", num_envs=1, seed=0)
    env.reset(1)
    rollout(env, 10)
    snapshot = {name: value.copy() for name, value in env.snapshot().items()}
    assert sum(value.nbytes for value in snapshot.values()) < 30e6
    env._elapsed[0] = snapshot["elapsed"][0] = 497
    actions = [random_actions(env, np.random.default_rng(2)) for _ in range(6)]
    expected = [env.step(action) for action in actions]
    assert expected[2].truncated[0]  # the next episode begins alike, too
    other = make(f"dmc-pixels/{task}", num_envs=1, seed=9)
    other.reset(9)
    rollout(other, 3, seed=5)
    np.testing.assert_array_equal(other.restore(snapshot), snapshot["observation"])
    assert equal_steps([other.step(action) for action in actions], expected)
    for each in (env, other):
        each.close()


@draws
def test_frames_are_stored_once():
    """84 x 84 x 3 bytes for a transition, however many stacks of three a frame is in."""
    env = make("dmc-pixels/point_mass-easy", num_envs=2)
    spec = env.spec
    storage = Storage(
        40,
        spec.observation_shape,
        "uint8",
        frame_stack=3,
        action_shape=(2,),
        action_dtype="float32",
        num_envs=2,
        n_step=3,
    )
    seen = [env.reset(0)]
    storage.begin(seen[0])
    for _ in range(12):
        action = np.zeros((2, 2), np.float32)
        step = env.step(action)
        storage.add(action, step.reward, step.terminated, step.truncated, step.final_observation, step.observation)
        seen.append(step.observation)
    assert storage.frames_in_use == 2 * 13
    batch = decode(storage.gather(np.arange(20)), 3)
    for number in range(20):
        t, index = divmod(number, 2)
        np.testing.assert_array_equal(batch["observation"][number], seen[t][index])
        np.testing.assert_array_equal(batch["next_observation"][number], seen[t + 3][index])
    env.close()


def adaptive_run(directory):
    return Experiment(
        agent=TINY,
        env="dmc-pixels/point_mass-easy",
        steps=60,
        # switches at its first check, at agent step 40
        interventions=("adaptive_replay_ratio:layers=heads,every=20,window=8,tolerance=10",),
        checkpoint_every=30,
        log_every=10,
        eval_episodes=0,
        sync=True,
        out=str(directory),
    )


@pytest.mark.slow
@draws
def test_b3_a_run_with_adaptive_rr_pays_both_ratios_with_one_trace(tmp_path, monkeypatch):
    traces = []
    original = Acting.update
    monkeypatch.setattr(Acting, "update", lambda self, *rest: traces.append(self) or original(self, *rest))
    result = train(adaptive_run(tmp_path / "run"), quiet=True)
    assert len(traces) == 2  # once for its form, once to be compiled, at both replay ratios
    assert result.summary["gradient_steps"] == (40 - 20) // 2 + 2 * (60 - 40) and result.state.agent_step == 60
    stds = [line["actor/std"] for line in comparable(tmp_path / "run") if "actor/std" in line]
    np.testing.assert_allclose(stds[-1], 0.1, atol=1e-6)  # the schedule follows agent steps
    assert stds[0] > 0.35


@draws
@pytest.mark.slow
def test_a_run_resumes_to_the_bit_in_the_middle_of_an_episode(tmp_path):
    whole = train(adaptive_run(tmp_path / "whole"), quiet=True)
    train(adaptive_run(tmp_path / "halved"), quiet=True)
    cut_after(tmp_path / "halved", 30)
    resumed = train(adaptive_run(tmp_path / "halved"), resume=tmp_path / "halved", quiet=True)
    assert_equal(whole.state, resumed.state)


@draws
def test_an_unknown_task_names_the_nearest():
    with pytest.raises(EnvError, match="dmc-pixels/walker-runn: no such environment; nearest: dmc-pixels/walker-run"):
        make("dmc-pixels/walker-runn")


@pytest.mark.parametrize("platform", ["osmesa", "teapot"])
def test_without_a_renderer_it_is_one_line_and_exit_code_2(tmp_path, platform):
    """MuJoCo told to draw with what is not installed, or with nonsense."""
    if platform == "osmesa" and find_library("OSMesa"):
        pytest.skip("OSMesa is installed")
    command = [sys.executable, "-P", "-m", "resprout.training", "train", "drqv2"]
    flags = ["--env", "dmc-pixels/walker-run", "--out", str(tmp_path / "run")]
    environment = os.environ | {"MUJOCO_GL": platform}
    done = subprocess.run(command + flags, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "install the system packages libegl1 libgl1 libgl1-mesa-dri" in line and platform in line
    assert not (tmp_path / "run").exists()
