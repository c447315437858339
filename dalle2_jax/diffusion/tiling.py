"""A large image denoised in tiles, so that memory follows the tile and not the image."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.errors import InputError


def tiled(
    denoiser: Callable[[jax.Array, jax.Array, Any], jax.Array], condition: Any, tile: int, overlap: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A denoiser that sees square tiles one after the other, and blends what it says where they overlap.

    The blending happens at every step of a sampler, on what the network predicts, so that the tiles of an image agree
    (as MultiDiffusion does, Bar-Tal et al. 2023). Weights fall off linearly over the overlap; with an image no larger
    than a tile this is the denoiser itself.

    Args:
      denoiser: f(x_t, t, condition) -> [batch, height, width, channels or more]; for a network that is convolutional.
      condition: any pytree of arrays [batch, height, width, ...] of x_t's size, cut as x_t is.
      tile: the side of a tile in pixels.
      overlap: how many pixels neighbouring tiles share at least.

    Returns:
      f(x_t, t) -> prediction, float32.

    Raises:
      InputError: unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise InputError(f"tiles of {tile} pixels cannot share {overlap}; the overlap must be from 0 to below the tile")

    def whole(x_t: jax.Array, t: jax.Array) -> jax.Array:
        height, width = x_t.shape[1:3]
        if height <= tile and width <= tile:
            return denoiser(x_t, t, condition)
        rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
        size = (min(tile, height), min(tile, width))
        corners = jnp.asarray([(row, column) for row in rows for column in columns], jnp.int32)
        window = jnp.asarray(_ramp(size[0], overlap)[:, None] * _ramp(size[1], overlap)[None, :])[None, :, :, None]

        def cut(array: jax.Array, corner: jax.Array) -> jax.Array:
            start = (0, corner[0], corner[1], *(0,) * (array.ndim - 3))
            return jax.lax.dynamic_slice(array, start, (array.shape[0], *size, *array.shape[3:]))

        def add(total: tuple[jax.Array, jax.Array], corner: jax.Array):
            part = denoiser(cut(x_t, corner), t, jax.tree.map(lambda array: cut(array, corner), condition))
            start = (0, corner[0], corner[1], 0)
            pieces = (part.astype(jnp.float32) * window, window)
            return tuple(
                jax.lax.dynamic_update_slice(whole, jax.lax.dynamic_slice(whole, start, piece.shape) + piece, start)
                for whole, piece in zip(total, pieces, strict=True)
            ), None

        piece = jax.ShapeDtypeStruct((x_t.shape[0], *size, x_t.shape[3]), x_t.dtype)
        pieces = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct((array.shape[0], *size, *array.shape[3:]), array.dtype), condition
        )
        channels = jax.eval_shape(denoiser, piece, t, pieces).shape[-1]
        zeros = jnp.zeros((x_t.shape[0], height, width, channels)), jnp.zeros((1, height, width, 1))
        (total, weight), _ = jax.lax.scan(add, zeros, corners)
        return total / weight

    return whole


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of a side of `length` pixels start: as few as share `overlap` each, spread evenly."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(place) for place in np.linspace(0, length - tile, count)]


def _ramp(size: int, overlap: int) -> np.ndarray:
    """Weights of a tile along one side: rising over the overlap, 1 within, falling again; never 0."""
    place = np.arange(size) + 0.5
    return np.clip(np.minimum(place, size - place) / max(overlap, 1), 1e-3, 1.0).astype(np.float32)
