from .reshuffled import reshuffled
from .sampler import Sampler, SamplerState
from .storage import Memory, Storage, available_memory, decode, memory
from .uniform import uniform, without_replacement

__all__ = [
    "Memory",
    "Sampler",
    "SamplerState",
    "Storage",
    "available_memory",
    "decode",
    "memory",
    "reshuffled",
    "uniform",
    "without_replacement",
]
