"""The gaussian blur of the first upsampler's low-resolution input in training (Sec. 2.1; kernel 3, sigma 0.6)."""

import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError


def gaussian_blur(pictures: jax.Array, sigma: float | jax.Array, kernel_size: int = 3) -> jax.Array:
    """Blurs every channel of `pictures` [batch, height, width, channels] on its own; any float range, same shape out.

    The kernel is the gaussian at whole pixels, normalised to sum 1; the border repeats the edge pixels, so a constant
    picture stays as it is. `sigma` is one number of pixels for the whole batch, and may be traced.

    Raises:
        InputError: if `kernel_size` is not odd, a known `sigma` is not positive, or `pictures` has not rank 4.
    """
    if pictures.ndim != 4:
        raise InputError(f"gaussian_blur wants pictures [batch, height, width, channels], not shape {pictures.shape}.")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"gaussian_blur's kernel_size must be odd and positive, not {kernel_size}.")
    if isinstance(sigma, (int, float)) and sigma <= 0:
        raise InputError(f"gaussian_blur's sigma must be positive, not {sigma}.")
    radius = kernel_size // 2
    offsets = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
    weights = jnp.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum()).astype(pictures.dtype)
    for axis in (1, 2):
        padding = [(0, 0)] * 4
        padding[axis] = (radius, radius)
        padded = jnp.pad(pictures, padding, mode="edge")
        length = pictures.shape[axis]
        pictures = sum(weights[i] * jax.lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(kernel_size))
    return pictures
