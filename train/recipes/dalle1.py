"""DALL-E 1's transformer, over captions and the codes that a trained dVAE gives their images (Ramesh et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.errors import InputError
from dalle2_jax.layers.pixels import in_colour
from dalle2_jax.lineage.dalle1 import DALLE1, TEXT_WEIGHT, Losses, dalle1_loss
from dalle2_jax.lineage.dalle1_sampling import DALLE1Sampling, sample_dalle1
from dalle2_jax.lineage.dvae import DVAE
from train.config.recipe import Batch, BatchSpec, Parameters, Recipe, Task, check_share
from train.recipes.augment import training_images


@dataclass(frozen=True, kw_only=True)
class DALLE1Recipe(Recipe):
    """Trains `module` on captions and the codes of their images, as the frozen dVAE finds them.

    text_weight: of the text's cross-entropy in the loss. text_drop: how often a caption gives way to the empty one, for
    guidance; the paper has none. sampling: what the stage records as its defaults. The paper's 10% of BPE dropout is
    not taken: captions are encoded once.
    """

    kind: ClassVar[str] = "dalle1"
    needs: ClassVar[tuple[str, ...]] = ("dvae",)
    training_fields: ClassVar[tuple[str, ...]] = ("text_weight", "text_drop")

    module: DALLE1
    sampling: DALLE1Sampling = DALLE1Sampling()
    text_weight: float = TEXT_WEIGHT
    text_drop: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("dalle1.text_weight", self.text_weight)
        check_share("dalle1.text_drop", self.text_drop)

    def build(self, stages: Mapping[str, LoadedStage]) -> DALLE1Task:
        dvae = stages["dvae"]
        for name in ("codebook_size", "grid"):
            own, other = getattr(self.module, name), getattr(dvae.module, name)
            if own != other:
                raise InputError(
                    f"dalle1.module.{name} is {own} and the dVAE's is {other}; set dalle1.module.{name}={other}"
                )
        return DALLE1Task(recipe=self, dvae=dvae.module, frozen={"dvae": dvae.params})

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "sampling": self.sampling}


@dataclass(frozen=True, kw_only=True)
class DALLE1Task(Task):
    """Metrics: text_loss and image_loss, in nats a token. Previews are sampled under the batch's captions."""

    recipe: DALLE1Recipe
    dvae: DVAE

    @property
    def batch_spec(self) -> BatchSpec:
        return BatchSpec(image_size=self.dvae.image_size)

    def init(self, key: jax.Array) -> Parameters:
        length, side = self.module.context_length, self.module.grid
        tokens, codes = jnp.zeros((1, length), jnp.int32), jnp.zeros((1, side, side), jnp.int32)
        return self.module.init(key, tokens, jnp.ones(tokens.shape, bool), codes)["params"]

    def loss(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, extra: None):
        losses = self._losses(params, batch, key, frozen, training=True)
        return losses.loss, {"text_loss": losses.text, "image_loss": losses.image}, extra

    def validate(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        losses = self._losses(params, batch, key, frozen, training=False)
        return {"loss": losses.loss, "text_loss": losses.text, "image_loss": losses.image}

    def preview(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> jax.Array:
        codes = sample_dalle1(key, self.module, params, batch["tokens"], batch["mask"], self.recipe.sampling)
        return in_colour(self.dvae.apply({"params": frozen["dvae"]}, codes, method="decode_codes"))

    def _losses(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, training: bool) -> Losses:
        drop_key, dropout_key = jax.random.split(key)
        images = training_images(batch["image"], self.dvae.image_size, self.dvae.channels)
        codes = self.dvae.apply({"params": frozen["dvae"]}, images, method="encode")
        tokens, drop = batch["tokens"], self.recipe.text_drop if training else 0.0
        keep = jax.random.uniform(drop_key, tokens.shape[:1]) >= drop
        mask = batch["mask"] & keep[:, None]
        rngs = {"dropout": dropout_key}
        logits = self.module.apply({"params": params}, tokens, mask, codes, deterministic=not training, rngs=rngs)
        return dalle1_loss(logits, tokens, mask, codes, self.recipe.text_weight)
