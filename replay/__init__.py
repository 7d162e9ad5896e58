from .minari_ import MinariData, export_minari
from .mixture import Part, Source, gather_mixed, mixture
from .past import Description, Episode, PastReplay, PastReplayError
from .reshuffled import reshuffled
from .sampler import Sampler, SamplerState
from .storage import Layout, Memory, Storage, available_memory, decode, memory
from .uniform import uniform, without_replacement

__all__ = [
    "Description",
    "Episode",
    "Layout",
    "Memory",
    "MinariData",
    "Part",
    "PastReplay",
    "PastReplayError",
    "Sampler",
    "SamplerState",
    "Source",
    "Storage",
    "available_memory",
    "decode",
    "export_minari",
    "gather_mixed",
    "memory",
    "mixture",
    "reshuffled",
    "uniform",
    "without_replacement",
]
