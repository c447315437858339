"""A network in another floating-point type: bfloat16 weights and arithmetic on accelerators, half the memory."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def with_dtype(module: nn.Module, dtype: str) -> nn.Module:
    """The network with `dtype` for every `dtype` and `param_dtype` in it, also in the networks among its fields.

    What computes in float32 whatever these say (normalisations, softmax, time embeddings) goes on doing so.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(module):
        if field.name in ("parent", "name"):
            continue
        value = getattr(module, field.name)
        if field.name in ("dtype", "param_dtype"):
            changes[field.name] = dtype
        elif isinstance(value, nn.Module):
            changes[field.name] = with_dtype(value, dtype)
    return module.clone(**changes)


def cast(params: Any, dtype: str) -> Any:
    """A tree of arrays with its floats in `dtype`."""

    def one(leaf: Any) -> Any:
        return leaf.astype(jnp.dtype(dtype)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, params)
