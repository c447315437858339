"""An upsampler: from a small picture to a larger one, unconditional and trained on crops (Sec. 2.1, App. C)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.decoder import Upsampler, gaussian_blur, random_crop, sample_upsampler
from dalle2_jax.diffusion import Process, Sampling, diffusion_loss
from dalle2_jax.layers.pictures import resize, to_float, to_uint8
from train.system import Batch, Parameters, Recipe, check_share


@dataclass(frozen=True, kw_only=True)
class UpsamplerRecipe(Recipe):
    """Trains `module` from `low_size` to `module.unet.image_size` pixels on crops of `crop_fraction` of the side.

    The low-resolution picture is blurred (kernel 3, `blur_sigma`) with `blur_probability`, so that the decoder's
    softness is not new to the upsampler; the paper always blurs.
    """

    kind: ClassVar[str] = "upsampler"

    module: Upsampler
    low_size: int
    crop_fraction: float = 0.25
    blur_sigma: float = 0.6
    blur_probability: float = 1.0
    process: Process = Process(schedule="cosine", prediction="epsilon", variance="fixed_small", clip=1.0)
    sampling: Sampling = Sampling(sampler="ddim", steps="fast27")

    @property
    def size(self) -> int:
        """The side of the pictures it makes, in pixels."""
        return self.module.unet.image_size

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("upsampler.blur_probability", self.blur_probability)
        self.process.respaced(self.sampling.steps)
        if self.module.residual and self.process.prediction != "x0":
            raise ValueError(
                "a residual upsampler predicts x_0: set upsampler.process.prediction=x0, or "
                "upsampler.module.residual=false"
            )
        crop = self.low_size * self.crop_fraction
        if self.size % self.low_size or crop != int(crop) or crop < 1:
            raise ValueError(
                f"an upsampler from {self.low_size} to {self.size} pixels cannot train on {self.crop_fraction} "
                "of the side: the larger size must be a multiple of the smaller and the crop a whole number of pixels"
            )

    def init(self, key: jax.Array) -> Parameters:
        crop = int(self.low_size * self.crop_fraction)
        factor = self.size // self.low_size
        pictures, low = jnp.zeros((1, crop * factor, crop * factor, 3)), jnp.zeros((1, crop, crop, 3))
        return self.module.init(key, pictures, jnp.zeros(1, jnp.int32), low)["params"]

    def _pair(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        pictures = resize(to_float(batch["image"]), self.size)
        return pictures, resize(pictures, self.low_size)

    def _loss(self, params: Parameters, pictures: jax.Array, low: jax.Array, key: jax.Array, dropout: jax.Array | None):
        def denoiser(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
            rngs = None if dropout is None else {"dropout": dropout}
            arguments = (x_t, timesteps, low)
            return self.module.apply({"params": params}, *arguments, deterministic=dropout is None, rngs=rngs)

        loss, _ = diffusion_loss(key, denoiser, pictures, self.process, kind="simple")
        return loss.mean()

    def loss(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters):
        keys = dict(zip(("crop", "blur", "loss", "dropout"), jax.random.split(key, 4), strict=True))
        pictures, low = self._pair(batch)
        blurred = jax.random.uniform(keys["blur"], (low.shape[0], 1, 1, 1)) < self.blur_probability
        low = jnp.where(blurred, gaussian_blur(low, self.blur_sigma), low)
        pictures, low = random_crop(keys["crop"], pictures, low, int(self.size * self.crop_fraction))
        return self._loss(params, pictures, low, keys["loss"], keys["dropout"]), {}

    def validate(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        pictures, low = self._pair(batch)
        return {"loss": self._loss(params, pictures, low, key, None)}

    def preview(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> jax.Array:
        """Enlarges real small pictures."""
        _, low = self._pair(batch)
        keys = jax.random.split(key, low.shape[0])
        return to_uint8(sample_upsampler(keys, self.module, params, self.process, self.sampling, low, self.size))

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "module": self.module,
            "process": self.process,
            "sampling": self.sampling,
            "image_size": self.size,
            "low_size": self.low_size,
        }
