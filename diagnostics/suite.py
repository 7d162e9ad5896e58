"""Every diagnostic of one network under its name, for those who log, compare or act on them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .curvature import ntk_rank, sharpness
from .dormancy import (
    activation_gradients,
    active_units,
    dormancy,
    dormant_fraction,
    dormant_units,
    gradient_dormancy,
    unit_scores,
)
from .layers import LayerGraph, check_inputs, layer_graph
from .norms import feature_norm, grad_norm, weight_distance, weight_norm
from .rank import (
    effective_rank,
    effective_rank_of,
    feature_matrix,
    feature_rank,
    leading,
    singular_values,
    stable_rank_of,
)

PyTree = Any
NTK_EXAMPLES = 32  # a backward pass, and a row as long as the parameters, for each output of each


@dataclass(frozen=True)
class Probe:
    """A network and the examples that it is looked at with. Each part is computed once, and only if it is asked for."""

    apply: Callable[..., Any]  # apply(params, *inputs) -> any PyTree
    params: PyTree
    inputs: tuple[Any, ...]  # [B, ...] each
    loss: Callable[[Any], jax.Array] | None = None  # of the outputs -> (); for gradients
    initial_params: PyTree = None  # those that training began with
    key: jax.Array | None = None
    layers: tuple[str, ...] = ()  # names of layers, or of modules that hold them, to which activations are confined

    def __post_init__(self) -> None:
        check_inputs(self.inputs)

    @cached_property
    def graph(self) -> LayerGraph:
        return layer_graph(self.apply, self.params, *self.inputs)

    @cached_property
    def activations(self) -> dict[str, jax.Array]:
        """ValueError where the network has no hidden layer, or none of a name in `layers`."""
        known = [layer.name for layer in self.graph.layers]
        if not known:
            raise ValueError("the network has no hidden layer to look at")
        for name in self.layers:
            if not any(within(layer, name) for layer in known):
                raise ValueError(f"no hidden layer is in {name}: there are {', '.join(known)}")
        values = self.graph.activations(self.params, *self.inputs)
        chosen = [layer for layer in known if not self.layers or any(within(layer, name) for name in self.layers)]
        return {layer: values[layer] for layer in chosen}

    @cached_property
    def features(self) -> jax.Array:
        """Activations of the hidden layer that is computed last, [n, d] or [members, n, d]."""
        activations = self.activations
        return feature_matrix(activations, self.graph, list(activations)[-1])

    @cached_property
    def spectrum(self) -> jax.Array:
        """Singular values of the features, largest first, [k] or [members, k]; most of what a look costs."""
        return singular_values(self.features)

    def loss_of(self, params: PyTree) -> jax.Array:
        assert self.loss is not None
        return self.loss(self.apply(params, *self.inputs))

    @cached_property
    def gradients(self) -> PyTree:
        return jax.grad(self.loss_of)(self.params)

    @cached_property
    def activation_gradients(self) -> dict[str, jax.Array]:
        return activation_gradients(self.graph, self.loss, self.params, *self.inputs)


def within(layer: str, module: str) -> bool:
    """Whether a layer is of that name or in a module of it."""
    return layer == module or layer.startswith(module + "/")


class Diagnostic(NamedTuple):
    """measure(probe) -> (): of an ensemble the mean over its members; needs: parts of the probe that may be missing."""

    measure: Callable[[Probe], jax.Array]
    source: str
    needs: tuple[str, ...] = ()
    default: bool = True  # among those that a run logs; the others cost more or say little more


def _dormant(probe: Probe, tau: float, **options: Any) -> jax.Array:
    return dormancy(probe.activations, tau, probe.graph, **options)


def _dormant_stacked(probe: Probe, tau: float) -> jax.Array:
    return dormancy(probe.activations, tau)


def _dormant_unit_gradients(probe: Probe, tau: float) -> jax.Array:
    return dormant_fraction(dormant_units(unit_scores(probe.activation_gradients, probe.graph, epsilon=0.0), tau))


def _dormant_gradients(probe: Probe, tau: float, **options: Any) -> jax.Array:
    return gradient_dormancy(probe.graph, probe.gradients, tau, **options)


def _rank(probe: Probe, rank: Callable[[jax.Array], jax.Array]) -> jax.Array:
    return _unless_nan(jnp.mean(rank(probe.spectrum)), probe.spectrum)


def _unless_nan(rank: jax.Array, values: jax.Array) -> jax.Array:
    """A rank that is a whole number cannot say that features are NaN."""
    return jnp.where(jnp.isnan(values).any(), jnp.nan, rank)


def _feature_norm(probe: Probe) -> jax.Array:
    activations = probe.activations
    last = list(activations)[-1]
    return feature_norm({last: activations[last]}, probe.graph)[last]


def _ntk_rank(probe: Probe) -> jax.Array:
    inputs = jax.tree.map(lambda x: x[:NTK_EXAMPLES], probe.inputs)
    return jnp.asarray(ntk_rank(probe.apply, probe.params, *inputs, rank=effective_rank))


def _sharpness(probe: Probe) -> jax.Array:
    key = jax.random.key(0) if probe.key is None else probe.key
    return sharpness(probe.loss_of, probe.params, key)


DIAGNOSTICS: dict[str, Diagnostic] = {
    "dormant/post/tau0": Diagnostic(
        partial(_dormant, tau=0.0), "share of silent units; Sokar et al. (2023), definition 3.1"
    ),
    "dormant/post/tau0.1": Diagnostic(partial(_dormant, tau=0.1), "share of dormant units; Sokar et al. (2023), ReDo"),
    "dormant/post/mean/tau0.1": Diagnostic(
        partial(_dormant, tau=0.1, aggregate="mean"), "mean over layers instead of units; Plasticine", default=False
    ),
    "dormant/post/stacked/tau0.1": Diagnostic(
        partial(_dormant_stacked, tau=0.1),
        "members of an ensemble stacked into the batch; SimBa's metrics",
        default=False,
    ),
    "dormant/post/strict/tau0.025": Diagnostic(
        partial(_dormant, tau=0.025, strict=True),
        "DrM's threshold and comparison, of hidden layers; Xu et al. (2024)",
        default=False,
    ),
    "dormant/grad/tau0.05": Diagnostic(
        partial(_dormant_gradients, tau=0.05),
        "gradient dormancy, output layers included; Ji et al. (2024, ACE)",
        ("loss",),
    ),
    "dormant/grad/strict/tau0.05": Diagnostic(
        partial(_dormant_gradients, tau=0.05, strict=True),
        "as in ACE's code, where a silent layer is alive",
        ("loss",),
        False,
    ),
    "dormant/unit_grad/tau0.1": Diagnostic(
        partial(_dormant_unit_gradients, tau=0.1), "GraMa; Liu et al. (2025)", ("loss",), False
    ),
    "fau": Diagnostic(
        lambda probe: active_units(probe.activations, probe.graph), "fraction of active units; Ma et al. (2024)"
    ),
    "srank": Diagnostic(partial(_rank, rank=leading), "Kumar et al. (2021), delta .01, of the last hidden layer"),
    "effective_rank": Diagnostic(
        partial(_rank, rank=effective_rank_of), "Roy & Vetterli (2007), of the last hidden layer"
    ),
    "stable_rank": Diagnostic(
        partial(_rank, rank=stable_rank_of), "Frobenius over spectral norm, squared; Rudelson & Vershynin (2007)"
    ),
    "approximate_rank": Diagnostic(
        partial(_rank, rank=lambda s: leading(jnp.square(s))), "srank of the squares; Yang et al. (2020)", default=False
    ),
    "feature_rank": Diagnostic(
        lambda probe: _unless_nan(jnp.mean(feature_rank(probe.features)), probe.features),
        "Lyle et al. (2022), epsilon .01",
        default=False,
    ),
    "feature_norm": Diagnostic(_feature_norm, "mean Euclidean norm of the last hidden layer's activations"),
    "weight_norm": Diagnostic(lambda probe: weight_norm(probe.params), "Euclidean norm of all parameters"),
    "weight_distance_init": Diagnostic(
        lambda probe: weight_distance(probe.params, probe.initial_params),
        "distance of the parameters from their first ones",
        ("initial_params",),
    ),
    "grad_norm": Diagnostic(lambda probe: grad_norm(probe.gradients), "Euclidean norm of the gradient", ("loss",)),
    "ntk_rank": Diagnostic(
        _ntk_rank,
        f"effective rank of the tangent kernel on {NTK_EXAMPLES} examples; Tang & Berseth (2025)",
        default=False,
    ),
    "sharpness": Diagnostic(
        _sharpness, "largest eigenvalue of the loss's Hessian, 20 products; Cohen et al. (2021)", ("loss",), False
    ),
}


def measure(probe: Probe, names: str | tuple[str, ...]) -> dict[str, jax.Array]:
    """Those of the diagnostics for which the probe has what they need: name -> () float32. Pure; ValueError for no name.

    Matrix products keep all bits of float32: rounded to TF32, as GPUs may have it, features are of full rank.
    """
    names = (names,) if isinstance(names, str) else names
    if unknown := [name for name in names if name not in DIAGNOSTICS]:
        raise ValueError(f"no diagnostic {unknown[0]!r}: there are {', '.join(DIAGNOSTICS)}")
    with jax.default_matmul_precision("highest"):
        return {
            name: jnp.asarray(DIAGNOSTICS[name].measure(probe), jnp.float32)
            for name in names
            if all(getattr(probe, part) is not None for part in DIAGNOSTICS[name].needs)
        }
