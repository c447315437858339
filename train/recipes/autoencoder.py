"""The autoencoder and the VAE, on images without captions (Kingma and Welling 2014)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.errors import InputError
from dalle2_jax.layers.pixels import in_colour
from dalle2_jax.lineage.autoencoder import Autoencoder, autoencoder_loss, latent_moments, reconstruct
from dalle2_jax.lineage.vae import VAE, active_units, bits_per_dimension, elbo, importance_bound
from train.config.recipe import Batch, BatchSpec, Parameters, Recipe, Task
from train.recipes.augment import training_images

BINARISE = (None, "sample", "threshold")


@dataclass(frozen=True, kw_only=True)
class LatentRecipe(Recipe):
    """What both have in common: images of the module's size, grey where it has one channel."""

    reads_captions: ClassVar[bool] = False

    module: Autoencoder | VAE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.module.channels not in (1, 3):
            raise InputError(
                f"{self.kind}.module.channels is {self.module.channels}; it must be 1 (grey) or 3 (colour)"
            )

    @property
    def output_size(self) -> int:
        return self.module.image_size

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "image_size": self.module.image_size}


@dataclass(frozen=True, kw_only=True)
class LatentTask(Task):
    """Images in, and as previews their reconstructions, each beside its own image, out."""

    recipe: LatentRecipe

    @property
    def batch_spec(self) -> BatchSpec:
        return BatchSpec(image_size=self.module.image_size, captions=False)

    def _images(self, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """What is learned: `[b, h, w, c]` in [-1, 1], of 256 levels."""
        return training_images(batch["image"], self.module.image_size, self.module.channels)

    def preview(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> jax.Array:
        return in_colour(reconstruct(self.module, params, self._images(batch, key)))


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe(LatentRecipe):
    """Trains `module` to give back its input; the loss is the module's `loss_kind`."""

    kind: ClassVar[str] = "autoencoder"

    module: Autoencoder

    def build(self, stages: Mapping[str, LoadedStage]) -> AutoencoderTask:
        return AutoencoderTask(recipe=self)


@dataclass(frozen=True, kw_only=True)
class AutoencoderTask(LatentTask):
    """Metrics: psnr, of the reconstructions in dB."""

    recipe: AutoencoderRecipe

    def init(self, key: jax.Array) -> Parameters:
        size = self.module.image_size
        return self.module.init(key, jnp.zeros((1, size, size, self.module.channels)))["params"]

    def loss(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, extra: None):
        found = self.validate(params, batch, key, frozen)
        return found.pop("loss"), found, extra

    def validate(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        images, variables = self._images(batch, key), {"params": params}
        latent = self.module.apply(variables, images, method="encode")
        outputs = self.module.apply(variables, latent, method="outputs")
        shown = self.module.apply(variables, latent, method="decode")
        loss = autoencoder_loss(outputs, images, self.module.loss_kind).mean()
        return {"loss": loss, "psnr": psnr(shown, images)}

    def measure(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        """The moments of the latents, from which images can be sampled (`sample_autoencoder`)."""
        latent = self.module.apply({"params": params}, self._images(batch, key), method="encode")
        mean, square = latent_moments(latent)
        return {"latent_mean": mean, "latent_square": square}


@dataclass(frozen=True, kw_only=True)
class VAERecipe(LatentRecipe):
    """Trains `module` on the evidence lower bound; what the likelihood is, the module says.

    beta: of the KL divergence. free_bits: nats a latent dimension that cost nothing (`elbo`). binarise: what a
    Bernoulli likelihood is of: None: grey pixels, and the nats are no likelihood's; "sample": pixels that are 1 as
    often as they are bright, drawn anew in every step (Salakhutdinov and Murray 2008); "threshold": pixels that are 1
    above one half. The nats of these do not compare. importance_samples: of the bound in validation.
    """

    kind: ClassVar[str] = "vae"
    training_fields: ClassVar[tuple[str, ...]] = ("beta", "free_bits", "binarise", "importance_samples")

    module: VAE
    beta: float = 1.0
    free_bits: float = 0.0
    binarise: str | None = None
    importance_samples: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "free_bits"):
            if not getattr(self, name) >= 0:
                raise InputError(f"vae.{name} is {getattr(self, name)}; it must be 0 or more")
        if self.binarise not in BINARISE:
            raise InputError(f"vae.binarise is {self.binarise!r}; it must be None, sample or threshold")
        if self.binarise and self.module.likelihood != "bernoulli":
            raise InputError(
                f"vae.binarise is {self.binarise!r} and the likelihood {self.module.likelihood!r}; set "
                "vae.module.likelihood=bernoulli, or vae.binarise=None"
            )
        if self.importance_samples < 1:
            raise InputError(f"vae.importance_samples is {self.importance_samples}; it must be 1 or more")

    def build(self, stages: Mapping[str, LoadedStage]) -> VAETask:
        return VAETask(recipe=self)


@dataclass(frozen=True, kw_only=True)
class VAETask(LatentTask):
    """Metrics, an image unless said otherwise: reconstruction (-log p(x | z)), kl and their sum negative_elbo, in nats;
    the latter also in bits_per_dimension; active_units; psnr, of the means of p(x | z), in dB. In validation also
    importance_bound, in nats and negative as the others, so that less is better."""

    recipe: VAERecipe

    def init(self, key: jax.Array) -> Parameters:
        size = self.module.image_size
        return self.module.init(key, jnp.zeros((1, size, size, self.module.channels)), key)["params"]

    def _images(self, batch: Batch, key: jax.Array) -> jax.Array:
        images = super()._images(batch, key)
        if self.recipe.binarise is None:
            return images
        level = 0.0
        if self.recipe.binarise == "sample":
            level = jax.random.uniform(key, images.shape, minval=-1.0, maxval=1.0)
        return jnp.where(images > level, 1.0, -1.0)

    def loss(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, extra: None):
        images_key, latent_key = jax.random.split(key)
        images = self._images(batch, images_key)
        mean, log_variance, likelihood = self.module.apply({"params": params}, images, latent_key)
        found = elbo(images, mean, log_variance, likelihood, self.recipe.beta, self.recipe.free_bits)
        negative = -found.value.mean()
        return (
            found.loss,
            {
                "reconstruction": found.reconstruction.mean(),
                "kl": found.kl.mean(),
                "negative_elbo": negative,
                "bits_per_dimension": bits_per_dimension(negative, found.dimensions),
                "active_units": active_units(mean),
                "psnr": psnr(likelihood.images, images),
            },
            extra,
        )

    def validate(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        loss_key, bound_key = jax.random.split(key)
        loss, metrics, _ = self.loss(params, batch, loss_key, frozen, None)
        images = self._images(batch, jax.random.split(loss_key)[0])  # those of the loss
        variables = {"params": params}
        posterior = self.module.apply(variables, images, method="encode")

        def decode(latent: jax.Array):
            return self.module.apply(variables, latent, method="decode")

        bound = importance_bound(bound_key, images, *posterior, decode, self.recipe.importance_samples)
        return {"loss": loss, **metrics, "importance_bound": -bound.mean()}


def psnr(images: jax.Array, reference: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], over the mean squared error of the whole batch."""
    error = jnp.mean(jnp.square(images - reference))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(error, 1e-12))
