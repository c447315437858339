"""Captions to tokens: our own byte-level BPE, CLIP's and GLIDE's. No jax; `tokenizers` is imported when it is used."""

import json

from dalle2_jax.errors import InputError
from dalle2_jax.tokenizer.byte_bpe import END, PAD, START, Tokenizer
from dalle2_jax.tokenizer.clip import ClipTokenizer
from dalle2_jax.tokenizer.common import byte_letters
from dalle2_jax.tokenizer.glide import GlideTokenizer

__all__ = [
    "AnyTokenizer",
    "END",
    "PAD",
    "START",
    "ClipTokenizer",
    "GlideTokenizer",
    "Tokenizer",
    "byte_letters",
    "tokenizer_from_json",
]

AnyTokenizer = Tokenizer | ClipTokenizer | GlideTokenizer
_KINDS = {None: Tokenizer, "clip": ClipTokenizer, "glide": GlideTokenizer}


def tokenizer_from_json(text: str) -> AnyTokenizer:
    """The tokenizer that a stage's folder records; InputError for one of a later version."""
    kind = json.loads(text).get("kind")
    if kind not in _KINDS:
        raise InputError(f"the tokenizer is of the kind {kind!r}, which this version does not know; update dalle2_jax")
    return _KINDS[kind].from_json(text)
