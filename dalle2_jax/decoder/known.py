"""What is known of images that are to be painted in."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Known:
    """Images, and where they are known; a pytree.

    image: float32 `[b, h, w, 3]` in [-1, 1], of any values where it is not known. mask: bool `[b, h, w, 1]`, True where
    it is.
    """

    image: jax.Array
    mask: jax.Array

    def channels(self) -> jax.Array:
        """What an inpainting network reads, `[b, h, w, 4]`: the image, zero where it is not known, and the mask.

        GLIDE, glide_text2im/text2im_model.py, `InpaintText2ImUNet`.
        """
        image = self.image.astype(jnp.float32)
        return jnp.concatenate([jnp.where(self.mask, image, 0.0), self.mask.astype(jnp.float32)], axis=-1)
