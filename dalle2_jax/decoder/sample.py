"""Drawing pictures: the decoder from an image embedding and a caption, an upsampler from a smaller picture."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Caption:
    """What a decoder reads of captions; a pytree, None where it reads nothing.

    text: tokens `[b, n]` or CLIP's text states `[b, n, d]`; mask: bool `[b, n]`; embedding: CLIP's text embedding
    `[b, z]` for a decoder that pools it. keep: bool `[b]`, False withholds the caption. null: the same three of the
    empty caption `[1, ...]`, for a decoder that has learned no null caption.
    """

    text: jax.Array | None
    mask: jax.Array | None
    keep: jax.Array
    embedding: jax.Array | None = None
    null: tuple[jax.Array, jax.Array, jax.Array] | None = None

    def condition(self, keep: jax.Array) -> dict[str, jax.Array | None]:
        """The network's arguments, with the caption where `keep` bool `[b]` is True."""
        read = {"text": self.text, "text_mask": self.mask}
        if self.embedding is not None:
            read["text_embedding"] = self.embedding
        if self.null is None:
            return {**read, "keep_text": keep}

        def choose(one: jax.Array, empty: jax.Array) -> jax.Array:
            return jnp.where(keep.reshape(-1, *(1,) * (one.ndim - 1)), one, empty)

        return {name: choose(one, self.null[place]) for place, (name, one) in enumerate(read.items())}


jax.tree_util.register_dataclass(Caption, ["text", "mask", "keep", "embedding", "null"], [])


def caption_for(
    decoder: Decoder,
    encoded: tuple[jax.Array | None, jax.Array | None, jax.Array, jax.Array],
    keep: jax.Array,
    empty: Callable[[], tuple[jax.Array, jax.Array, jax.Array]],
) -> Caption:
    """What `decoder` reads of captions: tokens for an encoder of its own, CLIP's states for `text_width`, or nothing.

    encoded: CLIP's text embedding `[b, z]` and states `[b, n, d]` (both None where the decoder reads no states), the
    tokens and their mask `[b, n]`. keep: bool `[b]`. empty: gives embedding, states and mask `[1, ...]` of the empty
    caption; asked only for a decoder that has learned no null caption. Shapes do in place of arrays.
    """
    embedding, states, tokens, mask = encoded
    if decoder.text is not None:
        return Caption(tokens, mask, keep)
    if decoder.text_width is None:
        return Caption(None, None, keep)
    null = None
    if not decoder.learned_null_text:
        empty_embedding, empty_states, empty_mask = empty()
        null = (empty_states, empty_mask, empty_embedding)
    return Caption(states, mask, keep, embedding if decoder.pools_embedding else None, null)


def sample_decoder(
    keys: jax.Array,
    decoder: Decoder,
    params: Any,
    process: Process,
    sampling: Sampling,
    image_embedding: jax.Array | None,
    caption: Caption,
    x_T: jax.Array | None = None,
) -> jax.Array:
    """Pictures `[b, h, w, 3]` in [-1, 1] at the decoder's own size.

    keys: one a picture `[b]`. image_embedding: CLIP's `[b, z]`; None for a decoder that does not read it. Guidance
    drops both conditions in its other half. x_T: the noise to start from (`invert_decoder`'s, say); None: drawn by the
    keys. A decoder that paints in what is not known is told that nothing is.
    """
    batch, size = keys.shape[0], decoder.unet.image_size
    noise_keys, step_keys = _split(keys)
    kept = jnp.ones(batch, bool)

    def denoiser(x_t: jax.Array, timesteps: jax.Array, condition: dict[str, jax.Array]) -> jax.Array:
        return decoder.apply({"params": params}, x_t, timesteps, **condition)

    def condition(keep_image: jax.Array, keep_text: jax.Array) -> dict[str, jax.Array]:
        told = caption.condition(keep_text)
        if decoder.reads_image:
            told |= {"image_embedding": image_embedding, "keep_image": keep_image}
        if decoder.inpainting:
            told["known"] = jnp.zeros((batch, size, size, 4))
        return told

    guided = classifier_free_guidance(
        denoiser,
        condition(kept, caption.keep),
        condition(~kept, ~kept),
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
    caption: Caption,
    refinements: int = 0,
) -> jax.Array:
    """The noise x_T `[b, h, w, 3]` from which DDIM at eta 0, without guidance, draws `pictures` again (Sec. 3).

    pictures: `[b, h, w, 3]` in [-1, 1] at the decoder's own size. The conditions are those of `sample_decoder`;
    `sampling` says over which timesteps, and refinements how exactly (`dalle2_jax.diffusion.ddim_invert`).
    """
    condition = {"keep_image": jnp.ones(pictures.shape[0], bool), **caption.condition(caption.keep)}

    def denoiser(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
        return decoder.apply({"params": params}, x_t, timesteps, image_embedding, **condition)

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
    caption: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Pictures `[b, size, size, 3]` from `low_resolution` `[b, h, w, 3]`, both in [-1, 1]; no guidance (Sec. 2.1).

    caption: tokens and mask `[b, n]` for an upsampler that reads them, which does not work in tiles.
    tile: denoise in tiles of that many pixels, a quarter of which they share, so that memory follows the tile and not
    the picture (`dalle2_jax.diffusion.tiled`); None: whole.
    """
    noise_keys, step_keys = _split(keys)

    told = {} if caption is None else {"text": caption[0], "text_mask": caption[1]}
    if upsampler.inpainting:
        told["known"] = jnp.zeros((low_resolution.shape[0], size, size, 4))

    def denoiser(x_t: jax.Array, timesteps: jax.Array, low_resolution: jax.Array) -> jax.Array:
        return upsampler.apply({"params": params}, x_t, timesteps, low_resolution, **told)

    if tile is None:
        conditioned = functools.partial(denoiser, low_resolution=low_resolution)
    else:
        conditioned = tiled(denoiser, upsampler.enlarge(low_resolution, (size, size)), tile, tile // 4)
    x_T = normal(noise_keys, (low_resolution.shape[0], size, size, 3))
    return jnp.clip(sample(step_keys, conditioned, x_T, process, sampling), -1.0, 1.0)
