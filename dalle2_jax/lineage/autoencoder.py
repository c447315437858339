"""The autoencoder (Hinton and Salakhutdinov 2006), and the networks that it shares with the VAE.

An encoder takes images `[b, h, w, c]` to features `[b, f]`, and a decoder takes latents `[b, z]` and a shape (h, w, c)
to `[b, h, w, c]`; any two Linen modules that do this can stand in the fields of `Autoencoder` and `VAE`, which add the
layers from features to latents.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dalle2_jax.diffusion.sampler import keys_for, normal
from dalle2_jax.errors import InputError
from dalle2_jax.layers.convolution import Resample

ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh, "silu": nn.silu}
LOSSES = ("mse", "bce")


def _check_network(module: nn.Module, widths: tuple[int, ...], least: int = 0) -> None:
    kind = type(module).__name__
    if module.activation not in ACTIVATIONS:
        raise InputError(f"{kind}.activation is {module.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if len(widths) < least:
        raise InputError(f"{kind}.widths is empty; give it an entry for each time that an image is halved")
    if min(widths, default=1) < 1:
        raise InputError(f"{kind} has layers of widths {tuple(widths)}; each must be 1 or more")


class MLPEncoder(nn.Module):
    """Flattened images through dense layers; without one (`hidden=()`) the features are the pixels.

    Fields:
        hidden: widths of the layers. Kingma and Welling (2014) have one of 500 for MNIST.
        activation: "relu", "tanh" (theirs) or "silu".
        dtype: of the computation. param_dtype: of the parameters.
    """

    hidden: tuple[int, ...] = (500,)
    activation: str = "relu"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_network(self, self.hidden)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """`[b, h, w, c]` to features `[b, f]`."""
        return _hidden_layers(self, images.reshape(images.shape[0], -1))


class MLPDecoder(nn.Module):
    """Dense layers from a latent to all pixels; without a hidden one (`hidden=()`) it is linear. Fields are those of
    `MLPEncoder`; the last layer computes in float32."""

    hidden: tuple[int, ...] = (500,)
    activation: str = "relu"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_network(self, self.hidden)
        super().__post_init__()

    @nn.compact
    def __call__(self, latent: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        """`[b, z]` to float32 `[b, h, w, c]`."""
        height, width, channels = shape
        x = _hidden_layers(self, latent)
        x = nn.Dense(height * width * channels, dtype="float32", param_dtype=self.param_dtype, name="out")(x)
        return x.reshape(-1, *shape)


class ConvEncoder(nn.Module):
    """A 3x3 convolution of stride two a level, each followed by the activation; the features are the last, flattened.

    Fields:
        widths: channels of each level; both sides of the images must be divisible by 2 to the number of levels.
        activation, dtype, param_dtype: see `MLPEncoder`.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    activation: str = "relu"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_network(self, self.widths, least=1)
        super().__post_init__()

    @property
    def halvings(self) -> int:
        """How often it halves an image."""
        return len(self.widths)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """`[b, h, w, c]` to features `[b, f]`."""
        x = images
        for level, width in enumerate(self.widths):
            conv = Resample(width, "down", dtype=self.dtype, param_dtype=self.param_dtype, name=f"level_{level}")
            x = ACTIVATIONS[self.activation](conv(x))
        return x.reshape(x.shape[0], -1)


class ConvDecoder(nn.Module):
    """The mirror of `ConvEncoder`: a dense layer, then each level doubles the image and convolves it (3x3).

    Pixels are repeated rather than spread by a transposed convolution, whose kernels overlap unevenly (Odena et al.
    2016). The last convolution computes in float32.

    Fields:
        widths: channels before each doubling, coarsest first. Others: as `ConvEncoder`.
    """

    widths: tuple[int, ...] = (128, 64, 32)
    activation: str = "relu"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_network(self, self.widths, least=1)
        super().__post_init__()

    @property
    def halvings(self) -> int:
        """How often it doubles an image."""
        return len(self.widths)

    @nn.compact
    def __call__(self, latent: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        """`[b, z]` to float32 `[b, h, w, c]`."""
        height, width, channels = (*(side >> self.halvings for side in shape[:2]), shape[2])
        first, *others = self.widths
        x = nn.Dense(height * width * first, dtype=self.dtype, param_dtype=self.param_dtype, name="in")(latent)
        x = ACTIVATIONS[self.activation](x).reshape(-1, height, width, first)
        for level, features in enumerate(others):
            conv = Resample(features, "up", dtype=self.dtype, param_dtype=self.param_dtype, name=f"level_{level}")
            x = ACTIVATIONS[self.activation](conv(x))
        return Resample(channels, "up", dtype="float32", param_dtype=self.param_dtype, name="out")(x)


class Autoencoder(nn.Module):
    """Images to a latent vector and back, without noise: nothing makes its latents fill the space between them, so that
    what it decodes of a random one is no image.

    With `hidden=()` in both networks and "mse" it is linear, and at best spans the space of the first `latent_size`
    principal components (Baldi and Hornik 1989).

    Fields:
        encoder, decoder: see above.
        latent_size: z, of the latent. image_size, channels: of the images, which are square.
        loss_kind: "mse", or "bce": the cross-entropy of pixels in [0, 1], whose decoder's outputs are logits.
        param_dtype: of the layer to the latent, which computes in float32.

    Raises:
        InputError: for sizes below 1, an unknown loss, and an image size that a network cannot halve so often.
    """

    encoder: nn.Module = MLPEncoder()
    decoder: nn.Module = MLPDecoder()
    latent_size: int = 20
    image_size: int = 28
    channels: int = 1
    loss_kind: str = "mse"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.loss_kind not in LOSSES:
            raise InputError(f"the autoencoder's loss_kind is {self.loss_kind!r}; it must be {' or '.join(LOSSES)}")
        super().__post_init__()

    def setup(self) -> None:
        self.latent = nn.Dense(self.latent_size, dtype="float32", param_dtype=self.param_dtype)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images `[b, h, w, c]` in [-1, 1] to latents, float32 `[b, z]`."""
        check_images(self, images)
        return self.latent(self.encoder(images))

    def decode(self, latent: jax.Array) -> jax.Array:
        """Latents `[b, z]` to images, float32 `[b, h, w, c]` in [-1, 1]."""
        outputs = self.outputs(latent)
        return logits_to_images(outputs) if self.loss_kind == "bce" else jnp.clip(outputs, -1.0, 1.0)

    def reconstruct(self, images: jax.Array) -> jax.Array:
        """Images `[b, h, w, c]` in [-1, 1], encoded and decoded."""
        return self.decode(self.encode(images))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images `[b, h, w, c]` in [-1, 1] to the `outputs` for them."""
        return self.outputs(self.encode(images))

    def outputs(self, latent: jax.Array) -> jax.Array:
        """Latents `[b, z]` to what `autoencoder_loss` takes: images that are not clipped, or logits `[b, h, w, c]`."""
        return self.decoder(latent, (self.image_size, self.image_size, self.channels))


def autoencoder_loss(outputs: jax.Array, images: jax.Array, kind: str = "mse") -> jax.Array:
    """The mean over pixels and channels, float32 `[b]`, of images `[b, h, w, c]` in [-1, 1] and a decoder's outputs.

    kind: "mse": squared error of images in [-1, 1]. "bce": cross-entropy in nats of the images in [0, 1] under logits,
    which for grey pixels is at least their entropy, and not 0.

    Raises:
        InputError: for an unknown kind.
    """
    if kind not in LOSSES:
        raise InputError(f"the autoencoder's loss is {kind!r}; it must be {' or '.join(LOSSES)}")
    outputs, images = outputs.astype(jnp.float32), images.astype(jnp.float32)
    if kind == "bce":
        return optax.sigmoid_binary_cross_entropy(outputs, to_unit(images)).mean((1, 2, 3))
    return jnp.square(outputs - images).mean((1, 2, 3))


def reconstruct(module: nn.Module, params: Any, images: jax.Array) -> jax.Array:
    """Images `[b, h, w, c]` in [-1, 1] through an `Autoencoder`, or through a `VAE` by the mean of its posterior."""
    return module.apply({"params": params}, images, method="reconstruct")


def sample_autoencoder(
    key: jax.Array, module: Autoencoder, params: Any, mean: jax.Array, square: jax.Array, count: int
) -> jax.Array:
    """`count` images, float32 `[count, h, w, c]` in [-1, 1], of latents from a normal distribution with the moments of
    images' latents: an autoencoder has no prior of its own (Ghosh et al. 2020, Sec. 4, "ex-post density estimation").

    Args:
        key: one key, or one an image `[count]`, with which an image is the same alone and in any batch.
        mean, square: E[z] `[z]` and E[z z^T] `[z, z]`, as `latent_moments` gives them.

    Raises:
        InputError: for another number of keys.
    """
    values, vectors = jnp.linalg.eigh(square - jnp.outer(mean, mean))
    root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None]
    latent = mean[None] + normal(keys_for(key, count), (count, module.latent_size)) @ root.T
    return module.apply({"params": params}, latent, method="decode")


def latent_moments(latent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E[z] `[z]` and E[z z^T] `[z, z]`, float32, of latents `[b, z]`; means of several batches are those of all."""
    latent = latent.astype(jnp.float32)
    return latent.mean(0), latent.T @ latent / latent.shape[0]


def to_unit(images: jax.Array) -> jax.Array:
    """Images in [-1, 1] to [0, 1]."""
    return (images + 1.0) / 2.0


def logits_to_images(logits: jax.Array) -> jax.Array:
    """Logits of pixels in [0, 1] to images in [-1, 1]: 2 sigmoid(l) - 1."""
    return jnp.tanh(logits / 2.0)


def check_sizes(module: nn.Module) -> None:
    """Raises InputError unless a module with `encoder`, `decoder`, `latent_size`, `image_size`, `channels` can be."""
    for name in ("latent_size", "image_size", "channels"):
        if getattr(module, name) < 1:
            raise InputError(f"{name} is {getattr(module, name)}; it must be 1 or more")
    for name in ("encoder", "decoder"):
        halvings = getattr(getattr(module, name), "halvings", 0)
        if module.image_size % 2**halvings:
            raise InputError(
                f"image_size is {module.image_size}, which cannot be halved {halvings} times, as the {name} does; "
                f"set a multiple of {2**halvings}, or give {name}.widths fewer entries"
            )


def check_images(module: nn.Module, images: jax.Array) -> None:
    """Raises InputError unless images are `[b, image_size, image_size, channels]`."""
    shape = (module.image_size, module.image_size, module.channels)
    if images.ndim != 4 or images.shape[1:] != shape:
        raise InputError(f"the images must be [b, {', '.join(map(str, shape))}], not {list(images.shape)}")


def _hidden_layers(module: MLPEncoder | MLPDecoder, x: jax.Array) -> jax.Array:
    for number, width in enumerate(module.hidden):
        dense = nn.Dense(width, dtype=module.dtype, param_dtype=module.param_dtype, name=f"hidden_{number}")
        x = ACTIVATIONS[module.activation](dense(x))
    return x
