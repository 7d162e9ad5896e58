"""Named, cited configurations; every flag overrides them."""

from dataclasses import dataclass, field, replace
from typing import Any

from ..agents import ACE, DQN, SAC, DrM, DrQv2
from .experiment import AgentConfig


@dataclass(frozen=True)
class Preset:
    agent: AgentConfig
    source: str
    experiment: dict[str, Any] = field(default_factory=dict)  # other fields of Experiment


CLEANRL_DQN = DQN(
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
)
CLEANRL_C51 = replace(
    CLEANRL_DQN,
    distribution="c51",
    loss="huber",  # not read: C51 has its cross entropy
    learning_rate=2.5e-4,
    adam_eps=3.125e-4,  # .01 / 32
    target_period=2_500,  # 10,000 agent steps
)
LAP_DDQN = DQN(
    double=True,
    loss="lap",
    padding="valid",
    initialiser="pytorch",
    optimizer="rmsprop",
    target_period=8_000,  # of their iterations, which are gradient steps, not agent steps
    epsilon_decay_steps=1_000_000,  # 250,000 of their iterations, at an update every 4
)
CLEANRL_RUN = {"protocol": "cleanrl", "steps": 10_000_000, "eval_every": 250_000}
LAP_RUN = {"protocol": "dopamine", "steps": 50_000_000, "eval_every": 250_000}

# ReDo as its authors' code does it: Glorot kernels, Adam's count and the moments of biases kept
REDO_CODE = "init=paper,count=paper,forget_bias=false"
# every 100,000 gradient steps, keep = clip(1 - dormancy of the policy, 0.2, 0.9), orthogonal draws, a new optimiser
ACE_RESET = "dormancy_perturb:of=actor"
DRQ_EPS = DQN(
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
)

# Of DeepMind Control from pixels, where an agent step has 2 frames: 3.1 million frames, evaluated every 10,000.
PIXELS_RUN = {"steps": 1_550_000, "eval_every": 5_000}
DRQV2_HARD = DrQv2(features=100, learning_rate=8e-5, std_steps=2_000_000)

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
        CLEANRL_DQN,
        "Huang et al. (2022), CleanRL's dqn_atari_jax.py; no sticky actions, life-loss ends, FIRE on reset",
        CLEANRL_RUN,
    ),
    "rrc_dqn": Preset(
        CLEANRL_DQN,
        "Fujita (2025), DQN with RR-C: CleanRL's dqn_atari_jax.py, reshuffled; evaluated at training's last epsilon",
        CLEANRL_RUN | {"replay": "reshuffled"},
    ),
    "rrc_c51": Preset(
        CLEANRL_C51,
        "Fujita (2025), C51 with RR-C: CleanRL's c51_atari_jax.py, reshuffled; its logarithm is not clipped here",
        CLEANRL_RUN | {"replay": "reshuffled"},
    ),
    "wor_c51": Preset(
        CLEANRL_C51,
        "Fujita (2025), C51 with batches without replacement; else as rrc_c51",
        CLEANRL_RUN | {"replay": "without_replacement"},
    ),
    "lap_ddqn": Preset(
        LAP_DDQN,
        "Fujimoto et al. (2020), LAP's Atari code; here pixels / 255, biases of zero, and a cut game's end is stored",
        LAP_RUN | {"replay": "prioritized:alpha=0.6,beta=0,minimum=0.01"},
    ),
    "rrm_ddqn_lap": Preset(
        LAP_DDQN,
        "Fujita (2025), double DQN with LAP and RR-M; differs as lap_ddqn does, and has sticky actions, unlike theirs",
        LAP_RUN | {"replay": "masked:alpha=0.6,minimum=0.01"},
    ),
    "drq_eps": Preset(
        DRQ_EPS,
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
    "ace_mujoco": Preset(
        ACE(),
        "Ji et al. (2024), ACE: the authors' code, one setting for all tasks; sink mode, resets by the policy's dormancy",
        {"steps": 1_000_000, "eval_every": 10_000, "replay": "without_replacement", "interventions": (ACE_RESET,)},
    ),
    "ace_small": Preset(
        ACE(hidden=(256, 256), activation="elu+relu", batch_size=256),
        "Ji et al. (2024), ACE as ace_mujoco, but two layers of 256 units and batches of 256, for laptops",
        {"steps": 300_000, "eval_every": 10_000, "replay": "without_replacement", "interventions": (ACE_RESET,)},
    ),
    "redo_dqn": Preset(
        DQN(),
        "Sokar et al. (2023), ReDo on DQN at its default replay ratio: tau .025, every 1,000 gradient steps, 64 states",
        {
            "protocol": "dopamine",
            "steps": 10_000_000,
            "eval_every": 250_000,
            "interventions": (f"redo:tau=0.025,period=1000,probe=64,{REDO_CODE}",),
        },
    ),
    "redo_drq": Preset(
        DRQ_EPS,
        "Sokar et al. (2023), ReDo on DrQ(eps): tau .1, every 1,000 gradient steps, 64 states; their runs have 400k steps",
        {
            "protocol": "atari100k",
            "steps": 400_000,
            "eval_every": 0,
            "eval_episodes": 100,
            "interventions": (f"redo:tau=0.1,period=1000,probe=64,{REDO_CODE}",),
        },
    ),
    "redo_sac": Preset(
        SAC(initialiser="xavier", reward_scale=0.1, entropy_per_action=-0.5),  # TF-Agents' SAC
        "Sokar et al. (2023), ReDo on SAC: tau 0, every 200,000 gradient steps, 256 states, actor and critics",
        {
            "steps": 1_000_000,
            "eval_every": 10_000,
            "eval_episodes": 30,
            "interventions": (f"redo:tau=0,period=200000,probe=256,{REDO_CODE}",),
        },
    ),
    "reset_sac": Preset(
        SAC(entropy_per_action=-0.5, replay_ratio=32.0),
        "Nikishin et al. (2022), SAC with resets of everything each 200,000 agent steps, at replay ratio 32; kernels differ",
        {"steps": 2_000_000, "eval_every": 10_000, "interventions": ("reset:period=6400000",)},
    ),
    "reset_drq": Preset(
        DRQ_EPS,
        "Nikishin et al. (2022), the output layers anew every 20,000 agent steps, their rule for SPR, on DrQ(eps)",
        {
            "protocol": "atari100k",
            "steps": 100_000,
            "eval_every": 0,
            "eval_episodes": 100,
            "checkpoint_every": 25_000,
            "interventions": ("reset:period=20000,layers=value+advantage,stop=100000",),
        },
    ),
    "arr_drq": Preset(
        DRQ_EPS,
        "Ma et al. (2024), Adaptive RR 0.5 -> 2 on DrQ(eps), checked every 2,000 agent steps over all ReLU layers; window ours",
        {
            "protocol": "atari100k",
            "steps": 100_000,
            "eval_every": 0,
            "eval_episodes": 100,
            "checkpoint_every": 25_000,
            "interventions": ("adaptive_replay_ratio:every=2000",),
        },
    ),
    "drqv2_easy": Preset(
        DrQv2(std_steps=100_000),
        "Yarats et al. (2022), DrQ-v2's code: easy tasks of DeepMind Control, 1.1 million frames",
        PIXELS_RUN | {"steps": 550_000},
    ),
    "drqv2_medium": Preset(
        DrQv2(),
        "Yarats et al. (2022), DrQ-v2's code: medium tasks, 3.1 million frames",
        PIXELS_RUN,
    ),
    "drqv2_hard": Preset(
        DRQV2_HARD,
        "Yarats et al. (2022), DrQ-v2's code: humanoid, 30.1 million frames",
        PIXELS_RUN | {"steps": 15_050_000},
    ),
    "drqv2_walker": Preset(
        DrQv2(n_step=1, batch_size=512),
        "Yarats et al. (2022), DrQ-v2's code: walker-run, one-step returns and batches of 512",
        PIXELS_RUN,
    ),
    "drqv2_walker_easy": Preset(
        DrQv2(n_step=1, batch_size=512, std_steps=100_000),
        "Yarats et al. (2022), DrQ-v2's code: walker-stand and walker-walk, 1.1 million frames",
        PIXELS_RUN | {"steps": 550_000},
    ),
    "drqv2_quadruped": Preset(
        DrQv2(capacity=100_000),
        "Yarats et al. (2022), DrQ-v2's code: quadruped-run, a replay of 100,000; quadruped-walk is drqv2_medium",
        PIXELS_RUN,
    ),
    "arr_drqv2": Preset(
        DrQv2(),
        "Ma et al. (2024), Adaptive RR 0.5 -> 2 on DrQ-v2, 2 million frames; walker and quadruped: their presets' fields",
        PIXELS_RUN | {"steps": 1_000_000, "interventions": ("adaptive_replay_ratio:layers=heads",)},
    ),
    "drm_dmc": Preset(
        DrM(),
        "Xu et al. (2024), DrM's code: medium tasks, 3.1 million frames; perturbed every 100,000 agent steps",
        PIXELS_RUN | {"interventions": ("dormancy_perturb:measure=state,k=2.0,high=1.0,period=50000",)},
    ),
}
