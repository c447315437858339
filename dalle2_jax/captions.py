"""What networks read of captions, as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncodedCaptions:
    """Captions as tokens, and what CLIP makes of them; a pytree.

    The empty caption, which stands for a withheld one where a network has learned no null caption, is a batch of one
    like any other.

    Fields:
      tokens: int32 `[b, n]`. mask: bool `[b, n]`, True for real tokens.
      embedding: CLIP's text embeddings `[b, z]`; None without a CLIP.
      states: CLIP's text states `[b, n, d]`; None without a CLIP.
    """

    tokens: jax.Array
    mask: jax.Array
    embedding: jax.Array | None = None
    states: jax.Array | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: Any) -> EncodedCaptions:
        """The captions of some rows."""
        return jax.tree.map(lambda value: value[rows], self)
