"""Generative adversarial networks (Goodfellow et al. 2014): the players, their losses, and the signs that one has won.

A generator takes noise `[b, z]` and a shape (h, w, c) to images `[b, h, w, c]` in [-1, 1], and a discriminator takes
such images, and whether it is `deterministic` (without dropout), to logits `[b]`, above 0 where they look real; any two
Linen modules that do this can stand in the fields of `GAN`. D(x) is the sigmoid of a logit. Losses are computed from
logits, since the logarithm of a sigmoid is lost where it saturates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.diffusion.sampler import keys_for, normal
from dalle2_jax.errors import InputError
from dalle2_jax.layers.convolution import GroupNorm
from dalle2_jax.lineage.autoencoder import check_images, logits_to_images, to_unit

NOISES = ("uniform", "normal")
NORMS = ("group", "none")
OBJECTIVES = ("non_saturating", "minimax")
# What `failure` finds, in words.
FAILURES = {
    "discriminator_won": (
        "the discriminator has won: it tells almost all images apart, and the generator learns little from it; give it "
        "a lower learning rate, fewer steps or more dropout"
    ),
    "generator_won": (
        "the generator has won: the discriminator takes almost all that it makes for real; give the discriminator a "
        "higher learning rate or more steps"
    ),
    "discriminator_dead": (
        "the discriminator is dead: it says the same of real and of generated images; unless these look real, give it "
        "a higher learning rate or a larger network"
    ),
    "collapsed": (
        "the generator has collapsed: what it makes is nearly the same whatever the noise; lower the learning rates, "
        "or start with another seed"
    ),
}


def _check_hidden(module: nn.Module) -> None:
    if min(module.hidden, default=1) < 1:
        raise InputError(f"{type(module).__name__} has layers of widths {tuple(module.hidden)}; each must be 1 or more")


def _check_convolutional(module: nn.Module) -> None:
    kind = type(module).__name__
    if module.norm not in NORMS:
        raise InputError(f"{kind}.norm is {module.norm!r}; it must be {' or '.join(NORMS)}")
    if module.width < 1 or module.groups < 1:
        raise InputError(f"{kind} has width {module.width} and {module.groups} groups; both must be 1 or more")
    if module.norm == "group" and module.width % module.groups:
        raise InputError(
            f"{kind}.width is {module.width}, which does not divide into {module.groups} groups; "
            f"set a multiple, or other {kind}.groups"
        )


class MLPGenerator(nn.Module):
    """Noise through dense layers with ReLU; the last has a sigmoid, whose pixels in [0, 1] become images in [-1, 1].

    The defaults are those published for MNIST (goodfeli/adversarial, mnist.yaml).

    Fields:
        hidden: widths of the layers before the last, which computes in float32.
        init_range: r; weights start uniform in -r to r, biases at 0.
        dtype: of the computation. param_dtype: of the parameters.
    """

    hidden: tuple[int, ...] = (1200, 1200)
    init_range: float = 0.05
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_hidden(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, noise: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        """Noise `[b, z]` to images, float32 `[b, h, w, c]` in [-1, 1]."""
        settings = {"kernel_init": _uniform(self.init_range), "param_dtype": self.param_dtype}
        x = noise
        for number, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, **settings, name=f"hidden_{number}")(x))
        logits = nn.Dense(math.prod(shape), dtype="float32", **settings, name="out")(x)
        return logits_to_images(logits.reshape(-1, *shape))


class MaxoutDiscriminator(nn.Module):
    """Flattened pixels, in [0, 1], through maxout layers (Goodfellow et al. 2013) with dropout before each layer.

    A maxout unit is the largest of a few linear ones. Dropout divides what it keeps by the share that it keeps. The
    defaults are those published for MNIST (goodfeli/adversarial, mnist.yaml); without hidden layers it is linear.

    Fields:
        hidden: units of each maxout layer; the last layer, to the logit, computes in float32.
        pieces: linear ones a unit.
        keep_input, keep_hidden: the share of pixels, and of units, that dropout keeps.
        init_range, dtype, param_dtype: see `MLPGenerator`.
    """

    hidden: tuple[int, ...] = (240, 240)
    pieces: int = 5
    keep_input: float = 0.8
    keep_hidden: float = 0.5
    init_range: float = 0.005
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_hidden(self)
        if self.pieces < 1:
            raise InputError(f"MaxoutDiscriminator.pieces is {self.pieces}; it must be 1 or more")
        for name in ("keep_input", "keep_hidden"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(
                    f"MaxoutDiscriminator.{name} is {getattr(self, name)}; it must be above 0, and at most 1, which is "
                    "no dropout"
                )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Images `[b, h, w, c]` in [-1, 1] to logits, float32 `[b]`; the dropout's key is the rng "dropout"."""
        settings = {"kernel_init": _uniform(self.init_range), "param_dtype": self.param_dtype}
        x, keep = to_unit(images).reshape(images.shape[0], -1), self.keep_input
        for number, width in enumerate(self.hidden):
            x = nn.Dropout(1.0 - keep)(x, deterministic=deterministic)
            pieces = nn.Dense(width * self.pieces, dtype=self.dtype, **settings, name=f"hidden_{number}")(x)
            # The gradient of `jnp.max` asks which piece equals the largest, and is 0 / 0 where XLA, which may compute
            # the pieces twice, rounds them differently.
            x = functools.reduce(jnp.maximum, jnp.unstack(pieces.reshape(-1, width, self.pieces), axis=-1))
            keep = self.keep_hidden
        x = nn.Dropout(1.0 - keep)(x, deterministic=deterministic)
        return nn.Dense(1, dtype="float32", **settings, name="out")(x)[:, 0]


class ConvGenerator(nn.Module):
    """The generator of DCGAN (Radford et al. 2016): 4x4 transposed convolutions, to 4x4 and then doubling, ReLU, tanh.

    Norms are after each convolution but the last. DCGAN's BatchNorm is not one of them: it ties an image to those that
    it is made with, and its running statistics are no parameters, so that averaged parameters and a sample of one image
    would need a rule of their own. GroupNorm has as many parameters as it.

    Fields:
        width: channels before the last convolution, twice as many before each earlier one (64 in DCGAN).
        norm: "group", or "none", where convolutions have biases instead. groups: of the norm; they divide `width`.
        dtype: of the computation; the last layer's is float32. param_dtype: of the parameters.
    """

    width: int = 64
    norm: str = "group"
    groups: int = 32
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_convolutional(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, noise: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        """Noise `[b, z]` to images, float32 `[b, h, h, c]` in [-1, 1], with h four times a power of two."""
        widths = [self.width << level for level in reversed(range(doublings(shape[0])))]
        x = noise[:, None, None]

        def convolve(x: jax.Array, features: int, dtype: str, name: str) -> jax.Array:
            stride, padding = (1, "VALID") if x.shape[1] == 1 else (2, "SAME")
            settings = {"dtype": dtype, "padding": padding, **_convolution(self)}
            return nn.ConvTranspose(features, (4, 4), (stride, stride), **settings, name=name)(x)

        for number, features in enumerate(widths):
            x = convolve(x, features, self.dtype, f"up_{number}")
            x = nn.relu(_normalise(self, x, f"norm_{number}"))
        return jnp.tanh(convolve(x, shape[2], "float32", "out"))


class ConvDiscriminator(nn.Module):
    """The discriminator of DCGAN: 4x4 convolutions that halve the image to 4x4, and one to the logit; leaky ReLU (0.2).

    Norms are after each convolution but the first and the last; see `ConvGenerator`.

    Fields:
        width: channels after the first convolution, twice as many after each later one. Others: as `ConvGenerator`.
    """

    width: int = 64
    norm: str = "group"
    groups: int = 32
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_convolutional(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Images `[b, h, h, c]` in [-1, 1], with h four times a power of two, to logits, float32 `[b]`."""
        x, settings = images, _convolution(self)
        for number in range(doublings(images.shape[1])):
            halve = {"strides": (2, 2), "padding": ((1, 1), (1, 1)), "dtype": self.dtype, **settings}
            x = nn.Conv(self.width << number, (4, 4), **halve, name=f"down_{number}")(x)
            x = nn.leaky_relu(x if number == 0 else _normalise(self, x, f"norm_{number}"), 0.2)
        return nn.Conv(1, (4, 4), padding="VALID", dtype="float32", **settings, name="out")(x)[:, 0, 0, 0]


class GAN(nn.Module):
    """A generator and a discriminator; the defaults are those that Goodfellow et al. (2014) published for MNIST.

    Fields:
        generator, discriminator: see above.
        latent_size: z, of the noise. image_size, channels: of the images, which are square.
        noise: "uniform" in -sqrt(3) to sqrt(3) as theirs, or "normal"; both of unit variance.

    Raises:
        InputError: for sizes below 1, an unknown noise, and an image size that a network does not make.
    """

    generator: nn.Module = MLPGenerator()
    discriminator: nn.Module = MaxoutDiscriminator()
    latent_size: int = 100
    image_size: int = 28
    channels: int = 1
    noise: str = "uniform"

    def __post_init__(self) -> None:
        for name in ("latent_size", "image_size", "channels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.noise not in NOISES:
            raise InputError(f"the GAN's noise is {self.noise!r}; it must be {' or '.join(NOISES)}")
        if isinstance(self.generator, ConvGenerator) or isinstance(self.discriminator, ConvDiscriminator):
            doublings(self.image_size)
        super().__post_init__()

    def generate(self, noise: jax.Array) -> jax.Array:
        """Noise `[b, z]` to images, float32 `[b, h, w, c]` in [-1, 1]."""
        if noise.ndim != 2 or noise.shape[1] != self.latent_size:
            raise InputError(f"the noise must be [b, {self.latent_size}], not {list(noise.shape)}")
        return self.generator(noise, (self.image_size, self.image_size, self.channels))

    def discriminate(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Images `[b, h, w, c]` in [-1, 1] to logits, float32 `[b]`; with dropout unless `deterministic`."""
        check_images(self, images)
        return self.discriminator(images, deterministic)

    def __call__(self, noise: jax.Array) -> jax.Array:
        """Noise `[b, z]` to the logits `[b]` of what is made of it."""
        return self.discriminate(self.generate(noise))


def discriminator_loss(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    """-1/2 (E[log D(x)] + E[log(1 - D(G(z)))]), a float32 scalar in nats: half of Eq. 1, as in the published code.

    The logits `[b]` of real and of generated images. At D = 1/2 it is log 2.
    """
    real, fake = real_logits.astype(jnp.float32), fake_logits.astype(jnp.float32)
    return 0.5 * (nn.softplus(-real).mean() + nn.softplus(fake).mean())


def generator_loss(fake_logits: jax.Array, objective: str = "non_saturating") -> jax.Array:
    """What the generator minimises, a float32 scalar in nats, of the logits `[b]` of generated images.

    objective: "non_saturating": -E[log D(G(z))], whose gradient stays where the discriminator is sure, and which the
    published code has. "minimax": E[log(1 - D(G(z)))] (Eq. 1), whose gradient vanishes there.

    Raises:
        InputError: for an unknown objective.
    """
    check_objective(objective)
    logits = fake_logits.astype(jnp.float32)
    return nn.softplus(-logits).mean() if objective == "non_saturating" else -nn.softplus(logits).mean()


def divergence_bound(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    """A lower bound of the Jensen-Shannon divergence of data and samples, a float32 scalar in nats, from logits `[b]`.

    log 2 less the discriminator's loss. For the best discriminator, p / (p + q), it is the divergence itself, from 0 to
    log 2 (Goodfellow et al. 2014, Theorem 1); a poor one sees less of it, or less than nothing.
    """
    return math.log(2) - discriminator_loss(real_logits, fake_logits)


def pairwise_distance(images: jax.Array) -> jax.Array:
    """How far two images of `[b, h, w, c]` are apart: the root mean square difference of a pixel, float32, over all
    pairs; 0 for a single image."""
    images = images.astype(jnp.float32)
    count = images.shape[0]
    # The mean square difference of two is twice the variance.
    return jnp.sqrt(2.0 * count / max(count - 1, 1) * images.var(0).mean())


def failure(metrics: Mapping[str, float]) -> str | None:
    """Which of `FAILURES` the numbers of a training show; None: neither player has won.

    metrics: means over some steps: "real_accuracy" and "fake_accuracy", the share of images that the discriminator
    knows for what they are; "real_probability" and "fake_probability", the mean D(x) and D(G(z)); "sample_distance" and
    "data_distance", the `pairwise_distance` of generated and of real images. What is not a number shows nothing. At the
    start of a training the players may well show signs that mean nothing yet.
    """
    real, fake = metrics["real_probability"], metrics["fake_probability"]
    if metrics["sample_distance"] < 0.25 * metrics["data_distance"]:
        return "collapsed"
    if min(metrics["real_accuracy"], metrics["fake_accuracy"]) > 0.99 and real > 0.95 and fake < 0.05:
        return "discriminator_won"
    if metrics["fake_accuracy"] < 0.05 and fake > 0.95:
        return "generator_won"
    return "discriminator_dead" if abs(real - fake) < 0.01 else None


def gan_noise(key: jax.Array, module: GAN, count: int) -> jax.Array:
    """Noise for the generator, float32 `[count, z]`. `key` is one key, or one an image `[count]`.

    Raises:
        InputError: for another number of keys.
    """
    keys, shape = keys_for(key, count), (count, module.latent_size)
    if module.noise == "normal":
        return normal(keys, shape)
    end = math.sqrt(3.0)
    return jax.vmap(lambda one: jax.random.uniform(one, shape[1:], jnp.float32, -end, end))(keys)


def sample_gan(key: jax.Array, module: GAN, params: Any, count: int) -> jax.Array:
    """`count` images, float32 `[count, h, w, c]` in [-1, 1].

    `key` is one key, or one an image `[count]`, with which an image is the same alone and in any batch.

    Raises:
        InputError: for another number of keys.
    """
    return module.apply({"params": params}, gan_noise(key, module, count), method="generate")


def check_objective(objective: str) -> None:
    """Raises InputError unless it is one of the generator's."""
    if objective not in OBJECTIVES:
        raise InputError(f"the generator's objective is {objective!r}; it must be {' or '.join(OBJECTIVES)}")


def doublings(size: int) -> int:
    """How often 4 pixels are doubled to `size`.

    Raises:
        InputError: if no whole number of times.
    """
    count = (size // 4).bit_length() - 1
    if count < 0 or 4 << count != size:
        raise InputError(
            f"image_size is {size}; convolutional players take 4 pixels times a power of two: set 8, 16, 32 or so on"
        )
    return count


def _uniform(end: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -end, end)


def _convolution(module: ConvGenerator | ConvDiscriminator) -> dict[str, Any]:
    """What all its convolutions have in common."""
    first = nn.initializers.normal(0.02)
    return {"use_bias": module.norm == "none", "kernel_init": first, "param_dtype": module.param_dtype}


def _normalise(module: ConvGenerator | ConvDiscriminator, x: jax.Array, name: str) -> jax.Array:
    if module.norm == "none":
        return x
    return GroupNorm(module.groups, param_dtype=module.param_dtype, name=name)(x, dtype=module.dtype)
