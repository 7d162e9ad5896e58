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
    return limits["bytes_limit"] - limits["bytes_in_use"] if limits else available_memory()


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
    experiment: Experiment, spec: EnvSpec, on_device: DeviceFrames | Rings | None = None, seeds: int = 1
) -> str:
    """How much memory the replays of so many seeds will take, and where; ExperimentError if the machine has not got it."""
    capacity, options = experiment.agent.capacity, replay_arguments(experiment, spec)
    options["count_draws"] = experiment.count_draws
    full = memory(capacity, **options).expected
    here = 0 if isinstance(on_device, Rings) else memory(capacity, frames=on_device is None, **options).expected
    needed = seeds * here * min(1.0, experiment.steps / capacity)  # slots never written take no memory
    free = available_memory()
    places = [f"{on_device.nbytes / 1e9:.3g} GB on the device"] if on_device else []
    places += [f"{needed / 1e9:.3g} GB on the host ({free / 1e9:.1f} GB free)"] if here else []
    what = "replay" if seeds == 1 else f"replays of {seeds} seeds"
    text = f"{what}: {' and '.join(places)} for {min(capacity, experiment.steps):,} transitions"
    if experiment.save_replay:
        text += f", {full * experiment.steps / capacity / 1e9:.3g} GB on the disk at the end"
    if needed > 0.95 * free:
        raise ExperimentError(f"{text}: it cannot fit; lower --agent.capacity")
    return text


def place_frames(experiment: Experiment, spec: EnvSpec, mesh: Mesh | None = None) -> DeviceFrames | None:
    """Where frames are kept if on the device, or whole on each; ExperimentError if they should be and cannot."""
    layout = Layout(**replay_arguments(experiment, spec))
    reason = None
    if layout.frame is None:
        reason = f"{spec.id} has no stacks of frames, and all else is kept on the host"
    elif experiment.replay_from:
        reason = "past data are mixed in on the host"
    else:
        places = layout.frames(slots_on_device(experiment, spec))
        needed, free = places * layout.frame.itemsize, device_memory()
        if needed > 0.95 * free:
            reason = f"frames of {needed / 1e9:.3g} GB do not fit on the device ({free / 1e9:.1f} GB free)"
    if reason and experiment.replay_on == "device":
        raise ExperimentError(f"--replay-on device: {reason}")
    wanted = experiment.replay_on == "device" or (experiment.replay_on == "auto" and jax.default_backend() != "cpu")
    if not wanted or reason or layout.frame is None:
        return None
    return DeviceFrames(places, layout.frame, everywhere(mesh))
