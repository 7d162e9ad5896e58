"""What a process that trains relies on: freed memory is used again, and parameters are drawn however few threads there are."""

import os
import platform
import subprocess
import sys

import pytest

from resprout.training.process import environment_with

# Allocates and frees 100 MB ten times, in the first thread or another, and prints the page faults of the last nine.
PROGRAM = """
import ctypes, resource, threading
from resprout.training.process import prepare_process
if {prepared}:
    prepare_process()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def use():
    block = libc.malloc(100_000_000)
    ctypes.memset(block, 1, 100_000_000)
    libc.free(block)
def count():
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(9):
        use()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=count)
if {other_thread}:
    thread.start()
    thread.join()
else:
    count()
"""
HUGE_PAGES = 9 * 100_000_000 // 2**21  # page faults where the system gives the largest pages, and the fewest of them


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("other_thread", [False, True])
@pytest.mark.parametrize("prepared", [True, False])
def test_large_blocks_are_used_again(prepared, other_thread):
    assert (faults(prepared, {}, other_thread) < HUGE_PAGES / 10) == prepared


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_the_users_own_settings_are_left_alone():
    assert faults(True, {"MALLOC_TRIM_THRESHOLD_": "1000000"}) > HUGE_PAGES / 10


def test_processes_side_by_side_are_told_their_part_of_an_accelerator(monkeypatch):
    for name in list(os.environ):
        if "MEM_FRACTION" in name or "PREALLOCATE" in name:
            monkeypatch.delenv(name)
    assert environment_with(1) == dict(os.environ)
    parts = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.300"}
    assert environment_with(1 / 3) == os.environ | parts
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.2")  # JAX refuses both names at once
    assert environment_with(1 / 3) == dict(os.environ)


def test_peak_memory_counts_what_was_given_back():
    """And nothing of the process that started this one, which holds more."""
    program = """
from resprout.training.process import peak_device_memory, peak_memory
before = peak_memory()
block = b"x" * 300_000_000
del block
assert 250_000_000 < peak_memory() - before < 350_000_000
assert peak_device_memory() is None  # a CPU does not say
"""
    block = b"x" * 1_000_000_000
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
    del block


def faults(prepared: bool, chosen: dict[str, str], other_thread: bool = False) -> int:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-P", "-c", PROGRAM.format(prepared=prepared, other_thread=other_thread)]
    done = subprocess.run(command, env=environment | chosen, capture_output=True, text=True, check=True)
    return int(done.stdout)


INIT = """
import jax
from resprout.agents import DrQv2
from resprout.envs import EnvSpec
agent = DrQv2().build(EnvSpec("x", 1, (84, 84, 9), "uint8", discrete=False, action_size=6))
jax.block_until_ready(jax.jit(agent.init)(jax.random.key(0)))
"""


def test_orthogonal_kernels_are_drawn_with_two_threads():
    """Where flax's own initialiser is used, this waits for ever on a machine of two cores."""
    subprocess.run([sys.executable, "-P", "-c", INIT], check=True, timeout=120)
