"""The numbers of every preset, as its source has them."""

import pytest

from resprout.training import PRESETS, Experiment

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
CLEANRL = SHARED | {
    "initialiser": "lecun",
    "padding": "valid",
    "warmup": 80_000,
    "epsilon_end": 0.01,
    "epsilon_eval": 0.01,
    "replay_ratio": 0.25,
    "capacity": 1_000_000,
    "optimizer": "adam",
    "double": False,
    "n_step": 1,
}
CLEANRL_DQN = CLEANRL | {"loss": "mse", "learning_rate": 1e-4, "adam_eps": 1e-8, "target_period": 250}
CLEANRL_C51 = CLEANRL | {
    "distribution": "c51",
    "atoms": 51,
    "v_min": -10.0,
    "v_max": 10.0,
    "learning_rate": 2.5e-4,
    "adam_eps": 0.01 / 32,
    "target_period": 2_500,  # 10,000 agent steps
}
# atari_parameters and atari_preprocessing of discrete/main.py (LAP-PAL), of rrm/main.py (errr), which has the same
LAP = SHARED | {
    "double": True,
    "loss": "lap",
    "lap_threshold": 0.01,
    "padding": "valid",
    "initialiser": "pytorch",
    "optimizer": "rmsprop",
    "learning_rate": 6.25e-5,
    "rmsprop_decay": 0.95,
    "rmsprop_eps": 1e-5,
    "warmup": 20_000,
    "replay_ratio": 0.25,
    "capacity": 1_000_000,
    "target_period": 8_000,
    "epsilon_start": 1.0,
    "epsilon_end": 0.01,
    "epsilon_eval": 0.001,
    "epsilon_decay_steps": 4 * 250_000,
    "dueling": False,
    "distribution": "none",
    "n_step": 1,
}
# dopamine/labs/atari_100k/configs/DrQ_eps.gin
DRQ_EPS = (
    SHARED
    | {"n_step": 10, "double": True, "dueling": True, "distribution": "none", "warmup": 1_600, "replay_ratio": 1.0}
    | {"target_period": 1, "epsilon_end": 0.01, "epsilon_decay_steps": 5_000, "epsilon_eval": 0.001}
    | {"learning_rate": 1e-4, "adam_eps": 1.5e-4, "random_shift": 4, "intensity": 0.05, "capacity": 1_000_000}
)
SOURCES = {
    # dopamine/jax/agents/dqn/configs/dqn.gin
    "dqn_dopamine": DOPAMINE
    | {"loss": "mse", "learning_rate": 6.25e-5, "adam_eps": 1.5e-4, "initialiser": "xavier", "n_step": 1},
    # dopamine/jax/agents/rainbow/configs/c51.gin
    "c51_dopamine": DOPAMINE
    | {"distribution": "c51", "atoms": 51, "v_min": -10.0, "v_max": 10.0, "initialiser": "rainbow"}
    | {"learning_rate": 2.5e-4, "adam_eps": 3.125e-4, "n_step": 1},
    # cleanrl/dqn_atari_jax.py
    "dqn_cleanrl": CLEANRL_DQN,
    # errr/rrc: dqn_atari_jax_rrc.py, c51_atari_jax_rrc.py, c51_atari_jax_wor.py
    "rrc_dqn": CLEANRL_DQN,
    "rrc_c51": CLEANRL_C51,
    "wor_c51": CLEANRL_C51,
    "lap_ddqn": LAP,
    "rrm_ddqn_lap": LAP,
    "drq_eps": DRQ_EPS,
    # Young & Tian (2019), table 1; Ceron & Castro (2021) for Adam and the final epsilon
    "dqn_minatar": SHARED
    | {"capacity": 100_000, "target_period": 1_000, "warmup": 5_000, "replay_ratio": 1.0, "epsilon_end": 0.01}
    | {"epsilon_decay_steps": 100_000, "learning_rate": 2.5e-4, "adam_eps": 3.125e-4},
    # Haarnoja et al. (2018b), table 1
    "sac_mujoco": {"gamma": 0.99, "batch_size": 256, "hidden": (256, 256), "tau": 0.005, "capacity": 1_000_000}
    | {f"{part}_learning_rate": 3e-4 for part in ("actor", "critic", "temperature")}
    | {"replay_ratio": 1.0, "critics": 2, "learn_temperature": True},
}


# dopamine/labs/redo: dqn.gin and the paper's table 1; DrQ_eps.gin; tfagents SAC; rl_with_resets: jaxrl's SAC
SOURCES |= {
    "redo_dqn": DOPAMINE | {"loss": "huber", "learning_rate": 6.25e-5, "adam_eps": 1.5e-4, "n_step": 1},
    "redo_drq": DRQ_EPS,
    "reset_drq": DRQ_EPS,
    # ACE's default file and main.py
    "ace_mujoco": SOURCES["sac_mujoco"]
    | {"batch_size": 512, "hidden": (1024, 1024, 1024), "activation": "elu+relu+relu", "initialiser": "xavier"}
    | {"warmup": 10_000, "target_update_interval": 2, "separate_heads": True, "n_step": 1, "layer_norm": False}
    | {"causal_every": 10_000, "causal_rows": 10_000, "causal_temperature": 1.0, "causal_sign": "signed"},
    "redo_sac": SOURCES["sac_mujoco"]
    | {"initialiser": "xavier", "reward_scale": 0.1, "warmup": 10_000}
    | {"entropy_per_action": -0.5},  # TF-Agents' default
    "arr_drq": DRQ_EPS,
    "reset_sac": SOURCES["sac_mujoco"] | {"replay_ratio": 32.0, "entropy_per_action": -0.5},
}
SOURCES["ace_small"] = SOURCES["ace_mujoco"] | {"batch_size": 256, "hidden": (256, 256), "activation": "elu+relu"}

# drqv2: cfgs/config.yaml and cfgs/task/*.yaml; in agent steps, each 2 frames. drm has the same for medium tasks.
DRQV2 = {
    "gamma": 0.99,
    "n_step": 3,
    "batch_size": 256,
    "learning_rate": 1e-4,
    "tau": 0.01,
    "features": 50,
    "channels": 32,
    "hidden": (1024, 1024),
    "std_start": 1.0,
    "std_end": 0.1,
    "std_steps": 500_000,
    "std_clip": 0.3,
    "random_shift": 4,
    "warmup": 2_000,
    "replay_ratio": 0.5,
    "capacity": 1_000_000,
}
SOURCES |= {
    "drqv2_easy": DRQV2 | {"std_steps": 100_000},
    "drqv2_medium": DRQV2,
    "drqv2_hard": DRQV2 | {"std_steps": 2_000_000, "learning_rate": 8e-5, "features": 100},
    "drqv2_walker": DRQV2 | {"n_step": 1, "batch_size": 512},
    "drqv2_walker_easy": DRQV2 | {"n_step": 1, "batch_size": 512, "std_steps": 100_000},
    "drqv2_quadruped": DRQV2 | {"capacity": 100_000},
    "arr_drqv2": DRQV2,
    "drm_dmc": DRQV2
    | {"dormant_tau": 0.025, "awake_below": 0.2, "noise_temperature": 0.1, "trust_temperature": 0.02}
    | {"trust": 0.6, "expectile": 0.9},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_their_sources(name: str) -> None:
    agent = PRESETS[name].agent
    assert {field: getattr(agent, field) for field in SOURCES[name]} == SOURCES[name]


RUNS = {  # protocol, agent steps, replay
    "dqn_dopamine": ("dopamine", 10_000_000, "uniform"),
    "c51_dopamine": ("dopamine", 10_000_000, "uniform"),
    "dqn_cleanrl": ("cleanrl", 10_000_000, "uniform"),
    "rrc_dqn": ("cleanrl", 10_000_000, "reshuffled"),
    "rrc_c51": ("cleanrl", 10_000_000, "reshuffled"),
    "wor_c51": ("cleanrl", 10_000_000, "without_replacement"),
    "lap_ddqn": ("dopamine", 50_000_000, "prioritized:alpha=0.6,beta=0,minimum=0.01"),
    "rrm_ddqn_lap": ("dopamine", 50_000_000, "masked:alpha=0.6,minimum=0.01"),
    "drq_eps": ("atari100k", 100_000, "uniform"),
    "dqn_minatar": (None, 500_000, "uniform"),
    "sac_mujoco": (None, 1_000_000, "uniform"),
    "ace_mujoco": (None, 1_000_000, "without_replacement"),
    "ace_small": (None, 300_000, "without_replacement"),
    "redo_dqn": ("dopamine", 10_000_000, "uniform"),
    "redo_drq": ("atari100k", 400_000, "uniform"),
    "redo_sac": (None, 1_000_000, "uniform"),
    "reset_sac": (None, 2_000_000, "uniform"),
    "reset_drq": ("atari100k", 100_000, "uniform"),
    "arr_drq": ("atari100k", 100_000, "uniform"),
    "drqv2_easy": (None, 1_100_000 // 2, "uniform"),
    "drqv2_medium": (None, 3_100_000 // 2, "uniform"),
    "drqv2_hard": (None, 30_100_000 // 2, "uniform"),
    "drqv2_walker": (None, 3_100_000 // 2, "uniform"),
    "drqv2_walker_easy": (None, 1_100_000 // 2, "uniform"),
    "drqv2_quadruped": (None, 3_100_000 // 2, "uniform"),
    "arr_drqv2": (None, 2_000_000 // 2, "uniform"),
    "drm_dmc": (None, 3_100_000 // 2, "uniform"),
}
CODE = "init=paper,count=paper,forget_bias=false"
INTERVENTIONS = {
    "ace_mujoco": ("dormancy_perturb:of=actor",),
    "ace_small": ("dormancy_perturb:of=actor",),
    # Sokar et al. (2023), table 1; Nikishin et al. (2022): 200,000 agent steps at replay ratio 32
    "redo_dqn": (f"redo:tau=0.025,{CODE},probe=64",),
    "redo_drq": (f"redo:{CODE},probe=64",),
    "redo_sac": (f"redo:tau=0.0,period=200000,{CODE}",),
    "reset_sac": (f"reset:period={200_000 * 32}",),
    "reset_drq": ("reset:period=20000,layers=value+advantage,stop=100000",),
    "arr_drq": ("adaptive_replay_ratio:every=2000",),
    "arr_drqv2": ("adaptive_replay_ratio:layers=heads",),
    "drm_dmc": (f"dormancy_perturb:measure=state,k=2.0,high=1.0,period={100_000 // 2}",),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_runs(name: str) -> None:
    preset = PRESETS[name]
    experiment = Experiment(agent=preset.agent, env="some/Env", **preset.experiment)  # checks the replay's SPEC
    assert (experiment.protocol, experiment.steps, experiment.replay) == RUNS[name]
    assert tuple(each.spec for each in experiment.acting) == INTERVENTIONS.get(name, ())
    assert "\n" not in preset.source and len(preset.source) < 120


@pytest.mark.parametrize("name", ["dqn_cleanrl", "rrc_dqn", "rrc_c51", "wor_c51"])
def test_cleanrl_epsilon_is_on_its_line(name: str) -> None:
    """CleanRL goes from 1 at step 0 to .01 at step 1e6; at the end of its warm-up it is where ours begins."""
    agent = PRESETS[name].agent
    assert agent.epsilon_start == pytest.approx(1 - 0.99 * agent.warmup / 1e6)
    assert agent.warmup + agent.epsilon_decay_steps == 1_000_000
