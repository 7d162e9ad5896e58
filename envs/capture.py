"""The state of a Gymnasium environment as plain arrays: attribute by attribute, wrapper by wrapper, without pickle."""

import enum
import json
import math
import types
from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

# Attributes and types that do not change while an environment runs: how it was made, and what draws it.
STATIC_NAMES = {
    "env",
    "spec",
    "metadata",
    "_metadata",
    "_cached_spec",
    "_saved_kwargs",
    "_ezpickle_args",
    "_ezpickle_kwargs",
}
STATIC_TYPES = (type, types.ModuleType, types.FunctionType, types.MethodType, partial)
COMPOSITE_SPACES = (spaces.Dict, spaces.Tuple, spaces.Sequence, spaces.Graph, spaces.OneOf)
STATIC_PACKAGES = ("pygame", "gymnasium.envs.mujoco.mujoco_rendering")


class UnknownStateError(Exception):
    """An attribute that may hold state and cannot be read as numbers."""


Functions = list[list[dict[str, Any]]]  # of each environment and layer, by attribute


def functions(environments: Sequence[gymnasium.Env[Any, Any]]) -> Functions:
    """The functions, classes and modules that are attributes now, for `capture` to see whether one has changed since."""
    return [[_functions(layer) for layer in _layers(environment)] for environment in environments]


def capture(environments: Sequence[gymnasium.Env[Any, Any]], made: Functions) -> dict[str, NDArray[np.uint8]]:
    """State of all `environments`: "structure", JSON text, and "data", the bytes of all arrays that it refers to.

    Numbers, strings, arrays, tuples, lists and dicts of them, and NumPy generators are read as they are; MuJoCo's and
    ALE's states through their own calls. Renderers count as static, and functions that are still those of `made`, the
    `functions` of the environments as they were made. What it cannot see: state outside the instances (of a class, a module, a
    closure), and that two attributes are views of one array. Raises UnknownStateError, which names what stands in the way.
    """
    data = bytearray()
    structure = []
    for environment, firsts in zip(environments, made, strict=True):
        layers = []
        for layer, first in zip(_layers(environment), firsts, strict=True):
            now = _functions(layer)
            if changed := [name for name in first | now if first.get(name) is not now.get(name)]:
                raise UnknownStateError(f"{type(layer).__name__}: another function became its {changed[0]}")
            try:
                layers.append({name: _encode(value, data) for name, value in _attributes(layer).items()})
            except UnknownStateError as error:
                raise UnknownStateError(f"{type(layer).__name__}: {error}") from None
        structure.append(layers)
    return _as_arrays(structure, data)


def restore(environments: Sequence[gymnasium.Env[Any, Any]], captured: dict[str, NDArray[np.uint8]]) -> None:
    """Bring environments that were made like the captured ones into the captured state."""
    structure = json.loads(captured["structure"].tobytes())
    data = captured["data"].tobytes()
    for environment, layers in zip(environments, structure, strict=True):
        for layer, nodes in zip(_layers(environment), layers, strict=True):
            attributes = _attributes(layer)
            for name in attributes.keys() - nodes.keys():
                if not _is_static(attributes[name]):
                    delattr(layer, name)
            for name, node in nodes.items():
                setattr(layer, name, _decode(node, data, getattr(layer, name, None)))


def pack(value: Any) -> dict[str, NDArray[np.uint8]]:
    """As `capture`, of anything that it can read."""
    data = bytearray()
    return _as_arrays(_encode(value, data), data)


def unpack(packed: dict[str, NDArray[np.uint8]], current: Any) -> Any:
    """What was packed; generators, MuJoCo's and ALE's states are set inside `current`, which was made like it."""
    return _decode(json.loads(packed["structure"].tobytes()), packed["data"].tobytes(), current)


def _as_arrays(structure: Any, data: bytearray) -> dict[str, NDArray[np.uint8]]:
    text = json.dumps(structure).encode()
    return {"structure": np.frombuffer(text, np.uint8), "data": np.frombuffer(bytes(data), np.uint8)}


def _layers(environment: gymnasium.Env[Any, Any]) -> list[gymnasium.Env[Any, Any]]:
    layers = [environment]
    while isinstance(layers[-1], gymnasium.Wrapper):
        layers.append(layers[-1].env)
    return layers


def _attributes(layer: gymnasium.Env[Any, Any]) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if name not in STATIC_NAMES}


def _functions(layer: gymnasium.Env[Any, Any]) -> dict[str, Any]:
    return {name: value for name, value in _attributes(layer).items() if isinstance(value, STATIC_TYPES)}


def _is_static(value: Any) -> bool:
    return isinstance(value, STATIC_TYPES) or type(value).__module__.startswith(STATIC_PACKAGES)


def _encode(value: Any, data: bytearray) -> Any:
    """A JSON value: null, bool, number and string stand for themselves, all else is [kind, ...]."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, enum.Enum):
        return ["enum", value.name]
    if isinstance(value, gymnasium.Space):
        if value._np_random is not None and isinstance(value, COMPOSITE_SPACES):
            raise UnknownStateError("cannot read the generators inside a composite space")
        return ["space", _encode(value._np_random, data)]
    if _is_static(value):
        return ["static"]
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return ["array" if isinstance(value, np.ndarray) else "scalar", _stored(np.asarray(value), data)]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_encode(item, data) for item in value]]
    if type(value) is dict:
        return ["dict", [[_encode(key, data), _encode(item, data)] for key, item in value.items()]]
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return ["generator", type(bits).__name__, _encode(bits.state, data)]
    if isinstance(value, np.random.RandomState):
        return ["random_state", _encode(value.get_state(legacy=False), data)]
    match type(value).__name__:
        case "MjModel":
            arrays = _plain_arrays(value)
            arrays.pop("tex_data", None)  # pictures: megabytes that nothing changes
            return ["model", {name: _stored(array, data) for name, array in arrays.items()}]
        case "MjData":
            return ["mujoco", {name: _stored(array, data) for name, array in _mujoco_arrays(value).items()}]
        case "ALEInterface":
            state = value.cloneState(include_rng=True).serialize()
            return ["ale", _stored(np.frombuffer(state, np.uint8), data)]
    raise UnknownStateError(f"cannot read a {type(value).__module__}.{type(value).__qualname__}")


def _decode(node: Any, data: bytes, current: Any) -> Any:
    """The value of a node. Generators, MuJoCo's and ALE's states are set inside `current`, which may be shared."""
    match node:
        case ["static"]:
            return current
        case ["array", place]:
            return _loaded(place, data)
        case ["scalar", place]:
            return _loaded(place, data)[()]
        case ["list" | "tuple" as kind, items]:
            if not isinstance(current, list | tuple) or len(current) != len(items):
                current = [None] * len(items)
            values = [_decode(item, data, old) for item, old in zip(items, current, strict=True)]
            return values if kind == "list" else tuple(values)
        case ["dict", items]:
            old = current if isinstance(current, dict) else {}
            pairs = [(_decode(key, data, None), item) for key, item in items]
            return {key: _decode(item, data, old.get(key)) for key, item in pairs}
        case ["generator", bits, state]:
            if not isinstance(current, np.random.Generator) or type(current.bit_generator).__name__ != bits:
                kinds = {kind.__name__: kind for kind in np.random.BitGenerator.__subclasses__()}
                current = np.random.Generator(kinds[bits]())
            current.bit_generator.state = _decode(state, data, None)
            return current
        case ["random_state", state]:
            current.set_state(_decode(state, data, None))
            return current
        case ["enum", name]:
            return type(current)[name]
        case ["space", generator]:
            current._np_random = _decode(generator, data, current._np_random)
            return current
        case ["model", places]:
            for name, place in places.items():
                getattr(current, name)[...] = _loaded(place, data)
            return current
        case ["mujoco", places]:
            _restore_mujoco(current, {name: _loaded(place, data) for name, place in places.items()})
            return current
        case ["ale", place]:
            import ale_py

            ale_state: Any = ale_py.ALEState.__new__(
                ale_py.ALEState
            )  # its __setstate__ wants an object without a state
            ale_state.__setstate__(_loaded(place, data).tobytes())
            current.restoreState(ale_state)
            return current
    return node


def _stored(array: NDArray[Any], data: bytearray) -> list[Any]:
    """Where `array` now lies in `data`: offset, dtype, shape."""
    place = [len(data), array.dtype.str, list(array.shape)]
    data += array.tobytes()
    return place


def _loaded(place: list[Any], data: bytes) -> NDArray[Any]:
    offset, dtype, shape = place
    return np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape).copy()


def _mujoco_arrays(data: Any) -> dict[str, NDArray[Any]]:
    """MuJoCo's integration state, and all it derived: some rewards read positions from before the next step."""
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(data.model, kind), np.float64)
    mujoco.mj_getState(data.model, data, state, kind)
    return {"integration": state} | _plain_arrays(data)


def _plain_arrays(record: Any) -> dict[str, NDArray[Any]]:
    values = {name: getattr(record, name) for name in dir(record) if not name.startswith("_")}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def _restore_mujoco(data: Any, saved: dict[str, NDArray[Any]]) -> None:
    import mujoco

    mujoco.mj_setState(data.model, data, saved["integration"], mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_forward(data.model, data)
    for name, array in saved.items():
        target = getattr(data, name, None)
        # Contacts and constraints change in number and are found anew at the next step, so they need not fit.
        if isinstance(target, np.ndarray) and target.shape == array.shape:
            target[...] = array
