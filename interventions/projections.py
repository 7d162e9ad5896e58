"""Projections: after every step of the optimiser, weights return to where a network can still learn."""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..agents.learner import PyTree
from ..diagnostics import layer_graph, named_leaves
from ..diagnostics.layers import check_inputs
from .base import Intervention, InterventionError, method, require
from .parameters import is_kernel, kernels, last_part, matrices
from .surgery import Reference, reference_to


class NormsState(NamedTuple):
    gradient_step: jax.Array  # () int32: taken so far
    norms: dict[str, jax.Array]  # name of a kernel -> [members, 1, 1]: its Frobenius norms at the start
    reference: Reference | None  # the parameters at the start, where something drifts to them


@method
def weight_clipping(kappa: float = 3.0) -> Intervention:
    """Entries are clipped to [-kappa/sqrt(fan_in), kappa/sqrt(fan_in)] after every step (Elsayed et al., 2024, arXiv
    2407.01704).

    Biases have the bound of the kernel beside them. What has none beside it, as a norm's scale, is not clipped:
    the bound of the kernel before it would shrink scales of 1.
    kappa: the paper tries 1 to 5, over PyTorch's initial +-1/sqrt(fan_in). Flax's LeCun and Xavier initialisers reach
        2.3 and 2.45 times that: a smaller kappa than 3 clips a fresh network.
    """
    require(kappa > 0, f"kappa must be positive, not {kappa}")
    return Intervention(project=lambda network, tx: optax.chain(tx, clip_weights(kappa)), period=0)


def clip_weights(kappa: float) -> optax.GradientTransformation:
    """Changes steps so that they end within the bounds; the last of an optax chain. See `weight_clipping`."""

    def update(steps: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        _require_params(params)
        leaves = named_leaves(params)
        of_kernels = {name: matrix.shape[1] for name, matrix in matrices(params).items()}
        fan_ins: dict[str, set[int]] = {}
        for name, fan_in in of_kernels.items():
            fan_ins.setdefault(name.rpartition("/")[0], set()).add(fan_in)

        def clipped(name: str, leaf: jax.Array, step: jax.Array) -> jax.Array:
            own = {of_kernels[name]} if name in of_kernels else set(fan_ins.get(name.rpartition("/")[0], ()))
            if len(own) != 1 or last_part(name) == "scale":
                return step
            bound = kappa / sqrt(own.pop())
            reached = leaf + step
            return jnp.where(jnp.abs(reached) <= bound, step, jnp.clip(reached, -bound, bound) - leaf)

        steps_of = jax.tree.leaves(steps)
        new = [clipped(name, leaf, step) for (name, leaf), step in zip(leaves.items(), steps_of, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(params), new), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@method
def normalize_and_project(period: int = 1, drift: float = 0.0, heads: bool = False) -> Intervention:
    """Every kernel returns to its initial Frobenius norm (Lyle et al., 2024, arXiv 2407.01800, NaP).

    This is the projection of NaP. Its other half, a LayerNorm before every nonlinearity, which makes the network blind
    to those norms, is the method `layer_norm`: give both. Members of an ensemble have norms of their own; a kernel that
    was 0 stays free. A kernel of 3 or 5 axes is taken for that of an ensemble unless its bias tells otherwise.
    period: gradient steps between projections; the paper reports that rare ones serve as well [from memory].
    drift: share of their distance to the initial values that all other parameters (biases, scales) lose at each
        projection; 0 leaves them. The paper names decay to the initial values, or their removal, as ways to bound them.
    heads: the kernels of the outputs too; no norm stands behind these, so that it bounds the values that can be learnt.
    """
    require(period >= 1, f"period must be at least 1 gradient step, not {period}")
    require(0 <= drift <= 1, f"drift must lie in [0, 1], not {drift}")
    return Intervention(
        project=lambda network, tx: optax.chain(tx, project_norms(period, drift, heads, network.apply)), period=0
    )


def project_norms(
    period: int = 1, drift: float = 0.0, heads: bool = False, apply_fn: Callable[..., Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Changes steps so that they end at the initial norms; the last of an optax chain. See `normalize_and_project`.

    apply_fn(params, *inputs), and `inputs` given to update, tell which kernels are heads: InterventionError without them,
    unless heads are projected too.
    """

    def init(params: PyTree) -> NormsState:
        norms = {name: _norms(matrix) for name, matrix in matrices(params).items()}
        return NormsState(jnp.zeros((), jnp.int32), norms, reference_to(params) if drift else None)

    def update(
        steps: PyTree, state: NormsState, params: PyTree = None, *, inputs: Any = None, **extra: Any
    ) -> tuple[PyTree, NormsState]:
        _require_params(params)
        projected = set(kernels(params) if heads else hidden_kernels(params, apply_fn, inputs))
        gradient_step = optax.safe_increment(state.gradient_step)
        start = named_leaves(state.reference.params) if state.reference else {}

        def project(name: str, leaf: jax.Array, step: jax.Array) -> jax.Array:
            reached = leaf + step
            if name in projected:
                matrix = reached.reshape(matrices(params)[name].shape)
                now = _norms(matrix)
                factor = jnp.where(
                    (state.norms[name] > 0) & (now > 0), state.norms[name] / jnp.maximum(now, 1e-30), 1.0
                )
                return (matrix * factor).reshape(leaf.shape) - leaf
            if drift and not is_kernel(name, leaf):
                return step + drift * (start[name] - reached)
            return step

        def all_projected() -> PyTree:
            pairs = zip(named_leaves(params).items(), jax.tree.leaves(steps), strict=True)
            new = [project(name, leaf, step) for (name, leaf), step in pairs]
            return jax.tree.unflatten(jax.tree.structure(params), new)

        steps = (
            jax.lax.cond(gradient_step % period == 0, all_projected, lambda: steps) if period > 1 else all_projected()
        )
        return steps, state._replace(gradient_step=gradient_step)

    return optax.GradientTransformationExtraArgs(init, update)


def hidden_kernels(params: PyTree, apply_fn: Callable[..., Any] | None, inputs: Any) -> Sequence[str]:
    """Names of the kernels that make hidden units, by the layer graph.

    LayerGraphError where the network cannot be followed, InterventionError where there is none, or no inputs of it.
    """
    names = list(kernels(params))
    if apply_fn is None or inputs is None:
        raise InterventionError("heads are told by the network: give apply_fn, and tx.update(..., inputs=(...))")
    check_inputs(inputs)
    params, inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), (params, inputs))
    hidden = {leaf for layer in layer_graph(apply_fn, params, *inputs).layers for leaf in layer.incoming}
    return [name for name in names if name in hidden]


def _norms(matrix: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(matrix).sum(axis=(1, 2), keepdims=True))


def _require_params(params: PyTree) -> None:
    if params is None:
        raise ValueError("this transformation needs the parameters: tx.update(gradient, state, params)")
