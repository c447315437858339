"""DALL-E 1's attention masks: what a layer sees of a caption and of a grid of codes (Ramesh et al. 2021, Fig. 11).

All of the text before it is seen by every token. Of the image a code sees, in raster order on a grid W codes wide,

    row          itself and the W before it, beyond the ends of rows: back to the code above it
    column       itself and those above it in its column
    convolution  those of a k x k window around it that come before it, beyond the ends of rows as in `row`: codes at a
                 distance of a W + b, where a is 0 to k // 2 and b is -k // 2 to k // 2

The paper's image is 32 codes wide and its window 11 x 11, so that the last code sees 33, 32 and 61.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError
from dalle2_jax.layers.transformer import LayerMasks

KINDS = ("row", "column", "convolution")


def attention_mask(kind: str, text: int, grid: int, window: int = 11) -> jax.Array:
    """Which tokens each token sees: bool `[n, n]` of n = text + grid^2 tokens, the query's row, the key's column.

    Args:
        kind: one of `KINDS`.
        text: how many tokens come before the image's.
        grid: W, the codes of a row and of a column.
        window: k, of the convolution; odd.

    Raises:
        InputError: for another kind, an even window, or a grid without codes.
    """
    if kind not in KINDS:
        raise InputError(f"there is no attention {kind!r}; choose one of {', '.join(KINDS)}")
    if grid < 1 or text < 0:
        raise InputError(f"there are {text} text tokens before {grid}x{grid} codes; a grid has 1x1 or more")
    if window < 1 or window % 2 == 0:
        raise InputError(f"the convolution's window is {window}; it must be odd")
    number = jnp.arange(text + grid**2) - text  # of the codes, from 0 on
    key = number[None, :]
    distance = number[:, None] - key
    if kind == "row":
        seen = distance <= grid
    elif kind == "column":
        seen = distance % grid == 0
    else:
        half = window // 2
        rows = [jnp.abs(distance - above * grid) <= half for above in range(half + 1)]
        seen = jnp.any(jnp.stack(rows), axis=0)
    return (distance >= 0) & (seen | (key < 0))


def layer_kinds(depth: int) -> tuple[str, ...]:
    """The attention of each layer: the last has the convolution, and of the others, counted from 1, layer i has the
    column where i - 2 is a multiple of 4, and the row elsewhere (App. B.1)."""
    before = ("column" if (layer - 2) % 4 == 0 else "row" for layer in range(1, depth))
    return (*before, "convolution")


def layer_masks(depth: int, text: int, grid: int, window: int = 11) -> LayerMasks:
    """The masks of a stack of `depth` layers; arguments as those of `attention_mask`."""
    masks = jnp.stack([attention_mask(kind, text, grid, window) for kind in KINDS])
    return LayerMasks(masks, jnp.asarray([KINDS.index(kind) for kind in layer_kinds(depth)], jnp.int32))
