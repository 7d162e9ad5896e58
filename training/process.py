"""A process that trains: what it sets once, what it is started with beside others, and how much memory it has had."""

import ctypes
import os
import platform
import resource
import sys
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


def environment_with(share: float) -> dict[str, str]:
    """The variables of a process that trains on a share of an accelerator, beside others that have the rest.

    It is told its part of the memory, so that it counts on no more. What the user has set of this stays.
    """
    if share >= 1:
        return dict(os.environ)
    shares = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # JAX takes either name, not both
        shares["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * share:.3f}"
    return shares | os.environ


def peak_memory() -> int:
    """The most bytes that this process has had in the host's memory."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):  # Linux's getrusage has a process begin with what its parent had
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device_memory() -> int | None:
    """The most bytes that this process has had on its first device; None where that does not say, as a CPU does not."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


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
