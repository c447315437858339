"""What CLIP makes of captions, for the networks that read it."""

from typing import Any

import jax

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.clip.model import CLIP


def encode_captions(clip: CLIP, params: Any, tokens: jax.Array, mask: jax.Array) -> EncodedCaptions:
    """Tokens int32 `[b, n]` and their mask with CLIP's text embeddings and states of them."""
    embedding, states = clip.apply({"params": params}, tokens, mask, method="encode_text")
    return EncodedCaptions(tokens, mask, embedding, states)
