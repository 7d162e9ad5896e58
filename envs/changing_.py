"""Environments whose task changes while an agent learns, after a period, without end.

    changing/minatar-cycle          three games of MinAtar in turn
    changing/Breakout-permuted      one game, its channels in another order each time
    changing/CartPole-physics       classic control under other gravity, force or torque
    changing/Hopper-physics         MuJoCo under other friction or gravity

The period stands behind @, in steps of each environment: changing/minatar-cycle@20000; 50,000 where it is not given.
A change cuts the episode (truncated). The task is hidden, or shown in the observation by names that end in -signalled.
An environment begins with its first task, one for evaluation too: what an agent does on the others are its returns in training.
"""

import functools

from .interface import Env, EnvError

PERIOD = 50_000
SIGNALLED = "-signalled"
MUJOCO = {f"{body}-physics": f"{body}-v5" for body in ("Hopper", "HalfCheetah", "Walker2d", "Ant")}


@functools.cache
def names(family: str) -> dict[str, str]:
    """What may follow "changing/", without a period -> the task of which it is the hidden or signalled form."""
    from .changing_jax import TASKS

    return {name + end: name for name in (*TASKS, *MUJOCO) for end in ("", SIGNALLED)}


def parse(env_id: str) -> tuple[str, int]:
    """Name and period of changing/NAME@PERIOD. EnvError if the period is none."""
    bare, at, text = env_id.partition("/")[2].partition("@")
    if at and not (text.isdecimal() and 0 < int(text) < 2**31):
        raise EnvError(f"{env_id}: behind @ stands the period, a number of steps such as {bare}@{PERIOD}, below 2^31")
    return bare, int(text) if at else PERIOD


@functools.cache
def sequence(env_id: str) -> tuple[str, ...]:
    """What the tasks of changing/NAME are called, in their order."""
    task = names("changing")[parse(env_id)[0]]
    if task in MUJOCO:
        from .changing_mujoco import NAMES

        return NAMES
    from .changing_jax import TASKS

    return tuple(each.name for each in TASKS[task]())


def make(
    env_id: str, family: str, name: str, num_envs: int, seed: int, protocol: str | None, training: bool, render: bool
) -> Env:
    """One of `names`, with a period; `protocol` and `training` do not apply."""
    bare, period = parse(env_id)
    task, signalled = names(family)[bare], bare.endswith(SIGNALLED)
    if task in MUJOCO:
        from .changing_mujoco import ChangingMujoco

        return ChangingMujoco(env_id, MUJOCO[task], period, signalled, num_envs, seed, render)
    from .gymnax_ import GymnaxEnv

    return GymnaxEnv(env_id, (task, period, signalled), num_envs, seed)
