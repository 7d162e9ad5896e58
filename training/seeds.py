"""One experiment with several seeds at once: in one loop, or in processes on cores of their own.

OUT/s0/ ...      the run directory of each seed, as a run of its own makes it
OUT/s0.log       what its process said
OUT/curve.png    the returns of all seeds, as a mean and a band
OUT/seeds.json   which seeds
"""

import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import jax

from ..envs import EnvSpec
from . import checkpoint
from .batched_loop import why_apart
from .experiment import Experiment, ExperimentError
from .files import final_return, read_record
from .metrics import Tracker, plot_seeds, say
from .placement import check_memory, describe_replay, frames_on_device, lacks_memory, loop_on_device, make_rings
from .process import STOPS, environment_with, last_words, prepare_process, signals, start, wait
from .processes import ALONE, Processes
from .run import (
    Interrupted,
    Run,
    TrainingStopped,
    make_env,
    new_directory,
    train_batched,
    train_on_device,
)
from .sharing import share_seeds
from .sources import open_sources

Mode = Literal["auto", "vmap", "processes"]
POLL = 0.2  # seconds between looks at the running processes
CORES_BESIDE_ACCELERATOR = 4  # at least, of each process that trains on one: to compile, step environments and feed it


class SeedsApart(ExperimentError):
    """Seeds that cannot train in one process, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: seeds can train in processes only")
        self.reason = reason


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2" as numbers; ExperimentError in one line if it is none."""
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ExperimentError(f"--seeds must be numbers with commas between, like 0,1,2, not {text!r}") from None
    if len(set(seeds)) < len(seeds):
        raise ExperimentError(f"--seeds names a seed twice: {text}")
    return seeds


def train_seeds(
    experiment: Experiment,
    seeds: Sequence[int],
    *,
    mode: Mode = "auto",
    devices: int | None = 1,
    resume: bool = False,
    quiet: bool = False,
    profile: int = 0,
    processes: Processes = ALONE,
) -> Path:
    """Train `experiment` with every one of `seeds`; the directory of all, with one of each seed in it.

    mode: vmap trains all in one process, vmapped, in a loop on the device or on the host as one seed would; processes
        trains as many at a time as there are cores, each on one, and its seeds are bit for bit what runs of their own are;
        on an accelerator each has four cores, so that fewer share it, and what holds of runs there holds of them.
        auto: vmap on an accelerator, processes on a CPU.
    devices: that share the seeds of a loop on the device equally in mode vmap; None for all there are.
    resume: go on in `experiment.out`, where seeds that are finished stay as they are.
    profile: gradient steps to trace in mode vmap, into the run directory of the first seed (`Profile`); 0 for none.
    processes: that share the seeds by turns. Seeds have nothing to tell each other, so they meet once, to begin, and the
        last to finish draws the curve.

    Everything that can be wrong is found before anything is created. Interrupted and TrainingStopped as of `train`.
    """
    prepare_process()
    Tracker.check(experiment.track)
    if mode != "vmap":  # or this process, which builds the agent, keeps most of an accelerator from those it starts
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    chosen, spec, on_device = _mode(experiment, mode, devices)
    if profile and chosen == "processes":
        raise ExperimentError("--profile traces seeds of one process: add --seeds-mode vmap, or leave out --seeds")
    out = Path(str(experiment.out)) if resume or processes.index else _new_directory(experiment, seeds)
    all_seeds = [dataclasses.replace(experiment, seed=seed, out=str(out / f"s{seed}")) for seed in seeds]
    each = all_seeds[processes.index :: processes.count]
    if not each:
        raise ExperimentError(f"{len(seeds)} seeds are too few for {processes.count} processes")
    if not resume and any(_begun(own) for own in each):
        raise ExperimentError(f"{out} has these seeds already; go on with --resume {out}, or give another --out")
    for own in each:
        if _begun(own) and read_record(Path(str(own.out), "config.json"), digest=str)["digest"] != own.digest():
            raise ExperimentError(f"{own.out} is a run of another experiment")
    processes.meet()

    def begin() -> None:
        out.mkdir(parents=True, exist_ok=True)
        if processes.index == 0:
            _note(out, all_seeds)

    if chosen == "vmap":
        _train_together(each, out, devices, quiet, profile, begin)
    else:
        _train_apart(each, out, spec, on_device, quiet, begin)
    if all(_is_finished(own) for own in all_seeds):
        plot_seeds(out, [Path(str(own.out)) for own in all_seeds])
    return out


def _mode(experiment: Experiment, mode: Mode, devices: int | None) -> tuple[Mode, EnvSpec, bool]:
    """What `auto` stands for here, what the environments are like, and whether the loop runs on the device.

    EnvError, ExperimentError and the agents' own where something does not fit.
    """
    with closing(make_env(experiment, training=True, num_envs=experiment.num_envs)) as env:
        spec, on_device = env.spec, loop_on_device(experiment, env)
        agent = experiment.build_agent(spec)
        reason = None if on_device else why_apart(experiment, agent)
    controls = [each.name for each in experiment.acting if each.control]
    if controls:
        reason = f"{controls[0]} gives every seed a replay ratio of its own"
    together = mode == "vmap" or devices != 1
    if mode == "processes" and devices != 1:
        raise ExperimentError("--devices shares seeds of one process: leave out --seeds-mode processes")
    if together and reason:
        raise SeedsApart(reason)
    if devices != 1 and not on_device:
        raise ExperimentError(
            f"--devices shares seeds of a loop on the device, and that of {experiment.env} is on the host"
        )
    if mode == "processes" or reason or (not together and jax.default_backend() == "cpu"):
        return "processes", spec, on_device
    return "vmap", spec, on_device


def _new_directory(experiment: Experiment, seeds: Sequence[int]) -> Path:
    directory = new_directory(experiment)
    if experiment.out is not None:
        return directory
    return directory.with_name(directory.name.replace(f"-s{experiment.seed}-", f"-s{min(seeds)}to{max(seeds)}-"))


def _note(out: Path, each: Sequence[Experiment]) -> None:
    """The experiment is for when none of the seeds gets to its config.json."""
    note = {"seeds": [own.seed for own in each], "experiment": each[0].to_json()}
    checkpoint.write_atomically(out / "seeds.json", json.dumps(note))


def read_seeds(out: Path) -> tuple[int, ...] | None:
    """The seeds of a directory of several; None if it is none."""
    path = out / "seeds.json"
    return tuple(read_record(path, seeds=list)["seeds"]) if path.exists() else None


def _begun(experiment: Experiment) -> bool:
    return Path(str(experiment.out), "config.json").exists()


# In one loop


def _train_together(
    each: Sequence[Experiment],
    out: Path,
    devices: int | None,
    quiet: bool,
    profile: int,
    begin: Callable[[], None],
) -> None:
    each = [own for own in each if not _is_finished(own)]
    if not each:
        return begin()
    sharding = share_seeds(len(each), devices)
    first = each[0]
    with ExitStack() as stack:
        envs = [stack.enter_context(closing(make_env(own, training=True, num_envs=own.num_envs))) for own in each]
        spec = envs[0].spec
        agent = first.build_agent(spec)
        on_device = loop_on_device(first, envs[0])
        frames_there = _check_memory(first, spec, on_device, len(each), sharding.num_devices if sharding else 1)
        config = Path(str(first.out), "config.json")
        recorded = read_record(config).get("sources", []) if _begun(first) else []
        past = open_sources(first.replay_from, first.agent.batch_size, describe_replay(first, spec), recorded)
        rings = make_rings(first, spec, len(each), sharding) if on_device else None
        runs = [
            Run(own, Path(str(own.out)), env, agent, past, quiet or place > 0, stack, rings, place, frames_there)
            for place, (own, env) in enumerate(zip(each, envs, strict=True))
        ]
        for run in runs[1:]:
            run.share_compiled(runs[0])
        runs[0].trace(profile)
        until = _last_in_common(each)
        for index, (own, run) in enumerate(zip(each, runs, strict=True)):
            run.whole = out
            run.start(_begun(own), until)
            if index == 0:
                begin()
        steps = {run.training.agent_step for run in runs}
        if len(steps) > 1:
            raise ExperimentError(
                f"the seeds in {out} were saved at different agent steps ({', '.join(map(str, sorted(steps)))}): go on "
                "with --seeds-mode processes, or a suite without --seeds-together"
            )
        try:
            train_on_device(runs, rings, sharding) if rings else train_batched(runs)
        except Interrupted as stop:
            raise Interrupted(stop.exit_code - 128, out) from None


def _last_in_common(each: Sequence[Experiment]) -> int | None:
    """The agent step to go back to where a kill came between the checkpoints of two seeds: the newest that all have.

    None where all are as far, and where they are further apart than one checkpoint, as after training in processes.
    """
    folders = [Path(str(own.out), "checkpoints") for own in each]
    if not all(checkpoint.names(folder) for folder in folders):
        return None
    try:
        steps = {int(checkpoint.newest(folder)[0].name) for folder in folders}
        furthest, until = max(steps), None
        while len(steps) > 1:
            until = min(steps)
            steps = {int(checkpoint.newest(folder, until=until)[0].name) for folder in folders}
    except checkpoint.CheckpointError:
        return None
    apart = furthest - min(steps)
    return until if apart < each[0].checkpoint_every + each[0].num_envs else None


def _check_memory(experiment: Experiment, spec: EnvSpec, on_device: bool, seeds: int, devices: int = 1) -> bool:
    """Whether only the frames of so many seeds' replays go to the device; ExperimentError unless there is room for all."""
    if on_device:
        if lacking := lacks_memory(experiment, spec, seeds // devices):
            raise ExperimentError(f"{seeds} seeds: {lacking}; lower --agent.capacity")
        return False
    frames_there = frames_on_device(experiment, spec, seeds)
    check_memory(experiment, spec, frames_there=frames_there, seeds=seeds)
    return frames_there


# In processes


def _train_apart(
    each: Sequence[Experiment], out: Path, spec: EnvSpec, on_device: bool, quiet: bool, begin: Callable[[], None]
) -> None:
    for own in each:
        Experiment.from_json(own.to_json())  # says what cannot be handed to another process
    waiting = [own for own in reversed(each) if not _is_finished(own)]
    shares = _shares(1 if jax.default_backend() == "cpu" else CORES_BESIDE_ACCELERATOR)[: len(waiting)]
    if waiting:  # each process sees no more than its own replay, and memory is taken as it fills
        _check_memory(waiting[0], spec, on_device, len(shares))
    running: dict[int, tuple[Experiment, subprocess.Popen[bytes], int]] = {}  # by place: which share
    failed: dict[int, str] = {}  # seed -> why
    received: list[int] = []
    begin()

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        waiting.clear()
        for _, process, _ in running.values():
            process.send_signal(number)

    try:
        with signals(receive):
            while waiting or running:
                for place, cores in enumerate(shares):
                    if waiting and place not in running:
                        own = waiting.pop()
                        running[place] = own, *_start(own, cores, 1 / len(shares))
                time.sleep(POLL)
                for place, (own, process, said_before) in list(running.items()):
                    if process.poll() is None:
                        continue
                    wait(process)
                    del running[place]
                    log = Path(f"{own.out}.log")
                    if process.returncode and not received:
                        failed[own.seed] = last_words(log, process.returncode, said_before)
                    told = "failed" if process.returncode else final_return(Path(str(own.out)))
                    if process.returncode - 128 in STOPS:
                        told = "stopped"
                    say(f"seed {own.seed}: {told}; {log}", quiet)
    finally:
        for _, process, _ in running.values():
            if not received:
                process.terminate()
        for _, process, _ in running.values():
            wait(process)
    if received:
        raise Interrupted(received[0], out)
    if failed:
        raise TrainingStopped(f"seed {', '.join(map(str, failed))} failed: {next(iter(failed.values()))}")


def _shares(size: int) -> list[list[int]]:
    """The cores of this process in shares of `size` or more, or in one; each is empty where a process cannot be kept to its cores."""
    if not hasattr(os, "sched_getaffinity"):
        return [[]] * max(1, (os.cpu_count() or 1) // size)
    cores = sorted(os.sched_getaffinity(0))
    count = max(1, len(cores) // size)
    return [cores[place::count] for place in range(count)]


def _start(experiment: Experiment, cores: list[int], share: float) -> tuple[subprocess.Popen[bytes], int]:
    task = {"experiment": experiment.to_json(), "cores": cores}
    return start("resprout.training.one_seed", task, Path(f"{experiment.out}.log"), environment_with(share))


def _is_finished(experiment: Experiment) -> bool:
    summary = Path(str(experiment.out), "summary.json")
    return summary.exists() and bool(read_record(summary, agent_steps=int)["agent_steps"] >= experiment.steps)
