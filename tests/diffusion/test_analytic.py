"""The analytic variance (Analytic-DPM) on Gaussian data, where it is the variance of the reverse step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import Process, ddpm, x0_error

MEAN, STD = 0.7, 0.3


@pytest.fixture(scope="module")
def measured(gaussian_denoiser):
    """A process with the error that its best denoiser was seen to make."""
    process = Process(prediction="x0", variance="fixed_small", clip=None)
    x_0 = MEAN + STD * jax.random.normal(jax.random.key(0), (8192, 2))
    error = jax.jit(lambda x_0: x0_error(jax.random.key(1), gaussian_denoiser(process, MEAN, STD), x_0, process, 41))
    return dataclasses.replace(process, variance="analytic", x0_error=tuple(np.asarray(error(x_0)).tolist()))


def test_the_error_is_the_variance_that_is_left(measured):
    abar = measured.alphas_cumprod[np.rint(np.linspace(0, 999, 41)).astype(int)]
    left = STD**2 * (1 - abar) / (abar * STD**2 + 1 - abar)
    np.testing.assert_allclose(measured.x0_error, left, rtol=0.06)


def test_the_variance_is_that_of_the_reverse_step(measured):
    process = measured.respaced("20")
    abar, previous = process.alphas_cumprod, process.alphas_cumprod_previous
    total = abar * STD**2 + 1 - abar
    before = previous * STD**2 + 1 - previous
    exact = before - (abar / previous) * before**2 / total
    # The two ends of a step are the narrow places of the interpolation.
    np.testing.assert_allclose(np.exp(process.analytic_log_variance)[1:-1], exact[1:-1], rtol=0.15)
    small = process.posterior_variance
    assert (np.exp(process.analytic_log_variance)[1:] > small[1:]).all()


def test_the_error_in_between_is_near_and_never_beyond_what_it_can_be():
    abar = Process(prediction="x0", variance="fixed_small")._alphas_cumprod
    places = np.rint(np.linspace(0, 999, 20)).astype(int)

    def added(x_0_error, **changes):
        """What the doubt about x_0 adds, as a share of the best network's on data of a standard deviation STD."""
        process = Process(variance="analytic", x0_error=tuple(x_0_error), respacing="64", **changes)
        more = np.exp(process.analytic_log_variance) - process.posterior_variance
        left = STD**2 * (1 - process.alphas_cumprod) / (process.alphas_cumprod * STD**2 + 1 - process.alphas_cumprod)
        return more[1:] / (process.posterior_mean_coefficients[0] ** 2 * left)[1:]

    exact = STD**2 * (1 - abar) / (abar * STD**2 + 1 - abar)
    share = added(exact[places], prediction="x0", clip=None)
    assert 0.97 < share[1:].min() and share.max() < 1.2
    # An error of epsilon that is the same everywhere is an error of x_0 without bounds under much noise.
    far = added((1 - abar[places]) / abar[places] * 1e-3, prediction="epsilon", clip=None)
    near = added((1 - abar[places]) / abar[places] * 1e-3, prediction="epsilon", clip=1.0)
    assert near.max() * STD**2 < 1.01 and (near <= far + 1e-9).all() and far[20] < 0.1
    wild = added(np.full(20, 1e9), prediction="epsilon", clip=None)
    bound = Process(respacing="64").alphas_cumprod
    np.testing.assert_allclose(wild[:-1], ((bound * STD**2 + 1 - bound) / (bound * STD**2))[1:-1], rtol=1e-3)


@pytest.mark.parametrize("respacing", ["5", "fast27"])
def test_few_steps_keep_the_spread(respacing, measured, gaussian_denoiser):
    def spread(process):
        x_T = jax.random.normal(jax.random.key(2), (16384, 2))
        denoiser = gaussian_denoiser(dataclasses.replace(process, variance="fixed_small"), MEAN, STD)
        return float(jax.jit(lambda x_T: ddpm(jax.random.key(3), denoiser, x_T, process))(x_T).std())

    process = measured.respaced(respacing)
    assert abs(spread(process) - STD) < 0.012
    assert spread(dataclasses.replace(process, variance="fixed_small")) < STD - 0.01


def test_it_must_be_measured_first():
    with pytest.raises(ValueError, match="analytic variance needs the network's measured error"):
        Process(variance="analytic")
    assert jnp.isfinite(Process(variance="analytic", x0_error=(0.1,)).analytic_log_variance).all()
