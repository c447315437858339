"""Losses: the definitions in float64, the bound of closed-form data, gradients where the paper stops them, bfloat16."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import Process, check_loss, diffusion_loss, estimated_bound, variational_bound
from dalle2_jax.diffusion.loss import discretized_gaussian_log_likelihood, gaussian_kl


def _images(seed, shape=(4, 4, 4, 3)):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape) / 127.5 - 1, jnp.float32)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("shape", [(4, 4, 4, 3), (4, 6)])
def test_simple_loss_is_the_squared_error_of_the_prediction(prediction, shape):
    process = Process(prediction=prediction, variance="fixed_small")
    x_0, noise, i = _images(0, shape), jax.random.normal(jax.random.key(0), shape), jnp.asarray([0, 3, 500, 999])
    constant = jnp.full(shape, 0.25, jnp.bfloat16)
    loss, metrics = diffusion_loss(jax.random.key(1), lambda x, t: constant, x_0, process, timesteps=i, noise=noise)
    abar = np.cumprod(1 - process.betas)[np.asarray(i)].reshape(-1, *[1] * (len(shape) - 1))
    clean, noise = np.asarray(x_0, np.float64), np.asarray(noise, np.float64)
    target = {"epsilon": noise, "x0": clean, "v": np.sqrt(abar) * noise - np.sqrt(1 - abar) * clean}[prediction]
    assert loss.shape == (4,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, ((target - 0.25) ** 2).reshape(4, -1).mean(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(metrics["mse"], loss)


@pytest.mark.parametrize(
    ("weighting", "prediction"),
    [
        ("min_snr", "epsilon"),
        ("min_snr", "x0"),
        ("min_snr", "v"),
        ("min_snr_plus_one", "x0"),
        ("min_snr_plus_one", "v"),
    ],
)
def test_a_weighting_makes_all_predictions_one_loss(weighting, prediction):
    """Whatever is predicted, it is the squared error of the x_0 it means that is weighted."""
    process = Process(prediction=prediction, variance="fixed_small", clip=None)
    shape = (4, 4, 4, 3)
    x_0, noise, i = _images(0, shape), jax.random.normal(jax.random.key(0), shape), jnp.asarray([20, 300, 600, 980])
    off = 0.1 * jax.random.normal(jax.random.key(1), shape)
    abar = np.cumprod(1 - process.betas)[np.asarray(i)]
    a, b = (jnp.asarray(np.sqrt(x)[:, None, None, None], jnp.float32) for x in (abar, 1 - abar))
    # What each network says if its x_0 is `off` beside the true one.
    output = {"epsilon": noise - a / b * off, "x0": x_0 + off, "v": a * noise - b * x_0 - off / b}[prediction]
    error = np.asarray(jnp.square(off).mean(axis=(1, 2, 3)))

    def loss(limit):
        arguments = (jax.random.key(1), lambda x, t: output, x_0, process)
        return diffusion_loss(*arguments, timesteps=i, noise=noise, weighting=weighting, weight_limit=limit)

    snr = abar / (1 - abar)
    unlimited = snr if weighting == "min_snr" else snr + 1
    assert unlimited[0] > 5 > unlimited[2]
    np.testing.assert_allclose(loss(5)[0], np.minimum(unlimited, 5) * error, rtol=3e-3)
    np.testing.assert_allclose(loss(1e9)[0], unlimited * error, rtol=3e-3)
    # Without a limit the one is the squared error of epsilon, the other that of v (Salimans and Ho 2022).
    if (weighting, prediction) in (("min_snr", "epsilon"), ("min_snr_plus_one", "v")):
        np.testing.assert_allclose(loss(1e9)[0], loss(1e9)[1]["mse"], rtol=1e-5)
    plain = diffusion_loss(jax.random.key(1), lambda x, t: output, x_0, process, timesteps=i, noise=noise)
    np.testing.assert_allclose(loss(5)[1]["mse"], plain[0])


def test_the_denoiser_sees_the_marginal_and_the_original_timesteps():
    process = Process(variance="fixed_small", respacing="fast27")
    seen = {}

    def denoiser(x_t, t):
        seen.update(x_t=x_t, t=t)
        return x_t

    x_0, i = _images(1), jnp.asarray([0, 5, 20, 26])
    noise = jax.random.normal(jax.random.key(2), x_0.shape)
    diffusion_loss(jax.random.key(0), denoiser, x_0, process, timesteps=i, noise=noise)
    np.testing.assert_array_equal(seen["t"], process.timestep_map[np.asarray(i)])
    np.testing.assert_allclose(seen["x_t"], process.q_sample(x_0, i, noise))


def test_random_timesteps_cover_the_chain_and_follow_the_key():
    process = Process(timesteps=4, variance="fixed_small")
    seen = []
    for seed in (0, 0, 1):
        loss, _ = diffusion_loss(jax.random.key(seed), lambda x, t: seen.append(t) or x, jnp.ones((4000, 1)), process)
    np.testing.assert_array_equal(seen[0], seen[1])
    assert np.any(seen[0] != seen[2])
    np.testing.assert_allclose(np.bincount(np.asarray(seen[0])) / 4000, np.full(4, 0.25), atol=0.03)


def test_kl_against_numerical_integration():
    mean, variance, other_mean, other_variance = 0.3, 0.5, -0.4, 1.7
    x = np.linspace(-12, 12, 200001)

    def log_density(m, v):
        return -0.5 * ((x - m) ** 2 / v + np.log(2 * np.pi * v))

    p, q = log_density(mean, variance), log_density(other_mean, other_variance)
    expected = np.trapezoid(np.exp(p) * (p - q), x)
    arguments = [jnp.float32(value) for value in (mean, math.log(variance), other_mean, math.log(other_variance))]
    np.testing.assert_allclose(gaussian_kl(*arguments), expected, rtol=1e-5)


@pytest.mark.parametrize("mean, scale", [(0.1, 0.05), (-0.9, 0.2), (0.97, 0.5)])
def test_discretised_likelihood_is_a_distribution_over_256_levels(mean, scale):
    levels = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)
    log_scale = jnp.full_like(levels, math.log(scale))
    probabilities = np.exp(discretized_gaussian_log_likelihood(levels, jnp.full_like(levels, mean), log_scale))
    np.testing.assert_allclose(probabilities.sum(), 1.0, atol=1e-3)

    def cdf(x):
        return 0.5 * (1 + math.erf((x - mean) / scale / math.sqrt(2)))

    edges = [-math.inf, *(np.arange(255) / 127.5 - 1 + 1 / 255), math.inf]
    expected = [cdf(high) - cdf(low) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    np.testing.assert_allclose(probabilities, expected, atol=1e-3)


def _bound(gaussian_denoiser, process, data, mean, std):
    function = jax.jit(lambda key, x: variational_bound(key, gaussian_denoiser(process, mean, std), x, process))
    return function(jax.random.key(0), jnp.asarray(data, jnp.float32))


def _gaussian_images(mean, std):
    data = mean + std * np.random.default_rng(0).normal(size=(64, 6, 6, 3))
    return np.round((data + 1) * 127.5) / 127.5 - 1


def test_the_bound_of_gaussian_data_is_its_entropy(gaussian_denoiser):
    """With the exact denoiser and the exact variances the bound is the true code length."""
    mean, std = -0.2, 0.25
    data = _gaussian_images(mean, std)
    bound = _bound(gaussian_denoiser, Process(clip=None), data, mean, std)
    log_density = -0.5 * (((data - mean) / std) ** 2 + np.log(2 * np.pi * std**2))
    truth = -(log_density + np.log(2 / 255)).mean() / np.log(2)
    total = float(bound["total"].mean())
    assert bound["terms"].shape == bound["mse"].shape == (64, 1000)
    assert abs(total - truth) < 0.02, (total, truth)
    assert float(bound["prior"].max()) < 1e-4


def test_the_bound_with_fixed_variance_in_closed_form(gaussian_denoiser):
    """With beta~, L_{t-1} is (SNR_{t-1} - SNR_t) / 2 times the error of x_0 (Kingma et al. 2021), here its variance."""
    mean, std = -0.2, 0.25
    process = Process(variance="fixed_small", clip=None)
    terms = np.asarray(_bound(gaussian_denoiser, process, _gaussian_images(mean, std), mean, std)["terms"].mean(axis=0))
    abar = np.cumprod(1 - process.betas)
    signal_to_noise = abar / (1 - abar)
    error = 1 / (1 / std**2 + signal_to_noise)
    expected = (signal_to_noise[:-1] - signal_to_noise[1:]) / 2 * error[1:] / np.log(2)
    np.testing.assert_allclose(terms[1:], expected, rtol=0.1)
    np.testing.assert_allclose(terms[1:].sum(), expected.sum(), rtol=0.01)


def test_the_vlb_loss_estimates_the_bound(gaussian_denoiser):
    """Its mean over all timesteps is the bound less the prior's constant."""
    process = Process(timesteps=40, clip=None)
    denoiser = gaussian_denoiser(process, 0.0, 0.3)
    x_0 = jnp.tile(0.3 * jax.random.normal(jax.random.key(0), (1, 8, 8, 3)), (40, 1, 1, 1))

    @jax.jit
    def both(x_0):
        loss, _ = diffusion_loss(jax.random.key(1), denoiser, x_0, process, "vlb", timesteps=jnp.arange(40))
        return loss, variational_bound(jax.random.key(2), denoiser, x_0[:8], process)

    loss, bound = both(x_0)
    np.testing.assert_allclose(loss.mean(), (bound["total"] - bound["prior"]).mean(), rtol=0.02)


def test_the_estimated_bound_has_the_mean_of_the_whole():
    """Over many keys, for images and a denoiser of which all terms count; and where there is one step."""
    process = Process(schedule="linear", timesteps=40, variance="fixed_large")
    images = _images(0, (3, 2, 2, 1)) * jnp.asarray([1.0, 0.3, 0.0], jnp.float32).reshape(3, 1, 1, 1)

    def denoiser(x_t, t):
        return 0.7 * x_t + 0.1 * jnp.sin(t.astype(jnp.float32)).reshape(3, 1, 1, 1)

    def many(function, count):
        found = jax.jit(jax.vmap(function))(jax.random.split(jax.random.key(count), count))
        return float(found.mean()), float(found.std()), float(found.std()) / count**0.5

    for chain, evaluations in ((process, 3), (process.respaced("1"), 2)):

        def whole(key, chain=chain):
            return variational_bound(key, denoiser, images, chain)["total"].mean()

        def estimate(key, chain=chain, evaluations=evaluations):
            return estimated_bound(key, denoiser, images, chain, evaluations)

        mean, _, uncertain = many(whole, 1000)
        found, spread, about = many(estimate, 4000)
        assert abs(found - mean) < 4 * math.hypot(uncertain, about)
        assert spread < 0.4 * mean, "a batch of three says something already"


def test_hybrid_is_simple_plus_a_thousandth_of_vlb_and_trains_only_the_variance_by_it():
    process = Process()
    x_0, noise, i = _images(2), jax.random.normal(jax.random.key(3), (4, 4, 4, 3)), jnp.asarray([0, 3, 500, 999])
    output = 0.3 * jax.random.normal(jax.random.key(4), (4, 4, 4, 6))

    def loss(output, kind):
        arguments = (jax.random.key(0), lambda x, t: output, x_0, process, kind)
        return diffusion_loss(*arguments, timesteps=i, noise=noise)[0]

    @jax.jit
    def losses_and_slopes(output):
        kinds = ("simple", "vlb", "hybrid")
        slopes = {kind: jax.grad(lambda o, kind=kind: loss(o, kind).sum())(output) for kind in kinds}
        return [loss(output, kind) for kind in kinds], slopes

    (simple, vlb, hybrid), slopes = losses_and_slopes(output)
    np.testing.assert_allclose(hybrid, simple + 0.001 * vlb, rtol=1e-6)
    np.testing.assert_allclose(slopes["hybrid"][..., :3], slopes["simple"][..., :3], rtol=1e-6)
    np.testing.assert_allclose(slopes["hybrid"][..., 3:], 0.001 * slopes["vlb"][..., 3:], rtol=1e-4, atol=1e-8)
    assert np.abs(slopes["vlb"][..., :3]).max() > 0 and np.abs(slopes["hybrid"][..., 3:]).max() > 0
    np.testing.assert_array_equal(slopes["simple"][..., 3:], np.zeros((4, 4, 4, 3)))


def test_discretised_likelihood_is_symmetric_far_from_the_mean():
    """In float32 too, where 1 - CDF has no digits left in the upper tail."""
    log_scale = jnp.full(2, math.log(0.01))
    below, above = discretized_gaussian_log_likelihood(jnp.asarray([-0.06, 0.06]), jnp.zeros(2), log_scale)
    np.testing.assert_allclose(above, below, rtol=1e-5)
    assert -25 < below < -15


@pytest.mark.parametrize("kind", ["simple", "vlb", "hybrid"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_losses_and_gradients_are_finite_for_extreme_bfloat16_outputs(kind, prediction):
    process = Process(prediction=prediction)
    sizes = jnp.asarray([0.0, 1.0, -1.0, 30.0, -30.0, 1e4, -1e4, 1e6, -1e6], jnp.bfloat16)
    mean, variance = jnp.meshgrid(sizes, sizes)
    output = jnp.stack([mean.ravel(), variance.ravel()], axis=-1)
    x_0 = jnp.linspace(-1, 1, len(output), dtype=jnp.bfloat16)[:, None]

    @jax.jit
    @jax.vmap
    def loss_and_slope(i):
        timesteps = jnp.full(len(output), i)

        def total(output):
            loss, _ = diffusion_loss(jax.random.key(0), lambda x, t: output, x_0, process, kind, timesteps=timesteps)
            return loss.sum(), loss

        return jax.value_and_grad(total, has_aux=True)(output)

    (_, loss), slope = loss_and_slope(jnp.asarray([0, 1, 2, 500, 998, 999]))
    assert loss.dtype == jnp.float32 and slope.dtype == jnp.bfloat16
    assert np.isfinite(loss).all() and np.isfinite(np.asarray(slope, np.float32)).all()


def test_a_variance_far_too_small_is_pushed_back():
    """Past the point where exp would overflow the loss still grows with the error, so that training recovers."""
    process = Process()

    @jax.jit
    @jax.grad
    def slope(channel):
        output = jnp.stack([jnp.float32(5.0), channel]).reshape(1, 2)
        arguments = (jax.random.key(0), lambda x, t: output, jnp.zeros((1, 1)), process, "hybrid")
        return diffusion_loss(*arguments, timesteps=jnp.asarray([1]))[0][0]

    assert slope(jnp.float32(-500.0)) < 0, "a larger variance lowers the loss"
    assert slope(jnp.float32(500.0)) > 0, "and from the other side a smaller one"


def test_refusals():
    x_0 = jnp.zeros((1, 3))
    with pytest.raises(ValueError, match="'l1'.*hybrid"):
        diffusion_loss(jax.random.key(0), lambda x, t: x, x_0, Process(variance="fixed_small"), "l1")
    with pytest.raises(ValueError, match="hybrid.*learned_range.*fixed_small"):
        diffusion_loss(jax.random.key(0), lambda x, t: x, x_0, Process(variance="fixed_small"), "hybrid")
    with pytest.raises(ValueError, match="6 channels"):
        diffusion_loss(jax.random.key(0), lambda x, t: x, x_0, Process(), "simple")
    with pytest.raises(ValueError, match="weight_limit is 0.5; it must be 1 or more"):
        check_loss(Process(prediction="x0", variance="fixed_small"), "simple", "min_snr", 0.5)
    with pytest.raises(ValueError, match="unknown weighting 'snr'.*min_snr_plus_one"):
        check_loss(Process(), "simple", "snr")
    with pytest.raises(ValueError, match="set weighting=uniform"):
        check_loss(Process(prediction="x0"), "vlb", "min_snr")
    with pytest.raises(ValueError, match="sampling starts there; set weighting=min_snr_plus_one"):
        check_loss(Process(prediction="v", zero_terminal_snr=True), "simple", "min_snr")
    with pytest.raises(ValueError, match="by 0 evaluations; it must be 1 or more"):
        estimated_bound(jax.random.key(0), lambda x, t: x, x_0, Process(variance="fixed_small"), 0)
    with pytest.raises(ValueError, match="set weighting=min_snr or uniform"):
        check_loss(Process(), "hybrid", "min_snr_plus_one")


def test_a_dynamic_threshold_is_set_aside_in_training():
    x_0 = _images(0, (2, 4, 4, 3))

    def loss(process):
        return diffusion_loss(jax.random.key(0), lambda x, t: jnp.concatenate([2 * x, x], -1), x_0, process, "hybrid")[
            0
        ]

    np.testing.assert_array_equal(loss(Process(dynamic_percentile=0.9)), loss(Process(clip=None)))
