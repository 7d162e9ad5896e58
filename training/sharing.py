"""Several devices: they share every batch of a run, and all else is the same on each; or each has as many of several seeds.

The functions of a run stay what they are: they say where a batch is cut and that their results are whole, and the compiler puts
the sums over the batch between. A sum taken in parts rounds otherwise than one taken at once; nothing else differs.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from .experiment import Experiment, ExperimentError

T = TypeVar("T")


def first_devices(count: int | None) -> list[jax.Device]:
    """Of every process as many (None: all there are); ExperimentError in one line where this one has fewer."""
    there = jax.local_device_count()
    if count is not None and not 1 <= count <= there:
        raise ExperimentError(f"--devices must be 1 to {there}, not {count}")
    return [device for process in range(jax.process_count()) for device in jax.local_devices(process)[:count]]


def share_batch(experiment: Experiment, devices: int | None) -> Mesh | None:
    """Over `first_devices`; None where that is one; ExperimentError in one line where the batch does not divide by them."""
    chosen, size = first_devices(devices), experiment.agent.batch_size
    if size % len(chosen):
        raise ExperimentError(
            f"a batch of {size} cannot be shared equally by {len(chosen)} devices: give another --agent.batch-size"
        )
    return Mesh(np.array(chosen), "batch") if len(chosen) > 1 else None


def share_seeds(seeds: int, devices: int | None) -> NamedSharding | None:
    """As many seeds on each of `first_devices`; None where that is one; ExperimentError in one line where they do not divide."""
    chosen = first_devices(devices)
    if seeds % len(chosen):
        raise ExperimentError(f"{seeds} seeds cannot be shared equally by {len(chosen)} devices")
    return NamedSharding(Mesh(np.array(chosen), "seeds"), PartitionSpec("seeds")) if len(chosen) > 1 else None


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """Whole on each device."""
    return NamedSharding(mesh, PartitionSpec()) if mesh else None


def shared(mesh: Mesh | None, tree: T) -> T:
    """Traced arrays [B, ...] with a part on each device, where the parts are equal."""
    if mesh is None or len(jax.tree.leaves(tree)[0]) % mesh.size:
        return tree
    return cast(T, jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec("batch"))))


def whole(mesh: Mesh | None, tree: T) -> T:
    """Traced arrays with all of each on every device."""
    return cast(T, jax.lax.with_sharding_constraint(tree, everywhere(mesh))) if mesh else tree


def placed(sharding: Sharding | None, tree: T) -> T:
    """Arrays put there; of several processes, arrays that are the same in each."""
    if sharding is None:
        return tree
    if sharding.is_fully_addressable:
        return cast(T, jax.device_put(tree, sharding))

    def put(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return cast(T, jax.tree.map(put, tree))


def alone(mesh: Mesh | None, tree: T) -> T:
    """What lies whole on every device, on this process's first: for what one of them can do as well."""

    def first(leaf: Any) -> Any:
        return leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf

    return tree if mesh is None else cast(T, jax.tree.map(first, tree))


def host_device() -> jax.Device | None:
    """The CPU beside an accelerator; None where there is no accelerator, or JAX was told to do without the CPU."""
    try:
        return None if jax.default_backend() == "cpu" else jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def one_at_a_time(mesh: Mesh | None, function: Callable[..., T]) -> Callable[..., T]:
    """`function` as it is, but on CPUs done when it returns: their devices share threads, and two programs can block each other."""
    if mesh is None or mesh.devices.flat[0].platform != "cpu":
        return function
    return lambda *arguments: jax.block_until_ready(function(*arguments))
