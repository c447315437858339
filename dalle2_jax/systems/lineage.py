"""The systems of the lineage, one class a kind of stage: what one call samples, and what else each one can do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.errors import InputError
from dalle2_jax.images.resize import squares
from dalle2_jax.layers.pixels import in_colour, to_float
from dalle2_jax.lineage.autoencoder import reconstruct, sample_autoencoder
from dalle2_jax.lineage.dalle1_sampling import sample_dalle1
from dalle2_jax.lineage.ddpm import sample_ddpm
from dalle2_jax.lineage.gan import sample_gan
from dalle2_jax.lineage.vae import sample_vae
from dalle2_jax.systems.model import ImageModel
from dalle2_jax.systems.sequences import SequenceModel
from dalle2_jax.unclip.sample import Call
from dalle2_jax.unclip.settings import process_of, sampling_of


@partial(jax.jit, static_argnames="module")
def _sample_vae(keys, params, *, module):
    return sample_vae(keys, module, params, len(keys))


@partial(jax.jit, static_argnames="module")
def _sample_autoencoder(keys, params, mean, covariance, *, module):
    return sample_autoencoder(keys, module, params, mean, covariance, len(keys))


@partial(jax.jit, static_argnames="module")
def _sample_gan(keys, params, *, module):
    return sample_gan(keys, module, params, len(keys))


@partial(jax.jit, static_argnames=("module", "process"))
def _sample_ddpm(keys, params, labels, captions, sampling, *, module, process):
    return sample_ddpm(keys, module, params, process, sampling, len(keys), labels, captions)


@partial(jax.jit, static_argnames=("module", "dvae"))
def _sample_dalle1(keys, params, dvae_params, tokens, mask, sampling, *, module, dvae):
    codes = sample_dalle1(keys, module, params, tokens, mask, sampling)
    return dvae.apply({"params": dvae_params}, codes, method="decode_codes")


@partial(jax.jit, static_argnames="module")
def _reconstruct(params, images, *, module):
    return reconstruct(module, params, images)


class Reconstructs(ImageModel):
    """A system that encodes images and decodes them again."""

    def reconstruct(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images encoded and decoded, uint8 `[b, h, w, 3]`; images: uint8 `[h, w, 3]` each, of any size, of which the
        central square is seen."""
        size, channels = self.image_size, self.stage.module.channels
        pixels = to_float(jnp.asarray(squares(images, size)))
        if channels == 1:
            pixels = pixels.mean(-1, keepdims=True)
        return np.asarray(in_colour(_reconstruct(self.stage.params, pixels, module=self.stage.module)))


class GANModel(ImageModel):
    """Images of the generator's noise."""

    def call(self, keys: jax.Array, captions: None = None, **changes: Any) -> Call[jax.Array]:
        return Call(_sample_gan, (keys, self.stage.params), {"module": self.stage.module})


class VAEModel(Reconstructs):
    """Images of latents from the prior N(0, I): the means of p(x | z)."""

    def call(self, keys: jax.Array, captions: None = None, **changes: Any) -> Call[jax.Array]:
        return Call(_sample_vae, (keys, self.stage.params), {"module": self.stage.module})


class AutoencoderModel(Reconstructs):
    """Images of latents from a normal distribution with the moments of held-out images' latents, since an autoencoder
    has no prior of its own (Ghosh et al. 2020, "ex-post density estimation")."""

    def call(self, keys: jax.Array, captions: None = None, **changes: Any) -> Call[jax.Array]:
        measured = self.stage.record.measured
        moments = (jnp.asarray(measured[name], jnp.float32) for name in ("latent_mean", "latent_square"))
        return Call(_sample_autoencoder, (keys, self.stage.params, *moments), {"module": self.stage.module})


class DDPMModel(ImageModel):
    """Images by the stage's sampler, of captions or of classes ("0", "1", ...) where it is conditional on them."""

    @property
    def reads_captions(self) -> bool:
        return self.stage.module.condition != "none"

    def encode(self, captions: Sequence[str], *, strict: bool = False, warn: bool = True) -> Any:
        if self.stage.module.condition == "caption":
            return EncodedCaptions(*super().encode(captions, strict=strict, warn=warn))
        classes = self.stage.module.num_classes
        for caption in captions:
            if not (caption.isascii() and caption.isdigit() and int(caption) < classes):
                raise InputError(
                    f"{caption!r} is no class of the stage {self.stage.name}; its classes are 0 to {classes - 1}"
                )
        return np.asarray([int(caption) for caption in captions], np.int32)

    def call(self, keys: jax.Array, captions: Any = None, **changes: Any) -> Call[jax.Array]:
        is_class = self.stage.module.condition == "class"
        labels, captions = (captions, None) if is_class else (None, captions)
        sampling = sampling_of(self.stage, changes).turned()
        arguments = (keys, self.stage.params, labels, captions, sampling)
        return Call(_sample_ddpm, arguments, {"module": self.stage.module, "process": process_of(self.stage)})


class DVAEModel(Reconstructs):
    """Images to codes and back. It samples no images by itself: which codes make one, DALL-E 1's transformer knows."""

    def call(self, keys: jax.Array, captions: None = None, **changes: Any) -> Call[jax.Array]:
        raise InputError(
            f"the stage {self.stage.name} encodes images as codes and samples none; sample from a stage of the kind "
            "'dalle1' that is built on it"
        )


class DALLE1Model(ImageModel):
    """Codes of captions by the transformer, decoded by the dVAE; with a CLIP in the run, the best of several by it."""

    needs = ("dvae",)
    takes = ("clip",)
    reads_captions = True

    def call(self, keys: jax.Array, captions: Any = None, **changes: Any) -> Call[jax.Array]:
        dvae = self.others["dvae"]
        tokens, mask = captions
        sampling = sampling_of(self.stage, changes).turned()
        arguments = (keys, self.stage.params, dvae.params, jnp.asarray(tokens), jnp.asarray(mask), sampling)
        return Call(_sample_dalle1, arguments, {"module": self.stage.module, "dvae": dvae.module})

    @property
    def image_size(self) -> int:
        return self.others["dvae"].record.image_size


SYSTEMS: dict[str, type[ImageModel] | type[SequenceModel]] = {
    "gan": GANModel,
    "autoencoder": AutoencoderModel,
    "vae": VAEModel,
    "ddpm": DDPMModel,
    "encoder_decoder": SequenceModel,
    "dvae": DVAEModel,
    "dalle1": DALLE1Model,
}
