"""Attention of one sequence to another: in a decoder, of its states to what the encoder made of the source."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError
from dalle2_jax.layers.attention import attention_weights, dot_product_attention
from dalle2_jax.layers.cache import LayerCache
from dalle2_jax.layers.kernels.dense import product


class CrossAttention(nn.Module):
    """Multi-head attention with the queries of one sequence and the keys and values of another, its memory (Vaswani et
    al. 2017, Sec. 3.2.3).

    `read` makes the keys and values; where the memory stays and the queries come one after the other, once for all of
    them. The kernel of `key_value` is `[memory width, heads, 2, head_dim]`, that of `query` `[width, heads, head_dim]`,
    so that heads can be split among devices. Kernels start normal, with a standard deviation of fan-in^-1/2. With
    `mutable=["intermediates"]` the weights are stored as "weights".

    Fields:
      width: of the queries' states and of the result. heads: number of heads; must divide the width.
      dtype: of the computation. param_dtype: of the parameters.
    """

    width: int
    heads: int
    dtype: str = "float32"
    param_dtype: str = "float32"

    def setup(self) -> None:
        if self.width % self.heads:
            raise InputError(f"width {self.width} does not divide into {self.heads} heads; choose heads that divide it")
        settings = {
            "kernel_init": nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
            "dot_general": product,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        of_heads, size = functools.partial(nn.DenseGeneral, **settings), self.width // self.heads
        self.query = of_heads((self.heads, size))
        self.key_value = of_heads((self.heads, 2, size))
        self.out = nn.Dense(self.width, **settings)

    def read(self, memory: jax.Array) -> LayerCache:
        """The keys and values `[b, m, heads, head_dim]` of memory `[b, m, memory width]`."""
        return LayerCache(*(part.squeeze(3) for part in jnp.split(self.key_value(memory), 2, axis=3)))

    def __call__(self, x: jax.Array, memory: jax.Array | LayerCache, memory_mask: jax.Array | None = None) -> jax.Array:
        """Each state of `x` attends to the memory.

        Args:
          x: `[b, n, width]`.
          memory: `[b, m, memory width]`, or what `read` made of it.
          memory_mask: bool `[b, m]`, True for what may be attended to; None: all of it.

        Returns:
          `[b, n, width]`.

        Raises:
          InputError: if the width does not divide by `heads`.
        """
        keys, values = memory if isinstance(memory, LayerCache) else self.read(memory)
        query, mask = self.query(x), None if memory_mask is None else memory_mask[:, None, None, :]
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "weights", attention_weights(query, keys, mask=mask))
        y = dot_product_attention(query, keys, values, mask=mask)
        return self.out(y.reshape(*x.shape[:2], self.width))
