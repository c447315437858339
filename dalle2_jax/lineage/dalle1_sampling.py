"""Sampling DALL-E 1's codes of an image under a caption, from a key-value cache by one `lax.scan` (Sec. 2.6)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion.sampler import keys_for
from dalle2_jax.diffusion.token_sampling import TokenSampling, sample_sequence
from dalle2_jax.errors import InputError
from dalle2_jax.layers.cache import Cache
from dalle2_jax.lineage.dalle1 import DALLE1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("temperature", "top_k", "top_p", "guidance_scale"),
    meta_fields=(),
)
@dataclass(frozen=True, kw_only=True)
class DALLE1Sampling(TokenSampling):
    """DALL-E 1's sampling settings, of which a trained stage records its own; the paper's are the defaults.

    A pytree of the numbers that people turn; `turned` prepares it to be an argument of a jitted function. Guidance is
    against the empty caption (as in dalle-mini; not in the paper) and wants a network that was trained with captions
    dropped.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.temperature, int | float) and not self.temperature > 0:
            raise InputError(
                f"temperature is {self.temperature}; it must be above 0 (top_k=1 takes the most probable code)"
            )


def sample_dalle1(
    key: jax.Array,
    module: DALLE1,
    params: Any,
    tokens: jax.Array,
    mask: jax.Array,
    sampling: DALLE1Sampling,
    given: jax.Array | None = None,
) -> jax.Array:
    """The codes of one image a caption, int32 `[b, grid, grid]`, which the dVAE's `decode_codes` decodes.

    Args:
        key: one key, or one a caption `[b]`, with which an image is the same alone and in any batch.
        tokens: int32 `[b, context_length]`. mask: bool of the same shape, True for real tokens.
        given: the first rows of the images, int32 `[b, rows, grid]`, which are kept.

    Raises:
        InputError: for another number of keys, captions of another length than the context's, or given rows that are
            no such codes or leave none to sample.
    """
    count, grid, rows = len(tokens), module.grid, 0
    keys, condition = keys_for(key, count), {"tokens": tokens, "mask": mask}
    if given is not None:
        rows = given.shape[1] if given.ndim == 3 else 0
        module.check_grid(given, rows)
        if not (len(given) == count and rows < grid):
            raise InputError(
                f"{rows} of {grid} rows are given of {len(given)} images for {count} captions; give fewer rows "
                "than there are, of one image a caption"
            )
        condition["given"] = given
    if sampling.is_guided:
        empty = {**condition, "mask": jnp.zeros(mask.shape, bool)}
        condition = {name: jnp.concatenate([value, empty[name]]) for name, value in condition.items()}

    def advance(codes: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return module.apply({"params": params}, codes, cache, method="advance")

    start = module.apply({"params": params}, **condition, method="start")
    first = rows * grid
    codes = sample_sequence(keys, start, advance, sampling, grid**2 - first, first)
    if given is not None:
        codes = jnp.concatenate([given.reshape(count, -1).astype(codes.dtype), codes], axis=1)
    return codes.reshape(count, grid, grid)
