"""Choosing among several samples of the prior."""

import jax
import jax.numpy as jnp


def best_of(candidates: jax.Array, text_embedding: jax.Array) -> jax.Array:
    """Keeps, for each caption, the sample with the largest dot product z_i . z_t (Sec. 2.2; the paper draws two).

    Args:
      candidates: `[batch, samples, embedding_size]`, unit norm.
      text_embedding: `[batch, embedding_size]`, unit norm.

    Returns:
      `[batch, embedding_size]`.
    """
    similarity = jnp.einsum("bmz,bz->bm", candidates.astype(jnp.float32), text_embedding.astype(jnp.float32))
    best = jnp.argmax(similarity, axis=1)
    return jnp.take_along_axis(candidates, best[:, None, None], axis=1)[:, 0]
