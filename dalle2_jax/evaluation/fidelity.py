"""Images that should come out of the decoder or the upsamplers as they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.evaluation.metrics.psnr import psnr
from dalle2_jax.layers.pixels import resize, to_float, to_uint8
from dalle2_jax.unclip import DALLE2


def upsampler_against_bicubic(model: DALLE2, key: jax.Array, images: np.ndarray) -> dict[str, float]:
    """PSNR of the whole chain of upsamplers on real small images, beside bicubic upsampling of the same."""
    small = resize(to_float(jnp.asarray(images)), model.decoder.record.image_size)
    large = np.asarray(to_uint8(resize(to_float(jnp.asarray(images)), model.image_size)))
    bicubic = to_uint8(resize(small, model.image_size, "cubic"))
    resized = small
    for index in range(len(model.upsamplers)):
        keys = jax.random.split(jax.random.fold_in(key, index), len(images))
        resized = model.upsample(keys, resized, index=index)
    ours, theirs = psnr(np.asarray(to_uint8(resized)), large), psnr(np.asarray(bicubic), large)
    return {"psnr": ours, "psnr_bicubic": theirs, "gain_db": ours - theirs}


def ddim_reconstruction(model: DALLE2, images: np.ndarray, captions: list[str], steps: str = "50") -> dict[str, Any]:
    """PSNR of images that the decoder inverted and drew again, at its own size, from their true embeddings."""
    embeddings, x_T = model.invert(images, captions, steps=steps)
    settings = {"steps": steps, "sampler": "ddim", "eta": 0.0, "guidance_scale": 1.0}
    sampled = model.decode(jax.random.key(0), embeddings, captions, x_T=x_T, **settings)
    small = to_uint8(resize(to_float(jnp.asarray(images)), model.decoder.record.image_size))
    return {"psnr": psnr(np.asarray(to_uint8(sampled)), np.asarray(small)), "steps": steps}
