"""Where the loop of a run and its replay lie: on the host or on the device, and whether there is room."""

from typing import Any

import jax
from jax.sharding import Mesh, Sharding

from ..agents.learner import PyTree
from ..envs import Env, EnvSpec
from ..replay import Description, DeviceFrames, Layout, Rings, available_memory, memory
from .device_loop import why_not
from .experiment import Experiment, ExperimentError
from .sharing import everywhere


def loop_on_device(experiment: Experiment, env: Env) -> bool:
    """Whether the loop runs on the device whole; ExperimentError if it should and cannot."""
    reason = why_not(experiment, env) or lacks_memory(experiment, env.spec)
    if experiment.loop == "device" and reason is not None:
        raise ExperimentError(f"--loop device: {reason}")
    on_device = experiment.loop != "host" and reason is None
    if on_device and experiment.replay_on == "host":
        raise ExperimentError("--replay-on host: the replay of a loop on the device lies there too; add --loop host")
    return on_device


def slots_on_device(experiment: Experiment, spec: EnvSpec) -> int:
    """The capacity, but no more than a run of this length fills: all of it is allocated at once."""
    filled = -(-experiment.steps // spec.num_envs) * spec.num_envs
    return min(experiment.agent.capacity, max(filled, spec.num_envs * (2 * experiment.agent.n_step - 1)))


def lacks_memory(experiment: Experiment, spec: EnvSpec, seeds: int = 1) -> str | None:
    """Why the replay of several seeds does not fit on the device; None if it does."""
    needed = seeds * memory(slots_on_device(experiment, spec), **replay_arguments(experiment, spec)).worst_case
    free = device_memory()
    text = f"a replay of {needed / 1e9:.3g} GB does not fit on the device ({free / 1e9:.1f} GB free)"
    return text if needed > 0.95 * free else None


def device_memory() -> int:
    """Bytes that the first device has free; where it does not say, as a CPU does not, the host's."""
    limits = jax.local_devices()[0].memory_stats()
    return limits["bytes_limit"] - limits["bytes_in_use"] if limits and "bytes_limit" in limits else available_memory()


def make_rings(experiment: Experiment, spec: EnvSpec, seeds: int = 1, sharding: Sharding | None = None) -> Rings:
    """Replay on the device for several seeds."""
    return Rings(Layout(**replay_arguments(experiment, spec)), slots_on_device(experiment, spec), seeds, sharding)


def replay_arguments(experiment: Experiment, spec: EnvSpec) -> dict[str, Any]:
    """How `Storage` is made for this experiment."""
    return {
        "observation_shape": spec.observation_shape,
        "observation_dtype": spec.observation_dtype,
        "frame_stack": spec.frame_stack,
        "action_shape": () if spec.discrete else (spec.action_size,),
        "action_dtype": "int32" if spec.discrete else "float32",
        "num_envs": spec.num_envs,
        "n_step": experiment.agent.n_step,
        "gamma": experiment.agent.gamma,
    }


def describe_replay(experiment: Experiment, spec: EnvSpec) -> Description:
    """What must agree between this experiment's replay and any that it is mixed with."""
    return Description(
        layout=Layout(**replay_arguments(experiment, spec)),
        env=spec.id,
        action_size=spec.action_size,
        action_low=spec.action_low,
        action_high=spec.action_high,
        reward_clip=spec.reward_clip,
    )


def check_networks(state: PyTree) -> None:
    """ExperimentError if an agent's state, given by its shapes, is larger than the memory that is free where it goes."""
    needed, free = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)), device_memory()
    if needed > 0.95 * free:
        said = f"{needed / 1e9:.3g} GB for parameters, targets and moments ({free / 1e9:.1f} GB free)"
        raise ExperimentError(f"networks: {said}: they cannot fit")


def check_memory(
    experiment: Experiment, spec: EnvSpec, rings: Rings | None = None, frames_there: bool = False, seeds: int = 1
) -> str:
    """How much memory the replays of so many seeds will take, and where; ExperimentError if the host has not got its part.

    rings: where they are whole, on the device; frames_there: whether their frames are.
    """
    capacity, options = experiment.agent.capacity, replay_arguments(experiment, spec)
    there = rings.nbytes if rings else seeds * frame_bytes(experiment, spec) if frames_there else 0
    options["count_draws"] = experiment.count_draws
    full = memory(capacity, **options).expected
    here = 0 if rings else memory(capacity, frames=not frames_there, **options).expected
    needed = seeds * here * min(1.0, experiment.steps / capacity)  # slots never written take no memory
    free = available_memory()
    places = [f"{there / 1e9:.3g} GB on the device"] if there else []
    places += [f"{needed / 1e9:.3g} GB on the host ({free / 1e9:.1f} GB free)"] if here else []
    what = "replay" if seeds == 1 else f"replays of {seeds} seeds"
    text = f"{what}: {' and '.join(places)} for {min(capacity, experiment.steps):,} transitions"
    if experiment.save_replay:
        text += f", {full * experiment.steps / capacity / 1e9:.3g} GB on the disk at the end"
    if needed > 0.95 * free:
        raise ExperimentError(f"{text}: it cannot fit; lower --agent.capacity")
    return text


def frame_bytes(experiment: Experiment, spec: EnvSpec) -> int:
    """What the frames of one seed take on the device."""
    layout = Layout(**replay_arguments(experiment, spec))
    return layout.frames(slots_on_device(experiment, spec)) * layout.frame.itemsize if layout.frame else 0


def frames_on_device(experiment: Experiment, spec: EnvSpec, seeds: int = 1) -> bool:
    """Whether the frames of so many seeds are kept there; ExperimentError if they should be and cannot."""
    reason = None
    needed, free = seeds * frame_bytes(experiment, spec), device_memory()
    if not needed:
        reason = f"{spec.id} has no stacks of frames, and all else is kept on the host"
    elif experiment.replay_from:
        reason = "past data are mixed in on the host"
    elif needed > 0.95 * free:
        reason = f"frames of {needed / 1e9:.3g} GB do not fit on the device ({free / 1e9:.1f} GB free)"
    if reason and experiment.replay_on == "device":
        raise ExperimentError(f"--replay-on device: {reason}")
    wanted = experiment.replay_on == "device" or (experiment.replay_on == "auto" and jax.default_backend() != "cpu")
    return wanted and reason is None


def place_frames(experiment: Experiment, spec: EnvSpec, mesh: Mesh | None = None) -> DeviceFrames:
    """Room for the frames of one seed on the device, or whole on each."""
    layout = Layout(**replay_arguments(experiment, spec))
    assert layout.frame is not None
    return DeviceFrames(layout.frames(slots_on_device(experiment, spec)), layout.frame, everywhere(mesh))
