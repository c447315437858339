"""DDPM: the paper's U-Net by its size, golden numbers of the bound, conditions, sampling, what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.checkpoint.rebuild import rebuild, to_json
from dalle2_jax.diffusion import SAMPLERS, Process, Sampling, variational_bound
from dalle2_jax.diffusion.loss import discretized_gaussian_log_likelihood, prior_term
from dalle2_jax.errors import InputError
from dalle2_jax.layers.caption_encoder import CaptionEncoder
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.lineage.ddpm import CIFAR10_UNET, DDPM, PROCESS, bits_per_dimension, for_evaluation, sample_ddpm

# The network


def parameters(module: DDPM, **read) -> int:
    arguments = jnp.zeros((1, 32, 32, 3)), jnp.zeros(1, jnp.int32)
    return count_parameters(jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments, **read)))


def test_the_papers_network_has_its_parameters():
    """35.7M (Ho et al. 2020, App. B): 35,746,307 layer by layer; with six outputs, 35,749,766."""
    assert parameters(DDPM()) == 35_746_307
    larger = DDPM(CIFAR10_UNET.clone(out_channels=6), condition="class", num_classes=10)
    assert parameters(larger, labels=jnp.zeros(1, jnp.int32)) == 35_749_766 + 11 * 512
    assert rebuild(to_json(larger)) == larger


# Golden numbers: T = 1000, beta from 1e-4 to 0.02

# Of x_0 and of the noise, as many as have the moments of the normal distribution that a quadratic function asks for.
SIGNS = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)


def linear_denoiser(process: Process, variance: float):
    """The best denoiser of N(0, variance)."""
    abar = jnp.asarray(process.alphas_cumprod, jnp.float32)

    def denoiser(x_t, t):
        a = abar[t][:, None, None, None]
        return x_t * jnp.sqrt(1 - a) / (a * variance + 1 - a)

    return denoiser


def gaussian_bound(process: Process, variance: float) -> tuple[float, float]:
    """(L_T, sum of L_1 to L_999) of data N(0, variance), in bits a dimension, without a sampling error: the terms are
    quadratic in x_0 and noise, whose signs here are all four."""
    x_0 = jnp.asarray(math.sqrt(variance) * SIGNS[:, 0]).reshape(1, 2, 2, 1)
    noise = jnp.broadcast_to(jnp.asarray(SIGNS[:, 1]).reshape(1, 1, 2, 2, 1), (1000, 1, 2, 2, 1))

    @jax.jit
    def run(x_0, noise):
        return variational_bound(jax.random.key(0), linear_denoiser(process, variance), x_0, process, noise)

    found = run(x_0, noise)
    return float(found["prior"][0]), float(np.asarray(found["terms"][0, 1:], np.float64).sum())


def test_the_last_step_by_its_golden_numbers():
    levels = np.arange(256) / 127.5 - 1
    images = [np.zeros(256), np.ones(256), -np.ones(256), levels]
    found = prior_term(jnp.asarray(np.stack(images), jnp.float32).reshape(4, 16, 16, 1), PROCESS)
    np.testing.assert_allclose(found, [5.874784e-10, 2.911295e-5, 2.911295e-5, 9.780818e-6], rtol=2e-6)
    np.testing.assert_allclose(PROCESS.posterior_variance[:2], [0, 5.45318766e-5], rtol=1e-8)


def test_the_first_step_is_a_distribution_over_256_bytes():
    levels = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)
    log_scale = 0.5 * PROCESS.fixed_large_log_variance[0]
    assert 2 * log_scale == pytest.approx(-9.81672514, abs=1e-8)
    for mean in (0.3, -0.999, 1.7):
        found = discretized_gaussian_log_likelihood(levels, jnp.float32(mean), jnp.float32(log_scale))
        assert np.exp(np.asarray(found, np.float64)).sum() == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize(
    ("variance", "large", "small"), [(1.0, 6.64382708, 7.31452492), (0.25, 5.64564104, 6.30243688)]
)
def test_the_bound_of_normal_data_by_its_golden_numbers(variance, large, small):
    """With the best variance, and a density at the first step, it is the entropy, 1/2 log2(2 pi e variance)."""
    process = dataclasses.replace(PROCESS, clip=None)
    assert gaussian_bound(process, variance)[1] == pytest.approx(large, rel=2e-5)
    assert gaussian_bound(dataclasses.replace(process, variance="fixed_small"), variance)[1] == pytest.approx(
        small, rel=2e-5
    )
    abar = process.alphas_cumprod
    error = variance * (1 - abar) / (abar * variance + 1 - abar)
    best = dataclasses.replace(process, variance="analytic", x0_error=tuple(error))
    prior, terms = gaussian_bound(best, variance)
    x_0, noise = jnp.asarray(math.sqrt(variance) * SIGNS[:, 0]), jnp.asarray(SIGNS[:, 1])
    x_1 = best.q_sample(x_0.reshape(1, 2, 2, 1), jnp.zeros(1, jnp.int32), noise.reshape(1, 2, 2, 1))
    first = best.predict(linear_denoiser(best, variance)(x_1, jnp.zeros(1, jnp.int32)), x_1, 0)
    distance, log_variance = np.asarray(x_0.reshape(1, 2, 2, 1) - first.mean), np.asarray(first.log_variance)
    density = 0.5 * (np.log(2 * np.pi) + log_variance + distance**2 * np.exp(-log_variance)).mean() / np.log(2)
    assert prior + terms + density == pytest.approx(0.5 * np.log2(2 * np.pi * np.e * variance), abs=2e-5)


# Conditions and sampling

UNET = CIFAR10_UNET.clone(
    image_size=4, channels=8, channel_multipliers=(1,), depth=1, attention_resolutions=(), groups=4, dropout=0.0
)
CLASSES = DDPM(UNET, condition="class", num_classes=4)
TEXT = CaptionEncoder(vocabulary_size=20, context_length=5, width=8, depth=1, heads=2)
CAPTIONS = DDPM(UNET, condition="caption", text=TEXT)
FEW = Sampling(sampler="ddim", steps="4")


def drawn(module: DDPM, **read):
    """Random parameters, none of them zero."""
    arguments = jnp.zeros((1, *module.image_shape)), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments, **read))["params"]
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def class_params():
    return drawn(CLASSES, labels=jnp.zeros(1, jnp.int32))


@pytest.fixture(scope="module")
def x_t():
    return jax.random.normal(jax.random.key(3), (3, 4, 4, 3))


def test_a_withheld_class_is_the_last_row(class_params, x_t):
    apply, t = jax.jit(CLASSES.apply), jnp.array([1, 400, 999])
    labels, keep = jnp.array([0, 3, 1]), jnp.array([False, True, False])
    found = apply({"params": class_params}, x_t, t, labels, keep=keep)
    table = class_params["class_embedding"]["embedding"]
    assert table.shape == (5, 32)
    last = {**class_params, "class_embedding": {"embedding": np.where(np.arange(5)[:, None] == 3, table, table[4])}}
    np.testing.assert_allclose(found, apply({"params": last}, x_t, t, labels, keep=jnp.ones(3, bool)), atol=1e-5)
    kept = apply({"params": class_params}, x_t, t, labels, keep=jnp.ones(3, bool))
    assert np.abs(kept[0] - found[0]).max() > 1e-3
    np.testing.assert_allclose(kept[1], found[1], atol=1e-5)


def test_a_withheld_caption_is_empty_and_another_says_something_else(x_t):
    params, t = drawn(CAPTIONS, tokens=jnp.zeros((1, 5), jnp.int32)), jnp.array([1, 400, 999])
    tokens, mask = jnp.array([[3, 4, 0, 0, 0], [3, 4, 7, 0, 0], [9, 9, 9, 9, 9]]), jnp.ones((3, 5), bool)
    apply = jax.jit(lambda tokens, mask, keep: CAPTIONS.apply({"params": params}, x_t, t, None, tokens, mask, keep))
    found = apply(tokens, mask, jnp.array([True, False, True]))
    np.testing.assert_allclose(found[1], apply(tokens, mask & False, jnp.ones(3, bool))[1], atol=1e-5)
    other = apply(tokens.at[0, 4].set(2), mask, jnp.array([True, False, True]))
    assert np.abs(other[0] - found[0]).max() > 1e-3
    np.testing.assert_allclose(other[1:], found[1:], atol=1e-5)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_gives_an_image_the_same_alone_and_in_a_batch(sampler, class_params):
    sampling = Sampling(sampler=sampler, steps="4", guidance_scale=2.0)

    @jax.jit
    def run(key, sampling, labels):
        return sample_ddpm(key, CLASSES, class_params, PROCESS, sampling, len(labels), labels)

    keys, labels = jax.random.split(jax.random.key(5), 2), jnp.array([1, 2])
    images = run(keys, sampling, labels)
    assert images.shape == (2, 4, 4, 3) and images.dtype == jnp.float32
    assert np.abs(images).max() <= 1 and images.std() > 0.1
    swapped = run(keys[::-1], sampling, labels[::-1])
    np.testing.assert_allclose(swapped[::-1], images, atol=1e-4)
    # At scale 0 the class says nothing, at 1 it does.
    free = dataclasses.replace(sampling, guidance_scale=0.0)
    unguided, other = run(keys, free, labels), run(keys, free, labels + 1)
    np.testing.assert_allclose(unguided, other, atol=1e-6)
    assert np.abs(images - unguided).max() > 1e-3


def test_guidance_is_by_the_withheld_class(class_params):
    """The only step of a process of one: x_0 of the guided epsilon, written out."""
    process = dataclasses.replace(PROCESS, schedule=(0.3,), clip=None)
    x_T, labels = jax.random.normal(jax.random.key(0), (2, 4, 4, 3)), [3, 0]

    @jax.jit
    def run(x_T):
        sampling = Sampling(sampler="ddim", steps="1", guidance_scale=3.0)
        made = sample_ddpm(jax.random.key(1), CLASSES, class_params, process, sampling, 2, labels, x_T=x_T)
        read = jnp.array([*labels, *labels]), jnp.arange(4) < 2
        both = CLASSES.apply({"params": class_params}, jnp.tile(x_T, (2, 1, 1, 1)), jnp.zeros(4), read[0], keep=read[1])
        return made, *jnp.split(both, 2)

    made, kept, null = map(np.asarray, run(x_T))
    expected = (np.asarray(x_T) - np.sqrt(0.3) * (null + 3 * (kept - null))) / np.sqrt(0.7)
    assert (np.abs(expected) < 1).mean() > 0.1 and np.abs(kept - null).max() > 0.03
    np.testing.assert_allclose(made, np.clip(expected, -1, 1), atol=1e-4)


def test_captions_are_sampled_and_their_bits_counted():
    params = drawn(CAPTIONS, tokens=jnp.zeros((1, 5), jnp.int32))
    captions = EncodedCaptions(jnp.array([[3, 4, 0, 0, 0], [9, 9, 9, 9, 9]]), jnp.array([[True] * 2 + [False] * 3] * 2))
    short = PROCESS.respaced("3")

    @jax.jit
    def run(key, captions):
        sampling = dataclasses.replace(FEW, guidance_scale=2.0)
        images = sample_ddpm(key, CAPTIONS, params, PROCESS, sampling, 2, captions=captions)
        return images, bits_per_dimension(key, CAPTIONS, params, short, jnp.round(images), captions=captions)

    images, bits = run(jax.random.key(0), captions)
    assert images.shape == (2, 4, 4, 3) and bits["terms"].shape == (2, 3)
    np.testing.assert_allclose(bits["total"], bits["prior"] + bits["terms"].sum(1), rtol=1e-5)
    other, _ = run(jax.random.key(0), captions[::-1])
    assert np.abs(other - images).max() > 1e-3
    assert for_evaluation(PROCESS, clip_denoised=False).clip is None and for_evaluation(PROCESS) == PROCESS


# Refused


PLAIN = DDPM(UNET)


def sampled(module=PLAIN, sampling=FEW, key=None, **given):
    key = jax.random.key(0) if key is None else key
    return jax.eval_shape(lambda: sample_ddpm(key, module, {}, PROCESS, sampling, 2, **given))


TOKENS = EncodedCaptions(np.zeros((2, 5), np.int32), np.ones((2, 5), bool))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DDPM(condition="text"), "a DDPM's condition is 'text'; it must be one of none, class, caption"),
        (lambda: DDPM(condition="class"), "a DDPM with condition=class needs num_classes"),
        (lambda: DDPM(condition="caption"), "a DDPM with condition=caption needs text"),
        (lambda: DDPM(num_classes=3), "a DDPM with condition=none has no use for num_classes"),
        (lambda: DDPM(condition="class", num_classes=0), "num_classes is 0; it must be 1 or more"),
        (lambda: DDPM(channels=0), "channels is 0; it must be 1 or more"),
        (lambda: sampled(labels=[0, 1]), "there are labels for a DDPM with condition=none; leave them out"),
        (lambda: sampled(captions=TOKENS), "there are captions for a DDPM with condition=none; leave them out"),
        (lambda: sampled(CLASSES), "conditional on a class and there are no labels; give 2"),
        (lambda: sampled(CAPTIONS), "conditional on a caption and there are no captions; give 2"),
        (lambda: sampled(CLASSES, labels=[0, 4]), "there is no class 4; this DDPM's are 0 to 3"),
        (lambda: sampled(CLASSES, labels=[-1, 1]), "there is no class -1; this DDPM's are 0 to 3"),
        (lambda: sampled(CLASSES, labels=[0.5, 1]), "the labels are float64; they must be whole numbers"),
        (lambda: sampled(CLASSES, labels=[0, 1, 2]), r"labels of shape \[3\] for 2 images; give one an image"),
        (lambda: sampled(CAPTIONS, captions=TOKENS[:1]), "there are 1 captions for 2 images; give one an image"),
        (
            lambda: sampled(sampling=Sampling(guidance_scale=2.0)),
            "the guidance scale is 2.0 and this DDPM has no condition to guide by; set guidance_scale=1",
        ),
        (lambda: sampled(key=jax.random.split(jax.random.key(0), 3)), "3 keys were given for 2 examples"),
        (
            lambda: bits_per_dimension(jax.random.key(0), PLAIN, {}, PROCESS, jnp.zeros((2, 4, 4, 1))),
            r"the images must be \[b, 4, 4, 3\], not \[2, 4, 4, 1\]",
        ),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("module", "changes", "sentence"),
    [
        (CLASSES, {}, "this DDPM is conditional on a class: give it labels"),
        (CAPTIONS, {}, "this DDPM is conditional on a caption: give it tokens"),
        (PLAIN, {"labels": jnp.zeros(1, jnp.int32)}, "this DDPM has condition=none and reads no labels"),
        (CLASSES, {"labels": jnp.zeros(1)}, r"the labels must be int32 \[1\], not float32 \[1\]"),
        (CAPTIONS, {"tokens": jnp.zeros(5, jnp.int32)}, r"the tokens must be int32 \[1, n\], not int32 \[5\]"),
        (CAPTIONS, {"tokens": jnp.zeros((1, 5), jnp.int32), "mask": jnp.ones((1, 4), bool)}, "the tokens' shape"),
        (DDPM(UNET, channels=1), {}, r"the DDPM wants x_t \[b, h, w, 1\], not \[1, 4, 4, 3\]"),
    ],
)
def test_the_network_refuses(module, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1), **changes))
