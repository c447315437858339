"""The discrete VAE: OpenAI's code and PyTorch's distributions at the same weights, closed forms, its codes."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.checkpoint.rebuild import rebuild, to_json
from dalle2_jax.errors import InputError
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.layers.precision import with_dtype
from dalle2_jax.lineage.dvae import (
    DVAE,
    KL_WEIGHT,
    TEMPERATURE,
    CosineSchedule,
    check_codes,
    codebook_use,
    dvae_elbo,
    gumbel_softmax,
    kl_to_uniform,
    sample_codes,
)
from dalle2_jax.lineage.logit_laplace import LEAST_SCALE, LogitLaplace, logit_laplace_log_density
from dalle2_jax.weights.sources.openai_dvae import dvae_table
from tests.parity.drawn_weights import draw
from tests.parity.reference import reference_path
from tests.parity.tables import convert

KEY = jax.random.key(0)
TINY = DVAE(image_size=16, codebook_size=24, code_width=16, width=8)

# OpenAI's code (tests/parity/make_dvae.py)


@pytest.fixture(scope="module")
def reference():
    with np.load(reference_path("dvae")) as file:
        return dict(file)


@pytest.fixture(scope="module")
def images(reference):
    return jnp.float32(reference["pixels"] / 127.5 - 1)


@pytest.fixture(scope="module")
def params(reference, images):
    shapes = {f"dvae/{name}": shape for name, shape in json.loads(str(reference["shapes"])).items()}
    drawn = {name.replace("dvae/", "weights/", 1): value for name, value in draw(shapes).items()}
    return convert(dvae_table(TINY), TINY, drawn, images, KEY)


def near(ours, theirs, share=1e-5):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=share, atol=share * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("dtype", "share"), [("float32", 1e-5), pytest.param("bfloat16", 3e-2, marks=pytest.mark.slow)]
)
def test_the_network_is_openais(reference, images, params, dtype, share):
    """In bfloat16 with what must be float32 in it, and recomputed in the backward pass."""
    given = np.concatenate([reference["given"], np.eye(24, dtype=np.float32)[reference["codes"]]])
    module = with_dtype(TINY, dtype).clone(remat=dtype == "bfloat16")

    @jax.jit
    def run(params):
        logits = module.apply({"params": params}, images, method="logits")
        found = module.apply({"params": params}, given, method="decode")
        return logits, jnp.concatenate([found.mean, found.log_scale], axis=-1)

    logits, outputs = run(jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    assert logits.dtype == outputs.dtype == jnp.float32
    near(logits, reference["logits"], share)
    near(outputs, np.concatenate([reference["soft"], reference["hard"]]), share)


def test_images_to_codes_and_back(reference, images, params):
    @jax.jit
    def run(params):
        codes = TINY.apply({"params": params}, images, method="encode")
        return codes, TINY.apply({"params": params}, codes, method="decode_codes")

    codes, shown = run(params)
    np.testing.assert_array_equal(codes, reference["codes"])
    assert codes.dtype == jnp.int32 and len(np.unique(codes)) > 2
    near(shown, 2 * reference["shown"] - 1)


def test_the_loss_is_that_of_pytorchs_distributions(reference, images, params):
    """Value and gradients, of relaxed codes without noise."""

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(params):
        logits = TINY.apply({"params": params}, images, method="logits")
        likelihood = TINY.apply({"params": params}, jax.nn.softmax(logits / 0.7), method="decode")
        found = dvae_elbo(images, logits, likelihood, 1.5)
        return found.loss, found

    gradient, found = run(params)
    assert found.dimensions == 16 * 16 * 3
    for name in ("reconstruction", "kl", "loss"):
        np.testing.assert_allclose(getattr(found, name), reference[name], rtol=1e-5, atol=1e-4)  # sums of 768 numbers
    np.testing.assert_allclose(found.value, -reference["reconstruction"] - reference["kl"], rtol=1e-5)
    ours = {
        "encoder.blocks.input.w": gradient["encoder"]["input"]["kernel"].transpose(3, 2, 0, 1),
        "encoder.blocks.output.conv.b": gradient["encoder"]["output"]["bias"],
        "decoder.blocks.input.w": gradient["decoder"]["codebook"]["embedding"].T[:, :, None, None],
    }
    for name, value in ours.items():
        near(value, reference[f"gradient/{name}"], 1e-4)


def test_the_published_size():
    module = DVAE()
    init = functools.partial(module.init, method="reconstruct")
    shapes = jax.eval_shape(init, KEY, jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32))["params"]
    counts = {part: count_parameters(tree) for part, tree in shapes.items()}
    assert counts == {"encoder": 53_786_240, "decoder": 43_829_766} and module.grid == 32
    assert len(jax.tree.leaves(shapes["encoder"])) == 74 and len(jax.tree.leaves(shapes["decoder"])) == 76
    assert rebuild(to_json(module)) == module


# The likelihood


def test_the_density_by_hand():
    """At x = 1/2 with mu = 0 and b = 1 it is 2; and it integrates to 1."""
    half, zero = jnp.float32(0.5), jnp.zeros(())
    assert float(logit_laplace_log_density(half, zero, zero)) == pytest.approx(-math.log(0.5))
    x = (np.arange(200_000) + 0.5) / 200_000
    for mean, scale in ((0.0, 0.5), (1.0, 0.3), (-2.0, 0.2)):
        inputs = jnp.float32(x), jnp.full(x.shape, mean), jnp.full(x.shape, math.log(scale))
        assert np.exp(logit_laplace_log_density(*inputs)).mean(dtype=float) == pytest.approx(1, abs=1e-4)


def test_a_scale_has_a_least():
    """Flat images would have a density without bounds; from below it comes back where it is too small."""
    x, low = jnp.float32([0.5, 0.5]), jnp.full(2, math.log(LEAST_SCALE) - 5)
    mean = jnp.float32([0.0, 3 * LEAST_SCALE])
    both = jax.jit(jax.vmap(jax.value_and_grad(logit_laplace_log_density, argnums=(1, 2))))
    value, gradient = both(x, mean, low)
    np.testing.assert_allclose(value, math.log(2 / LEAST_SCALE) - np.array([0, 3]), rtol=1e-5)
    np.testing.assert_allclose(gradient[0][1], -1 / LEAST_SCALE, rtol=1e-5)
    np.testing.assert_allclose(gradient[1], [0, 3 - 1], rtol=1e-4, atol=1e-6)
    # Above it the derivative is the plain one.
    _, (_, slopes) = both(x, jnp.float32([2.0, -0.1]), jnp.float32([0.5, 0.5]))
    np.testing.assert_allclose(slopes, np.array([2, 0.1]) / math.exp(0.5) - 1, rtol=1e-5)


def test_images_are_at_the_mean():
    images = jnp.linspace(-1, 1, 24).reshape(1, 2, 4, 3)
    mapped = 0.8 * (images + 1) / 2 + 0.1
    found = LogitLaplace(jnp.log(mapped / (1 - mapped)), jnp.full(images.shape, -9.0), 0.25)
    np.testing.assert_allclose(found.images, images, atol=1e-6)
    expected = -np.log(2 * 0.25 * mapped * (1 - mapped)).sum()  # at its least scale
    np.testing.assert_allclose(found.log_prob(images), [expected], rtol=1e-5)
    # Further out than any pixel is black or white.
    np.testing.assert_array_equal(LogitLaplace(jnp.float32([-9, 9]), jnp.zeros(2)).images, [-1, 1])


# Codes


def test_the_divergence_by_hand():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 2, 5)) * 3
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (q * np.log(q * 5)).reshape(2, -1).sum(1)
    np.testing.assert_allclose(kl_to_uniform(jnp.float32(logits)), expected, rtol=1e-5)
    # Of no code and of one code at each of DALL-E's places: nothing, and the most that there is.
    logits, divergence = np.zeros((1, 32, 32, 8192), np.float32), jax.jit(kl_to_uniform)
    assert float(divergence(logits)[0]) == pytest.approx(0, abs=1e-2)
    logits[..., 7] = 1e4
    assert float(divergence(logits)[0]) == pytest.approx(1024 * math.log(8192), rel=1e-6)


def test_relaxed_codes():
    """Their largest entry is a sample of the categorical, whatever the temperature, and the less it is the larger."""
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(probabilities), (1, 100, 200, 4))
    traced = []

    @jax.jit
    def soft(key, logits, temperature):
        traced.append(temperature)
        return gumbel_softmax(key, logits, temperature)

    codes = sample_codes(KEY, logits)
    largest = []
    for temperature in (1.0, 1 / 16):
        relaxed = soft(KEY, logits, temperature)
        np.testing.assert_allclose(relaxed.sum(-1), np.ones((1, 100, 200)), rtol=1e-5)
        np.testing.assert_array_equal(jnp.argmax(relaxed, axis=-1), codes)
        largest.append(relaxed.max(-1).mean())
    assert len(traced) == 1 and largest[0] < 0.8 < 0.95 < largest[1]
    shares = np.bincount(np.ravel(codes), minlength=4) / codes.size
    deviations = np.sqrt(probabilities * (1 - probabilities) / codes.size)
    assert (np.abs(shares - probabilities) < 4 * deviations).all()
    # At temperature 1 the weights of two codes differ by their logits and the noise's logistic variable.
    odds = np.asarray(soft(KEY, logits, 1.0), float)
    odds = np.log(odds[..., 0] / odds[..., 1]) - np.log(0.5 / 0.3)
    assert abs(odds.mean()) < 0.06 and odds.var() == pytest.approx(math.pi**2 / 3, rel=0.05)


def test_each_images_noise_is_its_own():
    keys, logits = jax.random.split(KEY, 3), jax.random.normal(jax.random.key(1), (3, 2, 2, 5))
    sample = jax.jit(lambda keys, logits: (gumbel_softmax(keys, logits, 0.5), sample_codes(keys, logits)))
    relaxed, codes = sample(keys, logits)
    alone, code = sample(keys[2:], logits[2:])
    np.testing.assert_allclose(alone[0], relaxed[2], rtol=1e-6)
    np.testing.assert_array_equal(code[0], codes[2])


def test_the_use_of_the_codebook():
    use = jax.jit(codebook_use, static_argnums=1)
    perplexity, usage = use(jnp.array([[0, 0, 2], [2, 0, 0]]), 8)
    expected = math.exp(-(4 / 6 * math.log(4 / 6) + 2 / 6 * math.log(2 / 6)))
    assert float(perplexity) == pytest.approx(expected, rel=1e-6) and float(usage) == 0.25
    perplexity, usage = use(jnp.arange(16).reshape(2, 2, 4), 16)
    assert float(perplexity) == pytest.approx(16, rel=1e-6) and float(usage) == 1


def test_schedules():
    assert [round(float(TEMPERATURE(step)), 6) for step in (0, 75_000, 150_000, 10**6)] == [1, 0.53125, 0.0625, 0.0625]
    np.testing.assert_allclose(KL_WEIGHT(jnp.int32(1250)), 6.6 * (1 - math.cos(math.pi / 4)) / 2, rtol=1e-5)
    assert float(KL_WEIGHT(0)) == 0 and float(KL_WEIGHT(5000)) == pytest.approx(6.6)
    assert rebuild(to_json(TEMPERATURE)) == TEMPERATURE


def test_codes_that_there_are_not(params):
    decode = functools.partial(TINY.apply, {"params": params}, method="decode_codes")
    for codes, words in (([[[0, 24]]], "from 0 to 24; those of the dVAE are 0 to 23"), ([[[-1, 3]]], "from -1 to 3")):
        with pytest.raises(InputError, match=words):
            decode(jnp.array(codes))
        assert np.isnan(jax.jit(decode)(jnp.array(codes))).any()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DVAE(image_size=100), "image_size is 100, which does not divide into codes of 8 pixels a side; set"),
        (lambda: DVAE(codebook_size=0), "codebook_size is 0; it must be 1 or more"),
        (lambda: DVAE(least_scale=0.0), "least_scale is 0.0; it must be above 0"),
        (lambda: DVAE(multipliers=()), r"multipliers are \(\); give one or more"),
        (lambda: DVAE(width=6), r"width is 6, which times each of the multipliers \(1, 2, 4, 8\) must be a multiple"),
        (lambda: CosineSchedule(1.0, 0.5, 0), "a schedule has 0 steps; it must have 1 or more"),
        (lambda: gumbel_softmax(KEY, jnp.zeros((1, 1, 1, 2)), 0.0), "temperature of the codes is 0.0; it must be a"),
        (lambda: gumbel_softmax(jax.random.split(KEY, 2), jnp.zeros((3, 1, 1, 2)), 1.0), "2 keys were given for 3"),
        (lambda: check_codes(jnp.zeros((1, 2, 2)), 4), r"must be integers \[b, h, w\], not float32 \[1, 2, 2\]"),
        (
            lambda: jax.eval_shape(TINY.init, KEY, jnp.zeros((1, 8, 8, 3)), KEY),
            r"the images must be \[b, 16, 16, 3\], not \[1, 8, 8, 3\]",
        ),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")
