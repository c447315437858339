"""Inpainting and outpainting: a part of an image painted anew, and an image continued beyond its edges.

Decoders and upsamplers that see what is known (`inpainting`, GLIDE Sec. 4) paint by that; any other by RePaint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.decoder import Known
from dalle2_jax.diffusion import REPAINT, REPAINT_SAMPLERS, REPLACEMENT, Resampling
from dalle2_jax.diffusion.sampler import keys_for
from dalle2_jax.errors import InputError
from dalle2_jax.images.resize import resize
from dalle2_jax.images.sheet import caption_grid
from dalle2_jax.layers.pixels import to_float, to_uint8
from dalle2_jax.manipulate.canvas import any_in_cells, extended, square_canvas
from dalle2_jax.unclip.embed import embed_images, encode_tokens
from dalle2_jax.unclip.placement import device_batches, shard_batch
from dalle2_jax.unclip.sample import decode, upsample
from dalle2_jax.unclip.settings import check_tile, sampling_of

if TYPE_CHECKING:
    from dalle2_jax.unclip import DALLE2

MARK = np.array([255, 0, 255], np.uint8)


@dataclass(frozen=True)
class Inpainted:
    """Images in which a part is painted, at the run's final size.

    images: uint8 `[b, s, s, 3]`, which are `original` byte for byte where `mask` is False. original: what was given, as
    a square of that size. mask: bool `[b, s, s]`, True where it is painted. captions: () where there were none. stages:
    each stage's images, the decoder's first; the last are `images`.
    """

    images: np.ndarray
    original: np.ndarray
    mask: np.ndarray
    captions: tuple[str, ...]
    stages: tuple[np.ndarray, ...]

    @property
    def marked(self) -> np.ndarray:
        """The originals, half magenta where they are painted over."""
        return np.where(self.mask[..., None], self.original // 2 + MARK // 2, self.original)

    def sheet(self, columns: int = 8) -> Any:
        """What was given above what came of it, as a PIL image."""
        captions = self.captions or [""] * len(self.images)
        return caption_grid([self.marked, self.images], captions, columns=columns, labels=("given", "painted"))


@dataclass(frozen=True)
class Outpainted(Inpainted):
    """Images continued beyond their edges. boxes: where each lies in its result, (left, top, right, bottom) pixels."""

    boxes: tuple[tuple[int, int, int, int], ...]


def inpaint(
    model: DALLE2,
    key: jax.Array,
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    captions: Sequence[str] | str | None = None,
    *,
    guidance_scale: float | None = None,
    prior: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
    upsampler: dict[str, Any] | None = None,
    image_embeddings: jax.Array | None = None,
    jump_length: int = REPAINT.jump_length,
    jump_samples: int = REPAINT.jump_samples,
    upsampler_jump_samples: int = REPLACEMENT.jump_samples,
    tile: int | None = None,
    batch_size: int = 16,
    strict: bool = False,
) -> Inpainted:
    """Paints a part of each image anew; the rest comes out as it went in.

    An image is its central square, brought to `model.image_size` by area averaging where that divides its side and by
    Pillow's bicubic filter else; the rest of it is not seen. Its mask goes with it: a pixel is painted if any is that
    it covers, here and at the smaller sizes of the decoder and of earlier upsamplers.

    What is painted follows the caption: it says what the whole image shows, and the prior samples an image embedding of
    it. Without one it follows the image's own embedding, painted part and all, and so varies what is there; to replace
    a thing by another, give a caption. Every upsampler keeps what is known too.

    Args:
        key: one key, or one an image `[b]`, with which an image comes out the same alone and in any batch.
        images: uint8 `[h, w, 3]` each, of any size from the decoder's on.
        masks: one an image, `[h, w]` of its size, bool, or uint8 from 128 on: where to paint.
        captions: one an image, or one for all; None: see above.
        guidance_scale: the decoder's. prior, decoder, upsampler: fields of a stage's Sampling to change; a stage whose
            own sampler cannot be resampled (dpmpp_2m) is sampled by DDIM.
        image_embeddings: `[b, z]`, in place of those above.
        jump_length, jump_samples, upsampler_jump_samples: RePaint's (`diffusion.Resampling`), for stages that do not
            see what is known; an upsampler follows the small image and is not resampled by default.
        tile, batch_size, strict: as in `DALLE2.generate`.

    Raises:
        InputError: before anything is sampled, for images, masks, captions or settings that do not fit, and if a stage
            is missing that is needed.
    """
    resampling = Resampling(jump_length, jump_samples), Resampling(jump_length, upsampler_jump_samples)
    originals, painted = _canvases(model, images, masks)
    captions = _check(model, captions, image_embeddings, len(originals), prior, batch_size)
    changes = {"prior": dict(prior or {}), "decoder": dict(decoder or {}), "upsampler": dict(upsampler or {})}
    if guidance_scale is not None:
        changes["decoder"]["guidance_scale"] = float(guidance_scale)
    model.check_sampling(**changes)
    if tile is not None and not model.upsamplers:
        raise InputError("this run has no upsampler that could work in tiles; leave tile out")
    for stage in model.upsamplers:
        check_tile(stage, tile)
    if image_embeddings is None and captions is None:
        image_embeddings = embed_images(model.clip, images)
    plan = _Plan(model, captions, changes, resampling, tile, strict)
    stages = _in_batches(plan, keys_for(key, len(originals)), originals, painted, image_embeddings, batch_size)
    final = np.where(painted[..., None], stages[-1], originals)
    return Inpainted(final, originals, painted, tuple(captions or ()), (*stages[:-1], final))


def outpaint(
    model: DALLE2,
    key: jax.Array,
    images: Sequence[np.ndarray],
    captions: Sequence[str] | str | None = None,
    *,
    factor: float = 2.0,
    place: tuple[float, float] = (0.5, 0.5),
    image_embeddings: jax.Array | None = None,
    **options: Any,
) -> Outpainted:
    """Continues each image beyond its edges, on a square canvas that is painted where the image is not.

    All of an image is kept, also beyond its central square: with factor 1 only the bars are painted that make it a
    square. It comes out smaller, as the canvas has `model.image_size` pixels a side.

    Args:
        factor: how many times wider the canvas is than the longer side of the image, 1 to 8.
        place: how much of the free space is left of the image and above it, as shares; (0, 0.5) continues it to the
            right alone.
        captions: as in `inpaint`, of the larger scene; None: what is painted follows the image's own embedding.
        options: those of `inpaint`.

    Raises:
        InputError: as `inpaint`, and for a canvas that the image fills.
    """
    model.require("decoder")
    images = [np.asarray(image) for image in images]
    which = [_of(number, len(images)) for number in range(len(images))]
    pairs = [extended(image, factor, place, model.image_size, of) for image, of in zip(images, which, strict=True)]
    if captions is None and image_embeddings is None and model.decoder.module.reads_image:
        model.require("clip")
        image_embeddings = embed_images(model.clip, images)
    canvases, masks = zip(*pairs, strict=True) if pairs else ((), ())
    result = inpaint(model, key, canvases, masks, captions, image_embeddings=image_embeddings, **options)
    return Outpainted(**vars(result), boxes=tuple(_box(~mask) for mask in result.mask))


def _box(kept: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(kept.any(1)), np.flatnonzero(kept.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _of(number: int, count: int) -> str:
    """Which image is meant, where there are several."""
    return "" if count == 1 else f" of image {number}"


def _canvases(model: DALLE2, images: Sequence[Any], masks: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 `[b, s, s, 3]` and bool `[b, s, s]` at the run's final size."""
    model.require("decoder")
    if not len(images) or len(images) != len(masks):
        raise InputError(f"{len(masks)} masks were given for {len(images)} images; give one for each")
    least = model.decoder.record.image_size
    pairs = enumerate(zip(images, masks, strict=True))
    canvases = [square_canvas(*pair, model.image_size, least, _of(number, len(images))) for number, pair in pairs]
    return np.stack([canvas.image for canvas in canvases]), np.stack([canvas.mask for canvas in canvases])


def _check(
    model: DALLE2,
    captions: Sequence[str] | str | None,
    image_embeddings: Any,
    count: int,
    prior: Any,
    batch_size: int,
) -> list[str] | None:
    """The captions, one an image; raises InputError where stages, captions and embeddings do not go together."""
    captions = [captions] * count if isinstance(captions, str) else captions
    if captions is not None and len(captions) != count:
        raise InputError(f"{len(captions)} captions were given for {count} images; give one for all, or one each")
    if image_embeddings is not None and len(image_embeddings) != count:
        raise InputError(f"{len(image_embeddings)} image embeddings were given for {count} images; give one each")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be 1 or more")
    module = model.decoder.module
    if not module.reads_image:
        if captions is None:
            raise InputError("this run's decoder reads captions alone; say what the image shows in a caption")
        if image_embeddings is not None:
            raise InputError("this run's decoder reads captions alone; leave image_embeddings out")
    elif captions is not None and image_embeddings is None:
        model.require("clip", "prior")
    else:
        model.require("clip")
        if prior:
            raise InputError("no prior is at work without a caption, or with image embeddings; leave prior out")
    return None if captions is None else list(captions)


@dataclass(frozen=True)
class _Plan:
    """What is the same for all batches."""

    model: DALLE2
    captions: list[str] | None
    changes: dict[str, dict[str, Any]]
    resampling: tuple[Resampling, Resampling]
    tile: int | None
    strict: bool


def _in_batches(
    plan: _Plan,
    keys: jax.Array,
    originals: np.ndarray,
    painted: np.ndarray,
    image_embeddings: jax.Array | None,
    batch_size: int,
) -> tuple[np.ndarray, ...]:
    """Each stage's images, uint8 `[b, h, h, 3]`, from whole batches as in `unclip.generate`."""
    stage_keys = jax.vmap(lambda key: jax.random.split(key, 2 + len(plan.model.upsamplers)))(keys)
    parts = []
    for rows, kept in device_batches(len(keys), batch_size):
        embeddings = None if image_embeddings is None else jnp.asarray(image_embeddings)[rows]
        part = _paint(plan, stage_keys[rows], rows, originals[rows], painted[rows], embeddings)
        parts.append([np.asarray(images[:kept]) for images in part])
    return tuple(np.concatenate(images) for images in zip(*parts, strict=True))


def _paint(
    plan: _Plan,
    keys: jax.Array,
    rows: np.ndarray,
    originals: np.ndarray,
    painted: np.ndarray,
    embeddings: jax.Array | None,
) -> list[jax.Array]:
    model, changes = plan.model, plan.changes
    if plan.captions is None:
        captions = model.empty_caption[np.zeros(len(rows), int)]
    else:
        captions = [plan.captions[row] for row in rows]
        if embeddings is None and model.decoder.module.reads_image:
            embeddings = model.sample_prior(keys[:, 0], captions, strict=plan.strict, **changes["prior"])
        tokens, mask = model.tokenizer.encode(captions, strict=plan.strict)
        captions = encode_tokens(model.clip, tokens, mask)
    images = decode(
        model.decoder,
        captions,
        shard_batch(keys[:, 1]),
        None if embeddings is None else shard_batch(embeddings),
        keep_caption=plan.captions is not None,
        empty=model.empty_for(model.decoder),
        known=shard_batch(_known(originals, painted, model.decoder.record.image_size)),
        resampling=plan.resampling[0],
        **_for_painting(model.decoder, changes["decoder"]),
    )()
    stages = [to_uint8(images)]
    for index, stage in enumerate(model.upsamplers):
        known = _known(originals, painted, stage.record.image_size)
        own, images, known = shard_batch((keys[:, 2 + index], images, known))
        more = {"known": known, "resampling": plan.resampling[1], **_for_painting(stage, changes["upsampler"])}
        images = upsample(stage, own, images, captions=captions, tile=plan.tile, **more)()
        stages.append(to_uint8(images))
    return stages


def _for_painting(stage: LoadedStage, changes: dict[str, Any]) -> dict[str, Any]:
    """Changes of a stage's settings, and DDIM where its own sampler cannot go back in its chain, as RePaint does."""
    if stage.module.inpainting or sampling_of(stage, changes).sampler in REPAINT_SAMPLERS or "sampler" in changes:
        return changes
    return {**changes, "sampler": "ddim"}


def _known(originals: np.ndarray, painted: np.ndarray, size: int) -> Known:
    """What is known at a stage's size: pixels of which all that they cover is."""
    mask = any_in_cells(painted, size)
    return Known(to_float(jnp.asarray(resize(originals, size))), jnp.asarray(~mask[..., None]))
