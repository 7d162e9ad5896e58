"""Agents: frozen configurations whose `build` gives pure functions over an immutable state."""

from .dqn import DQN, DQNState
from .learner import Agent, Batch, Learner, Spec
from .sac import SAC, SACState

__all__ = ["DQN", "SAC", "Agent", "Batch", "DQNState", "Learner", "SACState", "Spec"]
