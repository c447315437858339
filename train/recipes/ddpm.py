"""DDPM, unconditional or of a class or a caption (Ho et al. 2020)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.diffusion import Process, Sampling, estimated_bound
from dalle2_jax.errors import InputError
from dalle2_jax.layers.pixels import in_colour
from dalle2_jax.lineage.ddpm import DDPM, PROCESS, conditions, for_evaluation, sample_ddpm
from train.config.recipe import Batch, BatchSpec, Parameters, check_share
from train.recipes.augment import random_flip, training_images
from train.recipes.diffusion import DiffusionRecipe, DiffusionTask


@dataclass(frozen=True, kw_only=True)
class DDPMRecipe(DiffusionRecipe):
    """Trains `module` on images, with labels or captions where it is conditional on them.

    condition_drop: how often the condition is withheld, so that sampling can be guided. horizontal_flip: mirrors half
    of the images, as the paper does for CIFAR-10; not for digits, nor where captions say left and right.
    bound_evaluations: by how many evaluations an image validation estimates the bits per dimension (`estimated_bound`).
    preview_steps: previews take no more, by DDIM where `sampling` has more.
    """

    kind: ClassVar[str] = "ddpm"
    training_fields: ClassVar[tuple[str, ...]] = (
        *DiffusionRecipe.training_fields,
        "condition_drop",
        "horizontal_flip",
        "bound_evaluations",
        "preview_steps",
    )

    module: DDPM
    process: Process = PROCESS
    sampling: Sampling = Sampling(sampler="ddpm", steps="1000")
    condition_drop: float = 0.1
    horizontal_flip: bool = False
    bound_evaluations: int = 4
    preview_steps: int = 50

    def __post_init__(self) -> None:
        for name in ("bound_evaluations", "preview_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{self.kind}.{name} is {getattr(self, name)}; it must be 1 or more")
        super().__post_init__()
        check_share(f"{self.kind}.condition_drop", self.condition_drop)
        if self.module.channels not in (1, 3):
            raise InputError(
                f"{self.kind}.module.channels is {self.module.channels}; it must be 1 (grey) or 3 (colour)"
            )
        wanted = self.module.channels * (2 if self.process.variance == "learned_range" else 1)
        if self.module.unet.out_channels != wanted:
            raise InputError(
                f"{self.kind}.module.unet.out_channels is {self.module.unet.out_channels} and "
                f"{self.kind}.process.variance {self.process.variance}, which needs {wanted}; set one of them"
            )
        if self.sampling.is_guided and self.module.condition == "none":
            raise InputError(
                f"{self.kind}.sampling.guidance_scale is {self.sampling.guidance_scale} and {self.kind}.module has no "
                f"condition to guide by; set {self.kind}.sampling.guidance_scale=1"
            )

    @property
    def reads_captions(self) -> bool:
        return self.module.condition == "caption"

    @property
    def classes(self) -> int | None:
        return self.module.num_classes

    @property
    def output_size(self) -> int:
        return self.module.unet.image_size

    @property
    def preview_sampling(self) -> Sampling:
        """As in the end, or over fewer steps."""
        sampling = super().preview_sampling
        if sampling.process(self.process).steps <= self.preview_steps:
            return sampling
        return dataclasses.replace(sampling, sampler="ddim", steps=str(self.preview_steps), eta=0.0, variance=None)

    def build(self, stages: Mapping[str, LoadedStage]) -> DDPMTask:
        return DDPMTask(recipe=self)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "image_size": self.module.unet.image_size}


@dataclass(frozen=True, kw_only=True)
class DDPMTask(DiffusionTask):
    """Restores images under their conditions. Validation also has bits_per_dimension: an unbiased estimate of the
    variational bound, with predicted x_0 clamped."""

    recipe: DDPMRecipe

    @property
    def batch_spec(self) -> BatchSpec:
        return dataclasses.replace(super().batch_spec, image_size=self.module.unet.image_size)

    def init(self, key: jax.Array) -> Parameters:
        read = {}
        if self.module.condition == "class":
            read = {"labels": jnp.zeros(1, jnp.int32)}
        if self.module.condition == "caption":
            read = {"tokens": jnp.zeros((1, self.module.text.context_length), jnp.int32)}
        images = jnp.zeros((1, *self.module.image_shape))
        return self.module.init(key, images, jnp.zeros(1, jnp.int32), **read)["params"]

    def _given(self, batch: Batch) -> dict[str, Any]:
        """The labels or captions of a batch, as `sample_ddpm` takes them."""
        if self.module.condition == "class":
            return {"labels": batch["label"], "captions": None}
        captions = self.module.condition == "caption"
        return {"labels": None, "captions": EncodedCaptions(batch["tokens"], batch["mask"]) if captions else None}

    def denoising(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, training: bool):
        names = ("keep", "flip", "loss", "dropout")
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        images = training_images(batch["image"], self.module.unet.image_size, self.module.channels)
        if training and self.recipe.horizontal_flip:
            images = random_flip(keys["flip"], images)
        count = images.shape[0]
        condition = conditions(self.module, count, **self._given(batch))
        drop = self.recipe.condition_drop if training else 0.0
        keep = jax.random.uniform(keys["keep"], (count,)) >= drop

        def denoiser(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
            return self.module.apply(
                {"params": params},
                x_t,
                timesteps,
                **condition,
                keep=keep,
                deterministic=not training,
                rngs={"dropout": keys["dropout"]},
            )

        return denoiser, images, keys["loss"]

    def validate(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        loss_key, bound_key = jax.random.split(key)
        denoiser, images, bound_key = self.denoising(params, batch, bound_key, frozen, training=False)
        process = for_evaluation(self.recipe.process)
        bound = estimated_bound(bound_key, denoiser, images, process, self.recipe.bound_evaluations)
        return {**super().validate(params, batch, loss_key, frozen), "bits_per_dimension": bound}

    def preview(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> jax.Array:
        """New images, under the conditions of the batch's where there are any."""
        recipe, count = self.recipe, batch["image"].shape[0]
        settings = recipe.process, recipe.preview_sampling
        return in_colour(sample_ddpm(key, self.module, params, *settings, count, **self._given(batch)))
