"""Training losses of a diffusion process, and its variational bound.

All arithmetic is float32, whatever the network's dtype, and stays finite whatever variances the network asks for.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.process import Process

KINDS = ("simple", "vlb", "hybrid")
VLB_WEIGHT = 0.001  # lambda of IDDPM Eq. 16
# exp is continued by its tangent from here on: no variance a network can utter makes a loss or its gradient overflow.
LARGEST_EXPONENT = 20.0

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


def diffusion_loss(
    key: jax.Array,
    denoiser: Denoiser,
    x_0: jax.Array,
    process: Process,
    kind: str = "simple",
    timesteps: jax.Array | None = None,
    noise: jax.Array | None = None,
    weight_limit: float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a denoiser at one random timestep an example.

    Args:
      key: for the timesteps and the noise that are not given.
      denoiser: f(x_t, t) -> prediction, with t int32 [batch] in the original timesteps.
      x_0: [batch, ..., channels]; pictures in [-1, 1] for "vlb" and "hybrid", whose last term counts 256 levels.
      process: its `prediction` is what the denoiser is held to.
      kind: "simple": the mean squared error of the prediction (DDPM Eq. 14). "vlb": an unbiased estimate, in bits per
        dimension, of the variational bound without its constant prior term (DDPM Eq. 5). "hybrid": "simple" + 0.001
        "vlb", where the latter trains only the variance channels (IDDPM Eq. 16).
      timesteps: int32 [batch], indices into the process' chain; None: uniform.
      noise: of x_0's shape; None: standard normal.
      weight_limit: None leaves every timestep's squared error of the prediction its weight of 1. A number weights the
        squared error of x_0 with min(SNR + 1, weight_limit) instead, whether x_0 or v is predicted (`snr_weight`).

    Returns:
      The loss, float32 [batch], and its terms, a dict of float32 [batch]: "mse" (unweighted), and "vlb" unless the kind
      is "simple".

    Raises:
      ValueError: for an unknown kind, for "hybrid" without a learned variance, and for a weight limit that is below 1
        or has nothing to weight.
    """
    check_loss(process, kind, weight_limit)
    timesteps_key, noise_key = jax.random.split(key)
    i = jax.random.randint(timesteps_key, x_0.shape[:1], 0, process.steps) if timesteps is None else timesteps
    noise = jax.random.normal(noise_key, x_0.shape, jnp.float32) if noise is None else noise

    x_0 = x_0.astype(jnp.float32)
    x_t = process.q_sample(x_0, i, noise)
    output = denoiser(x_t, process.original_timesteps(i))
    prediction, variance_channels = process.split(output, x_t)
    mse = _mean(jnp.square(prediction - process.target(x_0, noise, i)))
    simple = mse if weight_limit is None else snr_weight(process, i, weight_limit) * mse
    if kind == "simple":
        return simple, {"mse": mse}

    if kind == "hybrid":
        output = jnp.concatenate([jax.lax.stop_gradient(prediction), variance_channels], axis=-1)
    # As in IDDPM, training sees the unclamped mean: a clamp would hide part of its error from the variance.
    unclamped = dataclasses.replace(process, clip=None)
    vlb = process.steps * vlb_term(output, x_0, x_t, i, unclamped)
    return (vlb if kind == "vlb" else simple + VLB_WEIGHT * vlb), {"mse": mse, "vlb": vlb}


def check_loss(process: Process, kind: str, weight_limit: float | None = None) -> None:
    """Raises ValueError for what `diffusion_loss` does not take."""
    if kind not in KINDS:
        raise ValueError(f"unknown diffusion loss {kind!r}; the losses are {', '.join(KINDS)}")
    if kind == "hybrid" and process.variance != "learned_range":
        raise ValueError(f"the hybrid loss needs variance='learned_range', and this process has {process.variance!r}")
    if weight_limit is None:
        return
    if weight_limit < 1:
        raise ValueError(f"weight_limit is {weight_limit}; weights start at 1, so it must be 1 or more, or None")
    if kind == "vlb" or process.prediction == "epsilon":
        raise ValueError(
            "weight_limit weights the squared error of a network that predicts x0 or v: under much noise that of "
            "epsilon says nothing of x_0, and the vlb loss has weights of its own; set weight_limit=None"
        )


def snr_weight(process: Process, i: jax.Array, limit: float) -> jax.Array:
    """What makes the squared error of the prediction (x_0 or v) min(SNR + 1, limit) times that of x_0, of i's shape.

    With no limit this is the squared error of v (Salimans and Ho 2022, Sec. 4.2), whose weight grows without bounds as
    the noise vanishes; the limit keeps a network that predicts x_0 from spending itself there (as min-SNR does, Hang et
    al. 2023), and the 1 keeps what is decided under much noise.
    """
    weight = 1.0 / (1.0 - process.alphas_cumprod)
    # The squared error of v is that of x_0 times SNR + 1.
    scale = weight if process.prediction == "v" else 1.0
    return jnp.asarray(np.minimum(weight, limit) / scale, jnp.float32)[i]


def vlb_term(output: jax.Array, x_0: jax.Array, x_t: jax.Array, i: jax.Array, process: Process) -> jax.Array:
    """L_{t-1} of the variational bound (DDPM Eq. 5), float32 [batch], in bits per dimension.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at the first step the discretised likelihood of x_0 instead. The
    former is exact for Gaussians; the latter is for pictures of 256 levels in [-1, 1].
    """
    mean, _, log_variance = process.q_posterior(x_0, x_t, i)
    model = process.predict(output, x_t, i)
    divergence = _mean(gaussian_kl(mean, log_variance, model.mean, model.log_variance))
    likelihood = _mean(discretized_gaussian_log_likelihood(x_0, model.mean, 0.5 * model.log_variance))
    return jnp.where(jnp.asarray(i) == 0, -likelihood, divergence) / math.log(2)


def variational_bound(key: jax.Array, denoiser: Denoiser, x_0: jax.Array, process: Process) -> dict[str, jax.Array]:
    """The whole variational bound of pictures x_0 in [-1, 1] (DDPM Eq. 5), in bits per dimension, by one `lax.scan`.

    Returns {"total": [batch], "prior": [batch] (KL of q(x_T | x_0) to the standard normal), "terms": [batch, steps],
    "mse": [batch, steps] (of epsilon)}; every step is estimated once, with its own noise.
    """
    x_0 = x_0.astype(jnp.float32)
    batch = x_0.shape[0]

    def term(_, step):
        i = jnp.full((batch,), step, jnp.int32)
        noise = jax.random.normal(jax.random.fold_in(key, step), x_0.shape, jnp.float32)
        x_t = process.q_sample(x_0, i, noise)
        output = denoiser(x_t, process.original_timesteps(i))
        mse = _mean(jnp.square(process.predict(output, x_t, i).epsilon - noise))
        return None, (vlb_term(output, x_0, x_t, i, process), mse)

    _, (terms, mse) = jax.lax.scan(term, None, jnp.arange(process.steps, dtype=jnp.int32))
    abar = float(process.alphas_cumprod[-1])
    log_variance = jnp.full(x_0.shape, math.log1p(-abar), jnp.float32)
    prior = _mean(gaussian_kl(math.sqrt(abar) * x_0, log_variance, jnp.zeros_like(x_0), jnp.zeros_like(x_0)))
    prior = prior / math.log(2)
    return {"total": prior + terms.sum(axis=0), "prior": prior, "terms": terms.T, "mse": mse.T}


def gaussian_kl(
    mean: jax.Array, log_variance: jax.Array, other_mean: jax.Array, other_log_variance: jax.Array
) -> jax.Array:
    """KL(N(mean, exp(log_variance)) || N(other_mean, exp(other_log_variance))) elementwise, in nats."""
    ratio = _exp(log_variance - other_log_variance)
    distance = jnp.square(mean - other_mean) * _exp(-other_log_variance)
    return 0.5 * (other_log_variance - log_variance - 1.0 + ratio + distance)


def discretized_gaussian_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """log P of the one of 256 levels in [-1, 1] that x is, under a Gaussian (DDPM Eq. 13), elementwise, in nats.

    The first and last level reach to infinity. The normal CDF is the tanh approximation of DDPM's code, so that
    likelihoods compare with published ones.
    """
    inverse_scale = _exp(-log_scale)
    upper, lower = inverse_scale * (x - mean + 1 / 255), inverse_scale * (x - mean - 1 / 255)
    # A level above the mean is taken at its mirror image: in the upper tail float32 cannot tell two CDFs from 1.
    above = x > mean
    inside = _approximate_normal_cdf(jnp.where(above, -lower, upper))
    inside -= _approximate_normal_cdf(jnp.where(above, -upper, lower))
    first, last = _approximate_normal_cdf(upper), _approximate_normal_cdf(-lower)
    probability = jnp.where(x < -0.999, first, jnp.where(x > 0.999, last, inside))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _approximate_normal_cdf(x: jax.Array) -> jax.Array:
    x = jnp.clip(x, -20.0, 20.0)  # where it has long been flat: the cube cannot overflow
    # sigmoid(2 y) = (1 + tanh(y)) / 2, and keeps its relative precision in the lower tail.
    return jax.nn.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))


def _exp(x: jax.Array) -> jax.Array:
    excess = jnp.maximum(x - LARGEST_EXPONENT, 0.0)
    return jnp.exp(jnp.minimum(x, LARGEST_EXPONENT)) * (1.0 + excess)


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=tuple(range(1, x.ndim)))
