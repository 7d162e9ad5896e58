"""The comparison with peers: what is measured and how it is summed up. The peers themselves run in `make bench-peers`."""

import subprocess
import sys

import numpy as np
import pytest

from resprout.agents import SAC
from resprout.benchmarks.peers import Task, bare_update_limit, cores, middle_and_range, our_speed, random_batch, tasks
from resprout.envs import make
from resprout.training import Experiment


def pendulum(replay_ratio: float) -> Task:
    agent = SAC(hidden=(8,), batch_size=4, warmup=20, capacity=1000, replay_ratio=replay_ratio)
    return Task(Experiment(agent=agent, env="gym/Pendulum-v1", steps=200), "peer_sbx.py", "Pendulum-v1")


@pytest.mark.parametrize(("env_id", "action"), [("mujoco/HalfCheetah-v4", (6,)), ("atari/Breakout", ())])
def test_random_batch_is_what_the_environment_would_give(env_id, action):
    env = make(env_id)
    observation = env.reset(seed=0)
    batch = random_batch(env.spec, 3)
    env.close()
    assert batch.observation.shape == batch.next_observation.shape == (3, *observation.shape[1:])
    assert batch.observation.dtype == observation.dtype
    assert batch.action.shape == (3, *action)
    assert batch.reward.shape == batch.discount.shape == batch.weight.shape == (3,)


@pytest.mark.slow
def test_bare_update_limit_is_in_agent_steps():
    often, seldom = (bare_update_limit(pendulum(ratio), seconds=0.5) for ratio in (1.0, 0.1))
    assert 3 < seldom / often < 30  # one gradient step pays for 10 agent steps


@pytest.mark.slow
def test_our_speed_is_measured_with_learning_on():
    assert np.isfinite(our_speed(pendulum(1.0), seed=0))


def test_middle_and_range():
    assert middle_and_range([3.0, 1.0, 10.0], 1) == "3.0\n1.0..10.0"


def test_our_settings_are_those_of_the_peers_scripts():
    sac, dqn = tasks()["sac"].experiment, tasks()["dqn"].experiment
    agent = sac.agent
    assert (agent.gamma, agent.tau, sac.ratio, agent.batch_size, agent.hidden) == (0.99, 0.005, 1.0, 256, (256, 256))
    assert {agent.actor_learning_rate, agent.critic_learning_rate, agent.temperature_learning_rate} == {3e-4}
    assert (agent.critics, agent.target_critics, agent.initial_temperature, agent.capacity) == (2, None, 1.0, 1_000_000)
    agent = dqn.agent
    assert (agent.batch_size, dqn.ratio, agent.capacity, agent.n_step, agent.gamma) == (32, 0.25, 100_000, 1, 0.99)
    assert (agent.distribution, agent.double, agent.dueling, agent.loss) == ("none", False, False, "huber")


def test_several_seeds_get_a_core_each(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {5, 3})
    assert (cores(1), cores(2)) == ([None], [3, 5])
    with pytest.raises(ValueError, match="3 seeds at a time need as many cores, and there are 2"):
        cores(3)


def test_missing_peers_are_one_line(tmp_path):
    command = [sys.executable, "-P", "-m", "resprout.benchmarks.peers", "--peers-python", tmp_path / "python"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "make bench-peers" in done.stderr.splitlines()[-1]
