"""Zero-shot classification with CLIP (section 3.1 of its paper): class names as captions, a mean embedding a class."""

import jax
import jax.numpy as jnp

from dalle2_jax.layers.embedding import unit_norm


def zero_shot_weights(text_embeddings: jax.Array) -> jax.Array:
    """The classifier's weights: each class's mean over the templates ("a photo of a ..."), again of unit norm.

    Args:
      text_embeddings: `[classes, templates, embedding_size]`, unit norm.

    Returns:
      float32 `[classes, embedding_size]`, unit norm.
    """
    return unit_norm(text_embeddings.astype(jnp.float32).mean(axis=1))


def classify(image_embedding: jax.Array, weights: jax.Array, logit_scale: jax.Array | float) -> jax.Array:
    """Probabilities of the classes.

    Args:
      image_embedding: `[batch, embedding_size]`, unit norm.
      weights: `[classes, embedding_size]` from `zero_shot_weights`.
      logit_scale: the inverse temperature.

    Returns:
      float32 `[batch, classes]`; each row sums to one.
    """
    return jax.nn.softmax(logit_scale * (image_embedding.astype(jnp.float32) @ weights.T), axis=-1)
