"""What a decoder reads of captions."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from dalle2_jax.captions import EncodedCaptions, keep_or_empty
from dalle2_jax.decoder.decoder import Decoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Caption:
    """What a decoder reads of captions; a pytree.

    read: its arguments by name: tokens or CLIP's text states as `text`, their `text_mask`, and `text_embedding` for a
    decoder that pools it. keep: bool `[b]`, False withholds the caption. null: the same arguments of the empty caption
    `[1, ...]`, for a decoder that has learned no null caption.
    """

    read: dict[str, jax.Array | None]
    keep: jax.Array
    null: dict[str, jax.Array] | None = None

    def condition(self, keep: jax.Array) -> dict[str, jax.Array | None]:
        """The network's arguments, with the caption where `keep` bool `[b]` is True."""
        if self.null is None:
            return {**self.read, "keep_text": keep}
        return keep_or_empty(keep, self.read, self.null)


def caption_for(
    decoder: Decoder, captions: EncodedCaptions, keep: jax.Array, empty: EncodedCaptions | None = None
) -> Caption:
    """What `decoder` reads of captions: tokens for an encoder of its own, CLIP's states for `text_width`, or nothing.

    keep: bool `[b]`, False withholds the caption. empty: the empty caption, which only a decoder reads that has learned
    no null caption (`Decoder.needs_empty_caption`). Shapes do in place of arrays.
    """

    def read(captions: EncodedCaptions) -> dict[str, jax.Array | None]:
        if decoder.text is not None:
            return {"text": captions.tokens, "text_mask": captions.mask}
        if decoder.text_width is None:
            return {"text": None, "text_mask": None}
        pooled = {"text_embedding": captions.embedding} if decoder.pools_embedding else {}
        return {"text": captions.states, "text_mask": captions.mask, **pooled}

    return Caption(read(captions), keep, read(empty) if decoder.needs_empty_caption else None)
