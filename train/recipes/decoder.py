"""The decoder: from a CLIP image embedding and a caption to a small image (Sec. 2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.decoder import Caption, Decoder, caption_for, sample_decoder
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.layers.pixels import resize, to_float, to_uint8
from train.config.recipe import Batch, BatchSpec, Parameters, check_share
from train.recipes.diffusion import DiffusionRecipe, DiffusionTask
from train.recipes.embeddings import FrozenClip
from train.recipes.masks import random_known, without_known


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe(DiffusionRecipe):
    """Trains `module` with its conditions dropped independently; the defaults (10% and 50%) are the paper's.

    image_drop, text_drop: how often the embedding and the caption are withheld. embedding_noise:
    standard deviation of gaussian noise, relative to the embedding's norm, that teaches the decoder to bear the prior's
    errors; the paper has none. mask_full: of a decoder that sees what is known of an image (`module.inpainting`), how
    often that is nothing; what is known else is random (`train.recipes.masks`).
    """

    kind: ClassVar[str] = "decoder"
    needs: ClassVar[tuple[str, ...]] = ("clip",)
    training_fields: ClassVar[tuple[str, ...]] = (
        *DiffusionRecipe.training_fields,
        "image_drop",
        "text_drop",
        "embedding_noise",
        "mask_full",
    )

    module: Decoder
    process: Process = Process(schedule="cosine", prediction="epsilon", variance="learned_range", clip=1.0)
    sampling: Sampling = Sampling(sampler="ddpm", steps="250", guidance_scale=1.25)
    loss_kind: str = "hybrid"
    image_drop: float = 0.1
    text_drop: float = 0.5
    embedding_noise: float = 0.0
    mask_full: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("decoder.image_drop", self.image_drop)
        check_share("decoder.text_drop", self.text_drop)
        check_share("decoder.mask_full", self.mask_full)

    @property
    def output_size(self) -> int:
        return self.module.unet.image_size

    def build(self, stages: Mapping[str, LoadedStage]) -> DecoderTask:
        clip = stages["clip"]
        return DecoderTask(recipe=self, clip=FrozenClip.of(clip), frozen={"clip": clip.params})

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "image_size": self.module.unet.image_size}


@dataclass(frozen=True, kw_only=True)
class DecoderTask(DiffusionTask):
    """Restores images under CLIP's embeddings of them and the captions."""

    recipe: DecoderRecipe
    clip: FrozenClip

    @property
    def batch_spec(self) -> BatchSpec:
        return BatchSpec(image_size=max(self.clip.image_size, self.module.unet.image_size))

    def init(self, key: jax.Array) -> Parameters:
        size = self.module.unet.image_size
        embedding = jnp.zeros((1, self.clip.module.embedding_size))
        length = self.clip.module.text.context_length
        text = None
        if self.module.text is not None:
            text = jnp.zeros((1, length), jnp.int32)
        elif self.module.text_width is not None:
            text = jnp.zeros((1, length, self.clip.module.text.width))
        mask = None if text is None else jnp.ones((1, length), bool)
        images, timesteps = jnp.zeros((1, size, size, 3)), jnp.zeros(1, jnp.int32)
        pooled = {"text_embedding": embedding} if self.module.pools_embedding else {}
        inputs = key, images, timesteps, embedding, text, mask
        if not self.module.inpainting:
            return self.module.init(*inputs, **pooled)["params"]
        params = self.module.init(*inputs, **pooled, known=jnp.zeros((1, size, size, 4)))["params"]
        return without_known(params, self.module.unet)

    def _conditions(self, batch: Batch, frozen: Parameters, keep_text: jax.Array) -> tuple[jax.Array, Caption]:
        """CLIP's embeddings of the images, and what the decoder reads of the captions."""
        params = frozen["clip"]
        captions = EncodedCaptions(batch["tokens"], batch["mask"])
        if self.module.text_width is not None:
            captions = self.clip.encode_captions(params, batch)
        empty = self.clip.empty_caption(params) if self.module.needs_empty_caption else None
        return self.clip.embed_images(params, batch), caption_for(self.module, captions, keep_text, empty)

    def denoising(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, training: bool):
        names = ("image", "text", "noise", "loss", "dropout", *(("known",) if self.module.inpainting else ()))
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        recipe = self.recipe
        text_drop, image_drop = (recipe.text_drop, recipe.image_drop) if training else (0.0, 0.0)
        keep_text = jax.random.uniform(keys["text"], batch["tokens"].shape[:1]) >= text_drop
        embedding, caption = jax.lax.stop_gradient(self._conditions(batch, frozen, keep_text))
        if training and recipe.embedding_noise:
            norm = jnp.linalg.norm(embedding, axis=-1, keepdims=True)  # not one, where public weights read others
            noise = jax.random.normal(keys["noise"], embedding.shape) * norm / embedding.shape[-1] ** 0.5
            embedding = embedding + recipe.embedding_noise * noise
            embedding = embedding * norm / jnp.linalg.norm(embedding, axis=-1, keepdims=True)
        keep_image = jax.random.uniform(keys["image"], keep_text.shape) >= image_drop
        images, known = self._images(batch), {}
        if self.module.inpainting:
            known["known"] = random_known(keys["known"], images, recipe.mask_full).channels()

        def denoiser(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
            return self.module.apply(
                {"params": params},
                x_t,
                timesteps,
                image_embedding=embedding,
                keep_image=keep_image,
                **caption.condition(caption.keep),
                **known,
                deterministic=not training,
                rngs={"dropout": keys["dropout"]},
            )

        return denoiser, images, keys["loss"]

    def _images(self, batch: Batch) -> jax.Array:
        return resize(to_float(batch["image"]), self.module.unet.image_size)

    def preview(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> jax.Array:
        """Decodes the embeddings of real images, so that it shows the decoder alone; paints them in where it can."""
        conditions = self._conditions(batch, frozen, jnp.ones(batch["image"].shape[0], bool))
        settings = self.recipe.process, self.recipe.preview_sampling
        known = None
        if self.module.inpainting:
            known_key, key = jax.random.split(key)
            known = random_known(known_key, self._images(batch), self.recipe.mask_full)
        return to_uint8(sample_decoder(key, self.module, params, *settings, *conditions, known=known))
