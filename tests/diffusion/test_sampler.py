"""Samplers: closed-form data, noise by example, the last step, dtypes, chains of one step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import SAMPLERS, Process, ddim, ddim_step, ddpm, ddpm_step, normal
from tests.optimised import OPTIMISED

MEAN, STD = 0.7, 0.3


def _moments(gaussian_denoiser, process, count=16384):
    key, noise_key = jax.random.split(jax.random.key(0))
    x_T = jax.random.normal(noise_key, (count, 2))
    denoiser = gaussian_denoiser(process, MEAN, STD)
    draw = jax.jit(lambda key, x_T: ddpm(key, denoiser, x_T, process), compiler_options=OPTIMISED)
    x_0 = draw(key, x_T)
    return float(x_0.mean()), float(x_0.std())


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_ddpm_draws_the_gaussian_it_was_taught(prediction, variance, gaussian_denoiser):
    mean, std = _moments(
        gaussian_denoiser, Process(prediction=prediction, variance=variance, clip=None, respacing="250")
    )
    assert abs(mean - MEAN) < 0.01 and abs(std - STD) < 0.01


@pytest.mark.parametrize("respacing", ["5", "fast27"])
def test_ddpm_with_the_exact_variance_is_exact_in_few_steps(respacing, gaussian_denoiser):
    """Gaussian data has Gaussian reverse steps, so learned variances lose nothing to large strides; fixed ones do."""
    mean, std = _moments(gaussian_denoiser, Process(clip=None, respacing=respacing))
    assert abs(mean - MEAN) < 0.01 and abs(std - STD) < 0.005
    _, too_small = _moments(gaussian_denoiser, Process(clip=None, respacing=respacing, variance="fixed_small"))
    assert too_small < STD - 0.01


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_ddim_draws_the_gaussian_it_was_taught(prediction, gaussian_denoiser):
    process = Process(prediction=prediction, variance="fixed_small", clip=None, schedule="linear", respacing="250")
    denoiser = gaussian_denoiser(process, MEAN, STD)
    x_T = jax.random.normal(jax.random.key(0), (16384, 2))
    sample = jax.jit(lambda eta: ddim(jax.random.key(1), denoiser, x_T, process, eta=eta), compiler_options=OPTIMISED)
    for eta in (0.0, 0.5, 1.0):
        x_0 = sample(jnp.float32(eta))
        assert abs(float(x_0.mean()) - MEAN) < 0.01 and abs(float(x_0.std()) - STD) < 0.015


def test_ddim_is_the_flow_of_the_gaussian(gaussian_denoiser):
    """At eta 0 the limit of many steps is the probability-flow ODE, which takes x_T = z to mean + std z."""
    process = Process(variance="fixed_small", clip=None)
    z = jnp.linspace(-2, 2, 9)[:, None]
    x_0 = ddim(jax.random.key(0), gaussian_denoiser(process, MEAN, STD), z, process)
    np.testing.assert_allclose(x_0, MEAN + STD * z, atol=0.005)


def test_ddim_at_eta_one_is_ddpm_with_the_small_variance():
    process = Process(variance="fixed_small", respacing="10")
    output, x_t, noise = jax.random.normal(jax.random.key(1), (3, 10, 4))
    i = jnp.arange(10)
    ancestral = ddpm_step(output, x_t, i, process, noise)
    np.testing.assert_allclose(ddim_step(output, x_t, i, process, noise, eta=1.0), ancestral, atol=1e-5)


@pytest.mark.parametrize("step", [ddpm_step, lambda *args: ddim_step(*args, eta=1.0)])
def test_the_last_step_adds_no_noise(step):
    process = Process(variance="fixed_large", respacing="10")
    output, x_t = jax.random.normal(jax.random.key(2), (2, 2, 4))
    noise = jnp.full((2, 4), 1e3)
    i = jnp.asarray([0, 1])
    noisy, quiet = step(output, x_t, i, process, noise), step(output, x_t, i, process, 0 * noise)
    np.testing.assert_array_equal(noisy[0], quiet[0])
    np.testing.assert_allclose(quiet[0], process.predict(output, x_t, i).x_0[0], rtol=1e-5)
    assert np.abs(noisy[1] - quiet[1]).min() > 1


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_is_its_steps_in_descending_order(name):
    """The denoiser is shown the original timesteps from the noisiest down, and each step is the public one."""
    process = Process(variance="fixed_small", respacing="fast27")
    seen = []

    def denoiser(x_t, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
        return 0.5 * x_t

    x_T = jax.random.normal(jax.random.key(3), (2, 3))
    x_0 = SAMPLERS[name](jax.random.key(4), denoiser, x_T, process)
    jax.effects_barrier()
    assert [list(t) for t in seen] == [[t, t] for t in process.timestep_map[::-1]] and seen[0].dtype == np.int32
    if name == "ddim":
        for i in reversed(range(27)):
            x_T = ddim_step(0.5 * x_T, x_T, i, process, jnp.zeros_like(x_T))
        np.testing.assert_allclose(x_0, x_T, atol=1e-5)


@pytest.mark.parametrize("name, options", [("ddpm", {}), ("ddim", {"eta": 0.8})])
def test_an_image_alone_is_the_image_in_a_batch(name, options):
    process = Process(variance="fixed_small", respacing="7")
    keys = jax.random.split(jax.random.key(5), 4)
    x_T = normal(keys, (4, 3, 3, 2))

    @jax.jit
    def sample(keys, x_T):
        return SAMPLERS[name](keys, lambda x, t: 0.3 * x, x_T, process, **options)

    together = sample(keys, x_T)
    for row in range(4):
        alone = sample(keys[row : row + 1], normal(keys[row : row + 1], (1, 3, 3, 2)))
        np.testing.assert_allclose(alone[0], together[row], atol=1e-6)
    other = sample(keys.at[0].set(jax.random.key(77)), x_T)
    assert np.abs(other[0] - together[0]).max() > 1e-3
    np.testing.assert_allclose(other[1:], together[1:], atol=1e-6)


def test_noise_is_new_at_every_step_and_the_same_for_the_same_key():
    process = Process(variance="fixed_large", respacing="3", clip=None)
    draws = [ddpm(jax.random.key(seed), lambda x, t: x, jnp.zeros((1, 2)), process) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 1e-3
    # Steps that reused one noise would add up coherently: with x_0 = 0 predicted, var(x_1) is a sum of squares.
    quiet = Process(prediction="x0", variance="fixed_large", respacing="3", clip=None)
    x_T = jnp.zeros((20000, 1))
    first = ddpm(jax.random.key(0), lambda x, t: jnp.where(t[0] == 0, x, jnp.zeros_like(x)), x_T, quiet)
    weight = quiet.posterior_mean_coefficients[1][1]
    np.testing.assert_allclose(first.var(), weight**2 * quiet.betas[2] + quiet.betas[1], rtol=0.03)


def test_old_style_keys_and_wrong_key_counts():
    np.testing.assert_array_equal(normal(jax.random.PRNGKey(3), (2, 5)), normal(jax.random.key(3), (2, 5)))
    with pytest.raises(ValueError, match="keys"):
        normal(jax.random.split(jax.random.key(0), 3), (2, 5))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("respacing", ["1", "2"])
def test_a_bfloat16_denoiser_and_short_chains(name, respacing):
    process = Process(respacing=respacing)
    denoiser = lambda x, t: jnp.concatenate([x, x], axis=-1).astype(jnp.bfloat16)  # noqa: E731
    x_0 = SAMPLERS[name](jax.random.key(0), denoiser, jnp.ones((2, 4, 4, 3), jnp.bfloat16), process)
    assert x_0.dtype == jnp.float32 and x_0.shape == (2, 4, 4, 3) and np.isfinite(x_0).all()
    assert np.abs(x_0).max() <= 1


def test_eta_may_be_traced():
    process = Process(variance="fixed_small", respacing="3")
    x_T = jax.random.normal(jax.random.key(6), (2, 3))
    sample = jax.jit(lambda eta: ddim(jax.random.key(7), lambda x, t: 0.2 * x, x_T, process, eta=eta))
    expected = ddim(jax.random.key(7), lambda x, t: 0.2 * x, x_T, process, eta=0.6)
    np.testing.assert_allclose(sample(jnp.float32(0.6)), expected, atol=1e-6)
