"""Between two images, or among four: along great circles of the embeddings and of the noise (Sec. 3.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.layers.embedding import unit_norm
from dalle2_jax.manipulate.latent import Latent, concatenate, decode_latent, same_key
from dalle2_jax.manipulate.series import Series

if TYPE_CHECKING:
    from dalle2_jax.unclip import DALLE2

Noise = Literal["interpolated", "fixed"]
OPPOSITE = -1 + 1e-5  # a cosine below this leaves every great circle as short as any other


@jax.jit
def slerp(a: jax.Array, b: jax.Array, theta: jax.Array) -> jax.Array:
    """Spherical interpolation (Shoemake 1985) of vectors `[..., n]`: a at theta 0, b at 1, both exactly.

    The direction goes along the great circle and the length linearly, so that vectors of one length keep it.
    theta: `[...]`, 0 to 1. Vectors of nearly one direction are interpolated linearly; between opposite ones there is no
    one way, and the result means nothing.
    """
    a, b = jnp.broadcast_arrays(a.astype(jnp.float32), b.astype(jnp.float32))
    theta = jnp.broadcast_to(jnp.asarray(theta, jnp.float32), a.shape[:-1])[..., None]
    from_a, to_b = unit_norm(a), unit_norm(b)
    # Of a small angle the cosine says nothing in float32.
    angle = 2 * jnp.arctan2(_length(from_a - to_b), _length(from_a + to_b))
    sine = jnp.sin(angle)
    is_small = sine < 1e-4
    divisor = jnp.where(is_small, 1.0, sine)
    weight_a = jnp.where(is_small, 1 - theta, jnp.sin((1 - theta) * angle) / divisor)
    weight_b = jnp.where(is_small, theta, jnp.sin(theta * angle) / divisor)
    length = (1 - theta) * _length(a) + theta * _length(b)
    between = (weight_a * from_a + weight_b * to_b) * length
    return jnp.where(theta == 0, a, jnp.where(theta == 1, b, between))


def _length(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x, axis=-1, keepdims=True)


def interpolate(
    model: DALLE2,
    key: jax.Array,
    latent: Latent,
    thetas: Sequence[float] | np.ndarray | int = 7,
    *,
    noise: Noise = "interpolated",
    **options: Any,
) -> Series:
    """Images between the two of a latent (Fig. 4): z_i, and x_T too, by slerp.

    thetas: 0 (the first image) to 1 (the second), or how many, evenly spread. noise: "interpolated" goes from the one
    x_T to the other, so that the ends are the images of `reconstruct` (of this latent, with this key and these options)
    to the last bit; "fixed" takes one x_T from the key for all. options: see `decode_latent`.

    Raises:
        InputError: for another number of images than two, a theta outside 0 to 1, images of opposite embeddings, or
            images that were encoded with different captions.
    """
    thetas = check_thetas(thetas)
    ends = _check(latent, 2, noise)
    frames = _mix(ends, np.zeros(len(thetas), int), np.ones(len(thetas), int), thetas)
    end_of = np.where(thetas == 0, 0, np.where(thetas == 1, 1, -1))
    images = _decode(model, key, ends, frames, end_of, noise, options)
    return Series(images, tuple(f"theta {theta:.2f}" for theta in thetas), min(len(thetas), 12))


def interpolate_grid(
    model: DALLE2,
    key: jax.Array,
    latent: Latent,
    rows: int = 5,
    columns: int = 5,
    *,
    noise: Noise = "interpolated",
    **options: Any,
) -> Series:
    """A grid of images among the four of a latent, which stand in its corners: above left and right, below the same.

    Each row lies between what is interpolated along the left side and along the right one. Arguments, ends and errors
    as in `interpolate`; rows and columns are 2 or more.
    """
    if min(rows, columns) < 2:
        raise InputError(f"the grid has {rows} rows and {columns} columns; it needs 2 or more of each")
    corners = _check(latent, 4, noise)
    down, across = np.linspace(0, 1, rows), np.linspace(0, 1, columns)
    left = _mix(corners, np.full(rows, 0), np.full(rows, 2), down)
    right = _mix(corners, np.full(rows, 1), np.full(rows, 3), down)
    row, column = np.divmod(np.arange(rows * columns), columns)
    frames = _mix(concatenate(left, right), row, rows + row, across[column])
    end_of = np.full(rows * columns, -1)
    end_of[[0, columns - 1, -columns, -1]] = 0, 1, 2, 3
    images = _decode(model, key, corners, frames, end_of, noise, options)
    labels = (f"down {down[r]:.2f}, right {across[c]:.2f}" for r, c in zip(row, column, strict=True))
    return Series(images, tuple(labels), columns)


def check_thetas(thetas: Sequence[float] | np.ndarray | int) -> np.ndarray:
    """Thetas as an array `[n]`; a number of them becomes that many, evenly from 0 to 1. Raises InputError."""
    if isinstance(thetas, int | np.integer):
        if thetas < 2:
            raise InputError(f"{thetas} thetas were asked for; an interpolation has 2 or more")
        return np.linspace(0, 1, thetas)
    thetas = np.asarray(thetas, float)
    if thetas.ndim != 1 or not len(thetas):
        raise InputError("thetas must be a list of at least one number in 0 to 1")
    for theta in thetas:
        if not 0 <= theta <= 1:
            raise InputError(f"theta is {theta:g}; it must lie in 0 to 1")
    return thetas


def _check(latent: Latent, count: int, noise: str) -> Latent:
    if len(latent) != count:
        raise InputError(f"{len(latent)} images were given; this interpolation is of {count}")
    if noise not in get_args(Noise):
        raise InputError(f"noise is {noise!r}; it must be interpolated or fixed")
    if latent.captions is not None and len(set(latent.captions)) > 1:
        raise InputError("captions cannot be interpolated; encode the images without, or with one and the same")
    units = np.asarray(unit_norm(latent.image_embedding))
    opposite = np.argwhere(units @ units.T < OPPOSITE)
    if len(opposite):
        first, second = opposite[0] + 1
        raise InputError(f"images {first} and {second} have opposite embeddings, between which there is no one way")
    return latent


def _mix(latent: Latent, first: np.ndarray, second: np.ndarray, theta: np.ndarray) -> Latent:
    """Frames `[n]` at theta from the images `first` to the images `second` of a latent, numbers `[n]`."""

    def between(a: jax.Array, b: jax.Array) -> jax.Array:
        return slerp(a.reshape(len(a), -1), b.reshape(len(b), -1), jnp.asarray(theta)).reshape(a.shape)

    return jax.tree.map(between, latent[first], dataclasses.replace(latent[second], captions=latent[first].captions))


def _decode(
    model: DALLE2, key: jax.Array, ends: Latent, frames: Latent, end_of: np.ndarray, noise: str, options: dict[str, Any]
) -> np.ndarray:
    """The images of frames, of which some are ends: `end_of` `[n]` has their numbers, and -1 for the others.

    The ends are decoded first, in the rows in which `reconstruct` has them, so that they come out the same.
    """
    inner = np.flatnonzero(end_of < 0)
    every = concatenate(ends, frames[inner])
    if noise == "fixed":  # from the key, which is one and the same
        every = dataclasses.replace(every, x_T=None)
    images = decode_latent(model, same_key(key, len(every)), every, **options)
    rows = end_of.copy()
    rows[inner] = len(ends) + np.arange(len(inner))
    return images[rows]
