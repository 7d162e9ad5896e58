"""Saved replays against a storage that forgets nothing, damage, and real runs that save and mix."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resprout.agents import DQN
from resprout.replay import Description, PastReplay, PastReplayError, Storage
from resprout.training import Experiment, ExperimentError, checkpoint, train
from resprout.training import __main__ as command_line
from resprout.training.sources import SourceError, open_sources, parse_sources

from .runs import assert_equal, comparable

GAMMA = 0.9
STEPS = 60


class World:
    """Random episodes of 2 x 1 images, each frame new, that keeps what it showed."""

    def __init__(self, seed: int, num_envs: int, stack: int, ending: float) -> None:
        self.random = np.random.default_rng(seed)
        self.num_envs, self.stack, self.ending = num_envs, stack, ending
        self.episodes: list[list[dict[str, Any]]] = [[] for _ in range(num_envs)]

    def first(self, env: int) -> np.ndarray:
        frame = self.random.integers(256, size=(2, 1, 1), dtype=np.uint8)
        stack = np.repeat(frame, self.stack, axis=-1)
        self.episodes[env].append({"observation": [stack], "action": [], "reward": [], "terminated": False})
        return stack

    def reset(self) -> np.ndarray:
        self.now = np.stack([self.first(env) for env in range(self.num_envs)])
        return self.now

    def step(self) -> tuple[Any, ...]:
        count = self.num_envs
        action = self.random.integers(4, size=count).astype(np.int32)
        reward = self.random.normal(size=count).astype(np.float32)
        new = self.random.integers(256, size=(count, 2, 1, 1), dtype=np.uint8)
        reached = np.concatenate([self.now[..., 1:], new], axis=-1)
        ended = self.random.random(count) < self.ending
        terminated = ended & (self.random.random(count) < 0.5)
        self.now = reached.copy()
        for env in range(count):
            episode = self.episodes[env][-1]
            for name, value in (("observation", reached), ("action", action), ("reward", reward)):
                episode[name].append(value[env])
            episode["terminated"] = bool(terminated[env])
            if ended[env]:
                self.now[env] = self.first(env)
        return action, reward, terminated, ended & ~terminated, reached, self.now


def describe(storage: Storage) -> Description:
    return Description(storage.layout, "gym/None-v0", 4, (), (), None)


def write_description(directory: Path, storage: Storage) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "replay.json").write_text(json.dumps(describe(storage).to_json()))


def played(directory: Path, seed: int, saves: set[int], ends: set[int], **options: Any) -> tuple[World, Storage]:
    """A replay saved from a small ring as it goes, and a ring that holds all of it."""
    ending = options.pop("ending")
    world = World(seed, options["num_envs"], options["frame_stack"], ending)
    shape = (2, 1, options["frame_stack"])
    most = options["num_envs"] * options["n_step"]
    small, large = (Storage(most * size, shape, "uint8", gamma=GAMMA, **options) for size in (12, STEPS))
    write_description(directory, small)
    observation = world.reset()
    small.begin(observation)
    large.begin(observation)
    saved = 0
    for step in range(STEPS):
        now = world.step()
        small.add(*now)
        large.add(*now)
        if step in ends:
            small.end()
            large.end()
            observation = world.reset()
            small.begin(observation)
            large.begin(observation)
        if step in saves or small.written - saved > 8 * most or step == STEPS - 1:
            checkpoint.save_transitions(directory, small)
            saved = small.written
    return world, large


CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "num_envs": st.integers(1, 3),
        "n_step": st.integers(1, 3),
        "frame_stack": st.sampled_from([1, 3]),
        "ending": st.sampled_from([0.0, 0.1, 1.0]),
        "saves": st.sets(st.integers(0, STEPS - 1), max_size=4),
        "ends": st.sets(st.integers(0, STEPS - 1), max_size=2),
    }
)


def assert_same(columns: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert columns.keys() == expected.keys()
    for name, column in columns.items():
        assert column.dtype == expected[name].dtype
        np.testing.assert_array_equal(column, expected[name])


@settings(deadline=None, max_examples=25)
@given(case=CASES, order=st.randoms(use_true_random=False))
def test_a_saved_replay_gives_what_the_storage_gave(
    case: dict[str, Any], order: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("past")
    _, large = played(directory, **case)
    past = PastReplay(directory, checksums=True)
    assert len(past) == past.capacity == large.written
    slots = list(range(large.written))
    order.shuffle(slots)
    assert_same(past.gather(slots), large.gather(slots))
    assert_same(past.gather(slots[:3] * 2), large.gather(slots[:3] * 2))
    assert past.description == describe(large)


@settings(deadline=None, max_examples=15)
@given(case=CASES.map(lambda case: {**case, "n_step": 1}))
def test_episodes_come_back_whole(case: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("past")
    world, _ = played(directory, **case)
    expected = [episode for env in world.episodes for episode in env if episode["action"]]
    found = list(PastReplay(directory).episodes())
    assert len(found) == len(expected)
    for episode, shown in zip(found, expected, strict=True):
        np.testing.assert_array_equal(episode.observation, shown["observation"])
        np.testing.assert_array_equal(episode.action, shown["action"])
        np.testing.assert_array_equal(episode.reward, shown["reward"])
        assert episode.terminated == shown["terminated"]


def test_episodes_of_longer_steps_are_refused(tmp_path: Path) -> None:
    played(tmp_path, seed=0, saves=set(), ends=set(), num_envs=1, n_step=2, frame_stack=1, ending=0.1)
    with pytest.raises(ValueError, match="n_step 1 and a gamma above 0 only, not from n_step 2"):
        next(PastReplay(tmp_path).episodes())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """60 transitions with shared frames, in files of 9 or so."""
    directory = tmp_path / "replay"
    played(directory, seed=0, saves={10, 20}, ends=set(), num_envs=1, n_step=1, frame_stack=3, ending=0.1)
    return directory


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def second(directory: Path) -> Path:
    return sorted(directory.glob("0*"))[1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "replay.json").unlink(), "no saved replay"),
        (lambda d: cut(d / "replay.json"), "replay.json cannot be read"),
        (lambda d: (d / "replay.json").write_text('{"format": 9}'), "it has format 9"),
        (lambda d: cut(second(d) / "frames.npy"), r"frames.npy has \d+ bytes, not \d+"),
        (lambda d: (second(d) / "reward.npy").unlink(), "reward.npy"),
        (lambda d: (second(d) / "manifest.json").unlink(), "manifest.json"),
        (lambda d: cut(second(d) / "manifest.json"), "delimiter"),
        (lambda d: shutil.rmtree(second(d)), r"transitions 9 to \d+ are missing"),
        (lambda d: shutil.rmtree(min(d.glob("0*"))), "transitions 0 to 9 are missing"),
        (lambda d: [shutil.rmtree(path) for path in d.glob("0*")], "it holds no transitions"),
        (
            lambda d: (d / "replay.json").write_text((d / "replay.json").read_text().replace("uint8", "int16")),
            r"frames is uint8 .*, not int16",
        ),
    ],
)
def test_damage_is_named(saved: Path, damage: Any, message: str) -> None:
    PastReplay(saved)
    damage(saved)
    with pytest.raises(PastReplayError, match=message) as complaint:
        PastReplay(saved)
    assert str(saved) in str(complaint.value) and "\n" not in str(complaint.value)


def test_checksums_find_what_sizes_do_not(saved: Path) -> None:
    digest = PastReplay(saved).digest
    path = second(saved) / "frames.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert PastReplay(saved).digest == digest
    with pytest.raises(PastReplayError, match=r"frames\.npy does not match its checksum"):
        PastReplay(saved, checksums=True)


def test_a_first_part_can_be_asked_for(saved: Path) -> None:
    stop = int(second(saved).name.split("-")[1])
    part, whole = PastReplay(saved, transitions=stop), PastReplay(saved)
    assert len(part) == stop and part.digest != whole.digest
    assert_same(part.gather([0, stop - 1]), whole.gather([0, stop - 1]))
    for slots in ([stop], [-1]):
        with pytest.raises(IndexError, match=f"must be below {stop}"):
            part.gather(slots)
    with pytest.raises(PastReplayError, match=f"transitions, not the {stop - 1} asked for"):
        PastReplay(saved, transitions=stop - 1)


# Real runs

AGENT = DQN(warmup=100, batch_size=8, hidden=(16,), target_period=10, epsilon_decay_steps=200, capacity=150)


def experiment(directory: Path, env: str = "gym/CartPole-v1", agent: Any = AGENT, **changes: Any) -> Experiment:
    fields = {"steps": 400, "log_every": 100, "checkpoint_every": 200, "eval_episodes": 0, "out": str(directory)}
    return Experiment(agent=agent, env=env, **fields | changes)


def stop_at(directory: Path, step: int) -> None:
    """Leave a run directory as a kill -9 some time after the checkpoint at `step` would; transitions stay."""
    for path in checkpoint.names(directory / "checkpoints"):
        if int(path.name) > step:
            shutil.rmtree(path)
    (directory / "summary.json").unlink()


@pytest.fixture(scope="module")
def past_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "past"
    train(experiment(directory, save_replay=True), quiet=True)
    return directory


def test_all_that_was_stored_is_kept_whatever_the_capacity(tmp_path: Path) -> None:
    """With a warm-up of the whole run actions are random, so both runs store the same."""
    replays = []
    for capacity in (40, 1000):
        agent = dataclasses.replace(AGENT, warmup=399, capacity=capacity)
        directory = tmp_path / str(capacity)
        train(experiment(directory, agent=agent, num_envs=2, save_replay=True), quiet=True)
        replays.append(PastReplay(directory / "replay", checksums=True))
    few, all_ = replays
    assert len(few) == len(all_) == 400
    assert_same(few.gather(np.arange(400)), all_.gather(np.arange(400)))


def test_only_live_transitions_are_kept_unless_asked(tmp_path: Path, past_run: Path) -> None:
    train(experiment(tmp_path / "run", keep_checkpoints=1), quiet=True)
    assert [path.name for path in sorted((tmp_path / "run" / "replay").iterdir())] == [f"{250:012d}-{400:012d}"]
    assert len(PastReplay(past_run / "replay")) == 400
    with pytest.raises(PastReplayError, match="no saved replay"):
        PastReplay(tmp_path / "run" / "replay")


def test_saving_leaves_training_as_it_was(tmp_path: Path, past_run: Path) -> None:
    train(experiment(tmp_path / "run"), quiet=True)
    assert comparable(tmp_path / "run") == comparable(past_run)


def test_a_killed_run_goes_on_with_its_saved_replay(tmp_path: Path, past_run: Path) -> None:
    shutil.copytree(past_run, tmp_path / "killed")
    stop_at(tmp_path / "killed", 200)
    assert len(PastReplay(tmp_path / "killed" / "replay")) == 400  # readable before, too
    train(experiment(tmp_path / "killed", save_replay=True), resume=tmp_path / "killed", quiet=True)
    resumed, whole = PastReplay(tmp_path / "killed" / "replay", checksums=True), PastReplay(past_run / "replay")
    assert_same(resumed.gather(np.arange(400)), whole.gather(np.arange(400)))
    assert len(resumed) == 400


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_it_readable(tmp_path: Path) -> None:
    """Actions are random to the end, so a shorter run stores the first part of what a longer one does."""
    flags = ["--env", "minatar/Breakout", "--agent.capacity", "100", "--save-replay", "--eval-episodes", "0"]
    flags += ["--steps", "1000000", "--agent.warmup", "999999", "--out", str(tmp_path / "killed")]
    killed = subprocess.Popen([str(Path(sys.executable).with_name("resprout")), "train", "dqn", *flags])
    while len(list((tmp_path / "killed").glob("replay/0*"))) < 5:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    past = PastReplay(tmp_path / "killed" / "replay", checksums=True)
    count = len(past)
    assert count >= 5 * 99
    agent = dataclasses.replace(AGENT, warmup=count, capacity=count)
    train(experiment(tmp_path / "whole", "minatar/Breakout", agent, steps=count + 1, save_replay=True), quiet=True)
    whole = PastReplay(tmp_path / "whole" / "replay")
    assert_same(past.gather(np.arange(count)), whole.gather(np.arange(count)))


@pytest.mark.parametrize(
    ("replay", "sources"),
    [("uniform", ("{}",)), pytest.param("reshuffled", ("{}:0.25", "{}/../copy:0.3"), marks=pytest.mark.slow)],
)
def test_a_resumed_mixing_run_equals_one_never_stopped(
    replay: str, sources: tuple[str, ...], tmp_path: Path, past_run: Path
) -> None:
    if not (past_run / "../copy").exists():
        shutil.copytree(past_run, past_run / "../copy")
    changes = {"replay": replay, "replay_from": tuple(source.format(past_run) for source in sources)}
    whole = train(experiment(tmp_path / "whole", **changes), quiet=True)
    halved = experiment(tmp_path / "halved", **changes)
    train(halved, quiet=True)
    stop_at(tmp_path / "halved", 200)
    resumed = train(halved, resume=tmp_path / "halved", quiet=True)
    assert_equal(whole.state, resumed.state)
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "halved")
    assert comparable(tmp_path / "whole") != comparable(past_run)  # the same but for its sources and sampler
    recorded = json.loads((tmp_path / "whole" / "config.json").read_text())["sources"]
    assert [source["transitions"] for source in recorded] == [400] * len(sources)


def test_batches_hold_the_past_in_its_share(tmp_path: Path, past_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first gradient step on, while the run's own replay is all but empty."""
    asked: dict[str, list[int]] = {"live": [], "past": []}
    for kind, cls in (("live", Storage), ("past", PastReplay)):

        def gather(self: Any, slots: Any, kind: str = kind, original: Any = cls.gather) -> Any:
            asked[kind].append(len(slots))
            return original(self, slots)

        monkeypatch.setattr(cls, "gather", gather)
    agent = dataclasses.replace(AGENT, warmup=0, n_step=1)
    run = experiment(tmp_path / "run", agent=agent, replay_from=(f"{past_run}:0.7",), steps=20, replay_ratio=1.0)
    result = train(run, quiet=True)
    assert result.summary["gradient_steps"] == 20
    assert asked == {"live": [2] * 20, "past": [6] * 20}  # of 8: 2.4 and 5.6


def test_a_source_that_grew_is_used_as_it_was_and_one_that_changed_refused(tmp_path: Path, past_run: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(past_run, source)
    mixing = experiment(tmp_path / "run", replay_from=(str(source),))
    whole = train(mixing, quiet=True)
    stop_at(tmp_path / "run", 200)
    longer = dataclasses.replace(experiment(source, save_replay=True), steps=500)
    train(longer, resume=source, quiet=True)
    assert len(PastReplay(source / "replay")) == 500
    assert_equal(whole.state, train(mixing, resume=tmp_path / "run", quiet=True).state)
    stop_at(tmp_path / "run", 200)
    manifest = next((source / "replay").glob("000000000000-*")) / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(SourceError, match="is not what it was when the run began"):
        train(mixing, resume=tmp_path / "run", quiet=True)
    other = dataclasses.replace(mixing, replay_from=(f"{past_run}:0.3",))
    with pytest.raises(ExperimentError, match="is a run of another experiment"):
        train(other, resume=tmp_path / "run", quiet=True)


def test_draws_of_a_run_are_summed_up(tmp_path: Path) -> None:
    agent = dataclasses.replace(AGENT, warmup=20, capacity=50, batch_size=8, replay_ratio=0.25)
    halved = experiment(tmp_path / "run", agent=agent, count_draws=True)
    draws = train(halved, quiet=True).summary["lifetime_draws"]
    assert draws["lives"] == sum(draws["histogram"]) == 400 - 50 - 50
    counts = np.repeat(np.arange(len(draws["histogram"])), draws["histogram"])
    assert draws["mean"] == pytest.approx(counts.mean()) and draws["variance"] == pytest.approx(counts.var())
    assert draws["mean"] == pytest.approx(2, rel=0.1)
    stop_at(tmp_path / "run", 200)
    assert train(halved, resume=tmp_path / "run", quiet=True).summary["lifetime_draws"] == draws


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ((), {}),
        (("a",), {"a": 0.5}),
        (("a", "b"), {"a": 0.25, "b": 0.25}),
        (("a:0.3", "b"), {"a": 0.3, "b": 0.2}),
        (("a:0.3", "minari:x/y-v0:0.6"), {"a": 0.3, "minari:x/y-v0": 0.6}),
        (("minari:x-v0",), {"minari:x-v0": 0.5}),
        (("dir:name",), {"dir:name": 0.5}),
    ],
)
def test_shares(sources: tuple[str, ...], expected: dict[str, float]) -> None:
    assert parse_sources(sources, 32) == pytest.approx(expected)


FLAGS = ["--agent.warmup", "100", "--steps", "400", "--agent.hidden", "16", "--agent.capacity", "150"]
BAD = [
    (["{}:0"], "fraction of {} must be between 0 and 1, not 0"),
    (["{}:nan"], "must be between 0 and 1, not nan"),
    (["{}:0.6", "b:0.4"], "fractions that sum to 1 leave nothing of the batch for the run itself"),
    (["{}:0.5", "b"], "b would share what the fractions given leave of 0.5, which is nothing"),
    (["{}:0.001"], "a batch of 32 is too small for shares of [0.001]"),
    (["{}", "{}"], "{} is there twice"),
    (["nowhere"], "nowhere/replay: no saved replay"),
    (["{}", "--agent.n-step", "3"], "n_step is 1 there and 3 here"),
    (["{}", "--agent.gamma", "0.9"], "gamma is 0.99 there and 0.9 here"),
    (["{}", "--agent.batch-size", "2000", "--agent.capacity", "2000"], "holds 400 transitions, fewer than its 1000"),
    (["{}", "--env", "gym/Acrobot-v1"], "observation_shape is (4,) there and (6,) here; action_size is 2 there and 3"),
    (["{}", "--env", "atari/Pong"], "frame_stack is 1 there and 4 here"),
    (["{}", "--env", "atari/Pong"], "reward_clip is None there and 1.0 here"),
]


@pytest.mark.parametrize(("sources", "message"), BAD)
def test_bad_sources_are_one_line_and_create_nothing(
    sources: list[str],
    message: str,
    past_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [text.format(past_run) for text in sources]
    env = [] if "--env" in arguments else ["--env", "gym/CartPole-v1"]
    assert command_line.dispatch(["train", "dqn", *env, *FLAGS, "--replay-from", *arguments]) == 2
    said = capfd.readouterr().err
    assert message.format(past_run) in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_bounds_of_actions_are_compared_in_single_precision() -> None:
    storage = Storage(10, (2,), "float32", action_shape=(1,), action_dtype="float32")
    one = Description(storage.layout, "gym/A", 1, (-0.4,), (0.4,), None)
    other = dataclasses.replace(one, env="mujoco/A", action_low=(float(np.float32(-0.4)),))
    assert one.differences(other) == []
    wider = dataclasses.replace(one, action_high=(0.5,))
    assert one.differences(wider) == ["action_high is [0.4000000059604645] there and [0.5] here"]
    assert Description.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_no_sources_are_nothing() -> None:
    storage = Storage(10, (2,), "float32")
    assert open_sources((), 32, describe(storage)) == ()
