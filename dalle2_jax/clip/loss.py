"""CLIP's training loss over the global batch."""

import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError


def contrastive_loss(
    image_embedding: jax.Array, text_embedding: jax.Array, logit_scale: jax.Array, chunk: int | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Symmetric cross-entropy of each picture among all captions and each caption among all pictures (Fig. 3 of CLIP).

    Under `jax.jit` with the batch sharded over devices, "all" is the whole batch, whatever the number of devices.

    Args:
      image_embedding: `[batch, embedding_size]`, unit norm.
      text_embedding: `[batch, embedding_size]`, unit norm; row `i` belongs to picture `i`.
      logit_scale: scalar, the inverse temperature.
      chunk: with how many of the others each one is compared at a time, forwards and backwards, so that a device never
        has more than its rows times `chunk` logits; None: with all at once.

    Returns:
      The loss, a float32 scalar, and `accuracy_image_to_text` and `accuracy_text_to_image`, the fractions of pictures
      whose own caption is the nearest, and the reverse.

    Raises:
      InputError: if the batch does not divide by `chunk`.
    """
    image_embedding = image_embedding.astype(jnp.float32)
    text_embedding = text_embedding.astype(jnp.float32)
    # The diagonal, without gathering it from a matrix that is sharded over devices.
    own = logit_scale * jnp.sum(image_embedding * text_embedding, axis=1)
    if chunk is None:
        logits = logit_scale * (image_embedding @ text_embedding.T)
        among = [(jax.nn.logsumexp(logits, axis=axis), jnp.argmax(logits, axis=axis)) for axis in (1, 0)]
    else:
        pairs = ((image_embedding, text_embedding), (text_embedding, image_embedding))
        among = [_among(anchors, others, logit_scale, chunk) for anchors, others in pairs]
    (all_text, nearest_text), (all_images, nearest_image) = among
    loss = (jnp.mean(all_text - own) + jnp.mean(all_images - own)) / 2
    labels = jnp.arange(own.shape[0])
    metrics = {
        "accuracy_image_to_text": jnp.mean(nearest_text == labels),
        "accuracy_text_to_image": jnp.mean(nearest_image == labels),
    }
    return loss, metrics


def _among(anchors: jax.Array, others: jax.Array, scale: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(logsumexp `[b]` of each anchor's logits, index `[b]` of the highest) over all others, `chunk` at a time."""
    batch = others.shape[0]
    if chunk < 1 or batch % chunk:
        raise InputError(f"a batch of {batch} does not divide into chunks of {chunk}: choose one that divides it")

    @jax.checkpoint
    def look(seen: tuple[jax.Array, ...], part: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        highest, total, nearest = seen
        start, some = part
        logits = scale * (anchors @ some.T)
        top = jax.lax.stop_gradient(jnp.max(logits, axis=1))
        new = jnp.maximum(highest, top)
        total = total * jnp.exp(highest - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=1)
        nearest = jnp.where(top > highest, start + jnp.argmax(logits, axis=1), nearest)
        return (new, total, nearest), None

    nothing = (jnp.full(batch, -jnp.inf), jnp.zeros(batch), jnp.zeros(batch, jnp.int32))
    starts = jnp.arange(0, batch, chunk, dtype=jnp.int32)
    (highest, total, nearest), _ = jax.lax.scan(look, nothing, (starts, others.reshape(-1, chunk, others.shape[1])))
    return highest + jnp.log(total), nearest
