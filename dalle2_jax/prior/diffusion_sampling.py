"""Sampling the diffusion prior: guidance over its null caption, and the chain of its process (Sec. 2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.diffusion.guidance import classifier_free_guidance
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sampler import normal, split_each
from dalle2_jax.diffusion.sampling import Sampling, sample
from dalle2_jax.prior.condition import caption_condition

if TYPE_CHECKING:
    from dalle2_jax.prior.diffusion_prior import DiffusionPrior


def denoise_embeddings(
    prior: DiffusionPrior,
    params: Any,
    keys: jax.Array,
    captions: EncodedCaptions,
    sampling: Sampling,
    process: Process,
    empty: EncodedCaptions | None,
) -> jax.Array:
    """Image embeddings `[b, z]` from noise; arguments as those of `Prior.sample_embeddings`."""
    batch, condition = len(captions), caption_condition(prior, captions)
    noise_keys, step_keys = split_each(keys)
    if empty is None:
        kept = jnp.ones(batch, bool)
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
    x_T = normal(noise_keys, (batch, prior.embedding_size))
    return prior.unscale_embedding(sample(step_keys, guided, x_T, process, sampling))
