"""Parameters by what they are (kernels, biases, scales), and fresh ones of their shapes.

What has 2 axes or more and is called neither bias nor scale is a kernel, its last axis being its units. One of 3 or 5 axes is
taken for those of the members of an ensemble, its first axis, unless the bias beside it is of another shape than
[members, units], as that of a convolution along one axis or three.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..agents import networks
from ..agents.learner import PyTree
from ..diagnostics import named_leaves
from ..diagnostics.layers import leaf_name


def short_name(path: Any) -> str:
    """Of a leaf, as in the names of a layer graph: "torso/Conv_1/kernel"."""
    return leaf_name(path).removeprefix("params/")


def last_part(name: str) -> str:
    """ "kernel" of "torso/Conv_1/kernel"."""
    return name.rpartition("/")[2]


def is_kernel(name: str, leaf: Any) -> bool:
    return leaf.ndim >= 2 and last_part(name) not in ("bias", "scale")


def kernels(params: PyTree) -> dict[str, jax.Array]:
    return {name: leaf for name, leaf in named_leaves(params).items() if is_kernel(name, leaf)}


def in_ensemble(name: str, leaves: Mapping[str, Any]) -> bool:
    """Whether the kernel of this name is taken for those of all members of an ensemble."""
    kernel, bias = leaves[name], leaves.get(name.removesuffix(last_part(name)) + "bias")
    return kernel.ndim in (3, 5) and (bias is None or bias.shape == (kernel.shape[0], kernel.shape[-1]))


def matrices(params: PyTree) -> dict[str, jax.Array]:
    """Every kernel as [members, inputs, units]; without an ensemble there is one member.

    The inputs of a convolution are height * width * channels.
    """
    leaves = named_leaves(params)
    return {
        name: kernel.reshape(kernel.shape[0] if in_ensemble(name, leaves) else 1, -1, kernel.shape[-1])
        for name, kernel in kernels(params).items()
    }


def glorot(key: jax.Array, like: PyTree) -> PyTree:
    """Kernels Glorot-uniform with the fans of the whole kernel, what is called scale or var 1, all other parameters 0.

    like: parameters; only their structure, shapes and dtypes are read.
    """
    return _drawn(jax.nn.initializers.glorot_uniform(), key, like)


def orthogonal(key: jax.Array, like: PyTree) -> PyTree:
    """As `glorot`, but kernels orthogonal with gain 1 (Saxe et al., 2014)."""
    return _drawn(networks.orthogonal(), key, like)


def _drawn(draw: Callable[..., jax.Array], key: jax.Array, like: PyTree) -> PyTree:
    def fresh(path: Any, leaf: Any, key: jax.Array) -> jax.Array:
        name = short_name(path)
        if not is_kernel(name, leaf):
            return jnp.full(leaf.shape, float(last_part(name) in ("scale", "var")), leaf.dtype)
        if not in_ensemble(name, named):
            return draw(key, leaf.shape, leaf.dtype)
        return jax.vmap(lambda key: draw(key, leaf.shape[1:], leaf.dtype))(jax.random.split(key, leaf.shape[0]))

    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    named = {short_name(path): leaf for path, leaf in leaves}
    keys = jax.random.split(key, len(leaves))
    drawn = [fresh(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, drawn)
