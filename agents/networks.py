"""Network bodies that more than one agent uses; each ends in the activations that a head reads."""

from collections.abc import Callable

import jax
from flax import linen as nn

Initializer = Callable[..., jax.Array]


class MLP(nn.Module):
    """Dense, LayerNorm if asked for, ReLU, for every entry of `features`; [..., inputs] -> [..., features[-1]]."""

    features: tuple[int, ...]
    layer_norm: bool = False
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index, size in enumerate(self.features):
            x = nn.Dense(size, kernel_init=self.kernel_init, name=f"dense_{index}")(x)
            if self.layer_norm:
                x = nn.LayerNorm(name=f"norm_{index}")(x)
            x = nn.relu(x)
        return x
