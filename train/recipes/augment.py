"""What is done to training images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.data.degrade import bsr
from dalle2_jax.errors import InputError
from dalle2_jax.images.resize import resize as resize_on_host
from dalle2_jax.layers.pixels import resize, to_float, to_uint8

# Sides to which DALL-E's dVAE resizes images before it crops them, as shares of the crop's.
SMALLEST_RESIZED, LARGEST_RESIZED = 9 / 8, 12 / 8


def training_images(images: jax.Array, size: int, channels: int) -> jax.Array:
    """Images uint8 `[b, h, w, 3]` as `[b, size, size, channels]` in [-1, 1], grey for one channel, of 256 levels."""
    images = resize(to_float(images), size)
    if channels == 1:
        images = images.mean(-1, keepdims=True)
    return to_float(to_uint8(images))


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image `[b, h, w, c]` left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def random_shift(key: jax.Array, images: jax.Array, limit: int) -> jax.Array:
    """Moves each image `[b, h, w, c]` by up to `limit` pixels either way; the border is repeated."""
    batch, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (limit, limit), (limit, limit), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * limit + 1)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def random_grayscale(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Takes the colour from some of the images `[b, h, w, 3]`: a random mean of the channels stands in all three.

    The weights of red, green and blue are uniform over all that sum to one, so that an object is now lighter and now
    darker than what it lies on and only its outline can be relied upon.
    """
    chosen_key, weights_key = jax.random.split(key)
    weights = jax.random.dirichlet(weights_key, jnp.ones(3), images.shape[:1])[:, None, None]
    gray = (images * weights).sum(-1, keepdims=True)
    chosen = jax.random.uniform(chosen_key, (images.shape[0], 1, 1, 1)) < probability
    return jnp.where(chosen, gray, images)


def degraded_crop(image: np.ndarray, rng: np.random.Generator, *, crop: int, factor: int) -> dict[str, np.ndarray]:
    """A random square of an image uint8 [h, w, 3], and the same made `factor` times smaller and worse."""
    if min(image.shape[:2]) < crop:
        raise InputError(
            f"an image of {image.shape[1]} x {image.shape[0]} pixels is smaller than the upsampler's crops of "
            f"{crop}; use larger images, or a smaller upsampler.crop_fraction"
        )
    top, left = (int(rng.integers(0, side - crop + 1)) for side in image.shape[:2])
    square = image[top : top + crop, left : left + crop]
    return {"image": square, "low_resolution": bsr(square, factor, rng)}


def resized_crop(image: np.ndarray, rng: np.random.Generator, *, size: int) -> dict[str, np.ndarray]:
    """A random square of `size` pixels of a square image uint8 [s, s, 3] that is made smaller first, mirrored or not.

    Resized to a side from min(s, 9/8 size) to min(s, 12/8 size), all as likely (DALL-E, App. A.2).
    """
    side = image.shape[0]
    if side < size:
        raise InputError(f"an image of {side} x {side} pixels is smaller than the crops of {size}; use larger images")
    least, most = (min(side, int(share * size)) for share in (SMALLEST_RESIZED, LARGEST_RESIZED))
    resized = resize_on_host(image[None], int(rng.integers(least, most + 1)))[0]
    top, left = rng.integers(0, resized.shape[0] - size + 1, 2)
    crop = resized[top : top + size, left : left + size]
    return {"image": crop[:, ::-1] if rng.integers(2) else crop}
