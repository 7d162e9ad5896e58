"""The three types every agent is made of: what it learns from, what it trains, and what it can do."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, Protocol

import jax
import optax
from flax import struct

PyTree = Any
Metrics = dict[str, jax.Array]  # name -> scalar


class Spec(Protocol):
    """What an agent must know of an environment; `resprout.envs.EnvSpec` is one."""

    @property
    def id(self) -> str: ...
    @property
    def observation_shape(self) -> tuple[int, ...]: ...  # of one environment; images are [H, W, C]
    @property
    def discrete(self) -> bool: ...
    @property
    def action_size(self) -> int: ...  # number of actions if discrete, else the action's dimension


class Batch(struct.PyTreeNode):
    """Transitions as an agent learns from them; n-step returns are already accumulated."""

    observation: jax.Array  # [B, ...] uint8 or float32
    action: jax.Array  # [B] int32, or [B, A] float32 in [-1, 1]
    reward: jax.Array  # [B] float32: sum of the discounted rewards inside the n-step window
    discount: jax.Array  # [B] float32: gamma^n of the true n, 0 where the episode terminated
    next_observation: jax.Array  # [B, ...] the observation to bootstrap from; of a truncated episode its true last one
    weight: jax.Array  # [B] float32: importance weight of each error, 1 under uniform sampling


class Learner(struct.PyTreeNode):
    """One network and its optimiser: the unit that an intervention edits."""

    params: PyTree
    target_params: PyTree  # None for a network without a target
    opt_state: PyTree


class Network(NamedTuple):
    """How a learner's parameters are made, used and judged: for those who look inside or edit it.

    init(key) -> params: fresh ones, from the network's own initialisers.
    apply(params, *inputs) -> outputs; None where there is no network, as for a temperature.
    inputs(batch) -> what `apply` is given for these transitions, without augmentation.
    loss(outputs, state, batch, key) -> (): what the learner descends; `state` is the agent's.
    values(outputs) -> estimates of returns; None where the outputs are none.
    encode(state, batch) -> the batch as `inputs` wants it where another of the agent's networks comes before this one.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[..., Any] | None
    inputs: Callable[["Batch"], tuple[Any, ...]]
    loss: Callable[[Any, Any, "Batch", jax.Array], jax.Array]
    values: Callable[[Any], jax.Array] | None = None
    encode: Callable[[Any, "Batch"], "Batch"] | None = None

    def inputs_in(self, state: Any, batch: "Batch") -> tuple[Any, ...]:
        """What `apply` is given for these transitions by an agent in this state."""
        return self.inputs(batch if self.encode is None else self.encode(state, batch))


# Given the name of a learner, its network and its optimiser: those that the agent is built with.
Wrap = Callable[[str, Network, optax.GradientTransformation], tuple[Network, optax.GradientTransformation]]


class Refit(NamedTuple):
    """Something in an agent's state that is fitted on the host to the newest transitions, beside training.

    every: agent steps between two fits; there is none before the replay holds so many `rows`.
    delay: agent steps from the start of a fit to when its result enters the state, so that the step of the entry does not depend
        on how long the fit took. What is not ready by then is waited for.
    fit(columns) -> array: of the newest transitions, oldest first, under the names of a Batch's fields, [rows, ...] each;
        called in a thread of its own.
    enter(state, array) -> state: with arrays of the same shapes and dtypes.
    describe(array) -> name -> number: for a line of metrics.
    """

    every: int
    rows: int
    delay: int
    fit: Callable[[Mapping[str, Any]], Any]
    enter: Callable[[PyTree, Any], PyTree]
    describe: Callable[[Any], dict[str, float]]


class Agent(NamedTuple):
    """An agent as pure functions over an immutable state made of `Learner`s; nothing in it waits for the device.

    init(key) -> state
    act(state, observation [B, ...], key, agent_step=None) -> action: exploring; `agent_step` (agent steps taken so far)
        drives an exploration schedule, None means its end. Continuous actions lie in [-1, 1].
    exploit(state, observation [B, ...], key) -> action: the policy that evaluation measures.
    update(state, batch, key) -> (state, metrics, priorities [B]): one gradient step; a priority is the size of the
        example's error, which samplers without priorities ignore.
    networks: of each of the state's learners, under the name of its field.
    refit: what is fitted on the host meanwhile, if anything.
    interval: gradient steps in which every learner takes part once; at multiples of it all of them do.

    Where a schedule in agent steps reaches into `update`, the state has a field `agent_step`: whoever steps the
    environments sets it, as the run does.
    """

    init: Callable[[jax.Array], PyTree]
    act: Callable[..., jax.Array]
    exploit: Callable[[PyTree, jax.Array, jax.Array], jax.Array]
    update: Callable[[PyTree, Batch, jax.Array], tuple[PyTree, Metrics, jax.Array]]
    networks: Mapping[str, Network]
    refit: Refit | None = None
    interval: int = 1


def descend(
    learner: Learner, gradient: PyTree, tx: optax.GradientTransformation, inputs: tuple[Any, ...], key: jax.Array
) -> Learner:
    """The learner after one step of its optimiser; targets stay.

    inputs: those of the network that the gradient was taken at, and key: for transformations that want them.
    """
    step = optax.with_extra_args_support(tx).update
    updates, opt_state = step(gradient, learner.opt_state, learner.params, inputs=inputs, key=key)
    return learner.replace(params=optax.apply_updates(learner.params, updates), opt_state=opt_state)


def as_given(
    name: str, network: Network, tx: optax.GradientTransformation
) -> tuple[Network, optax.GradientTransformation]:
    """The `Wrap` that changes nothing."""
    return network, tx


def require(holds: bool, name: str, value: object, wanted: str) -> None:
    """ValueError in one line that names the field of a configuration, unless its value `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {wanted}, not {value}")


def require_finite(config: Any) -> None:
    """ValueError in one line that names a field of the dataclass `config` which is infinite or not a number."""
    for part in fields(config):
        value = getattr(config, part.name)
        require(not isinstance(value, float) or math.isfinite(value), part.name, value, "finite")
