"""Sampling images: the decoder from an image embedding and a caption, an upsampler from a smaller one."""

from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.decoder.condition import Caption
from dalle2_jax.decoder.decoder import Decoder
from dalle2_jax.decoder.known import Known
from dalle2_jax.decoder.upsampler import Upsampler
from dalle2_jax.diffusion.guidance import classifier_free_guidance
from dalle2_jax.diffusion.inpainting import REPAINT, REPLACEMENT, Resampling, sample_repaint, with_known_x_0
from dalle2_jax.diffusion.inversion import ddim_invert
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sampler import Denoiser, keys_for, normal, split_each
from dalle2_jax.diffusion.sampling import Sampling, sample
from dalle2_jax.diffusion.tiling import tiled


def sample_decoder(
    keys: jax.Array,
    decoder: Decoder,
    params: Any,
    process: Process,
    sampling: Sampling,
    image_embedding: jax.Array | None,
    caption: Caption,
    x_T: jax.Array | None = None,
    known: Known | None = None,
    resampling: Resampling = REPAINT,
) -> jax.Array:
    """Images `[b, h, w, 3]` in [-1, 1] at the decoder's own size.

    keys: one an image `[b]`, or one for all. image_embedding: CLIP's `[b, z]`; None withholds it, or is for a decoder
    that does not read it. Guidance drops both conditions in its other half. x_T: the noise to start from
    (`invert_decoder`'s, say); None: from the keys.
    known: what comes out as it is, at the decoder's size, while the rest is painted: by what an inpainting decoder sees
    of it, or with any other one by RePaint, as `resampling` says; None: nothing is known.
    """
    batch, size = caption.keep.shape[0], decoder.unet.image_size
    noise_keys, step_keys = split_each(keys_for(keys, batch))
    kept = jnp.full(batch, image_embedding is not None)
    if decoder.reads_image and image_embedding is None:
        image_embedding = jnp.zeros((batch, *params["null_image"].shape))

    def denoiser(x_t: jax.Array, timesteps: jax.Array, condition: dict[str, jax.Array]) -> jax.Array:
        return decoder.apply({"params": params}, x_t, timesteps, **condition)

    def condition(keep_image: jax.Array, keep_text: jax.Array) -> dict[str, jax.Array]:
        conditioning = caption.condition(keep_text)
        if decoder.reads_image:
            conditioning |= {"image_embedding": image_embedding, "keep_image": keep_image}
        if decoder.inpainting:
            conditioning["known"] = _channels(known, (batch, size, size, 4))
        return conditioning

    guided = classifier_free_guidance(
        denoiser,
        condition(kept, caption.keep),
        condition(jnp.zeros(batch, bool), jnp.zeros(batch, bool)),
        sampling.guidance_scale,
        interval=sampling.interval(process),
    )
    x_T = normal(noise_keys, (batch, size, size, 3)) if x_T is None else x_T
    return _sample(step_keys, guided, x_T, process, sampling, known, decoder.inpainting, resampling)


def _channels(known: Known | None, shape: tuple[int, ...]) -> jax.Array:
    """What an inpainting network reads of it: zeros where nothing is known."""
    return jnp.zeros(shape) if known is None else known.channels()


def _sample(
    keys: jax.Array,
    denoiser: Denoiser,
    x_T: jax.Array,
    process: Process,
    sampling: Sampling,
    known: Known | None,
    inpainting: bool,
    resampling: Resampling,
) -> jax.Array:
    """Images in [-1, 1] that are `known` where it is; inpainting: whether the denoiser sees it."""
    if known is None:
        return jnp.clip(sample(keys, denoiser, x_T, process, sampling), -1.0, 1.0)
    if inpainting:
        x_0 = sample(keys, with_known_x_0(denoiser, known.image, known.mask, process), x_T, process, sampling)
    else:
        x_0 = sample_repaint(keys, denoiser, x_T, process, sampling, known.image, known.mask, resampling)
    return jnp.where(known.mask, known.image, jnp.clip(x_0, -1.0, 1.0))


def invert_decoder(
    decoder: Decoder,
    params: Any,
    process: Process,
    sampling: Sampling,
    images: jax.Array,
    image_embedding: jax.Array,
    caption: Caption,
    refinements: int = 0,
) -> jax.Array:
    """The noise x_T `[b, h, w, 3]` from which DDIM at eta 0, without guidance, samples `images` again (Sec. 3).

    images: `[b, h, w, 3]` in [-1, 1] at the decoder's own size. The conditions are those of `sample_decoder`;
    `sampling` says over which timesteps, and refinements how exactly (`dalle2_jax.diffusion.ddim_invert`). To a decoder
    that paints, nothing is known.
    """
    condition = {"keep_image": jnp.ones(images.shape[0], bool), **caption.condition(caption.keep)}
    if decoder.inpainting:
        condition["known"] = _channels(None, (*images.shape[:3], 4))

    def denoiser(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
        return decoder.apply({"params": params}, x_t, timesteps, image_embedding=image_embedding, **condition)

    return ddim_invert(denoiser, images, sampling.process(process), refinements)


def sample_upsampler(
    keys: jax.Array,
    upsampler: Upsampler,
    params: Any,
    process: Process,
    sampling: Sampling,
    low_resolution: jax.Array,
    size: int,
    tile: int | None = None,
    caption: tuple[jax.Array, jax.Array] | None = None,
    known: Known | None = None,
    resampling: Resampling = REPLACEMENT,
) -> jax.Array:
    """Images `[b, size, size, 3]` from `low_resolution` `[b, h, w, 3]`, both in [-1, 1]; no guidance (Sec. 2.1).

    caption: tokens and mask `[b, n]` for an upsampler that reads them, which does not work in tiles.
    tile: denoise in tiles of that many pixels, a quarter of which they share, so that memory follows the tile and not
    the image (`dalle2_jax.diffusion.tiled`); None: whole.
    known, resampling: as in `sample_decoder`, at `size`; since the small image says most, what is known is only
    replaced at every step, if nothing else is said.
    """
    noise_keys, step_keys = split_each(keys_for(keys, low_resolution.shape[0]))

    caption = {} if caption is None else {"text": caption[0], "text_mask": caption[1]}
    condition = {"low_resolution": low_resolution}
    if upsampler.inpainting:
        condition["known"] = _channels(known, (low_resolution.shape[0], size, size, 4))

    def denoiser(x_t: jax.Array, timesteps: jax.Array, condition: dict[str, jax.Array]) -> jax.Array:
        return upsampler.apply({"params": params}, x_t, timesteps, **condition, **caption)

    if tile is None:

        def conditioned(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
            return denoiser(x_t, timesteps, condition)

    else:
        condition["low_resolution"] = upsampler.resize_input(low_resolution, (size, size))
        conditioned = tiled(denoiser, condition, tile, tile // 4)
    x_T = normal(noise_keys, (low_resolution.shape[0], size, size, 3))
    return _sample(step_keys, conditioned, x_T, process, sampling, known, upsampler.inpainting, resampling)
