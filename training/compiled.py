"""The functions of a run that reach the device, each traced once, and the random streams that they draw from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..agents.learner import Agent, Batch, PyTree
from ..diagnostics import DIAGNOSTICS
from ..envs import EnvSpec
from ..replay import COMPILER_OPTIONS, Sampler, decode, no_priorities
from ..replay.ring import draw_slots
from .experiment import Experiment
from .intervening import LOGGED, PROBE, Acting, diagnose
from .metrics import Totals
from .sharing import host_device, one_at_a_time, shared, whole

STREAMS = ("environment", "action", "sampler", "agent", "intervention", "diagnostics", "evaluation", "probe")


# Matrix products of an image's features take half as long again without YNNPACK (docs/performance.md).
FAST_PRODUCTS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


def compiler_options(spec: EnvSpec) -> dict[str, str]:
    """For `jax.jit` of what learns from these observations: none but for images on a CPU."""
    images = len(spec.observation_shape) == 3
    return FAST_PRODUCTS if images and jax.default_backend() == "cpu" and _understood() else {}


@cache
def _understood() -> bool:
    """Whether this JAX knows FAST_PRODUCTS, which XLA calls experimental."""
    try:
        jax.jit(lambda: 0, compiler_options=FAST_PRODUCTS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def streams(seed: int) -> dict[str, jax.Array]:
    """The named random streams of a run; a draw is a function of its stream and a counter, so none holds a state."""
    root = jax.random.key(seed)
    return {name: jax.random.fold_in(root, index) for index, name in enumerate(STREAMS)}


def seed_from(stream: jax.Array, counter: int) -> int:
    """A seed in [0, 2^31) for things that want a number."""
    return int(jax.random.bits(jax.random.fold_in(stream, counter)) >> 1)


@dataclass(frozen=True)
class Compiled:
    """The functions of a run that reach the device, each traced once."""

    act: Callable[..., jax.Array]
    explore: Callable[..., jax.Array]
    remember: Callable[..., PyTree]
    sample: Callable[..., tuple[PyTree, jax.Array, jax.Array]]  # on the device where the sampler's state is
    learn: Callable[..., tuple[PyTree, Totals, jax.Array]]
    prioritize: Callable[..., PyTree]
    diagnose: partial[tuple[dict[str, jax.Array], PyTree]]  # what a run logs; its stream is bound
    diagnose_all: Callable[..., tuple[dict[str, jax.Array], PyTree]]
    interventions: tuple["Act", ...]
    seed: int

    def generator(self, stream: str, counter: int) -> np.random.Generator:
        """Of NumPy, for draws on the host: a function of the stream and a counter, as everywhere."""
        return np.random.default_rng((self.seed, STREAMS.index(stream), counter))


@dataclass(frozen=True)
class Act:
    """An intervention of a run: when it is due, how many transitions it wants to see, and what it does then."""

    due: Callable[[int], bool]  # of the gradient steps taken
    draw: (
        Callable[..., jax.Array] | None
    )  # slots to see, of (first, written, gradient_step); None: those just learnt from
    run: Callable[..., tuple[PyTree, PyTree, Totals]]


@dataclass(frozen=True)
class Functions:
    """What a loop does, as pure functions of one seed; keys are folded from its streams and a counter inside."""

    act: Callable[..., jax.Array]
    explore: Callable[..., jax.Array]
    sample: Callable[[PyTree], tuple[PyTree, jax.Array, jax.Array]]
    learn: Callable[..., tuple[PyTree, Totals, jax.Array]]
    probe: Callable[..., jax.Array]
    intervene: Callable[..., tuple[PyTree, PyTree, Totals]]


def reading_only(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function(state, ...)` jitted over the arrays of `state` that it reads.

    A policy reads a third of a state; handing over the rest costs more than to compute an action.
    """
    jitted: dict[Any, tuple[list[int], Callable[..., jax.Array]]] = {}

    def prepare(leaves: list[Any], structure: Any, *arguments: Any) -> tuple[list[int], Callable[..., jax.Array]]:
        def whole(leaves: list[Any], *arguments: Any) -> jax.Array:
            return function(jax.tree.unflatten(structure, leaves), *arguments)

        jaxpr = jax.make_jaxpr(whole)(leaves, *arguments).jaxpr
        read = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
        kept = [index for index in range(len(leaves)) if id(jaxpr.invars[index]) in read]

        def part(kept_leaves: list[Any], *arguments: Any) -> jax.Array:
            padded: list[Any] = [None] * len(leaves)
            for index, leaf in zip(kept, kept_leaves, strict=True):
                padded[index] = leaf
            return whole(padded, *arguments)

        return kept, jax.jit(part)

    def call(state: PyTree, *arguments: Any) -> jax.Array:
        leaves, structure = jax.tree.flatten(state)
        if structure not in jitted:
            jitted[structure] = prepare(leaves, structure, *arguments)
        kept, run = jitted[structure]
        return run([leaves[index] for index in kept], *arguments)

    return call


def turn_of(experiment: Experiment, spec: EnvSpec) -> int | None:
    """Agent steps after which the task of changing/* changes; None elsewhere."""
    return spec.protocol["period"] * spec.num_envs if experiment.env.startswith("changing/") else None


def bind_interventions(
    experiment: Experiment,
    spec: EnvSpec,
    agent: Agent,
    keys: dict[str, jax.Array],
    fold: Callable[[jax.Array, int], jax.Array] = jax.random.fold_in,
) -> tuple[Acting, ...]:
    """Each with a stream of its own, made by `fold`: of several seeds, one for each."""
    turn = turn_of(experiment, spec)
    return tuple(
        Acting(intervention, agent, fold(keys["intervention"], index), turn)
        for index, intervention in enumerate(experiment.acting)
    )


def functions(
    experiment: Experiment,
    spec: EnvSpec,
    agent: Agent,
    sampler: Sampler,
    keys: dict[str, jax.Array],
    mesh: Mesh | None = None,
) -> Functions:
    """The same in every loop, so that one experiment has one result; `mesh`: of the devices that share a batch, if several."""

    def act(state: PyTree, observation: jax.Array, agent_step: jax.Array) -> jax.Array:
        return agent.act(state, observation, jax.random.fold_in(keys["action"], agent_step), agent_step)

    def explore(agent_step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(keys["action"], agent_step)
        if spec.discrete:
            return jax.random.randint(key, (spec.num_envs,), 0, spec.action_size)
        return jax.random.uniform(key, (spec.num_envs, spec.action_size), minval=-1.0, maxval=1.0)

    def sample(state: PyTree) -> tuple[PyTree, jax.Array, jax.Array]:
        return sampler.sample(state, experiment.agent.batch_size)

    def learn(
        state: PyTree,
        totals: Totals,
        columns: dict[str, jax.Array],
        weight: jax.Array,
        gradient_step: jax.Array,
        agent_step: jax.Array,
    ) -> tuple[PyTree, Totals, jax.Array]:
        if hasattr(state, "agent_step"):
            state = state.replace(agent_step=agent_step)
        batch = shared(mesh, Batch(**decode(columns, spec.frame_stack), weight=weight))
        key = jax.random.fold_in(keys["agent"], gradient_step)
        new_state, metrics, priorities = agent.update(state, batch, key)
        values = jnp.stack([metrics[name] for name in totals.names])
        finite = jnp.isfinite(values).all()
        if experiment.on_nan == "skip":
            new_state = jax.tree.map(partial(jnp.where, finite), new_state, state)
            values, priorities = jnp.where(finite, values, 0.0), jnp.where(finite, priorities, 0.0)
        return whole(mesh, (new_state, totals.add(values, finite, gradient_step), priorities))

    def probe(size: int, first: jax.Array, written: jax.Array, gradient_step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(keys["probe"], gradient_step)
        return draw_slots(key, first, written, size, experiment.agent.capacity)

    def intervene(
        acting: Acting,
        state: PyTree,
        memory: PyTree,
        effects: Totals,
        columns: dict[str, jax.Array],
        weight: jax.Array,
        gradient_step: jax.Array,
        agent_step: jax.Array,
    ) -> tuple[PyTree, PyTree, Totals]:
        batch = shared(mesh, Batch(**decode(columns, spec.frame_stack), weight=weight))
        state, memory, done = acting.update(state, memory, batch, gradient_step, agent_step)
        values = jnp.stack([done[name] for name in effects.names]) if effects.names else effects.sums
        effects = effects.add(values, jnp.isfinite(values).all(), gradient_step)
        return whole(mesh, (state, memory, effects))

    return Functions(act, explore, sample, learn, probe, intervene)


def functions_of_seeds(
    experiment: Experiment, spec: EnvSpec, agent: Agent, sampler: Sampler, keys: dict[str, jax.Array]
) -> Functions:
    """`functions` over a leading axis of seeds in all but the counts of agent and gradient steps.

    Where an agent counts gradient steps itself, the count is the same for all seeds and has no such axis inside, so that
    a condition that depends on it stays one, where it would become a choice between two results that are both computed.
    """

    def over_seeds(call: Callable[..., Any], same: int) -> Callable[..., Any]:
        """`call(functions, ...)` of every seed, with the last `same` arguments the same for all."""

        def mapped(*arguments: Any) -> Any:
            state, axes = arguments[0], [0] * (len(arguments) - same) + [None] * same
            if hasattr(state, "gradient_step") and experiment.on_nan == "stop":  # else a seed may leave one out
                axes[0] = jax.tree.map(lambda _: 0, state).replace(gradient_step=None)
                arguments = state.replace(gradient_step=state.gradient_step[0]), *arguments[1:]

            def one(own: dict[str, jax.Array], *rest: Any) -> Any:
                return call(functions(experiment, spec, agent, sampler, own), *rest)

            return jax.vmap(one, in_axes=(0, *axes))(keys, *arguments)

        return mapped

    def probe(size: int, *arguments: Any) -> Any:
        return over_seeds(lambda pure, *own: pure.probe(size, *own), 1)(*arguments)

    def intervene(acting: Acting, state: PyTree, *arguments: Any) -> Any:
        def call(pure: Functions, state: PyTree, stream: jax.Array, *own: Any) -> Any:
            return pure.intervene(replace(acting, stream=stream), state, *own)

        return over_seeds(call, 2)(state, acting.stream, *arguments)

    return Functions(
        act=over_seeds(lambda pure, *own: pure.act(*own), 1),
        explore=over_seeds(lambda pure, *own: pure.explore(*own), 1),
        sample=over_seeds(lambda pure, *own: pure.sample(*own), 0),
        learn=over_seeds(lambda pure, *own: pure.learn(*own), 2),
        probe=probe,
        intervene=intervene,
    )


def sampler_device(sampler: Sampler) -> jax.Device | None:
    """The CPU beside an accelerator, for what a loop on the host draws; None where that is the default device.

    An accelerator runs one program after the other, so that a draw there waits for the gradient steps queued before it, which
    the host would wait for in its turn. Priorities come from those steps, so that a sampler of priorities waits anyway.
    """
    return host_device() if sampler.update is no_priorities else None


def drawn_on_host(draw: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`draw` of NumPy's numbers, for the same reason."""
    return lambda *numbers: draw(*jax.device_put(numbers, host_device()))


def compile_functions(
    experiment: Experiment,
    spec: EnvSpec,
    agent: Agent,
    sampler: Sampler,
    acting: tuple[Acting, ...] = (),
    mesh: Mesh | None = None,
    pure: Functions | None = None,
) -> Compiled:
    """Jitted and donating; keys are folded from a stream and a counter inside, so the host splits none.

    mesh: as of `functions`; pure: instead of `functions` of this experiment, for what a loop does.
    """
    keys = streams(experiment.seed)
    pure = pure or functions(experiment, spec, agent, sampler, keys, mesh)

    def diagnosed(
        names: tuple[str, ...],
        stream: jax.Array,
        state: PyTree,
        earlier: PyTree,
        init_key: jax.Array,
        columns: dict[str, jax.Array],
        gradient_step: jax.Array,
    ) -> tuple[dict[str, jax.Array], PyTree]:
        weight = jnp.ones(PROBE + experiment.agent.batch_size)
        batch = Batch(**decode(columns, spec.frame_stack), weight=weight)
        seen, other = (jax.tree.map(lambda x, part=part: x[part], batch) for part in (slice(PROBE), slice(PROBE, None)))
        key = jax.random.fold_in(stream, gradient_step)
        return diagnose(agent, state, agent.init(init_key), earlier, seen, other, key, names)

    def compile_act(acting: Acting) -> Act:
        size = acting.intervention.probe
        draw = None if size is None else drawn_on_host(jax.jit(partial(pure.probe, size)))
        run = jax.jit(partial(pure.intervene, acting), donate_argnums=(0, 1, 2))
        return Act(acting.due, draw, one_at_a_time(mesh, run))

    learn = jax.jit(pure.learn, donate_argnums=(0, 1), compiler_options=compiler_options(spec))
    drawing = partial(jax.jit, donate_argnums=0, compiler_options=COMPILER_OPTIONS)
    return Compiled(
        act=reading_only(pure.act),
        explore=jax.jit(pure.explore),
        remember=drawing(sampler.add),
        sample=drawing(pure.sample),
        learn=one_at_a_time(mesh, learn),
        prioritize=sampler.update if sampler.update is no_priorities else drawing(sampler.update),
        interventions=tuple(compile_act(each) for each in acting),
        diagnose=partial(jax.jit(partial(diagnosed, LOGGED)), keys["diagnostics"]),
        diagnose_all=partial(diagnosed, tuple(DIAGNOSTICS), keys["diagnostics"]),
        seed=experiment.seed,
    )


def compile_functions_of_seeds(
    experiment: Experiment, spec: EnvSpec, agent: Agent, sampler: Sampler, seeds: Sequence[int]
) -> Compiled:
    """As `compile_functions`, with a leading axis of seeds, but for diagnostics, which are the first seed's."""
    keys: dict[str, jax.Array] = jax.tree.map(lambda *own: jnp.stack(own), *map(streams, seeds))
    acting = bind_interventions(experiment, spec, agent, keys, jax.vmap(jax.random.fold_in, (0, None)))
    update = sampler.update if sampler.update is no_priorities else jax.vmap(sampler.update)
    of_seeds = sampler._replace(add=jax.vmap(sampler.add), update=update)
    pure = functions_of_seeds(experiment, spec, agent, sampler, keys)
    return compile_functions(experiment, spec, agent, of_seeds, acting, pure=pure)
