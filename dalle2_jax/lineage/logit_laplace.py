"""The likelihood of DALL-E's discrete VAE: pixels whose logits are Laplace variables (Ramesh et al. 2021, App. A.3).

A Laplace density of pixels puts a part of itself outside of 0 to 1; this one does not. So that logits are finite,
pixels are mapped away from 0 and 1 first.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.lineage.autoencoder import to_unit

MARGIN = 0.1  # epsilon of the mapped pixels, which lie in MARGIN to 1 - MARGIN
# Of b: the mean deviation, in logits, of a grey value in the middle that was rounded to 256 levels. Below it a density
# of such images only grows with how well it hits the levels, without bounds.
LEAST_SCALE = (1 - 2 * MARGIN) / 255


def map_pixels(pixels: jax.Array) -> jax.Array:
    """Pixels in [0, 1] to [0.1, 0.9], whose logits are finite (App. A.3)."""
    return (1 - 2 * MARGIN) * pixels + MARGIN


def unmap_pixels(mapped: jax.Array) -> jax.Array:
    """The inverse of `map_pixels`, clipped to [0, 1]."""
    return jnp.clip((mapped - MARGIN) / (1 - 2 * MARGIN), 0.0, 1.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogitLaplace:
    """p(image | codes): the logits of mapped pixels are independent Laplace variables (App. A.3); a pytree.

    Fields:
        mean, log_scale: mu and ln b of the logits, float32 `[b, h, w, c]`.
        least_scale: of b, which log_scale may fall short of.
    """

    mean: jax.Array
    log_scale: jax.Array
    least_scale: float = dataclasses.field(default=LEAST_SCALE, metadata={"static": True})

    @property
    def images(self) -> jax.Array:
        """The pixels at `mean`, as images `[b, h, w, c]` in [-1, 1]."""
        return 2.0 * unmap_pixels(nn.sigmoid(self.mean)) - 1.0

    def log_prob(self, images: jax.Array) -> jax.Array:
        """log p(image | codes) of images `[b, h, w, c]` in [-1, 1], float32 `[b]`, in nats, summed over pixels and
        channels.

        The density of mapped pixels, as in the paper, which can be above 0; log(0.8) a pixel and channel more would be
        that of pixels in [0, 1].
        """
        mapped = map_pixels(to_unit(images.astype(jnp.float32)))
        return logit_laplace_log_density(mapped, self.mean, self.log_scale, self.least_scale).sum((1, 2, 3))


def logit_laplace_log_density(
    x: jax.Array, mean: jax.Array, log_scale: jax.Array, least_scale: float = LEAST_SCALE
) -> jax.Array:
    """log of exp(-|logit(x) - mean| / b) / (2 b x (1 - x)), for x in (0, 1), elementwise, in float32 (Eq. 2).

    b is exp(log_scale), but at least least_scale; a smaller one has a gradient only where x is further from the mean
    than that, which raises it.
    """
    x, mean, log_scale = (value.astype(jnp.float32) for value in (x, mean, log_scale))
    distance = jnp.abs(jnp.log(x) - jnp.log1p(-x) - mean)
    limited = jax.lax.stop_gradient(jnp.maximum(log_scale, math.log(least_scale)))
    free = (log_scale >= limited) | (distance > jnp.exp(limited))
    log_scale = limited + jnp.where(free, log_scale - jax.lax.stop_gradient(log_scale), 0.0)
    return -distance * jnp.exp(-log_scale) - log_scale - math.log(2.0) - jnp.log(x) - jnp.log1p(-x)
