"""An upsampler: from a small image to a larger one, unconditional and trained on crops (Sec. 2.1, App. C)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.decoder import Upsampler, gaussian_blur, random_crop, sample_upsampler
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.errors import InputError
from dalle2_jax.layers.pixels import resize, to_float, to_uint8
from train.config.recipe import Batch, BatchSpec, Parameters, check_share
from train.recipes.augment import degraded_crop
from train.recipes.diffusion import DiffusionRecipe, DiffusionTask
from train.recipes.masks import random_known, without_known

DEGRADATIONS = ("blur", "bsr")


@dataclass(frozen=True, kw_only=True)
class UpsamplerRecipe(DiffusionRecipe):
    """Trains `module` from `low_size` to `module.unet.image_size` pixels on crops of `crop_fraction` of the side.

    The low-resolution image is made worse, so that the decoder's flaws are not new to the upsampler. degradation:
    "blur" (kernel 3, `blur_sigma`, with `blur_probability`; the paper's first upsampler always blurs) or "bsr" (blur,
    noise, resizing and JPEG on the host, `dalle2_jax.data.degrade`; the paper's second). mask_full: as in
    `DecoderRecipe`; the small image is always whole.
    """

    kind: ClassVar[str] = "upsampler"
    reads_captions: ClassVar[bool] = False
    training_fields: ClassVar[tuple[str, ...]] = (
        *DiffusionRecipe.training_fields,
        "crop_fraction",
        "degradation",
        "blur_sigma",
        "blur_probability",
        "mask_full",
    )

    module: Upsampler
    low_size: int
    crop_fraction: float = 0.25
    blur_sigma: float = 0.6
    blur_probability: float = 1.0
    degradation: str = "blur"
    mask_full: float = 0.25
    process: Process = Process(schedule="cosine", prediction="epsilon", variance="fixed_small", clip=1.0)
    sampling: Sampling = Sampling(sampler="ddim", steps="fast27")

    @property
    def factor(self) -> int:
        """How many times larger its images are than those it is given."""
        return self.size // self.low_size

    @property
    def size(self) -> int:
        """The side of the images it makes, in pixels."""
        return self.module.unet.image_size

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("upsampler.blur_probability", self.blur_probability)
        check_share("upsampler.mask_full", self.mask_full)
        if self.module.last is not None:
            raise InputError(
                "an upsampler with a network of its own for the last step (upsampler.module.last) is sampled and not "
                "trained here: the two see different timesteps; set upsampler.module.last=none"
            )
        if self.module.residual and self.process.prediction != "x0":
            raise InputError(
                "a residual upsampler predicts x_0: set upsampler.process.prediction=x0, or "
                "upsampler.module.residual=false"
            )
        if self.degradation not in DEGRADATIONS:
            raise InputError(f"upsampler.degradation is {self.degradation!r}; it must be {' or '.join(DEGRADATIONS)}")
        crop = self.low_size * self.crop_fraction
        if self.size % self.low_size or crop != int(crop) or crop < 1:
            raise InputError(
                f"an upsampler from {self.low_size} to {self.size} pixels cannot train on {self.crop_fraction} "
                "of the side: the larger size must be a multiple of the smaller and the crop a whole number of pixels"
            )

    @property
    def output_size(self) -> int:
        return self.size

    def build(self, stages: Mapping[str, LoadedStage]) -> UpsamplerTask:
        return UpsamplerTask(recipe=self)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "image_size": self.size, "low_size": self.low_size}


@dataclass(frozen=True, kw_only=True)
class UpsamplerTask(DiffusionTask):
    """Restores large images from small ones."""

    recipe: UpsamplerRecipe

    @property
    def batch_spec(self) -> BatchSpec:
        recipe, transform = self.recipe, None
        if recipe.degradation != "blur":
            crop = int(recipe.size * recipe.crop_fraction)
            transform = functools.partial(degraded_crop, crop=crop, factor=recipe.factor)
        return BatchSpec(image_size=recipe.size, captions=False, transform=transform)

    def init(self, key: jax.Array) -> Parameters:
        crop = int(self.recipe.low_size * self.recipe.crop_fraction)
        factor = self.recipe.factor
        images, low = jnp.zeros((1, crop * factor, crop * factor, 3)), jnp.zeros((1, crop, crop, 3))
        inputs = key, images, jnp.zeros(1, jnp.int32), low
        if not self.module.inpainting:
            return self.module.init(*inputs)["params"]
        params = self.module.init(*inputs, known=jnp.zeros((*images.shape[:3], 4)))["params"]
        return without_known(params, self.module.unet)

    def _pair(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        images = resize(to_float(batch["image"]), self.recipe.size)
        return images, resize(images, self.recipe.low_size)

    def denoising(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, training: bool):
        """On crops, blurred as often as in training, also when it validates; BSR's pairs come with training batches
        alone, and what validates them are small images as they are."""
        names = ("crop", "blur", "loss", "dropout", *(("known",) if self.module.inpainting else ()))
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        if training and self.recipe.degradation == "bsr":
            images, low = to_float(batch["image"]), to_float(batch["low_resolution"])
        else:
            images, low = self._pair(batch)
            if self.recipe.degradation == "blur":
                blurred = jax.random.uniform(keys["blur"], (low.shape[0], 1, 1, 1)) < self.recipe.blur_probability
                low = jnp.where(blurred, gaussian_blur(low, self.recipe.blur_sigma), low)
            images, low = random_crop(keys["crop"], images, low, int(self.recipe.size * self.recipe.crop_fraction))
        options = {"deterministic": not training, "rngs": {"dropout": keys["dropout"]} if training else None}
        if self.module.inpainting:
            options["known"] = random_known(keys["known"], images, self.recipe.mask_full).channels()

        def denoiser(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
            return self.module.apply({"params": params}, x_t, timesteps, low, **options)

        return denoiser, images, keys["loss"]

    def preview(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> jax.Array:
        """Upsamples real small images; paints the large ones in where it can."""
        images, low = self._pair(batch)
        settings = self.recipe.process, self.recipe.preview_sampling
        known = None
        if self.module.inpainting:
            known_key, key = jax.random.split(key)
            known = random_known(known_key, images, self.recipe.mask_full)
        return to_uint8(sample_upsampler(key, self.module, params, *settings, low, self.recipe.size, known=known))
