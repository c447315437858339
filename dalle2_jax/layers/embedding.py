"""Embeddings of numbers and the normalisation of embeddings: small functions without parameters, all in float32."""

import math

import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError


def timestep_embedding(timesteps: jax.Array, width: int) -> jax.Array:
    """Sinusoids of the timesteps, as in DDPM, with GLIDE's layout: all cosines, then all sines.

    Frequency `i` of `width / 2` is `10000 ** (-i / (width / 2))`.

    Args:
      timesteps: `[batch]`, integer or float.
      width: size of the embedding, even.

    Returns:
      float32 `[batch, width]`.

    Raises:
      InputError: if `width` is odd.
    """
    if width % 2:
        raise InputError(f"a timestep embedding needs an even width, got {width}")
    half = width // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def unit_norm(x: jax.Array) -> jax.Array:
    """Scales the last axis to length one, in float32; a zero vector stays zero and has a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
