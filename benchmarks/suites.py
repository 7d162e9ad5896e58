"""Suites: what is compared with what, on which tasks, with how many seeds and agent steps."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..training import PRESETS, Experiment

Budget = Literal["laptop", "paper"]


@dataclass(frozen=True)
class Suite:
    """Every arm on every task with every seed; a run of it replaces env, steps, seed and out of the arm."""

    arms: dict[str, Experiment[Any]]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: dict[Budget, int]  # agent steps of every run
    baselines: dict[str, str]  # arm -> the arm that it is compared with, seed by seed

    def experiment(self, arm: str, task: str, seed: int, steps: int, out: str) -> Experiment[Any]:
        """One run. ValueError if it cannot be."""
        return dataclasses.replace(self.arms[arm], env=task, steps=steps, seed=seed, out=out)


MINATAR = tuple(f"minatar/{game}" for game in ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"))


def errr_minatar() -> Suite:
    """Fujita (2025), arXiv 2503.02269, on MinAtar: DQN and C51, replay with replacement, without it, and reshuffled.

    wr: with replacement; wor: without it inside a batch; rrc: random reshuffling. mu is batch_size * replay_ratio, the
    expected draws of a transition in a full ring. mu8: a batch of 32 every 4 agent steps, as in the paper. mu2: a batch
    of 8 and a small ring, where 13.5 % of the transitions are never drawn with replacement, and none when reshuffled.
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
        seeds=tuple(range(10)),
        steps={"laptop": 200_000, "paper": 5_000_000},  # paper: Young & Tian (2019) on MinAtar
        baselines={arm: arm.rpartition("-")[0] + "-wr" for arm in arms if not arm.endswith("-wr")},
    )


SUITES: dict[str, Callable[[], Suite]] = {"errr-minatar": errr_minatar}  # each with its source in its first line
