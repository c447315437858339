"""Embeddings of numbers and the normalisation of embeddings: small functions without parameters, all in float32."""

import math

import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError

LAYOUTS = ("glide", "ddpm")


def timestep_embedding(timesteps: jax.Array, width: int, layout: str = "glide") -> jax.Array:
    """Sinusoids of the timesteps, of frequencies from 1 down to about 1/10000.

    Args:
      timesteps: `[batch]`, integer or float.
      width: size of the embedding, even.
      layout: "glide": all cosines, then all sines; frequency `i` of `width / 2` is `10000 ** (-i / (width / 2))`.
        "ddpm": sines, then cosines; `10000 ** (-i / (width / 2 - 1))` (Ho et al. 2020, diffusion_tf/nn.py).

    Returns:
      float32 `[batch, width]`.

    Raises:
      InputError: if `width` is odd, or too small, or the layout unknown.
    """
    if width % 2:
        raise InputError(f"a timestep embedding needs an even width, got {width}")
    if layout not in LAYOUTS:
        raise InputError(f"the layout of a timestep embedding is {layout!r}; it must be {' or '.join(LAYOUTS)}")
    half = width // 2
    last = half if layout == "glide" else half - 1
    if not last:
        raise InputError(f"DDPM's timestep embedding needs a width of 4 or more, got {width}")
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / last)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = [jnp.cos(angles), jnp.sin(angles)]
    return jnp.concatenate(parts if layout == "glide" else parts[::-1], axis=-1)


def unit_norm(x: jax.Array) -> jax.Array:
    """Scales the last axis to length one, in float32; a zero vector stays zero and has a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
