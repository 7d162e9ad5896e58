"""Suites: what is compared with what, on which tasks, with how many seeds and agent steps."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..agents import ACE, DQN, SAC, DrQv2
from ..interventions import METHODS
from ..training import PRESETS, Experiment
from ..training.presets import ACE_RESET, CLEANRL_C51, CLEANRL_DQN, DRQ_EPS, LAP_DDQN, REDO_CODE
from .changing import PARTS
from .published_ import Column

Budget = Literal["laptop", "paper"]
Arms = dict[str, Experiment[Any]]


@dataclass(frozen=True)
class Suite:
    """Every arm on every task with every seed; a run of it replaces env, steps, seed and out of the arm."""

    arms: Arms
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: dict[Budget, int]  # agent steps of every run
    baselines: dict[str, str]  # arm -> the arm that it is compared with, seed by seed
    paper: Arms = field(default_factory=dict)  # arms that differ at the paper's budget, in the period of a reset mostly
    laptop_tasks: tuple[str, ...] = ()  # what fits a laptop, and runs there unless others are asked for; all if empty
    laptop_seeds: tuple[int, ...] = ()  # likewise
    agent_fields: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # task -> what it changes of every agent
    evaluations: int = 0  # of a run, equally far apart; 0: the arm says
    published: Mapping[str, Column] = field(default_factory=dict)  # arm -> what stands beside it
    human: bool = False  # tables are of human-normalised scores
    width: int | None = None  # agent steps of a point of the curves that are kept of a run; None: a twentieth of it
    fresh: str | None = None  # where tasks change: the arm whose networks begin anew at every change

    def experiment(
        self, arm: str, task: str, seed: int, steps: int, out: str, budget: Budget = "laptop"
    ) -> Experiment[Any]:
        """One run. ValueError if it cannot be."""
        chosen = self.paper.get(arm, self.arms[arm]) if budget == "paper" else self.arms[arm]
        agent = dataclasses.replace(chosen.agent, **self.agent_fields.get(task, {}))
        every = max(1, steps // self.evaluations) if self.evaluations else chosen.eval_every
        return dataclasses.replace(chosen, agent=agent, env=task, steps=steps, seed=seed, out=out, eval_every=every)

    def tasks_of(self, budget: Budget) -> tuple[str, ...]:
        return (self.laptop_tasks if budget == "laptop" else ()) or self.tasks

    def seeds_of(self, budget: Budget) -> tuple[int, ...]:
        return (self.laptop_seeds if budget == "laptop" else ()) or self.seeds


MINATAR = tuple(f"minatar/{game}" for game in ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"))
THREE_MINATAR = tuple(f"minatar/{game}" for game in ("Asterix", "Breakout", "SpaceInvaders"))
REDO_GAMES = tuple(
    f"atari/{game}"
    for game in (
        *(
            "Asterix",
            "BeamRider",
            "Breakout",
            "DemonAttack",
            "DoubleDunk",
            "Enduro",
            "IceHockey",
            "Jamesbond",
            "MsPacman",
        ),
        *("Pong", "Qbert", "RoadRunner", "Seaquest", "SpaceInvaders", "WizardOfWor", "YarsRevenge", "Zaxxon"),
    )
)
ATARI_100K = tuple(
    f"atari/{game}"
    for game in (
        *("Alien", "Amidar", "Assault", "Asterix", "BankHeist", "BattleZone", "Boxing", "Breakout", "ChopperCommand"),
        *("CrazyClimber", "DemonAttack", "Freeway", "Frostbite", "Gopher", "Hero", "Jamesbond", "Kangaroo", "Krull"),
        *("KungFuMaster", "MsPacman", "Pong", "PrivateEye", "Qbert", "RoadRunner", "Seaquest", "UpNDown"),
    )
)
ARR_GAMES = tuple(
    f"atari/{game}"
    for game in (
        *("Alien", "Amidar", "Assault", "Asterix", "BankHeist", "Boxing", "Breakout", "ChopperCommand", "CrazyClimber"),
        *("DemonAttack", "Enduro", "Freeway", "KungFuMaster", "Pong", "RoadRunner", "Seaquest", "SpaceInvaders"),
    )
)
NIKISHIN_DMC = tuple(
    f"dmc/{task}"
    for task in (
        *("acrobot-swingup", "cheetah-run", "finger-turn_hard", "fish-swim", "hopper-hop", "humanoid-run"),
        *("humanoid-stand", "quadruped-run", "swimmer-swimmer15", "walker-run"),
    )
)
MUJOCO = ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid")
SEEDS = tuple(range(10))
THREE = (0, 1, 2)
FIVE = tuple(range(5))  # of which a paired comparison may have a verdict
ATARI_RUN: dict[str, Any] = {"checkpoint_every": 250_000, "keep_checkpoints": 1, "diagnose_every": 50_000}
CONTROL_RUN: dict[str, Any] = {"checkpoint_every": 50_000, "keep_checkpoints": 1, "diagnose_every": 10_000}
ATARI_100K_RUN: dict[str, Any] = {
    "protocol": "atari100k",
    "eval_every": 0,
    "eval_episodes": 100,
    "checkpoint_every": 25_000,
    "keep_checkpoints": 1,
    "diagnose_every": 5_000,
}


def against(arms: Arms, baseline: str) -> dict[str, str]:
    """Every other arm compared with one."""
    return dict.fromkeys((arm for arm in arms if arm != baseline), baseline)


def errr_minatar() -> Suite:
    """Fujita (2025), arXiv 2503.02269, on MinAtar: DQN and C51, replay with replacement, without it, and reshuffled.

    wr: with replacement; wor: without it inside a batch; rrc: random reshuffling. mu is batch_size * replay_ratio, the
    expected draws of a transition in a full ring. mu8: a batch of 32 every 4 agent steps, as in the paper. mu2: a batch
    of 8 and a small ring, where 13.5 % of the transitions are never drawn with replacement, and none when reshuffled. C51 has DQN's
    learning rate, and Atari's support from -10 to 10 though rewards are not clipped. The games are gymnax's: no sticky actions,
    where the original has 0.1, and episodes end after 1,000 agent steps (Freeway: 2,500).
    """
    preset: Any = PRESETS["dqn_minatar"].agent
    target_period = 250  # gradient steps: the preset's 1,000 agent steps at a quarter of its replay ratio
    common = dataclasses.replace(preset, replay_ratio=0.25, target_period=target_period)
    distributions = {"dqn": "none", "c51": "c51"}
    settings = {"mu8": {"batch_size": 32, "capacity": 100_000}, "mu2": {"batch_size": 8, "capacity": 10_000}}
    samplers = {"wr": "uniform", "wor": "without_replacement", "rrc": "reshuffled"}
    arms = {
        f"{agent}-{setting}-{label}": Experiment(
            agent=dataclasses.replace(common, distribution=distribution, **sizes),
            env=MINATAR[0],
            replay=sampler,
            eval_every=50_000,
            eval_episodes=30,
            checkpoint_every=50_000,
            keep_checkpoints=1,
        )
        for agent, distribution in distributions.items()
        for setting, sizes in settings.items()
        for label, sampler in samplers.items()
    }
    return Suite(
        arms=arms,
        tasks=MINATAR,
        seeds=SEEDS,
        steps={"laptop": 200_000, "paper": 5_000_000},  # paper: Young & Tian (2019) on MinAtar
        baselines={arm: arm.rpartition("-")[0] + "-wr" for arm in arms if not arm.endswith("-wr")},
        laptop_tasks=THREE_MINATAR,
        laptop_seeds=FIVE,
    )


def redo_minatar() -> Suite:
    """Sokar et al. (2023, arXiv 2302.12902), ReDo and what it was compared with, on MinAtar at replay ratios 1 and 4.

    All arms are the preset dqn_minatar. The target follows every 1,000 agent steps at either ratio, as in their code.
    ReDo recycles at tau 0.1 every 1,000 gradient steps; reset draws the output layer and the last hidden one anew every 50,000
    gradient steps (100,000, their best, at the paper's budget; theirs is of the penultimate layer alone); decay is their best weight
    decay, 1e-5 in the gradient before Adam. least and random recycle the same number of units, which their figure 15 compares: a
    tenth of each layer every 1,000 gradient steps, the least active ones or any, falling to none as a cosine does 90,000 agent
    steps (4.5 million) after the first gradient step. The games are gymnax's, as in errr-minatar.
    """
    preset: Any = PRESETS["dqn_minatar"].agent

    def at(reset_every: int, share_until: int) -> Arms:
        made: Arms = {}
        for ratio in (1, 4):
            agent = dataclasses.replace(preset, replay_ratio=float(ratio), target_period=1_000 * ratio)
            share = f"fraction=0.1,decay=true,period=1000,stop={share_until * ratio},probe=64,{REDO_CODE}"
            methods = {
                "dqn": (),
                "redo": (f"redo:tau=0.1,period=1000,probe=64,{REDO_CODE}",),
                "reset": (f"reset:period={reset_every},last=2",),
                "decay": ("weight_decay:lam=1e-5",),
                "layer_norm": ("layer_norm",),
                "least": (f"redo:{share}",),
                "random": (f"redo:select=random,{share}",),
            }
            for method, specs in methods.items():
                made[f"{method}-rr{ratio}"] = Experiment(
                    agent=agent, env=MINATAR[0], interventions=specs, eval_episodes=30, **CONTROL_RUN
                )
        return made

    arms, later = at(50_000, 90_000), at(100_000, 4_500_000)
    plain = {arm: "dqn-" + arm.rpartition("-")[2] for arm in arms if not arm.startswith("dqn-")}
    return Suite(
        arms=arms,
        tasks=MINATAR,
        seeds=SEEDS,
        steps={"laptop": 100_000, "paper": 5_000_000},  # paper: Young & Tian (2019) on MinAtar
        baselines=plain | {f"random-rr{ratio}": f"least-rr{ratio}" for ratio in (1, 4)},
        paper={arm: each for arm, each in later.items() if arm.startswith(("reset", "least", "random"))},
        laptop_tasks=THREE_MINATAR,
        laptop_seeds=FIVE,
        evaluations=10,
    )


def redo_atari() -> Suite:
    """Sokar et al. (2023, arXiv 2302.12902), figures 10 and 13: ReDo on DQN, 17 Atari games, replay ratios 0.25 to 2.

    Dopamine's protocol (sticky actions, whole games), 10 million frames. The target follows every 8,000 agent steps at every
    ratio. ReDo at tau 0.1, at ratio 0.25 0.025, every 1,000 gradient steps. At ratio 1 also a reset of the penultimate layer
    every 100,000 gradient steps (here with the output layer; at the laptop's budget every 30,000), and weight decay 1e-5. Theirs are
    returns of training episodes.
    """
    arms: Arms = {}
    columns = {}
    for ratio in (0.25, 0.5, 1.0, 2.0):
        agent = DQN(replay_ratio=ratio, target_period=round(8_000 * ratio))
        tau = 0.025 if ratio == 0.25 else 0.1
        methods: dict[str, tuple[str, ...]] = {"dqn": (), "redo": (f"redo:tau={tau},period=1000,probe=64,{REDO_CODE}",)}
        if ratio == 1:
            methods |= {"reset": ("reset:period=30000,last=2",), "decay": ("weight_decay:lam=1e-5",)}
        theirs = {"dqn": "DQN", "redo": "DQN + ReDo", "reset": "DQN + reset", "decay": "DQN + weight decay"}
        for method, specs in methods.items():
            arm, variant = f"{method}-rr{ratio:g}", f"RR {ratio:g}"
            arms[arm] = Experiment(
                agent=agent, env=REDO_GAMES[0], protocol="dopamine", interventions=specs, **ATARI_RUN
            )
            columns[arm] = Column("redo_paper", "atari", theirs[method], variant, "iqm_hns", 10_000_000)
    return Suite(
        arms=arms,
        tasks=REDO_GAMES,
        seeds=SEEDS,
        steps={"laptop": 100_000, "paper": 2_500_000},
        baselines={arm: "dqn-" + arm.rpartition("-")[2] for arm in arms if not arm.startswith("dqn-")},
        paper={"reset-rr1": dataclasses.replace(arms["reset-rr1"], interventions=("reset:period=100000,last=2",))},
        laptop_tasks=("atari/DemonAttack",),
        laptop_seeds=THREE,
        evaluations=10,
        published=columns,
        human=True,
    )


def redo_sac() -> Suite:
    """Sokar et al. (2023, arXiv 2302.12902), ReDo on TF-Agents' SAC, on MuJoCo v4.

    They have v2 and find no gain. That SAC: rewards times 0.1, Glorot kernels, target entropy half the dimension of the action.
    At the paper's budget tau 0 and resets of everything every 200,000 gradient steps; at the laptop's every 20,000 and 50,000, for
    nothing would happen in a run of 200,000 agent steps otherwise. decay: 1e-5. ace: the preset ace_small, with rewards as they are,
    a target entropy of -1 per dimension, another sampler and delayed updates: another agent, no ablation. Theirs is the mean of
    the last tenth of 100 evaluations, here the last of 10. The published column is SAC without reward scale.
    """
    base = SAC(initialiser="xavier", reward_scale=0.1, entropy_per_action=-0.5)
    run = CONTROL_RUN | {"env": "mujoco/Hopper-v4", "eval_episodes": 30}

    def methods(recycle: int, renew: int) -> Arms:
        return {
            "redo": Experiment(
                agent=base, interventions=(f"redo:tau=0,period={recycle},probe=256,{REDO_CODE}",), **run
            ),
            "reset": Experiment(agent=base, interventions=(f"reset:period={renew}",), **run),
        }

    arms = {
        "sac": Experiment(agent=base, **run),
        **methods(20_000, 50_000),
        "decay": Experiment(agent=base, interventions=("weight_decay:lam=1e-5",), **run),
        "ace": ace_small_arm(run),
    }
    return Suite(
        arms=arms,
        tasks=tuple(f"mujoco/{task}-v4" for task in ("HalfCheetah", "Hopper", "Walker2d", "Ant")),
        seeds=SEEDS,
        steps={"laptop": 200_000, "paper": 1_000_000},
        baselines=against(arms, "sac"),
        paper=methods(200_000, 200_000),
        laptop_tasks=("mujoco/HalfCheetah-v4", "mujoco/Hopper-v4"),
        laptop_seeds=THREE,
        evaluations=10,
        published={"sac": Column("simbav2_repo", "mujoco", "SAC", budget=1_000_000)},
    )


def ace_small_arm(run: dict[str, Any]) -> Experiment[Any]:
    preset: Any = PRESETS["ace_small"].agent
    return Experiment(agent=preset, replay="without_replacement", interventions=(ACE_RESET,), **run)


def resets_dmc() -> Suite:
    """Nikishin et al. (2022, arXiv 2205.07802), SAC on ten DeepMind Control tasks, replay ratios 1 and 32, with and without resets.

    Everything is drawn anew every 200,000 agent steps of 2 million, counted from the first gradient step; at the laptop's budget
    every 15,000 of 50,000. jaxrl's SAC: target entropy half the dimension of the action; its kernels are orthogonal, here as
    LeCun's. Resets hurt at ratio 1 and help at 32: both signs are published.
    """

    def at(every: int) -> Arms:
        made: Arms = {}
        for ratio in (1, 32):
            agent = SAC(entropy_per_action=-0.5, replay_ratio=float(ratio))
            for name, specs in (("sac", ()), ("reset", (f"reset:period={every * ratio}",))):
                made[f"{name}-rr{ratio}"] = Experiment(
                    agent=agent, env=NIKISHIN_DMC[0], interventions=specs, **CONTROL_RUN | {"checkpoint_every": 10_000}
                )
        return made

    source = ("nikishin_curves", "dmc", "SAC")
    return Suite(
        arms=at(15_000),
        tasks=NIKISHIN_DMC,
        seeds=SEEDS,
        steps={"laptop": 50_000, "paper": 2_000_000},
        baselines={"reset-rr1": "sac-rr1", "reset-rr32": "sac-rr32"},
        paper={arm: each for arm, each in at(200_000).items() if arm.startswith("reset")},
        laptop_tasks=("dmc/cheetah-run", "dmc/walker-run"),
        laptop_seeds=(0,),
        evaluations=10,
        published={
            f"{name}-rr{ratio}": Column(*source, f"RR {ratio}{variant}", budget=2_000_000)
            for ratio in (1, 32)
            for name, variant in (("sac", ", no resets"), ("reset", " + resets every 200k"))
        },
    )


def errr_atari() -> Suite:
    """Fujita (2025, arXiv 2503.02269), DQN and C51 with random reshuffling: CleanRL's settings and protocol, 10 million agent steps.

    wr: with replacement; wor: without it inside a batch; rrc: random reshuffling. The games are those of CleanRL's published
    tables, whose own runs stand beside wr; the paper's tables could not be had. C51's logarithm is not clipped here.
    """
    agents = {"dqn": CLEANRL_DQN, "c51": CLEANRL_C51}
    samplers = {"wr": "uniform", "wor": "without_replacement", "rrc": "reshuffled"}
    arms = {
        f"{name}-{label}": Experiment(
            agent=agent, env="atari/Breakout", protocol="cleanrl", replay=sampler, **ATARI_RUN
        )
        for name, agent in agents.items()
        for label, sampler in samplers.items()
    }
    return Suite(
        arms=arms,
        tasks=("atari/BeamRider", "atari/Breakout", "atari/Pong"),
        seeds=SEEDS,
        steps={"laptop": 200_000, "paper": 10_000_000},
        baselines={arm: arm.rpartition("-")[0] + "-wr" for arm in arms if not arm.endswith("-wr")},
        laptop_tasks=("atari/Pong",),
        laptop_seeds=THREE,
        evaluations=10,
        published={
            "dqn-wr": Column("cleanrl_docs", "atari", "DQN", "JAX, dqn_atari_jax.py", "train_return", 10_000_000),
            "c51-wr": Column("cleanrl_docs", "atari", "C51", "JAX, c51_atari_jax.py", "train_return", 10_000_000),
        },
        human=True,
    )


def errr_atari_lap() -> Suite:
    """Fujita (2025, arXiv 2503.02269), double DQN with LAP and masked reshuffling, 50 million agent steps.

    lap: prioritised with replacement; rrm: RR-M; st and rrm-st: one draw from each of equal parts of the sum of priorities.
    Dopamine's protocol, with sticky actions, which the paper's games have not. As under the preset lap_ddqn pixels are divided by 255,
    biases begin at zero, and a cut game's end is stored. A suite of its own, for errr-atari has another protocol and length.
    """
    samplers = {"lap": "prioritized:alpha=0.6,beta=0,minimum=0.01", "rrm": "masked:alpha=0.6,minimum=0.01"}
    samplers |= {name: f"{samplers[plain]},stratified=true" for name, plain in (("st", "lap"), ("rrm-st", "rrm"))}
    arms = {
        name: Experiment(agent=LAP_DDQN, env="atari/Breakout", protocol="dopamine", replay=sampler, **ATARI_RUN)
        for name, sampler in samplers.items()
    }
    return Suite(
        arms=arms,
        tasks=("atari/BeamRider", "atari/Breakout", "atari/Pong"),
        seeds=SEEDS,
        steps={"laptop": 100_000, "paper": 50_000_000},
        baselines={"rrm": "lap", "st": "lap", "rrm-st": "st"},
        laptop_tasks=("atari/Pong",),
        laptop_seeds=THREE,
        evaluations=10,
        human=True,
    )


def ace() -> Suite:
    """Ji et al. (2024, arXiv 2402.14528), ACE with the authors' one setting on tasks of five of its seven domains.

    ace: causal weights and resets; weights and reset: one of them; sac: neither, the same networks and delays. Their list of
    tasks is known in part, so these are ours, of MuJoCo, DMC, Meta-World, Adroit and Shadow hand; Panda-gym is an extra, ROBEL not
    to be had. Meta-World is EnvPool's: 500 steps to an episode and a goal that moves at every reset, theirs 200 and a fixed one.
    Per-task figures of theirs are not published. Their reset comes every 100,000 gradient steps, at the laptop's
    budget every 15,000.
    """
    run: dict[str, Any] = {"env": "mujoco/Hopper-v4", **CONTROL_RUN}
    arms = ace_arms(ACE(), run, f"{ACE_RESET},period=15000")
    return Suite(
        arms=arms,
        tasks=(
            *(f"mujoco/{task}-v4" for task in ("HalfCheetah", "Hopper", "Walker2d", "Ant")),
            *(f"dmc/{task}" for task in ("hopper-hop", "quadruped-run", "walker-run", "humanoid-walk", "dog-walk")),
            *(
                f"metaworld/{task}"
                for task in ("coffee-button", "hammer", "pick-place-wall", "door-open", "sweep-into")
            ),
            *(f"robotics/{task}-v1" for task in ("AdroitHandDoor", "AdroitHandHammer", "AdroitHandPen")),
            *("robotics/HandReachDense-v3", "robotics/HandManipulateBlockDense-v1"),
        ),
        seeds=SEEDS,
        steps={"laptop": 50_000, "paper": 1_000_000},
        baselines=against(arms, "sac"),
        paper=ace_arms(ACE(), run),
        laptop_tasks=("mujoco/Hopper-v4",),
        laptop_seeds=THREE,
        evaluations=10,
    )


def ace_mujoco_small() -> Suite:
    """Ji et al. (2024, arXiv 2402.14528), ACE with two layers of 256 units and batches of 256, on MuJoCo v4.

    Arms as in ace, and ReDo (tau 0.1 every 20,000 gradient steps) and resets of everything (every 50,000) on the same sac. ACE's own
    reset comes every 100,000 gradient steps. The published column is another SAC, which SimbaV2's authors gathered from other code:
    its warm-up and gradient steps per agent step are not stated.
    """
    run: dict[str, Any] = {"env": "mujoco/Hopper-v4", **CONTROL_RUN}
    arms = ace_arms(ACE(hidden=(256, 256), activation="elu+relu", batch_size=256), run)
    for name, spec in (("redo", "redo:tau=0.1,period=20000"), ("renew", "reset:period=50000")):
        arms[name] = dataclasses.replace(arms["sac"], interventions=(spec,))
    return Suite(
        arms=arms,
        tasks=tuple(f"mujoco/{task}-v4" for task in MUJOCO),
        seeds=SEEDS,
        steps={"laptop": 200_000, "paper": 1_000_000},
        baselines=against(arms, "sac"),
        laptop_tasks=("mujoco/HalfCheetah-v4", "mujoco/Hopper-v4"),
        laptop_seeds=THREE,
        evaluations=10,
        published={"sac": Column("simbav2_repo", "mujoco", "SAC", budget=1_000_000)},
    )


def ace_arms(agent: ACE, run: dict[str, Any], reset: str = ACE_RESET) -> Arms:
    plain = dataclasses.replace(agent, causal_every=0)
    common = {"replay": "without_replacement", **run}
    return {
        "sac": Experiment(agent=plain, **common),
        "ace": Experiment(agent=agent, interventions=(reset,), **common),
        "weights": Experiment(agent=agent, **common),
        "reset": Experiment(agent=plain, interventions=(reset,), **common),
    }


def arr_dmc() -> Suite:
    """Ma et al. (2024, arXiv 2310.07418), Adaptive RR on DrQ-v2: DeepMind Control from pixels, 2 million frames.

    rr0.5 and rr2 are fixed; arr goes from the first to the second; reset draws actor and critic anew every 100,000 agent steps and
    keeps the encoder, as Nikishin et al. (2022) do in a run of this length; redo recycles in both at tau 0.025 every 1,000 gradient
    steps (their settings on pixels are not stated). At the laptop's budget resets every 3,000 agent steps, and a check of Adaptive RR every 2,500 instead of 25,000.
    """
    actor_and_critic = "learner=actor+critic"
    run: dict[str, Any] = {"env": "dmc-pixels/walker-run", **CONTROL_RUN | {"checkpoint_every": 25_000}}

    def at(reset_every: int, check_every: int) -> Arms:
        made: Arms = {}
        for ratio in (0.5, 2.0):
            reset = f"reset:period={round(reset_every * ratio)},{actor_and_critic}"
            methods = {"drqv2": (), "reset": (reset,), "redo": (f"redo:tau=0.025,period=1000,{actor_and_critic}",)}
            for method, specs in methods.items():
                made[f"{method}-rr{ratio:g}"] = Experiment(agent=DrQv2(replay_ratio=ratio), interventions=specs, **run)
        adaptive = f"adaptive_replay_ratio:layers=heads,every={check_every}"
        return made | {"arr": Experiment(agent=DrQv2(), interventions=(adaptive,), **run)}

    arms = at(3_000, 2_500)
    variants = {
        f"{method}-rr{ratio}": f"RR {ratio}{added}"
        for ratio in ("0.5", "2")
        for method, added in (("drqv2", ""), ("reset", " + reset"), ("redo", " + ReDo"))
    } | {"arr": "Adaptive RR 0.5 to 2"}
    walker: Any = PRESETS["drqv2_walker"].agent
    quadruped: Any = PRESETS["drqv2_quadruped"].agent
    return Suite(
        arms=arms,
        tasks=tuple(f"dmc-pixels/{task}" for task in ("cheetah-run", "walker-run", "quadruped-run")),
        seeds=SEEDS,
        steps={"laptop": 10_000, "paper": 1_000_000},
        baselines={
            **{f"{name}-rr{ratio}": f"drqv2-rr{ratio}" for name in ("reset", "redo") for ratio in ("0.5", "2")},
            "arr": "drqv2-rr0.5",
        },
        paper=at(100_000, 25_000),
        agent_fields={
            "dmc-pixels/walker-run": {"n_step": walker.n_step, "batch_size": walker.batch_size},
            "dmc-pixels/quadruped-run": {"capacity": quadruped.capacity},
        },
        laptop_tasks=("dmc-pixels/cheetah-run",),
        laptop_seeds=(0,),
        evaluations=10,
        published={
            arm: Column("arr_paper", "dmc-pixels", "DrQ-v2", variant, budget=2_000_000)
            for arm, variant in variants.items()
        },
    )


def arr_atari100k() -> Suite:
    """Ma et al. (2024, arXiv 2310.07418), Adaptive RR on DrQ(eps): 17 games, 100,000 agent steps of Atari 100k.

    Fixed replay ratios 0.5, 1 and 2, ReDo at 1 (tau 0.025 every 1,000 gradient steps, 64 states) and Adaptive RR from 0.5 to 2: a
    check every 2,000 agent steps of all ReLU layers, which they do not name. Their column at ratio 1 is apparently quoted from runs
    of Agarwal et al. (2021).
    """
    redo = f"redo:tau=0.025,period=1000,probe=64,{REDO_CODE}"
    arms: Arms = {
        f"rr{ratio:g}": Experiment(
            agent=dataclasses.replace(DRQ_EPS, replay_ratio=ratio), env=ARR_GAMES[0], **ATARI_100K_RUN
        )
        for ratio in (0.5, 1.0, 2.0)
    }
    arms["redo-rr1"] = dataclasses.replace(arms["rr1"], interventions=(redo,))
    arms["arr"] = dataclasses.replace(arms["rr1"], interventions=("adaptive_replay_ratio:every=2000",))
    variants = {"rr1": "RR 1", "arr": "Adaptive RR 0.5 to 2"}  # the others have aggregates alone
    aggregates = {"rr0.5": "RR 0.5", "rr2": "RR 2", "redo-rr1": "RR 1 + ReDo"}
    return Suite(
        arms=arms,
        tasks=ARR_GAMES,
        seeds=SEEDS,
        steps={"laptop": 100_000, "paper": 100_000},
        baselines=against(arms, "rr1"),
        laptop_tasks=("atari/Boxing",),
        laptop_seeds=(0, 1),
        published={
            **{arm: Column("arr_paper", "atari100k", "DrQ(eps)", variant) for arm, variant in variants.items()},
            **{
                arm: Column("arr_paper", "atari100k", "DrQ(eps)", variant, "mean_hns")
                for arm, variant in aggregates.items()
            },
        },
        human=True,
    )


def atari100k() -> Suite:
    """Kaiser et al. (2020), Atari 100k, 26 games: DrQ(eps) of Agarwal et al. (2021), and what may keep it plastic.

    redo: Sokar et al. (2023), tau 0.1; reset: the output layers anew every 20,000 agent steps, Nikishin et al. (2022), their rule
    for SPR; arr: Ma et al. (2024). 100 evaluation episodes after training.
    """
    arms: Arms = {
        name: Experiment(
            agent=PRESETS[preset].agent,
            env=ATARI_100K[0],
            interventions=PRESETS[preset].experiment.get("interventions", ()),
            **ATARI_100K_RUN,
        )
        for name, preset in (("drq", "drq_eps"), ("redo", "redo_drq"), ("reset", "reset_drq"), ("arr", "arr_drq"))
    }
    return Suite(
        arms=arms,
        tasks=ATARI_100K,
        seeds=SEEDS,
        steps={"laptop": 100_000, "paper": 100_000},
        baselines=against(arms, "drq"),
        laptop_tasks=("atari/Boxing",),
        laptop_seeds=(0, 1),
        published={"drq": Column("rliable_100k", "atari100k", "DrQ(eps)")},
        human=True,
    )


def mujoco_v5() -> Suite:
    """Ours: SAC (Haarnoja et al., 2018b) and friends on MuJoCo v5, one million agent steps, of which no table is published.

    ace: the preset ace_mujoco, with networks of 1024; layer_norm: in the critics; redo: tau 0.1 every 1,000 gradient steps; reset: of
    everything every 200,000, at the laptop's budget every 50,000. The published column is SAC on v4.
    """
    run: dict[str, Any] = {"env": "mujoco/Hopper-v5", **CONTROL_RUN}
    sac = Experiment(agent=SAC(), **run)
    arms: Arms = {
        "sac": sac,
        "layer_norm": dataclasses.replace(sac, interventions=("layer_norm",)),
        "redo": dataclasses.replace(sac, interventions=("redo:tau=0.1,period=1000",)),
        "reset": dataclasses.replace(sac, interventions=("reset:period=50000",)),
        "ace": ace_arms(ACE(), run)["ace"],
        "ace_small": ace_small_arm(run),
    }
    return Suite(
        arms=arms,
        tasks=tuple(f"mujoco/{task}-v5" for task in MUJOCO),
        seeds=SEEDS,
        steps={"laptop": 200_000, "paper": 1_000_000},
        baselines=against(arms, "sac"),
        paper={"reset": dataclasses.replace(sac, interventions=("reset:period=200000",))},
        laptop_tasks=("mujoco/HalfCheetah-v5", "mujoco/Hopper-v5"),
        laptop_seeds=THREE,
        evaluations=10,
        published={"sac": Column("simbav2_repo", "mujoco", "SAC", budget=1_000_000)},
    )


# What acts too rarely, or too late, by default for 100,000 agent steps; every period in gradient steps. None of more than
# 1,000 divides the gradient steps of a run of either budget: the last evaluation would be of a network that has just been reset.
GRID: dict[str, str] = {
    "redo": "tau=0.1,period=1000",
    "reset": "period=20000,last=2",
    "shrink_and_perturb": "period=20000",
    "dormancy_perturb": "period=20000",
    "magnitude_pruning": "start=20000,end=80000",
    "plasticity_injection": "step=40000",
    "hare_and_tortoise": "period=8000",
    "elastic_reset": "period=8000",
}
GRID_PAPER: dict[str, str] = {  # of 1,000,000 agent steps, where it is another
    "reset": "period=200000,last=2",
    "dormancy_perturb": "period=100000",
    "magnitude_pruning": "start=200000,end=800000",
    "plasticity_injection": "step=400000",
}


def grid_suite(name: str, plain: Experiment[Any], tasks: tuple[str, ...], more: Mapping[str, str]) -> Suite:
    """Every intervention by itself on one agent, and ReGraMa beside ReDo. more: fields, as in GRID.

    least and random recycle the same number of units: a tenth of each layer, the least active ones or any, falling to none.
    """

    def at(fields: Mapping[str, str], renew: int, share_until: int) -> dict[str, str]:
        specs = {method: f"{method}:{fields[method]}" if method in fields else method for method in METHODS}
        share = f"fraction=0.1,decay=true,period=1000,stop={share_until}"
        return specs | {
            "regrama": f"redo:score=gradient,{fields['redo']}",
            "least": f"redo:{share}",
            "random": f"redo:select=random,{share}",
            "reset_all": f"reset:period={renew}",
        }

    def made(specs: Mapping[str, str]) -> Arms:
        return {arm: dataclasses.replace(plain, interventions=(spec,)) for arm, spec in specs.items()}

    laptop, paper = at(GRID | dict(more), 20_000, 80_000), at(GRID | GRID_PAPER | dict(more), 200_000, 800_000)
    arms = {name: plain, **made(laptop)}
    return Suite(
        arms=arms,
        tasks=tasks,
        seeds=SEEDS,
        steps={"laptop": 100_000, "paper": 1_000_000},
        baselines=against(arms, name) | {"random": "least"},
        paper=made({arm: spec for arm, spec in paper.items() if spec != laptop[arm]}),
        laptop_seeds=THREE,
        evaluations=10,
    )


def plasticity_grid_dqn() -> Suite:
    """Ours: every intervention by itself on DQN (Young & Tian, 2019), two games of MinAtar."""
    plain = Experiment(agent=PRESETS["dqn_minatar"].agent, env=MINATAR[0], eval_episodes=30, **CONTROL_RUN)
    return grid_suite("dqn", plain, ("minatar/Breakout", "minatar/SpaceInvaders"), {})


def plasticity_grid_sac() -> Suite:
    """Ours: every intervention by itself on SAC (Haarnoja et al., 2018b), two tasks of MuJoCo."""
    moving = {"adam_reset": "period=1000", "adam_rel": "period=1000"}  # its target has no copies that they could follow
    plain = Experiment(agent=SAC(), env="mujoco/Hopper-v5", **CONTROL_RUN)
    return grid_suite("sac", plain, ("mujoco/HalfCheetah-v5", "mujoco/Hopper-v5"), moving)


PERIOD = 25_000  # agent steps between changes
# What is measured are returns while training: an environment for evaluation has the first task alone.
CHANGING_RUN: dict[str, Any] = CONTROL_RUN | {
    "eval_every": 0,
    "eval_episodes": 0,
    "diagnose_every": 5_000,
    "log_every": PERIOD // PARTS // 5,  # no line is of two parts of a turn
}


def changing() -> Suite:
    """Ours: MinAtar games in turn, permuted channels and changing physics, DQN; after Abbas et al. (2023, arXiv 2303.07507).

    Every 25,000 agent steps the task changes: three games of MinAtar in turn, hidden or signalled in the observation; the channels of Breakout in
    another order; CartPole under other gravity and force. Exploration ends 500 steps after the first turn and the replay holds one turn. fresh: the
    network, its target and the optimiser drawn anew at every change (500 steps later, for learning begins that late) with the replay kept, so
    that the others' gap to it is what the past of a network costs or gives.
    """
    preset: Any = PRESETS["dqn_minatar"].agent
    agent = dataclasses.replace(preset, warmup=500, epsilon_decay_steps=PERIOD, capacity=PERIOD)
    names = ("minatar-cycle", "minatar-cycle-signalled", "Breakout-permuted", "CartPole-physics")
    return changing_suite("dqn", agent, names, laptop=("minatar-cycle", "Breakout-permuted"), seeds=FIVE)


def changing_sac() -> Suite:
    """Ours: MuJoCo under changing friction and gravity, SAC; after Dohare et al. (2024, arXiv 2306.13812), slippery Ant.

    As changing, of Hopper, HalfCheetah, Walker2d and Ant; the replay holds one turn here, too, and fresh begins anew 1,000 steps after a change.
    """
    names = tuple(f"{body}-physics" for body in ("Hopper", "HalfCheetah", "Walker2d", "Ant"))
    moving = {"adam_rel": "period=1000"}  # its target has no copies that it could follow
    return changing_suite("sac", SAC(capacity=PERIOD, warmup=1_000), names, laptop=names[:1], seeds=THREE, more=moving)


def changing_suite(
    name: str,
    agent: Any,
    names: tuple[str, ...],
    laptop: tuple[str, ...],
    seeds: tuple[int, ...],
    more: Mapping[str, str] | None = None,
) -> Suite:
    """One agent by itself, begun anew at every change, and with interventions that are not told of it.

    laptop, seeds: what fits a laptop. more: fields, as in GRID.
    """
    tasks, laptop_tasks = (tuple(f"changing/{each}@{PERIOD}" for each in some) for some in (names, laptop))
    fields = {"redo": GRID["redo"], "shrink_and_perturb": "period=5000"} | dict(more or {})
    methods = (
        *("redo", "continual_backprop", "self_normalized_resets", "shrink_and_perturb", "hare_and_tortoise"),
        *("adam_rel", "l2_init", "weight_decay", "layer_norm", "crelu"),
    )
    specs = {method: f"{method}:{fields[method]}" if method in fields else method for method in methods}
    specs |= {"fresh": f"reset:period={PERIOD}"}
    plain = Experiment(agent=agent, env=tasks[0], **CHANGING_RUN)
    arms = {name: plain, **{arm: dataclasses.replace(plain, interventions=(spec,)) for arm, spec in specs.items()}}
    return Suite(
        arms=arms,
        tasks=tasks,
        seeds=SEEDS,
        steps={"laptop": 8 * PERIOD, "paper": 40 * PERIOD},
        baselines=against(arms, name),
        laptop_tasks=laptop_tasks,
        laptop_seeds=seeds,
        width=PERIOD // PARTS,
        fresh="fresh",
    )


SUITES: dict[str, Callable[[], Suite]] = {  # each with its source in its first line
    "redo-atari": redo_atari,
    "redo-minatar": redo_minatar,
    "redo-sac": redo_sac,
    "resets-dmc": resets_dmc,
    "errr-atari": errr_atari,
    "errr-atari-lap": errr_atari_lap,
    "errr-minatar": errr_minatar,
    "ace": ace,
    "ace-mujoco-small": ace_mujoco_small,
    "arr-dmc": arr_dmc,
    "arr-atari100k": arr_atari100k,
    "atari100k": atari100k,
    "mujoco-v5": mujoco_v5,
    "plasticity-grid-dqn": plasticity_grid_dqn,
    "plasticity-grid-sac": plasticity_grid_sac,
    "changing": changing,
    "changing-sac": changing_sac,
}
