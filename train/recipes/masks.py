"""Random masks of what is known, for networks that learn to paint the rest (GLIDE Sec. 4), and their first weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.decoder import Known
from dalle2_jax.layers.convolution import space_to_depth
from dalle2_jax.layers.unet import UNet

# Channels of an inpainting network's input that say what is known, behind the three of x_t.
KNOWN_CHANNELS = slice(3, 7)


def random_masks(key: jax.Array, batch: int, size: int, full: float = 0.25) -> jax.Array:
    """Masks bool `[b, size, size, 1]`, True where the image is known.

    Of a share `full` nothing is known. The others are, a third each: all but a rectangle (inpainting), a rectangle
    alone (outpainting at all sides), and what lies on one side of a line through the image (outpainting at one side).
    Can be jitted with `batch` and `size` static.
    """
    keys = dict(zip(("full", "kind", "sides", "corners", "angle", "point"), jax.random.split(key, 6), strict=True))
    places = jnp.arange(size, dtype=jnp.float32)
    sides = jnp.floor(jax.random.uniform(keys["sides"], (batch, 2), minval=1.0, maxval=size + 1.0))
    corners = jnp.floor(jax.random.uniform(keys["corners"], (batch, 2)) * (size - sides + 1))
    along = (places[None, None] >= corners[..., None]) & (places[None, None] < (corners + sides)[..., None])
    within = along[:, 0, :, None] & along[:, 1, None, :]

    angle = jax.random.uniform(keys["angle"], (batch, 1, 1), maxval=2 * np.pi)
    point = jax.random.uniform(keys["point"], (batch, 2, 1), maxval=float(size))
    offsets = places[None, None] + 0.5 - point
    side = jnp.sin(angle) * offsets[:, 0, :, None] + jnp.cos(angle) * offsets[:, 1, None, :] > 0

    kind = jax.random.randint(keys["kind"], (batch, 1, 1), 0, 3)
    known = jnp.where(kind == 0, ~within, jnp.where(kind == 1, within, side))
    return (known & (jax.random.uniform(keys["full"], (batch, 1, 1)) >= full))[..., None]


def random_known(key: jax.Array, images: jax.Array, full: float) -> Known:
    """Images `[b, h, h, 3]` in [-1, 1] with random masks."""
    return Known(images, random_masks(key, images.shape[0], images.shape[1], full))


def without_known(params: Any, unet: UNet) -> Any:
    """Parameters of a decoder or an upsampler whose U-Net does not look at what is known: weights of zero there."""
    conv = params["unet"]["conv_in"]
    kernel = jnp.where(_sees_known(conv["kernel"], unet.patch)[None, None, :, None], 0, conv["kernel"])
    return {**params, "unet": {**params["unet"], "conv_in": {**conv, "kernel": kernel}}}


def with_known_channels(kernel: np.ndarray, patch: int) -> np.ndarray:
    """The first convolution's kernel `[3, 3, c, f]` of a network that does not see what is known, for one that does.

    Its weights of the new channels are zero, so that both give the same.
    """
    height, width, inputs, features = kernel.shape
    count = KNOWN_CHANNELS.stop - KNOWN_CHANNELS.start
    fitted = np.zeros((height, width, inputs + count * patch**2, features), kernel.dtype)
    fitted[:, :, ~_sees_known(fitted, patch)] = kernel
    return fitted


def _sees_known(kernel: Any, patch: int) -> np.ndarray:
    """Which of the inputs of a first convolution `[3, 3, inputs, f]` are of `KNOWN_CHANNELS`, bool `[inputs]`."""
    channels = kernel.shape[2] // patch**2
    seen = np.zeros((1, patch, patch, channels), bool)
    seen[..., KNOWN_CHANNELS] = True
    return np.asarray(space_to_depth(seen, patch)).reshape(-1)
