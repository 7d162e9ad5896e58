"""Agents: frozen configurations whose `build` gives pure functions over an immutable state."""

from .ace import ACE, ACEState
from .dqn import DQN, DQNState
from .learner import Agent, Batch, Learner, Refit, Spec
from .sac import SAC, SACState

__all__ = ["ACE", "DQN", "SAC", "ACEState", "Agent", "Batch", "DQNState", "Learner", "Refit", "SACState", "Spec"]
