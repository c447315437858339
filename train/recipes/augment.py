"""What is done to training images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.data.degrade import bsr
from dalle2_jax.errors import InputError


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
