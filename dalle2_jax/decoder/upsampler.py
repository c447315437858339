"""Upsamplers: unconditional, convolutions only, trained on crops and run at full size (Sec. 2.1, App. C)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError
from dalle2_jax.layers.caption_encoder import CaptionEncoder
from dalle2_jax.layers.unet import UNet

RESIZE_METHODS = ("nearest", "bilinear", "bicubic")


class Upsampler(nn.Module):
    """A denoiser of large images that sees a small one, resized and concatenated to x_t as in ADM and GLIDE.

    The paper's knows no caption; GLIDE's reads it as its decoder does.

    Nothing in it depends on the size: with `attention_resolutions=()` and `middle_attention=False` the U-Net is fully
    convolutional, and what was trained on crops of a quarter of the width runs on whole images.

    Fields:
        unet: the U-Net; it sees six channels, and gives `unet.out_channels`.
        resize: how the small image is brought to x_t's size: "nearest", "bilinear" or "bicubic".
        residual: the network's output is added to the resized small image, so that only what is missing has to be
            learned; for a process that predicts x_0. The paper's is False.
        last: a second U-Net for timestep 0 alone, the last one of every chain (Karlo); all of a batch is at one
            timestep then.
        text: an encoder of captions whose states the U-Net attends to (GLIDE).
        inpainting: the U-Net also sees what is known of the image, and where it is known.
    """

    unet: UNet
    resize: str = "bilinear"
    residual: bool = False
    last: UNet | None = None
    text: CaptionEncoder | None = None
    inpainting: bool = False

    @nn.compact
    def __call__(
        self,
        x_t: jax.Array,
        timesteps: jax.Array,
        low_resolution: jax.Array,
        deterministic: bool = True,
        text: jax.Array | None = None,
        text_mask: jax.Array | None = None,
        known: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts from `x_t` [batch, height, width, 3] and `low_resolution` [batch, height', width', 3] in [-1, 1].

        text, text_mask: tokens int32 [batch, n] and bool [batch, n] for its encoder. known: as in `Decoder`. Returns
        float32 [batch, height, width, unet.out_channels].

        Raises:
            InputError: if `resize` is unknown, the shapes do not fit, the caption or what is known is missing or
                superfluous, or the U-Net refuses the size.
        """
        if self.resize not in RESIZE_METHODS:
            raise InputError(f"Upsampler.resize must be one of {', '.join(RESIZE_METHODS)}, not {self.resize!r}.")
        if low_resolution.ndim != 4 or low_resolution.shape[0] != x_t.shape[0]:
            raise InputError(
                f"the upsampler's low_resolution must be [batch, height, width, channels] with the batch of x_t "
                f"{x_t.shape}, not {low_resolution.shape}."
            )
        if (self.text is None) != (text is None) or self.inpainting != (known is not None):
            raise InputError(
                f"this upsampler reads {'tokens' if self.text else 'no caption'} and "
                f"{'what is known' if self.inpainting else 'nothing that is known'} of the image; pass just that."
            )
        resized = self.resize_input(low_resolution, x_t.shape[1:3]).astype(x_t.dtype)
        seen = [x_t, resized] if known is None else [x_t, known.astype(x_t.dtype), resized]
        condition = context = None
        if self.text is not None:
            context = self.text(text, text_mask, deterministic)
            dtypes = {"dtype": jnp.float32, "param_dtype": jnp.dtype(self.unet.param_dtype)}
            condition = nn.Dense(4 * self.unet.channels, name="text_time", **dtypes)(context[:, -1])
        inputs = jnp.concatenate(seen, axis=-1), timesteps, condition, context
        if self.last is None:
            output = self.unet(*inputs, deterministic=deterministic)
        else:
            output = self._first_or_last(inputs, deterministic)
        if not self.residual:
            return output
        channels = resized.shape[-1]
        return output.at[..., :channels].add(resized.astype(output.dtype))

    def _first_or_last(self, inputs: tuple, deterministic: bool) -> jax.Array:
        """One of the two networks, by the timestep of the batch's first example."""
        if self.is_initializing():
            return self.unet(*inputs, deterministic=deterministic) + self.last(*inputs, deterministic=deterministic)
        return nn.cond(
            inputs[1][0] == 0,
            lambda self, *inputs: self.last(*inputs, deterministic=deterministic),
            lambda self, *inputs: self.unet(*inputs, deterministic=deterministic),
            self,
            *inputs,
        )

    @nn.nowrap
    def resize_input(self, low_resolution: jax.Array, size: tuple[int, int]) -> jax.Array:
        """Resizes [batch, height', width', channels] to `size` (height, width) the way the network sees it."""
        batch, _, _, channels = low_resolution.shape
        return jax.image.resize(low_resolution, (batch, *size, channels), self.resize)
