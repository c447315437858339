"""The empty caption, which stands for a dropped one where a network has learned no null caption (Karlo, Kandinsky)."""

from typing import Any

import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.clip import CLIP, encode_captions
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


def empty_caption(clip: CLIP, params: Any, tokens: tuple[int, ...]) -> EncodedCaptions:
    """The empty caption of these tokens, a batch of one."""
    length = clip.text.context_length
    row = jnp.zeros((1, length), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens, jnp.int32))
    mask = (jnp.arange(length) < max(len(tokens), 1))[None]
    return encode_captions(clip, params, row, mask)
