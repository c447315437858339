"""The discrete VAE of DALL-E (Ramesh et al. 2021, Sec. 2.1 and App. A): images as a grid of codes, and back.

The network is that of openai/DALL-E (dall_e/encoder.py, decoder.py, utils.py). While it is trained each place of the
grid holds a relaxed code, a distribution over the codebook that the Gumbel-softmax samples, and the temperature falls
until that is nearly one code; afterwards it holds the code of the largest logit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.sampler import keys_for
from dalle2_jax.errors import InputError
from dalle2_jax.layers.convolution import Conv, upsample
from dalle2_jax.layers.remat import Remat, rematerialised
from dalle2_jax.lineage.autoencoder import check_images, to_unit
from dalle2_jax.lineage.logit_laplace import LEAST_SCALE, LogitLaplace, map_pixels
from dalle2_jax.lineage.vae import Elbo

# As in variance scaling by the fan-in, with normal and not truncated noise.
KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


@dataclass(frozen=True)
class CosineSchedule:
    """From `start` to `end` along half a cosine over `steps` steps, then constant.

    Raises:
        InputError: for fewer than one step.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"a schedule has {self.steps} steps; it must have 1 or more")

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """The value at a step, a float32 scalar."""
        progress = jnp.minimum(jnp.asarray(step, jnp.float32) / self.steps, 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


# Those of App. A.2.
TEMPERATURE = CosineSchedule(1.0, 1 / 16, 150_000)
KL_WEIGHT = CosineSchedule(0.0, 6.6, 5_000)


class Block(nn.Module):
    """A residual block: ReLU and convolution, once a kernel, times `gain`, on top of the input.

    Fields:
        channels: of the output; within it there are a quarter as many. Where the input has others, a 1x1 convolution
            carries it.
        kernels: the side of each convolution's kernel.
        gain: of the residual branch.
    """

    channels: int
    kernels: tuple[int, ...]
    gain: float
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c]` to `[b, h, w, channels]`."""
        widths = [self.channels // 4] * (len(self.kernels) - 1) + [self.channels]
        h = x = x.astype(self.dtype)
        for number, (kernel, width) in enumerate(zip(self.kernels, widths, strict=True), 1):
            h = _conv(self, width, kernel, f"conv_{number}")(nn.relu(h))
        if x.shape[-1] != self.channels:
            x = _conv(self, self.channels, 1, "skip")(x)
        return x + self.gain * h


class Codebook(nn.Module):
    """A vector a code: the 1x1 convolution of one-hot codes that is OpenAI's first layer of the decoder."""

    size: int
    channels: int
    scale: float
    param_dtype: str = "float32"

    def setup(self) -> None:
        init = nn.initializers.normal(self.scale) if self.scale else KERNEL_INIT
        self.embedding = self.param("embedding", init, (self.size, self.channels), self.param_dtype)
        self.bias = self.param("bias", nn.initializers.zeros, (self.channels,), self.param_dtype)

    def __call__(self, weights: jax.Array) -> jax.Array:
        """Distributions over the codes `[b, h, w, k]` to the means of their vectors, float32 `[b, h, w, c]`."""
        return self._shifted(jnp.tensordot(weights, self.embedding.astype(jnp.float32), 1))

    def lookup(self, codes: jax.Array) -> jax.Array:
        """Codes int32 `[b, h, w]` to their vectors, float32 `[b, h, w, c]`; nan for a code that there is not."""
        codes = jnp.where(codes < 0, self.size, codes)  # which would count from the end
        return self._shifted(jnp.take(self.embedding.astype(jnp.float32), codes, axis=0, mode="fill"))

    def _shifted(self, vectors: jax.Array) -> jax.Array:
        return vectors + self.bias.astype(jnp.float32)[None, None, None]


class Encoder(nn.Module):
    """Mapped pixels to the logits of the codes; see `DVAE` for the fields."""

    codebook_size: int
    width: int
    multipliers: tuple[int, ...]
    blocks: int
    remat: Remat
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c]` to float32 `[b, h / f, w / f, codebook_size]` with f = 2^(groups - 1)."""
        x = _conv(self, self.width, 7, "input")(x)
        for group, multiplier in enumerate(self.multipliers):
            if group:
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = _group(self, x, group, self.width * multiplier, (3, 3, 3, 1))
        return _conv(self, self.codebook_size, 1, "output", "float32")(nn.relu(x))


class Decoder(nn.Module):
    """Codes, relaxed or not, to means and log scales of mapped pixels; see `DVAE` for the fields."""

    codebook_size: int
    code_width: int
    code_scale: float
    channels: int
    width: int
    multipliers: tuple[int, ...]
    blocks: int
    remat: Remat
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        """`[b, h, w, codebook_size]`, or int32 `[b, h, w]`, to float32 `[b, h f, w f, 2 channels]`."""
        codebook = Codebook(self.codebook_size, self.code_width, self.code_scale, self.param_dtype, name="codebook")
        x = codebook(codes) if codes.ndim == 4 else codebook.lookup(codes)
        for group, multiplier in enumerate(reversed(self.multipliers)):
            if group:
                x = upsample(x)
            x = _group(self, x, group, self.width * multiplier, (1, 3, 3, 3))
        return _conv(self, 2 * self.channels, 1, "output", "float32")(nn.relu(x))


def _conv(module: nn.Module, features: int, kernel: int, name: str, dtype: str | None = None) -> nn.Module:
    return Conv(
        features,
        (kernel, kernel),
        kernel_init=KERNEL_INIT,
        dtype=dtype or module.dtype,
        param_dtype=module.param_dtype,
        name=name,
    )


def _group(module: Encoder | Decoder, x: jax.Array, group: int, channels: int, kernels: tuple[int, ...]) -> jax.Array:
    gain = 1 / (len(module.multipliers) * module.blocks) ** 2
    block = rematerialised(Block, module.remat)
    for number in range(module.blocks):
        name = f"group_{group + 1}_block_{number + 1}"
        x = block(channels, kernels, gain, module.dtype, module.param_dtype, name=name)(x)
    return x


class DVAE(nn.Module):
    """The discrete VAE; the defaults are OpenAI's: 53,786,240 parameters in the encoder, 43,829,766 in the decoder.

    Fields:
        image_size, channels: of the images, which are square.
        codebook_size: how many codes there are.
        code_width: channels of a code's vector.
        code_scale: standard deviation of these at the start; 0: 1 / sqrt(codebook_size), as of a convolution's weights
            in OpenAI's code. With so little the decoder hardly sees its codes at first, and a short training comes to
            use few of them.
        width: channels of the finest level.
        multipliers: of the width, one a group of blocks, finest first. Between two groups the encoder takes the largest
            of two by two pixels and the decoder repeats each, so that a grid of codes has image_size / 2^(groups - 1)
            places a side.
        blocks: residual blocks a group; the residual gain is 1 / (groups blocks)^2.
        least_scale: of the likelihood's scale b, in logits of mapped pixels. Images of few exact colours want a larger
            one: where these are hit b falls to its least, and what is not hit yet has a gradient of 1 / b.
        remat: `layers.remat`, of the blocks.
        dtype: of the computation; the encoder's logits, the codes' vectors and the decoder's outputs are float32.

    Raises:
        InputError: for sizes below 1, widths that are no multiple of 4, and an image size that the grid does not
            divide.
    """

    image_size: int = 256
    channels: int = 3
    codebook_size: int = 8192
    code_width: int = 128
    code_scale: float = 0.0
    width: int = 256
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    blocks: int = 2
    least_scale: float = LEAST_SCALE
    remat: Remat = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "codebook_size", "code_width", "width", "blocks"):
            if getattr(self, name) < 1:
                raise InputError(f"the dVAE's {name} is {getattr(self, name)}; it must be 1 or more")
        if not self.code_scale >= 0:
            raise InputError(f"the dVAE's code_scale is {self.code_scale}; it must be 0 or more")
        if not self.least_scale > 0:
            raise InputError(f"the dVAE's least_scale is {self.least_scale}; it must be above 0")
        if not self.multipliers or min(self.multipliers) < 1:
            raise InputError(f"the dVAE's multipliers are {tuple(self.multipliers)}; give one or more, each 1 or more")
        if any(self.width * multiplier % 4 for multiplier in self.multipliers):
            raise InputError(
                f"the dVAE's width is {self.width}, which times each of the multipliers {tuple(self.multipliers)} must "
                "be a multiple of 4; set a width that is one"
            )
        if self.image_size % self.cell:
            raise InputError(
                f"the dVAE's image_size is {self.image_size}, which does not divide into codes of {self.cell} pixels a "
                f"side; set a multiple of {self.cell}, or fewer multipliers"
            )
        super().__post_init__()

    @property
    def cell(self) -> int:
        """How many pixels a side a code stands for."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> int:
        """How many codes a side an image has."""
        return self.image_size // self.cell

    def setup(self) -> None:
        names = ("codebook_size", "width", "multipliers", "blocks", "remat", "dtype", "param_dtype")
        shared = {name: getattr(self, name) for name in names}
        self.encoder = Encoder(**shared)
        self.decoder = Decoder(**shared, code_width=self.code_width, code_scale=self.code_scale, channels=self.channels)

    def logits(self, images: jax.Array) -> jax.Array:
        """Images `[b, h, w, c]` in [-1, 1] to the logits of q(code | image), float32 `[b, grid, grid, k]`."""
        check_images(self, images)
        return self.encoder(map_pixels(to_unit(images.astype(jnp.float32))))

    def encode(self, images: jax.Array) -> jax.Array:
        """Images `[b, h, w, c]` in [-1, 1] to their likeliest codes, int32 `[b, grid, grid]`."""
        return jnp.argmax(self.logits(images), axis=-1).astype(jnp.int32)

    def decode(self, codes: jax.Array) -> LogitLaplace:
        """p(image | codes), of codes int32 `[b, grid, grid]` or of relaxed ones `[b, grid, grid, k]`.

        Raises:
            InputError: for codes that there are not, where their values are known; in a jitted function they give nan.
        """
        if codes.ndim != 4:
            check_codes(codes, self.codebook_size)
        return LogitLaplace(*jnp.split(self.decoder(codes), 2, axis=-1), self.least_scale)

    def decode_codes(self, codes: jax.Array) -> jax.Array:
        """Codes int32 `[b, grid, grid]` to images, float32 `[b, h, w, c]` in [-1, 1]; raises as `decode`."""
        return self.decode(codes).images

    def reconstruct(self, images: jax.Array) -> jax.Array:
        """Images `[b, h, w, c]` in [-1, 1] through their likeliest codes."""
        return self.decode_codes(self.encode(images))

    def __call__(
        self, images: jax.Array, key: jax.Array, temperature: jax.Array | float = 1.0
    ) -> tuple[jax.Array, LogitLaplace]:
        """The logits `[b, grid, grid, k]`, and p(image | codes) for a sample of relaxed codes (`gumbel_softmax`)."""
        logits = self.logits(images)
        return logits, self.decode(gumbel_softmax(key, logits, temperature))


def check_codes(codes: jax.Array, codebook_size: int) -> None:
    """Raises InputError unless codes are int `[b, h, w]`, and where their values are known, in 0..codebook_size - 1."""
    if codes.ndim != 3 or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise InputError(f"codes must be integers [b, h, w], not {codes.dtype} {list(codes.shape)}")
    if isinstance(codes, jax.core.Tracer) or not codes.size:
        return
    values = np.asarray(codes)
    if values.min() < 0 or values.max() >= codebook_size:
        raise InputError(
            f"the codes go from {values.min()} to {values.max()}; those of the dVAE are 0 to {codebook_size - 1}"
        )


def gumbel_softmax(key: jax.Array, logits: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """A sample of relaxed codes, float32 `[b, h, w, k]` with sums of 1, differentiable in the logits `[b, h, w, k]`:
    softmax((logits + Gumbel noise) / temperature) (Jang et al. 2016; Maddison et al. 2016).

    Its largest entry is a sample of the softmax of the logits, whatever the temperature: `sample_codes` with this key.
    `key` is one key, or one an image `[b]`.

    Raises:
        InputError: for a temperature that is known and not above 0.
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise InputError(f"the temperature of the codes is {temperature}; it must be above 0")
    return nn.softmax(_with_noise(key, logits) / temperature, axis=-1)


def sample_codes(key: jax.Array, logits: jax.Array) -> jax.Array:
    """A sample of codes int32 `[b, h, w]` of the softmax of logits `[b, h, w, k]`; key: as in `gumbel_softmax`."""
    return jnp.argmax(_with_noise(key, logits), axis=-1).astype(jnp.int32)


def _with_noise(key: jax.Array, logits: jax.Array) -> jax.Array:
    noise = jax.vmap(lambda one: jax.random.gumbel(one, logits.shape[1:], jnp.float32))
    return logits.astype(jnp.float32) + noise(keys_for(key, logits.shape[0]))


def kl_to_uniform(logits: jax.Array) -> jax.Array:
    """KL(softmax(logits) || uniform) of logits `[b, h, w, k]`, float32 `[b]`, in nats, summed over the grid.

    sum_k q_k log(k q_k) at each place, of the logits as they are: without noise, and at temperature 1 whatever
    that of the relaxed codes (openai/DALL-E, issue 26). At most h w log k.
    """
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return (jnp.exp(log_q) * (log_q + math.log(logits.shape[-1]))).sum((1, 2, 3))


def codebook_use(codes: jax.Array, codebook_size: int) -> tuple[jax.Array, jax.Array]:
    """How codes int32 `[...]` use the codebook: the exponential of their entropy, from 1 where all are one code to
    `codebook_size` where all are as frequent; and the share of the codebook that occurs. Float32 scalars."""
    share = jnp.bincount(codes.ravel(), length=codebook_size) / codes.size
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0))
    return jnp.exp(entropy), jnp.mean(share > 0)


def dvae_elbo(
    images: jax.Array, logits: jax.Array, likelihood: LogitLaplace, kl_weight: jax.Array | float = 1.0
) -> Elbo:
    """The evidence lower bound of images `[b, h, w, c]` in [-1, 1] under a uniform prior of the codes (Eq. 1).

    logits: `[b, grid, grid, k]`, of q(codes | image). likelihood: p(image | codes) of a sample of it; of relaxed codes,
    the bound is the relaxed one, which is none of log p(image). Both terms are sums, over pixels and over places.
    """
    reconstruction, kl = -likelihood.log_prob(images), kl_to_uniform(logits)
    return Elbo(math.prod(images.shape[1:]), reconstruction, kl, (reconstruction + kl_weight * kl).mean())
