"""DPM-Solver++(2M) and DDIM backwards, against the flow of Gaussian data, which is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import Process, Sampling, ddim, ddim_invert, dpmpp_2m, dpmpp_2m_step

MEAN, STD = 0.7, 0.3
Z = np.linspace(-2, 2, 9)[:, None].astype(np.float32)


def _error(sampler, gaussian_denoiser, steps, **fields):
    """How far a sampler ends from where the probability flow takes x_T = z: mean + std z."""
    process = Process(variance="fixed_small", clip=None, schedule="cosine", respacing=f"logsnr{steps}", **fields)
    x_0 = sampler(jax.random.key(0), gaussian_denoiser(process, MEAN, STD), jnp.asarray(Z), process)
    return float(np.abs(x_0 - (MEAN + STD * Z)).max())


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_few_steps_of_second_order_do_what_many_of_first_order_do(prediction, gaussian_denoiser):
    few = _error(dpmpp_2m, gaussian_denoiser, 12, prediction=prediction)
    evenly = Process(variance="fixed_small", clip=None, respacing="48", prediction=prediction)
    many = ddim(jax.random.key(0), gaussian_denoiser(evenly, MEAN, STD), jnp.asarray(Z), evenly)
    assert few < float(np.abs(many - (MEAN + STD * Z)).max())
    assert few < 0.2 * _error(ddim, gaussian_denoiser, 12, prediction=prediction)


@pytest.mark.parametrize("respacing", ["1", "2", "3", "fast27"])
def test_the_sampler_is_its_steps(respacing):
    process = Process(prediction="x0", variance="fixed_small", respacing=respacing)
    x_T = jax.random.normal(jax.random.key(0), (2, 3))
    x_0 = dpmpp_2m(jax.random.key(1), lambda x, t: jnp.tanh(x), x_T, process)
    previous = x = x_T
    for i in reversed(range(process.steps)):
        predicted = jnp.clip(jnp.tanh(x), -1, 1)
        x, previous = dpmpp_2m_step(predicted, previous, x, jnp.int32(i), process), predicted
    np.testing.assert_allclose(x_0, x, atol=1e-5)
    # It ends at what the network says last.
    np.testing.assert_allclose(x_0, previous, atol=1e-6)


def test_it_starts_where_nothing_of_the_image_is_left(gaussian_denoiser):
    process = Process(prediction="v", variance="fixed_small", clip=None, respacing="250", zero_terminal_snr=True)
    assert process.alphas_cumprod[-1] == 0
    for sampler, bound in ((dpmpp_2m, 0.01), (ddim, 0.02)):
        x_0 = sampler(jax.random.key(0), gaussian_denoiser(process, MEAN, STD), jnp.asarray(Z), process)
        np.testing.assert_allclose(x_0, MEAN + STD * Z, atol=bound)


def test_few_steps_from_pure_noise(gaussian_denoiser):
    trained = Process(prediction="v", variance="fixed_small", clip=None, zero_terminal_snr=True)
    errors = {}
    for steps in ("10", "20"):
        process = Sampling(sampler="dpmpp_2m", steps=steps).process(trained)
        x_0 = dpmpp_2m(jax.random.key(0), gaussian_denoiser(process, MEAN, STD), jnp.asarray(Z), process)
        errors[steps] = float(np.abs(x_0 - (MEAN + STD * Z)).max())
    assert errors["20"] < errors["10"] < 0.1 and errors["20"] < 0.03


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_inversion_finds_the_noise(prediction, gaussian_denoiser):
    process = Process(prediction=prediction, variance="fixed_small", clip=None, respacing="250")
    denoiser = gaussian_denoiser(process, MEAN, STD)
    x_T = ddim_invert(denoiser, jnp.asarray(MEAN + STD * Z), process)
    np.testing.assert_allclose(x_T, Z, atol=0.02)


def test_refinements_close_the_circle(gaussian_denoiser):
    """There and back in ten steps: every refinement of the steps there brings the way back nearer to the start."""
    process = Process(prediction="v", variance="fixed_small", clip=None, respacing="10")
    denoiser = gaussian_denoiser(process, MEAN, STD)
    start = jnp.asarray(MEAN + STD * Z)
    errors = []
    for refinements in (0, 1, 3, 6):
        x_T = ddim_invert(denoiser, start, process, refinements)
        errors.append(float(np.abs(ddim(jax.random.key(0), denoiser, x_T, process) - start).max()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 * errors[0]


def test_inversion_takes_what_the_network_says_without_a_clamp():
    process = Process(prediction="x0", variance="fixed_small", clip=1.0, respacing="5")
    x_0 = jnp.full((1, 4), 0.5)
    far = ddim_invert(lambda x, t: jnp.full_like(x, 3.0), x_0, process)
    near = ddim_invert(lambda x, t: jnp.full_like(x, 1.0), x_0, process)
    assert np.abs(far - near).min() > 0.1
