"""What a process that trains relies on: freed memory is used again, and parameters are drawn however few threads there are."""

import os
import platform
import subprocess
import sys

import pytest

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
