"""Diagnostics: what a network's units are, how much of them is alive, and whether it can still learn.

Pure functions of arrays: they work under jit, grad and vmap, and wait for no device.
"""

from .churn import action_churn, gaussian_churn, policy_churn, value_churn
from .curvature import ntk, ntk_rank, sharpness
from .dormancy import (
    activation_gradients,
    active_units,
    dormancy,
    dormancy_name,
    dormant_fraction,
    dormant_units,
    gradient_dormancy,
    gradient_scores,
    named_leaves,
    persistent_dormancy,
    unit_scores,
    unit_utilities,
)
from .labels import LayerGraphError
from .layers import Layer, LayerGraph, UnitMasks, layer_graph
from .norms import feature_norm, grad_norm, gradient_spikes, weight_distance, weight_norm, weight_norms
from .rank import approximate_rank, effective_rank, feature_matrix, feature_rank, srank, stable_rank
from .suite import DIAGNOSTICS, Diagnostic, Probe, measure

__all__ = [
    "DIAGNOSTICS",
    "Diagnostic",
    "Layer",
    "LayerGraph",
    "LayerGraphError",
    "Probe",
    "UnitMasks",
    "action_churn",
    "activation_gradients",
    "active_units",
    "approximate_rank",
    "dormancy",
    "dormancy_name",
    "dormant_fraction",
    "dormant_units",
    "effective_rank",
    "feature_matrix",
    "feature_norm",
    "feature_rank",
    "gaussian_churn",
    "grad_norm",
    "gradient_dormancy",
    "gradient_scores",
    "gradient_spikes",
    "layer_graph",
    "measure",
    "named_leaves",
    "ntk",
    "ntk_rank",
    "persistent_dormancy",
    "policy_churn",
    "sharpness",
    "srank",
    "stable_rank",
    "unit_scores",
    "unit_utilities",
    "value_churn",
    "weight_distance",
    "weight_norm",
    "weight_norms",
]
