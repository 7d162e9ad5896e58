"""What a process that trains sets once: where compiled functions are kept, and what becomes of freed memory."""

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

import jax

# Parameters of mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST = 2**31 - 1  # bytes; mallopt takes an int


def prepare_process() -> None:
    """Before the first compilation of a run; harmless if called again."""
    _use_compilation_cache()
    _keep_freed_memory()


def _use_compilation_cache() -> None:
    """Keep compiled functions in the user's cache folder, unless JAX was told of another."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "resprout" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@cache
def _keep_freed_memory() -> None:
    """Let the C library reuse large blocks that XLA frees instead of handing them back to the system.

    Every call of a compiled function on a CPU allocates its temporaries anew. Under glibc's defaults those of a network of
    convolutions come from the system, page by page and zeroed, in every gradient step (docs/performance.md). All threads
    share one arena, for those of other threads than the first take 64 MB at most. Left alone: other C libraries, and
    whoever set glibc's own variables.
    """
    chosen = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not chosen:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST)
        libc.mallopt(M_ARENA_MAX, 1)
