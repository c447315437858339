"""The VAE: its divergence, its bounds against closed forms and numpy, its likelihoods, and PyTorch's loss."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from dalle2_jax.checkpoint.rebuild import rebuild, to_json
from dalle2_jax.errors import InputError
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.lineage.autoencoder import ConvEncoder, MLPDecoder, MLPEncoder, reconstruct
from dalle2_jax.lineage.vae import (
    LEAST_LOG_SIGMA,
    VAE,
    Likelihood,
    active_units,
    bits_per_dimension,
    elbo,
    gaussian_kl_to_standard,
    importance_bound,
    interpolate,
    sample_latent,
    sample_vae,
    traverse,
)
from tests.parity.reference import reference_path

# Divergence


def test_the_divergence_is_the_integral():
    """Numerically, in float64, of q log(q / p), for each latent alone; and their sum, not their mean."""
    means, deviations = np.array([0.0, 0.7, -2.0, 3.0]), np.array([1.0, 0.3, 1.8, 0.05])
    z = np.linspace(-14, 14, 400_001)
    expected = []
    for mean, deviation in zip(means, deviations, strict=True):
        log_q = -0.5 * ((z - mean) / deviation) ** 2 - np.log(deviation)
        q = np.exp(log_q) / np.sqrt(2 * np.pi)
        expected.append(np.trapezoid(q * (log_q + 0.5 * z**2), z))
    log_variances = 2 * np.log(deviations)
    each = gaussian_kl_to_standard(jnp.float32(means)[:, None], jnp.float32(log_variances)[:, None])
    np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-6)
    together = gaussian_kl_to_standard(jnp.float32(means)[None], jnp.float32(log_variances)[None])
    np.testing.assert_allclose(together, [np.sum(expected)], rtol=1e-5)


def test_the_divergence_by_monte_carlo():
    mean, log_variance = jnp.array([[0.5, -1.0, 0.0]]), jnp.array([[-1.0, 0.5, -3.0]])
    many = [jnp.broadcast_to(value, (40_000, 3)) for value in (mean, log_variance)]
    z = np.asarray(jax.jit(sample_latent)(jax.random.key(0), *many), np.float64)
    m, v = np.asarray(mean, np.float64), np.exp(np.asarray(log_variance, np.float64))
    ratios = (-0.5 * (z - m) ** 2 / v - 0.5 * np.log(v) + 0.5 * z**2).sum(1)
    assert abs(ratios.mean() - gaussian_kl_to_standard(mean, log_variance)[0]) < 5 * ratios.std() / 200
    np.testing.assert_allclose(z.mean(0), m[0], atol=5 * v.max() ** 0.5 / 200)
    np.testing.assert_allclose(z.var(0), v[0], rtol=0.05)


def test_it_is_not_the_form_with_sigma_for_its_square():
    """-1/2 sum(1 + log sigma - mu^2 - sigma^2) is below 0 at sigma = 2^-1/2, where it would pull sigma to."""
    deviation = 2**-0.5
    found = gaussian_kl_to_standard(jnp.zeros((2, 1)), jnp.array([[0.0], [2 * math.log(deviation)]]))
    np.testing.assert_allclose(found, [0.0, 0.09657], atol=1e-5)
    assert -0.5 * (1 + math.log(deviation) - deviation**2) == pytest.approx(-0.07671, abs=1e-5)
    total = jax.jit(jax.grad(lambda v: gaussian_kl_to_standard(jnp.zeros((2, 1)), v).sum()))
    np.testing.assert_allclose(total(jnp.array([[0.0], [2 * math.log(deviation)]])), [[0], [-0.25]], atol=1e-6)


# The bound

SHAPE = (4, 4, 2)


@pytest.fixture(scope="module")
def drawn():
    """Images on the levels, a posterior, and a decoder's outputs: random."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, *SHAPE)) / 127.5 - 1
    mean, log_variance = rng.normal(size=(6, 3)) * [1, 0.1, 0.0], rng.normal(size=(6, 3)) * [1, 0.2, 0.0]
    return tuple(map(np.float32, (images, mean, log_variance, 0.5 * rng.normal(size=images.shape))))


def divergences(mean, log_variance):
    mean, log_variance = mean.astype(float), log_variance.astype(float)
    return 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)


def erf_cdf(x):
    return 0.5 * (1 + np.vectorize(math.erf)(x / 2**0.5))


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian", "optimal", "discretized_gaussian"])
def test_the_bound_by_hand(kind, drawn):
    images, mean, log_variance, outputs = drawn
    x, m, sigma = images.astype(float), outputs.astype(float), 0.9
    if kind == "bernoulli":
        p = 1 / (1 + np.exp(-m))
        terms = (x + 1) / 2 * np.log(p) + (1 - x) / 2 * np.log(1 - p)
    elif kind == "discretized_gaussian":
        upper = np.where(x > 0.999, 1, erf_cdf((x + 1 / 255 - m) / sigma))
        terms = np.log(upper - np.where(x < -0.999, 0, erf_cdf((x - 1 / 255 - m) / sigma)))
    else:
        sigma = sigma if kind == "gaussian" else np.sqrt(np.mean((x - m) ** 2))
        terms = -0.5 * (x - m) ** 2 / sigma**2 - 0.5 * np.log(2 * np.pi * sigma**2)
    log_sigma = None if kind in ("bernoulli", "optimal") else jnp.float32(math.log(sigma))
    likelihood = Likelihood("gaussian" if kind == "optimal" else kind, jnp.asarray(outputs), log_sigma)
    terms, kl = terms.reshape(6, -1).sum(1), divergences(mean, log_variance)
    found = jax.jit(elbo)(images, mean, log_variance, likelihood, 2.5, 0.3)
    # The CDF is DDPM's approximation, here beside the exact one.
    close = {"rtol": 1e-2 if kind == "discretized_gaussian" else 1e-5}
    np.testing.assert_allclose(found.reconstruction, -terms, **close)
    np.testing.assert_allclose(found.kl, kl.sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.value, terms - kl.sum(1), **close)
    np.testing.assert_allclose(found.loss, -terms.mean() + 2.5 * np.maximum(kl.mean(0), 0.3).sum(), **close)
    np.testing.assert_allclose(found.kl_bits, kl.sum(1) / math.log(2) / 32, rtol=1e-5)
    np.testing.assert_allclose(found.reconstruction_bits, -terms / math.log(2) / 32, **close)


def test_free_bits_are_of_the_batch_mean_of_each_latent(drawn):
    """No gradient of the KL where it is below; that of the mean over the batch where it is above."""
    images, mean, log_variance, outputs = drawn
    likelihood = Likelihood("bernoulli", jnp.asarray(outputs))
    kl = divergences(mean, log_variance)
    assert kl.mean(0)[0] > 0.3 > kl.mean(0)[1] > 0 and kl[:, 0].min() < 0.3, "the case tells one form from another"
    gradient = jax.jit(jax.grad(lambda mean, free: elbo(images, mean, log_variance, likelihood, 2.0, free).loss))
    np.testing.assert_allclose(gradient(mean, 0.0), 2.0 * mean / 6, rtol=1e-5)
    np.testing.assert_allclose(gradient(mean, 0.3), 2.0 * mean / 6 * [1, 0, 0], rtol=1e-5)


def test_the_optimal_sigma_is_optimal(drawn):
    images, _, _, outputs = drawn
    best = Likelihood("gaussian", jnp.asarray(outputs)).fitted(images)
    assert best.log_sigma == pytest.approx(0.5 * np.log(np.mean((images.astype(float) - outputs) ** 2)), abs=1e-6)
    slope = jax.jit(jax.grad(lambda s: Likelihood("gaussian", jnp.asarray(outputs), s).log_prob(images).sum()))
    assert abs(slope(best.log_sigma)) < 1e-2 and slope(best.log_sigma - 0.1) > 1 > -1 > slope(best.log_sigma + 0.1)
    # And has a limit, so that a perfect reconstruction has a density.
    perfect = Likelihood("gaussian", jnp.asarray(images)).fitted(images)
    assert perfect.log_sigma == pytest.approx(LEAST_LOG_SIGMA) and np.isfinite(perfect.log_prob(images)).all()


@pytest.mark.parametrize("logit", [100.0, -100.0])
def test_large_logits_are_finite(logit):
    images = jnp.array([1.0, -1.0]).reshape(2, 1, 1, 1)
    log_prob = jax.value_and_grad(lambda outputs: Likelihood("bernoulli", outputs).log_prob(images).sum())
    value, gradient = log_prob(jnp.full((2, 1, 1, 1), logit))
    assert value == pytest.approx(-100.0)
    np.testing.assert_allclose(gradient.ravel(), [0, -1] if logit > 0 else [1, 0], atol=1e-6)


@pytest.mark.parametrize(("mean", "sigma"), [(0.1, 0.02), (-0.999, 0.3), (1.4, 0.004), (0.0, 2.0)])
def test_the_discretised_likelihood_sums_to_one(mean, sigma):
    levels = jnp.float32(np.arange(256) / 127.5 - 1).reshape(256, 1, 1, 1)
    outputs = jnp.full(levels.shape, mean)
    log_prob = Likelihood("discretized_gaussian", outputs, jnp.float32(math.log(sigma))).log_prob(levels)
    assert np.exp(np.asarray(log_prob, np.float64)).sum() == pytest.approx(1, abs=1e-4)
    assert bits_per_dimension(-log_prob, 1).min() >= 0


def test_the_discretised_likelihood_has_a_gradient_far_from_the_mean():
    """Which pulls the mean to the image, and sigma to their distance; nearer by it is the likelihood's own."""
    sigma, distances = 0.05, np.array([0.02, 0.1, 0.5, 1.2])
    images = jnp.zeros((4, 1, 1, 1))

    def log_prob(outputs, log_sigma):
        return Likelihood("discretized_gaussian", outputs.reshape(4, 1, 1, 1), log_sigma).log_prob(images)

    outputs, log_sigma = jnp.float32(-distances), jnp.float32(math.log(sigma))
    values = log_prob(outputs, log_sigma)
    np.testing.assert_allclose(values[2:], math.log(1e-12), rtol=1e-5)
    by_mean, by_sigma = jax.jit(jax.jacrev(log_prob, (0, 1)))(outputs, log_sigma)
    np.testing.assert_allclose(np.diag(by_mean), distances / sigma**2, rtol=0.05)
    np.testing.assert_allclose(by_sigma, distances**2 / sigma**2 - 1, rtol=0.06)


# The linear gaussian VAE, of which log p(x) is known


def linear(weights, sigma):
    """A linear decoder of one pixel a row of `weights` [d, z], as a function of latents [b, z]."""

    def decode(latent):
        outputs = latent @ jnp.float32(weights.T)
        return Likelihood("gaussian", outputs.reshape(-1, *SHAPE), jnp.float32(math.log(sigma)))

    return decode


def log_normal(x, covariance):
    _, determinant = np.linalg.slogdet(2 * np.pi * covariance)
    return -0.5 * (determinant + np.einsum("bi,bi->b", x, np.linalg.solve(covariance, x.T).T))


@functools.partial(jax.jit, static_argnums=(4, 5))
def bound_of(key, images, mean, log_variance, decode, samples):
    return importance_bound(key, images, mean, log_variance, decode, samples)


def test_under_the_exact_posterior_every_sample_gives_log_p():
    """Orthogonal columns: the posterior's covariance is diagonal, and all importance weights are p(x)."""
    rng = np.random.default_rng(3)
    weights = np.linalg.qr(rng.normal(size=(32, 3)))[0] * [1.5, 0.8, 0.3]
    sigma, x = 0.6, rng.normal(size=(4, 32))
    exact = log_normal(x, weights @ weights.T + sigma**2 * np.eye(32))
    precision = 1 + (weights**2).sum(0) / sigma**2
    mean = jnp.float32(x @ weights / sigma**2 / precision)
    log_variance = jnp.float32(np.broadcast_to(-np.log(precision), mean.shape))
    images, decode = jnp.float32(x.reshape(4, *SHAPE)), linear(weights, sigma)
    for samples in (1, 7):
        found = bound_of(jax.random.key(samples), images, mean, log_variance, decode, samples)
        np.testing.assert_allclose(found, exact, rtol=1e-5)
    # The mean over samples of the ELBO is the same number.
    keys = jax.random.split(jax.random.key(0), 2000)

    @jax.jit
    def mean_of(keys):
        def one(key):
            return elbo(images, mean, log_variance, decode(sample_latent(key, mean, log_variance))).value

        return jax.vmap(one)(keys).mean(0)

    np.testing.assert_allclose(mean_of(keys), exact, atol=0.3)


def test_the_importance_bound_rises_to_log_p():
    rng = np.random.default_rng(4)
    weights, sigma = rng.normal(size=(32, 2)) * 0.3, 0.8
    x = rng.normal(size=(40, 2)) @ weights.T + sigma * rng.normal(size=(40, 32))
    exact = log_normal(x, weights @ weights.T + sigma**2 * np.eye(32)).mean()
    inverse = np.linalg.inv(np.eye(2) + weights.T @ weights / sigma**2)
    mean = jnp.float32(x @ weights @ inverse / sigma**2 + 0.3)  # not quite, and too wide: something to gain
    log_variance = jnp.full(mean.shape, math.log(0.3))
    images, decode = jnp.float32(x.reshape(40, *SHAPE)), linear(weights, sigma)
    keys = jax.random.split(jax.random.key(0), (16, 40))

    @functools.partial(jax.jit, static_argnums=0)
    def average(samples):
        # A key an image, as it may be given.
        return jax.lax.map(lambda k: importance_bound(k, images, mean, log_variance, decode, samples), keys).mean()

    bounds = [float(average(samples)) for samples in (1, 4, 32, 1024)]
    assert all(b - a > 0.003 for a, b in zip(bounds, bounds[1:], strict=False))
    assert bounds[0] < exact - 0.2 and bounds[-1] == pytest.approx(exact, abs=5e-3)


@pytest.mark.parametrize("sigma", ["optimal", 0.5])
def test_one_sample_is_a_sample_of_the_elbo(sigma, drawn):
    """log p(x | z) + log p(z) - log q(z | x) in numpy, for the same z; and its key is that of its image alone."""
    images, mean, log_variance, _ = drawn
    weights = np.random.default_rng(5).normal(size=(3, 32)).astype(np.float32)
    log_sigma = None if sigma == "optimal" else jnp.float32(math.log(sigma))

    def decode(latent):
        return Likelihood("gaussian", (latent @ weights).reshape(-1, *SHAPE), log_sigma)

    keys = jax.random.split(jax.random.key(2), 6)
    found = bound_of(keys, images, mean, log_variance, decode, 1)
    z = sample_latent(jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys), mean, log_variance)
    z, v, m = (np.asarray(value, float) for value in (z, np.exp(log_variance), mean))
    errors = images.reshape(6, -1).astype(float) - z @ weights
    s = np.mean(errors**2) if sigma == "optimal" else sigma**2
    expected = -0.5 * (errors**2 / s + np.log(2 * np.pi * s)).sum(1)
    expected += (-0.5 * z**2 + 0.5 * (z - m) ** 2 / v + 0.5 * np.log(v)).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    if sigma != "optimal":
        rows = [value[2:4] for value in (keys, images, mean, log_variance)]
        np.testing.assert_allclose(bound_of(*rows, decode, 1), found[2:4], rtol=1e-6)


def test_memory_does_not_grow_with_the_samples(drawn):
    """But for one log weight a sample and image: of the compiled gradient, whose reconstructions would be 768 KB."""
    images, mean, log_variance, _ = drawn
    decode = linear(np.ones((32, 3)), 1.0)

    def temporary(samples):
        def bound(mean):
            return importance_bound(jax.random.key(0), images, mean, log_variance, decode, samples).sum()

        return jax.jit(jax.grad(bound)).lower(mean).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1000) - temporary(2) < 5 * 1000 * 6 * 4


# The network


@pytest.mark.parametrize(("units", "count"), [(500, 815_824), (400, 652_824)])
def test_parameters_of_published_code(units, count):
    """One hidden layer of flax's (500) and PyTorch's (400) example, 20 latents, 28x28x1."""
    module = VAE(MLPEncoder((units,)), MLPDecoder((units,)))
    assert (module.latent_size, module.image_size, module.channels) == (20, 28, 1)
    images = jnp.zeros((1, 28, 28, 1))
    params = jax.eval_shape(module.init, jax.random.key(0), images, jax.random.key(0))["params"]
    assert count_parameters(params) == count


def test_the_loss_of_pytorchs_example():
    """references/vae.npz, written by make_vae.py: the same sums over batch, pixels and latents, and gradients."""
    with np.load(reference_path("vae")) as file:
        reference = dict(file)

    def tree(kind):
        found = {name.split("/", 1)[1]: value for name, value in reference.items() if name.startswith(kind)}
        return unflatten_dict(found, sep="/")

    module = VAE(MLPEncoder((7,)), MLPDecoder((7,)), latent_size=3, image_size=4)
    images, noise = reference["input/pixels"].reshape(5, 4, 4, 1) * 2 - 1, reference["input/noise"]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        mean, log_variance = module.apply({"params": params}, images, method="encode")
        likelihood = module.apply({"params": params}, mean + jnp.exp(0.5 * log_variance) * noise, method="decode")
        found = elbo(images, mean, log_variance, likelihood)
        return 5 * found.loss, found

    (value, found), gradients = loss(tree("weights/"))
    np.testing.assert_allclose(value, reference["output/loss"], rtol=1e-5)
    np.testing.assert_allclose(found.reconstruction.sum(), reference["output/cross_entropy"], rtol=1e-5)
    np.testing.assert_allclose(found.kl.sum(), reference["output/divergence"], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), gradients, tree("gradients/"))


def test_sigma_and_the_posterior_are_the_networks():
    """`sigma` is what p(x | z) has; learned, it starts at 0.1; and each image's key is its own."""
    networks = {"encoder": ConvEncoder((4,)), "decoder": MLPDecoder((6,))}
    sizes = {"latent_size": 3, "image_size": 4, "channels": 3}
    images = jax.random.uniform(jax.random.key(0), (3, 4, 4, 3), minval=-1.0)
    for sigma, kind, expected in ((0.25, "gaussian", 0.25), ("learned", "discretized_gaussian", 0.1)):
        module = VAE(**networks, **sizes, likelihood=kind, sigma=sigma)
        init = jax.jit(functools.partial(module.init_with_output, jax.random.key(1)))
        (*posterior, likelihood), variables = init(images, jax.random.key(2))
        params = variables["params"]
        assert ("log_sigma" in params) == (sigma == "learned") and rebuild(to_json(module)) == module
        assert float(jnp.exp(likelihood.log_sigma)) == pytest.approx(expected, rel=0.03)
        assert likelihood.kind == kind and [value.shape for value in posterior] == [(3, 3)] * 2
    keys = jax.random.split(jax.random.key(4), 5)
    sample = jax.jit(lambda keys: sample_vae(keys, module, params, len(keys)))
    batch = sample(keys)
    assert batch.shape == (5, 4, 4, 3) and np.abs(batch).max() <= 1
    np.testing.assert_allclose(sample(keys[3:4])[0], batch[3], atol=1e-6)
    assert np.abs(batch[0] - batch[1]).max() > 1e-4
    assert jax.eval_shape(lambda key: sample_vae(key, module, params, 5), jax.random.key(4)).shape == batch.shape

    @jax.jit
    def two_ways(params):
        decoded = module.apply({"params": params}, posterior[0], method="decode").outputs
        return reconstruct(module, params, images), jnp.clip(decoded, -1, 1)

    np.testing.assert_allclose(*two_ways(params), atol=1e-6)


# The latent space


def test_active_units():
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(5000, 4)) * np.sqrt([0.02, 0.005, 1.0, 0.0]) + [0, 9, 0, 7]
    assert active_units(jnp.float32(mean)) == 2
    assert active_units(jnp.float32(mean), threshold=0.001) == 3


def test_along_one_latent_and_between_two():
    found = jax.jit(traverse, static_argnums=1)(jnp.array([1.0, 2.0, 3.0]), 1, jnp.array([-1.0, 5.0]))
    np.testing.assert_array_equal(found, [[1, -1, 3], [1, 5, 3]])
    found = jax.jit(interpolate, static_argnums=2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]), 5)
    np.testing.assert_allclose(found, [[0, 4], [0.5, 3], [1, 2], [1.5, 1], [2, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: VAE(likelihood="laplace"), "likelihood is 'laplace'; it must be one of bernoulli, gaussian, discreti"),
        (lambda: VAE(sigma=0.0), "sigma is 0.0; it must be a number above 0, or learned or optimal"),
        (lambda: VAE(sigma="best"), "sigma is 'best'; it must be a number above 0"),
        (lambda: VAE(likelihood="discretized_gaussian", sigma="optimal"), "set sigma=learned or a number"),
        (lambda: VAE(latent_size=0), "latent_size is 0; it must be 1 or more"),
        (lambda: VAE(encoder=ConvEncoder((4,) * 3)), "cannot be halved 3 times, as the encoder does; set a multiple"),
        (lambda: importance_bound(jax.random.key(0), *[jnp.zeros((1, 1))] * 3, None, 0), "has 0 samples"),
        (lambda: traverse(jnp.zeros(3), 3, jnp.zeros(1)), "dimension 3 was asked for; the latent's are 0 to 2"),
        (lambda: interpolate(jnp.zeros(3), jnp.zeros(3), 1), "1 latents were asked for"),
        (lambda: interpolate(jnp.zeros(3), jnp.zeros(2), 2), r"of shapes \[3\] and \[2\]"),
        (lambda: sample_vae(jax.random.split(jax.random.key(0), 2), VAE(), {}, 3), "2 keys were given for 3 examples"),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")
