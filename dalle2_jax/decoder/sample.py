"""Drawing pictures: the decoder from an image embedding and a caption, an upsampler from a smaller picture."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.decoder.decoder import Decoder
from dalle2_jax.decoder.upsampler import Upsampler
from dalle2_jax.diffusion.guidance import classifier_free_guidance
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sampler import ddim_invert, normal
from dalle2_jax.diffusion.sampling import Sampling, sample
from dalle2_jax.diffusion.tiling import tiled


def _split(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def sample_decoder(
    keys: jax.Array,
    decoder: Decoder,
    params: Any,
    process: Process,
    sampling: Sampling,
    image_embedding: jax.Array,
    text: jax.Array | None,
    text_mask: jax.Array | None,
    keep_text: jax.Array,
    x_T: jax.Array | None = None,
) -> jax.Array:
    """Pictures `[b, h, w, 3]` in [-1, 1] at the decoder's own size.

    keys: one a picture `[b]`. image_embedding: unit norm `[b, z]`. text: tokens `[b, n]` or CLIP's text states
    `[b, n, d]`. keep_text: bool `[b]`, False withholds the caption. Guidance drops both conditions in its other half.
    x_T: the noise to start from (`invert_decoder`'s, say); None: drawn by the keys.
    """
    batch, size = image_embedding.shape[0], decoder.unet.image_size
    noise_keys, step_keys = _split(keys)
    condition = {"image_embedding": image_embedding, "text": text, "text_mask": text_mask}
    kept = jnp.ones(batch, bool)

    def denoiser(x_t: jax.Array, timesteps: jax.Array, condition: dict[str, jax.Array]) -> jax.Array:
        return decoder.apply({"params": params}, x_t, timesteps, **condition)

    guided = classifier_free_guidance(
        denoiser,
        {**condition, "keep_image": kept, "keep_text": keep_text},
        {**condition, "keep_image": ~kept, "keep_text": ~kept},
        sampling.guidance_scale,
        interval=sampling.interval(process),
    )
    x_T = normal(noise_keys, (batch, size, size, 3)) if x_T is None else x_T
    return jnp.clip(sample(step_keys, guided, x_T, process, sampling), -1.0, 1.0)


def invert_decoder(
    decoder: Decoder,
    params: Any,
    process: Process,
    sampling: Sampling,
    pictures: jax.Array,
    image_embedding: jax.Array,
    text: jax.Array | None,
    text_mask: jax.Array | None,
    keep_text: jax.Array,
    refinements: int = 0,
) -> jax.Array:
    """The noise x_T `[b, h, w, 3]` from which DDIM at eta 0, without guidance, draws `pictures` again (Sec. 3).

    pictures: `[b, h, w, 3]` in [-1, 1] at the decoder's own size. The conditions are those of `sample_decoder`;
    `sampling` says over which timesteps, and refinements how exactly (`dalle2_jax.diffusion.ddim_invert`).
    """
    condition = {"image_embedding": image_embedding, "text": text, "text_mask": text_mask}
    kept = {"keep_image": jnp.ones(pictures.shape[0], bool), "keep_text": keep_text}

    def denoiser(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
        return decoder.apply({"params": params}, x_t, timesteps, **condition, **kept)

    return ddim_invert(denoiser, pictures, sampling.process(process), refinements)


def sample_upsampler(
    keys: jax.Array,
    upsampler: Upsampler,
    params: Any,
    process: Process,
    sampling: Sampling,
    low_resolution: jax.Array,
    size: int,
    tile: int | None = None,
) -> jax.Array:
    """Pictures `[b, size, size, 3]` from `low_resolution` `[b, h, w, 3]`, both in [-1, 1]; no guidance (Sec. 2.1).

    tile: denoise in tiles of that many pixels, a quarter of which they share, so that memory follows the tile and not
    the picture (`dalle2_jax.diffusion.tiled`); None: whole.
    """
    noise_keys, step_keys = _split(keys)

    def denoiser(x_t: jax.Array, timesteps: jax.Array, low_resolution: jax.Array) -> jax.Array:
        return upsampler.apply({"params": params}, x_t, timesteps, low_resolution)

    if tile is None:
        conditioned = functools.partial(denoiser, low_resolution=low_resolution)
    else:
        conditioned = tiled(denoiser, upsampler.enlarge(low_resolution, (size, size)), tile, tile // 4)
    x_T = normal(noise_keys, (low_resolution.shape[0], size, size, 3))
    return jnp.clip(sample(step_keys, conditioned, x_T, process, sampling), -1.0, 1.0)
