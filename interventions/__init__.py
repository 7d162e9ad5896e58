"""Interventions: what keeps a network able to learn; pure, composable, and right on any network that can be traced."""

from .architectures import crelu, deep_fourier, helu, layer_norm, smooth_leaky
from .averaging import elastic_reset, hare_and_tortoise
from .base import (
    Context,
    Control,
    Intervention,
    InterventionError,
    chain,
    context_for,
    every,
    identity,
    intervene,
    method,
    on,
)
from .injection import inject, plasticity_injection
from .optimisers import adam_rel, adam_reset, clip_spikes, gate_by_utility, spam, upgd
from .penalties import (
    add_churn_penalty,
    add_infer,
    add_l2_init,
    add_parseval,
    add_spectral,
    add_wasserstein_init,
    churn_penalty,
    infer,
    l2_init,
    parseval,
    spectral,
    wasserstein_init,
    weight_decay,
)
from .perturb import dormancy_perturb, shrink_and_perturb
from .projections import clip_weights, normalize_and_project, project_norms, weight_clipping
from .pruning import magnitude_pruning
from .redo import recycle, redo
from .replay_ratio import adaptive_replay_ratio
from .resets import reset
from .surgery import Reference, edit, forget_statistics
from .triggers import Trigger, plateau, task_boundary, threshold, when
from .units import continual_backprop, self_normalized_resets

# What the command line calls by name.
METHODS = {
    function.__name__: function
    for function in (
        *(
            identity,
            redo,
            continual_backprop,
            self_normalized_resets,
            reset,
            shrink_and_perturb,
            dormancy_perturb,
            hare_and_tortoise,
            elastic_reset,
            magnitude_pruning,
            plasticity_injection,
        ),
        *(adam_reset, adam_rel, spam, upgd, weight_clipping, normalize_and_project),
        *(l2_init, weight_decay, parseval, spectral, wasserstein_init, churn_penalty, infer),
        *(layer_norm, crelu, deep_fourier, helu, smooth_leaky, adaptive_replay_ratio),
    )
}

__all__ = [
    "METHODS",
    "Context",
    "Control",
    "Intervention",
    "InterventionError",
    "Reference",
    "Trigger",
    "adam_rel",
    "adam_reset",
    "adaptive_replay_ratio",
    "add_churn_penalty",
    "add_infer",
    "add_l2_init",
    "add_parseval",
    "add_spectral",
    "add_wasserstein_init",
    "chain",
    "churn_penalty",
    "clip_spikes",
    "clip_weights",
    "context_for",
    "continual_backprop",
    "crelu",
    "deep_fourier",
    "dormancy_perturb",
    "edit",
    "elastic_reset",
    "every",
    "forget_statistics",
    "gate_by_utility",
    "hare_and_tortoise",
    "helu",
    "identity",
    "infer",
    "inject",
    "intervene",
    "l2_init",
    "layer_norm",
    "magnitude_pruning",
    "method",
    "normalize_and_project",
    "on",
    "parseval",
    "plasticity_injection",
    "plateau",
    "project_norms",
    "recycle",
    "redo",
    "reset",
    "self_normalized_resets",
    "shrink_and_perturb",
    "smooth_leaky",
    "spam",
    "spectral",
    "task_boundary",
    "threshold",
    "upgd",
    "wasserstein_init",
    "weight_clipping",
    "weight_decay",
    "when",
]
