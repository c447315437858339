"""What a prior reads of captions, and what any prior is."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.errors import InputError


@runtime_checkable
class Prior(Protocol):
    """Samples CLIP's image embeddings of captions: what `sample_prior`, `DALLE2` and the commands ask of a prior.

    A Linen module with these is a prior, whoever wrote it.

    needs_empty_caption: whether the empty caption stands for a withheld one, since no null caption was learned.
    """

    embedding_size: int

    @property
    def needs_empty_caption(self) -> bool: ...

    def sample_embeddings(
        self,
        params: Any,
        keys: jax.Array,
        captions: EncodedCaptions,
        sampling: Any,
        process: Any = None,
        empty: EncodedCaptions | None = None,
    ) -> jax.Array:
        """One image embedding a caption, `[b, z]`, as CLIP has them.

        keys: `[b]`, of which each alone decides its sample. sampling: the settings that the stage records, an object of
        the prior's own class. process: the diffusion process that the stage records, None where there is none. empty:
        the empty caption, for a prior that needs it.
        """
        ...


def check_caption(prior: Any, text_embedding: jax.Array, text: jax.Array, text_mask: jax.Array) -> None:
    """Raises InputError for a caption that does not fit one of our priors' `text_embedding_size`, `context_length`."""
    size = prior.text_embedding_size or prior.embedding_size
    if text_embedding.shape[-1] != size:
        raise InputError(f"the prior needs text embeddings of size {size}, got {text_embedding.shape[-1]}")
    if text.shape[1] > prior.context_length:
        raise InputError(f"captions of {text.shape[1]} tokens are longer than the context of {prior.context_length}")
    if text_mask.shape != text.shape[:2]:
        raise InputError(f"the text mask {list(text_mask.shape)} must be [batch, length] {list(text.shape[:2])}")


def caption_condition(prior: Any, captions: EncodedCaptions) -> dict[str, jax.Array | None]:
    """What one of our priors reads of captions, as its arguments: tokens for an embedding of its own, or CLIP's states.

    prior: a module whose `reads_tokens` says which.
    """
    text = captions.tokens if prior.reads_tokens else captions.states
    return {"text_embedding": captions.embedding, "text": text, "text_mask": captions.mask}
