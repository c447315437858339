"""A transformer's parameters with its layers stacked for a scan, or each by itself; one of the other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def unstack_layers(params: Any) -> Any:
    """Parameters with each layer's by themselves, as without `scan_layers`, for every transformer in the tree."""
    if not isinstance(params, Mapping):
        return params
    result = {}
    for name, value in params.items():
        if name == "blocks":
            for layer in range(len(jax.tree.leaves(value)[0])):
                result[f"block_{layer}"] = jax.tree.map(lambda leaf, layer=layer: leaf[layer], value)
        else:
            result[name] = unstack_layers(value)
    return result


def stack_layers(params: Any) -> Any:
    """The reverse of `unstack_layers`: parameters with all layers' stack_layers, as with `scan_layers`."""
    if not isinstance(params, Mapping):
        return params
    layers = {int(match[1]): name for name in params if (match := re.fullmatch(r"block_(\d+)", name))}
    result = {name: stack_layers(value) for name, value in params.items() if name not in layers.values()}
    if layers:
        trees = (params[layers[layer]] for layer in sorted(layers))
        result["blocks"] = jax.tree.map(_stack, *trees)
    return result


def _stack(*leaves: Any) -> Any:
    return (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves)
