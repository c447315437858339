"""CLIP's image encoder: a vision transformer with a class token and norms before and after the blocks."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError
from dalle2_jax.layers.mesh_axes import check_mesh_axes
from dalle2_jax.layers.remat import Remat
from dalle2_jax.layers.transformer import LayerNorm, Transformer


class VisionTransformer(nn.Module):
    """The ViT of CLIP (its paper's section 2.4; OpenAI's clip/model.py).

    Fields:
      image_size: height and width of the images.
      patch_size: height and width of a patch; must divide `image_size`.
      width, depth, heads, mlp_ratio, activation, epsilon, scan_layers, remat, dtype, param_dtype: as in
        `Transformer`.
      mean, std: per channel, for images in [0, 1]; public CLIPs have their own, the default leaves [-1, 1] as it is.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    epsilon: float = 1e-5
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    scan_layers: bool = True
    remat: Remat = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Encodes images.

        Args:
          images: float `[batch, image_size, image_size, 3]` in [-1, 1].

        Returns:
          `[batch, width]`, the normalised final state of the class token.

        Raises:
          InputError: if the images have another size or are not floats, or `patch_size` does not divide `image_size`.
        """
        x = self._patches(images)
        init = nn.initializers.normal
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # A convolution whose stride is its kernel is a matrix product over flattened patches.
        x = nn.Dense(
            self.width, use_bias=False, kernel_init=init(x.shape[-1] ** -0.5), name="patch_embedding", **dtypes
        )(x)
        position_init = init(self.width**-0.5)
        class_token = self.param("class_token", position_init, (self.width,), self.param_dtype)
        positions = self.param("positions", position_init, (x.shape[1] + 1, self.width), self.param_dtype)
        class_token = jnp.broadcast_to(class_token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([class_token, x], axis=1) + positions.astype(x.dtype)[None]
        x = LayerNorm(epsilon=self.epsilon, param_dtype=self.param_dtype, name="norm_before")(x)
        x = Transformer(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            activation=self.activation,
            epsilon=self.epsilon,
            scan_layers=self.scan_layers,
            remat=self.remat,
            name="transformer",
            **dtypes,
        )(x)
        return LayerNorm(epsilon=self.epsilon, param_dtype=self.param_dtype, name="norm_after")(x[:, 0])

    def _patches(self, images: jax.Array) -> jax.Array:
        """Normalised images as `[batch, patches, patch_size * patch_size * 3]`, rows first, channels last."""
        check_mesh_axes(images)
        size, patch = self.image_size, self.patch_size
        if size % patch:
            raise InputError(f"image size {size} does not divide by patch size {patch}; choose a patch size that does")
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise InputError(f"CLIP needs images [batch, {size}, {size}, 3], got {list(images.shape)}; resize them")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"CLIP needs float images in [-1, 1], got {images.dtype}; scale them first")
        mean = jnp.asarray(self.mean, jnp.float32).reshape(1, 1, 1, 3)
        std = jnp.asarray(self.std, jnp.float32).reshape(1, 1, 1, 3)
        x = (images.astype(jnp.float32) * 0.5 + (0.5 - mean)) / std
        side = size // patch
        x = x.reshape(-1, side, patch, side, patch, 3)
        return jnp.swapaxes(x, 2, 3).reshape(-1, side * side, patch * patch * 3).astype(self.dtype)
