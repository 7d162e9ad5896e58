"""A process that trains: what it sets once, how it is started beside others and ends, and how much memory it has had."""

import ctypes
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

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


def start(
    module: str, task: dict[str, Any], log: Path, environment: dict[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], int]:
    """`python -m MODULE TASK`, the task as JSON, and the length of its log so far; it is to call `end_with_parent`.

    In a session of its own: a Ctrl-C of the terminal does not reach it, only our signal does.
    """
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, json.dumps(task)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return process, file.tell()


def wait(process: subprocess.Popen[bytes]) -> int:
    """Until it has ended, and only then let go of what ties it to this process; its exit code."""
    code = process.wait()
    if process.stdin:
        process.stdin.close()
    return code


def end_with_parent() -> None:
    """From now on this process ends at the latest when the one that started it does, even if that is killed."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # until the other end is gone, which a kill leaves no way around
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def last_words(log: Path, code: int, said_before: int) -> str:
    """Why a process ended with `code`, by the last line of its log, whose first `said_before` bytes are others'."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    text = log.read_bytes()[said_before:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def signals(receive: Callable[[int, Any], None]) -> Iterator[dict[signal.Signals, Any]]:
    """`receive(number, frame)` in place of what `STOPS` had before, which is the result.

    SIGHUP is what a terminal sends that is closed. Often the shell sends it once more, so only the first counts; and none
    where it was ignored before, as under nohup. Off the main thread nothing is changed, for there the program that called us
    owns the signals.
    """

    def hang_up(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)
        receive(number, frame)

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.getsignal(number) for number in STOPS}
        if previous[signal.SIGHUP] == signal.SIG_IGN:
            del previous[signal.SIGHUP]
    try:
        for number in previous:
            signal.signal(number, hang_up if number == signal.SIGHUP else receive)
        yield previous
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
