"""What a loaded stage does by itself: compiled once a setting, on all devices if the batch divides by their number."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.decoder import invert_decoder, sample_decoder, sample_upsampler
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.errors import InputError, nearest
from dalle2_jax.layers.pictures import resize, to_float
from dalle2_jax.layers.precision import cast, with_dtype
from dalle2_jax.prior import sample_prior
from dalle2_jax.sharding import batch_parts, batch_sharding, make_mesh, partition

_STATIC = ("module", "process", "sampling")
# Fields of Sampling that a kind of stage does not read, and why.
_NOT_GUIDED = "an upsampler, which is not guided"
UNUSED = {
    "decoder": {"candidates": "the decoder; the prior draws them"},
    "upsampler": {
        "candidates": "the upsampler; the prior draws them",
        "guidance_scale": _NOT_GUIDED,
        "guidance_interval": _NOT_GUIDED,
    },
}


@partial(jax.jit, static_argnames="module")
def encode_text(params, tokens, mask, *, module):
    return module.apply({"params": params}, tokens, mask, method="encode_text")


@partial(jax.jit, static_argnames="module")
def encode_image(params, pictures, *, module):
    pictures = resize(to_float(pictures), module.vision.image_size)
    return module.apply({"params": params}, pictures, method="encode_image")


@partial(jax.jit, static_argnames=_STATIC)
def draw_embeddings(keys, params, text_embedding, text, mask, null, *, module, process, sampling):
    return sample_prior(keys, module, params, process, sampling, text_embedding, text, mask, null)


@partial(jax.jit, static_argnames=_STATIC)
def decode(keys, params, embedding, caption, x_T, *, module, process, sampling):
    return sample_decoder(keys, module, params, process, sampling, embedding, caption, x_T)


@partial(jax.jit, static_argnames=(*_STATIC, "refinements"))
def invert(params, pictures, embedding, caption, *, module, process, sampling, refinements):
    pictures = resize(to_float(pictures), module.unet.image_size)
    return invert_decoder(module, params, process, sampling, pictures, embedding, caption, refinements)


@partial(jax.jit, static_argnames=(*_STATIC, "size", "tile"))
def upsample(keys, params, low_resolution, caption, *, module, process, sampling, size, tile):
    return sample_upsampler(keys, module, params, process, sampling, low_resolution, size, tile, caption)


def placed(stage: LoadedStage, dtype: str | None, shard: bool | None) -> LoadedStage:
    """The stage with its parameters on one device, or shared out among all of this process's, in `dtype`."""
    module, params = stage.module, stage.params
    if dtype is not None:
        module, params = with_dtype(module, dtype), cast(params, dtype)
    devices = jax.local_devices()
    if shard is None:  # CPU devices share one memory, in which there is nothing to be saved
        shard = devices[0].platform != "cpu"
    where = partition(params, make_mesh(data=1, fsdp=len(devices), devices=devices)) if shard else None
    return dataclasses.replace(stage, module=module, params=jax.device_put(params, where))


def process_of(stage: LoadedStage) -> Process:
    """The process a stage was trained with, and what was measured of the network then."""
    error = stage.record.measured.get("x0_error")
    return dataclasses.replace(stage.record.rebuilt("process"), x0_error=None if error is None else tuple(error))


def sampling_of(stage: LoadedStage, changes: dict[str, Any]) -> Sampling:
    """The stage's own sampling settings with some changed; InputError for changes that would have no effect."""
    own = stage.record.rebuilt("sampling")
    for name in changes:
        if name not in (known := [field.name for field in dataclasses.fields(own)]):
            raise InputError(
                f"sampling has no field {name!r}; the nearest of {', '.join(known)} is {nearest(name, known)}"
            )
    sampling = dataclasses.replace(own, **changes)
    idle = {
        "variance": "" if sampling.sampler == "ddpm" else f"the sampler {sampling.sampler}; take ddpm",
        "eta": "" if sampling.sampler == "ddim" else f"the sampler {sampling.sampler}; take ddim",
        "percentile": "" if sampling.threshold == "dynamic" else "this threshold; take threshold dynamic",
        **UNUSED.get(stage.kind, {}),
    }
    for name, reason in idle.items():
        if reason and getattr(sampling, name) != getattr(own, name):
            raise InputError(f"{name} has no effect with {reason}")
    return sampling


def keys_of(key: jax.Array, count: int) -> jax.Array:
    """One key a caption, from one key for all of them or from one each."""
    key = key if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    keys = jax.random.split(key, count) if key.ndim == 0 else key
    if keys.shape != (count,):
        raise InputError(f"{keys.size} keys were given for {count} captions; give one key, or one a caption")
    return keys


def spread(*arrays: Any) -> tuple[Any, ...]:
    """Shares a batch out among this process's devices, if it divides by their number; else leaves it as it is."""
    mesh = make_mesh(devices=jax.local_devices())
    if arrays[0].shape[0] % batch_parts(mesh):
        return arrays
    return jax.device_put(arrays, batch_sharding(mesh))


def check_tile(stage: LoadedStage, tile: int | None) -> None:
    unet = stage.module.unet
    divisor = unet.patch * 2 ** (len(unet.channel_multipliers) - 1)
    if tile is not None and (tile < 1 or tile % divisor):
        raise InputError(f"tile is {tile}; tiles of the stage {stage.name} must be multiples of {divisor}")


def enlarge(
    stage: LoadedStage,
    keys: jax.Array,
    pictures: jax.Array,
    *,
    tile: int | None = None,
    caption: tuple[jax.Array, jax.Array] | None = None,
    **changes: Any,
) -> jax.Array:
    """Enlarges `[b, h, w, 3]` in [-1, 1] with a trained upsampler to its own size; returns the same range.

    keys: one, or one a picture `[b]`. tile: the side of the tiles it is done in, to save memory; None: whole. caption:
    tokens and mask `[b, n]` for an upsampler that reads captions (GLIDE's); others leave it aside. changes: fields of
    the stage's Sampling. Raises InputError for changes and tiles that the stage cannot have.
    """
    check_tile(stage, tile)
    if stage.module.text is None:
        caption = None
    elif caption is None:
        raise InputError(f"the upsampler {stage.name} reads captions; give the tokens of one for each picture")
    elif tile is not None:
        raise InputError(f"the upsampler {stage.name} reads captions and does not work in tiles; leave tile out")
    keys, pictures = spread(keys_of(keys, pictures.shape[0]), pictures)
    if caption is not None:
        caption = spread(*caption)
    return upsample(
        keys,
        stage.params,
        pictures,
        caption,
        module=stage.module,
        process=process_of(stage),
        sampling=sampling_of(stage, changes),
        size=stage.record.image_size,
        tile=tile,
    )
