"""The one entry point: an environment by its id."""

import difflib
import importlib
from types import ModuleType

from .atari import ATARI_PROTOCOLS
from .interface import Env, EnvError

# Family -> the module behind it and the package that one needs; imported when asked for, for each takes seconds.
BACKENDS = {
    "atari": ("envpool_", "envpool"),
    "mujoco": ("envpool_", "envpool"),
    "dmc": ("envpool_", "envpool"),
    "dmc-pixels": ("dmcontrol_", "dm-control"),
    "metaworld": ("envpool_", "envpool"),
    "robotics": ("envpool_", "envpool"),
    "myosuite": ("envpool_", "envpool"),
    "minatar": ("gymnax_", "gymnax"),
    "gymnax": ("gymnax_", "gymnax"),
    "changing": ("changing_", "gymnax"),
    "gym": ("gymnasium_", "gymnasium"),
}


def make(
    env_id: str,
    num_envs: int = 1,
    seed: int = 0,
    *,
    protocol: str | None = None,
    training: bool = True,
    render: bool = False,
) -> Env:
    """`num_envs` environments stepped together, to be `reset` before anything else.

    env_id: atari/Breakout, mujoco/HalfCheetah-v5, dmc/walker-run, dmc-pixels/walker-run, metaworld/hammer,
        robotics/HandReach-v3, myosuite/myoElbowPose1D6MRandom-v0, minatar/Breakout, gymnax/CartPole-v1,
        changing/minatar-cycle@50000 or gym/ANY-ID.
    seed: what `reset()` starts from when called without one.
    protocol: a name of `ATARI_PROTOCOLS`, for atari/* alone; `dopamine` if None.
    training: False for evaluation, where a lost life never ends an episode.
    render: whether `render` will be called.
    Raises EnvError, in one line, for whatever cannot be given.
    """
    family, _, name = env_id.partition("/")
    if family not in BACKENDS or not name:
        raise EnvError(f"{env_id}: no such family of environments; ids are {', '.join(f'{f}/NAME' for f in BACKENDS)}")
    if num_envs < 1:
        raise EnvError(f"{env_id}: num_envs must be at least 1, not {num_envs}")
    if seed < 0:
        raise EnvError(f"{env_id}: the seed must not be negative, and is {seed}")
    if protocol is not None and family != "atari":
        raise EnvError(f"{env_id}: protocols are for atari/* alone, so {protocol} does not apply")
    if protocol is not None and protocol not in ATARI_PROTOCOLS:
        raise EnvError(f"{env_id}: no protocol {protocol}; there are {', '.join(ATARI_PROTOCOLS)}")
    backend = _backend(family)
    bare = name.partition("@")[0] if family == "changing" else name  # behind it stands a period
    if bare not in backend.names(family) and not (family == "gym" and ":" in name):
        raise EnvError(f"{env_id}: no such environment; {_nearest(family, name, list(backend.names(family)))}")
    env: Env = backend.make(env_id, family, name, num_envs, seed, protocol, training, render)
    return env


def list_envs() -> dict[str, list[str]]:
    """Family -> the ids that the installed packages know; takes seconds, for it imports them all.

    A few of gym/* (Box2D's) want one more package, which `make` then names.
    """
    ids = {}
    for family in BACKENDS:
        try:
            ids[family] = sorted(f"{family}/{name}" for name in _backend(family).names(family))
        except EnvError:
            ids[family] = []
    return ids


def _backend(family: str) -> ModuleType:
    module, package = BACKENDS[family]
    try:
        return importlib.import_module(f".{module}", __package__)
    except ImportError as error:
        raise EnvError(f"{family}/* needs the package {package}: pip install {package} ({error})") from error


def _nearest(family: str, name: str, known: list[str]) -> str:
    if family == "gym" and name.startswith("Panda"):
        return "Panda-gym, the extra panda, is not installed, or has no such one"
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=4, cutoff=0.5)
    if not close:
        return "`resprout list envs` names all"
    return "nearest: " + ", ".join(f"{family}/{by_lower[candidate]}" for candidate in close)
