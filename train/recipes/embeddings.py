"""The frozen CLIP that prior and decoder are built on: its embeddings of a batch, and of the empty caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.clip import CLIP, encode_captions
from dalle2_jax.layers.pixels import resize, to_float
from dalle2_jax.tokenizer import tokenizer_from_json
from train.config.recipe import Batch


@dataclass(frozen=True)
class FrozenClip:
    """CLIP as later stages read it; where embeddings come from somewhere else, another class with these methods.

    empty: the empty caption in the run's tokens, without padding, which stands for a dropped one where a network has
    learned no null caption (Karlo, Kandinsky); () where CLIP is only planned.
    """

    module: CLIP
    empty: tuple[int, ...] = ()

    @classmethod
    def of(cls, stage: LoadedStage) -> FrozenClip:
        """That of a CLIP stage, trained or planned."""
        if stage.record.tokenizer is None:
            return cls(stage.module)
        tokens, mask = tokenizer_from_json(stage.record.tokenizer).empty()
        return cls(stage.module, tuple(tokens[mask].tolist()))

    @property
    def image_size(self) -> int:
        """The side of the images that it reads."""
        return self.module.vision.image_size

    def embed_images(self, params: Any, batch: Batch) -> jax.Array:
        """The image embeddings `[b, z]` of a batch."""
        images = resize(to_float(batch["image"]), self.image_size)
        return self.module.apply({"params": params}, images, method="encode_image")

    def encode_captions(self, params: Any, batch: Batch) -> EncodedCaptions:
        """The captions of a batch."""
        return encode_captions(self.module, params, batch["tokens"], batch["mask"])

    def empty_caption(self, params: Any) -> EncodedCaptions:
        """The empty caption, a batch of one."""
        length, count = self.module.text.context_length, len(self.empty)
        row = jnp.zeros((1, length), jnp.int32).at[0, :count].set(jnp.asarray(self.empty, jnp.int32))
        return encode_captions(self.module, params, row, (jnp.arange(length) < max(count, 1))[None])
