"""Sampling image embeddings from any prior, and the best of several candidates (Sec. 2.2)."""

from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sampler import keys_for
from dalle2_jax.prior.condition import Prior
from dalle2_jax.prior.selection import best_of


def sample_prior(
    keys: jax.Array,
    prior: Prior,
    params: Any,
    process: Process | None,
    sampling: Any,
    captions: EncodedCaptions,
    empty: EncodedCaptions | None = None,
) -> jax.Array:
    """Samples `sampling.candidates` image embeddings a caption and keeps the one nearest to the caption's embedding.

    keys: one a caption `[b]`, or one for all. process: None for a prior that is no diffusion model. captions: with
    CLIP's embeddings, and its states for a prior without tokens of its own. empty: the empty caption, against which a
    prior guides that has learned no null caption. Returns CLIP's image embeddings `[b, z]`.
    """
    batch, count = len(captions), sampling.candidates
    repeated = jax.tree.map(lambda value: jnp.repeat(value, count, axis=0), captions)
    keys = jax.vmap(lambda key: jax.random.split(key, count))(keys_for(keys, batch)).reshape(-1)
    candidates = prior.sample_embeddings(params, keys, repeated, sampling, process, empty)
    return best_of(candidates.reshape(batch, count, -1), captions.embedding)
