"""Several processes, on one host or on many, that train one run together, or each its part of the seeds.

They meet at HOST:PORT first, in Python: what is wrong is then one line in each, where `jax.distributed` would end the process.
"""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import jax
import numpy as np

from .experiment import ExperimentError

PATIENCE = 60.0  # seconds that the processes wait for each other before they begin
FAREWELL = 20  # seconds that one which ends waits for the others


@dataclass(frozen=True)
class Processes:
    """How many there are, which one this is, and where they meet."""

    count: int = 1
    index: int = 0
    coordinator: str | None = None  # HOST:PORT of the first

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ExperimentError(f"--num-processes must be at least 1, not {self.count}")
        if not 0 <= self.index < self.count:
            raise ExperimentError(f"--process-id must be 0 to {self.count - 1}, not {self.index}")
        if self.count > 1 and self.coordinator is None:
            raise ExperimentError("--num-processes needs --coordinator HOST:PORT, an address of process 0")
        if self.count == 1 and self.coordinator is not None:
            raise ExperimentError("--coordinator needs --num-processes and --process-id")
        if self.coordinator is not None:
            _ = self.address

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = str(self.coordinator).rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ExperimentError(f"--coordinator must be HOST:PORT, not {self.coordinator}")
        return host, int(port)

    def connect(self, patience: float = PATIENCE) -> None:
        """Meet, and make the devices of all processes known to JAX; before anything else is asked of it."""
        if self.count == 1:
            return
        self.meet(patience)
        jax.distributed.initialize(
            self.coordinator,
            self.count,
            self.index,
            initialization_timeout=int(PATIENCE),
            shutdown_timeout_seconds=FAREWELL,
        )

    def leave(self, code: int) -> None:
        """End this process at once where others may wait for it: they end too, instead of waiting."""
        if self.count > 1:
            sys.stdout.flush()
            os._exit(code)

    def meet(self, patience: float = PATIENCE) -> None:
        """Return when all processes have called this; ExperimentError in one line, in each, if they do not or disagree."""
        if self.count > 1:
            deadline = time.monotonic() + patience
            try:
                self._receive(deadline) if self.index == 0 else self._report(deadline)
            except TimeoutError:
                raise ExperimentError(
                    f"process {self.index} of {self.count} waited {patience:g} s at {self.coordinator} for the others"
                ) from None
            except OSError as error:
                raise ExperimentError(f"process {self.index} cannot meet at {self.coordinator}: {error}") from None

    def _receive(self, deadline: float) -> None:
        """As the first process: wait for the others, then tell them to go on, or what is wrong."""
        with ExitStack() as stack:
            server = stack.enter_context(socket.create_server(("", self.address[1])))
            guests: dict[int, socket.socket] = {}
            answer = "go"
            while answer == "go" and len(guests) < self.count - 1:
                server.settimeout(_left(deadline))
                guest = stack.enter_context(server.accept()[0])
                guest.settimeout(_left(deadline))
                try:
                    index, count = (int(word) for word in guest.recv(64).split())
                except ValueError:  # whoever this is
                    continue
                if index in guests or count != self.count:
                    answer = f"process {index} of {count} came to meet process 0 of {self.count}"
                    answer += f", and so did another {index}" if index in guests else ""
                    guests[-1] = guest
                else:
                    guests[index] = guest
            for guest in guests.values():
                guest.sendall(answer.encode())
            for guest in guests.values():
                guest.recv(1)  # they hang up first, which leaves the port free
        if answer != "go":
            raise ExperimentError(answer)

    def _report(self, deadline: float) -> None:
        """As another process: report to the first, and wait for its answer."""
        while True:
            try:
                host = socket.create_connection(self.address, timeout=_left(deadline))
                break
            except ConnectionRefusedError:  # not there yet
                time.sleep(min(0.2, _left(deadline)))
        with host:
            host.sendall(f"{self.index} {self.count}".encode())
            host.settimeout(_left(deadline))
            answer = host.recv(1024).decode()
        if answer != "go":
            raise ExperimentError(answer or "process 0 left without an answer")


ALONE = Processes()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def agreed(number: int | None) -> int | None:
    """The largest number that any process has, the same in each; None if none has one. All must ask."""
    from jax.experimental.multihost_utils import process_allgather

    largest = int(np.max(process_allgather(np.int32(-1 if number is None else number))))
    return None if largest < 0 else largest


@contextmanager
def all_or_none() -> Iterator[None]:
    """What every process must have done before any goes on; ExperimentError in those where it worked if it did not in one."""
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except BaseException:
        agreed(1)
        raise
    if agreed(None):
        raise ExperimentError("another process could not begin; it says why")
