"""Choosing among several samples of the prior."""

import jax
import jax.numpy as jnp

from dalle2_jax.layers.embedding import unit_norm


def best_of(candidates: jax.Array, text_embedding: jax.Array) -> jax.Array:
    """Keeps, for each caption, the sample with the largest dot product z_i . z_t (Sec. 2.2; the paper samples two).

    The dot product is that of unit vectors, whatever norm they come with.

    Args:
      candidates: `[batch, samples, embedding_size]`.
      text_embedding: `[batch, embedding_size]`.

    Returns:
      `[batch, embedding_size]`.
    """
    similarity = jnp.einsum("bmz,bz->bm", unit_norm(candidates), text_embedding.astype(jnp.float32))
    best = jnp.argmax(similarity, axis=1)
    return jnp.take_along_axis(candidates, best[:, None, None], axis=1)[:, 0]
