"""Agents: frozen configurations whose `build` gives pure functions over an immutable state."""

from .ace import ACE, ACEState
from .dqn import DQN, DQNState
from .drm import DrM, DrMState
from .drqv2 import DrQv2, DrQv2State
from .learner import Agent, Batch, Learner, Network, Refit, Spec
from .sac import SAC, SACState

__all__ = [
    "ACE",
    "DQN",
    "SAC",
    "ACEState",
    "Agent",
    "Batch",
    "DQNState",
    "DrM",
    "DrMState",
    "DrQv2",
    "DrQv2State",
    "Learner",
    "Network",
    "Refit",
    "SACState",
    "Spec",
]
