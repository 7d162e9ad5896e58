"""The loop of `host_loop` for several seeds at once: one action, one draw and one gradient step for all of them.

What a seed has on the device lies along a leading axis of seeds, and `host_loop` itself runs on it, over the seeds' own
environments, replays and episode statistics held side by side. A seed gives the same numbers as alone, up to the rounding
of what the compiler batches. Between lines, checkpoints and whatever else is due, the runs are not looked at.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ..agents.learner import Agent, PyTree
from ..envs import Env, Step, step_together
from ..replay import Sampler, Storage, gather_mixed
from .compiled import compile_functions_of_seeds
from .device_loop import split, stack
from .experiment import Experiment
from .host_loop import Training, host_loop, learn_owed

DEVICE_PARTS = ("agent", "sampler", "totals", "memories", "effects")  # of Training, along an axis of seeds


def why_apart(experiment: Experiment, agent: Agent) -> str | None:
    """Why the seeds of this experiment cannot share a loop on the host; None if they can."""
    if agent.refit:
        return "what the agent has fitted meanwhile is fitted for one seed at a time"
    if experiment.agent.warmup < experiment.num_envs * (experiment.agent.n_step - 1):
        return f"the warm-up of {experiment.agent.warmup} agent steps may be over before a transition is complete"
    return None


class Envs:
    """The environments of all seeds as one, [seeds, N, ...]."""

    def __init__(self, envs: Sequence[Env]) -> None:
        self.envs, self.spec = envs, envs[0].spec

    def step(self, actions: NDArray[Any]) -> Step:
        return Step(*map(np.stack, zip(*step_together(self.envs, actions), strict=True)))


class Storages:
    """The replays of all seeds as one; slots are [seeds, ...], and so are the counts."""

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.sources = [(t.storage, *t.past) for t in trainings]
        self.each = [t.storage for t in trainings if isinstance(t.storage, Storage)]

    def __len__(self) -> int:
        return min(map(len, self.each))

    @property
    def first(self) -> list[int]:
        return [storage.first for storage in self.each]

    @property
    def written(self) -> list[int]:
        return [storage.written for storage in self.each]

    def add(self, *transition: NDArray[Any]) -> NDArray[np.int32]:
        slots = [storage.add(*own) for storage, own in zip(self.each, zip(*transition, strict=True), strict=True)]
        return np.stack(slots)

    def look(self, slots: NDArray[Any]) -> dict[str, Any]:
        return _side_by_side([storage.look(own) for storage, own in zip(self.each, slots, strict=True)])

    def gather(self, slots: NDArray[Any]) -> dict[str, Any]:
        return _side_by_side([gather_mixed(own, its) for own, its in zip(self.sources, slots, strict=True)])


class EpisodesOfSeeds:
    """The episode statistics of all seeds as one."""

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.trainings = trainings

    def add(self, reward: NDArray[np.float32], over: NDArray[np.bool_]) -> None:
        for t, *own in zip(self.trainings, reward, over, strict=True):
            t.episodes.add(*own)


class BatchedLoop:
    """Runs of one experiment that differ in their seeds alone, all at the same agent step.

    agent, sampler: of any of the runs.
    watch: called after every agent step; True to look at the runs now, though nothing is due.
    """

    def __init__(
        self,
        experiment: Experiment,
        seeds: Sequence[int],
        trainings: Sequence[Training],
        agent: Agent,
        sampler: Sampler,
        watch: Callable[[], bool],
    ) -> None:
        self.experiment, self.trainings, self.watch = experiment, trainings, watch
        spec = trainings[0].env.spec
        self.compiled = compile_functions_of_seeds(experiment, spec, agent, sampler, seeds)
        self.split = jax.jit(partial(split, len(seeds)))
        side_by_side: Any = Envs([t.env for t in trainings]), Storages(trainings), EpisodesOfSeeds(trainings)
        env, storage, episodes = side_by_side
        parts = {name: stack([getattr(t, name) for t in trainings]) for name in DEVICE_PARTS}
        self.together = dataclasses.replace(
            trainings[0],
            env=env,
            storage=storage,
            episodes=episodes,
            observation=self._observations(),
            past=(),
            **parts,
        )
        self.given = [t.sampler for t in trainings]  # what the runs were handed last

    def run(self, next_due: Callable[[], int], boundary: Callable[[], bool]) -> None:
        """Train until `experiment.steps`, or until `boundary` answers True.

        It is called where `host_loop` alone would find something to do: at agent step `next_due()`, and at the end.
        """
        t = self.together
        due = min(next_due(), self.experiment.steps)

        def look() -> bool:
            nonlocal due
            for each in self.trainings:
                each.agent_step, each.gradient_step, each.owed = t.agent_step, t.gradient_step, t.owed
            if not self.watch() and t.agent_step < due:
                return False
            self.given = self._hand_out()
            stop = boundary()
            self._take_in(self.given)
            due = min(next_due(), self.experiment.steps)
            return stop

        host_loop(self.experiment, t, self.compiled, look)

    def settle(self) -> None:
        """Take the gradient steps that the last agent step owes."""
        self._take_in(self.given)  # the last checkpoint may have ended episodes
        learn_owed(self.together, self.compiled)
        for each in self.trainings:
            each.gradient_step, each.owed = self.together.gradient_step, self.together.owed
        self._hand_out()

    def _observations(self) -> NDArray[Any]:
        return np.stack([t.observation for t in self.trainings])

    def _hand_out(self) -> list[PyTree]:
        """What the runs look at; the result is the samplers they were given."""
        t = self.together
        for name in DEVICE_PARTS:  # apart, for the sampler may be on another device
            for each, own in zip(self.trainings, self.split(getattr(t, name)), strict=True):
                setattr(each, name, own)
        for each, observation in zip(self.trainings, t.observation, strict=True):
            each.observation = observation
        return [each.sampler for each in self.trainings]

    def _take_in(self, given: list[PyTree]) -> None:
        """What the runs changed in the meantime: they begin new sums, and at a checkpoint new episodes."""
        t = self.together
        t.observation = self._observations()
        names = ["totals", "effects"]
        if any(each.sampler is not before for each, before in zip(self.trainings, given, strict=True)):
            names.append("sampler")  # as large as the replay, some of them
        for name in names:
            setattr(t, name, stack([getattr(each, name) for each in self.trainings]))


def _side_by_side(columns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def stacked(values: list[Any]) -> Any:
        return jnp.stack(values) if isinstance(values[0], jax.Array) else np.stack(values)

    return {name: stacked([own[name] for own in columns]) for name in columns[0]}
