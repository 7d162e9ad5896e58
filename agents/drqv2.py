"""DrQ-v2: deterministic actor-critic from pixels, with random shifts, n-step returns and a schedule of noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from .augmentation import random_shift
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
from .networks import MLP, flatten, orthogonal, scale_pixels
from .optimizer import adam

CONVOLUTIONS = ((3, 2), (3, 1), (3, 1), (3, 1))  # kernel, stride; Yarats et al. (2022), figure 3
MIN_SIZE = 15  # pixels; the smallest side that leaves one after the four unpadded convolutions
HEADS = 2  # of the critic, whose minimum counts
HIDDEN = "hidden"  # module of the rectified layers
ACTION_EPS = 1e-6  # actions stay that far inside [-1, 1]

linear = orthogonal()
convolutional = orthogonal(math.sqrt(2))


@dataclass(frozen=True)
class DrQv2:
    """DrQ-v2 for pixels and continuous actions; Yarats et al. (2022, arXiv 2107.09645), defaults of its code.

    The code draws no transition whose n steps reach past an episode's end; here the shorter sums there are learnt from too.
    ValueError in one line names a field whose value cannot be.
    """

    gamma: float = 0.99  # discount per agent step; the batch carries gamma^n already
    n_step: int = 3  # agent steps summed into one reward (by the replay, on the way in)
    channels: int = 32  # of each of the four convolutions
    features: int = 50  # units that actor and critic each make of the encoder's output; humanoid and dog 100
    hidden: tuple[int, ...] = (1024, 1024)  # units of the hidden layers, of actor and critic alike
    tau: float = 0.01  # share of the critic that its target takes over per gradient step
    learning_rate: float = 1e-4  # of the three Adams; hard tasks 8e-5
    std_start: float = 1.0  # standard deviation of the noise on actions at agent step 0
    std_end: float = 0.1  # ... and at the end of its linear schedule
    std_steps: int = 500_000  # agent steps of the schedule: easy 100,000, medium 500,000, hard 2,000,000
    std_clip: float = 0.3  # the noise of actions in both losses is clipped to this
    random_shift: int = 4  # pixels; 0 leaves images as they are
    batch_size: int = 256  # transitions
    replay_ratio: float = 0.5  # gradient steps per agent step
    warmup: int = 2_000  # agent steps of uniform random actions before the first gradient step
    capacity: int = 1_000_000  # transitions

    def __post_init__(self) -> None:
        require_finite(self)
        for name in _POSITIVE:
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("std_start", "std_end", "random_shift", "warmup"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "zero or more")
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "in [0, 1]")
        require(self.tau <= 1, "tau", self.tau, "at most 1")
        require(all(size > 0 for size in self.hidden), "hidden", self.hidden, "positive sizes")

    def build(self, spec: Spec, wrap: Wrap = as_given) -> Agent:
        """Pure functions for this environment; ValueError in one line where the two do not fit."""
        check_fit("DrQv2", spec)
        return Algorithm(self, spec, wrap).agent


_POSITIVE = (
    *("n_step", "channels", "features", "tau", "learning_rate", "std_steps", "std_clip"),
    *("batch_size", "replay_ratio", "capacity"),
)


def check_fit(name: str, spec: Spec) -> None:
    """ValueError in one line unless the environment has images and continuous actions."""
    shape = spec.observation_shape
    if spec.discrete:
        raise ValueError(f"{name} needs continuous actions; {spec.id} has {spec.action_size} discrete ones: use DQN")
    if len(shape) != 3:
        raise ValueError(f"{name} needs [H, W, C] images; {spec.id} has {list(shape)}: use SAC, or dmc-pixels/*")
    if min(shape[:2]) < MIN_SIZE:
        raise ValueError(f"{name} needs images of {MIN_SIZE} pixels; {spec.id} has {shape[0]} x {shape[1]}")


class DrQv2State(struct.PyTreeNode):
    encoder: Learner  # no target_params: the next observation is encoded by the online encoder
    actor: Learner  # no target_params
    critic: Learner
    agent_step: jax.Array  # () int32: agent steps taken, for the noise in the losses; set by whoever takes them
    gradient_step: jax.Array  # () int32: gradient steps taken


class Encoder(nn.Module):
    """Four 3 x 3 unpadded convolutions with ReLU, flattened channel-last; [B, H, W, C] -> [B, places * channels].

    84 x 84 leaves 35 * 35 * 32 = 39,200. uint8 images become [-0.5, 0.5], float ones lose 0.5.
    """

    channels: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = scale_pixels(images) - 0.5
        for index, (kernel, stride) in enumerate(CONVOLUTIONS):
            x = nn.Conv(
                self.channels,
                (kernel, kernel),
                stride,
                padding="VALID",
                kernel_init=convolutional,
                name=f"conv_{index}",
            )(x)
            x = nn.relu(x)
        return flatten(x)


class Trunk(nn.Module):
    """tanh of normalised linear features of the encoder's output; [B, N] -> [B, features]."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.features, kernel_init=linear, name="dense")(x)
        return jnp.tanh(nn.LayerNorm(epsilon=1e-5, name="norm")(x))


class Actor(nn.Module):
    """Mean action in [-1, 1]; [B, N] -> [B, actions]."""

    features: int
    hidden: tuple[int, ...]
    actions: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = MLP(self.hidden, kernel_init=linear, name=HIDDEN)(Trunk(self.features, name="trunk")(x))
        return jnp.tanh(nn.Dense(self.actions, kernel_init=linear, name="head")(x))


class Value(nn.Module):
    """A scalar of each input; [B, inputs] -> [B]."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = MLP(self.hidden, kernel_init=linear, name=HIDDEN)(x)
        return nn.Dense(1, kernel_init=linear, name="head")(x).squeeze(-1)


class Critic(nn.Module):
    """Values of an action by each head, behind one trunk; [B, N], [B, A] -> [HEADS, B]."""

    features: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, actions: jax.Array) -> jax.Array:
        x = jnp.concatenate([Trunk(self.features, name="trunk")(x), actions], axis=-1)
        heads = nn.vmap(Value, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=HEADS)(
            self.hidden, name="heads"
        )
        return heads(x)


def standard_deviation(config: DrQv2, agent_step: jax.Array | int | None) -> jax.Array:
    """Of the noise on actions after `agent_step` agent steps: linear from step 0 (the warm-up counts); None is its end."""
    progress = jnp.ones(()) if agent_step is None else jnp.clip(agent_step / config.std_steps, 0, 1)
    return config.std_start + progress * (config.std_end - config.std_start)


def noisy_action(mean: jax.Array, std: jax.Array | float, noise: jax.Array, clip: float | None = None) -> jax.Array:
    """mean + std * noise, its second part within `clip` and the sum inside (-1, 1), where its gradient stays 1.

    mean, noise: [..., A] -> [..., A]; the truncated normal of Yarats et al.'s code (section 3.1 of the paper).
    """
    offset = std * noise if clip is None else jnp.clip(std * noise, -clip, clip)
    action = mean + offset
    clamped = jnp.clip(action, -1 + ACTION_EPS, 1 - ACTION_EPS)
    return action + jax.lax.stop_gradient(clamped - action)


def td_error(q_tm1: jax.Array, r_t: jax.Array, discount_t: jax.Array, v_t: jax.Array) -> jax.Array:
    """r_t + discount_t * v_t - q_tm1 of every head, of one transition; Yarats et al. (2022), eq. 3.

    q_tm1: [HEADS], others () -> [HEADS]. No gradient through the target.
    """
    chex.assert_rank([q_tm1, r_t, discount_t, v_t], [1, 0, 0, 0])
    return jax.lax.stop_gradient(r_t + discount_t * v_t) - q_tm1


class View(NamedTuple):
    """The transitions of a batch as an update sees them: shifted, and encoded by the encoder from before it."""

    batch: Batch
    observation: jax.Array  # [B, H, W, C] shifted
    features: jax.Array  # [B, N] of it
    next_features: jax.Array  # [B, N]
    backward: Callable[[jax.Array], tuple[PyTree]]  # gradient by `features` -> by the encoder's parameters


class Algorithm:
    """The functions of the agent; DrM has its own `deviation` and `next_values`, a network more, and more in its state."""

    def __init__(self, config: DrQv2, spec: Spec, wrap: Wrap) -> None:
        self.config = config
        self.encoder = Encoder(config.channels)
        plain = self.plain_networks(spec)
        wrapped = {name: wrap(name, network, adam(config.learning_rate)) for name, network in plain.items()}
        self.networks = {name: network for name, (network, _) in wrapped.items()}
        self.tx = {name: optimizer for name, (_, optimizer) in wrapped.items()}

    def plain_networks(self, spec: Spec) -> dict[str, Network]:
        """Under the names of the state's learners; actor and critic read what the state's encoder makes of a batch."""
        config = self.config
        encoder = self.encoder
        actor = Actor(config.features, config.hidden, spec.action_size)
        critic = Critic(config.features, config.hidden)
        images, actions = jnp.zeros((1, *spec.observation_shape)), jnp.zeros((1, spec.action_size))
        features = jnp.zeros((1, self.width(spec)))

        def critic_loss(q: jax.Array, state: Any, batch: Batch, key: jax.Array) -> jax.Array:
            next_features = self.encode(state, batch.next_observation)
            std = self.deviation(state, state.agent_step)
            return self.critic_loss(q, batch, self.next_values(state, next_features, std, key))[0]

        def encoder_loss(features: jax.Array, state: Any, batch: Batch, key: jax.Array) -> jax.Array:
            q = self.apply("critic", state.critic.params, features, batch.action)
            return critic_loss(q, state, batch, key)

        def actor_loss(mean: jax.Array, state: Any, batch: Batch, key: jax.Array) -> jax.Array:
            features, std = self.encode(state, batch.observation), self.deviation(state, state.agent_step)
            return self.actor_loss(mean, state, features, std, key)

        return {
            "encoder": Network(
                init=lambda key: encoder.init(key, images),
                apply=encoder.apply,
                inputs=lambda batch: (batch.observation,),
                loss=encoder_loss,
            ),
            "actor": Network(
                init=lambda key: actor.init(key, features),
                apply=actor.apply,
                inputs=lambda batch: (batch.observation,),
                loss=actor_loss,
                encode=self.encoded,
            ),
            "critic": Network(
                init=lambda key: critic.init(key, features, actions),
                apply=critic.apply,
                inputs=lambda batch: (batch.observation, batch.action),
                loss=critic_loss,
                values=lambda q: q,
                encode=self.encoded,
            ),
        }

    def width(self, spec: Spec) -> int:
        """Number of outputs of the encoder."""
        images = jnp.zeros((1, *spec.observation_shape))
        return int(jax.eval_shape(self.encoder.init_with_output, jax.random.key(0), images)[0].shape[-1])

    def apply(self, name: str, params: PyTree, *inputs: jax.Array) -> jax.Array:
        network = self.networks[name].apply
        assert network is not None
        return cast(jax.Array, network(params, *inputs))

    def encode(self, state: Any, observation: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, N]"""
        return self.apply("encoder", state.encoder.params, observation)

    def encoded(self, state: Any, batch: Batch) -> Batch:
        """The batch with features in the place of observations."""
        return batch.replace(observation=self.encode(state, batch.observation))

    def deviation(self, state: Any, agent_step: jax.Array | int | None) -> jax.Array:
        """Standard deviation of the noise; ()."""
        return standard_deviation(self.config, agent_step)

    def next_values(self, state: Any, next_features: jax.Array, std: jax.Array, key: jax.Array) -> jax.Array:
        """What is bootstrapped from: min over the target's heads of the value of the policy's noisy action; [B]."""
        mean = self.apply("actor", state.actor.params, next_features)
        action = noisy_action(mean, std, jax.random.normal(key, mean.shape), self.config.std_clip)
        return self.apply("critic", state.critic.target_params, next_features, action).min(axis=0)

    def critic_loss(self, q_tm1: jax.Array, batch: Batch, v_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sum over the heads of the mean squared error, (), and the errors, [HEADS, B]."""
        errors = jax.vmap(td_error, in_axes=(1, 0, 0, 0), out_axes=1)
        error = errors(q_tm1, batch.reward, batch.discount, v_t)
        return jnp.sum(jnp.mean(batch.weight[None] * jnp.square(error), axis=1)), error

    def actor_loss(self, mean: jax.Array, state: Any, features: jax.Array, std: jax.Array, key: jax.Array) -> jax.Array:
        """-min over the heads of the value of the noisy action; ()."""
        action = noisy_action(mean, std, jax.random.normal(key, mean.shape), self.config.std_clip)
        return -self.apply("critic", state.critic.params, features, action).min(axis=0).mean()

    def learner(self, name: str, key: jax.Array, has_target: bool = False) -> Learner:
        params = self.networks[name].init(key)
        return Learner(params, jax.tree.map(jnp.copy, params) if has_target else None, self.tx[name].init(params))

    def init(self, key: jax.Array) -> Any:
        encoder_key, actor_key, critic_key = jax.random.split(key, 3)
        return DrQv2State(
            encoder=self.learner("encoder", encoder_key),
            actor=self.learner("actor", actor_key),
            critic=self.learner("critic", critic_key, has_target=True),
            agent_step=jnp.zeros((), jnp.int32),
            gradient_step=jnp.zeros((), jnp.int32),
        )

    def act(
        self, state: Any, observation: jax.Array, key: jax.Array, agent_step: jax.Array | int | None = None
    ) -> jax.Array:
        mean = self.exploit(state, observation, key)
        return noisy_action(mean, self.deviation(state, agent_step), jax.random.normal(key, mean.shape))

    def exploit(self, state: Any, observation: jax.Array, key: jax.Array) -> jax.Array:
        return self.apply("actor", state.actor.params, self.encode(state, observation))

    def update(self, state: Any, batch: Batch, key: jax.Array) -> tuple[Any, Metrics, jax.Array]:
        view_key, *keys = jax.random.split(key, 3)
        return self.learn(state, self.view(state, batch, view_key), *keys)

    def view(self, state: Any, batch: Batch, key: jax.Array) -> View:
        """One shift for an observation, another for the next. They are encoded apart: only one is differentiated."""
        observation_key, next_key = jax.random.split(key)
        observation, next_observation = batch.observation, batch.next_observation
        if self.config.random_shift:
            observation = random_shift(observation_key, observation, self.config.random_shift)
            next_observation = random_shift(next_key, next_observation, self.config.random_shift)
        features, backward = jax.vjp(lambda params: self.apply("encoder", params, observation), state.encoder.params)
        return View(batch, observation, features, self.encode(state, next_observation), backward)

    def learn(
        self, state: Any, view: View, critic_key: jax.Array, actor_key: jax.Array
    ) -> tuple[Any, Metrics, jax.Array]:
        """Critic and encoder, then the actor on the new critic and the features from before; Yarats et al.'s code."""
        std = self.deviation(state, state.agent_step)
        encoder, critic, critic_metrics, priorities = self.update_critic(state, view, std, critic_key)
        actor, actor_metrics = self.update_actor(state.replace(critic=critic), view, std, actor_key)
        state = state.replace(encoder=encoder, actor=actor, critic=critic, gradient_step=state.gradient_step + 1)
        return state, critic_metrics | actor_metrics | {"actor/std": std}, priorities

    def update_critic(
        self, state: Any, view: View, std: jax.Array, key: jax.Array
    ) -> tuple[Learner, Learner, Metrics, jax.Array]:
        """Encoder and critic after a step of each, metrics and priorities [B]."""
        v_t = self.next_values(state, view.next_features, std, key)

        def loss_function(params: PyTree, features: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            q_tm1 = self.apply("critic", params, features, view.batch.action)
            loss, error = self.critic_loss(q_tm1, view.batch, v_t)
            return loss, (q_tm1, error)

        differentiated = jax.value_and_grad(loss_function, argnums=(0, 1), has_aux=True)
        (loss, (q_tm1, error)), (gradient, by_features) = differentiated(state.critic.params, view.features)
        (encoder_gradient,) = view.backward(by_features)
        encoder = descend(state.encoder, encoder_gradient, self.tx["encoder"], (view.observation,), key)
        critic = descend(state.critic, gradient, self.tx["critic"], (view.features, view.batch.action), key)
        target_params = optax.incremental_update(critic.params, critic.target_params, self.config.tau)
        metrics = {
            "critic/loss": loss,
            "critic/q_mean": q_tm1.mean(),
            "critic/target_mean": (q_tm1 + error).mean(),
            "critic/td_error_abs": jnp.abs(error).mean(),
            "critic/grad_norm": optax.tree.norm(gradient),
            "encoder/grad_norm": optax.tree.norm(encoder_gradient),
        }
        return encoder, critic.replace(target_params=target_params), metrics, jnp.abs(error).mean(axis=0)

    def update_actor(self, state: Any, view: View, std: jax.Array, key: jax.Array) -> tuple[Learner, Metrics]:
        def loss_function(params: PyTree) -> jax.Array:
            mean = self.apply("actor", params, view.features)
            return self.actor_loss(mean, state, view.features, std, key)

        loss, gradient = jax.value_and_grad(loss_function)(state.actor.params)
        actor = descend(state.actor, gradient, self.tx["actor"], (view.features,), key)
        return actor, {"actor/loss": loss, "actor/grad_norm": optax.tree.norm(gradient)}

    @property
    def agent(self) -> Agent:
        return Agent(self.init, self.act, self.exploit, self.update, self.networks)
