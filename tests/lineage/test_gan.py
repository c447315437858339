"""The GAN: losses against closed forms and numpy, the best discriminator, dropout, and the players against PyTorch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from dalle2_jax.checkpoint.rebuild import rebuild, to_json
from dalle2_jax.errors import InputError
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.lineage.gan import (
    FAILURES,
    GAN,
    ConvDiscriminator,
    ConvGenerator,
    MaxoutDiscriminator,
    MLPGenerator,
    discriminator_loss,
    divergence_bound,
    failure,
    gan_noise,
    generator_loss,
    pairwise_distance,
    sample_gan,
)
from tests.parity.reference import reference_path

DCGAN = {"generator": ConvGenerator(), "discriminator": ConvDiscriminator(), "channels": 3, "noise": "normal"}


def shapes(module):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, module.latent_size)))["params"]


def test_parameter_counts():
    """The published MNIST pair, and PyTorch's DCGAN example at 64 pixels, whose BatchNorm has as many as GroupNorm."""
    for module, generator, discriminator in (
        (GAN(), 2_503_984, 1_231_441),
        (GAN(**DCGAN, image_size=64), 3_576_704, 2_765_568),
    ):
        found = shapes(module)
        assert count_parameters(found["generator"]) == generator
        assert count_parameters(found["discriminator"]) == discriminator
    # Without a norm: biases in place of scales and shifts, and in the first and last layers too.
    plain = {name: type(DCGAN[name])(norm="none") for name in ("generator", "discriminator")}
    found = shapes(GAN(**{**DCGAN, **plain}, image_size=64))
    assert count_parameters(found["generator"]) == 3_576_704 - 960 + 3
    assert count_parameters(found["discriminator"]) == 2_765_568 - 896 + 64 + 1


# Losses


def test_losses_where_the_discriminator_cannot_tell():
    half = jnp.zeros(3)
    assert discriminator_loss(half, half) == pytest.approx(math.log(2))
    assert generator_loss(half) == pytest.approx(math.log(2))
    assert generator_loss(half, "minimax") == pytest.approx(-math.log(2))
    assert divergence_bound(half, half) == pytest.approx(0.0, abs=1e-7)
    # V there is -log 4, and 0 where it always can.
    assert -2 * discriminator_loss(half, half) == pytest.approx(-1.38629, abs=1e-5)
    assert divergence_bound(jnp.full(2, 99.0), jnp.full(2, -99.0)) == pytest.approx(math.log(2))


def test_losses_by_hand():
    rng = np.random.default_rng(0)
    real, fake = 2 * rng.normal(size=5), 3 * rng.normal(size=4)
    d_real, d_fake = 1 / (1 + np.exp(-real)), 1 / (1 + np.exp(-fake))
    expected = -0.5 * (np.log(d_real).mean() + np.log(1 - d_fake).mean())
    assert discriminator_loss(jnp.float32(real), jnp.float32(fake)) == pytest.approx(expected, rel=1e-5)
    assert generator_loss(jnp.float32(fake)) == pytest.approx(-np.log(d_fake).mean(), rel=1e-5)
    assert generator_loss(jnp.float32(fake), "minimax") == pytest.approx(np.log(1 - d_fake).mean(), rel=1e-5)


@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-8, 1e-30])
def test_the_generators_gradient_where_it_is_found_out(share):
    """At D(G(z)) = e: by the logit -e under minimax, which vanishes, and -(1 - e) otherwise."""
    logit = jnp.float32([math.log(share) - math.log1p(-share)])
    for objective, expected in (("minimax", -share), ("non_saturating", share - 1)):
        slope = jax.grad(lambda logit, objective=objective: generator_loss(logit, objective))(logit)
        np.testing.assert_allclose(slope, [expected], rtol=1e-4)


def test_the_discriminators_gradient_and_large_logits():
    """Up on real and down on generated images, each by half of how wrong it is; never infinite."""
    real, fake = jnp.float32([2.0, -200.0]), jnp.float32([-1.0, 200.0])
    value, slopes = jax.value_and_grad(discriminator_loss, (0, 1))(real, fake)
    d = 1 / (1 + np.exp(-np.array([2.0, -1.0])))
    np.testing.assert_allclose(slopes[0], [-0.25 * (1 - d[0]), -0.25], rtol=1e-5)
    np.testing.assert_allclose(slopes[1], [0.25 * d[1], 0.25], rtol=1e-5)
    assert value == pytest.approx(0.25 * (-np.log(d[0]) + 200 - np.log(1 - d[1]) + 200), rel=1e-5)


def test_the_best_discriminator_is_p_over_p_plus_q():
    """Of two gaussians on a line, its value the Jensen-Shannon divergence, integrated in float64."""
    (m_p, s_p), (m_q, s_q) = (-0.4, 0.3), (0.5, 0.6)

    def density(x, mean, deviation):
        return np.exp(-0.5 * ((x - mean) / deviation) ** 2) / deviation / np.sqrt(2 * np.pi)

    quantiles = np.sqrt(2) * np.vectorize(_inverse_erf)(2 * (np.arange(400) + 0.5) / 400 - 1)
    real, fake = m_p + s_p * quantiles, m_q + s_q * quantiles
    images = [jnp.float32(values).reshape(-1, 1, 1, 1) for values in (real, fake)]
    net = MaxoutDiscriminator((16,), pieces=3, keep_input=1.0, keep_hidden=1.0, init_range=0.6)
    module = GAN(MLPGenerator(()), net, latent_size=1, image_size=1)
    params = module.init(jax.random.key(0), jnp.zeros((1, 1)))["params"]
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 300))

    def logits(params, images):
        return module.apply({"params": params}, images, method="discriminate")

    def loss(params):
        return discriminator_loss(logits(params, images[0]), logits(params, images[1]))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            changes, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, changes), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=300)
        return params, divergence_bound(logits(params, images[0]), logits(params, images[1]))

    params, bound = train(params)
    x = np.linspace(-8, 8, 100_001)
    p, q = density(x, m_p, s_p), density(x, m_q, s_q)
    mixed = np.where(p + q > 0, (p + q) / 2, 1)
    terms = [np.where(one > 0, one * np.log(np.where(one > 0, one, 1) / mixed), 0) for one in (p, q)]
    divergence = 0.5 * np.trapezoid(terms[0] + terms[1], x)
    assert bound == pytest.approx(divergence, abs=0.01)
    x = np.linspace(-1.0, 1.5, 41)  # where images are
    p, q = density(x, m_p, s_p), density(x, m_q, s_q)
    found = jax.nn.sigmoid(logits(params, jnp.float32(x).reshape(-1, 1, 1, 1)))
    np.testing.assert_allclose(found, p / (p + q), atol=0.03)


def _inverse_erf(y):
    low, high = -6.0, 6.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle) < y else (low, middle)
    return low


# The players


@pytest.mark.parametrize("name", ["convolutional", "dense"])
def test_the_players_against_pytorch(name):
    """Images, logits, losses and gradients at the same weights, noise and images."""
    with np.load(reference_path("gan")) as file:
        reference = {key.removeprefix(f"{name}/"): file[key] for key in file if key.startswith(f"{name}/")}

    def tree(prefix):
        found = {key.removeprefix(prefix): value for key, value in reference.items() if key.startswith(prefix)}
        return unflatten_dict({tuple(key.split("/")): jnp.asarray(value) for key, value in found.items()})

    if name == "convolutional":
        players = ConvGenerator(4, groups=2), ConvDiscriminator(4, groups=2)
    else:
        players = MLPGenerator((7, 6)), MaxoutDiscriminator((6, 4), pieces=3)
    images, noise, params = reference["input/images"], reference["input/noise"], tree("weights/")
    module = GAN(*players, latent_size=5, image_size=images.shape[1], channels=3)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes(module))

    def generate(generator):
        return module.apply({"params": {**params, "generator": generator}}, noise, method="generate")

    def logits(discriminator, images):
        return module.apply({"params": {"discriminator": discriminator}}, images, method="discriminate")

    @jax.jit
    def run(params):
        made = generate(params["generator"])
        found = {kind: logits(params["discriminator"], x) for kind, x in (("real", images), ("fake", made))}
        found["made"] = made

        def discriminators(discriminator):
            return discriminator_loss(logits(discriminator, images), logits(discriminator, made))

        def generators(generator, objective):
            return generator_loss(logits(params["discriminator"], generate(generator)), objective)

        gradients = {}
        found["discriminator"], gradients["discriminator"] = jax.value_and_grad(discriminators)(params["discriminator"])
        for objective in ("non_saturating", "minimax"):
            loss = functools.partial(generators, objective=objective)
            found[objective], gradients[objective] = jax.value_and_grad(loss)(params["generator"])
        return found, gradients

    found, gradients = run(params)
    for key, value in found.items():
        np.testing.assert_allclose(value, reference[f"output/{key}"], rtol=1e-4, atol=1e-5, err_msg=key)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), gradients, tree("gradients/"))


@pytest.mark.parametrize("size", [4, 8, 32])
def test_convolutional_players_of_any_size(size):
    """Every pixel is made of the noise and counts in the logit, those at the borders too."""
    module = GAN(ConvGenerator(4, groups=4), ConvDiscriminator(4, norm="none"), 3, size, 2)

    @jax.jit
    def run(key):
        noise = gan_noise(key, module, 2)
        params = module.init(key, noise)["params"]
        made = module.apply({"params": params}, noise, method="generate")
        slope = jax.grad(lambda x: module.apply({"params": params}, x, method="discriminate").sum())(made)
        return made, slope, module.apply({"params": params}, noise)

    made, slope, logits = run(jax.random.key(0))
    assert made.shape == (2, size, size, 2) and logits.shape == (2,) and made.dtype == logits.dtype == jnp.float32
    assert np.abs(made).max() < 1 and (made[0] != made[1]).all() and (slope != 0).all()


def test_the_published_start():
    """Weights uniform in their ranges, and so an image of pixels near one half, and D near it too."""
    module = GAN()
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 100)))["params"]
    for player, end in (("generator", 0.05), ("discriminator", 0.005)):
        for layer in params[player].values():
            kernel = np.asarray(layer["kernel"])
            assert np.abs(kernel).max() <= end and kernel.std() == pytest.approx(end / 3**0.5, rel=0.15)
            assert not np.asarray(layer["bias"]).any()
    assert rebuild(to_json(module)) == module and rebuild(to_json(GAN(**DCGAN, image_size=8))).noise == "normal"


@pytest.mark.parametrize(("hidden", "keep"), [((), 0.8), ((400,), 0.5)])
def test_dropout_keeps_a_share_and_makes_up_for_it(hidden, keep):
    """Of equal inputs to the last layer, as many times 1 / keep of each as are kept."""
    inputs = hidden[0] if hidden else 400
    net = MaxoutDiscriminator(hidden, pieces=2, keep_input=1.0 if hidden else keep, keep_hidden=keep)
    images = jnp.ones((300, 20, 20, 1))
    params = jax.tree.map(jnp.zeros_like, net.init(jax.random.key(0), images)["params"])
    params["out"]["kernel"] = jnp.ones((inputs, 1))
    if hidden:
        params["hidden_0"]["bias"] = jnp.tile(jnp.array([1.0, -3.0]), 400)  # of which the larger counts
    rngs = {"dropout": jax.random.key(1)}
    kept = keep * np.asarray(net.apply({"params": params}, images, False, rngs=rngs), np.float64)
    np.testing.assert_allclose(kept, kept.round(), atol=1e-3)
    assert kept.mean() == pytest.approx(400 * keep, abs=2.5) and kept.std() > 5  # sqrt(400 keep (1 - keep)) is 8 or 10
    np.testing.assert_allclose(net.apply({"params": params}, images), 400.0)


# Samples


@pytest.mark.parametrize(("kind", "fourth_moment"), [("uniform", 1.8), ("normal", 3.0)])
def test_noise_has_unit_variance_and_each_image_its_own(kind, fourth_moment):
    module = GAN(MLPGenerator((6,)), MaxoutDiscriminator((4,)), latent_size=5, image_size=4, noise=kind)
    keys = jax.random.split(jax.random.key(1), 4000)
    noise = np.asarray(jax.jit(lambda keys: gan_noise(keys, module, 4000))(keys), np.float64)
    assert noise.shape == (4000, 5) and abs(noise.mean()) < 0.03 and noise.var() == pytest.approx(1, abs=0.04)
    assert (noise**4).mean() == pytest.approx(fourth_moment, rel=0.1)
    assert (np.abs(noise).max() <= 3**0.5) == (kind == "uniform")
    params = module.init(jax.random.key(0), noise[:1])["params"]
    sample = jax.jit(lambda keys: sample_gan(keys, module, params, len(keys)))
    batch = sample(keys[:5])
    assert batch.shape == (5, 4, 4, 1) and np.abs(batch).max() <= 1 and np.abs(batch[0] - batch[1]).max() > 1e-3
    np.testing.assert_allclose(sample(keys[3:4])[0], batch[3], atol=1e-6)
    assert jax.eval_shape(lambda key: sample_gan(key, module, params, 5), keys[0]).shape == batch.shape


def test_pairwise_distance_by_hand():
    images = np.random.default_rng(0).uniform(-1, 1, (5, 3, 3, 2))
    pairs = [np.mean((a - b) ** 2) for n, a in enumerate(images) for b in images[:n]]
    assert pairwise_distance(jnp.float32(images)) == pytest.approx(np.sqrt(np.mean(pairs)), rel=1e-5)
    assert pairwise_distance(jnp.ones((3, 2, 2, 1))) == 0 == pairwise_distance(jnp.ones((1, 2, 2, 1)))


FAIR = {"real_accuracy": 0.7, "fake_accuracy": 0.6, "real_probability": 0.6, "fake_probability": 0.45}
FAIR |= {"sample_distance": 0.6, "data_distance": 0.7}
SURE = {"real_probability": 0.98, "fake_probability": 0.01}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({**SURE, "real_accuracy": 1.0, "fake_accuracy": 1.0}, "discriminator_won"),
        ({**SURE, "real_accuracy": 1.0}, None),
        ({"fake_probability": 0.97, "fake_accuracy": 0.0}, "generator_won"),
        ({"real_probability": 0.503, "fake_probability": 0.498}, "discriminator_dead"),
        ({"sample_distance": 0.1}, "collapsed"),
        ({"sample_distance": 0.1, "data_distance": 0.2}, None),  # the data are so
        (dict.fromkeys(FAIR, math.nan), None),
    ],
)
def test_who_has_won(change, expected):
    assert failure({**FAIR, **change}) == expected
    assert expected is None or expected in FAILURES


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GAN(latent_size=0), "latent_size is 0; it must be 1 or more"),
        (lambda: GAN(noise="gaussian"), "the GAN's noise is 'gaussian'; it must be uniform or normal"),
        (lambda: GAN(generator=ConvGenerator()), "image_size is 28; convolutional players take 4 pixels times"),
        (lambda: GAN(discriminator=ConvDiscriminator(), image_size=2), "image_size is 2; convolutional players"),
        (lambda: MLPGenerator((3, 0)), r"MLPGenerator has layers of widths \(3, 0\); each must be 1 or more"),
        (lambda: MaxoutDiscriminator(keep_input=0.0), "keep_input is 0.0; it must be above 0, and at most 1"),
        (lambda: MaxoutDiscriminator(keep_hidden=1.2), "MaxoutDiscriminator.keep_hidden is 1.2"),
        (lambda: MaxoutDiscriminator(pieces=0), "MaxoutDiscriminator.pieces is 0"),
        (lambda: ConvGenerator(norm="batch"), "ConvGenerator.norm is 'batch'; it must be group or none"),
        (lambda: ConvDiscriminator(width=24), "ConvDiscriminator.width is 24, which does not divide into 32 groups"),
        (lambda: ConvGenerator(width=0), "ConvGenerator has width 0 and 32 groups; both must be 1 or more"),
        (lambda: generator_loss(jnp.zeros(1), "hinge"), "objective is 'hinge'; it must be non_saturating or minimax"),
        (lambda: sample_gan(jax.random.split(jax.random.key(0), 2), GAN(), {}, 3), "2 keys were given for 3 examples"),
        (
            lambda: jax.eval_shape(GAN().init, jax.random.key(0), jnp.zeros((2, 99))),
            r"the noise must be \[b, 100\], not \[2, 99\]",
        ),
        (
            lambda: jax.eval_shape(
                functools.partial(GAN().init, method="discriminate"), jax.random.key(0), jnp.zeros((2, 28, 28, 3))
            ),
            r"the images must be \[b, 28, 28, 1\], not \[2, 28, 28, 3\]",
        ),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")
