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
    null: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Draws `sampling.candidates` image embeddings a caption and keeps the one nearest to the caption's embedding.

    keys: one a caption `[b]`. text_embedding: CLIP's `[b, z]`. text: tokens `[b, n]` or CLIP's text states `[b, n, d]`,
    as the prior was built for. null: text_embedding, text and text_mask `[1, ...]` of the empty caption, which guidance
    sets captions against; None: the prior's learned nulls. Returns CLIP's image embeddings `[b, z]`.
    """
    batch, count = text_embedding.shape[0], sampling.candidates

    def repeat(value: jax.Array) -> jax.Array:
        return jnp.repeat(value, count, axis=0)

    keys = jax.vmap(lambda key: jax.random.split(key, count))(keys).reshape(-1)
    noise_keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    condition = {"text_embedding": repeat(text_embedding), "text": repeat(text), "text_mask": repeat(text_mask)}
    if null is None:
        kept = jnp.ones(batch * count, bool)
        null_condition = {**condition, "keep_text": ~kept}
        condition["keep_text"] = kept
    else:
        empty = dict(zip(condition, null, strict=True))
        null_condition = jax.tree.map(lambda one, all: jnp.broadcast_to(one, all.shape), empty, condition)

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
    return best_of(candidates.reshape(batch, count, -1), text_embedding)
