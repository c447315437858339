"""What networks read of captions, as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


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


def keep_or_empty(keep: jax.Array, read: Tree, empty: Tree) -> Tree:
    """What is read of captions, a tree of arrays `[b, ...]`, with the empty caption's `[1, ...]` where `keep` is False.

    keep: bool `[b]`.
    """

    def choose(one: jax.Array, null: jax.Array) -> jax.Array:
        return jnp.where(keep.reshape(-1, *(1,) * (one.ndim - 1)), one, null)

    return jax.tree.map(choose, read, empty)
