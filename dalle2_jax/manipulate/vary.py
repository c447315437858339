"""Variations of encoded images (Sec. 3.1): the same content drawn otherwise, or the same meaning drawn anew."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import numpy as np

from dalle2_jax.diffusion.sampler import keys_for
from dalle2_jax.errors import InputError
from dalle2_jax.manipulate.latent import Latent, decode_latent
from dalle2_jax.manipulate.series import Series

if TYPE_CHECKING:
    from dalle2_jax.unclip import DALLE2

Share = Literal["content", "semantics"]
ETA = 0.5  # at 1 little is left of x_T: those variations are as far from the image as those from fresh noise


def vary(
    model: DALLE2,
    key: jax.Array,
    latent: Latent,
    count: int = 4,
    *,
    share: Share = "content",
    eta: float | None = None,
    **options: Any,
) -> Series:
    """`count` variations of each image of a latent, an image a row.

    key: one key, or one a variation `[b * count]`. share: "content" starts from the inverted x_T and adds noise on the
    way (DDIM with eta above 0; 0 would be the reconstruction), so that what x_T holds is kept in part;
    "semantics" starts from fresh noise, so that z_i alone is kept. eta: 0 to 1; None: 0.5 with "content", 0
    with "semantics". options: see `decode_latent`.

    Raises:
        InputError: for another `share`, a count below 1, or an eta that leaves nothing to vary.
    """
    if share not in get_args(Share):
        raise InputError(f"share is {share!r}; it must be content or semantics")
    if count < 1:
        raise InputError(f"count is {count}; it must be 1 or more")
    content = share == "content"
    eta = (ETA if content else 0.0) if eta is None else eta
    if content and eta == 0:
        raise InputError("eta is 0, at which all variations that share content are the reconstruction; give more")
    several = latent[np.repeat(np.arange(len(latent)), count)]
    if not content:
        several = dataclasses.replace(several, x_T=None)
    images = decode_latent(model, keys_for(key, len(several)), several, eta=eta, **options)
    labels = [f"image {image + 1}, variation {number + 1}" for image in range(len(latent)) for number in range(count)]
    return Series(images, tuple(labels), count)
