from .sampler import Sampler, SamplerState
from .storage import Memory, Storage, available_memory, decode, memory
from .uniform import uniform

__all__ = ["Memory", "Sampler", "SamplerState", "Storage", "available_memory", "decode", "memory", "uniform"]
