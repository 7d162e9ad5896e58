"""The numbers of every preset, as its source has them."""

import pytest

from resprout.training import PRESETS

SHARED = {"gamma": 0.99, "batch_size": 32, "tau": 1.0}
DOPAMINE = SHARED | {
    "warmup": 20_000,
    "replay_ratio": 0.25,
    "target_period": 2_000,  # 8,000 agent steps
    "epsilon_end": 0.01,
    "epsilon_decay_steps": 250_000,
    "epsilon_eval": 0.001,
    "capacity": 1_000_000,
    "padding": "same",
}
SOURCES = {
    # dopamine/jax/agents/dqn/configs/dqn.gin
    "dqn_dopamine": DOPAMINE
    | {"loss": "mse", "learning_rate": 6.25e-5, "adam_eps": 1.5e-4, "initialiser": "xavier", "n_step": 1},
    # dopamine/jax/agents/rainbow/configs/c51.gin
    "c51_dopamine": DOPAMINE
    | {"distribution": "c51", "atoms": 51, "v_min": -10.0, "v_max": 10.0, "initialiser": "rainbow"}
    | {"learning_rate": 2.5e-4, "adam_eps": 3.125e-4, "n_step": 1},
    # cleanrl/dqn_atari_jax.py
    "dqn_cleanrl": SHARED
    | {"loss": "mse", "learning_rate": 1e-4, "adam_eps": 1e-8, "initialiser": "lecun", "padding": "valid"}
    | {"warmup": 80_000, "target_period": 250, "epsilon_end": 0.01, "epsilon_eval": 0.01, "replay_ratio": 0.25},
    # dopamine/labs/atari_100k/configs/DrQ_eps.gin
    "drq_eps": SHARED
    | {"n_step": 10, "double": True, "dueling": True, "distribution": "none", "warmup": 1_600, "replay_ratio": 1.0}
    | {"target_period": 1, "epsilon_end": 0.01, "epsilon_decay_steps": 5_000, "epsilon_eval": 0.001}
    | {"learning_rate": 1e-4, "adam_eps": 1.5e-4, "random_shift": 4, "intensity": 0.05, "capacity": 1_000_000},
    # Young & Tian (2019), table 1; Ceron & Castro (2021) for Adam and the final epsilon
    "dqn_minatar": SHARED
    | {"capacity": 100_000, "target_period": 1_000, "warmup": 5_000, "replay_ratio": 1.0, "epsilon_end": 0.01}
    | {"epsilon_decay_steps": 100_000, "learning_rate": 2.5e-4, "adam_eps": 3.125e-4},
    # Haarnoja et al. (2018b), table 1
    "sac_mujoco": {"gamma": 0.99, "batch_size": 256, "hidden": (256, 256), "tau": 0.005, "capacity": 1_000_000}
    | {f"{part}_learning_rate": 3e-4 for part in ("actor", "critic", "temperature")}
    | {"replay_ratio": 1.0, "critics": 2, "learn_temperature": True},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_their_sources(name: str) -> None:
    agent = PRESETS[name].agent
    assert {field: getattr(agent, field) for field in SOURCES[name]} == SOURCES[name]


def test_cleanrl_epsilon_is_on_its_line() -> None:
    """CleanRL goes from 1 at step 0 to .01 at step 1e6; at the end of its warm-up it is where ours begins."""
    agent = PRESETS["dqn_cleanrl"].agent
    assert agent.epsilon_start == pytest.approx(1 - 0.99 * agent.warmup / 1e6)
    assert agent.warmup + agent.epsilon_decay_steps == 1_000_000
