"""Environments behind one interface."""

from .atari import ATARI_PROTOCOLS, AtariProtocol
from .interface import Env, EnvError, EnvSpec, Step, step_together
from .jax_ import JaxEnv
from .make import list_envs, make

__all__ = [
    "ATARI_PROTOCOLS",
    "AtariProtocol",
    "Env",
    "EnvError",
    "EnvSpec",
    "JaxEnv",
    "Step",
    "list_envs",
    "make",
    "step_together",
]
