"""Experiments and the loop that runs them. Names load on first use, so that the command line answers before JAX is up."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .experiment import Experiment, ExperimentError
    from .presets import PRESETS
    from .run import Interrupted, Result, TrainingStopped, train
    from .seeds import train_seeds

__all__ = [
    "PRESETS",
    "Experiment",
    "ExperimentError",
    "Interrupted",
    "Result",
    "TrainingStopped",
    "train",
    "train_seeds",
]

_HOMES = {"Experiment": "experiment", "ExperimentError": "experiment", "PRESETS": "presets", "train_seeds": "seeds"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES.get(name, 'run')}", __name__), name)
