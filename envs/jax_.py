"""Environments that are pure functions of JAX, for loops that run on the device whole."""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .interface import Env, Step

if TYPE_CHECKING:  # JAX takes a second to import, and the protocol needs none of it
    import jax

Carry = Any  # a PyTree: all of the state of N environments, random keys included


@runtime_checkable
class JaxEnv(Env, Protocol):
    """An `Env` whose step can be traced; `reset`, `snapshot` and the rest work on the state that it holds, `carry`."""

    carry: Carry

    def transition(self, carry: Carry, actions: "jax.Array") -> tuple[Carry, Step]:
        """Pure, under jit and vmap: what `step` does, of `carry` and actions as agents give them; a Step of JAX arrays."""
        ...

    def go_on(self, carry: Carry, observation: Any) -> None:
        """Hold `carry`, which `transition` gave with the current observations [N, ...]."""
        ...
