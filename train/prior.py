"""The diffusion prior: from a caption to the CLIP image embedding of a picture of it (Sec. 2.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.clip import CLIP, encode_captions
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.errors import InputError
from dalle2_jax.layers.pictures import resize, to_float
from dalle2_jax.prior import DiffusionPrior, caption_condition
from train.diffusion import DiffusionRecipe
from train.null import empty_caption, empty_tokens
from train.system import Batch, Parameters, check_share


@dataclass(frozen=True, kw_only=True)
class PriorRecipe(DiffusionRecipe):
    """Trains `module` on the frozen CLIP's embeddings; the caption is dropped with `text_drop` (10% in the paper)."""

    kind: ClassVar[str] = "prior"
    needs: ClassVar[tuple[str, ...]] = ("clip",)

    module: DiffusionPrior
    process: Process = Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=None)
    sampling: Sampling = Sampling(sampler="ddpm", steps="64", candidates=2)
    text_drop: float = 0.1
    clip: CLIP | None = field(default=None, metadata={"attached": True})
    empty: tuple[int, ...] = field(default=(), metadata={"attached": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("prior.text_drop", self.text_drop)

    def attach(self, stages: Mapping[str, Any]) -> tuple[PriorRecipe, Parameters]:
        clip = stages["clip"]
        embedding_size = clip.module.embedding_size
        if self.module.embedding_size != embedding_size:
            raise InputError(
                f"the prior predicts embeddings of size {self.module.embedding_size} but CLIP's have {embedding_size}; "
                f"set prior.module.embedding_size={embedding_size}"
            )
        return dataclasses.replace(self, clip=clip.module, empty=empty_tokens(clip)), {"clip": clip.params}

    @property
    def picture_size(self) -> int:
        return self.clip.vision.image_size

    def init(self, key: jax.Array) -> Parameters:
        text_embedding = jnp.zeros((1, self.module.embedding_size))
        length = self.module.context_length
        if self.module.vocabulary_size is None:
            text = jnp.zeros((1, length, self.clip.text.width))
        else:
            text = jnp.zeros((1, length), jnp.int32)
        timesteps, mask = jnp.zeros(1, jnp.int32), jnp.ones((1, length), bool)
        return self.module.init(key, text_embedding, timesteps, text_embedding, text, mask)["params"]

    def _conditions(self, batch: Batch, frozen: Parameters) -> tuple[jax.Array, EncodedCaptions]:
        """CLIP's embeddings of the images, and the encoded captions."""
        images = resize(to_float(batch["image"]), self.clip.vision.image_size)
        image_embedding = self.clip.apply({"params": frozen["clip"]}, images, method="encode_image")
        return image_embedding, encode_captions(self.clip, frozen["clip"], batch["tokens"], batch["mask"])

    def _dropped(self, captions: EncodedCaptions, keep: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        """The condition with the captions that are not kept left out: by the network, or made the empty caption."""
        condition = caption_condition(self.module, captions)
        if self.module.learned_null:
            return {**condition, "keep_text": keep}
        empty = caption_condition(self.module, empty_caption(self.clip, frozen["clip"], self.empty))

        def choose(one: jax.Array, null: jax.Array) -> jax.Array:
            return jnp.where(keep.reshape(-1, *(1,) * (one.ndim - 1)), one, jax.lax.stop_gradient(null))

        return jax.tree.map(choose, condition, empty)

    def task(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, training: bool):
        image_embedding, captions = jax.lax.stop_gradient(self._conditions(batch, frozen))
        drop_key, loss_key = jax.random.split(key)
        keep_text = jax.random.uniform(drop_key, image_embedding.shape[:1]) >= (self.text_drop if training else 0.0)
        condition = self._dropped(captions, keep_text, frozen)
        rngs = {"dropout": jax.random.fold_in(key, 2)}

        def denoiser(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
            return self.module.apply(
                {"params": params},
                x_t,
                timesteps,
                **condition,
                deterministic=not training,
                rngs=rngs,
            )

        return denoiser, self.module.scale_embedding(image_embedding), loss_key

    def describe(self) -> dict[str, Any]:
        told = super().describe()
        return {**told, "training": {**told["training"], "text_drop": self.text_drop}}
