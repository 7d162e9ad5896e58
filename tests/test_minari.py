"""Data sets made by Minari itself from real environments are imported; saved replays come back through Minari."""

import dataclasses
import importlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest

from resprout.agents import DQN, SAC
from resprout.replay import Description, Layout, MinariData, PastReplay, PastReplayError, Storage, decode, export_minari
from resprout.training import Experiment, checkpoint, train
from resprout.training import __main__ as command_line

minari = pytest.importorskip("minari")
GAMMA = 0.9


@pytest.fixture(autouse=True)
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def collect(env_id: str, name: str, episodes: int = 3, longest: int = 30, wrap: Any = lambda env: env) -> list[Any]:
    """A data set of random actions; its episodes as Minari gives them."""
    env = wrap(gymnasium.make(env_id, max_episode_steps=longest))
    env.action_space.seed(0)
    buffers = []
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        buffer = minari.data_collector.EpisodeBuffer(observations=_listed(observation))
        while not buffer.truncations or not (buffer.terminations[-1] or buffer.truncations[-1]):
            action = env.action_space.sample()
            observation, reward, terminated, truncated, info = env.step(action)
            step = {"observation": observation, "action": action, "reward": reward, "info": info}
            buffer = buffer.add_step_data({**step, "terminated": terminated, "truncated": truncated})
        buffers.append(buffer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no author is given
        dataset = minari.create_dataset_from_buffers(name, buffers, env=env)
    env.close()
    return list(dataset.iterate_episodes())


def _listed(observation: Any) -> Any:
    return {key: [value] for key, value in observation.items()} if isinstance(observation, dict) else [observation]


def describe(
    observation_shape: tuple[int, ...], action_size: int, high: float | None = None, **changes: Any
) -> Description:
    """Of a run; `high` None for discrete actions."""
    options = {} if high is None else {"action_shape": (action_size,), "action_dtype": "float32"}
    reward_clip = changes.pop("reward_clip", None)
    layout = Layout(observation_shape, changes.pop("dtype", "float32"), gamma=GAMMA, **options, **changes)
    bounds = () if high is None else (high,) * action_size
    return Description(layout, "gym/Any", action_size, tuple(-bound for bound in bounds), bounds, reward_clip)


CART_POLE, PENDULUM = describe((4,), 2, num_envs=2), describe((3,), 1, high=2.0, num_envs=2)


def all_of(replay: Storage | PastReplay) -> dict[str, np.ndarray]:
    columns = replay.gather(np.arange(len(replay)))
    return decode(columns, 3 if "frames" in columns else 1)


@pytest.mark.parametrize(("env_id", "run"), [("CartPole-v1", CART_POLE), ("Pendulum-v1", PENDULUM)])
def test_imported_transitions_are_those_of_the_data_set(env_id: str, run: Description) -> None:
    episodes = collect(env_id, "folder/random-v0")
    data = MinariData("folder/random-v0")
    assert data.differences(run) == []
    columns = all_of(data.replay(run))
    assert len(data) == len(columns["reward"]) == sum(len(episode) for episode in episodes)

    def joined(pick: Any) -> np.ndarray:
        return np.concatenate([pick(episode) for episode in episodes])

    np.testing.assert_array_equal(columns["observation"], joined(lambda e: e.observations[:-1]).astype(np.float32))
    np.testing.assert_array_equal(columns["next_observation"], joined(lambda e: e.observations[1:]).astype(np.float32))
    np.testing.assert_array_equal(columns["reward"], joined(lambda e: e.rewards).astype(np.float32))
    terminated = joined(lambda e: e.terminations)
    np.testing.assert_allclose(columns["discount"], np.where(terminated, 0, GAMMA), rtol=1e-6)
    assert terminated.any() == (env_id == "CartPole-v1")
    actions = joined(lambda e: e.actions)
    np.testing.assert_allclose(columns["action"], actions if run.discrete else actions / 2, rtol=1e-6)
    assert columns["action"].dtype == (np.int32 if run.discrete else np.float32)


def test_importing_applies_n_step_returns_and_the_reward_clip() -> None:
    episodes = collect("CartPole-v1", "random-v0", longest=9)  # some are truncated at 9, some fall before
    run = describe((4,), 2, n_step=3, reward_clip=0.5)
    columns = all_of(MinariData("random-v0").replay(run))
    expected = []
    for episode in episodes:
        last = len(episode)
        for start in range(last):
            stop = min(start + 3, last)
            reward = sum(0.5 * GAMMA**k for k in range(stop - start))
            discount = 0.0 if episode.terminations[stop - 1] else GAMMA ** (stop - start)
            expected.append((reward, discount, *episode.observations[start], *episode.observations[stop]))
    names = ("reward", "discount", "observation", "next_observation")
    found = np.concatenate([columns[name].reshape(len(expected), -1) for name in names], axis=1)
    order = np.lexsort(found.T), np.lexsort(np.array(expected, np.float32).T)
    np.testing.assert_allclose(found[order[0]], np.array(expected)[order[1]], rtol=1e-6)


def test_other_spaces_are_named() -> None:
    collect("CartPole-v1", "cart-v0", episodes=1)
    collect("Pendulum-v1", "pendulum-v0", episodes=1)
    assert MinariData("cart-v0").differences(PENDULUM) == [
        "observations are float32 (4,) there and float32 (3,) here",
        "actions are 2 choices there and vectors from [-2.0] to [2.0] here",
    ]
    assert MinariData("pendulum-v0").differences(describe((3,), 1, high=1.0)) == [
        "actions are vectors from [-2.0] to [2.0] there and vectors from [-1.0] to [1.0] here"
    ]
    images = describe((84, 84, 4), 2, dtype="uint8", frame_stack=4)
    assert "float32 (4,) there and uint8 (84, 84, 4) here" in MinariData("cart-v0").differences(images)[0]


def test_observations_that_are_not_arrays_are_flattened() -> None:
    class Two(gymnasium.ObservationWrapper[Any, Any, Any]):
        def __init__(self, env: Any) -> None:
            super().__init__(env)
            box = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
            self.observation_space = gymnasium.spaces.Dict({"a": box, "b": gymnasium.spaces.Discrete(3)})

        def observation(self, observation: Any) -> Any:
            return {"a": observation[:2], "b": int(observation[3] > 0)}

    episodes = collect("CartPole-v1", "two-v0", episodes=2, wrap=Two)
    columns = all_of(MinariData("two-v0").replay(describe((5,), 2)))
    a = np.concatenate([episode.observations["a"][:-1] for episode in episodes])
    b = np.concatenate([episode.observations["b"][:-1] for episode in episodes])
    np.testing.assert_array_equal(columns["observation"], np.concatenate([a, np.eye(3)[b]], axis=1))


SMALL = {"warmup": 50, "batch_size": 8, "capacity": 100}


@pytest.mark.parametrize(
    ("env_id", "agent"),
    [
        ("gym/CartPole-v1", DQN(hidden=(8,), **SMALL)),
        pytest.param("gym/Pendulum-v1", SAC(hidden=(8,), **SMALL), marks=pytest.mark.slow),
        ("mujoco/Hopper-v5", SAC(hidden=(8,), **SMALL)),  # a checkpoint ends its episodes
    ],
)
def test_a_run_exported_and_imported_again(env_id: str, agent: Any, tmp_path: Path) -> None:
    experiment = Experiment(
        agent,
        env_id,
        steps=250,
        num_envs=2,
        checkpoint_every=100,
        save_replay=True,
        eval_episodes=0,
        out=str(tmp_path / "run"),
    )
    train(experiment, quiet=True)
    past = PastReplay(tmp_path / "run" / "replay")
    assert command_line.dispatch(["export", str(tmp_path / "run"), "--minari", "test/run-v0"]) == 0
    dataset = minari.load_dataset("test/run-v0")
    assert dataset.total_steps == len(past) == 250
    steps = iter(past.episodes())
    for episode in dataset.iterate_episodes():
        stored = next(steps)
        assert all(dataset.observation_space.contains(observation) for observation in episode.observations)
        assert all(dataset.action_space.contains(action) for action in episode.actions)
        np.testing.assert_array_equal(episode.observations, stored.observation)
        np.testing.assert_array_equal(episode.rewards, stored.reward)
        high = np.array(past.description.action_high) if past.description.action_high else 1
        np.testing.assert_allclose(episode.actions, stored.action * high, rtol=1e-6)
        assert not episode.terminations[:-1].any() and not episode.truncations[:-1].any()
        assert (episode.terminations[-1], episode.truncations[-1]) == (stored.terminated, not stored.terminated)
    assert next(steps, None) is None
    if env_id.startswith("gym/"):
        env = gymnasium.make(env_id.removeprefix("gym/"))
        assert dataset.env_spec.id == env.spec.id
        if isinstance(env.action_space, gymnasium.spaces.Box):
            np.testing.assert_array_equal(dataset.action_space.high, env.action_space.high)
    imported = all_of(MinariData("test/run-v0").replay(past.description))
    stored = list(past.episodes())
    np.testing.assert_array_equal(imported["reward"], np.concatenate([episode.reward for episode in stored]))
    np.testing.assert_allclose(imported["action"], np.concatenate([episode.action for episode in stored]), atol=1e-6)
    np.testing.assert_array_equal(
        imported["next_observation"], np.concatenate([episode.observation[1:] for episode in stored])
    )


def test_exported_rewards_are_those_of_the_environment(tmp_path: Path) -> None:
    """Played again from its actions, CartPole gives the exported episode; nothing of ours says what it should be."""
    agent = DQN(hidden=(8,), **SMALL)
    experiment = Experiment(
        agent, "gym/CartPole-v1", steps=200, save_replay=True, eval_episodes=0, out=str(tmp_path / "run")
    )
    train(experiment, quiet=True)
    export_minari(PastReplay(tmp_path / "run" / "replay"), "cart-v0")
    env = gymnasium.make("CartPole-v1")
    episodes = list(minari.load_dataset("cart-v0").iterate_episodes())
    assert len(episodes) > 3
    for episode in episodes:
        env.reset(seed=0)
        env.unwrapped.state = episode.observations[0].astype(np.float64)
        for t, action in enumerate(episode.actions):
            observation, reward, terminated, *_ = env.step(action)
            np.testing.assert_allclose(observation, episode.observations[t + 1], rtol=1e-4, atol=1e-5)
            assert reward == episode.rewards[t] and terminated == episode.terminations[t]


def saved_images(directory: Path) -> PastReplay:
    """Stacks of three 40 x 40 frames of noise, which JPEG would not keep, in episodes of five agent steps."""
    random = np.random.default_rng(0)
    storage = Storage(40, (40, 40, 3), "uint8", frame_stack=3)
    frames = random.integers(256, size=(50, 40, 40, 1), dtype=np.uint8)

    def first(step: int) -> np.ndarray:
        return np.repeat(frames[step], 3, axis=-1)[None]

    now = first(0)
    storage.begin(now)
    for step in range(1, 21):
        reached = np.concatenate([now[..., 1:], frames[step][None]], axis=-1)
        over = step % 5 == 0
        now = first(step) if over else reached
        storage.add([step % 4], [step], [over and step % 2 == 0], [over and step % 2 == 1], reached, now)
    directory.mkdir()
    description = Description(storage.layout, "atari/None", 4, (), (), 1.0)
    (directory / "replay.json").write_text(json.dumps(description.to_json()))
    checkpoint.save_transitions(directory, storage)
    return PastReplay(directory)


def test_images_come_back_to_the_bit(tmp_path: Path) -> None:
    past = saved_images(tmp_path / "replay")
    export_minari(past, "images-v0")
    data = MinariData("images-v0")
    run = dataclasses.replace(past.description, reward_clip=None)
    replay = data.replay(run)
    assert replay.frames_in_use == 24  # each frame once, and one more for each episode
    imported, stored = all_of(replay), all_of(past)
    for name, column in stored.items():
        np.testing.assert_array_equal(imported[name], column)
    assert set(all_of(data.replay(past.description))["reward"]) == {1.0}
    other = dataclasses.replace(run, layout=dataclasses.replace(run.layout, frame_stack=1))
    np.testing.assert_array_equal(data.replay(other).gather([7])["observation"], stored["observation"][[7]])
    broken = dataclasses.replace(past.description, layout=dataclasses.replace(run.layout, frame_stack=3))
    dataset = minari.load_dataset("images-v0")
    buffer = minari.data_collector.EpisodeBuffer(
        observations=np.zeros((3, 40, 40, 3), np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None],
        actions=np.zeros(2, np.int64),
        rewards=np.zeros(2),
        terminations=np.zeros(2, np.bool_),
        truncations=np.array([False, True]),
    )
    dataset.storage.update_episodes([buffer])
    with pytest.raises(PastReplayError, match="not stacks of the last 3 frames"):
        MinariData("images-v0").replay(broken)


def test_a_run_learns_from_a_data_set_and_resumes(tmp_path: Path) -> None:
    collect("CartPole-v1", "random-v0", episodes=10)
    experiment = Experiment(
        DQN(hidden=(8,), **SMALL),
        "gym/CartPole-v1",
        steps=150,
        checkpoint_every=75,
        replay_from=("minari:random-v0:0.25",),
        eval_episodes=0,
        out=str(tmp_path / "run"),
    )
    whole = train(experiment, quiet=True)
    shutil.rmtree(checkpoint.names(tmp_path / "run" / "checkpoints")[-1])
    (tmp_path / "run" / "summary.json").unlink()
    resumed = train(experiment, resume=tmp_path / "run", quiet=True)
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["sources"]
    assert [(source["name"], source["share"]) for source in recorded] == [("minari:random-v0", 0.25)]


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, datasets: Path, capfd: pytest.CaptureFixture[str]) -> None:
    past = saved_images(tmp_path / "replay")
    (tmp_path / "config.json").write_text(
        json.dumps({"experiment": Experiment(DQN(), "atari/Pong", save_replay=True).to_json()})
    )
    export = ["export", str(tmp_path), "--minari"]
    assert command_line.dispatch([*export, "no version"]) == 2
    assert "'no version' is no name for a Minari data set" in capfd.readouterr().err
    (datasets / "images-v0").mkdir(parents=True)  # what a kill just before the end leaves
    assert command_line.dispatch([*export, "images-v0"]) == 0
    assert command_line.dispatch([*export, "images-v0"]) == 2
    assert "minari:images-v0 exists already" in capfd.readouterr().err
    assert command_line.dispatch(["export", str(tmp_path)]) == 2
    assert "--minari" in capfd.readouterr().err
    frames = next((tmp_path / "replay").glob("0*")) / "frames.npy"
    frames.write_bytes(frames.read_bytes()[:-1] + b"x")
    assert command_line.dispatch([*export, "other-v0"]) == 2
    assert "does not match its checksum" in capfd.readouterr().err
    other = dataclasses.replace(past.description, layout=dataclasses.replace(past.description.layout, n_step=2))
    (tmp_path / "replay" / "replay.json").write_text(json.dumps(other.to_json()))
    assert command_line.dispatch([*export, "other-v0"]) == 2
    assert sorted(path.name for path in datasets.iterdir()) == ["images-v0"]


def test_what_cannot_be_imported_is_one_line(
    datasets: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["train", "dqn", "--env", "gym/CartPole-v1", "--out", str(tmp_path / "run"), "--agent.warmup", "100"]

    def refused(*sources: str) -> str:
        assert command_line.dispatch([*flags, "--replay-from", *sources]) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and not (tmp_path / "run").exists()
        return said

    assert f"minari:random-v0: no such data set in {datasets}; there are none" in refused("minari:random-v0")
    assert not datasets.exists()
    collect("Pendulum-v1", "pendulum-v0", episodes=1)
    assert "no such data set" in refused("minari:random-v0") and "there are: pendulum-v0" in refused("minari:random-v0")
    assert "actions are vectors from [-2.0] to [2.0] there and 2 choices here" in refused("minari:pendulum-v0")
    collect("CartPole-v1", "cart-v0", episodes=1)
    assert "fewer than its 500 of each batch" in refused("minari:cart-v0", "--agent.batch-size", "1000")
    data = datasets / "cart-v0" / "data" / "main_data.hdf5"
    data.write_bytes(data.read_bytes()[:-1000])
    assert "minari:cart-v0 cannot be read" in refused("minari:cart-v0")

    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(PastReplayError, match=r"pip install 'resprout\[minari\]'"):
        MinariData("cart-v0")
