"""Sampling image embeddings from the diffusion prior: guidance, and the best of several candidates (Sec. 2.2)."""

from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.diffusion.guidance import classifier_free_guidance
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sampler import keys_for, normal, split_each
from dalle2_jax.diffusion.sampling import Sampling, sample
from dalle2_jax.prior.diffusion_prior import DiffusionPrior
from dalle2_jax.prior.selection import best_of


def caption_condition(prior: DiffusionPrior, captions: EncodedCaptions) -> dict[str, jax.Array | None]:
    """What `prior` reads of captions, as its arguments: tokens for an embedding of its own, or CLIP's states."""
    text = captions.states if prior.vocabulary_size is None else captions.tokens
    return {"text_embedding": captions.embedding, "text": text, "text_mask": captions.mask}


def sample_prior(
    keys: jax.Array,
    prior: DiffusionPrior,
    params: Any,
    process: Process,
    sampling: Sampling,
    captions: EncodedCaptions,
    empty: EncodedCaptions | None = None,
) -> jax.Array:
    """Samples `sampling.candidates` image embeddings a caption and keeps the one nearest to the caption's embedding.

    keys: one a caption `[b]`, or one for all. captions: with CLIP's embeddings, and its states for a prior without
    tokens of its own. empty: the empty caption, against which a prior guides that has learned no null caption. Returns
    CLIP's image embeddings `[b, z]`.
    """
    batch, count = len(captions), sampling.candidates
    condition = jax.tree.map(lambda value: jnp.repeat(value, count, axis=0), caption_condition(prior, captions))
    keys = jax.vmap(lambda key: jax.random.split(key, count))(keys_for(keys, batch)).reshape(-1)
    noise_keys, step_keys = split_each(keys)
    if empty is None:
        kept = jnp.ones(batch * count, bool)
        null_condition = {**condition, "keep_text": ~kept}
        condition["keep_text"] = kept
    else:
        null_condition = jax.tree.map(
            lambda one, all: jnp.broadcast_to(one, all.shape), caption_condition(prior, empty), condition
        )

    def denoiser(x_t: jax.Array, timesteps: jax.Array, condition: dict[str, jax.Array]) -> jax.Array:
        return prior.apply({"params": params}, x_t, timesteps, **condition)

    guided = classifier_free_guidance(
        denoiser,
        condition,
        null_condition,
        sampling.guidance_scale,
        interval=sampling.interval(process),
    )
    x_T = normal(noise_keys, (batch * count, prior.embedding_size))
    candidates = prior.unscale_embedding(sample(step_keys, guided, x_T, process, sampling))
    return best_of(candidates.reshape(batch, count, -1), captions.embedding)
