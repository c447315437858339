"""A network in another floating-point type: bfloat16 weights and arithmetic on accelerators, half the memory."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.layers.fields import with_fields


def with_dtype(module: nn.Module, dtype: str) -> nn.Module:
    """The network with `dtype` for every `dtype` and `param_dtype` in it, also in the networks among its fields.

    What computes in float32 whatever these say (normalisations, softmax, time embeddings) goes on doing so.
    """
    return with_fields(module, dtype=dtype, param_dtype=dtype)


def cast(params: Any, dtype: str) -> Any:
    """A tree of arrays with its floats in `dtype`."""

    def one(leaf: Any) -> Any:
        return leaf.astype(jnp.dtype(dtype)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, params)
