"""What is done to training images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.data.degrade import bsr
from dalle2_jax.errors import InputError


def random_shift(key: jax.Array, pictures: jax.Array, limit: int) -> jax.Array:
    """Moves each picture `[b, h, w, c]` by up to `limit` pixels either way; the border is repeated."""
    batch, height, width, channels = pictures.shape
    padded = jnp.pad(pictures, ((0, 0), (limit, limit), (limit, limit), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * limit + 1)

    def crop(picture: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(picture, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def random_grayscale(key: jax.Array, pictures: jax.Array, probability: float) -> jax.Array:
    """Takes the colour from some of the pictures `[b, h, w, 3]`: a random mean of the channels stands in all three.

    The weights of red, green and blue are uniform over all that sum to one, so that an object is now lighter and now
    darker than what it lies on and only its outline can be relied upon.
    """
    chosen_key, weights_key = jax.random.split(key)
    weights = jax.random.dirichlet(weights_key, jnp.ones(3), pictures.shape[:1])[:, None, None]
    gray = (pictures * weights).sum(-1, keepdims=True)
    chosen = jax.random.uniform(chosen_key, (pictures.shape[0], 1, 1, 1)) < probability
    return jnp.where(chosen, gray, pictures)


def degraded_crop(picture: np.ndarray, rng: np.random.Generator, *, crop: int, factor: int) -> dict[str, np.ndarray]:
    """A random square of a picture uint8 [h, w, 3], and the same made `factor` times smaller and worse."""
    if min(picture.shape[:2]) < crop:
        raise InputError(
            f"a picture of {picture.shape[1]} x {picture.shape[0]} pixels is smaller than the upsampler's crops of "
            f"{crop}; use larger pictures, or a smaller upsampler.crop_fraction"
        )
    top, left = (int(rng.integers(0, side - crop + 1)) for side in picture.shape[:2])
    square = picture[top : top + crop, left : left + crop]
    return {"image": square, "low_resolution": bsr(square, factor, rng)}
