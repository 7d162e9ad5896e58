"""Named, cited configurations; every flag overrides them."""

from dataclasses import dataclass, field
from typing import Any

from ..agents import DQN, SAC
from .experiment import AgentConfig


@dataclass(frozen=True)
class Preset:
    agent: AgentConfig
    source: str
    experiment: dict[str, Any] = field(default_factory=dict)  # other fields of Experiment


PRESETS: dict[str, Preset] = {
    "dqn_dopamine": Preset(
        DQN(loss="mse"),
        "Castro et al. (2018), Dopamine's dqn.gin, JAX agent; first 40 of its 200 iterations of 250k agent steps",
        {"protocol": "dopamine", "steps": 10_000_000, "eval_every": 250_000},
    ),
    "c51_dopamine": Preset(
        DQN(distribution="c51", learning_rate=2.5e-4, adam_eps=3.125e-4, initialiser="rainbow"),
        "Bellemare et al. (2017); Dopamine's c51.gin, first 40 of 200 iterations",
        {"protocol": "dopamine", "steps": 10_000_000, "eval_every": 250_000},
    ),
    "dqn_cleanrl": Preset(
        DQN(
            loss="mse",
            padding="valid",
            learning_rate=1e-4,
            adam_eps=1e-8,
            target_period=250,  # 1,000 agent steps at an update every 4
            initialiser="lecun",
            # CleanRL's line from 1 at step 0 to .01 at step 1e6, from the end of the warm-up on
            epsilon_start=0.9208,
            epsilon_decay_steps=920_000,
            epsilon_eval=0.01,
            warmup=80_000,
        ),
        "Huang et al. (2022), CleanRL's dqn_atari_jax.py; no sticky actions, life-loss ends, FIRE on reset",
        {"protocol": "cleanrl", "steps": 10_000_000, "eval_every": 250_000},
    ),
    "drq_eps": Preset(
        DQN(
            double=True,
            dueling=True,
            n_step=10,
            random_shift=4,
            intensity=0.05,
            learning_rate=1e-4,
            adam_eps=1.5e-4,
            target_period=1,
            epsilon_decay_steps=5_000,
            warmup=1_600,
            replay_ratio=1.0,
        ),
        "Agarwal et al. (2021), DrQ(eps): Atari 100k; Dopamine's DrQ_eps.gin; 100 evaluation episodes at the end",
        {"protocol": "atari100k", "steps": 100_000, "eval_every": 0, "eval_episodes": 100, "checkpoint_every": 25_000},
    ),
    "dqn_minatar": Preset(
        DQN(
            learning_rate=2.5e-4,
            adam_eps=3.125e-4,
            target_period=1_000,
            epsilon_decay_steps=100_000,
            warmup=5_000,
            replay_ratio=1.0,
            capacity=100_000,
        ),
        "Young & Tian (2019): network, replay, target, warm-up; final epsilon and Adam of Ceron & Castro (2021)",
        {"steps": 500_000, "eval_every": 50_000, "eval_episodes": 30},
    ),
    "sac_mujoco": Preset(
        SAC(),
        "Haarnoja et al. (2018b), table 1",
        {"steps": 1_000_000, "eval_every": 10_000},
    ),
}
