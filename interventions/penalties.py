"""Penalties: what is added to the loss; here their gradients are, to the gradient, before the optimiser."""

from collections.abc import Callable, Collection, Mapping
from math import sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..agents.learner import PyTree
from ..diagnostics import layer_graph, named_leaves
from ..diagnostics.layers import check_inputs
from .base import Intervention, InterventionError, method, require
from .parameters import kernels, last_part, matrices
from .projections import hidden_kernels
from .surgery import Reference, reference_to

Arrays = dict[str, jax.Array]
START_ITERATIONS = 20  # of the power iteration, before the first gradient step


def add_gradient(
    gradient_of: Callable[[PyTree, PyTree, Mapping[str, Any]], tuple[PyTree, PyTree]],
    init: Callable[[PyTree], PyTree] = lambda params: optax.EmptyState(),
) -> optax.GradientTransformationExtraArgs:
    """Adds `gradient_of(params, state, extra) -> (gradient, state)` to the gradient; the first of an optax chain.

    extra: what else `update` was given by name, as `inputs` and `key`.
    """

    def update(gradient: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError("a penalty needs the parameters: tx.update(gradient, state, params)")
        added, state = gradient_of(params, state, extra)
        return jax.tree.map(jnp.add, gradient, added), state

    return optax.GradientTransformationExtraArgs(init, update)


def _require_coefficient(lam: float) -> None:
    require(lam >= 0, f"lam must be zero or more, not {lam}")


@method
def weight_decay(lam: float = 1e-5, decoupled: bool = False) -> Intervention:
    """lam / 2 * |theta|^2 over all parameters: lam * theta is added to the gradient, before Adam divides it
    by its size.

    decoupled: theta loses its share lam at every step instead, which no learning rate multiplies (Loshchilov & Hutter,
        2019, arXiv 1711.05101): lam is AdamW's times its learning rate.
    The default lam is no paper's: it wants tuning.
    """
    _require_coefficient(lam)
    if decoupled:
        return Intervention(project=lambda network, tx: optax.chain(tx, optax.add_decayed_weights(-lam)), period=0)
    return Intervention(wrap=lambda network, tx: optax.chain(optax.add_decayed_weights(lam), tx), period=0)


@method
def l2_init(lam: float = 1e-3) -> Intervention:
    """lam * |theta - theta_0|^2 over all parameters, theta_0 being the initial ones (Kumar et al., 2023, arXiv
    2308.11958).

    lam: the paper tries 1e-5 to 1e-2. What an intervention draws anew has the new value as its theta_0.
    """
    _require_coefficient(lam)
    return Intervention(wrap=lambda network, tx: optax.chain(add_l2_init(lam), tx), period=0)


def add_l2_init(lam: float) -> optax.GradientTransformationExtraArgs:
    """The gradient of `l2_init`, for an optax chain."""

    def gradient_of(params: PyTree, state: Reference, extra: Mapping[str, Any]) -> tuple[PyTree, Reference]:
        return jax.tree.map(lambda now, start: 2 * lam * (now - start), params, state.params), state

    return add_gradient(gradient_of, reference_to)


@method
def parseval(lam: float = 1e-3, scale: float = 1.0) -> Intervention:
    """lam * |W W^T - scale * I|^2 for the kernel of every hidden layer (Chung et al., 2024, arXiv 2412.07224,
    Parseval).

    A row of W is what a unit reads: those of one layer become orthogonal, of squared length `scale`. A convolution's
    has height * width * channels entries; each member of an ensemble has a W of its own. Where there are more units
    than inputs, |W^T W - scale * I|^2 has the same gradient and is what is computed. Hidden layers are found by the
    layer graph. The paper's learnt scales and diagonal
    layers are not part of it.
    scale: 1 or 2, as lam the order of the paper's values [from memory].
    """
    _require_coefficient(lam)
    require(scale > 0, f"scale must be positive, not {scale}")
    return Intervention(wrap=lambda network, tx: optax.chain(add_parseval(lam, scale, network.apply), tx), period=0)


def add_parseval(
    lam: float,
    scale: float = 1.0,
    apply_fn: Callable[..., Any] | None = None,
    *,
    heads: Collection[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The gradient of `parseval`, for an optax chain. apply_fn(params, *inputs), with `inputs` given to update, tells
    the heads, or the names of their kernels do ("params/Dense_2/kernel"); InterventionError with neither."""

    def penalty(params: PyTree, names: frozenset[str]) -> jax.Array:
        total = jnp.zeros(())
        for name, k in matrices(params).items():
            if name in names:
                gram = k.mT @ k if k.shape[1] >= k.shape[2] else k @ k.mT
                total += jnp.square(gram - scale * jnp.eye(gram.shape[1])[None]).sum()
        return lam * total

    def gradient_of(params: PyTree, state: PyTree, extra: Mapping[str, Any]) -> tuple[PyTree, PyTree]:
        if heads is None:
            names = frozenset(hidden_kernels(params, apply_fn, extra.get("inputs")))
        else:
            names = frozenset(kernels(params)) - frozenset(heads)
        if not names:
            raise InterventionError("parseval: there is no hidden kernel")
        return jax.grad(penalty)(params, names), state

    return add_gradient(gradient_of)


@method
def spectral(lam: float = 1e-4) -> Intervention:
    """lam * sum_l ((sigma_1(W_l)^2 - 1)^2 + |b_l|^4), sigma_1 being the largest singular value (Lewandowski et al.,
    ICLR 2025, arXiv 2406.06811, with k = 2).

    sigma_1 is estimated by one step of power iteration per gradient step, from a vector that is carried; members of an
    ensemble and convolutions as in `parseval`, but outputs' kernels too. Scales of norms are left alone.
    lam: order of the paper's values; this and the biases' term are from memory.
    """
    _require_coefficient(lam)
    return Intervention(wrap=lambda network, tx: optax.chain(add_spectral(lam), tx), period=0)


def add_spectral(lam: float) -> optax.GradientTransformationExtraArgs:
    """The gradient of `spectral`, for an optax chain. Its state: name of a kernel -> [members, units, 1], the leading
    right vector."""

    def init(params: PyTree) -> Arrays:
        def leading(k: jax.Array) -> jax.Array:
            v = jax.random.normal(jax.random.key(0), (k.shape[0], k.shape[2], 1), k.dtype)
            v = jax.lax.fori_loop(0, START_ITERATIONS, lambda _, v: _power_iteration(k, v)[1], v)
            return jnp.asarray(v)

        return {name: leading(matrix) for name, matrix in matrices(params).items()}

    def penalty(params: PyTree, left: Arrays, right: Arrays) -> jax.Array:
        total, matrix = jnp.zeros(()), matrices(params)
        for name, leaf in named_leaves(params).items():
            if name in matrix:
                sigma = left[name].mT @ matrix[name] @ right[name]  # its gradient by W is left right^T, that of sigma_1
                total += jnp.square(jnp.square(sigma) - 1).sum()
            elif last_part(name) != "scale":
                total += jnp.square(jnp.square(leaf).sum(axis=-1)).sum()
        return lam * total

    def gradient_of(params: PyTree, state: Arrays, extra: Mapping[str, Any]) -> tuple[PyTree, Arrays]:
        vectors = {name: _power_iteration(k, state[name]) for name, k in matrices(params).items()}
        left, right = ({name: pair[i] for name, pair in vectors.items()} for i in (0, 1))
        return jax.grad(penalty)(params, left, right), right

    return add_gradient(gradient_of, init)


def _power_iteration(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Left and right vector, of length 1, after one step from v; [members, inputs, 1], [members, units, 1]."""

    def unit(x: jax.Array, otherwise: jax.Array) -> jax.Array:
        length = jnp.sqrt(jnp.square(x).sum(axis=1, keepdims=True))
        return jnp.where(length > 0, x / jnp.maximum(length, 1e-30), otherwise)

    u = k @ v
    u = unit(u, jnp.zeros_like(u))
    return u, unit(k.mT @ u, v)  # a kernel of zeros keeps the vector for when it is none


@method
def wasserstein_init(lam: float = 1e-2) -> Intervention:
    """lam * sum_l mean (sort(theta_l) - sort(theta_0,l))^2: the distribution of each array's entries stays near its
    initial one (Lewandowski et al., 2023, arXiv 2312.00246; squared 2-Wasserstein distance).

    Entries may change places at no cost, as in `l2_init` they may not. Each member of an ensemble is compared with
    itself. Sorts every array at every step: dear for networks of millions. The initial entries are held sorted, so that
    nothing an intervention draws moves them. The default lam is no paper's: it wants tuning.
    """
    _require_coefficient(lam)
    return Intervention(wrap=lambda network, tx: optax.chain(add_wasserstein_init(lam), tx), period=0)


def add_wasserstein_init(lam: float) -> optax.GradientTransformationExtraArgs:
    """The gradient of `wasserstein_init`, for an optax chain."""

    def distributions(params: PyTree) -> Arrays:
        matrix = matrices(params)

        def rows(name: str, leaf: jax.Array) -> jax.Array:
            if name in matrix:
                return leaf.reshape(len(matrix[name]), -1)
            return leaf.reshape(-1, leaf.shape[-1] if leaf.ndim else 1)

        return {name: jnp.sort(rows(name, leaf)) for name, leaf in named_leaves(params).items()}

    def penalty(params: PyTree, start: Arrays) -> jax.Array:
        distances = (jnp.square(x - start[name]).mean(axis=1).sum() for name, x in distributions(params).items())
        return lam * sum(distances, jnp.zeros(()))

    def gradient_of(params: PyTree, state: Arrays, extra: Mapping[str, Any]) -> tuple[PyTree, Arrays]:
        return jax.grad(penalty)(params, state), state

    return add_gradient(gradient_of, distributions)


@method
def churn_penalty(lam: float = 100.0, history: int = 1) -> Intervention:
    """lam * mean (f(x) - f_old(x))^2: outputs stay near those of some updates ago (Tang & Berseth, 2024, CHAIN; 2025,
    arXiv 2506.00592).

    The outputs f are action values, a policy's mean and log deviation, or logits; the mean is over examples and
    outputs, summed over the members of an ensemble and over several outputs. Two forward passes and one backward pass
    more.
    lam: 100 is the authors' for DQN on MinAtar; for policies and other scales of reward it wants tuning.
    history: gradient steps between the old parameters and those now; the authors' `reg_his_idx` of 2 counts from one,
        and is 1 here.
    Deviations: x are the inputs just learnt from, where the paper draws a second batch, so that wanted changes cost
    too; whoever calls `add_churn_penalty` in a loop of his own can give one. Squares for policies, where the paper has
    the KL divergence of stochastic ones. No automatic lam.
    """
    _require_coefficient(lam)
    require(history >= 1, f"history must be at least 1 gradient step, not {history}")
    return Intervention(
        wrap=lambda network, tx: optax.chain(add_churn_penalty(network.apply, lam, history), tx), period=0
    )


def add_churn_penalty(
    apply_fn: Callable[..., Any] | None, lam: float, history: int = 1
) -> optax.GradientTransformationExtraArgs:
    """The gradient of `churn_penalty`, for an optax chain; its update is given inputs=(...), and reference=(...) where
    another
    batch than these is to be held.

    Its state: the parameters 1, ..., history updates ago.
    """

    def init(params: PyTree) -> tuple[Reference, ...]:
        return tuple(reference_to(params) for _ in range(history))

    def penalty(params: PyTree, old: PyTree, inputs: tuple[Any, ...]) -> jax.Array:
        assert apply_fn is not None
        outputs = zip(jax.tree.leaves(apply_fn(params, *inputs)), jax.tree.leaves(old), strict=True)
        examples = jax.tree.leaves(inputs)[0].shape[0]

        def distance(now: jax.Array, before: jax.Array) -> jax.Array:
            members = now.shape[0] if now.ndim > 1 and now.shape[0] != examples == now.shape[1] else 1
            return members * jnp.square(now - before).mean()

        return lam * sum((distance(*pair) for pair in outputs), jnp.zeros(()))

    def gradient_of(
        params: PyTree, state: tuple[Reference, ...], extra: Mapping[str, Any]
    ) -> tuple[PyTree, tuple[Reference, ...]]:
        reference = extra.get("reference")
        inputs = extra.get("inputs") if reference is None else reference
        if apply_fn is None or inputs is None:
            raise InterventionError("churn_penalty: needs a network and its inputs: tx.update(..., inputs=(...))")
        check_inputs(inputs)
        gradient = jax.grad(penalty)(params, apply_fn(state[-1].params, *inputs), inputs)
        return gradient, (Reference(params), *state[:-1])

    return add_gradient(gradient_of, init)


class InferState(NamedTuple):
    heads: Arrays  # name of a kernel -> [members, units, heads], for those whose units feed the outputs; others rest
    initial_heads: Arrays
    adam: PyTree  # of the heads
    reference: Reference  # the parameters at the start


@method
def infer(alpha: float = 0.1, beta: float = 100.0, heads: int = 10, learning_rate: float = 1e-4) -> Intervention:
    """alpha * sum_k mean_x (g_k(x) - beta * g_k,0(x))^2: linear heads g_k on the last hidden layer go on fitting
    multiples of what they gave at the start (Lyle et al., 2022, arXiv 2204.09560, InFeR).

    The layers are those that feed the outputs, by the layer graph; a unit with several values, as CReLU's two, counts
    by their mean. Each member of an ensemble has heads of its own. They start from one normal draw over sqrt(units),
    the same for all seeds, and are trained by an Adam of their own, that of optax. One forward pass more, and a second
    with the initial parameters.
    alpha, beta, heads: 0.1, 100 and 10 are the paper's [from memory]. learning_rate: of the heads, per gradient step.
    Heads are kept for every kernel, as nothing tells the output layer before there are inputs: heads * units numbers
    each, four times.
    """
    require(alpha >= 0, f"alpha must be zero or more, not {alpha}")
    require(heads >= 1, f"heads must be at least 1, not {heads}")
    require(learning_rate > 0, f"learning_rate must be positive, not {learning_rate}")
    return Intervention(
        wrap=lambda network, tx: optax.chain(add_infer(network.apply, alpha, beta, heads, learning_rate), tx), period=0
    )


def add_infer(
    apply_fn: Callable[..., Any] | None,
    alpha: float = 0.1,
    beta: float = 100.0,
    heads: int = 10,
    learning_rate: float = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    """The gradient of `infer`, for an optax chain; its update is given inputs=(...). Heads are trained in its state."""
    adam = optax.adam(learning_rate)

    def init(params: PyTree) -> InferState:
        sizes = {name: matrix.shape[::2] for name, matrix in matrices(params).items()}
        places = np.cumsum([members * units for members, units in sizes.values()])
        rows = jnp.split(jax.random.normal(jax.random.key(0), (int(places[-1]), heads)), places[:-1])
        drawn = {
            name: part.reshape(*size, heads) / sqrt(size[1])
            for (name, size), part in zip(sizes.items(), rows, strict=True)
        }
        return InferState(drawn, jax.tree.map(jnp.copy, drawn), adam.init(drawn), reference_to(params))

    def gradient_of(params: PyTree, state: InferState, extra: Mapping[str, Any]) -> tuple[PyTree, InferState]:
        inputs = extra.get("inputs")
        if apply_fn is None or inputs is None:
            raise InterventionError("infer: needs a network and its inputs: tx.update(..., inputs=(...))")
        check_inputs(inputs)
        form = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), (params, inputs))
        graph = layer_graph(apply_fn, form[0], *form[1])
        hidden = {leaf for layer in graph.layers for leaf in layer.incoming}
        last = {layer.name: next(iter(layer.incoming)) for layer in graph.layers if set(layer.outgoing) - hidden}
        if not last:
            raise InterventionError("infer: there is no hidden layer whose units the outputs read")
        for name, leaf in last.items():
            shape = graph[name].shape
            if (shape if len(shape) > 1 else (1, *shape)) != state.heads[leaf].shape[:2]:
                raise InterventionError(f"infer: the units of {name} are not the columns of one kernel")

        def outputs(params: PyTree, heads: Arrays) -> list[jax.Array]:
            activations = graph.activations(params, *inputs)
            values = []
            for name, leaf in last.items():
                shape, x = graph[name].shape, activations[name]
                x = x.mean(axis=1) if x.ndim > 1 + len(shape) else x
                values.append(jnp.einsum("beu,euk->bek", x.reshape(len(x), *heads[leaf].shape[:2]), heads[leaf]))
            return values

        wanted = [beta * value for value in outputs(state.reference.params, state.initial_heads)]

        def penalty(params: PyTree, heads: Arrays) -> jax.Array:
            pairs = zip(outputs(params, heads), wanted, strict=True)
            return alpha * sum((jnp.square(x - y).mean(axis=0).sum() for x, y in pairs), jnp.zeros(()))

        gradient, of_heads = jax.grad(penalty, argnums=(0, 1))(params, state.heads)
        steps, adam_state = adam.update(of_heads, state.adam)
        return gradient, state._replace(heads=optax.apply_updates(state.heads, steps), adam=adam_state)

    return add_gradient(gradient_of, init)
