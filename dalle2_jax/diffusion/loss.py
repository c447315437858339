"""Training losses of a diffusion process, and its variational bound.

All arithmetic is float32, whatever the network's dtype, and stays finite whatever variances the network asks for.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.process import Process
from dalle2_jax.errors import InputError

KINDS = ("simple", "vlb", "hybrid")
WEIGHTINGS = ("uniform", "min_snr", "min_snr_plus_one")
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
    weighting: str = "uniform",
    weight_limit: float = 5.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a denoiser at one random timestep an example.

    Args:
      key: for the timesteps and the noise that are not given.
      denoiser: f(x_t, t) -> prediction, with t int32 [batch] in the original timesteps.
      x_0: [batch, ..., channels]; images in [-1, 1] for "vlb" and "hybrid", whose last term counts 256 levels.
      process: its `prediction` is what the denoiser is held to.
      kind: "simple": the mean squared error of the prediction (DDPM Eq. 14). "vlb": an unbiased estimate, in bits per
        dimension, of the variational bound without its constant prior term (DDPM Eq. 5). "hybrid": "simple" + 0.001
        "vlb", where the latter trains only the variance channels (IDDPM Eq. 16).
      timesteps: int32 [batch], indices into the process' chain; None: uniform.
      noise: of x_0's shape; None: standard normal.
      weighting: of the timesteps in "simple" and "hybrid". "uniform": each counts alike, as in DDPM. "min_snr": as if
        the squared error of x_0 were weighted with min(SNR, weight_limit), whatever is predicted (Hang et al. 2023,
        whose limit is 5). "min_snr_plus_one": with min(SNR + 1, weight_limit), which keeps what is decided under much
        noise; for x0 and v.
      weight_limit: see there.

    Returns:
      The loss, float32 [batch], and its terms, a dict of float32 [batch]: "mse" (unweighted), and "vlb" unless the kind
      is "simple".

    Raises:
      InputError: for an unknown kind or weighting, for "hybrid" without a learned variance, and for a weighting that
        does not go with the prediction or the kind.
    """
    check_loss(process, kind, weighting, weight_limit)
    timesteps_key, noise_key = jax.random.split(key)
    i = jax.random.randint(timesteps_key, x_0.shape[:1], 0, process.steps) if timesteps is None else timesteps
    noise = jax.random.normal(noise_key, x_0.shape, jnp.float32) if noise is None else noise

    x_0 = x_0.astype(jnp.float32)
    x_t = process.q_sample(x_0, i, noise)
    output = denoiser(x_t, process.original_timesteps(i))
    prediction, variance_channels = process.split(output, x_t)
    mse = _mean(jnp.square(prediction - process.target(x_0, noise, i)))
    simple = mse if weighting == "uniform" else snr_weight(process, i, weighting, weight_limit) * mse
    if kind == "simple":
        return simple, {"mse": mse}

    if kind == "hybrid":
        output = jnp.concatenate([jax.lax.stop_gradient(prediction), variance_channels], axis=-1)
    # As in IDDPM, training sees the unclamped mean: a clamp would hide part of its error from the variance.
    vlb = process.steps * vlb_term(output, x_0, x_t, i, process.unclamped())
    return (vlb if kind == "vlb" else simple + VLB_WEIGHT * vlb), {"mse": mse, "vlb": vlb}


def check_loss(process: Process, kind: str, weighting: str = "uniform", weight_limit: float = 5.0) -> None:
    """Raises InputError for what `diffusion_loss` does not take."""
    if kind not in KINDS:
        raise InputError(f"unknown diffusion loss {kind!r}; the losses are {', '.join(KINDS)}")
    if kind == "hybrid" and process.variance != "learned_range":
        raise InputError(f"the hybrid loss needs variance='learned_range', and this process has {process.variance!r}")
    if weighting not in WEIGHTINGS:
        raise InputError(f"unknown weighting {weighting!r} of the timesteps; there are {', '.join(WEIGHTINGS)}")
    if weighting == "uniform":
        return
    if weight_limit < 1:
        raise InputError(f"weight_limit is {weight_limit}; it must be 1 or more")
    if weighting == "min_snr" and process.zero_terminal_snr:
        raise InputError(
            "min_snr gives the last timestep of a process with zero_terminal_snr no weight, and sampling starts there; "
            "set weighting=min_snr_plus_one"
        )
    if kind == "vlb":
        raise InputError("the vlb loss has weights of its own; set weighting=uniform")
    if weighting == "min_snr_plus_one" and process.prediction == "epsilon":
        raise InputError(
            "min_snr_plus_one weights the squared error of a network that predicts x0 or v: under much noise that of "
            "epsilon says nothing of x_0; set weighting=min_snr or uniform"
        )


def snr_weight(process: Process, i: jax.Array, weighting: str, limit: float) -> jax.Array:
    """What makes the squared error of the prediction min(SNR, limit) or min(SNR + 1, limit) times that of x_0.

    Without a limit the former is the squared error of epsilon and the latter that of v (Salimans and Ho 2022, Sec.
    4.2), whose weights grow without bounds as the noise vanishes; a limit keeps a network from spending itself there.
    """
    abar = process.alphas_cumprod
    snr = abar / (1.0 - abar)
    weight = np.minimum(snr if weighting == "min_snr" else 1.0 / (1.0 - abar), limit)
    # How many times the squared error of x_0 the squared error of the prediction is.
    scale = {"epsilon": snr, "x0": np.ones_like(snr), "v": 1.0 / (1.0 - abar)}[process.prediction]
    return jnp.asarray(weight / scale, jnp.float32)[i]


def vlb_term(output: jax.Array, x_0: jax.Array, x_t: jax.Array, i: jax.Array, process: Process) -> jax.Array:
    """L_{t-1} of the variational bound (DDPM Eq. 5), float32 [batch], in bits per dimension.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at the first step the discretised likelihood of x_0 instead. The
    former is exact for Gaussians; the latter is for images of 256 levels in [-1, 1].
    """
    mean, _, log_variance = process.q_posterior(x_0, x_t, i)
    model = process.predict(output, x_t, i)
    divergence = _mean(gaussian_kl(mean, log_variance, model.mean, model.log_variance))
    likelihood = _mean(discretized_gaussian_log_likelihood(x_0, model.mean, 0.5 * model.log_variance))
    return jnp.where(jnp.asarray(i) == 0, -likelihood, divergence) / math.log(2)


def variational_bound(
    key: jax.Array, denoiser: Denoiser, x_0: jax.Array, process: Process, noise: jax.Array | None = None
) -> dict[str, jax.Array]:
    """The whole variational bound of images x_0 in [-1, 1] (DDPM Eq. 5), in bits per dimension, by one `lax.scan`.

    Returns {"total": [batch], "prior": [batch] (KL of q(x_T | x_0) to the standard normal), "terms": [batch, steps],
    "mse": [batch, steps] (of epsilon)}; every step is estimated once, with its own noise: `noise` [steps, batch, ...]
    where it is given.
    """
    x_0 = x_0.astype(jnp.float32)
    batch = x_0.shape[0]

    def term(_, step):
        i = jnp.full((batch,), step, jnp.int32)
        if noise is None:
            added = jax.random.normal(jax.random.fold_in(key, step), x_0.shape, jnp.float32)
        else:
            added = jnp.asarray(noise, jnp.float32)[step]
        x_t = process.q_sample(x_0, i, added)
        output = denoiser(x_t, process.original_timesteps(i))
        mse = _mean(jnp.square(process.predict(output, x_t, i).epsilon - added))
        return None, (vlb_term(output, x_0, x_t, i, process), mse)

    _, (terms, mse) = jax.lax.scan(term, None, jnp.arange(process.steps, dtype=jnp.int32))
    prior = prior_term(x_0, process)
    return {"total": prior + terms.sum(axis=0), "prior": prior, "terms": terms.T, "mse": mse.T}


def prior_term(x_0: jax.Array, process: Process) -> jax.Array:
    """L_T of the variational bound (DDPM Eq. 5), float32 [batch], in bits per dimension: KL(q(x_T | x_0) || N(0, 1)).

    What does not depend on x_0 is computed in float64, where its terms do not cancel to nothing.
    """
    abar = float(process.alphas_cumprod[-1])
    constant = -0.5 * (math.log1p(-abar) + abar)
    return (constant + 0.5 * abar * _mean(jnp.square(x_0.astype(jnp.float32)))) / math.log(2)


def estimated_bound(
    key: jax.Array, denoiser: Denoiser, x_0: jax.Array, process: Process, evaluations: int = 4
) -> jax.Array:
    """An unbiased estimate of the mean of `variational_bound`'s "total" over a batch, a float32 scalar.

    The prior's term and the likelihood at the first step are taken of every example. The other terms fall about as
    1 / step: so often are steps sampled, and weighted by the inverse. Each example has `evaluations` of them, and those
    of all examples together are stratified. The network sees the batch 1 + `evaluations` times, by one `lax.scan`.

    Raises:
      InputError: for fewer than one evaluation.
    """
    if evaluations < 1:
        raise InputError(f"the bound is estimated by {evaluations} evaluations; it must be 1 or more")
    x_0 = x_0.astype(jnp.float32)
    batch, count = x_0.shape[0], x_0.shape[0] * evaluations
    order_key, place_key, noise_key = jax.random.split(key, 3)
    steps, weights = jnp.zeros((1, batch), jnp.int32), jnp.ones(1, jnp.float32)
    if process.steps > 1:
        shares = 1.0 / np.arange(1, process.steps)
        shares /= shares.sum()
        order = jax.random.permutation(order_key, count).astype(jnp.float32)
        places = (order + jax.random.uniform(place_key, (count,))) / count
        edges = jnp.asarray(np.cumsum(shares)[:-1], jnp.float32)
        others = 1 + jnp.searchsorted(edges, places, side="right").astype(jnp.int32)
        steps = jnp.concatenate([steps, others.reshape(evaluations, batch)])
        weights = jnp.asarray(1.0 / np.append(1.0, evaluations * shares), jnp.float32)

    def term(_: None, one: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        i, key = one
        x_t = process.q_sample(x_0, i, jax.random.normal(key, x_0.shape, jnp.float32))
        output = denoiser(x_t, process.original_timesteps(i))
        return None, weights[i] * vlb_term(output, x_0, x_t, i, process)

    _, terms = jax.lax.scan(term, None, (steps, jax.random.split(noise_key, len(steps))))
    return (prior_term(x_0, process) + terms.sum(axis=0)).mean()


def x0_error(key: jax.Array, denoiser: Denoiser, x_0: jax.Array, process: Process, points: int = 20) -> jax.Array:
    """The mean squared error a dimension of the predicted x_0, float32 [points], at evenly spread timesteps.

    What `Process.x0_error` wants: for the best network it is the variance of x_0 given x_t, averaged over dimensions
    and examples, by which Analytic-DPM finds the variance of the reverse step. One `lax.scan`.
    """
    x_0 = x_0.astype(jnp.float32)
    places = np.rint(np.linspace(0, process.steps - 1, points)).astype(np.int32)

    def error(_, place):
        i = jnp.full(x_0.shape[:1], place)
        noise = jax.random.normal(jax.random.fold_in(key, place), x_0.shape, jnp.float32)
        x_t = process.q_sample(x_0, i, noise)
        model = process.predict(denoiser(x_t, process.original_timesteps(i)), x_t, i)
        return None, jnp.square(model.x_0 - x_0).mean()

    return jax.lax.scan(error, None, jnp.asarray(places))[1]


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
