"""DQN and its family: double, dueling, n-step, C51, LAP and DrQ(eps), each a field of one config."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast, get_args

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from .activations import width_share
from .augmentation import random_intensity, random_shift
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
from .networks import (
    INITIALISERS,
    MLP,
    NATURE_MIN_SIZE,
    ImpalaResNet,
    Initialiser,
    MinAtarCNN,
    NatureCNN,
    QNetwork,
    flatten,
    scale_pixels,
    scaled,
)
from .optimizer import adam

Loss = Literal["huber", "mse", "lap"]
Distribution = Literal["none", "c51"]
Torso = Literal["auto", "nature", "impala", "minatar", "mlp"]
Padding = Literal["same", "valid"]
Optimizer = Literal["adam", "rmsprop"]

GRID = 16  # pixels; a smaller image is a grid of cells
# Units after a torso: Dopamine (nature, impala), Young & Tian 2019 (minatar), our choice (mlp; Dopamine has 512, 512)
TORSO_HIDDEN = {"nature": (512,), "impala": (512,), "minatar": (128,), "mlp": (256, 256)}
IMAGE_TORSOS = ("nature", "impala")


@dataclass(frozen=True)
class DQN:
    """Deep Q-learning (Mnih et al., 2015); defaults are Dopamine's (Castro et al., 2018) with the Huber loss, as in ReDo.

    ValueError in one line names a field whose value cannot be.
    """

    gamma: float = 0.99  # discount per agent step; the batch carries gamma^n already
    n_step: int = 1  # agent steps summed into one reward (by the replay, on the way in); Rainbow 3, DrQ(eps) 10
    double: bool = False  # the online network chooses the action to bootstrap from; van Hasselt et al. (2016), eq. 4
    dueling: bool = False  # value and advantage heads; Wang et al. (2016), eq. 9
    loss: Loss = "huber"  # of a temporal-difference error; mse is its square, without 1/2. C51 has its cross entropy
    lap_threshold: float = 0.01  # |error| where lap turns linear, and the sampler's minimum; Fujimoto et al. (2020)
    distribution: Distribution = "none"  # c51: a categorical distribution of returns; Bellemare et al. (2017)
    atoms: int = 51  # of the distribution's support; Bellemare et al. (2017)
    v_min: float = -10.0  # lowest return of the support
    v_max: float = 10.0  # highest return of the support
    torso: Torso = "auto"  # auto: vectors mlp, images below 16 pixels minatar, others nature
    padding: Padding = "same"  # of the Nature convolutions: same (Dopamine) or valid (Mnih et al.)
    width: float = 1.0  # multiplies every layer's units, rounded up
    activation: str = "relu"  # of hidden layers, a name in activations.py with its fields: "helu:alpha=0.1"
    width_matched: bool = False  # half the units for crelu and fourier, which make two features of each
    layer_norm: bool = False  # LayerNorm before each activation; of a convolution over the channels at each place
    initialiser: Initialiser = "xavier"  # of every kernel: Dopamine's DQN xavier, its C51 rainbow, CleanRL lecun
    hidden: tuple[int, ...] | None = None  # units of the dense layers after the torso; None is the torso's own
    optimizer: Optimizer = "adam"  # rmsprop is centred, as Mnih et al. (2015) have it
    learning_rate: float = 6.25e-5  # of the optimizer
    adam_eps: float = 1.5e-4  # of Adam
    rmsprop_decay: float = 0.95  # of RMSprop's two moments; Mnih et al. (2015)
    rmsprop_eps: float = 1e-5  # of RMSprop, beside the root; Fujimoto et al. (2020)
    max_grad_norm: float | None = None  # clip the gradient's global norm to this; None does not
    target_period: int = 2000  # gradient steps; Dopamine's 8000 agent steps at an update every 4; scale it with replay_ratio to keep that
    tau: float = 1.0  # share of the online parameters that a target update takes over; 1 copies
    epsilon_start: float = 1.0  # probability of a random action
    epsilon_end: float = 0.01  # probability of a random action
    epsilon_decay_steps: int = 250_000  # agent steps of linear decay, counted after the warm-up
    epsilon_eval: float = 0.001  # probability of a random action in evaluation
    random_shift: int = 0  # pixels; DrQ(eps) 4
    intensity: float = 0.0  # standard deviation of the brightness factor; DrQ(eps) 0.05
    batch_size: int = 32  # transitions
    replay_ratio: float = 0.25  # gradient steps per agent step
    warmup: int = 20_000  # agent steps of random actions before the first gradient step
    capacity: int = 1_000_000  # transitions

    def __post_init__(self) -> None:
        require_finite(self)
        for name, choices in (
            ("loss", Loss),
            ("distribution", Distribution),
            ("torso", Torso),
            ("padding", Padding),
            ("initialiser", Initialiser),
            ("optimizer", Optimizer),
        ):
            value, known = getattr(self, name), get_args(choices)
            require(value in known, name, value, f"one of {', '.join(known)}")
        for name in _POSITIVE:
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("gamma", "epsilon_start", "epsilon_end", "epsilon_eval"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        for name in ("random_shift", "intensity", "warmup"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "zero or more")
        require(self.tau <= 1, "tau", self.tau, "at most 1")
        width_share(self.activation, self.width_matched)
        require(0 <= self.rmsprop_decay < 1, "rmsprop_decay", self.rmsprop_decay, "in [0, 1)")
        lap_fits = self.loss != "lap" or self.distribution == "none"
        require(lap_fits, "loss", self.loss, f"huber or mse beside distribution {self.distribution}")
        require(self.atoms > 1, "atoms", self.atoms, "2 or more")
        require(self.v_min < self.v_max, "v_min", self.v_min, f"below v_max ({self.v_max})")
        require(all(size > 0 for size in self.hidden or ()), "hidden", self.hidden, "positive sizes")
        require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "positive")

    def build(self, spec: Spec, wrap: Wrap = as_given) -> Agent:
        """Pure functions for this environment; ValueError in one line where the two do not fit."""
        if not spec.discrete:
            raise ValueError(f"DQN needs discrete actions; {spec.id} has {spec.action_size} continuous ones: use SAC")
        return _build(self, q_network(self, spec), spec.observation_shape, wrap)


_POSITIVE = (
    *("n_step", "lap_threshold", "width", "learning_rate", "adam_eps", "rmsprop_eps", "target_period", "tau"),
    *("epsilon_decay_steps", "batch_size", "replay_ratio", "capacity"),
)


class DQNState(struct.PyTreeNode):
    critic: Learner  # no target_params where the target is the online network (see `_build`)
    gradient_step: jax.Array  # () int32: gradient steps taken


def q_network(config: DQN, spec: Spec) -> QNetwork:
    """Network of action values for this environment; ValueError where torso and observation do not fit."""
    shape = spec.observation_shape
    torso = automatic_torso(spec) if config.torso == "auto" else config.torso
    if torso != "mlp" and len(shape) != 3:
        raise ValueError(f"torso {torso} needs [H, W, C] observations; {spec.id} has {list(shape)}: use mlp")
    if torso == "nature" and config.padding == "valid" and min(shape[:2]) < NATURE_MIN_SIZE:
        raise ValueError(
            f"padding valid needs images of {NATURE_MIN_SIZE} pixels; {spec.id} has {shape[0]} x {shape[1]}"
        )
    if config.random_shift and len(shape) != 3:
        raise ValueError(f"random_shift needs [H, W, C] observations; {spec.id} has {list(shape)}")
    if config.intensity and torso not in IMAGE_TORSOS:
        raise ValueError(f"intensity needs a torso that reads pixels ({', '.join(IMAGE_TORSOS)}), not {torso}")
    if config.intensity and is_grid(spec):
        raise ValueError(f"intensity is for pixels; {spec.id} has cells of 0 or 1")
    if torso == "minatar" and min(shape[:2]) < 3:
        raise ValueError(f"torso minatar needs 3 x 3 cells; {spec.id} has {shape[0]} x {shape[1]}")
    initialiser = INITIALISERS[config.initialiser]
    width = config.width * width_share(config.activation, config.width_matched)
    hidden = config.activation, config.layer_norm
    highest = 1 if is_grid(spec) else 255
    torsos: dict[str, Callable[[jax.Array], jax.Array]] = {
        "nature": NatureCNN(width, config.padding, initialiser, *hidden, highest),
        "impala": ImpalaResNet(width, initialiser, *hidden, highest),
        "minatar": MinAtarCNN(width, initialiser, *hidden),
        "mlp": flatten,
    }
    sizes = TORSO_HIDDEN[torso] if config.hidden is None else config.hidden
    return QNetwork(
        torso=torsos[torso],
        hidden=MLP(tuple(scaled(size, width) for size in sizes), config.layer_norm, initialiser, config.activation),
        actions=spec.action_size,
        atoms=config.atoms if config.distribution == "c51" else None,
        dueling=config.dueling,
        kernel_init=initialiser,
    )


def automatic_torso(spec: Spec) -> Torso:
    """The torso that `auto` stands for."""
    if is_grid(spec):
        return "minatar"
    return "nature" if len(spec.observation_shape) == 3 else "mlp"


def is_grid(spec: Spec) -> bool:
    """Whether observations are cells of 0 or 1, as MinAtar's, and no picture of 0 to 255: by their size alone."""
    return len(spec.observation_shape) == 3 and max(spec.observation_shape[:2]) < GRID


def td_error(
    q_tm1: jax.Array,
    a_tm1: jax.Array,
    r_t: jax.Array,
    discount_t: jax.Array,
    q_t_target: jax.Array,
    q_t_selector: jax.Array,
) -> jax.Array:
    """r_t + discount_t * q_t_target[argmax q_t_selector] - q_tm1[a_tm1]; no gradient through the target.

    q_*: [A]; a_tm1, r_t, discount_t: () -> (). Q-learning where the selector is q_t_target itself, double Q-learning
    (van Hasselt et al., 2016, eq. 4) where it is the online network's.
    """
    chex.assert_rank([q_tm1, a_tm1, r_t, discount_t, q_t_target, q_t_selector], [1, 0, 0, 0, 1, 1])
    target = r_t + discount_t * q_t_target[jnp.argmax(q_t_selector)]
    return jax.lax.stop_gradient(target) - q_tm1[a_tm1]


def td_loss(config: DQN, error: jax.Array, weight: jax.Array) -> jax.Array:
    """Loss of each temporal-difference error; error, weight: [B] -> [B].

    lap (Fujimoto et al., 2020, arXiv 2007.06049) is Huber's loss whose slope stays `lap_threshold` beyond that error.
    Sampling in proportion to max(|error|, lap_threshold)^alpha is part of it, so importance weights are left out. Their
    code omits the constant that joins the two pieces: the value differs, the gradient does not.
    """
    loss: jax.Array
    match config.loss:
        case "lap":
            loss = optax.huber_loss(error, delta=config.lap_threshold)
        case "huber":
            loss = weight * optax.huber_loss(error)
        case "mse":
            loss = weight * jnp.square(error)
    return loss


def categorical_projection(returns: jax.Array, probabilities: jax.Array, support: jax.Array) -> jax.Array:
    """A distribution over arbitrary `returns` as one over the evenly spaced `support`; Bellemare et al. (2017), eq. 7.

    returns, probabilities, support: [N] -> [N]. Returns outside the support go to its ends; the mass is kept.
    """
    chex.assert_rank([returns, probabilities, support], 1)
    spacing = support[1] - support[0]
    distance = jnp.abs(jnp.clip(returns, support[0], support[-1])[:, None] - support[None, :]) / spacing
    return probabilities @ jnp.clip(1 - distance, 0, 1)


def categorical_cross_entropy(
    logits_tm1: jax.Array,
    a_tm1: jax.Array,
    r_t: jax.Array,
    discount_t: jax.Array,
    logits_t_target: jax.Array,
    q_t_selector: jax.Array,
    support: jax.Array,
) -> jax.Array:
    """Cross entropy of projected target and prediction, of one transition; Bellemare et al. (2017), algorithm 1.

    logits_*: [A, N]; q_t_selector: [A]; support: [N]; others () -> (). No gradient through the target.
    """
    chex.assert_rank(
        [logits_tm1, a_tm1, r_t, discount_t, logits_t_target, q_t_selector, support], [2, 0, 0, 0, 2, 1, 1]
    )
    probabilities_t = jax.nn.softmax(logits_t_target[jnp.argmax(q_t_selector)])
    target = categorical_projection(r_t + discount_t * support, probabilities_t, support)
    return -jnp.dot(jax.lax.stop_gradient(target), jax.nn.log_softmax(logits_tm1[a_tm1]))


def epsilon(config: DQN, agent_step: jax.Array | int) -> jax.Array:
    """Probability of a random action after `agent_step` agent steps: linear from the end of the warm-up (Dopamine)."""
    progress = jnp.clip((agent_step - config.warmup) / config.epsilon_decay_steps, 0, 1)
    return config.epsilon_start + progress * (config.epsilon_end - config.epsilon_start)


def epsilon_greedy(key: jax.Array, q_values: jax.Array, epsilon: jax.Array | float) -> jax.Array:
    """Random action with probability `epsilon`, else the first of the best; [B, A] -> [B] int32."""
    explore_key, action_key = jax.random.split(key)
    batch_size, actions = q_values.shape
    random_action = jax.random.randint(action_key, (batch_size,), 0, actions)
    explore = jax.random.uniform(explore_key, (batch_size,)) < epsilon
    return jnp.where(explore, random_action, jnp.argmax(q_values, axis=1))


def augment(config: DQN, key: jax.Array, observation: jax.Array) -> jax.Array:
    """Shift, then brightness on [0, 1], as in Dopamine's DrQ(eps); what the config does not ask for is left out."""
    shift_key, intensity_key = jax.random.split(key)
    if config.random_shift:
        observation = random_shift(shift_key, observation, config.random_shift)
    if config.intensity:
        observation = random_intensity(intensity_key, scale_pixels(observation), config.intensity)
    return observation


def gradient_descent(config: DQN) -> optax.GradientTransformation:
    """The optimizer; RMSprop as in PyTorch: centred, eps beside the root, moments from zero without correction."""
    if config.optimizer == "adam":
        return adam(config.learning_rate, eps=config.adam_eps)
    scale = scale_by_deviation(config.rmsprop_decay, config.rmsprop_eps)
    return optax.chain(scale, optax.scale_by_learning_rate(config.learning_rate))


def scale_by_deviation(decay: float, eps: float) -> optax.GradientTransformation:
    """gradient / (sqrt(E[gradient^2] - E[gradient]^2) + eps), the means running; Graves (2013), eq. 38 to 40.

    Optax's `scale_by_stddev(eps_in_sqrt=False)` but for the maximum with 0: rounding lets the variance of a gradient
    that stands still fall below 0, and its root is then not a number.
    """

    def init(params: PyTree) -> optax.ScaleByRStdDevState:
        return optax.ScaleByRStdDevState(mu=optax.tree.zeros_like(params), nu=optax.tree.zeros_like(params))

    def update(
        gradient: PyTree, state: optax.ScaleByRStdDevState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByRStdDevState]:
        mu = optax.incremental_update(gradient, state.mu, 1 - decay)
        nu = optax.incremental_update(jax.tree.map(jnp.square, gradient), state.nu, 1 - decay)

        def divided(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            return g / (jnp.sqrt(jnp.maximum(v - jnp.square(m), 0)) + eps)

        return jax.tree.map(divided, gradient, mu, nu), optax.ScaleByRStdDevState(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def where_due(due: jax.Array, new: Callable[[], PyTree], old: PyTree) -> PyTree:
    """`new()` where `due` () bool, else `old`.

    On a CPU by a condition, so that nothing is computed in vain. An accelerator's program stops at a condition until the host
    has read it; a choice between both has no such pause.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.cond(due, new, lambda: old)
    return jax.tree.map(partial(jnp.where, due), new(), old)


def _build(config: DQN, network: QNetwork, observation_shape: tuple[int, ...], wrap: Wrap) -> Agent:
    clip = optax.identity() if config.max_grad_norm is None else optax.clip_by_global_norm(config.max_grad_norm)
    support = jnp.linspace(config.v_min, config.v_max, config.atoms)
    categorical = config.distribution == "c51"
    # A copy after every gradient step is the online network: a second one would only cost memory and time.
    has_target = config.target_period > 1 or config.tau < 1

    def values(outputs: jax.Array) -> jax.Array:
        return jax.nn.softmax(outputs) @ support if categorical else outputs

    def target_values(state: DQNState, next_observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Outputs to bootstrap from, [B, A, ...], and the values that choose among their actions, [B, A]."""
        critic = state.critic
        outputs_t = apply(critic.target_params if has_target else critic.params, next_observation)
        double = config.double and has_target
        return outputs_t, values(apply(critic.params, next_observation) if double else outputs_t)

    def losses(
        outputs_tm1: jax.Array, outputs_t: jax.Array, q_t_selector: jax.Array, batch: Batch
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Loss, priority and temporal-difference error of every transition, all [B]."""
        transition = (batch.action, batch.reward, batch.discount)
        error = jax.vmap(td_error)(values(outputs_tm1), *transition, values(outputs_t), q_t_selector)
        if not categorical:
            return td_loss(config, error, batch.weight), jnp.abs(error), error
        cross_entropy = jax.vmap(partial(categorical_cross_entropy, support=support))
        priority = cross_entropy(outputs_tm1, *transition, outputs_t, q_t_selector)
        return batch.weight * priority, priority, error

    def loss_of(outputs: jax.Array, state: DQNState, batch: Batch, key: jax.Array) -> jax.Array:
        next_observation = augment(config, jax.random.split(key)[1], batch.next_observation)
        return jnp.mean(losses(outputs, *target_values(state, next_observation), batch)[0])

    plain = Network(
        init=lambda key: network.init(key, jnp.zeros((1, *observation_shape))),
        apply=network.apply,
        inputs=lambda batch: (batch.observation,),
        loss=loss_of,
        values=values,
    )
    critic_network, tx = wrap("critic", plain, optax.chain(clip, gradient_descent(config)))
    apply = cast(Callable[[PyTree, jax.Array], jax.Array], critic_network.apply)

    def init(key: jax.Array) -> DQNState:
        params = critic_network.init(key)
        target_params = jax.tree.map(jnp.copy, params) if has_target else None
        return DQNState(Learner(params, target_params, tx.init(params)), jnp.zeros((), jnp.int32))

    def greedy(state: DQNState, observation: jax.Array, key: jax.Array, epsilon: jax.Array | float) -> jax.Array:
        return epsilon_greedy(key, values(apply(state.critic.params, observation)), epsilon)

    def act(
        state: DQNState, observation: jax.Array, key: jax.Array, agent_step: jax.Array | int | None = None
    ) -> jax.Array:
        return greedy(
            state, observation, key, config.epsilon_end if agent_step is None else epsilon(config, agent_step)
        )

    def exploit(state: DQNState, observation: jax.Array, key: jax.Array) -> jax.Array:
        return greedy(state, observation, key, config.epsilon_eval)

    def update(state: DQNState, batch: Batch, key: jax.Array) -> tuple[DQNState, Metrics, jax.Array]:
        critic = state.critic
        observation_key, next_key = jax.random.split(key)
        observation = augment(config, observation_key, batch.observation)
        next_observation = augment(config, next_key, batch.next_observation)
        outputs_t, q_t_selector = target_values(state, next_observation)

        def loss_function(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            outputs_tm1 = apply(params, observation)
            loss, priority, error = losses(outputs_tm1, outputs_t, q_t_selector, batch)
            q = jax.vmap(operator.getitem)(values(outputs_tm1), batch.action)
            return jnp.mean(loss), (priority, error, q)

        (loss, (priority, error, q)), gradient = jax.value_and_grad(loss_function, has_aux=True)(critic.params)
        critic = descend(critic, gradient, tx, (observation,), key)
        gradient_step = state.gradient_step + 1
        if has_target:
            target_params = where_due(
                gradient_step % config.target_period == 0,
                lambda: optax.incremental_update(critic.params, critic.target_params, config.tau),
                critic.target_params,
            )
            critic = critic.replace(target_params=target_params)
        metrics = {
            "critic/loss": loss,
            "critic/q_mean": q.mean(),
            "critic/target_mean": (q + error).mean(),
            "critic/td_error_abs": jnp.abs(error).mean(),
            "critic/grad_norm": optax.tree.norm(gradient),
        }
        return DQNState(critic, gradient_step), metrics, priority

    return Agent(init, act, exploit, update, {"critic": critic_network})
