"""The diffusion prior: from a caption to the CLIP image embedding of an image of it (Sec. 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions, keep_or_empty
from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.errors import InputError
from dalle2_jax.prior import DiffusionPrior, caption_condition
from train.config.recipe import Batch, BatchSpec, Parameters, check_share
from train.recipes.diffusion import DiffusionRecipe, DiffusionTask
from train.recipes.embeddings import FrozenClip


@dataclass(frozen=True, kw_only=True)
class PriorRecipe(DiffusionRecipe):
    """Trains `module` on the frozen CLIP's embeddings; the caption is dropped with `text_drop` (10% in the paper)."""

    kind: ClassVar[str] = "prior"
    needs: ClassVar[tuple[str, ...]] = ("clip",)
    training_fields: ClassVar[tuple[str, ...]] = (*DiffusionRecipe.training_fields, "text_drop")

    module: DiffusionPrior
    process: Process = Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=None)
    sampling: Sampling = Sampling(sampler="ddpm", steps="64", candidates=2)
    text_drop: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("prior.text_drop", self.text_drop)

    def build(self, stages: Mapping[str, LoadedStage]) -> PriorTask:
        clip = stages["clip"]
        embedding_size = clip.module.embedding_size
        if self.module.embedding_size != embedding_size:
            raise InputError(
                f"the prior predicts embeddings of size {self.module.embedding_size} but CLIP's have {embedding_size}; "
                f"set prior.module.embedding_size={embedding_size}"
            )
        return PriorTask(recipe=self, clip=FrozenClip.of(clip), frozen={"clip": clip.params})


@dataclass(frozen=True, kw_only=True)
class PriorTask(DiffusionTask):
    """Restores CLIP's image embeddings under CLIP's reading of the captions."""

    recipe: PriorRecipe
    clip: FrozenClip

    @property
    def batch_spec(self) -> BatchSpec:
        return BatchSpec(image_size=self.clip.image_size)

    def init(self, key: jax.Array) -> Parameters:
        module, length = self.module, self.module.context_length
        text_embedding = jnp.zeros((1, module.embedding_size))
        if module.vocabulary_size is None:
            text = jnp.zeros((1, length, self.clip.module.text.width))
        else:
            text = jnp.zeros((1, length), jnp.int32)
        timesteps, mask = jnp.zeros(1, jnp.int32), jnp.ones((1, length), bool)
        return module.init(key, text_embedding, timesteps, text_embedding, text, mask)["params"]

    def _conditions(self, captions: EncodedCaptions, keep: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        """The condition with the captions that are not kept left out: by the network, or made the empty caption."""
        condition = caption_condition(self.module, captions)
        if not self.module.needs_empty_caption:
            return {**condition, "keep_text": keep}
        empty = caption_condition(self.module, self.clip.empty_caption(frozen["clip"]))
        return keep_or_empty(keep, condition, jax.lax.stop_gradient(empty))

    def denoising(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, training: bool):
        image_embedding = jax.lax.stop_gradient(self.clip.embed_images(frozen["clip"], batch))
        captions = jax.lax.stop_gradient(self.clip.encode_captions(frozen["clip"], batch))
        drop_key, loss_key, dropout_key = jax.random.split(key, 3)
        drop = self.recipe.text_drop if training else 0.0
        condition = self._conditions(captions, jax.random.uniform(drop_key, image_embedding.shape[:1]) >= drop, frozen)

        def denoiser(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
            rngs = {"dropout": dropout_key}
            return self.module.apply(
                {"params": params}, x_t, timesteps, **condition, deterministic=not training, rngs=rngs
            )

        return denoiser, self.module.scale_embedding(image_embedding), loss_key
