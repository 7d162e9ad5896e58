"""Network bodies that more than one agent uses; each ends in the activations that a head reads.

Layers have `width` times their published units, rounded up, as in ReDo's code (Sokar et al., 2023). Images are
[B, H, W, C]; uint8 ones are scaled to [0, 1] inside, float ones are taken as they are. `activation` is that of hidden
layers, by its spec in activations.py; `layer_norm` puts a LayerNorm before each, over the last axis: the units of a
dense layer, the channels of a convolution at each place by itself.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.custom_batching import sequential_vmap

from .activations import activation

Initializer = Callable[..., jax.Array]
Initialiser = Literal["xavier", "lecun", "rainbow", "pytorch"]

INITIALISERS: dict[str, Initializer] = {
    "xavier": nn.initializers.xavier_uniform(),
    "lecun": nn.initializers.lecun_normal(),
    "rainbow": nn.initializers.variance_scaling(1 / math.sqrt(3), "fan_in", "uniform"),
    "pytorch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # within 1 / sqrt(fan_in)
}

NATURE_LAYERS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel, stride; Mnih et al. (2015), Methods
NATURE_MIN_SIZE = 36  # pixels; the smallest side that leaves a pixel after the three unpadded convolutions
IMPALA_CHANNELS = (16, 32, 32)  # Espeholt et al. (2018), figure 3
IMPALA_BLOCKS = 2
MINATAR_CHANNELS = 16  # Young & Tian (2019), section 4


def scale_pixels(images: jax.Array, highest: int = 255) -> jax.Array:
    """float32 images: uint8 from 0 to `highest` scaled to [0, 1], floats unchanged."""
    return images.astype(jnp.float32) / highest if images.dtype == jnp.uint8 else images


def flatten(observations: jax.Array) -> jax.Array:
    """[B, ...] -> [B, N] float32, unscaled; the torso of vector observations, and the end of every other."""
    return observations.reshape(observations.shape[0], -1).astype(jnp.float32)


def scaled(size: int, width: float) -> int:
    """Number of units of a layer of `size` at a width multiplier."""
    return math.ceil(size * width)


def activated(x: jax.Array, spec: str, norm: str | None) -> jax.Array:
    """The activation of x, behind a LayerNorm of the name `norm` if there is one; within a module's compact method."""
    return activation(spec).function(nn.LayerNorm(name=norm)(x) if norm else x)


def orthogonal(scale: float = 1.0) -> Initializer:
    """Orthogonal kernels of this gain (Saxe et al., 2014), as flax has them, one after the other where many are drawn at once.

    The decompositions of a batch wait for each other in the threads that are to do them, and where two batches meet on a
    machine of two cores, that is for ever (jaxlib 0.10.2).
    """
    draw = nn.initializers.orthogonal(scale)

    def initializer(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        wide = jnp.promote_types(dtype, jnp.float32)  # of halves there are no decompositions
        kernel: jax.Array = sequential_vmap(lambda key: draw(key, shape, wide))(key)
        return kernel.astype(dtype)

    return initializer


class MLP(nn.Module):
    """Dense, LayerNorm if asked for, activation, for every entry of `features`; [..., inputs] -> [..., features[-1]].

    An activation that makes two features of each unit leaves twice as many. "elu+relu" names one for each layer; the last
    is that of all further layers.
    """

    features: tuple[int, ...]
    layer_norm: bool = False
    kernel_init: Initializer = nn.initializers.lecun_normal()
    activation: str = "relu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        specs = self.activation.split("+")
        for index, size in enumerate(self.features):
            x = nn.Dense(size, kernel_init=self.kernel_init, name=f"dense_{index}")(x)
            x = activated(x, specs[min(index, len(specs) - 1)], f"norm_{index}" if self.layer_norm else None)
        return x


class NatureCNN(nn.Module):
    """Three convolutions of DQN (Mnih et al., 2015), flattened channel-last; [B, H, W, C] -> [B, units].

    From 84 x 84, SAME (Dopamine) leaves 11 * 11 * 64 = 7744 units, VALID (Mnih et al.) 7 * 7 * 64 = 3136.
    """

    width: float = 1.0
    padding: str = "same"
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    activation: str = "relu"
    layer_norm: bool = False
    highest: int = 255  # of uint8 images

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = scale_pixels(images, self.highest)
        for index, (channels, kernel, stride) in enumerate(NATURE_LAYERS):
            x = nn.Conv(
                scaled(channels, self.width),
                kernel_size=(kernel, kernel),
                strides=stride,
                padding=self.padding.upper(),
                kernel_init=self.kernel_init,
                name=f"conv_{index}",
            )(x)
            x = activated(x, self.activation, f"norm_{index}" if self.layer_norm else None)
        return flatten(x)


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3 x 3 SAME; the inner channels are the block's own, the outer the stream's."""

    channels: int
    kernel_init: Initializer
    activation: str = "relu"
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = x
        for index in range(2):
            hidden = activated(hidden, self.activation, f"norm_{index}" if self.layer_norm else None)
            hidden = nn.Conv(self.channels, (3, 3), kernel_init=self.kernel_init, name=f"conv_{index}")(hidden)
        return x + hidden


class ImpalaResNet(nn.Module):
    """Residual torso of IMPALA (Espeholt et al., 2018, figure 3), flattened channel-last; [B, H, W, C] -> [B, units].

    Three stacks of convolution, 3 x 3 max-pool of stride 2, two residual blocks; 84 x 84 leaves 11 * 11 * 32 units.
    Activations stand where its ReLUs do: the first convolution of a stack reads the stream as it is.
    """

    width: float = 1.0
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    activation: str = "relu"
    layer_norm: bool = False
    highest: int = 255  # of uint8 images

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = scale_pixels(images, self.highest)
        for stack, base in enumerate(IMPALA_CHANNELS):
            channels = scaled(base, self.width)
            x = nn.Conv(channels, (3, 3), kernel_init=self.kernel_init, name=f"stack_{stack}_conv")(x)
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
            for block in range(IMPALA_BLOCKS):
                name = f"stack_{stack}_block_{block}"
                x = ResidualBlock(channels, self.kernel_init, self.activation, self.layer_norm, name=name)(x)
        return flatten(activated(x, self.activation, "norm" if self.layer_norm else None))


def convolve_patches(images: jax.Array, kernel: jax.Array, *options: Any, **more: Any) -> jax.Array:
    """An unpadded convolution of stride 1 as one matrix product over patches; [B, H, W, C], [h, w, C, units].

    In a loop on the CPU a convolution proper runs ten times slower, and so does one of several seeds' kernels at once.
    """
    rows, columns, _, units = kernel.shape
    height, width = images.shape[1] - rows + 1, images.shape[2] - columns + 1
    shifted = [images[:, y : y + height, x : x + width] for y in range(rows) for x in range(columns)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, units)


class MinAtarCNN(nn.Module):
    """One 3 x 3 VALID convolution over binary planes (Young & Tian, 2019); [B, 10, 10, C] -> [B, 8 * 8 * 16].

    Planes are 0 or 1 whatever their dtype, so that nothing is scaled.
    """

    width: float = 1.0
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    activation: str = "relu"
    layer_norm: bool = False

    @nn.compact
    def __call__(self, planes: jax.Array) -> jax.Array:
        channels = scaled(MINATAR_CHANNELS, self.width)
        x = nn.Conv(
            channels,
            (3, 3),
            padding="VALID",
            kernel_init=self.kernel_init,
            conv_general_dilated=convolve_patches,
            name="conv_0",
        )(planes.astype(jnp.float32))
        return flatten(activated(x, self.activation, "norm_0" if self.layer_norm else None))


class QNetwork(nn.Module):
    """Action values of every action; [B, ...] -> [B, actions], or logits [B, actions, atoms] where `atoms` is given.

    dueling: V + A - mean_a A (Wang et al., 2016, eq. 9), for each atom. Both heads read the same hidden layer, as in
        Dopamine; Wang et al. give each its own.
    """

    torso: Callable[[jax.Array], jax.Array]
    hidden: MLP
    actions: int
    atoms: int | None = None
    dueling: bool = False
    kernel_init: Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, observations: jax.Array) -> jax.Array:
        x = self.hidden(self.torso(observations))
        if not self.dueling:
            return self._head(x, self.actions, "head")
        value, advantage = self._head(x, 1, "value"), self._head(x, self.actions, "advantage")
        return value + advantage - advantage.mean(axis=1, keepdims=True)

    def _head(self, x: jax.Array, actions: int, name: str) -> jax.Array:
        outputs = nn.Dense(actions * (self.atoms or 1), kernel_init=self.kernel_init, name=name)(x)
        return outputs if self.atoms is None else outputs.reshape(-1, actions, self.atoms)
