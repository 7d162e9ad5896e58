"""ACE: soft actor-critic whose entropy counts more in those dimensions of the action that move the reward."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from .causal import Mode, Sign, causal_weights
from .learner import Agent, Batch, Learner, Metrics, PyTree, Refit, Spec, Wrap, as_given, require
from .networks import Initialiser
from .sac import SAC, Parts, SACState, build_parts

POLICY_METRICS = ("actor/loss", "actor/entropy", "actor/grad_norm", "temperature/alpha")


@dataclass(frozen=True)
class ACE(SAC):
    """SAC with the entropy of each action dimension weighted by its causal effect; Ji et al. (2024, arXiv 2402.14528).

    The log density of an action is sum_i w_i log pi(a_i | s) in the critics' target, the actor's loss and the temperature's;
    acting is unchanged. w, mean 1, is `causal.causal_weights` of the newest transitions and 1 before the first fit.
    The dormancy-guided reset is an intervention, dormancy_perturb:of=actor, which the presets ace_mujoco and ace_small have.

    Defaults are those of the authors' code, but: the warm-up learns nothing, the temperature starts at 1 (theirs is 0.2 for
    the first gradient step), errors are halved in the critics' loss, and tanh's derivative is exact (theirs has 1e-6 added).
    """

    hidden: tuple[int, ...] = (1024, 1024, 1024)  # units of the hidden layers, of actor and critics alike
    activation: str = "elu+relu+relu"  # of the hidden layers in turn, the last of all further ones
    initialiser: Initialiser = "xavier"  # of every kernel
    batch_size: int = 512  # transitions
    separate_heads: bool = True  # mean and log std come from layers of their own, not from the halves of one
    target_update_interval: int = 2  # gradient steps of the critics to each of actor, temperature and target critics
    causal_mode: Mode = "sink"  # the reward causes nothing (sink), or DirectLiNGAM orders all columns, slowly (full)
    causal_sign: Sign = "signed"  # absolute: what lowers the reward weighs as much as what raises it
    causal_temperature: float = 1.0  # of the softmax over effects, in reward per unit of action; large: equal weights
    causal_refit: bool = False  # effects by least squares on the columns kept, not by the adaptive lasso itself
    causal_every: int = 10_000  # agent steps between fits; 0: never, the weights stay 1
    causal_rows: int = 10_000  # newest transitions that a fit reads
    causal_delay: int = 100  # agent steps from a fit to when its weights count; 0 waits for it, as their code

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.n_step == 1, "n_step", self.n_step, "1: what an action causes is read from its own reward")
        for name, wanted in (("target_update_interval", 1), ("causal_every", 0), ("causal_rows", 1)):
            require(getattr(self, name) >= wanted, name, getattr(self, name), f"at least {wanted}")
        require(self.causal_temperature > 0, "causal_temperature", self.causal_temperature, "positive")
        for name, choices in (("causal_mode", get_args(Mode)), ("causal_sign", get_args(Sign))):
            require(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")
        if self.causal_every:
            delay, every = self.causal_delay, self.causal_every
            require(0 <= delay < every, "causal_delay", delay, f"zero or more and below causal_every = {every}")
            rows = self.causal_rows
            require(rows <= self.capacity, "causal_rows", rows, f"at most the replay's capacity of {self.capacity}")

    def build(self, spec: Spec, wrap: Wrap = as_given) -> Agent:
        """Pure functions for this environment; ValueError in one line where the two do not fit."""
        parts = build_parts(
            self, spec, wrap, density_weight=lambda state: state.causal_weights, separate_heads=self.separate_heads
        )
        columns = spec.observation_shape[0] + spec.action_size
        if self.causal_every:
            wanted = f"at least {columns + 2}, for the {columns} states and actions of {spec.id}"
            require(self.causal_rows >= columns + 2, "causal_rows", self.causal_rows, wanted)

        def init(key: jax.Array) -> ACEState:
            state = parts.init(key)
            return ACEState(
                actor=state.actor,
                critic=state.critic,
                temperature=state.temperature,
                gradient_step=state.gradient_step,
                causal_weights=jnp.ones(spec.action_size),
                policy_metrics=jnp.zeros(len(POLICY_METRICS)),
            )

        def update(state: ACEState, batch: Batch, key: jax.Array) -> tuple[ACEState, Metrics, jax.Array]:
            return _update(parts, self.target_update_interval, state, batch, key)

        refit = _refit(self) if self.causal_every else None
        return Agent(init, parts.act, parts.exploit, update, parts.networks, refit, self.target_update_interval)


class ACEState(SACState):
    causal_weights: jax.Array  # [A] float32, mean 1
    policy_metrics: jax.Array  # [POLICY_METRICS] of the last gradient step that the actor took part in


def _update(
    parts: Parts, interval: int, state: ACEState, batch: Batch, key: jax.Array
) -> tuple[ACEState, Metrics, jax.Array]:
    critic_key, policy_key = jax.random.split(key)
    state, critic_metrics, priorities = parts.update_critic(state, batch, critic_key)

    # Only what changes goes through the condition: the critics' moments, say, are not copied.
    def kept(state: ACEState) -> tuple[Learner, Learner, PyTree, jax.Array]:
        return state.actor, state.temperature, state.critic.target_params, state.policy_metrics

    def learnt(state: ACEState) -> tuple[Learner, Learner, PyTree, jax.Array]:
        after, metrics = parts.update_policy(state, batch, policy_key)
        return kept(after.replace(policy_metrics=jnp.stack([metrics[name] for name in POLICY_METRICS])))

    due = state.gradient_step % interval == 0
    changed = learnt(state) if interval == 1 else jax.lax.cond(due, learnt, kept, state)
    actor, temperature, target_params, policy_metrics = changed
    state = state.replace(
        actor=actor,
        critic=state.critic.replace(target_params=target_params),
        temperature=temperature,
        gradient_step=state.gradient_step + 1,
        policy_metrics=policy_metrics,
    )
    return state, critic_metrics | dict(zip(POLICY_METRICS, policy_metrics, strict=True)), priorities


def _refit(config: ACE) -> Refit:
    """The causal weights, from transitions with actions in [-1, 1] and rewards as the replay has them."""

    def fit(columns: Mapping[str, Any]) -> NDArray[np.float32]:
        weights = causal_weights(
            columns["observation"],
            columns["action"],
            columns["reward"],
            config.causal_mode,
            temperature=config.causal_temperature,
            sign=config.causal_sign,
            refit=config.causal_refit,
        )
        return weights.astype(np.float32)

    def enter(state: PyTree, weights: Any) -> PyTree:
        return cast(ACEState, state).replace(causal_weights=jnp.asarray(weights))

    def describe(weights: Any) -> dict[str, float]:
        return {f"causal/weight_{i}": float(weight) for i, weight in enumerate(weights)}

    return Refit(config.causal_every, config.causal_rows, config.causal_delay, fit, enter, describe)
