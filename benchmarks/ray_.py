"""A suite on a Ray cluster: each run is a task with CPUs and GPUs of its own, tried again where a node is lost.

OUT must be one directory on every node, so lie on a shared file system whose locks hold between nodes, because a run goes on
from its newest checkpoint on whichever node it is tried again. Every node needs the same version of resprout.
"""

import dataclasses
import fcntl
import importlib.metadata
import importlib.util
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ..training import Experiment
from ..training.metrics import lenient
from ..training.process import environment_with, last_words, signals, wait
from .progress import SuiteProgress
from .runner import Failure, Run, conclude, conclude_finished, log_path, pace, start

POLL = 0.5  # seconds between looks at the tasks
CONNECT = 5.0  # seconds within which somebody must answer at the address
JOIN = 60.0  # seconds within which the cluster must let us in, and within which every node must have looked for OUT
RELEASE = 120.0  # seconds that a run waits until the process of a lost node has let go of its directory
SAVE = 300.0  # seconds that interrupted runs have for their checkpoints
RETRIES = 3  # of a run whose node or process was lost
JOIN_CODE = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"


class Needs(NamedTuple):
    """What each run takes of a node."""

    cpus: int = 1
    gpus: float = 0.0  # below 1, runs share one


def run_all(
    pending: Sequence[Run], out: Path, address: str, needs: Needs, keep_replay: bool, console: Console
) -> list[Failure]:
    """As `runner.run_all`, on the cluster at `address`, or on one started on this machine if that is `local`.

    A run whose node or process is lost is tried again, from its newest checkpoint. ValueError, in one line and with nothing
    created, where there is no cluster, no node is large enough, or one does not see `out`.
    """
    check_needs(needs)
    check_address(address)
    if not pending:
        return []
    import ray

    dashboard = False if address == "local" else None  # None: as the cluster has it
    ray.init(address=address, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    with signals(signal.default_int_handler):
        try:
            places = count_places(nodes(), needs)
            check_shared(out)
            task = ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus, max_retries=RETRIES, max_calls=1)(work)
            return follow(pending, task, places, needs, keep_replay, console)
        finally:
            ray.shutdown()


def follow(
    pending: Sequence[Run], task: Any, places: int, needs: Needs, keep_replay: bool, console: Console
) -> list[Failure]:
    """Hand every run to Ray, and wait for all of them; a signal stops them, each after a checkpoint."""
    import ray

    failures: list[Failure] = []
    references: dict[Any, Run] = {}
    queued: dict[Run, int] = {}  # length of the log of a run that has said nothing yet
    try:
        with SuiteProgress([run.arm for run in pending], places, console, pace) as progress:
            for run in pending:
                log_path(run).parent.mkdir(parents=True, exist_ok=True)
                log_path(run).touch()
                queued[run] = log_path(run).stat().st_size
                experiment = dataclasses.replace(run.experiment, out=str(run.directory.absolute()))
                reference = task.options(name=str(run)).remote(experiment.to_json(), needs)
                references[reference] = run
            while references:
                over, _ = ray.wait(list(references), timeout=POLL)
                for run in [run for run, size in queued.items() if log_path(run).stat().st_size > size]:
                    del queued[run]
                    progress.begin(run, run.arm)
                for reference in over:
                    run = references.pop(reference)
                    if queued.pop(run, None) is not None:  # lost before its first word
                        progress.begin(run, run.arm)
                    problem = why_lost(reference)
                    if problem is not None:
                        failures.append(Failure(run, problem, log_path(run)))
                    progress.end(run, "FAILED" if problem else conclude(run, keep_replay), ok=problem is None)
                progress.show()
    finally:
        if references:
            for reference in references:
                ray.cancel(reference)
            with lenient():
                console.print(f"stopping {len(references) - len(queued)} runs, each after a checkpoint")
            over, _ = ray.wait(list(references), num_returns=len(references), timeout=SAVE)
            conclude_finished([references[reference] for reference in over], keep_replay)
    return failures


def why_lost(reference: Any) -> str | None:
    """One line about a task that is over; None if it ended well."""
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return str(error.cause).splitlines()[0]
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


# What must be right before anything begins


def check_needs(needs: Needs) -> None:
    """ValueError, in one line, for what no task can have."""
    if needs.cpus < 1:
        raise ValueError(f"--cpus-per-run must be at least 1, not {needs.cpus}")
    if needs.gpus < 0 or (needs.gpus > 1 and needs.gpus % 1):
        raise ValueError(f"--gpus-per-run must be a fraction of one GPU or a whole number, not {needs.gpus:g}")


def check_address(address: str) -> None:
    """ValueError, in one line and in bounded time, unless `address` is local or a cluster that lets us in."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError("--ray needs an extra: pip install 'resprout[ray]'")
    if address == "local":
        return
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or "/" in host or not port.isdecimal():
            raise ValueError(f"--ray must be local, auto or HOST:PORT, not {address!r}")
        try:
            socket.create_connection((host, int(port)), CONNECT).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"no Ray cluster at {address}: {error}") from None
    command = [sys.executable, "-P", "-c", JOIN_CODE, address]  # where there is none, Ray may hang or end the process
    try:
        asked = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=JOIN)
    except subprocess.TimeoutExpired:
        raise ValueError(f"no Ray cluster at {address} let us in within {JOIN:.0f} s") from None
    if asked.returncode:
        said = [line.strip() for line in asked.stderr.decode(errors="replace").splitlines() if line.strip()]
        raise ValueError(f"no Ray cluster at {address} lets us in: {said[-1] if said else asked.returncode}")


def nodes() -> list[dict[str, Any]]:
    """What Ray knows of each node of the cluster that this process is connected to."""
    import ray

    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return known


def count_places(nodes: Sequence[dict[str, Any]], needs: Needs) -> int:
    """How many runs the nodes hold at a time. ValueError, in one line, if none."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    places = 0
    for has in alive:
        by_cpu = has.get("CPU", 0) // needs.cpus
        per_gpu = 1 / needs.gpus if 0 < needs.gpus < 1 else 1
        by_gpu = has.get("GPU", 0) * int(per_gpu) // max(needs.gpus, 1) if needs.gpus else by_cpu
        places += int(min(by_cpu, by_gpu))
    if not places:
        said = "; ".join(f"{has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs" for has in alive)
        raise ValueError(f"no node has {needs.cpus} CPUs and {needs.gpus:g} GPUs for a run; there are: {said}")
    return places


def check_shared(out: Path) -> None:
    """ValueError, in one line, unless every node has our version and sees what we write beside `out`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    absolute = out.absolute()
    folder = next(path for path in (absolute, *absolute.parents) if path.is_dir())
    word, ours = secrets.token_hex(8), importlib.metadata.version("resprout")
    probe = ray.remote(num_cpus=0, max_retries=0)(look)
    problems = []
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".shared-") as file:
        file.write(word)
        file.flush()
        os.fsync(file.fileno())
        asked = {
            probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                file.name
            ): f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            for node in nodes()
            if node["Alive"]
        }
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=JOIN)
        for reference, name in asked.items():
            if reference not in answered:
                problems.append(f"{name} did not look within {JOIN:.0f} s")
                continue
            try:
                seen, theirs = ray.get(reference)
            except ray.exceptions.RayError as error:
                problems.append(f"{name} cannot run resprout ({type(error).__name__})")
                continue
            if seen != word:
                problems.append(f"{name} does not see {folder}")
            elif theirs != ours:
                problems.append(f"{name} has resprout {theirs}, not {ours}")
    if problems:
        raise ValueError(f"every node must have resprout and see --out: {'; '.join(problems)}")


# What the nodes do


def look(path: str) -> tuple[str | None, str]:
    """What stands in a file, None if this node has none, and the version of resprout here."""
    version = importlib.metadata.version("resprout")
    try:
        return Path(path).read_text(), version
    except OSError:
        return None, version


def work(experiment: dict[str, Any], needs: Needs) -> None:
    """One run, in a process of its own that ends with this one; what it says goes into its log.

    Not in this process, for Ray and JAX each bring libraries of one name that get into each other's way.
    """
    run = Experiment.from_json(experiment)
    directory = Path(str(run.out))
    environment = environment_with(needs.gpus) if needs.gpus else os.environ | {"JAX_PLATFORMS": "cpu"}
    wait_for_release(directory)
    cores = claim_cores(needs.cpus) or sorted(os.sched_getaffinity(0))
    process, said_before = start([run], cores, environment)
    try:
        code = wait(process)
    except BaseException:  # the task is cancelled
        process.send_signal(signal.SIGINT)
        wait(process)
        raise
    if code:
        raise RuntimeError(last_words(directory.with_suffix(".log"), code, said_before))


def claim_cores(count: int) -> list[int]:
    """As many cores of this node as no other run has claimed, until this process ends; none where too few are free."""
    claimed = []
    for core in sorted(os.sched_getaffinity(0)):
        path = Path(tempfile.gettempdir(), f"resprout-{os.getuid()}-core-{core}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # never closed: the lock ends with the process
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        claimed.append(core)
        if len(claimed) == count:
            return claimed
    return []


def wait_for_release(directory: Path) -> None:
    """Until no process holds the run: one on a node that is given up may not know that yet. `train` has the last word."""
    lock, deadline = directory / ".lock", time.monotonic() + RELEASE
    while lock.exists() and time.monotonic() < deadline:
        with lock.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(1)
