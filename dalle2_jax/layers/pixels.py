"""Images as arrays: between uint8 at the edges and [-1, 1] inside, and from one size to another."""

import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError


def to_float(images: jax.Array) -> jax.Array:
    """uint8 `[..., h, w, c]` in 0..255 to float32 in [-1, 1]; floats pass through."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1.0
    return images.astype(jnp.float32)


def to_uint8(images: jax.Array) -> jax.Array:
    """Floats `[..., h, w, c]` in [-1, 1] to uint8, rounded and clipped."""
    return jnp.clip(jnp.round((images.astype(jnp.float32) + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def in_colour(images: jax.Array) -> jax.Array:
    """Floats `[b, h, w, 1 or 3]` in [-1, 1] to uint8 `[b, h, w, 3]`."""
    return jnp.broadcast_to(to_uint8(images), (*images.shape[:3], 3))


def resize(images: jax.Array, size: int, method: str = "area") -> jax.Array:
    """Square images `[b, h, h, c]` to `[b, size, size, c]` in float32.

    Shrinking by a whole factor with `method="area"` is the mean over each cell, which is what the cascade's
    low-resolution images are; every other case is `jax.image.resize` with antialiasing, bicubic for "area".
    """
    height, width = images.shape[1:3]
    if height != width:
        raise InputError(f"the images are {height}x{width}; resize takes square ones, so crop them first")
    if height == size:
        return images
    images = images.astype(jnp.float32)
    if method == "area" and height % size == 0:
        factor = height // size
        return images.reshape(-1, size, factor, size, factor, images.shape[-1]).mean((2, 4))
    method = "cubic" if method == "area" else method
    return jax.image.resize(images, (images.shape[0], size, size, images.shape[-1]), method, antialias=True)
