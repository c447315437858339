"""The variational autoencoder (Kingma and Welling 2014): its network, its bounds on log p(x), and its latent space.

Terms of the bounds are summed over their own dimensions, pixels or latents, and averaged over the batch alone: a mean
over either one hides a weight of the KL divergence, of which `beta` is the place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dalle2_jax.diffusion.loss import discretized_gaussian_log_likelihood, gaussian_kl
from dalle2_jax.diffusion.sampler import fold_in, keys_for, normal
from dalle2_jax.errors import InputError
from dalle2_jax.lineage.autoencoder import (
    MLPDecoder,
    MLPEncoder,
    check_images,
    check_sizes,
    logits_to_images,
    to_unit,
)

LIKELIHOODS = ("bernoulli", "gaussian", "discretized_gaussian")
# The standard deviation that rounding to 256 levels leaves in [-1, 1]. Below it a density of such images only grows
# with how well it hits the levels, without bounds.
LEAST_LOG_SIGMA = math.log(2 / 255 / math.sqrt(12))
LEAST_LOG_PROBABILITY = math.log(1e-12) + 1e-3  # of `discretized_gaussian_log_likelihood`, and float32's rounding
FIRST_SIGMA = 0.1  # of a learned one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Likelihood:
    """p(x | z) of images, with independent pixels; a pytree.

    Fields:
        kind: one of `LIKELIHOODS`.
        outputs: float32 `[b, h, w, c]`: logits for "bernoulli", else the mean in [-1, 1].
        log_sigma: the scalar log standard deviation, of images in [-1, 1]; None: what suits the images best that it is
            asked about ("gaussian"), or there is none ("bernoulli").
    """

    kind: str = dataclasses.field(metadata={"static": True})
    outputs: jax.Array
    log_sigma: jax.Array | None = None

    @property
    def images(self) -> jax.Array:
        """The means, as images `[b, h, w, c]` in [-1, 1]."""
        return logits_to_images(self.outputs) if self.kind == "bernoulli" else jnp.clip(self.outputs, -1.0, 1.0)

    def fitted(self, images: jax.Array) -> Likelihood:
        """The same, where log_sigma is open with that of the greatest likelihood of these images `[b, h, w, c]`
        together: sigma^2 is their mean squared error (sigma-VAE, Rybkin et al. 2021)."""
        if self.kind != "gaussian" or self.log_sigma is not None:
            return self
        # No gradient: at the best sigma there is none.
        error = jax.lax.stop_gradient(jnp.mean(jnp.square(images - self.outputs)))
        least = math.exp(2 * LEAST_LOG_SIGMA)
        return dataclasses.replace(self, log_sigma=0.5 * jnp.log(jnp.maximum(error, least)))

    def log_prob(self, images: jax.Array) -> jax.Array:
        """log p(x | z) of images `[b, h, w, c]` in [-1, 1], float32 `[b]`, in nats, summed over pixels and channels.

        "gaussian" is a density of images in [-1, 1], and can be above 0; "discretized_gaussian" the probability of
        images of 256 levels, of which none has less than 1e-12. "bernoulli" is a probability for pixels of 0 and 1
        (here -1 and 1) alone: for grey ones it is a cross-entropy, and its nats compare with nobody's.
        """
        images, found = images.astype(jnp.float32), self.fitted(images.astype(jnp.float32))
        if self.kind == "bernoulli":
            return -optax.sigmoid_binary_cross_entropy(self.outputs, to_unit(images)).sum((1, 2, 3))
        errors = (images - self.outputs) * jnp.exp(-found.log_sigma)
        density = -0.5 * (jnp.square(errors) + math.log(2 * math.pi)) - found.log_sigma
        if self.kind == "gaussian":
            return density.sum((1, 2, 3))
        terms = discretized_gaussian_log_likelihood(images, self.outputs, found.log_sigma)
        # At its least it is flat, some six sigma from the mean: there it has the gradient of the density, without which
        # neither mean nor sigma would learn of what they are furthest from.
        slope = density - jax.lax.stop_gradient(density)
        return (terms + jnp.where(terms <= LEAST_LOG_PROBABILITY, slope, 0.0)).sum((1, 2, 3))


class VAE(nn.Module):
    """A gaussian posterior q(z | x) with independent latents, and p(x | z) under a standard normal prior p(z).

    The defaults are those of Kingma and Welling for MNIST (one hidden layer of 500 units, 20 latents), but for ReLU.

    Fields:
        encoder, decoder: as in `Autoencoder`.
        latent_size: z. image_size, channels: of the images, which are square.
        likelihood: of pixels: "bernoulli" (in [0, 1]; a likelihood of binarised pixels alone), "gaussian", or
            "discretized_gaussian", whose bits per dimension are those of 8-bit images.
        sigma: of the gaussians, for images in [-1, 1]: a number; "learned", one parameter for all pixels; or "optimal",
            for "gaussian", the best for the batch at hand, without a parameter (sigma-VAE). With either of these beta
            needs no guess; a batch with a sigma of its own is a little more likely than under one for all.
        param_dtype: of the layers to mean and log variance, which compute in float32.

    Raises:
        InputError: for sizes below 1, an unknown likelihood or sigma, and an image size that a network cannot halve so
            often.
    """

    encoder: nn.Module = MLPEncoder()
    decoder: nn.Module = MLPDecoder()
    latent_size: int = 20
    image_size: int = 28
    channels: int = 1
    likelihood: str = "bernoulli"
    sigma: float | str = "learned"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.likelihood not in LIKELIHOODS:
            raise InputError(f"the likelihood is {self.likelihood!r}; it must be one of {', '.join(LIKELIHOODS)}")
        if self.sigma not in ("learned", "optimal") and (isinstance(self.sigma, str) or not self.sigma > 0):
            raise InputError(f"sigma is {self.sigma!r}; it must be a number above 0, or learned or optimal")
        if self.sigma == "optimal" and self.likelihood == "discretized_gaussian":
            raise InputError("sigma=optimal is found for the gaussian likelihood alone; set sigma=learned or a number")
        super().__post_init__()

    def setup(self) -> None:
        self.mean = nn.Dense(self.latent_size, dtype="float32", param_dtype=self.param_dtype)
        self.log_variance = nn.Dense(self.latent_size, dtype="float32", param_dtype=self.param_dtype)
        if self.likelihood != "bernoulli" and self.sigma == "learned":
            first = nn.initializers.constant(math.log(FIRST_SIGMA))
            self.log_sigma = self.param("log_sigma", first, (), self.param_dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images `[b, h, w, c]` in [-1, 1] to mean and log variance of q(z | x), float32 `[b, z]`."""
        check_images(self, images)
        features = self.encoder(images)
        return self.mean(features), self.log_variance(features)

    def decode(self, latent: jax.Array) -> Likelihood:
        """Latents `[b, z]` to p(x | z)."""
        outputs = self.decoder(latent, (self.image_size, self.image_size, self.channels))
        return Likelihood(self.likelihood, outputs, self._log_sigma())

    def reconstruct(self, images: jax.Array) -> jax.Array:
        """Images `[b, h, w, c]` in [-1, 1] through the mean of their posterior."""
        return self.decode(self.encode(images)[0]).images

    def __call__(self, images: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, Likelihood]:
        """Mean and log variance `[b, z]` of q(z | x), and p(x | z) of one sample of it."""
        mean, log_variance = self.encode(images)
        return mean, log_variance, self.decode(sample_latent(key, mean, log_variance))

    def _log_sigma(self) -> jax.Array | None:
        if self.likelihood == "bernoulli" or self.sigma == "optimal":
            return None
        if self.sigma == "learned":  # a soft limit, from below which it can come back
            raw = self.log_sigma.astype(jnp.float32)
            return LEAST_LOG_SIGMA + nn.softplus(raw - LEAST_LOG_SIGMA)
        return jnp.float32(math.log(self.sigma))


def sample_latent(key: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """A sample of q(z | x), `[b, z]`, differentiable in mean and log variance `[b, z]` (Kingma and Welling, Eq. 4).

    `key` is one key, or a batch of keys `[b]`, with which an example's noise does not depend on its neighbours.
    """
    return mean + jnp.exp(0.5 * log_variance) * normal(key, mean.shape)


def gaussian_kl_to_standard(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) of `[b, z]`, float32 `[b]`, in nats, summed over the latents.

    1/2 sum_j (mu_j^2 + sigma_j^2 - 1 - log sigma_j^2) (Kingma and Welling 2014, App. B).
    """
    return _kl_terms(mean, log_variance).sum(-1)


def _kl_terms(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    mean, log_variance = mean.astype(jnp.float32), log_variance.astype(jnp.float32)
    zeros = jnp.zeros_like(mean)
    return gaussian_kl(mean, log_variance, zeros, zeros)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Elbo:
    """The evidence lower bound of each image, its terms apart; a pytree.

    Fields:
        dimensions: of an image, h w c.
        reconstruction: -log p(x | z), float32 `[b]`, in nats.
        kl: KL(q(z | x) || p(z)), float32 `[b]`, in nats.
        loss: float32 scalar, what is minimised: the batch mean of the former and beta times the free-bits KL.
    """

    dimensions: int = dataclasses.field(metadata={"static": True})
    reconstruction: jax.Array
    kl: jax.Array
    loss: jax.Array

    @property
    def value(self) -> jax.Array:
        """The bound itself, of log p(x), float32 `[b]`, in nats, whatever beta and free bits are."""
        return -self.reconstruction - self.kl

    @property
    def reconstruction_bits(self) -> jax.Array:
        """`reconstruction` in bits per dimension."""
        return bits_per_dimension(self.reconstruction, self.dimensions)

    @property
    def kl_bits(self) -> jax.Array:
        """`kl` in bits per dimension of the image."""
        return bits_per_dimension(self.kl, self.dimensions)


def elbo(
    images: jax.Array,
    mean: jax.Array,
    log_variance: jax.Array,
    likelihood: Likelihood,
    beta: float | jax.Array = 1.0,
    free_bits: float | jax.Array = 0.0,
) -> Elbo:
    """The bound with one sample of z and the KL divergence in closed form (Kingma and Welling 2014, Eq. 10).

    Args:
        images: `[b, h, w, c]` in [-1, 1].
        mean, log_variance: `[b, z]`, of q(z | x).
        likelihood: p(x | z) for a sample z of it for each image.
        beta: of the KL divergence in the loss (Higgins et al. 2017).
        free_bits: nats a latent dimension for which the loss does not ask: it counts max(free_bits, KL_j) with KL_j the
            batch mean for latent j (Kingma et al. 2016).
    """
    terms = _kl_terms(mean, log_variance)
    reconstruction = -likelihood.log_prob(images)
    counted = jnp.maximum(terms.mean(0), free_bits).sum()
    return Elbo(math.prod(images.shape[1:]), reconstruction, terms.sum(-1), reconstruction.mean() + beta * counted)


def bits_per_dimension(nats: jax.Array, dimensions: int) -> jax.Array:
    """Nats an image in bits per dimension; comparable between models where the likelihood is a probability of the same
    discrete images, which a density is not."""
    return nats / (dimensions * math.log(2))


def importance_bound(
    key: jax.Array,
    images: jax.Array,
    mean: jax.Array,
    log_variance: jax.Array,
    decode: Callable[[jax.Array], Likelihood],
    samples: int,
) -> jax.Array:
    """log 1/K sum_k p(x, z_k) / q(z_k | x) with K samples of q(z | x), float32 `[b]`, in nats.

    A lower bound of log p(x) in expectation: with one sample the ELBO, with more a tighter one (Burda et al. 2016). One
    `lax.scan` decodes a sample at a time, so that memory does not grow with K. An open sigma is that of the first.

    Args:
        key: one key, or one an image `[b]`; sample k is `sample_latent(fold_in(key, k), mean, log_variance)`.
        images: `[b, h, w, c]` in [-1, 1].
        mean, log_variance: `[b, z]`, of q(z | x).
        decode: latents `[b, z]` to p(x | z).
        samples: K.

    Raises:
        InputError: for fewer than one sample.
    """
    if samples < 1:
        raise InputError(f"the importance bound has {samples} samples; it must have 1 or more")
    log_sigma = decode(sample_latent(fold_in(key, 0), mean, log_variance)).fitted(images).log_sigma

    @jax.checkpoint
    def log_weight(_: None, k: jax.Array) -> tuple[None, jax.Array]:
        noise = normal(fold_in(key, k), mean.shape)
        latent = mean + jnp.exp(0.5 * log_variance) * noise
        likelihood = dataclasses.replace(decode(latent), log_sigma=log_sigma)
        # log p(z) - log q(z | x), whose constants cancel.
        ratio = 0.5 * (jnp.square(noise) + log_variance - jnp.square(latent)).sum(-1)
        return None, likelihood.log_prob(images) + ratio

    _, weights = jax.lax.scan(log_weight, None, jnp.arange(samples))
    return jax.nn.logsumexp(weights, axis=0) - math.log(samples)


def active_units(mean: jax.Array, threshold: float = 0.01) -> jax.Array:
    """How many latents, int32, tell images apart: those whose posterior mean, of `[b, z]`, varies by more than
    `threshold` over the images (Burda et al. 2016)."""
    return jnp.sum(jnp.var(mean.astype(jnp.float32), axis=0) > threshold).astype(jnp.int32)


def traverse(latent: jax.Array, dimension: int, values: jax.Array) -> jax.Array:
    """A latent `[z]` with one of its dimensions at each of the values `[n]`: `[n, z]`.

    Raises:
        InputError: for a dimension that there is not.
    """
    if not 0 <= dimension < latent.shape[0]:
        raise InputError(f"dimension {dimension} was asked for; the latent's are 0 to {latent.shape[0] - 1}")
    return jnp.tile(latent[None], (len(values), 1)).at[:, dimension].set(values)


def interpolate(first: jax.Array, last: jax.Array, count: int) -> jax.Array:
    """Latents `[count, z]` at even steps on the straight line between two `[z]`, both ends among them.

    Raises:
        InputError: for fewer than two, or latents of two sizes.
    """
    if count < 2:
        raise InputError(f"{count} latents were asked for; an interpolation has 2 or more")
    if first.shape != last.shape:
        raise InputError(f"the latents are of shapes {list(first.shape)} and {list(last.shape)}; they must be alike")
    weights = jnp.linspace(0.0, 1.0, count)[:, None]
    return (1.0 - weights) * first[None] + weights * last[None]


def sample_vae(key: jax.Array, module: VAE, params: Any, count: int) -> jax.Array:
    """`count` images, float32 `[count, h, w, c]` in [-1, 1]: the means of p(x | z) for latents of the prior.

    `key` is one key, or one an image `[count]`, with which an image is the same alone and in any batch.

    Raises:
        InputError: for another number of keys.
    """
    latent = normal(keys_for(key, count), (count, module.latent_size))
    return module.apply({"params": params}, latent, method="decode").images
