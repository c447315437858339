"""The ADM U-Net that decoder, upsamplers and DDPM share (ADM Sec. 3; block order of guided-diffusion and GLIDE)."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError
from dalle2_jax.layers.attention import dot_product_attention, pack
from dalle2_jax.layers.convolution import Conv, GroupNorm, Resample, ResBlock, depth_to_space, space_to_depth
from dalle2_jax.layers.embedding import timestep_embedding
from dalle2_jax.layers.kernels.target import traced_for_nvidia
from dalle2_jax.layers.mesh_axes import check_mesh_axes
from dalle2_jax.layers.remat import Remat, rematerialised


class AttentionBlock(nn.Module):
    """Attention among the places of an image, which may also look at context tokens (GLIDE Sec. 4).

    The context is projected to keys and values of its own, placed beside the image's; its tokens ask nothing
    themselves. The output projection starts at zero. Features of `qkv` are laid out [3, heads, head_channels], those of
    `context_kv` [2, heads, head_channels].

    Fields:
        head_channels: of each head; None: one head of all channels.
    """

    head_channels: int | None = 64
    groups: int = 32
    epsilon: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        context_lengths: jax.Array | None = None,
    ) -> jax.Array:
        """`x` [batch, height, width, c], `context` [batch, m, d]; returns x's shape. The context is seen where
        `context_mask` bool [batch, m] is True, or its first `context_lengths` int32 [batch] tokens are."""
        batch, height, width, channels = x.shape
        head_channels = self.head_channels or channels
        if channels % head_channels:
            raise InputError(
                f"{channels} channels do not divide into heads of {head_channels}: choose head_channels anew."
            )
        dtype, param_dtype = jnp.dtype(self.dtype), jnp.dtype(self.param_dtype)
        heads, places = channels // head_channels, height * width

        def dense(features: int, name: str, **options) -> nn.Dense:
            return nn.Dense(features, dtype=dtype, param_dtype=param_dtype, name=name, **options)

        h = GroupNorm(self.groups, self.epsilon, self.param_dtype, name="norm")(x, dtype=self.dtype)
        h = dense(3 * channels, "qkv")(h.reshape(batch, places, channels))
        h = h.reshape(batch, places, 3, heads, head_channels)
        query, key, value = h[:, :, 0], h[:, :, 1], h[:, :, 2]
        mask = lengths = None
        if context is not None:
            tokens = context.shape[1]
            kv = dense(2 * channels, "context_kv")(context.astype(dtype))
            kv = kv.reshape(batch, tokens, 2, heads, head_channels)
            if context_lengths is None:
                key = jnp.concatenate([kv[:, :, 0], key], axis=1)
                value = jnp.concatenate([kv[:, :, 1], value], axis=1)
            else:  # behind the image's, so that one length says what is seen
                key = jnp.concatenate([key, kv[:, :, 0]], axis=1)
                value = jnp.concatenate([value, kv[:, :, 1]], axis=1)
                lengths = places + context_lengths
            if context_mask is not None:
                mask = jnp.pad(context_mask, ((0, 0), (0, places)), constant_values=True)[:, None, None, :]
        h = dot_product_attention(query, key, value, mask=mask, key_lengths=lengths)
        h = h.reshape(batch, places, channels)
        h = dense(channels, "out", kernel_init=nn.initializers.zeros)(h)
        return x + h.reshape(x.shape)


class UNet(nn.Module):
    """A denoiser's network: x_t and timesteps in, prediction out, at any size that divides by 2**(levels - 1).

    The defaults are the paper's 64 px decoder (Table 3). Level l has channels * channel_multipliers[l] channels and
    works at 1/2**l of the size: `depth` residual blocks on the way down and depth + 1 on the way up.

    Fields:
        image_size: places the attention: level l attends if image_size // (patch * 2**l) is in
            `attention_resolutions`. The network itself runs on other sizes as well.
        channels: of the first level, and a quarter of the time embedding's width.
        head_channels: of each attention head; None: one head of all channels.
        groups: of every group norm.
        scale_shift: the time embedding enters as scale and shift of a norm (AdaGN), else by addition.
        time_embedding: the layout of its sinusoids: "glide" or "ddpm" (`timestep_embedding`).
        middle_attention: attention between the two middle blocks.
        resblock_resampling: size changes inside residual blocks (BigGAN), else by plain convolutions.
        downsampling_padding: of those: "both" sides or "after" (`Resample`).
        patch: squares of patch x patch pixels become channels before the first convolution (space to depth) and pixels
            again after the last, so that level l works at 1/(patch * 2**l) of the size; 1 is the paper's. Wide
            convolutions over few places are what a CPU does best.
        remat: which activations the backward pass computes again: False, none; True, all within a block; "products",
            all but what products and convolutions give (`layers.remat`).
    """

    image_size: int = 64
    out_channels: int = 6
    channels: int = 512
    channel_multipliers: tuple[int, ...] = (1, 2, 3, 4)
    depth: int = 3
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    head_channels: int | None = 64
    groups: int = 32
    dropout: float = 0.0
    scale_shift: bool = True
    time_embedding: str = "glide"
    middle_attention: bool = True
    resblock_resampling: bool = True
    downsampling_padding: str = "both"
    patch: int = 1
    epsilon: float = 1e-5
    remat: Remat = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        timesteps: jax.Array,
        condition: jax.Array | None = None,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Predicts from `x` [batch, height, width, c] at `timesteps` [batch].

        `condition` [batch, 4 * channels] is added to the time embedding; `context` [batch, m, d] are tokens that every
        attention layer also looks at, where `context_mask` bool [batch, m] is True. Dropout draws from the "dropout"
        key unless `deterministic`. Returns float32 [batch, height, width, out_channels], zero before training.

        Raises:
            InputError: if height or width, channels, groups or heads do not divide, or an input's shape does not fit.
        """
        self._check(x, timesteps, condition, context, context_mask)
        dtype, param_dtype = jnp.dtype(self.dtype), jnp.dtype(self.param_dtype)
        last = len(self.channel_multipliers) - 1
        residual, attention = self._block_makers()

        def res(h: jax.Array, name: str, multiplier: int, resample: str | None = None) -> jax.Array:
            return residual(channels=self.channels * multiplier, resample=resample, name=name)(
                h, embedding, deterministic
            )

        def attend(h: jax.Array, name: str) -> jax.Array:
            return attention(name=name)(h, context, context_mask, context_lengths)

        def change_size(h: jax.Array, name: str, multiplier: int, direction: str) -> jax.Array:
            if self.resblock_resampling:
                return res(h, name, multiplier, direction)
            resample = Resample(
                self.channels * multiplier,
                direction,
                self.dtype,
                self.param_dtype,
                padding=self.downsampling_padding,
                name=name,
            )
            return resample(h)

        embedding = timestep_embedding(timesteps, self.channels, self.time_embedding)
        embedding = nn.Dense(4 * self.channels, param_dtype=param_dtype, name="time_1")(embedding)
        embedding = nn.Dense(4 * self.channels, param_dtype=param_dtype, name="time_2")(nn.silu(embedding))
        if condition is not None:
            embedding = embedding + condition.astype(jnp.float32)

        context_lengths = None
        if context_mask is not None and traced_for_nvidia():  # as `Transformer` does
            (context, context_lengths, _), context_mask = pack(context, context_mask), None
        x = space_to_depth(x, self.patch)
        first = self.channels * self.channel_multipliers[0]
        h = Conv(first, (3, 3), dtype=dtype, param_dtype=param_dtype, name="conv_in")(x.astype(dtype))
        skips = [h]
        for level, multiplier in enumerate(self.channel_multipliers):
            for i in range(self.depth):
                h = res(h, f"down_{level}_res_{i}", multiplier)
                if self.attends(level):
                    h = attend(h, f"down_{level}_attention_{i}")
                skips.append(h)
            if level < last:
                h = change_size(h, f"down_{level}_resample", multiplier, "down")
                skips.append(h)

        h = res(h, "middle_res_0", self.channel_multipliers[-1])
        if self.middle_attention:
            h = attend(h, "middle_attention_0")
        h = res(h, "middle_res_1", self.channel_multipliers[-1])

        for level, multiplier in reversed(list(enumerate(self.channel_multipliers))):
            for i in range(self.depth + 1):
                h = res(jnp.concatenate([h, skips.pop()], axis=-1), f"up_{level}_res_{i}", multiplier)
                if self.attends(level):
                    h = attend(h, f"up_{level}_attention_{i}")
            if level > 0:
                h = change_size(h, f"up_{level}_resample", multiplier, "up")

        h = GroupNorm(self.groups, self.epsilon, self.param_dtype, name="norm_out")(h, silu=True)
        zeros = nn.initializers.zeros
        features = self.out_channels * self.patch**2
        h = Conv(features, (3, 3), kernel_init=zeros, param_dtype=param_dtype, name="conv_out")(h)
        return depth_to_space(h, self.patch)

    def attends(self, level: int) -> bool:
        """Whether the blocks of `level` are followed by attention."""
        return self.image_size // (self.patch * 2**level) in self.attention_resolutions

    def _block_makers(self) -> tuple:
        """ResBlock and AttentionBlock with this network's fields filled in, rematerialised if it says so."""
        residual = rematerialised(ResBlock, self.remat, static_argnums=(3,))
        attention = rematerialised(AttentionBlock, self.remat)
        common = {
            "groups": self.groups,
            "epsilon": self.epsilon,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        return (
            partial(residual, dropout=self.dropout, scale_shift=self.scale_shift, **common),
            partial(attention, head_channels=self.head_channels, **common),
        )

    def _check(self, x, timesteps, condition, context, context_mask) -> None:
        """Refuses what the layers would fail on with less clear words."""
        if x.ndim != 4:
            raise InputError(f"the U-Net wants x [batch, height, width, channels], not shape {x.shape}.")
        check_mesh_axes(x)
        batch, height, width, _ = x.shape
        divisor = self.patch * 2 ** (len(self.channel_multipliers) - 1)
        if height % divisor or width % divisor:
            raise InputError(
                f"an image of {height}x{width} does not divide by {divisor}, as the U-Net's "
                f"{len(self.channel_multipliers)} levels and patches of {self.patch} need: pad or crop it."
            )
        if timesteps.shape != (batch,):
            raise InputError(f"the U-Net wants one timestep an example, shape ({batch},), not {timesteps.shape}.")
        for level, multiplier in enumerate(self.channel_multipliers):
            channels = self.channels * multiplier
            if channels % self.groups:
                raise InputError(
                    f"the U-Net's {channels} channels at level {level} do not divide into {self.groups} groups: "
                    "choose channels or groups anew."
                )
            attends = self.attends(level) or (self.middle_attention and level == len(self.channel_multipliers) - 1)
            if attends and channels % (self.head_channels or channels):
                raise InputError(
                    f"the U-Net's {channels} channels at level {level} do not divide into heads of "
                    f"{self.head_channels}: choose channels or head_channels anew."
                )
        if condition is not None and condition.shape != (batch, 4 * self.channels):
            raise InputError(
                f"the U-Net's condition must be [batch, 4 * channels] = ({batch}, {4 * self.channels}), "
                f"not {condition.shape}."
            )
        if context is not None and (context.ndim != 3 or context.shape[0] != batch):
            raise InputError(f"the U-Net's context must be [batch = {batch}, tokens, width], not {context.shape}.")
        if context_mask is not None and (context is None or context_mask.shape != context.shape[:2]):
            wanted = "a context to go with it" if context is None else f"shape {context.shape[:2]}"
            raise InputError(f"the U-Net's context_mask {context_mask.shape} needs {wanted}.")
