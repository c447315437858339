"""Closed-form data for the diffusion tests, and strict dtype promotion: the diffusion maths holds under it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import Process
from dalle2_jax.diffusion.process import gather


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def gaussian_denoiser():
    """f(process, mean, std) -> the best denoiser of data that is N(mean, std^2) in every dimension."""
    return _gaussian_denoiser


def _gaussian_denoiser(process: Process, mean: float, std: float):
    """E[target | x_t] of the process' prediction type; with "learned_range" also the variance of x_{t-1} given x_t.

    By linear-Gaussian conditioning, E[x_0 | x_t] = mean + a std^2 / (a^2 std^2 + s^2) (x_t - a mean), where
    a = sqrt(abar) and s^2 = 1 - abar.
    """
    abar, previous = process.alphas_cumprod, np.append(1.0, process.alphas_cumprod[:-1])
    total = abar * std**2 + 1 - abar
    gain = np.sqrt(abar) * std**2 / total
    beta = 1 - abar / previous
    # Var(x_{t-1} | x_t) from the joint Gaussian of the two, whose covariance is sqrt(1 - beta) Var(x_{t-1}).
    before = previous * std**2 + 1 - previous
    variance = before - (1 - beta) * before**2 / total
    small = beta * (1 - previous) / (1 - abar)
    small[0] = small[1]
    fraction = (np.log(variance) - np.log(small)) / (np.log(beta) - np.log(small))

    def function(x_t, t):
        i = jnp.searchsorted(jnp.asarray(process.timestep_map), t)
        a = gather(np.sqrt(abar), i, x_t)
        x_0 = mean + gather(gain, i, x_t) * (x_t - a * mean)
        epsilon = gather(np.sqrt(1 - abar) / total, i, x_t) * (x_t - a * mean)
        v = a * epsilon - gather(np.sqrt(1 - abar), i, x_t) * x_0
        prediction = {"x0": x_0, "epsilon": epsilon, "v": v}[process.prediction]
        if process.variance != "learned_range":
            return prediction
        channels = jnp.broadcast_to(gather(2 * fraction - 1, i, x_t), x_t.shape)
        return jnp.concatenate([prediction, channels], axis=-1)

    return function
