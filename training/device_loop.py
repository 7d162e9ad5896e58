"""The loop of `host_loop`, traced whole: for environments that are functions of JAX, and for several seeds at once.

Agent, sampler, interventions and random streams are those of the host loop, in its order, so that a seed gives the same
numbers up to the rounding of what the compiler fuses differently. The host looks in between chunks of agent steps, which
end where a line, a checkpoint or anything else is due.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from ..agents.learner import Agent, PyTree
from ..envs import Env, JaxEnv
from ..replay import Rings, RingState, Sampler
from ..replay.ring import add, gather
from .compiled import bind_interventions, functions, streams
from .experiment import Experiment
from .host_loop import Training
from .metrics import Totals
from .sharing import everywhere, placed

CHUNK = 1_000  # agent steps between two looks of the host, at most


class Carry(struct.PyTreeNode):
    """All of a run that changes; of several seeds along a leading axis."""

    env: PyTree
    observation: jax.Array  # [N, ...]
    ring: RingState
    agent: PyTree
    sampler: PyTree
    totals: Totals
    memories: list[PyTree]
    effects: list[Totals]


class Counts(struct.PyTreeNode):
    """Of agent and gradient steps, the same for all seeds: what depends on them alone stays a branch under vmap."""

    agent_step: jax.Array  # () int32
    gradient_step: jax.Array  # () int32


def why_not(experiment: Experiment, env: Env) -> str | None:
    """Why this experiment cannot run on the device whole; None if it can."""
    spec, agent = env.spec, experiment.agent
    if not isinstance(env, JaxEnv):
        return f"{experiment.env} lives on the host"
    if experiment.build_agent(spec).refit:
        return "what the agent has fitted meanwhile is fitted on the host"
    if experiment.replay_from or experiment.count_draws:
        return "past data and counts of draws are kept on the host"
    if agent.warmup < spec.num_envs * (agent.n_step - 1):
        return f"the warm-up of {agent.warmup} agent steps may be over before a transition is complete"
    return None


def schedule(t: Training, experiment: Experiment, count: int) -> tuple[list[int], Any]:
    """Gradient steps taken in each of the next `count` steps of the environments, and what is owed after them."""
    num_envs, owed, step, updates = t.env.spec.num_envs, t.owed, t.agent_step, []
    for _ in range(count):
        if not experiment.sync:
            updates.append(int(owed))
            owed -= updates[-1]
        step += num_envs
        if step > experiment.agent.warmup:
            owed += t.ratio * num_envs
        if experiment.sync:
            updates.append(int(owed))
            owed -= updates[-1]
    return updates, owed


class DeviceLoop:
    """Runs of one experiment that differ in their seeds alone, all at the same agent step.

    agent, sampler: of any of the runs. Their replay is in `rings`, in the order of `trainings`.
    sharding: of the seeds over devices (`share_seeds`); mesh: of the devices that share every batch (`share_batch`). Without
        either, all is on the first device.
    """

    def __init__(
        self,
        experiment: Experiment,
        seeds: Sequence[int],
        trainings: Sequence[Training],
        rings: Rings,
        agent: Agent,
        sampler: Sampler,
        sharding: NamedSharding | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.sharding, self.mesh = sharding, mesh
        self.experiment, self.trainings, self.rings = experiment, trainings, rings
        self.env, self.agent, self.sampler = env_of(trainings[0]), agent, sampler
        self.place = sharding or everywhere(mesh) or SingleDeviceSharding(jax.local_devices()[0])
        self.keys = placed(self.place, stack([streams(seed) for seed in seeds]))
        self.length = max(1, CHUNK // self.env.spec.num_envs)
        self.advance = jax.jit(self._over_seeds(self._advance), donate_argnums=1)
        self.settle_owed = jax.jit(self._over_seeds(self._settle), donate_argnums=1)
        self.split = jax.jit(partial(split, len(seeds)))
        self.carry = self._assemble()

    def run(self, next_due: Callable[[], int], boundary: Callable[[], bool]) -> None:
        """Train until `experiment.steps`, or until `boundary` answers True.

        It is called where the host loop would find something to do at the latest: at agent step `next_due()`.
        """
        first, num_envs = self.trainings[0], self.env.spec.num_envs
        while first.agent_step < self.experiment.steps:
            left = min(next_due(), self.experiment.steps) - first.agent_step
            count = min(self.length, -(-left // num_envs))
            updates, owed = schedule(first, self.experiment, count)
            padded = np.zeros(self.length, np.int32)
            padded[:count] = updates
            carry, rewards, over = self.advance(self.keys, self.carry, self._counts(), np.int32(count), padded)
            self._hand_out(carry)
            rewards, over = np.asarray(rewards)[:, :count], np.asarray(over)[:, :count]
            for t, its_rewards, its_over in zip(self.trainings, rewards, over, strict=True):
                t.agent_step += count * num_envs
                t.gradient_step += sum(updates)
                t.owed = owed
                t.episodes.add_all(its_rewards, its_over)
            if boundary():
                return
            self._take_in()

    def settle(self) -> None:
        """Take the gradient steps that the last agent step owes."""
        owed = int(self.trainings[0].owed)
        if owed:
            self._take_in()
            self._hand_out(self.settle_owed(self.keys, self.carry, self._counts(), np.int32(owed)))
        for t in self.trainings:
            t.gradient_step += owed
            t.owed -= owed

    def _counts(self) -> Counts:
        first = self.trainings[0]
        steps: Any = np.array([first.agent_step, first.gradient_step], np.int32)
        return Counts(*steps)

    def _assemble(self) -> Carry:
        parts = [(env_of(t).carry, t.observation, t.agent, t.sampler) for t in self.trainings]
        env, observation, agent, sampler = stack(parts if self.mesh else jax.device_put(parts, jax.local_devices()[0]))
        carry = Carry(env, observation, self.rings.state, agent, sampler, *self._reports())
        return placed(self.place, carry)

    def _reports(self) -> tuple[Totals, list[PyTree], list[Totals]]:
        parts = [(t.totals, t.memories, t.effects) for t in self.trainings]
        reports: tuple[Totals, list[PyTree], list[Totals]] = stack(parts)
        return placed(self.place, reports)

    def _hand_out(self, carry: Carry) -> None:
        """What the runs look at between chunks; their replay they find in the rings."""
        self.carry, self.rings.state = carry, carry.ring
        parts = self.split(carry.replace(ring=None))
        for t, part in zip(self.trainings, parts, strict=True):
            t.agent, t.sampler, t.observation = part.agent, part.sampler, part.observation
            t.totals, t.memories, t.effects = part.totals, part.memories, part.effects
            env_of(t).go_on(part.env, part.observation)

    def _take_in(self) -> None:
        """What the runs changed in the meantime: they begin new sums, and set a replay ratio."""
        totals, memories, effects = self._reports()
        self.carry = self.carry.replace(ring=self.rings.state, totals=totals, memories=memories, effects=effects)

    def _over_seeds(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(keys, carry, ...)` of one seed over a leading axis of keys, carry and all results."""

        @wraps(function)  # a trace has its name
        def call(keys: PyTree, carry: Carry, *same: Any) -> Any:
            if len(jax.tree.leaves(keys)[0]) == 1:
                only = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[1:]), (keys, carry))
                return jax.tree.map(lambda leaf: leaf.reshape(1, *leaf.shape), function(*only, *same))
            axes = self._at_shared(jax.tree.map(lambda _: 0, carry), lambda _: None)
            carry = self._at_shared(carry, lambda leaf: leaf[0])
            return jax.vmap(function, in_axes=(0, axes, *(None for _ in same)))(keys, carry, *same)

        if self.sharding:
            seeds, same = self.sharding.spec, PartitionSpec()
            count = len(inspect.signature(function).parameters) - 2
            specs = (seeds, seeds, *(same for _ in range(count)))
            return jax.shard_map(call, mesh=self.sharding.mesh, in_specs=specs, out_specs=seeds, check_vma=False)
        return call

    def _at_shared(self, carry: Carry, change: Callable[[Any], Any]) -> Carry:
        """With a change of the leaves that are the same for all seeds.

        Inside vmap they have no axis of seeds, so that a condition that depends on them stays one, where it would become
        a choice between two results that are both computed, and a write at such a place stays one write.
        """
        if self.experiment.on_nan == "stop":  # else a seed may leave a gradient step out
            gradient_step = change(carry.agent.gradient_step)
            carry = carry.replace(agent=carry.agent.replace(gradient_step=gradient_step))
        if self.rings.layout.n_step == 1:  # else a transition waits for others, or for the end of its episode
            carry = carry.replace(ring=carry.ring.replace(written=change(carry.ring.written)))
        return carry

    # Of one seed, traced

    def _advance(
        self, keys: dict[str, jax.Array], carry: Carry, counts: Counts, count: jax.Array, updates: jax.Array
    ) -> tuple[Carry, jax.Array, jax.Array]:
        """`count` steps of the environments; rewards and ends of episodes, [length, N]."""
        experiment, env, layout = self.experiment, self.env, self.rings.layout
        spec, warmup = env.spec, experiment.agent.warmup
        pure = functions(experiment, spec, self.agent, self.sampler, keys, self.mesh)
        learn = self._learner(keys)

        def body(index: jax.Array, state: tuple[Carry, Counts, jax.Array, jax.Array]) -> Any:
            carry, counts, rewards, over = state
            action = jax.lax.cond(
                counts.agent_step < warmup,
                lambda agent, observation, agent_step: pure.explore(agent_step),
                pure.act,
                *(carry.agent, carry.observation, counts.agent_step),
            )
            if not experiment.sync:
                carry, counts = learn(carry, counts, updates[index])
            env_carry, outcome = env.transition(carry.env, action)
            step: Any = outcome  # of JAX arrays
            reward = (
                step.reward if spec.reward_clip is None else jnp.clip(step.reward, -spec.reward_clip, spec.reward_clip)
            )
            ring, slots = add(
                layout,
                carry.ring,
                action,
                reward,
                step.terminated,
                step.truncated,
                step.final_observation,
                step.observation,
            )
            carry = carry.replace(
                env=env_carry, observation=step.observation, ring=ring, sampler=self.sampler.add(carry.sampler, slots)
            )
            counts = counts.replace(agent_step=counts.agent_step + spec.num_envs)
            if experiment.sync:
                carry, counts = learn(carry, counts, updates[index])
            return carry, counts, rewards.at[index].set(step.reward), over.at[index].set(step.episode_over)

        seen = (self.length, spec.num_envs)
        start = carry, counts, jnp.zeros(seen), jnp.zeros(seen, bool)
        carry, _, rewards, over = jax.lax.fori_loop(0, count, body, start)
        return carry, rewards, over

    def _settle(self, keys: dict[str, jax.Array], carry: Carry, counts: Counts, owed: jax.Array) -> Carry:
        return self._learner(keys)(carry, counts, owed)[0]

    def _learner(self, keys: dict[str, jax.Array]) -> Callable[[Carry, Counts, jax.Array], tuple[Carry, Counts]]:
        """As `learn_owed` of the host loop, for a given number of gradient steps."""
        pure = functions(self.experiment, self.env.spec, self.agent, self.sampler, keys, self.mesh)
        acting = bind_interventions(self.experiment, self.env.spec, self.agent, keys)

        def learn(ring: RingState, carry: Carry, counts: Counts) -> tuple[Carry, Counts]:
            sampler, slots, weight = pure.sample(carry.sampler)
            columns = gather(ring, slots)
            steps = counts.gradient_step, counts.agent_step
            agent, totals, priorities = pure.learn(carry.agent, carry.totals, columns, weight, *steps)
            sampler = self.sampler.update(sampler, slots, priorities)
            counts = counts.replace(gradient_step=counts.gradient_step + 1)
            memories, effects = list(carry.memories), list(carry.effects)
            for index, each in enumerate(acting):
                period, probe = each.intervention.period, each.intervention.probe

                def act(agent: PyTree, memory: PyTree, effect: Totals, each: Any = each, probe: Any = probe) -> Any:
                    seen = columns, weight
                    if probe is not None:
                        oldest = jnp.maximum(ring.written - self.rings.capacity, 0)
                        drawn = pure.probe(probe, oldest, ring.written, counts.gradient_step)
                        seen = gather(ring, drawn), jnp.ones(probe)
                    return pure.intervene(each, agent, memory, effect, *seen, counts.gradient_step, counts.agent_step)

                if period:
                    agent, memories[index], effects[index] = jax.lax.cond(
                        counts.gradient_step % period == 0,
                        act,
                        lambda *unchanged: unchanged,
                        *(agent, memories[index], effects[index]),
                    )
            carry = carry.replace(agent=agent, sampler=sampler, totals=totals, memories=memories, effects=effects)
            return carry, counts

        def owed(carry: Carry, counts: Counts, number: jax.Array) -> tuple[Carry, Counts]:
            def step(_: jax.Array, state: tuple[RingState, Carry, Counts]) -> tuple[RingState, Carry, Counts]:
                ring, carry, counts = state
                carry, counts = learn(ring, carry, counts)
                # The ring that is written next depends on what was read, or XLA, seeing no order between the two,
                # would copy all of it.
                ring, carry = jax.lax.optimization_barrier((ring, carry))
                return ring, carry, counts

            start = carry.ring, carry.replace(ring=None), counts
            ring, carry, counts = jax.lax.fori_loop(0, number, step, start)
            return carry.replace(ring=ring), counts

        return owed


def env_of(t: Training) -> JaxEnv:
    assert isinstance(t.env, JaxEnv)
    return t.env


def stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def split(seeds: int, tree: PyTree) -> list[PyTree]:
    return [jax.tree.map(lambda leaf, seed=seed: leaf[seed], tree) for seed in range(seeds)]


def next_multiple(step: int, every: int, num_envs: int) -> int:
    """The first agent step after `step` at which what is due every so often is due."""
    return step + -(-(every - step % every) // num_envs) * num_envs
