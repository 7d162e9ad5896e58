"""Environments behind one interface."""

from .atari import ATARI_PROTOCOLS, AtariProtocol
from .interface import Env, EnvError, EnvSpec, Step
from .make import list_envs, make

__all__ = ["ATARI_PROTOCOLS", "AtariProtocol", "Env", "EnvError", "EnvSpec", "Step", "list_envs", "make"]
