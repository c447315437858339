"""Sampling the autoregressive prior: code after code from a key-value cache, by one `lax.scan` (Sec. 2.2)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.diffusion.sampler import split_each
from dalle2_jax.diffusion.sampling import MOST_CANDIDATES
from dalle2_jax.diffusion.token_sampling import TokenSampling, check_fraction, sample_sequence
from dalle2_jax.errors import check_number
from dalle2_jax.prior.condition import caption_condition

if TYPE_CHECKING:
    from dalle2_jax.prior.autoregressive import AutoregressivePrior


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("temperature", "top_k", "top_p", "guidance_scale", "top_similarity"),
    meta_fields=("candidates",),
)
@dataclass(frozen=True, kw_only=True)
class AutoregressiveSampling(TokenSampling):
    """An autoregressive prior's sampling settings; a trained stage records them as its defaults.

    It is a pytree whose leaves are the numbers that people turn, as those of `Sampling`; `turned` prepares it to be an
    argument of a jitted function, which compiles once for all their values.

    Fields, beside those of `TokenSampling`:
      top_similarity: the token of z_i . z_t is drawn from this share of its buckets, the upper ones (0.5 in the paper).
      candidates: how many are sampled to keep the best of.
    """

    top_similarity: float = 0.5
    candidates: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("top_similarity", self.top_similarity)
        check_number("candidates", self.candidates, at_least=1, at_most=MOST_CANDIDATES, whole=True)


def draw_similarity(keys: jax.Array, buckets: int, share: jax.Array | float) -> jax.Array:
    """Buckets of z_i . z_t int32 `[b]`, drawn evenly from the upper `share` of them: all have as many examples."""
    drawn = 1.0 - share * jax.vmap(jax.random.uniform)(keys)
    return jnp.minimum((drawn * buckets).astype(jnp.int32), buckets - 1)


def sample_codes(
    prior: AutoregressivePrior,
    params: Any,
    keys: jax.Array,
    captions: EncodedCaptions,
    sampling: AutoregressiveSampling,
) -> jax.Array:
    """The codes int32 `[b, k]` of one image embedding a caption.

    Each key alone decides its sample. Guidance runs the null caption in a second half of the batch, with a cache of its
    own and the codes that were sampled.
    """
    batch, guided = len(captions), sampling.is_guided
    similarity_keys, code_keys = split_each(keys)
    similarity = draw_similarity(similarity_keys, prior.similarity_buckets, sampling.top_similarity)
    condition = {**caption_condition(prior, captions), "similarity": similarity, "keep_text": jnp.ones(batch, bool)}
    if guided:
        null = {**condition, "keep_text": jnp.zeros(batch, bool)}
        condition = jax.tree.map(lambda *halves: jnp.concatenate(halves), condition, null)

    def advance(codes: jax.Array, progress: Any) -> tuple[jax.Array, Any]:
        return prior.apply({"params": params}, codes, progress, method="advance")

    start = prior.apply({"params": params}, **condition, method="start")
    return sample_sequence(code_keys, start, advance, sampling, prior.components)
