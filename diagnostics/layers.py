"""The layer graph: for every hidden unit the parameter entries that feed it, those that it feeds, and its activation."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval
from numpy.typing import NDArray

from .labels import (
    BIAS,
    KERNEL,
    NONE,
    SCALE,
    Data,
    Integers,
    LayerGraphError,
    Path,
    Shape,
    Site,
    Trace,
    bind,
    called,
    compact,
)

PyTree = Any
Owners = dict[str, Integers]  # leaf of the parameters -> unit of the layer to which each entry belongs, -1 for none


class UnitMasks(NamedTuple):
    """PyTrees of bool with the structure and shapes of the parameters: the entries of some units."""

    incoming: PyTree  # of the kernel that makes the unit
    bias: PyTree  # added to it alone
    scale: PyTree  # that enter it alone in another way, as a norm's scale
    outgoing: PyTree  # of every kernel, which read it alone


@dataclass(frozen=True, eq=False)
class Layer:
    """The hidden units that one kernel makes, numbered in the C order of `shape`.

    Where it is isolated, a unit whose activation is 0 leaves every output as it is, to the bit, whatever its outgoing
    entries are; and a unit whose outgoing entries are 0 does so whatever its other entries are. Where it is not, one
    of the two fails: the unit is normalised, added to others, shares its weights or is read in another way.

    Owners name entries by leaf ("params/Dense_0/kernel") and broadcast to the leaf: `incoming` of a dense kernel is
    [[0, 1, 2, ...]], and `outgoing` of the one behind a channel-last flatten [[0], [1], ..., [0], [1], ...].
    """

    name: str  # path of the kernel's module, "torso/Conv_1", or of the kernel itself
    shape: Shape  # (units,), or (members, units) where the kernel holds the members of an ensemble along its first axes
    reasons: tuple[str, ...]  # why it is not isolated; none if it is
    incoming: Owners  # as in UnitMasks
    bias: Owners
    scale: Owners
    outgoing: Owners

    @property
    def isolated(self) -> bool:
        return not self.reasons

    @property
    def reason(self) -> str:
        """The first; empty if it is isolated."""
        return self.reasons[0] if self.reasons else ""

    @property
    def normalised_only(self) -> bool:
        """Not isolated because of a norm alone, behind which it has entries of its own: they are all that reads it."""
        of_norm = ("mixes it with other values", "may make it other than zero where its inputs are silent")
        alone = all(any(kind in reason for kind in of_norm) for reason in self.reasons)
        return bool(self.reasons and self.scale and self.outgoing) and alone

    @property
    def units(self) -> int:
        """Number of units, over all members."""
        return prod(self.shape)


class Reading(NamedTuple):
    """Where a layer's activations stand among the values computed."""

    sites: tuple[Site, ...]
    shapes: tuple[Shape, ...]  # of the values there
    axes: tuple[int | None, ...]  # along which their examples lie; None: they are all of one
    places: NDArray[np.int64]  # [values per example, units]: places among the values of one example, site after site
    shape: Shape  # of the layer


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """What `layer_graph` found. Everything here works under jit, grad and vmap."""

    layers: tuple[Layer, ...]  # hidden layers, in the order in which they are computed
    heads: tuple[str, ...]  # names of the layers that no other reads: their units make the outputs
    _apply: Callable[..., Any]
    _fingerprint: tuple[Any, ...]
    _readings: dict[str, Reading]
    _treedef: Any
    _shapes: tuple[Shape, ...]
    _owners: tuple[tuple[Integers, ...], ...]  # for each field of UnitMasks and each leaf: units over all layers, or -1

    def __getitem__(self, name: str) -> Layer:
        """The hidden layer of that name; KeyError names those there are."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name}: there are {', '.join(layer.name for layer in self.layers)}")

    def activations(self, params: PyTree, *inputs: Any) -> dict[str, jax.Array]:
        """What the contractions that read each layer are given, before it is moved or max-pooled: name -> [B, *shape].

        [B, n, *shape] where a unit has n values per example: the places of a convolution, or several activation
        functions (CReLU); 0 for a unit that nothing reads. Costs one evaluation of the function. The number of examples
        may differ from the graph's; LayerGraphError where other shapes or operations do.
        """
        return self._run(params, inputs, {})[1]

    def perturbed(self, params: PyTree, offsets: Mapping[str, jax.Array], *inputs: Any) -> Any:
        """Outputs of the function when `offsets`, in the form of `activations`, are added to the activations.

        At zero offsets they are the function's own, and the gradient by the offsets is that by the activations.
        """
        return self._run(params, inputs, offsets)[0]

    def masks(self, units: Mapping[str, jax.Array]) -> UnitMasks:
        """The entries of the units that are chosen: name -> bool [*shape]; of layers not named, none.

        KeyError names a layer that is none. Entries of layers that are not isolated are masked as those of others.
        """
        for name in units:
            self[name]
        chosen = [
            jnp.broadcast_to(jnp.asarray(units.get(layer.name, False), bool), layer.shape).ravel()
            for layer in self.layers
        ]
        flat = jnp.concatenate([*chosen, jnp.zeros(1, bool)])  # the last stands for the entries of no unit, -1
        return UnitMasks(
            *(
                self._treedef.unflatten(
                    [jnp.broadcast_to(flat[owner], shape) for owner, shape in zip(owners, self._shapes, strict=True)]
                )
                for owners in self._owners
            )
        )

    def _run(
        self, params: PyTree, inputs: tuple[Any, ...], offsets: Mapping[str, jax.Array]
    ) -> tuple[Any, dict[str, jax.Array]]:
        jaxpr, consts, out_tree = _traced(self._apply, params, inputs)
        if _fingerprint(jaxpr) != self._fingerprint:
            raise LayerGraphError("the function does other operations on these inputs than on those of the graph")
        for name in offsets:
            self[name]
        values: dict[Site, jax.Array] = {}

        def visit(site: Site, value: jax.Array) -> jax.Array:
            for name, reading in self._readings.items():
                if site in reading.sites:
                    values[site] = value
                    if name in offsets:
                        value = _offset(reading, reading.sites.index(site), value, offsets[name])
            return value

        sites = {site for reading in self._readings.values() for site in reading.sites}
        outputs = _replay(jaxpr, consts, jax.tree.leaves((params, inputs)), sites, visit)
        return out_tree.unflatten(outputs), {
            name: _read(reading, [values[site] for site in reading.sites]) for name, reading in self._readings.items()
        }


def leaf_name(path: tuple[Any, ...]) -> str:
    """ "params/torso/Conv_1/kernel", of a leaf of the parameters. flax.nnx has each as the value of a variable, which is its name."""
    named = path[:-1] if path[-1:] == (jax.tree_util.GetAttrKey("value"),) else path
    return jax.tree_util.keystr(named, simple=True, separator="/")


def check_inputs(inputs: Any) -> None:
    """TypeError for a bare array, whose rows would be taken for as many arguments of the network."""
    if not isinstance(inputs, tuple | list):
        raise TypeError(
            f"inputs must be a tuple of what the network is called with, as (x,), not {type(inputs).__name__}"
        )


def layer_graph(apply_fn: Callable[..., Any], params: PyTree, *inputs: Any) -> LayerGraph:
    """The hidden units of `apply_fn(params, *inputs)`, found by following them through its jaxpr.

    params: any PyTree of arrays; inputs: PyTrees of arrays. Both may be jax.ShapeDtypeStruct, and one example is
    enough: nothing is computed. `apply_fn` may return any PyTree.

    A unit is a column of a kernel, by which is meant a parameter (moved, cast, or scaled by other parameters or by
    constants) that a dot_general or conv_general_dilated contracts. A kernel used again in the same way makes the same
    units. Its activation is the last value computed of it before the contractions that read it. What nothing reads is
    not seen: an output that `apply_fn` does not return, or an entry that belongs to several units.

    LayerGraphError names the operation where units or parameters meet one that is not followed: loops, conditions, the
    contraction of a kernel that is computed (noisy, standardised, chosen by data), and any primitive not known here.
    Products of units with units (attention) are followed no further, and their layers not isolated.
    """
    jaxpr, consts, _ = _traced(apply_fn, params, inputs)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [leaf_name(path) for path, _ in leaves]
    shapes = tuple(tuple(np.shape(leaf)) for _, leaf in leaves)
    trace = Trace(dict(zip(paths, shapes, strict=True)))
    with jax.ensure_compile_time_eval():
        arguments = [*trace.parameters(), *(Data() for _ in jaxpr.invars[len(leaves) :])]
        incoming, outgoing = trace.finish(trace.run(jaxpr, consts, arguments))

    hidden = trace.hidden()
    counts = {index: len(trace.groups[index].columns) for index in hidden}
    first = dict(zip(counts, np.cumsum([0, *counts.values()]).tolist(), strict=False))
    number = np.full(sum(len(group.columns) for group in trace.groups) + 1, NONE, np.int32)  # its last is that of NONE
    for index, count in counts.items():
        number[trace.groups[index].first :][:count] = first[index] + np.arange(count)
    fed = [number[np.where(trace.roles == role, incoming, NONE)] for role in (KERNEL, BIAS, SCALE)]
    owners = tuple(tuple(map(compact, trace.split(entries))) for entries in (*fed, number[outgoing]))

    examples = next((np.shape(leaf)[0] for leaf in jax.tree.leaves(inputs) if np.ndim(leaf)), 1)
    names = _layer_names([trace.leaf_of(index)[0] for index in range(len(trace.groups))])
    layers, readings = [], {}
    for index, count in counts.items():
        leaf, start = trace.leaf_of(index)
        shape = _layer_shape(trace.groups[index].columns - start, dict(zip(paths, shapes, strict=True))[leaf])
        reasons = tuple(dict.fromkeys(trace.reasons.get(index, ())))
        own = [_within(dict(zip(paths, leaves, strict=True)), first[index], count) for leaves in owners]
        layers.append(Layer(names[index], shape, reasons, *own))
        readings[names[index]] = _reading(trace, index, hidden[index], shape, examples)
    heads = tuple(name for index, name in enumerate(names) if index not in counts)
    return LayerGraph(tuple(layers), heads, apply_fn, _fingerprint(jaxpr), readings, treedef, shapes, owners)


def _traced(apply_fn: Callable[..., Any], params: PyTree, inputs: tuple[Any, ...]) -> tuple[core.Jaxpr, list[Any], Any]:
    """The jaxpr, without what its outputs do not depend on, its constants and the structure of the outputs."""
    # Weak types are left out: the same function may be given arrays that have them, and others.
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), (params, *inputs))
    closed, outputs = jax.make_jaxpr(apply_fn, return_shape=True)(*described)
    leaves, treedef = jax.tree.flatten(outputs)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(leaves), instantiate=True)
    return jaxpr, closed.consts, treedef


def _fingerprint(jaxpr: core.Jaxpr) -> tuple[Any, ...]:
    """Which operations are done, in order."""
    inner = (called(eqn) for eqn in jaxpr.eqns)
    return tuple(
        (eqn.primitive.name, _fingerprint(call[0]) if call else ()) for eqn, call in zip(jaxpr.eqns, inner, strict=True)
    )


def _replay(
    jaxpr: core.Jaxpr,
    consts: Iterable[Any],
    operands: Iterable[Any],
    sites: set[Site],
    visit: Callable[[Site, jax.Array], jax.Array],
    path: Path = (),
) -> list[Any]:
    """Outputs of the jaxpr, the values at `sites` going through `visit`. A call is entered only where it holds some."""
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= zip(jaxpr.invars, operands, strict=True)

    def look_up(atoms: Iterable[Any]) -> list[Any]:
        return [atom.val if isinstance(atom, core.Literal) else known[atom] for atom in atoms]

    for index, eqn in enumerate(jaxpr.eqns):
        here, inner = (*path, index), called(eqn)
        if inner and any(len(site) > len(here) and site[: len(here)] == here for site, _ in sites):
            outputs = _replay(*inner, look_up(eqn.invars), sites, visit, here)
        else:
            outputs = bind(eqn, look_up(eqn.invars))
        outputs = [visit((here, k), value) if (here, k) in sites else value for k, value in enumerate(outputs)]
        known |= zip(eqn.outvars, outputs, strict=True)
    return look_up(jaxpr.outvars)


def _within(leaves: Mapping[str, Integers], first: int, count: int) -> Owners:
    """The leaves that hold entries of the units first, ..., first + count - 1, which become 0, ..., count - 1."""
    own = {
        name: np.where((leaf >= first) & (leaf < first + count), leaf - first, NONE) for name, leaf in leaves.items()
    }
    return {name: leaf for name, leaf in own.items() if (leaf != NONE).any()}


def _layer_names(leaves: list[str]) -> list[str]:
    """Names for the groups of these kernels: the module's path if it has one kernel, else the kernel's own."""
    short = [leaf.removeprefix("params/") for leaf in leaves]
    modules = [leaf.rpartition("/")[0] for leaf in dict.fromkeys(short)]
    names = []
    for position, leaf in enumerate(short):
        module = leaf.rpartition("/")[0]
        name = module if module and modules.count(module) == 1 else leaf
        names.append(f"{name}[{short[:position].count(leaf)}]" if short.count(leaf) > 1 else name)
    return names


def _layer_shape(columns: Integers, shape: Shape) -> Shape:
    """Axes of the kernel along which its units lie: those before its inputs are members, the others are one.

    columns: [units, inputs], places in the kernel; a part of it makes a layer without members.
    """
    if np.array_equal(np.sort(columns, axis=None), np.arange(prod(shape))):
        places = np.unravel_index(columns[0], shape)
        inputs = [axis for axis, place in enumerate(places) if np.ptp(place)] or [max(len(shape) - 2, 0)]
        axes = [axis for axis in range(len(shape)) if axis not in inputs]
        members = [shape[axis] for axis in axes if axis < inputs[0] and shape[axis] > 1]
        units = [shape[axis] for axis in axes if axis > inputs[0]]
        return (*members, prod(units)) if units else tuple(members) or (1,)
    return (len(columns),)


def _reading(trace: Trace, index: int, sites: list[Site], shape: Shape, examples: int) -> Reading:
    group, labels, shapes, axes = trace.groups[index], [], [], []
    for site in sites:
        own, full = trace.sites[site]
        same = [axis for axis, size in enumerate(own.shape) if size == 1]  # along these the units do not change
        axes.append(next((axis for axis in same if full[axis] == examples), same[0] if same else None))
        labels.append(own)
        shapes.append(full)
    if len({None if axis is None else full[axis] for axis, full in zip(axes, shapes, strict=True)}) > 1:
        axes = [None] * len(sites)
    flat = [
        np.broadcast_to(own if axis is None else own.squeeze(axis), _without(full, axis)).ravel()
        for own, full, axis in zip(labels, shapes, axes, strict=True)
    ]
    row = np.concatenate(flat)
    places = [np.flatnonzero(row == group.first + unit) for unit in range(len(group.columns))]
    count = max(map(len, places))
    # A unit with fewer values than others repeats them; one that nothing reads has a place behind the last.
    columns = [np.resize(place if len(place) else len(row), count) for place in places]
    return Reading(tuple(sites), tuple(shapes), tuple(axes), np.stack(columns, axis=1), shape)


def _without(shape: Shape, axis: int | None) -> Shape:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


def _examples_first(reading: Reading, position: int, value: jax.Array) -> tuple[jax.Array, int | None]:
    """A value of the reading as [B, values of one example], and the axis along which its examples lay."""
    axis, graph_shape = reading.axes[position], reading.shapes[position]
    changed = [i for i, sizes in enumerate(zip(value.shape, graph_shape, strict=True)) if sizes[0] != sizes[1]]
    if axis is not None and len(changed) == 1 and graph_shape[axis] == graph_shape[changed[0]] == 1:
        axis = changed[0]  # a graph of one example cannot tell its axis from another of size 1
    if _without(value.shape, axis) != _without(graph_shape, axis):
        raise LayerGraphError(f"values have shape {value.shape} here, those of the graph {graph_shape}")
    flat = value[None] if axis is None else jnp.moveaxis(value, axis, 0)
    return flat.reshape(flat.shape[0], -1), axis


def _read(reading: Reading, values: list[jax.Array]) -> jax.Array:
    """The activations of a layer, [B, *shape] or [B, n, *shape]."""
    flat = jnp.concatenate([_examples_first(reading, i, value)[0] for i, value in enumerate(values)], axis=1)
    if not np.array_equal(reading.places.ravel(), np.arange(flat.shape[1])):
        flat = flat.at[:, reading.places].get(mode="fill", fill_value=0)
    count = len(reading.places)
    return flat.reshape(-1, *([count] if count > 1 else []), *reading.shape)


def _offset(reading: Reading, position: int, value: jax.Array, offsets: jax.Array) -> jax.Array:
    """One value of the reading with its share of the layer's offsets added."""
    flat, axis = _examples_first(reading, position, value)
    before = zip(reading.shapes[:position], reading.axes[:position], strict=True)
    index = reading.places - sum(prod(_without(shape, other)) for shape, other in before)
    here = (index >= 0) & (index < flat.shape[1])
    flat = flat.at[:, index[here]].add(offsets.reshape(flat.shape[0], *index.shape)[:, here])
    shaped = flat.reshape(flat.shape[0], *_without(value.shape, axis))
    return shaped[0] if axis is None else jnp.moveaxis(shaped, 0, axis)
