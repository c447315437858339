"""CLIP's embeddings of captions and images of any number and size, and what they say of each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.errors import InputError
from dalle2_jax.images.resize import clip_pixels
from dalle2_jax.layers.embedding import unit_norm
from dalle2_jax.tokenizer import AnyTokenizer
from dalle2_jax.unclip.placement import shard_batch
from dalle2_jax.unclip.sample import encode_captions, encode_images

BATCH = 128  # images or captions at once, for the memory's sake


def batches_of(many: Any) -> Iterator[Any]:
    """A sequence in parts of `BATCH`."""
    for start in range(0, len(many), BATCH):
        yield many[start : start + BATCH]


def encode_tokens(clip: LoadedStage | None, tokens: jax.Array, mask: jax.Array) -> EncodedCaptions:
    """Tokens with what CLIP makes of them; without a CLIP the tokens alone."""
    captions = shard_batch(EncodedCaptions(jnp.asarray(tokens), jnp.asarray(mask)))
    return captions if clip is None else encode_captions(clip, captions.tokens, captions.mask)()


def empty_caption(clip: LoadedStage | None, tokenizer: AnyTokenizer) -> EncodedCaptions:
    """The empty caption, a batch of one."""
    tokens, mask = map(jnp.asarray, tokenizer.empty())
    return EncodedCaptions(tokens, mask) if clip is None else encode_captions(clip, tokens, mask)()


def input_size(clip: LoadedStage) -> int:
    """The side of the images that CLIP reads; InputError where it reads none."""
    if clip.module.vision is None:
        raise InputError("this run's CLIP reads captions alone; convert a run with an image encoder (--clip)")
    return clip.module.vision.image_size


def embed_images(clip: LoadedStage, images: Sequence[np.ndarray]) -> jax.Array:
    """CLIP's embeddings `[b, z]` of uint8 images `[h, w, 3]` of any size, by their central squares."""
    size = input_size(clip)
    pixels = np.stack([clip_pixels(np.asarray(image), size) for image in images])
    return jnp.concatenate([encode_images(clip, shard_batch(jnp.asarray(batch)))() for batch in batches_of(pixels)])


def cosines(
    clip: LoadedStage, tokenizer: AnyTokenizer, images: Sequence[np.ndarray], captions: Sequence[str]
) -> jax.Array:
    """Cosines `[images, captions]` of CLIP's embeddings; images: uint8 `[h, w, 3]` each, of any size."""
    return unit_norm(embed_images(clip, images)) @ embed_captions(clip, tokenizer, captions).T


def embed_captions(clip: LoadedStage, tokenizer: AnyTokenizer, captions: Sequence[str]) -> jax.Array:
    """CLIP's embeddings `[b, z]` of captions, of unit norm."""
    encoded = [encode_tokens(clip, *tokenizer.encode(batch)) for batch in batches_of(captions)]
    return unit_norm(jnp.concatenate([captions.embedding for captions in encoded]))
