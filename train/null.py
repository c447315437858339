"""The empty caption, which stands for a dropped one where a network has learned no null caption (Karlo, Kandinsky)."""

from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.clip import CLIP
from dalle2_jax.tokenizer import ClipTokenizer, tokenizer_from_json


def empty_tokens(clip: LoadedStage) -> tuple[int, ...]:
    """The empty caption in the tokens of a CLIP stage, without padding; () where it is only planned."""
    if clip.record.tokenizer is None:
        return ()
    tokenizer = tokenizer_from_json(clip.record.tokenizer)
    if not isinstance(tokenizer, ClipTokenizer):
        return ()
    tokens, mask = tokenizer.empty()
    return tuple(tokens[mask].tolist())


def empty_caption(clip: CLIP, params: Any, tokens: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """CLIP's text embedding `[1, z]`, states `[1, n, d]` and mask `[1, n]` of the empty caption."""
    length = clip.text.context_length
    row = jnp.zeros((1, length), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens, jnp.int32))
    mask = (jnp.arange(length) < max(len(tokens), 1))[None]
    embedding, states = clip.apply(params, row, mask, method="encode_text")
    return embedding, states, mask
