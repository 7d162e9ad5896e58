"""DrM: DrQ-v2 whose noise, bootstrapping and (by an intervention) perturbation follow the actor's dormant ratio."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from .drqv2 import HIDDEN, Actor, Algorithm, DrQv2, DrQv2State, Trunk, Value, View, check_fit, standard_deviation
from .learner import Agent, Batch, Learner, Metrics, Network, PyTree, Spec, Wrap, as_given, descend, require

NEVER = -1  # agent step at which an agent that is not awake woke up


@dataclass(frozen=True)
class DrM(DrQv2):
    """DrM, DrQ-v2 led by its actor's dormant ratio; Xu et al. (2024, arXiv 2310.19668), defaults of its code.

    Its third part, the perturbation of all networks, is `dormancy_perturb:measure=state,k=2,high=1,period=50000`, as
    the preset drm_dmc has it. ValueError in one line names a field whose value cannot be.
    """

    dormant_tau: float = 0.025  # a unit of the actor is dormant below this share of its layer's mean |output|
    awake_below: float = 0.2  # dormant ratio below which the agent is awake, and around which noise and trust turn
    noise_temperature: float = 0.1  # dormant ratio; how gradually noise turns
    noise_scale: float = 1.0  # the largest noise; one version of the authors' code for DeepMind Control has 0.8
    trust_temperature: float = 0.02  # dormant ratio; how gradually trust in the value network turns
    trust: float = 0.6  # largest share of the value network in what is bootstrapped from
    expectile: float = 0.9  # of the critic's values, that the value network learns; Adroit 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("noise_temperature", "noise_scale", "trust_temperature"):
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("dormant_tau", "awake_below"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "zero or more")
        require(0 <= self.trust <= 1, "trust", self.trust, "in [0, 1]")
        require(0 < self.expectile < 1, "expectile", self.expectile, "between 0 and 1")

    def build(self, spec: Spec, wrap: Wrap = as_given) -> Agent:
        """Pure functions for this environment; ValueError in one line where the two do not fit."""
        check_fit("DrM", spec)
        return DormancyAlgorithm(self, spec, wrap).agent


class DrMState(DrQv2State):
    value: Learner  # no target_params
    dormancy: jax.Array  # () float32: the actor's dormant ratio at the last gradient step, at first 1
    awake_since: jax.Array  # () int32: agent step at which the ratio first was low, NEVER before


class ValueNetwork(nn.Module):
    """Value of a state, behind a trunk of its own; [B, N] -> [B]."""

    features: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Value(self.hidden, name="value")(Trunk(self.features, name="trunk")(x))


def dormant_ratio(actor: Actor, params: PyTree, features: jax.Array, tau: float) -> jax.Array:
    """Share of the actor's units whose mean |output| lies below tau times their layer's; () in [0, 1].

    Outputs are those of the linear layers: before the norm of the trunk's, before tanh of the last one's, but after ReLU
    of the hidden ones, which is what the authors' hooks see, for their ReLU overwrites what was captured.
    """
    captured = actor.apply(
        params,
        features,
        capture_intermediates=lambda module, _: isinstance(module, nn.Dense),
        mutable=["intermediates"],
    )[1]["intermediates"]
    outputs = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(captured)}
    sizes = [
        jnp.abs(nn.relu(output) if f"'{HIDDEN}'" in path else output).mean(axis=0) for path, output in outputs.items()
    ]
    return jnp.concatenate([size < tau * size.mean() for size in sizes]).mean()


def expectile_loss(error: jax.Array, expectile: float) -> jax.Array:
    """Squared error of a value, weighted by `expectile` where the value is too low, else by 1 - expectile.

    error: value - target, any shape -> the same. Xu et al. (2024), section 4.3, after Kostrikov et al. (2022).
    """
    return jnp.where(error <= 0, expectile, 1 - expectile) * jnp.square(error)


def exploration(config: DrM, dormancy: jax.Array | float) -> jax.Array:
    """Standard deviation of the noise that the dormant ratio asks for; () in (0, noise_scale)."""
    return config.noise_scale * jax.nn.sigmoid((dormancy - config.awake_below) / config.noise_temperature)


def exploitation(config: DrM, dormancy: jax.Array | float) -> jax.Array:
    """Share of the value network in what is bootstrapped from: most while few units are dormant; ()."""
    return config.trust * jax.nn.sigmoid((config.awake_below - dormancy) / config.trust_temperature)


class DormancyAlgorithm(Algorithm):
    """DrQ-v2's functions with DrM's noise and bootstrapping."""

    config: DrM

    def __init__(self, config: DrM, spec: Spec, wrap: Wrap) -> None:
        self.actor = Actor(config.features, config.hidden, spec.action_size)
        super().__init__(config, spec, wrap)
        if self.networks["actor"].apply != self.actor.apply:
            raise ValueError("DrM counts the units of the actor that it made: nothing may rebuild the actor's network")

    def plain_networks(self, spec: Spec) -> dict[str, Network]:
        networks = super().plain_networks(spec)
        value = ValueNetwork(self.config.features, self.config.hidden)

        def loss(values: jax.Array, state: DrMState, batch: Batch, key: jax.Array) -> jax.Array:
            return self.value_loss(values, state, self.encode(state, batch.observation), batch)

        features = jnp.zeros((1, self.width(spec)))
        return networks | {
            "actor": networks["actor"]._replace(apply=self.actor.apply),
            "value": Network(
                init=lambda key: value.init(key, features),
                apply=value.apply,
                inputs=lambda batch: (batch.observation,),
                loss=loss,
                encode=self.encoded,
            ),
        }

    def deviation(self, state: DrMState, agent_step: jax.Array | int | None) -> jax.Array:
        """By the dormant ratio; once awake, at least DrQ-v2's schedule counted from there."""
        by_dormancy = exploration(self.config, state.dormancy)
        scheduled = standard_deviation(self.config, None if agent_step is None else agent_step - state.awake_since)
        return jnp.where(state.awake_since == NEVER, by_dormancy, jnp.maximum(by_dormancy, scheduled))

    def next_values(self, state: DrMState, next_features: jax.Array, std: jax.Array, key: jax.Array) -> jax.Array:
        trust = exploitation(self.config, state.dormancy)
        value = self.apply("value", state.value.params, next_features)
        return trust * value + (1 - trust) * super().next_values(state, next_features, std, key)

    def value_loss(self, values: jax.Array, state: DrMState, features: jax.Array, batch: Batch) -> jax.Array:
        q = self.apply("critic", state.critic.params, features, batch.action).min(axis=0)
        error = values - jax.lax.stop_gradient(q)
        return jnp.mean(batch.weight * expectile_loss(error, self.config.expectile))

    def init(self, key: jax.Array) -> DrMState:
        base = super().init(key)
        return DrMState(
            **vars(base),
            value=self.learner("value", jax.random.fold_in(key, 3)),
            dormancy=jnp.ones(()),
            awake_since=jnp.full((), NEVER, jnp.int32),
        )

    def learn(
        self, state: DrMState, view: View, critic_key: jax.Array, actor_key: jax.Array
    ) -> tuple[DrMState, Metrics, jax.Array]:
        """The dormant ratio, whether that wakes the agent, the value network, then DrQ-v2's step; as in the code."""
        dormancy = dormant_ratio(self.actor, state.actor.params, view.features, self.config.dormant_tau)
        wakes = (dormancy < self.config.awake_below) & (state.awake_since == NEVER)
        wakes &= state.agent_step > self.config.warmup
        awake_since = jnp.where(wakes, state.agent_step, state.awake_since)
        state = state.replace(dormancy=dormancy, awake_since=awake_since)

        def loss_function(params: PyTree) -> jax.Array:
            return self.value_loss(self.apply("value", params, view.features), state, view.features, view.batch)

        loss, gradient = jax.value_and_grad(loss_function)(state.value.params)
        value = descend(state.value, gradient, self.tx["value"], (view.features,), critic_key)
        state, metrics, priorities = super().learn(state.replace(value=value), view, critic_key, actor_key)
        own = {"value/loss": loss, "value/trust": exploitation(self.config, dormancy), "actor/dormancy": dormancy}
        return state, metrics | own, priorities
