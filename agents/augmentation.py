"""Image augmentations; pure functions of a key and a batch, one draw per image."""

import jax
import jax.numpy as jnp

INTENSITY_CLIP = 2.0  # standard deviations; Schwarzer et al. (2021), as in Dopamine's DrQ(eps)


def random_shift(key: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """Images moved by up to `pad` pixels each way, edge pixels repeated; Kostrikov et al. (2021), section 3.1.

    images: [B, H, W, C] of any dtype -> the same. An offset is an integer in [0, 2 * pad] on each axis, one pair per
    image; `pad` on both is the image unmoved. Dopamine never draws 2 * pad.
    """
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pad + 1)
    return shift(images, offsets, pad)


def shift(images: jax.Array, offsets: jax.Array, pad: int) -> jax.Array:
    """Crop each image at its own offset [B, 2] out of itself padded by `pad` repeated edge pixels."""
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def random_intensity(key: jax.Array, images: jax.Array, scale: float) -> jax.Array:
    """Images times 1 + scale * clip(normal, -2, 2), one factor per image; Schwarzer et al. (2021), Dopamine's DrQ(eps).

    images: [B, ...] float32, black at 0 -> the same; the result is not clipped.
    """
    noise = jax.random.normal(key, (images.shape[0],) + (1,) * (images.ndim - 1))
    return images * (1 + scale * jnp.clip(noise, -INTENSITY_CLIP, INTENSITY_CLIP))
