"""Each stage's sampling, from (loaded stage, encoded captions, keys, settings).

Every function here gives a `Call`: a jitted function with its arguments. Called, it computes; traced, it says what it
would compute, for which shapes do in place of arrays (`memory`). Numbers that people turn (guidance scale and interval,
eta) are traced: another value compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.clip import encode_captions as encode_captions_by
from dalle2_jax.decoder import Known, caption_for, invert_decoder, sample_decoder, sample_upsampler
from dalle2_jax.diffusion import REPAINT, REPLACEMENT, Resampling
from dalle2_jax.errors import InputError
from dalle2_jax.layers.pixels import resize, to_float
from dalle2_jax.prior import sample_prior
from dalle2_jax.unclip.settings import check_tile, process_of, sampling_of

Result = TypeVar("Result")


@dataclass(frozen=True)
class Call(Generic[Result]):
    """A jitted function with its arguments."""

    function: Callable[..., Result]
    arguments: tuple[Any, ...]
    static: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Result:
        return self.function(*self.arguments, **self.static)

    def trace(self) -> jax.stages.Traced:
        """The function, traced; arguments may be shapes."""
        return self.function.trace(*self.arguments, **self.static)


@partial(jax.jit, static_argnames="module")
def _encode_captions(params, tokens, mask, *, module):
    return encode_captions_by(module, params, tokens, mask)


@partial(jax.jit, static_argnames="module")
def _encode_images(params, images, *, module):
    images = resize(to_float(images), module.vision.image_size)
    return module.apply({"params": params}, images, method="encode_image")


@partial(jax.jit, static_argnames=("module", "process"))
def _sample_prior(keys, params, captions, empty, sampling, *, module, process):
    return sample_prior(keys, module, params, process, sampling, captions, empty)


@partial(jax.jit, static_argnames=("module", "process", "resampling"))
def _decode(keys, params, embedding, caption, x_T, known, sampling, *, module, process, resampling):
    return sample_decoder(keys, module, params, process, sampling, embedding, caption, x_T, known, resampling)


@partial(jax.jit, static_argnames=("module", "process", "refinements"))
def _invert(params, images, embedding, caption, sampling, *, module, process, refinements):
    images = resize(to_float(images), module.unet.image_size)
    return invert_decoder(module, params, process, sampling, images, embedding, caption, refinements)


@partial(jax.jit, static_argnames=("module", "process", "size", "tile", "resampling"))
def _upsample(keys, params, low_resolution, caption, known, sampling, *, module, process, size, tile, resampling):
    settings = process, sampling, low_resolution, size, tile, caption, known, resampling
    return sample_upsampler(keys, module, params, *settings)


def _static(stage: LoadedStage) -> dict[str, Any]:
    return {"module": stage.module, "process": process_of(stage)}


def encode_captions(clip: LoadedStage, tokens: jax.Array, mask: jax.Array) -> Call[EncodedCaptions]:
    """CLIP's text embeddings and states of tokens int32 `[b, n]` with their mask."""
    return Call(_encode_captions, (clip.params, tokens, mask), {"module": clip.module})


def encode_images(clip: LoadedStage, images: jax.Array) -> Call[jax.Array]:
    """CLIP's embeddings `[b, z]` of uint8 images `[b, h, h, 3]`."""
    return Call(_encode_images, (clip.params, images), {"module": clip.module})


def sample_image_embeddings(
    prior: LoadedStage,
    captions: EncodedCaptions,
    keys: jax.Array,
    empty: EncodedCaptions | None = None,
    **changes: Any,
) -> Call[jax.Array]:
    """Image embeddings `[b, z]` of captions.

    Args:
        keys: one a caption `[b]`.
        empty: the empty caption, for a prior that has learned no null caption (`needs_empty_caption`).
        changes: fields of the stage's Sampling.
    """
    sampling = sampling_of(prior, changes).turned()
    return Call(_sample_prior, (keys, prior.params, captions, empty, sampling), _static(prior))


def decode(
    decoder: LoadedStage,
    captions: EncodedCaptions,
    keys: jax.Array,
    image_embeddings: jax.Array | None,
    *,
    keep_caption: bool = True,
    empty: EncodedCaptions | None = None,
    x_T: jax.Array | None = None,
    known: Known | None = None,
    resampling: Resampling = REPAINT,
    **changes: Any,
) -> Call[jax.Array]:
    """The decoder's images, float32 `[b, h, w, 3]` in [-1, 1].

    Args:
        keys: one a caption `[b]`.
        image_embeddings: `[b, z]`; None withholds them, or is for a decoder that reads captions alone.
        keep_caption: False lets only the embedding speak.
        empty: as in `sample_image_embeddings`.
        x_T: the noise to start from, such as `invert`'s; None: from the keys.
        known: images at the decoder's size that are kept where they are known, while the rest is painted.
        resampling: how, by a decoder that does not see what is known.
        changes: fields of the stage's Sampling.
    """
    sampling = sampling_of(decoder, changes).turned()
    caption = caption_for(decoder.module, captions, jnp.full(len(captions), keep_caption), empty)
    arguments = (keys, decoder.params, image_embeddings, caption, x_T, known, sampling)
    return Call(_decode, arguments, {**_static(decoder), "resampling": resampling})


def invert(
    decoder: LoadedStage,
    captions: EncodedCaptions,
    images: jax.Array,
    image_embeddings: jax.Array,
    *,
    keep_caption: bool = True,
    empty: EncodedCaptions | None = None,
    refinements: int = 0,
    **changes: Any,
) -> Call[jax.Array]:
    """The noise x_T `[b, h, w, 3]` from which the decoder's DDIM samples uint8 images `[b, h, h, 3]` again."""
    sampling = sampling_of(decoder, {**changes, "sampler": "ddim"}).turned()
    caption = caption_for(decoder.module, captions, jnp.full(len(captions), keep_caption), empty)
    arguments = (decoder.params, images, image_embeddings, caption, sampling)
    return Call(_invert, arguments, {**_static(decoder), "refinements": refinements})


def upsample(
    upsampler: LoadedStage,
    keys: jax.Array,
    images: jax.Array,
    *,
    captions: EncodedCaptions | None = None,
    tile: int | None = None,
    known: Known | None = None,
    resampling: Resampling = REPLACEMENT,
    **changes: Any,
) -> Call[jax.Array]:
    """Images `[b, h, w, 3]` in [-1, 1] at the upsampler's own size, in the same range.

    Args:
        keys: one an image `[b]`.
        captions: for an upsampler that reads them (GLIDE's); others leave them aside.
        tile: the side of the tiles it is done in, to save memory; None: whole.
        known, resampling: as in `decode`, at the upsampler's size.
        changes: fields of the stage's Sampling.

    Raises:
        InputError: for changes and tiles that the stage cannot have, or if a caption is missing.
    """
    check_tile(upsampler, tile)
    caption = None
    if upsampler.module.text is not None:
        if captions is None:
            raise InputError(f"the upsampler {upsampler.name} reads captions; give one for each image")
        if tile is not None:
            raise InputError(
                f"the upsampler {upsampler.name} reads captions and does not work in tiles; leave tile out"
            )
        caption = captions.tokens, captions.mask
    sampling = sampling_of(upsampler, changes).turned()
    static = {**_static(upsampler), "size": upsampler.record.image_size, "tile": tile, "resampling": resampling}
    return Call(_upsample, (keys, upsampler.params, images, caption, known, sampling), static)
