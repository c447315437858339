"""The keys and values of earlier tokens, so that a causal transformer computes each token once.

A cache is an argument and a result: nothing is changed in place, and its shapes do not depend on how many tokens are
in it, so that one compiled step serves all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


class LayerCache(NamedTuple):
    """One layer's keys and values `[b, places, heads, head_dim]`, or all layers' `[layers, b, places, ...]`."""

    keys: jax.Array
    values: jax.Array

    def write(self, keys: jax.Array, values: jax.Array, place: jax.Array) -> LayerCache:
        """One layer's cache with `keys` and `values` `[b, tokens, heads, head_dim]` from `place`, int32, on."""
        start = (0, place, 0, 0)
        new = zip(self, (keys, values), strict=True)
        return LayerCache(*(jax.lax.dynamic_update_slice(old, value.astype(old.dtype), start) for old, value in new))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What a transformer has computed of the tokens so far (`Transformer.empty_cache`); a pytree.

    Fields:
        layers: of all layers. length: int32, how many tokens are in it.
    """

    layers: LayerCache
    length: jax.Array

    def seen(self, tokens: int) -> jax.Array:
        """Which places each of the next `tokens` tokens sees: bool `[1, 1, tokens, places]`, up to its own."""
        places = jnp.arange(self.layers.keys.shape[2])
        own = self.length + jnp.arange(tokens)
        return (places[None, :] <= own[:, None])[None, None]
