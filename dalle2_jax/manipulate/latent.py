"""The two-part latent of an image (Sec. 3): what CLIP sees in it, and the noise that holds the rest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.images.resize import resize, to_square_rgb
from dalle2_jax.manipulate.series import Series
from dalle2_jax.unclip.embed import embed_images
from dalle2_jax.unclip.placement import shard_batch
from dalle2_jax.unclip.sample import invert
from dalle2_jax.unclip.settings import process_of

if TYPE_CHECKING:
    from dalle2_jax.unclip import DALLE2

STEPS = 250  # of which inversion takes 249
LEAST_NOISE = 0.05
BATCH = 8


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("image_embedding", "x_T"), meta_fields=("steps", "captions")
)
@dataclass(frozen=True)
class Latent:
    """Images as (z_i, x_T), with what decoding has to have in common with encoding; a pytree of the two arrays.

    Fields:
        image_embedding: CLIP's `[b, z]`. x_T: the decoder's noise `[b, h, w, 3]`; None: from the keys.
        steps: of DDIM, there and back. captions: what the decoder reads beside the embedding, one an image; None: the
        embedding speaks alone.
    """

    image_embedding: jax.Array
    x_T: jax.Array | None
    steps: str
    captions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """How many images there are."""
        return self.image_embedding.shape[0]

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> Latent:
        """Some of the images, by a slice or a list of numbers."""
        numbers = np.arange(len(self))[rows if isinstance(rows, slice) else np.asarray(rows, int)]
        captions = self.captions and tuple(self.captions[number] for number in numbers)
        x_T = None if self.x_T is None else self.x_T[numbers]
        return dataclasses.replace(self, image_embedding=self.image_embedding[numbers], x_T=x_T, captions=captions)


def concatenate(first: Latent, second: Latent) -> Latent:
    """The images of both, which were encoded alike."""
    embeddings = jnp.concatenate([first.image_embedding, second.image_embedding])
    x_T = None if first.x_T is None else jnp.concatenate([first.x_T, second.x_T])
    captions = first.captions and first.captions + second.captions
    return dataclasses.replace(first, image_embedding=embeddings, x_T=x_T, captions=captions)


def embed(model: DALLE2, images: Sequence[np.ndarray], *, steps: str | None = None) -> Latent:
    """The latent of images by CLIP alone, whose x_T is the keys'; images and errors as in `encode`."""
    require_latent(model)
    steps = default_steps(model) if steps is None else str(steps)
    return Latent(embed_images(model.clip, read_squares(model, images)), None, steps)


def default_steps(model: DALLE2, count: int = STEPS) -> str:
    """The steps of DDIM in which images are encoded: 250 evenly spaced ones, as in the paper.

    A network that predicts x_0 or v says of epsilon what it says of x_0 divided by the noise, so that from the first
    timesteps x_T would come out many times too large, and the image would resist every change. The steps of such a one
    begin where the noise is 0.05, and an image counts as that noisy: "from25:250" of the cosine schedule.
    """
    model.require("decoder")
    process = process_of(model.decoder)
    if process.prediction == "epsilon":
        return str(count)
    first = int(np.argmax(np.asarray(process.sqrt_one_minus_alphas_cumprod) >= LEAST_NOISE))
    return f"from{first}:{count}"


def encode(
    model: DALLE2,
    images: Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    *,
    steps: str | None = None,
    refinements: int = 0,
    batch_size: int = BATCH,
) -> Latent:
    """The latent of images (Sec. 3): z_i by CLIP, x_T by DDIM inversion of the decoder conditioned on z_i.

    images: uint8 `[h, w, 3]` each, of any size (gray `[h, w]` and RGBA `[h, w, 4]` too; what is transparent turns
    white). The central square is used, resized to CLIP's size and to the decoder's; the rest is not seen.
    captions: one an image, which the decoder reads here and again in `reconstruct` and `vary`; None: z_i alone.
    steps: of DDIM, as `Sampling.steps` has them; inversion takes one less (249 of 250). None: see `default_steps`.
    refinements: see `dalle2_jax.diffusion.ddim_invert`; each costs as much again, and with few steps makes the
    reconstruction more exact.

    Raises:
        InputError: for an image that is smaller than the decoder's own images, another number of captions than of
            images, or a run without CLIP or without a decoder that reads image embeddings.
    """
    require_latent(model)
    images = read_squares(model, images)
    if isinstance(captions, str):
        captions = [captions]
    if captions is not None and len(captions) != len(images):
        raise InputError(f"{len(captions)} captions were given for {len(images)} images; give one an image, or none")
    if refinements < 0:
        raise InputError(f"refinements is {refinements}; it must be 0 or more")
    steps = default_steps(model) if steps is None else str(steps)
    size = model.decoder.record.image_size
    small = np.concatenate([resize(image[None], size) for image in images])
    embeddings = embed_images(model.clip, images)
    if captions is None:
        encoded = model.empty_caption[np.zeros(len(images), int)]
    else:
        encoded = model.encode_text(captions)
    parts = []
    for rows in whole_batches(len(images), batch_size):
        pixels, own = shard_batch((jnp.asarray(small[rows]), embeddings[rows]))
        inverted = invert(
            model.decoder,
            encoded[rows],
            pixels,
            own,
            keep_caption=captions is not None,
            empty=model.empty_for(model.decoder),
            refinements=refinements,
            steps=steps,
        )
        parts.append(np.asarray(inverted()))
    x_T = jnp.asarray(np.concatenate(parts)[: len(images)])
    return Latent(embeddings, x_T, steps, None if captions is None else tuple(captions))


def reconstruct(model: DALLE2, key: jax.Array, latent: Latent, **options: Any) -> Series:
    """The images of a latent, by DDIM at eta 0: at the decoder's size what was encoded, nearly (Sec. 3).

    options: see `decode_latent`. A guidance scale other than 1 makes it less exact (ADM App. F).
    """
    images = decode_latent(model, same_key(key, len(latent)), latent, **options)
    return Series(images, tuple(f"image {number + 1}" for number in range(len(latent))), min(len(latent), 8))


def decode_latent(
    model: DALLE2, keys: jax.Array, latent: Latent, *, eta: float = 0.0, batch_size: int = BATCH, **options: Any
) -> np.ndarray:
    """Images uint8 `[b, h, w, 3]` of a latent, by DDIM and the upsamplers.

    keys: one an image `[b]`: of the upsamplers' noise, of DDIM's where eta is above 0, and of x_T where the latent has
    none. batch_size: images at a time; always whole batches, so that an image does not depend on how many there are.
    options: those of `DALLE2.generate` that say how it is sampled: guidance_scale (1 by default), decoder, upsampler,
    tile, strict, warn.
    """
    require_latent(model)
    if not 0 <= eta <= 1:
        raise InputError(f"eta is {eta}; it must lie in 0 to 1")
    decoder = {"sampler": "ddim", "steps": latent.steps, "eta": float(eta), "guidance_scale": 1.0}
    options["decoder"] = decoder | dict(options.get("decoder") or {})
    rows = np.concatenate(whole_batches(len(latent), batch_size))
    whole = latent[rows]
    captions = None if whole.captions is None else list(whole.captions)
    images = model.generate(
        keys[rows],
        captions,
        image_embeddings=whole.image_embedding,
        x_T=whole.x_T,
        batch_size=batch_size,
        **options,
    )
    return images[: len(latent)]


def same_key(key: jax.Array, count: int) -> jax.Array:
    """One key `count` times `[count]`, so that the images differ in what their latents say alone."""
    key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    if key.ndim:
        raise InputError(f"{len(key)} keys were given; give one, which all images share")
    return jnp.broadcast_to(key, (count,))


def whole_batches(count: int, batch_size: int) -> list[np.ndarray]:
    """The numbers 0..count-1 in batches of just `batch_size`, the last one filled up from the start.

    XLA rounds otherwise in batches of another size; with one size, what is computed twice comes out the same.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be 1 or more")
    number = -(-count // batch_size)
    return list(np.resize(np.arange(count), number * batch_size).reshape(number, batch_size))


def require_latent(model: DALLE2) -> None:
    """Raises InputError for a run whose images have no latent of two parts."""
    model.require("clip", "decoder")
    if not model.decoder.module.reads_image:
        raise InputError("this run's decoder reads captions alone; a latent needs one that reads image embeddings")


def read_squares(model: DALLE2, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The central squares of images, uint8 `[s, s, 3]` each; raises InputError as `encode`."""
    if not len(images):
        raise InputError("there is no image; give at least one")
    least, squares = model.decoder.record.image_size, []
    for number, image in enumerate(map(np.asarray, images), 1):
        channels = image.shape[2] if image.ndim == 3 else 1
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
            raise InputError(f"image {number} is {image.dtype} {list(image.shape)}; images are uint8 [h, w, 3]")
        height, width = image.shape[:2]
        if min(height, width) < least:
            raise InputError(
                f"image {number} has {width} x {height} pixels; give one of at least {least} x {least}, the size at "
                "which the decoder works"
            )
        squares.append(to_square_rgb(image))
    return squares
