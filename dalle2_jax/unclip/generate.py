"""The stages one after the other, in batches: from captions to images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.diffusion.sampler import keys_for
from dalle2_jax.errors import InputError
from dalle2_jax.layers.pixels import to_uint8
from dalle2_jax.unclip.embed import encode_tokens
from dalle2_jax.unclip.placement import device_batches, shard_batch
from dalle2_jax.unclip.sample import decode, sample_image_embeddings, upsample
from dalle2_jax.unclip.settings import check_tile

if TYPE_CHECKING:
    from dalle2_jax.unclip.system import DALLE2


@dataclass(frozen=True)
class Generated:
    """What each stage contributed to a batch of images.

    text_embeddings: CLIP's `[b, z]`. image_embeddings: `[b, z]`, from the prior. (None where there is no such stage.)
    decoded: uint8 `[b, h, w, 3]`, from the decoder. upsampled: a tuple of uint8 images, one an upsampler. images: the
    last of these. captions: () where there were none.
    """

    captions: tuple[str, ...]
    text_embeddings: np.ndarray | None
    image_embeddings: np.ndarray | None
    decoded: np.ndarray
    upsampled: tuple[np.ndarray, ...]

    @property
    def images(self) -> np.ndarray:
        return self.upsampled[-1] if self.upsampled else self.decoded

    def rows(self, rows: Sequence[int] | np.ndarray) -> Generated:
        """Some of the images, in that order."""
        rows = np.asarray(rows)
        parts = (self.text_embeddings, self.image_embeddings, self.decoded, self.upsampled)
        captions = tuple(self.captions[row] for row in rows) if self.captions else ()
        return Generated(captions, *jax.tree.map(lambda value: value[rows], parts))


class Options(TypedDict, total=False):
    """What `generate` takes beside the key and the captions.

    guidance_scale: the decoder's. prior, decoder, upsampler: fields of a stage's Sampling to change, such as
    `{"steps": 25}`. tile: upsample in tiles of that side, to save memory. caption_to_decoder: False lets only the image
    embedding speak. embedding_to_decoder: False lets only the caption speak. image_embeddings: `[b, z]`, instead of
    the prior's. x_T: `[b, h, w, 3]`, the noise that the decoder starts from, instead of the keys'. batch_size: images
    at once. strict: a caption that is too long is an error rather than a warning (without `warn`, not even that).
    """

    guidance_scale: float | None
    prior: dict[str, Any] | None
    decoder: dict[str, Any] | None
    upsampler: dict[str, Any] | None
    tile: int | None
    caption_to_decoder: bool
    embedding_to_decoder: bool
    image_embeddings: jax.Array | None
    x_T: jax.Array | None
    batch_size: int
    strict: bool
    warn: bool


def generate(
    model: DALLE2,
    key: jax.Array,
    captions: Sequence[str] | str | None,
    *,
    guidance_scale: float | None = None,
    prior: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
    upsampler: dict[str, Any] | None = None,
    tile: int | None = None,
    caption_to_decoder: bool = True,
    embedding_to_decoder: bool = True,
    image_embeddings: jax.Array | None = None,
    x_T: jax.Array | None = None,
    batch_size: int = 64,
    strict: bool = False,
    warn: bool = True,
) -> Generated:
    """Images of captions; see `DALLE2.generate` and `Options`. captions: None: of the image embeddings alone."""
    captions = [captions] if isinstance(captions, str) else captions
    _check(model, captions, image_embeddings, batch_size, embedding_to_decoder)
    if captions is None:
        tokens, mask = (np.repeat(row, len(image_embeddings), axis=0) for row in model.tokenizer.empty())
    else:
        tokens, mask = model.tokenizer.encode(list(captions), strict=strict, warn=warn)
    keys = keys_for(key, len(tokens))
    if image_embeddings is not None and len(image_embeddings) != len(tokens):
        raise InputError(
            f"{len(image_embeddings)} image embeddings were given for {len(tokens)} captions; give one a caption"
        )
    _check_noise(model, x_T, len(tokens))
    decoder = dict(decoder or {})
    if guidance_scale is not None:
        decoder["guidance_scale"] = float(guidance_scale)
    keep = caption_to_decoder and captions is not None, embedding_to_decoder
    settings = Settings(prior or {}, decoder, upsampler or {}, *keep, tile)
    model.check_sampling(prior=settings.prior, decoder=settings.decoder, upsampler=settings.upsampler)
    if tile is not None and not model.upsamplers:
        raise InputError("this run has no upsampler that could work in tiles; leave tile out")
    for stage in model.upsamplers:
        check_tile(stage, tile)
    parts = generate_in_batches(model, keys, tokens, mask, image_embeddings, settings, batch_size, x_T)
    return Generated(tuple(captions or ()), *parts)


def repeat_captions(captions: Sequence[str] | str | None, count: int | None) -> tuple[list[str] | None, int]:
    """The captions, each `count` times (None: once), one an image; and the number of images. Of None, `count` alone.

    Raises:
        InputError: for no caption in the list, or a count below 1.
    """
    if count is not None and count < 1:
        raise InputError(f"count is {count}; it must be 1 or more")
    if captions is None:
        return None, count or 1
    captions = [captions] if isinstance(captions, str) else list(captions)
    if not captions:
        raise InputError("there is no caption; give at least one")
    repeated = [caption for caption in captions for _ in range(count or 1)]
    return repeated, len(repeated)


def _check(
    model: DALLE2, captions: Sequence[str] | None, image_embeddings: Any, batch_size: int, keep_embedding: bool
) -> None:
    """Raises InputError if a stage is missing that is needed, or embeddings are given that nobody reads."""
    if captions is not None and not captions:
        raise InputError("there is no caption; give at least one")
    if captions is None and image_embeddings is None:
        raise InputError("there are neither captions nor image embeddings; give one of them")
    model.require("decoder")
    if not keep_embedding and image_embeddings is not None:
        raise InputError("image embeddings were given and are withheld from the decoder; leave one of the two out")
    if model.decoder.module.reads_image and keep_embedding:
        model.require(*(("clip", "prior") if image_embeddings is None else ("clip",)))
    elif image_embeddings is not None:
        raise InputError("this run's decoder reads captions alone; leave image_embeddings out")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be 1 or more")


def _check_noise(model: DALLE2, x_T: Any, count: int) -> None:
    size = model.decoder.record.image_size
    if x_T is not None and np.shape(x_T) != (count, size, size, 3):
        raise InputError(
            f"x_T has the shape {list(np.shape(x_T))}; the decoder starts {count} images from noise of the shape "
            f"{[count, size, size, 3]}"
        )


@dataclass(frozen=True)
class Settings:
    """How each stage is sampled: changed fields of its Sampling, and with what."""

    prior: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)
    upsampler: dict[str, Any] = field(default_factory=dict)
    keep_caption: bool = True
    keep_embedding: bool = True
    tile: int | None = None


def generate_in_batches(
    model: DALLE2,
    keys: jax.Array,
    tokens: np.ndarray,
    mask: np.ndarray,
    image_embeddings: jax.Array | None,
    settings: Settings,
    batch_size: int,
    x_T: jax.Array | None = None,
) -> tuple[Any, ...]:
    """The fields of `Generated` but for the captions, of captions as tokens `[b, n]` and their mask.

    keys: one a caption `[b]`. image_embeddings: in place of the prior's. x_T: in place of the decoder's noise.
    """
    count = len(keys)
    # A stage's key of a caption does not depend on the batch.
    stage_keys = jax.vmap(lambda key: jax.random.split(key, 2 + len(model.upsamplers)))(keys)
    parts = []
    for rows, kept in device_batches(count, batch_size):
        embeddings = None if image_embeddings is None else jnp.asarray(image_embeddings)[rows]
        noise = None if x_T is None else jnp.asarray(x_T)[rows]
        captions = encode_tokens(model.clip, tokens[rows], mask[rows])
        part = _generate_batch(model, stage_keys[rows], captions, embeddings, settings, noise)
        parts.append(jax.tree.map(lambda value, kept=kept: np.asarray(value[:kept]), part))
    return jax.tree.map(lambda *values: np.concatenate(values), *parts)


def _generate_batch(
    model: DALLE2,
    keys: jax.Array,
    captions: EncodedCaptions,
    image_embeddings: jax.Array | None,
    settings: Settings,
    x_T: jax.Array | None = None,
) -> tuple[Any, ...]:
    if image_embeddings is None and model.decoder.module.reads_image and settings.keep_embedding:
        own, empty = shard_batch(keys[:, 0]), model.empty_for(model.prior)
        image_embeddings = sample_image_embeddings(model.prior, captions, own, empty, **settings.prior)()
    embeddings = None if image_embeddings is None else shard_batch(image_embeddings)
    images = decode(
        model.decoder,
        captions,
        shard_batch(keys[:, 1]),
        embeddings,
        keep_caption=settings.keep_caption,
        empty=model.empty_for(model.decoder),
        x_T=None if x_T is None else shard_batch(x_T),
        **settings.decoder,
    )()
    decoded, upsampled = to_uint8(images), []
    for index, stage in enumerate(model.upsamplers):
        own, images = shard_batch((keys[:, 2 + index], images))
        images = upsample(stage, own, images, captions=captions, tile=settings.tile, **settings.upsampler)()
        upsampled.append(to_uint8(images))
    return captions.embedding, image_embeddings, decoded, tuple(upsampled)
