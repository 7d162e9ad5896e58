"""Soft actor-critic: an ensemble of critics, a tanh-Gaussian actor and a learned temperature."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast, get_args

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from .activations import width_share
from .learner import (
    Agent,
    Batch,
    Learner,
    Metrics,
    Network,
    PyTree,
    Spec,
    Wrap,
    as_given,
    descend,
    require,
    require_finite,
)
from .networks import INITIALISERS, MLP, Initialiser, Initializer, scaled
from .optimizer import adam

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # Haarnoja et al.'s code
HEADS = ("mean", "log_std")


@dataclass(frozen=True)
class SAC:
    """Soft actor-critic with a learned temperature; Haarnoja et al. (2018b, arXiv 1812.05905), defaults of table 1.

    ValueError in one line names a field whose value cannot be.
    """

    gamma: float = 0.99  # discount per agent step; the batch carries gamma^n already
    n_step: int = 1  # agent steps summed into one reward (by the replay, on the way in)
    hidden: tuple[int, ...] = (256, 256)  # units of the hidden layers, of actor and critics alike
    activation: str = (
        "relu"  # of hidden layers, a name in activations.py with its fields: "helu:alpha=0.1"; "elu+relu": by layer
    )
    initialiser: Initialiser = "lecun"  # of every kernel: Flax's lecun, as sbx; xavier in TF-Agents
    width_matched: bool = False  # half the units for crelu and fourier, which make two features of each
    layer_norm: bool = False  # LayerNorm before each activation of the critics
    actor_layer_norm: bool = False  # ... of the actor
    critics: int = 2  # members of the ensemble; 2 are the twins of Fujimoto et al. (2018), REDQ has 10
    target_critics: int | None = None  # random members whose minimum is the target; None: all. A number makes it REDQ
    tau: float = 0.005  # share of the critics that the target critics take over per gradient step
    actor_learning_rate: float = 3e-4  # of Adam
    critic_learning_rate: float = 3e-4  # of Adam
    temperature_learning_rate: float = 3e-4  # of Adam, on log(temperature)
    initial_temperature: float = 1.0  # weight of the entropy beside the reward, alpha
    learn_temperature: bool = True  # towards the target entropy; False keeps the initial one
    target_entropy: float | None = None  # nats; None is `entropy_per_action` times the dimension of the action
    entropy_per_action: float = -1.0  # nats for each dimension of the action; jaxrl and TF-Agents -0.5
    reward_scale: float = 1.0  # multiplies rewards in the critics' targets; TF-Agents' example 0.1
    batch_size: int = 256  # transitions
    replay_ratio: float = 1.0  # gradient steps per agent step
    warmup: int = 10_000  # agent steps of uniform random actions; Achiam (2018), Spinning Up
    capacity: int = 1_000_000  # transitions

    def __post_init__(self) -> None:
        require_finite(self)
        for name in _POSITIVE:
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "in [0, 1]")
        require(self.warmup >= 0, "warmup", self.warmup, "zero or more")
        require(self.tau <= 1, "tau", self.tau, "at most 1")
        for spec in self.activation.split("+"):
            width_share(spec, self.width_matched)
        known = get_args(Initialiser)
        require(self.initialiser in known, "initialiser", self.initialiser, f"one of {', '.join(known)}")
        require(all(size > 0 for size in self.hidden), "hidden", self.hidden, "positive sizes")
        chosen = self.target_critics
        require(
            chosen is None or 1 <= chosen <= self.critics, "target_critics", chosen, f"in [1, critics = {self.critics}]"
        )

    def build(self, spec: Spec, wrap: Wrap = as_given) -> Agent:
        """Pure functions for this environment; ValueError in one line where the two do not fit."""
        parts = build_parts(self, spec, wrap)

        def update(state: SACState, batch: Batch, key: jax.Array) -> tuple[SACState, Metrics, jax.Array]:
            # The order of SB3 and sbx: critics, then the actor on the new critics, so that it climbs the best estimate there
            # is, then the temperature on the entropy of the actor that was sampled. All use the temperature from before.
            critic_key, policy_key = jax.random.split(key)
            state, critic_metrics, priorities = parts.update_critic(state, batch, critic_key)
            state, policy_metrics = parts.update_policy(state, batch, policy_key)
            return state.replace(gradient_step=state.gradient_step + 1), critic_metrics | policy_metrics, priorities

        return Agent(parts.init, parts.act, parts.exploit, update, parts.networks)


_POSITIVE = (
    *("n_step", "critics", "tau", "actor_learning_rate", "critic_learning_rate", "temperature_learning_rate"),
    *("initial_temperature", "reward_scale", "batch_size", "replay_ratio", "capacity"),
)


class SACState(struct.PyTreeNode):
    actor: Learner  # no target_params
    critic: Learner  # every entry has the members as its first axis
    temperature: Learner  # params {"log_alpha": ()}, no target_params
    gradient_step: jax.Array  # () int32: gradient steps taken


class GaussianActor(nn.Module):
    """Mean and bounded log standard deviation of the action before tanh; [..., observation] -> two of [..., actions]."""

    hidden: tuple[int, ...]
    actions: int
    layer_norm: bool = False
    activation: str = "relu"
    kernel_init: Initializer = INITIALISERS["lecun"]
    separate_heads: bool = False  # layers of their own, each with its fans, for the two

    @nn.compact
    def __call__(self, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = MLP(self.hidden, self.layer_norm, self.kernel_init, self.activation, name="hidden")(observations)
        if self.separate_heads:
            mean, log_std = (nn.Dense(self.actions, kernel_init=self.kernel_init, name=name)(x) for name in HEADS)
        else:
            head = nn.Dense(2 * self.actions, kernel_init=self.kernel_init, name="head")
            mean, log_std = jnp.split(head(x), 2, axis=-1)
        return mean, jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)


class Critic(nn.Module):
    """Value of an action; [..., observation], [..., action] -> [...]."""

    hidden: tuple[int, ...]
    layer_norm: bool = False
    activation: str = "relu"
    kernel_init: Initializer = INITIALISERS["lecun"]

    @nn.compact
    def __call__(self, observations: jax.Array, actions: jax.Array) -> jax.Array:
        x = jnp.concatenate([observations, actions], axis=-1)
        x = MLP(self.hidden, self.layer_norm, self.kernel_init, self.activation, name="hidden")(x)
        return nn.Dense(1, kernel_init=self.kernel_init, name="head")(x).squeeze(-1)


def hidden_units(config: SAC) -> tuple[int, ...]:
    """Units of the hidden layers, of which the config may want a share only."""
    share = width_share(config.activation.split("+")[0], config.width_matched)
    return tuple(scaled(size, share) for size in config.hidden)


def actor_network(config: SAC, spec: Spec, separate_heads: bool = False) -> GaussianActor:
    """Network of the policy for this environment."""
    return GaussianActor(
        hidden_units(config),
        spec.action_size,
        config.actor_layer_norm,
        config.activation,
        INITIALISERS[config.initialiser],
        separate_heads,
    )


def critic_network(config: SAC, members: int) -> nn.Module:
    """`members` independent critics; [B, observation], [B, action] -> [members, B]."""
    ensemble = nn.vmap(
        Critic, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=members
    )
    initialiser = INITIALISERS[config.initialiser]
    return cast(nn.Module, ensemble(hidden_units(config), config.layer_norm, config.activation, initialiser))


def tanh_gaussian(
    mean: jax.Array, log_std: jax.Array, noise: jax.Array, weight: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Action tanh(u), u = mean + std * noise, and its log density; Haarnoja et al. (2018b), appendix C.

    mean, log_std, noise: [A] -> [A], (). weight: [A], of each dimension's part of the log density. The log of tanh's derivative 1 - tanh(u)^2 is taken as
    2 * (log 2 - u - softplus(-2u)), the same number without the cancellation, finite for every u.
    """
    chex.assert_rank([mean, log_std, noise], 1)
    u = mean + jnp.exp(log_std) * noise
    log_density = jax.scipy.stats.norm.logpdf(noise) - log_std
    log_derivative = 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))
    return jnp.tanh(u), jnp.sum(weight * (log_density - log_derivative))


def td_error(
    q_tm1: jax.Array, r_t: jax.Array, discount_t: jax.Array, q_t: jax.Array, log_prob_t: jax.Array, alpha: jax.Array
) -> jax.Array:
    """r_t + discount_t * (min q_t - alpha * log_prob_t) - q_tm1 of one transition; Haarnoja et al. (2018b), eq. 2 and 3.

    q_tm1: [E] of every member; q_t: [M] of the target members; others () -> [E]. No gradient through the target.
    """
    chex.assert_rank([q_tm1, r_t, discount_t, q_t, log_prob_t, alpha], [1, 0, 0, 1, 0, 0])
    target = r_t + discount_t * (jnp.min(q_t) - alpha * log_prob_t)
    return jax.lax.stop_gradient(target) - q_tm1


def temperature_loss(log_alpha: jax.Array, entropy: jax.Array, target_entropy: float) -> jax.Array:
    """log_alpha * (entropy - target_entropy): alpha grows while the entropy is too small; Haarnoja et al. (2018b), eq. 18.

    All () -> (). log_alpha stands for alpha, as in Haarnoja et al.'s code.
    """
    return log_alpha * (jax.lax.stop_gradient(entropy) - target_entropy)


class Parts(NamedTuple):
    """What SAC is made of, for agents that put it together otherwise; states are SACStates or have their fields."""

    init: Callable[[jax.Array], SACState]
    act: Callable[..., jax.Array]
    exploit: Callable[[Any, jax.Array, jax.Array], jax.Array]
    update_critic: Callable[[Any, Batch, jax.Array], tuple[Any, Metrics, jax.Array]]  # as Agent.update
    update_policy: Callable[[Any, Batch, jax.Array], tuple[Any, Metrics]]  # actor, temperature and target critics
    networks: Mapping[str, Network]


def build_parts(
    config: SAC,
    spec: Spec,
    wrap: Wrap,
    density_weight: Callable[[Any], jax.Array | float] = lambda state: 1.0,
    separate_heads: bool = False,
) -> Parts:
    """The parts for this environment; ValueError in one line where the two do not fit.

    density_weight(state) -> [A]: of each dimension of the action, wherever training reads a log density.
    """
    name = type(config).__name__
    if spec.discrete:
        raise ValueError(f"{name} needs continuous actions; {spec.id} has {spec.action_size} discrete ones: use DQN")
    if len(spec.observation_shape) != 1:
        raise ValueError(f"{name} needs vector observations; {spec.id} has {list(spec.observation_shape)}")
    actor, critic = actor_network(config, spec, separate_heads), critic_network(config, config.critics)
    target_critic = critic_network(config, config.target_critics or config.critics)
    target_entropy = config.target_entropy
    if target_entropy is None:
        target_entropy = config.entropy_per_action * spec.action_size
    observations, actions = jnp.zeros((1, *spec.observation_shape)), jnp.zeros((1, spec.action_size))

    def sample(
        outputs: tuple[jax.Array, jax.Array], key: jax.Array, weight: jax.Array | float = 1.0
    ) -> tuple[jax.Array, jax.Array]:
        mean, log_std = outputs
        drawn = jax.vmap(tanh_gaussian, in_axes=(0, 0, 0, None))
        return drawn(mean, log_std, jax.random.normal(key, mean.shape), weight)

    def next_values(target_params: PyTree, observation: jax.Array, action: jax.Array, key: jax.Array) -> jax.Array:
        if config.target_critics is None:
            return values(target_params, observation, action)
        chosen = jax.random.choice(key, config.critics, (config.target_critics,), replace=False)
        members = jax.tree.map(lambda leaf: leaf[chosen], target_params)
        return cast(jax.Array, target_critic.apply(members, observation, action))

    def critic_loss(q_tm1: jax.Array, state: SACState, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        action_key, subset_key = jax.random.split(key)
        outputs = policy(state.actor.params, batch.next_observation)
        next_action, log_prob_t = sample(outputs, action_key, density_weight(state))
        q_t = next_values(state.critic.target_params, batch.next_observation, next_action, subset_key)
        errors = jax.vmap(td_error, in_axes=(1, 0, 0, 1, 0, None), out_axes=1)
        error = errors(
            q_tm1, config.reward_scale * batch.reward, batch.discount, q_t, log_prob_t, temperature_of(state)
        )
        return jnp.sum(jnp.mean(0.5 * jnp.square(error) * batch.weight[None], axis=1)), error

    def actor_loss(
        outputs: tuple[jax.Array, jax.Array], state: SACState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        action, log_prob = sample(outputs, key, density_weight(state))
        q = values(state.critic.params, batch.observation, action)
        # REDQ's policy climbs the mean of all members; Chen et al. (2021), algorithm 1.
        q = q.min(axis=0) if config.target_critics is None else q.mean(axis=0)
        return jnp.mean(temperature_of(state) * log_prob - q), -log_prob.mean()

    def log_alpha_loss(log_alpha: jax.Array, state: SACState, batch: Batch, key: jax.Array) -> jax.Array:
        entropy = actor_loss(policy(state.actor.params, batch.observation), state, batch, key)[1]
        return temperature_loss(log_alpha, entropy, target_entropy)

    def initial_temperature(key: jax.Array) -> PyTree:
        return {"log_alpha": jnp.full((), math.log(config.initial_temperature), jnp.float32)}

    plain = {
        "actor": Network(
            init=lambda key: actor.init(key, observations),
            apply=actor.apply,
            inputs=lambda batch: (batch.observation,),
            loss=lambda *arguments: actor_loss(*arguments)[0],
        ),
        "critic": Network(
            init=lambda key: critic.init(key, observations, actions),
            apply=critic.apply,
            inputs=lambda batch: (batch.observation, batch.action),
            loss=lambda *arguments: critic_loss(*arguments)[0],
            values=lambda q: q,
        ),
        "temperature": Network(init=initial_temperature, apply=None, inputs=lambda batch: (), loss=log_alpha_loss),
    }
    rates = {
        "actor": config.actor_learning_rate,
        "critic": config.critic_learning_rate,
        "temperature": config.temperature_learning_rate,
    }
    wrapped = {name: wrap(name, network, adam(rates[name])) for name, network in plain.items()}
    networks = {name: network for name, (network, _) in wrapped.items()}
    tx = {name: optimizer for name, (_, optimizer) in wrapped.items()}
    policy = cast(Callable[[PyTree, jax.Array], tuple[jax.Array, jax.Array]], networks["actor"].apply)
    values = cast(Callable[[PyTree, jax.Array, jax.Array], jax.Array], networks["critic"].apply)
    if config.target_critics is not None and networks["critic"] is not plain["critic"]:
        raise ValueError("target_critics chooses among the critics' own parameters: nothing may rebuild their network")

    def init(key: jax.Array) -> SACState:
        def learner(name: str, key: jax.Array, has_target: bool = False) -> Learner:
            params = networks[name].init(key)
            return Learner(params, jax.tree.map(jnp.copy, params) if has_target else None, tx[name].init(params))

        actor_key, critic_key = jax.random.split(key)
        return SACState(
            actor=learner("actor", actor_key),
            critic=learner("critic", critic_key, has_target=True),
            temperature=learner("temperature", key),
            gradient_step=jnp.zeros((), jnp.int32),
        )

    def act(
        state: SACState, observation: jax.Array, key: jax.Array, agent_step: jax.Array | int | None = None
    ) -> jax.Array:
        return sample(policy(state.actor.params, observation), key)[0]

    def exploit(state: SACState, observation: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.tanh(policy(state.actor.params, observation)[0])

    def update_critic(state: SACState, batch: Batch, key: jax.Array) -> tuple[SACState, Metrics, jax.Array]:
        inputs = networks["critic"].inputs(batch)

        def loss_function(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            q_tm1 = values(params, *inputs)
            loss, error = critic_loss(q_tm1, state, batch, key)
            return loss, (q_tm1, error)

        (loss, (q_tm1, error)), gradient = jax.value_and_grad(loss_function, has_aux=True)(state.critic.params)
        metrics = {
            "critic/loss": loss,
            "critic/q_mean": q_tm1.mean(),
            "critic/target_mean": (q_tm1 + error).mean(),
            "critic/td_error_abs": jnp.abs(error).mean(),
            "critic/grad_norm": optax.tree.norm(gradient),
        }
        critic = descend(state.critic, gradient, tx["critic"], inputs, key)
        return state.replace(critic=critic), metrics, jnp.abs(error).mean(axis=0)

    def update_policy(state: SACState, batch: Batch, key: jax.Array) -> tuple[SACState, Metrics]:
        inputs = networks["actor"].inputs(batch)

        def loss_function(params: PyTree) -> tuple[jax.Array, jax.Array]:
            return actor_loss(policy(params, *inputs), state, batch, key)

        (loss, entropy), gradient = jax.value_and_grad(loss_function, has_aux=True)(state.actor.params)
        actor = descend(state.actor, gradient, tx["actor"], inputs, key)
        temperature = state.temperature
        if config.learn_temperature:
            slope = jax.grad(temperature_loss)(temperature.params["log_alpha"], entropy, target_entropy)
            temperature = descend(temperature, {"log_alpha": slope}, tx["temperature"], (), key)
        critic = state.critic
        target_params = optax.incremental_update(critic.params, critic.target_params, config.tau)
        return state.replace(
            actor=actor, temperature=temperature, critic=critic.replace(target_params=target_params)
        ), {
            "actor/loss": loss,
            "actor/entropy": entropy,
            "actor/grad_norm": optax.tree.norm(gradient),
            "temperature/alpha": temperature_of(state),
        }

    return Parts(init, act, exploit, update_critic, update_policy, networks)


def temperature_of(state: SACState) -> jax.Array:
    """alpha, the weight of the entropy."""
    return jnp.exp(state.temperature.params["log_alpha"])
