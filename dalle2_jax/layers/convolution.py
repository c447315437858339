"""The convolutional blocks of the ADM U-Net: group norm, resampling by two, residual block (ADM Sec. 3)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError
from dalle2_jax.layers.kernels.convolution import convolve
from dalle2_jax.layers.kernels.group_norm import group_norm
from dalle2_jax.layers.kernels.target import traced_for_nvidia


class GroupNorm(nn.Module):
    """Group normalisation over height, width and the channels of a group, in float32, and what often follows it.

    Sums run over height and width first and over a group's channels after, which keeps the channels innermost and is
    two to three times as fast on a CPU as reducing a reshaped image. The variance is that of the centred values:
    stable.

    Fields:
        groups: how many groups the channels fall into.
        epsilon: added to the variance.
    """

    groups: int = 32
    epsilon: float = 1e-5
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scale: jax.Array | None = None,
        shift: jax.Array | None = None,
        *,
        silu: bool = False,
        dtype: str = "float32",
    ) -> jax.Array:
        """Normalises `x` [batch, height, width, channels]; returns `dtype`, into which the float32 result is rounded.

        With `scale` and `shift` [batch, channels] the result is multiplied by 1 + scale and shifted (ADM Sec. 3.1);
        with `silu`, SiLU follows.

        Raises:
            InputError: if the channels do not divide into the groups.
        """
        batch, height, width, channels = x.shape
        if channels % self.groups:
            raise InputError(
                f"{channels} channels do not divide into {self.groups} groups: choose channels or groups anew."
            )
        gain = self.param("scale", nn.initializers.ones, (channels,), jnp.dtype(self.param_dtype)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.dtype(self.param_dtype)).astype(jnp.float32)
        gain, bias = gain[None], bias[None]
        if scale is not None:
            gain = gain * (1.0 + scale)
            bias = bias * (1.0 + scale) + shift
        if traced_for_nvidia():
            gain, bias = (jnp.broadcast_to(value, (batch, channels)) for value in (gain, bias))
            return group_norm(x, gain, bias, self.groups, self.epsilon, silu, jnp.dtype(dtype))

        def group_mean(sums: jax.Array) -> jax.Array:  # [b, c] -> [b, c]
            grouped = sums.reshape(batch, self.groups, -1)
            means = jnp.mean(grouped, axis=-1, keepdims=True) / (height * width)
            return jnp.broadcast_to(means, grouped.shape).reshape(batch, channels)

        x = x.astype(jnp.float32)
        centred = x - group_mean(jnp.sum(x, axis=(1, 2)))[:, None, None]
        variance = group_mean(jnp.sum(jnp.square(centred), axis=(1, 2)))
        gain = gain * jax.lax.rsqrt(variance + self.epsilon)
        y = centred * gain[:, None, None] + bias[:, None, None]
        return (nn.silu(y) if silu else y).astype(dtype)


def upsample(x: jax.Array) -> jax.Array:
    """Doubles height and width of [batch, height, width, channels] by repeating every pixel."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def downsample(x: jax.Array) -> jax.Array:
    """Halves height and width of [batch, height, width, channels], both even, by averaging squares of two by two."""
    batch, height, width, channels = x.shape
    if height % 2 or width % 2:
        raise InputError(f"an image of {height}x{width} cannot be halved: both sides must be even.")
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def space_to_depth(x: jax.Array, patch: int) -> jax.Array:
    """Squares of patch x patch pixels become channels: [b, h, w, c] to [b, h / patch, w / patch, patch * patch * c]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // patch, width // patch, patch * patch * channels)


def depth_to_space(x: jax.Array, patch: int) -> jax.Array:
    """The inverse of `space_to_depth`: [b, h, w, patch * patch * c] to [b, h * patch, w * patch, c]."""
    batch, height, width, channels = x.shape
    channels //= patch**2
    x = x.reshape(batch, height, width, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * patch, width * patch, channels)


Conv = functools.partial(nn.Conv, conv_general_dilated=convolve)

RESAMPLING = {None: lambda x: x, "up": upsample, "down": downsample}
PADDINGS = {"both": 1, "after": ((0, 1), (0, 1))}


class ResBlock(nn.Module):
    """The residual block of ADM: norm, SiLU, convolution; time embedding; norm, SiLU, dropout, convolution from zero.

    Fields:
        channels: of the output; where the input's differ, a 1x1 convolution carries the skip.
        scale_shift: the time embedding scales and shifts what the second norm gives (AdaGN); else it is added before.
        resample: None, "up" or "down": both branches change size, the inner one before its first convolution (BigGAN).
    """

    channels: int
    groups: int = 32
    dropout: float = 0.0
    scale_shift: bool = True
    resample: str | None = None
    epsilon: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, deterministic: bool = True) -> jax.Array:
        """`x` [batch, height, width, c], time `embedding` [batch, e]; returns [batch, height', width', channels]."""
        if self.resample not in RESAMPLING:
            raise InputError(f'ResBlock.resample must be None, "up" or "down", not {self.resample!r}.')
        dtype, param_dtype = jnp.dtype(self.dtype), jnp.dtype(self.param_dtype)
        resample = RESAMPLING[self.resample]

        h = GroupNorm(self.groups, self.epsilon, self.param_dtype, name="norm_1")(x, silu=True, dtype=self.dtype)
        h = resample(h)
        x = resample(x.astype(dtype))
        h = Conv(self.channels, (3, 3), dtype=dtype, param_dtype=param_dtype, name="conv_1")(h)

        width = self.channels * (2 if self.scale_shift else 1)
        time = nn.Dense(width, dtype=jnp.float32, param_dtype=param_dtype, name="time")(nn.silu(embedding))
        norm = GroupNorm(self.groups, self.epsilon, self.param_dtype, name="norm_2")
        if self.scale_shift:
            h = norm(h, *jnp.split(time, 2, axis=-1), silu=True, dtype=self.dtype)
        else:
            h = norm(h + time[:, None, None].astype(dtype), silu=True, dtype=self.dtype)
        h = nn.Dropout(self.dropout, name="dropout")(h, deterministic=deterministic)
        h = Conv(
            self.channels,
            (3, 3),
            kernel_init=nn.initializers.zeros,
            dtype=dtype,
            param_dtype=param_dtype,
            name="conv_2",
        )(h)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, (1, 1), dtype=dtype, param_dtype=param_dtype, name="skip")(x)
        return x + h


class Resample(nn.Module):
    """ADM's plain change of size: a 3x3 convolution of stride two down, or pixels repeated and a 3x3 convolution up.

    Fields:
        padding: at stride two: "both", one pixel on every side, as in PyTorch; "after", one below and one to the right,
            which is what "SAME" means there.
    """

    channels: int
    direction: str
    dtype: str = "float32"
    param_dtype: str = "float32"
    padding: str = "both"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, c] to [batch, height', width', channels]."""
        if self.direction not in ("up", "down"):
            raise InputError(f'Resample.direction must be "up" or "down", not {self.direction!r}.')
        if self.padding not in PADDINGS:
            raise InputError(f"Resample.padding must be {' or '.join(PADDINGS)}, not {self.padding!r}")
        if self.direction == "up":
            x = upsample(x)
        return Conv(
            self.channels,
            (3, 3),
            strides=1 if self.direction == "up" else 2,
            padding=1 if self.direction == "up" else PADDINGS[self.padding],
            dtype=jnp.dtype(self.dtype),
            param_dtype=jnp.dtype(self.param_dtype),
            name="conv",
        )(x)
