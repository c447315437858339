"""CLIP's training loss over the global batch."""

from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError


def contrastive_loss(
    image_embedding: jax.Array,
    text_embedding: jax.Array,
    logit_scale: jax.Array,
    chunk: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Symmetric cross-entropy of each image among all captions and each caption among all images (Fig. 3 of CLIP).

    Under `jax.jit` with the batch sharded over devices, "all" is the whole batch, whatever the number of devices.

    Args:
      image_embedding: `[b, z]`, unit norm.
      text_embedding: `[b, z]`, unit norm; row `i` belongs to image `i`.
      logit_scale: scalar, the inverse temperature.
      chunk: with how many of the others each one is compared at a time, forwards and backwards, so that a device never
        has more than its rows times `chunk` logits; None: with all at once.
      axis_name: under `jax.shard_map`, the axes over which the batch is split: `[b, z]` are then this device's rows,
        "all" is gathered from all devices, and what is returned is the mean over them.

    Returns:
      The loss, a float32 scalar, and `accuracy_image_to_text` and `accuracy_text_to_image`, the fractions of images
      whose own caption is the nearest, and the reverse.

    Raises:
      InputError: if the batch does not divide by `chunk`.
    """
    image_embedding = image_embedding.astype(jnp.float32)
    text_embedding = text_embedding.astype(jnp.float32)
    # The diagonal, without gathering it from a matrix that is sharded over devices.
    positive = logit_scale * jnp.sum(image_embedding * text_embedding, axis=1)
    labels = jnp.arange(positive.shape[0])
    if chunk is None and axis_name is None:
        logits = logit_scale * (image_embedding @ text_embedding.T)
        compared = [(jax.nn.logsumexp(logits, axis=axis), jnp.argmax(logits, axis=axis)) for axis in (1, 0)]
    else:
        all_images, all_text = image_embedding, text_embedding
        if axis_name is not None:
            all_images, all_text = jax.lax.all_gather((all_images, all_text), axis_name, tiled=True)
            labels = labels + jax.lax.axis_index(axis_name) * labels.shape[0]
        pairs = ((image_embedding, all_text), (text_embedding, all_images))
        size = all_text.shape[0] if chunk is None else chunk
        compared = [_chunked_logsumexp(anchors, others, logit_scale, size) for anchors, others in pairs]
    (over_text, nearest_text), (over_images, nearest_image) = compared
    loss = (jnp.mean(over_text - positive) + jnp.mean(over_images - positive)) / 2
    metrics = {
        "accuracy_image_to_text": jnp.mean(nearest_text == labels),
        "accuracy_text_to_image": jnp.mean(nearest_image == labels),
    }
    return (loss, metrics) if axis_name is None else jax.lax.pmean((loss, metrics), axis_name)


def _chunked_logsumexp(
    anchors: jax.Array, others: jax.Array, scale: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(logsumexp `[b]` of each anchor's logits, index `[b]` of the highest) over all others, `chunk` at a time."""
    batch = others.shape[0]
    if chunk < 1 or batch % chunk:
        raise InputError(f"a batch of {batch} does not divide into chunks of {chunk}: choose one that divides it")

    @jax.checkpoint
    def scan_chunk(carry: tuple[jax.Array, ...], part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        highest, total, nearest = carry
        start, some = part
        logits = scale * (anchors @ some.T)
        top = jax.lax.stop_gradient(jnp.max(logits, axis=1))
        new = jnp.maximum(highest, top)
        total = total * jnp.exp(highest - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=1)
        nearest = jnp.where(top > highest, start + jnp.argmax(logits, axis=1), nearest)
        return (new, total, nearest), None

    zeros = jax.lax.stop_gradient(jnp.zeros_like(anchors[:, 0]))  # which vary over a mesh's axes as the anchors do
    initial = (zeros - jnp.inf, zeros, zeros.astype(jnp.int32))
    starts = jnp.arange(0, batch, chunk, dtype=jnp.int32)
    (highest, total, nearest), _ = jax.lax.scan(
        scan_chunk, initial, (starts, others.reshape(-1, chunk, others.shape[1]))
    )
    return highest + jnp.log(total), nearest
