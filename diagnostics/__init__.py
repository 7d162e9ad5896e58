"""Diagnostics: what a network's units are, and how much of them is alive."""

from .labels import LayerGraphError
from .layers import Layer, LayerGraph, UnitMasks, layer_graph

__all__ = ["Layer", "LayerGraph", "LayerGraphError", "UnitMasks", "layer_graph"]
