"""CLIP: images and captions tied by a contrastive loss over the global batch (Sec. 2; Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.clip import CLIP, contrastive_loss
from dalle2_jax.errors import InputError
from dalle2_jax.layers.pixels import resize, to_float
from train.config.recipe import Batch, BatchSpec, Parameters, Recipe, Task, check_share
from train.recipes.augment import random_grayscale, random_shift


@dataclass(frozen=True, kw_only=True)
class ClipRecipe(Recipe):
    """Trains `module` on images that are shifted and sometimes shown in gray.

    shift: the largest random translation, in pixels of CLIP's own input. grayscale: how often an image loses its
    colour, so that shapes are learned apart from the colours they came in (an option of open_clip's training too).
    chunk: of the loss (`contrastive_loss`), for large batches.
    """

    kind: ClassVar[str] = "clip"
    training_fields: ClassVar[tuple[str, ...]] = ("shift", "grayscale")

    module: CLIP
    shift: int = 0
    grayscale: float = 0.0
    chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("clip.grayscale", self.grayscale)
        micro = self.batch_size // self.optimizer.accumulation
        if micro < 2:
            raise InputError(
                f"clip.batch_size is {self.batch_size} in {self.optimizer.accumulation} micro-batches: of {micro}, in "
                "which there is no other caption to tell an image's from; they must have 2 examples or more"
            )
        if self.chunk is not None and (self.chunk < 1 or micro % self.chunk):
            raise InputError(f"clip.chunk is {self.chunk}, which does not divide a (micro-)batch of {micro}")

    def build(self, stages: Mapping[str, LoadedStage]) -> ClipTask:
        return ClipTask(recipe=self)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "image_size": self.module.vision.image_size}


@dataclass(frozen=True, kw_only=True)
class ClipTask(Task):
    """Ties the images of a batch to its captions."""

    recipe: ClipRecipe

    @property
    def batch_spec(self) -> BatchSpec:
        return BatchSpec(image_size=self.module.vision.image_size)

    def init(self, key: jax.Array) -> Parameters:
        size, length = self.module.vision.image_size, self.module.text.context_length
        images = jnp.zeros((1, size, size, 3))
        tokens = jnp.zeros((1, length), jnp.int32)
        return self.module.init(key, images, tokens, jnp.ones((1, length), bool))["params"]

    def _contrast(self, params: Parameters, batch: Batch, images: jax.Array):
        image, text, logit_scale = self.module.apply({"params": params}, images, batch["tokens"], batch["mask"])
        loss, metrics = contrastive_loss(image, text, logit_scale, self.recipe.chunk)
        return loss, {**metrics, "logit_scale": logit_scale}

    def loss(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, extra: None):
        images = resize(to_float(batch["image"]), self.module.vision.image_size)
        shift_key, gray_key = jax.random.split(key)
        if self.recipe.shift:
            images = random_shift(shift_key, images, self.recipe.shift)
        if self.recipe.grayscale:
            images = random_grayscale(gray_key, images, self.recipe.grayscale)
        return *self._contrast(params, batch, images), None

    def validate(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        images = resize(to_float(batch["image"]), self.module.vision.image_size)
        loss, metrics = self._contrast(params, batch, images)
        return {"loss": loss, **metrics}
