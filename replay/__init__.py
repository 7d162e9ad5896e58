from .frames import DeviceFrames
from .masked import masked
from .minari_ import MinariData, export_minari
from .mixture import Part, Source, gather_mixed, mixture
from .past import Description, Episode, PastReplay, PastReplayError
from .prioritized import prioritized
from .reshuffled import reshuffled
from .ring import DeviceStorage, Replay, Rings, RingState
from .sampler import COMPILER_OPTIONS, Sampler, SamplerState, no_priorities
from .storage import Layout, Memory, Storage, available_memory, decode, memory
from .uniform import uniform, without_replacement

__all__ = [
    "COMPILER_OPTIONS",
    "Description",
    "DeviceFrames",
    "DeviceStorage",
    "Episode",
    "Layout",
    "Memory",
    "MinariData",
    "Part",
    "PastReplay",
    "PastReplayError",
    "Replay",
    "RingState",
    "Rings",
    "Sampler",
    "SamplerState",
    "Source",
    "Storage",
    "available_memory",
    "decode",
    "export_minari",
    "gather_mixed",
    "masked",
    "memory",
    "mixture",
    "no_priorities",
    "prioritized",
    "reshuffled",
    "uniform",
    "without_replacement",
]
