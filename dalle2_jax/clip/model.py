"""CLIP itself: two encoders, projected into one space and compared by cosine at a learned temperature."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.clip.text import TextTransformer
from dalle2_jax.clip.vision import VisionTransformer
from dalle2_jax.errors import InputError
from dalle2_jax.layers.embedding import unit_norm


@jax.custom_vjp
def _clip_from_above(x: jax.Array, limit: float) -> jax.Array:
    return jnp.minimum(x, limit)


def _clip_forward(x: jax.Array, limit: float):
    return jnp.minimum(x, limit), x < limit


def _clip_backward(below: jax.Array, gradient: jax.Array):
    # At the limit only descent back below it passes, which is what clipping the parameter after each step does; a plain
    # minimum has no gradient there, and the temperature would never move again.
    return jnp.where(below, gradient, jnp.maximum(gradient, 0.0)), None


_clip_from_above.defvjp(_clip_forward, _clip_backward)


class CLIP(nn.Module):
    """Contrastive language-image pre-training (arXiv 2103.00020; unCLIP's own CLIP: App. C).

    Fields:
      vision, text: the two encoders; without `vision` it encodes captions alone.
      embedding_size: size of the joint space.
      initial_logit_scale: logarithm of the initial inverse temperature; the paper's is ln(1 / 0.07).
      max_logit_scale: the inverse temperature is clipped here (section 2.5).
      unit_norm: embeddings leave with unit norm. False: as they leave the projection, which is what Karlo's and
        Kandinsky's networks read; similarities are of unit vectors all the same.
      dtype, param_dtype: of the projections.
    """

    vision: VisionTransformer | None
    text: TextTransformer
    embedding_size: int
    initial_logit_scale: float = math.log(1 / 0.07)
    max_logit_scale: float = 100.0
    unit_norm: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"

    def setup(self):
        def projection(width: int) -> nn.Dense:
            return nn.Dense(
                self.embedding_size,
                use_bias=False,
                kernel_init=nn.initializers.normal(width**-0.5),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )

        if self.vision is not None:
            self.image_projection = projection(self.vision.width)
        self.text_projection = projection(self.text.width)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.initial_logit_scale), ())

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Embeds images, float `[batch, image_size, image_size, 3]` in [-1, 1].

        Returns:
          float32 `[batch, embedding_size]`, with unit norm if `unit_norm`.

        Raises:
          InputError: if the images have another size or are not floats, or this CLIP has no image encoder.
        """
        if self.vision is None:
            raise InputError("this CLIP reads captions alone; take one with an image encoder")
        return self._leaving(self.image_projection(self.vision(images)))

    def encode_text(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embeds captions, int32 `[batch, length]` with a bool `mask` (True for real tokens).

        Returns:
          float32 `[batch, embedding_size]`, with unit norm if `unit_norm`, and the states of all tokens,
          `[batch, length, text width]`, of which those at padding mean nothing.

        Raises:
          InputError: if the captions are longer than the context.
        """
        pooled, states = self.text(tokens, mask)
        return self._leaving(self.text_projection(pooled)), states

    def _leaving(self, embedding: jax.Array) -> jax.Array:
        return unit_norm(embedding) if self.unit_norm else embedding.astype(jnp.float32)

    def __call__(self, images: jax.Array, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Embeds images and captions.

        Returns:
          Unit image embeddings and unit text embeddings, float32 `[batch, embedding_size]` each, and the inverse
          temperature, a float32 scalar of at most `max_logit_scale`.
        """
        logit_scale = jnp.exp(_clip_from_above(self.logit_scale, math.log(self.max_logit_scale)))
        return unit_norm(self.encode_image(images)), unit_norm(self.encode_text(tokens, mask)[0]), logit_scale
