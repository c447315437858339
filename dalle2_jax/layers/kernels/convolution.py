"""Convolution as a product of shifted images, where a CPU is faster so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated` of [batch, height, width, c] with [h, w, c, features], as `flax.linen.Conv` asks
    for it, but a matrix product where XLA does better with one: kernels of one pixel, and on a CPU kernels of 3x3 that
    are larger than the image (its convolution's weight gradient then takes twice as long).

    `padding` is "SAME" or pairs of pixels before and after; dilated and grouped kernels are not for this function.
    """
    batch, height, width, _ = x.shape
    size, same = kernel.shape[:2], padding == "SAME" or all(tuple(pair) == (1, 1) for pair in padding)
    if size == (1, 1) and tuple(strides) == (1, 1) and padding == "SAME":
        return jnp.tensordot(x, kernel[0, 0], 1, precision=options["precision"])

    def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        rows = kernel.reshape(-1, kernel.shape[-1])
        return jnp.tensordot(jnp.concatenate(shifted, axis=-1), rows, 1, precision=options["precision"])

    pixels = batch * height * width  # of a symbolic batch (`jax.export`) nobody knows how many
    few = isinstance(pixels, int) and pixels <= 2 * kernel.shape[-1]
    if size == (3, 3) and tuple(strides) == (1, 1) and same and few:
        return jax.lax.platform_dependent(x, kernel, cpu=product, default=convolution)
    return convolution(x, kernel)
