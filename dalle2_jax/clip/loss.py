"""CLIP's training loss over the global batch."""

import jax
import jax.numpy as jnp


def contrastive_loss(
    image_embedding: jax.Array, text_embedding: jax.Array, logit_scale: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Symmetric cross-entropy of each picture among all captions and each caption among all pictures (Fig. 3 of CLIP).

    Under `jax.jit` with the batch sharded over devices, "all" is the whole batch, whatever the number of devices.

    Args:
      image_embedding: `[batch, embedding_size]`, unit norm.
      text_embedding: `[batch, embedding_size]`, unit norm; row `i` belongs to picture `i`.
      logit_scale: scalar, the inverse temperature.

    Returns:
      The loss, a float32 scalar, and `accuracy_image_to_text` and `accuracy_text_to_image`, the fractions of pictures
      whose own caption is the nearest, and the reverse.
    """
    image_embedding = image_embedding.astype(jnp.float32)
    text_embedding = text_embedding.astype(jnp.float32)
    logits = logit_scale * (image_embedding @ text_embedding.T)
    # The diagonal, without gathering it from a matrix that is sharded over devices.
    own = logit_scale * jnp.sum(image_embedding * text_embedding, axis=1)
    to_text, to_image = (jax.nn.logsumexp(logits, axis=axis) - own for axis in (1, 0))
    loss = (to_text.mean() + to_image.mean()) / 2
    labels = jnp.arange(logits.shape[0])
    metrics = {
        "accuracy_image_to_text": jnp.mean(jnp.argmax(logits, axis=1) == labels),
        "accuracy_text_to_image": jnp.mean(jnp.argmax(logits, axis=0) == labels),
    }
    return loss, metrics
