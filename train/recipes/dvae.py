"""The discrete VAE of DALL-E, on images without captions (Ramesh et al. 2021, Sec. 2.1 and App. A)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.errors import InputError
from dalle2_jax.lineage.dvae import (
    DVAE,
    KL_WEIGHT,
    TEMPERATURE,
    CosineSchedule,
    codebook_use,
    dvae_elbo,
    sample_codes,
)
from dalle2_jax.lineage.vae import Elbo, bits_per_dimension
from train.config.recipe import Batch, BatchSpec, Parameters
from train.recipes.augment import LARGEST_RESIZED, resized_crop
from train.recipes.autoencoder import LatentRecipe, LatentTask, psnr


@dataclass(frozen=True, kw_only=True)
class DVAERecipe(LatentRecipe):
    """Trains `module` on the relaxed evidence lower bound, in nats a pixel and channel.

    temperature: of the relaxed codes. kl_weight: beta, of the KL divergence summed over the grid beside the likelihood
    summed over pixels and channels. Their steps are updates. crop: whether training images are the paper's random crops
    of larger ones, mirrored half of the time (`augment.resized_crop`).
    """

    kind: ClassVar[str] = "dvae"
    training_fields: ClassVar[tuple[str, ...]] = ("temperature", "kl_weight", "crop")

    module: DVAE
    temperature: CosineSchedule = TEMPERATURE
    kl_weight: CosineSchedule = KL_WEIGHT
    crop: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start", "end"):
            if not (value := getattr(self.temperature, name)) > 0:
                raise InputError(f"dvae.temperature.{name} is {value}; it must be above 0")
            if not (value := getattr(self.kl_weight, name)) >= 0:
                raise InputError(f"dvae.kl_weight.{name} is {value}; it must be 0 or more")

    def build(self, stages: Mapping[str, LoadedStage]) -> DVAETask:
        return DVAETask(recipe=self)


@dataclass(frozen=True, kw_only=True)
class DVAETask(LatentTask):
    """Metrics, an image unless said otherwise: reconstruction (-log p(image | codes)), kl, and their sum negative_elbo,
    in nats; the latter also in bits_per_dimension; perplexity and usage of the codebook by the likeliest codes of the
    batch. In training they are those of relaxed codes, beside temperature and kl_weight.

    In validation they and the loss are those of codes, one sample for each place, and the loss has the KL weight at the
    end of its schedule; relaxed_negative_elbo is that of the relaxed codes with the same noise at the temperature at
    the end of its schedule, which should have come close to it. psnr, in dB, is of the likeliest codes.
    """

    recipe: DVAERecipe

    @property
    def batch_spec(self) -> BatchSpec:
        size = self.module.image_size
        if not self.recipe.crop:
            return BatchSpec(image_size=size, captions=False)
        transform = functools.partial(resized_crop, size=size)
        return BatchSpec(image_size=int(size * LARGEST_RESIZED), captions=False, transform=transform)

    def init(self, key: jax.Array) -> Parameters:
        size = self.module.image_size
        images = jnp.zeros((1, size, size, self.module.channels))
        return self.module.init(key, images, method="reconstruct")["params"]

    def init_extra(self) -> jax.Array:
        """Batches so far, of which there are several a step where gradients are accumulated."""
        return jnp.zeros((), jnp.int32)

    def loss(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, extra: jax.Array):
        step = extra // self.recipe.optimizer.accumulation
        temperature, kl_weight = self.recipe.temperature(step), self.recipe.kl_weight(step)
        images = self._images(batch, key)
        logits, likelihood = self.module.apply({"params": params}, images, key, temperature)
        found = dvae_elbo(images, logits, likelihood, kl_weight)
        metrics = {**self._terms(found, logits), "temperature": temperature, "kl_weight": kl_weight}
        return found.loss / found.dimensions, metrics, extra + 1

    def _terms(self, found: Elbo, logits: jax.Array) -> dict[str, jax.Array]:
        negative = -found.value.mean()
        perplexity, usage = codebook_use(jnp.argmax(logits, axis=-1), self.module.codebook_size)
        return {
            "reconstruction": found.reconstruction.mean(),
            "kl": found.kl.mean(),
            "negative_elbo": negative,
            "bits_per_dimension": bits_per_dimension(negative, found.dimensions),
            "perplexity": perplexity,
            "usage": usage,
        }

    def validate(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        variables, images = {"params": params}, self._images(batch, key)
        logits, relaxed = self.module.apply(variables, images, key, self.recipe.temperature.end)
        sampled = self.module.apply(variables, sample_codes(key, logits), method="decode")
        found = dvae_elbo(images, logits, sampled, self.recipe.kl_weight.end)
        shown = self.module.apply(variables, jnp.argmax(logits, axis=-1), method="decode_codes")
        return {
            "loss": found.loss / found.dimensions,
            **self._terms(found, logits),
            "relaxed_negative_elbo": -dvae_elbo(images, logits, relaxed).value.mean(),
            "psnr": psnr(shown, images),
        }
