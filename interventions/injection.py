"""Plasticity injection: a network gets fresh parameters that learn while its outputs stay as they are."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..agents.learner import Learner, Network, PyTree
from .base import Context, Info, Intervention, every, method, require
from .parameters import short_name
from .surgery import edit


@method
def plasticity_injection(step: int = 1_000_000, layers: tuple[str, ...] = ()) -> Intervention:
    """From `step` on, outputs are h(z) + h1(z) - h2(z) and of the three heads only h1 learns (Nikishin et al., 2023, arXiv 2305.15555).

    h is the head as it has learnt; h1 and h2 begin as one fresh draw, so that outputs do not change when they come in, and
    the number of parameters that learn does not either. What is before the head goes on learning. The target gets the same
    h1 and h2, and its h stays where it is.

    Refused beside methods that change parameters of the same learner, for h, h2 and the switch are among these: a penalty or
    an edit of all would move them. `on` lets others act on other learners.

    Outputs that a network bounds itself are sums of three afterwards: SAC's log standard deviations may leave their bounds
    and the actions of DrQ-v2's actor [-1, 1], where environments clip them. The paper's are those of value networks:
    learner=critic.

    step: gradient step of the one injection. layers: names of the modules that are the head, everything if none; Nikishin
        et al. take all behind the convolutions. In a loop of one's own the network must be
        one that `inject` made with the same layers.
    """
    require(step >= 1, f"step must be at least 1 gradient step, not {step}")

    def update(learner: Learner, state: PyTree, context: Context) -> tuple[Learner, PyTree, Info]:
        params = learner.params
        is_injectable = isinstance(params, dict) and set(params) == {"network", "learned", "frozen", "injected"}
        require(is_injectable, f"{context.learner} has no place for new parameters: inject its network first")
        fresh = context.fresh(context.stream("plasticity_injection"))["learned"]
        new = {"network": params["network"], "learned": fresh, "frozen": fresh, "injected": jnp.ones(())}
        mask = {part: jax.tree.map(lambda leaf, on=part != "network": on, leaves) for part, leaves in params.items()}
        # The head's momentum would carry it on without gradients.
        head = jax.tree_util.tree_map_with_path(lambda path, leaf: short_name(path) in fresh, params["network"])
        learner = edit(learner, new, mask, forget=mask | {"network": head}, target="edit")
        return learner, state, {"injected": jnp.ones((), jnp.int32)}

    rebuilt = Intervention(update=update, rebuild=partial(inject, layers=layers), keeps=True)
    return every(step, rebuilt, start=step, stop=step + 1)


def inject(network: Network, layers: tuple[str, ...] = ()) -> Network:
    """The network with a place for new parameters of its head; bit for bit the same one until they come in.

    Its parameters are {"network": those of `network`, "learned": h1, "frozen": h2, "injected": 0.0 or, from then on, 1.0},
    h1 and h2 being name -> leaf. Evaluates `network` three times, of which a compiler merges what is before the head.
    InterventionError if it has no module called so. layers: see `plasticity_injection`.
    """
    apply_network = network.apply
    require(apply_network is not None, "a learner without a network cannot be injected")
    assert apply_network is not None

    def head_of(params: PyTree) -> dict[str, Any]:
        leaves = {short_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        for layer in layers:
            known = ", ".join(dict.fromkeys(name.rpartition("/")[0] for name in leaves))
            require(any(map(partial(_inside, layer), leaves)), f"no module {layer}: there are {known}")
        return {name: leaf for name, leaf in leaves.items() if not layers or any(_inside(x, name) for x in layers)}

    def init(key: jax.Array) -> PyTree:
        params = network.init(key)
        head = head_of(params)
        copies = ({name: jnp.copy(leaf) for name, leaf in head.items()} for _ in range(2))
        return {"network": params, "learned": next(copies), "frozen": next(copies), "injected": jnp.zeros(())}

    def apply(params: PyTree, *inputs: Any) -> Any:
        injected = gated(params["injected"], jnp.zeros(()))

        def with_head(head: dict[str, Any]) -> Any:
            return apply_network(
                jax.tree_util.tree_map_with_path(
                    lambda path, leaf: head.get(short_name(path), leaf), params["network"]
                ),
                *inputs,
            )

        learnt = with_head({name: gated(leaf, 1 - injected) for name, leaf in head_of(params["network"]).items()})
        learned = with_head(params["learned"])
        frozen = with_head({name: gated(leaf, jnp.zeros(())) for name, leaf in params["frozen"].items()})
        return jax.tree.map(lambda h, h1, h2: h + injected * (h1 - h2), learnt, learned, frozen)

    return network._replace(init=init, apply=apply)


@jax.custom_jvp
def gated(leaf: jax.Array, gate: jax.Array) -> jax.Array:
    """The leaf, whose gradient is multiplied by the gate, ()."""
    return leaf


@gated.defjvp
def _gated_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
    leaf, gate = primals
    return leaf, tangents[0] * gate


def _inside(module: str, name: str) -> bool:
    return name == module or name.startswith(module + "/")
