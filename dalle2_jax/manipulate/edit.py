"""Text diffs (Sec. 3.3): an image turned from what one caption says towards what another says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.layers.embedding import unit_norm
from dalle2_jax.manipulate.interpolate import check_thetas, slerp
from dalle2_jax.manipulate.latent import Latent, decode_latent, same_key
from dalle2_jax.manipulate.series import Series
from dalle2_jax.unclip.embed import embed_captions

if TYPE_CHECKING:
    from dalle2_jax.unclip import DALLE2

LARGEST_THETA, FRAMES = 0.5, 5


def edit(
    model: DALLE2,
    key: jax.Array,
    latent: Latent,
    to: str | Sequence[str],
    origin: str | Sequence[str] | None = None,
    thetas: Sequence[float] | np.ndarray | None = None,
    **options: Any,
) -> Series:
    """Each image of a latent on its way to a caption, an image a row; x_T stays the inverted one.

    z_theta = slerp(z_i, z_d, theta), where z_d is `text_diff`.

    to: the caption wanted, one for all images or one each. origin: what the image is now, or "a photo"; None: z_d is
    the direction of `to` itself. thetas: 0 (the reconstruction) to 1 (z_d itself); None: 5 from 0 to 0.5, the larger
    end of the paper's 0.25 to 0.5. options: see `decode_latent`. The decoder is told no caption but those with which
    the images were encoded.

    Raises:
        InputError: for another number of captions than of images, a theta outside 0 to 1, or twice the same caption.
    """
    thetas = check_thetas(np.linspace(0, LARGEST_THETA, FRAMES) if thetas is None else thetas)
    count = len(latent)
    wanted = _one_each(to, count)
    direction = text_diff(model, wanted, None if origin is None else _one_each(origin, count))
    rows = np.repeat(np.arange(count), len(thetas))
    embeddings = turned(latent.image_embedding[rows], direction[rows], jnp.asarray(np.tile(thetas, count)))
    images = decode_latent(
        model,
        same_key(key, len(rows)),
        dataclasses.replace(latent[rows], image_embedding=embeddings),
        **options,
    )
    labels = (f"{wanted[row]}, theta {theta:.2f}" for row, theta in zip(rows, np.tile(thetas, count), strict=True))
    return Series(images, tuple(labels), len(thetas))


def text_diff(model: DALLE2, to: Sequence[str], origin: Sequence[str] | None = None) -> jax.Array:
    """z_d = norm(z_t - z_t0) of unit text embeddings, `[b, z]` of unit norm; norm(z_t) where there is no origin.

    Raises:
        InputError: where both captions say the same, so that there is no difference to follow.
    """
    z_t = embed_captions(model.clip, model.tokenizer, to)
    if origin is None:
        return z_t
    difference = z_t - embed_captions(model.clip, model.tokenizer, origin)
    for length, wanted in zip(np.linalg.norm(np.asarray(difference), axis=-1), to, strict=True):
        if length < 1e-4:
            raise InputError(f"the image is to become {wanted!r}, which it is said to be already; give another caption")
    return unit_norm(difference)


def turned(embedding: jax.Array, direction: jax.Array, theta: jax.Array) -> jax.Array:
    """slerp(z_i, z_d, theta) `[b, z]`, of the norm of z_i: not every CLIP's embeddings have unit norm."""
    return slerp(embedding, direction * jnp.linalg.norm(embedding, axis=-1, keepdims=True), theta)


def _one_each(captions: str | Sequence[str], count: int) -> list[str]:
    captions = [captions] * count if isinstance(captions, str) else list(captions)
    if len(captions) != count:
        raise InputError(f"{len(captions)} captions were given for {count} images; give one for all, or one each")
    return captions
