"""Interventions and diagnostics as a run applies them: which learner each acts on, and what it is given."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..agents.learner import Agent, Batch, Network, PyTree, Spec
from ..diagnostics import (
    DIAGNOSTICS,
    Probe,
    dormant_units,
    measure,
    named_leaves,
    persistent_dormancy,
    unit_scores,
    value_churn,
)
from ..interventions import (
    METHODS,
    Context,
    Intervention,
    InterventionError,
    Trigger,
    on,
    task_boundary,
    threshold,
    when,
)
from ..interventions.base import check_together, projected, wrapped
from .specs import parse_spec

PROBE = 256  # transitions that diagnostics read; Sokar et al. (2023), figure 24: 32 to 1,024 tell the same
LOGGED = tuple(name for name, diagnostic in DIAGNOSTICS.items() if diagnostic.default)
Dormant = dict[str, dict[str, jax.Array]]  # learner -> layer -> bool [*shape]


def parse_intervention(text: str) -> Intervention:
    """The intervention of a SPEC; SpecError or InterventionError says what is wrong.

    Beside its own fields, each takes learner=critic, which restricts it to learners (a+b), and when=fau<0.3, which lets it act
    only where a diagnostic of that learner lies below (or above, >) a level. With rearm=0.5 it then waits until the
    diagnostic was that far back, and look=100 looks every 100 gradient steps; see `interventions.threshold` and `when`.
    when=task_boundary lets it act where the task has changed.
    """
    name, _, fields = text.partition(":")
    if "(" in text or name == Intervention().spec:
        raise InterventionError(
            f"{text} was put together in a program: only train(experiment, resume=...) there can go on"
        )
    own, common = [], {}
    for part in fields.split(",") if fields else ():
        field, _, value = part.partition("=")
        if field not in ("learner", "when", "rearm", "look"):
            own.append(part)
        elif not value:
            raise InterventionError(f"{name}: {field} needs a value")
        elif field in common:
            raise InterventionError(f"{name}: {field} is given twice")
        else:
            common[field] = value
    made: Intervention = parse_spec(":".join([name, *([",".join(own)] if own else [])]), METHODS, "intervention")()
    for field in ("rearm", "look"):
        if field in common and "when" not in common:
            raise InterventionError(f"{name}: {field} needs when=DIAGNOSTIC<LEVEL")
    if "when" in common:
        rearm, look = (_number(common, field, kind) for field, kind in (("rearm", float), ("look", int)))
        made = when(_trigger(common["when"], rearm), made, look)
    return on(tuple(common["learner"].split("+")), made) if "learner" in common else made


def _trigger(text: str, rearm: float | None) -> Trigger:
    if text == "task_boundary" and rearm is None:
        return task_boundary()
    for mark, side in ((">", "above"), ("<", "below")):
        name, found, level = text.partition(mark)
        if found:
            try:
                return threshold(name, **{side: float(level)}, rearm=rearm)
            except ValueError as error:
                raise InterventionError(f"when={text}: {error}") from None
    raise InterventionError(f"when must be DIAGNOSTIC>LEVEL, DIAGNOSTIC<LEVEL or task_boundary, not {text}")


def _number(values: dict[str, str], field: str, kind: type) -> Any:
    try:
        return kind(values[field]) if field in values else None
    except ValueError:
        raise InterventionError(f"{field} must be a number, not {values[field]!r}") from None


def labels(interventions: Sequence[Intervention]) -> list[str]:
    """Names for metrics, numbered where they repeat."""
    names = [intervention.name for intervention in interventions]
    return [f"{name}_{names[:i].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def build_agent(config: Any, spec: Spec, interventions: Sequence[Intervention]) -> Agent:
    """The agent with all that interventions change before anything is trained: its configuration and its optimisers."""
    for intervention in interventions:
        config = intervention.configure(config) if intervention.configure else config

    def wrap(
        name: str, network: Network, tx: optax.GradientTransformation
    ) -> tuple[Network, optax.GradientTransformation]:
        acting = [intervention for intervention in interventions if intervention.acts_on(name, network)]
        check_together(acting)
        for intervention in acting:
            network = intervention.rebuild(network) if intervention.rebuild else network
        return network, projected(acting, network, wrapped(acting, network, tx))

    agent: Agent = config.build(spec, wrap)
    for intervention in interventions:
        for name in intervention.learners or ():
            if name not in agent.networks:
                raise InterventionError(
                    f"{intervention.name}: there is no learner {name!r}; there are: {', '.join(agent.networks)}"
                )
    return agent


@dataclass(frozen=True)
class Acting:
    """An intervention bound to an agent's learners."""

    intervention: Intervention
    agent: Agent
    stream: jax.Array  # a key of its own
    turn: int | None = None  # agent steps after which the task changes

    @property
    def learners(self) -> list[str]:
        return [name for name, network in self.agent.networks.items() if self.intervention.acts_on(name, network)]

    def init(self, state: PyTree) -> dict[str, PyTree]:
        return {name: self.intervention.init(getattr(state, name)) for name in self.learners}

    def update(
        self, state: PyTree, memory: dict[str, PyTree], batch: Batch, gradient_step: jax.Array, agent_step: jax.Array
    ) -> tuple[PyTree, dict[str, PyTree], dict[str, jax.Array]]:
        """The agent's state and the intervention's own, and what was done: "critic/recycled/hidden/dense_0" -> () float32."""
        memory, infos, before = dict(memory), {}, state
        key = jax.random.fold_in(self.stream, gradient_step)
        for index, name in enumerate(self.learners):
            network = self.agent.networks[name]
            context = Context(
                key=jax.random.fold_in(key, index),
                gradient_step=gradient_step,
                agent_step=agent_step,
                network=network,
                given=functools.partial(network.inputs_in, before, batch),
                learner=name,
                batch=batch,
                state=before,  # what is measured of another learner is the same for all
                networks=self.agent.networks,
                common_key=key,
                task=agent_step // self.turn if self.turn else None,
            )
            learner, memory[name], infos[name] = self.intervention.update(getattr(state, name), memory[name], context)
            state = state.replace(**{name: learner})
        return state, memory, flat(infos)

    def due(self, gradient_step: int) -> bool:
        return self.intervention.period > 0 and gradient_step % self.intervention.period == 0


def flat(tree: PyTree) -> dict[str, jax.Array]:
    return {name: jnp.asarray(leaf, jnp.float32) for name, leaf in named_leaves(tree).items()}


def no_dormant(agent: Agent, state: PyTree, batch: Batch) -> Dormant:
    """The empty sets that the first look is compared with."""
    key = jax.random.key(0)
    sets = jax.eval_shape(lambda state, batch: diagnose(agent, state, state, {}, batch, batch, key)[1], state, batch)
    nothing: Dormant = jax.tree.map(lambda form: jnp.zeros(form.shape, form.dtype), sets)
    return nothing


def diagnose(
    agent: Agent,
    state: PyTree,
    initial: PyTree,
    earlier: Dormant,
    batch: Batch,
    other: Batch,
    key: jax.Array,
    names: tuple[str, ...] = LOGGED,
) -> tuple[dict[str, jax.Array], Dormant]:
    """Diagnostics of every network on `batch`, "fau/critic" -> () float32, and its dormant units (tau 0.1); pure.

    initial: the state that training began with. Churn (Tang & Berseth, 2024; Schaul et al., 2022) is what one gradient
    step on `other` changes on `batch`, one in which every learner takes part; that step is not kept. persistent: the share of
    the units dormant at the look before (`earlier`) that still are.
    """
    values: dict[str, jax.Array] = {}
    dormant: Dormant = {}
    update_key, act_key, loss_key, own_key = jax.random.split(key, 4)
    whole = state
    if agent.interval > 1:
        whole = state.replace(gradient_step=state.gradient_step // agent.interval * agent.interval)
    after = agent.update(whole, other, update_key)[0]
    for name, network in agent.networks.items():
        apply = network.apply
        if apply is None:
            continue
        learner, inputs = getattr(state, name), network.inputs_in(state, batch)
        if network.values is not None:
            now, then = (
                network.values(apply(getattr(each, name).params, *network.inputs_in(each, batch)))
                for each in (state, after)
            )
            values["value_churn"] = value_churn(now, then)
        probe = Probe(
            apply,
            learner.params,
            inputs,
            loss=_loss(network, state, batch, loss_key),
            initial_params=getattr(initial, name).params,
            key=own_key,
        )
        if not probe.graph.layers:
            continue
        values |= {f"{what}/{name}": value for what, value in measure(probe, names).items()}
        dormant[name] = dormant_units(unit_scores(probe.activations, probe.graph), 0.1)
        if name in earlier:
            values[f"persistent/post/tau0.1/{name}"] = persistent_dormancy(earlier[name], dormant[name])
    first, second = (agent.exploit(each, batch.observation, act_key) for each in (state, after))
    changed = first != second if first.ndim == 1 else jnp.linalg.norm(second - first, axis=-1)
    values["policy_churn"] = jnp.mean(changed, dtype=jnp.float32)
    return values, dormant


def _loss(network: Network, state: PyTree, batch: Batch, key: jax.Array) -> Callable[[Any], jax.Array]:
    return lambda outputs: network.loss(outputs, state, batch, key)
