"""Drawing an image embedding from the diffusion prior: guidance, and the best of several draws (Sec. 2.2)."""

from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion.guidance import classifier_free_guidance
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sampler import normal
from dalle2_jax.diffusion.sampling import Sampling, sample
from dalle2_jax.prior.diffusion_prior import DiffusionPrior
from dalle2_jax.prior.selection import best_of


def sample_prior(
    keys: jax.Array,
    prior: DiffusionPrior,
    params: Any,
    process: Process,
    sampling: Sampling,
    text_embedding: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
) -> jax.Array:
    """Draws `sampling.candidates` image embeddings a caption and keeps the one nearest to the caption's embedding.

    keys: one a caption `[b]`. text_embedding: unit norm `[b, z]`. text: tokens `[b, n]` or CLIP's text states
    `[b, n, d]`, as the prior was built for. Returns unit norm `[b, z]`.
    """
    batch, count = text_embedding.shape[0], sampling.candidates

    def repeat(value: jax.Array) -> jax.Array:
        return jnp.repeat(value, count, axis=0)

    keys = jax.vmap(lambda key: jax.random.split(key, count))(keys).reshape(-1)
    noise_keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    condition = {"text_embedding": repeat(text_embedding), "text": repeat(text), "text_mask": repeat(text_mask)}
    kept = jnp.ones(batch * count, bool)

    def denoiser(x_t: jax.Array, timesteps: jax.Array, condition: dict[str, jax.Array]) -> jax.Array:
        return prior.apply({"params": params}, x_t, timesteps, **condition)

    guided = classifier_free_guidance(
        denoiser,
        {**condition, "keep_text": kept},
        {**condition, "keep_text": ~kept},
        sampling.guidance_scale,
        interval=sampling.interval(process),
    )
    x_T = normal(noise_keys, (batch * count, prior.embedding_size))
    candidates = prior.unscale_embedding(sample(step_keys, guided, x_T, process, sampling))
    return best_of(candidates.reshape(batch, count, -1), text_embedding)
