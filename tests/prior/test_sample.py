"""Sampling the prior: guidance keeps the noised embedding, the best candidate is kept, keys belong to captions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.prior import sample_prior
from dalle2_jax.prior.diffusion_sampling import denoise_embeddings

SIZE = 6
PROCESS = Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=None)


class Prior:
    """A prior by formula: its answer is what it was given, so that a sample shows which inputs it came from."""

    embedding_size, reads_tokens = SIZE, True

    def __init__(self, keep_noise=0.0):
        self.keep_noise, self.calls = keep_noise, []

    def apply(self, variables, x_t, timesteps, *, text_embedding, text, text_mask, keep_text):
        self.calls.append({"x_t": x_t, "text": text, "text_mask": text_mask, "keep_text": keep_text})
        message = jnp.where(keep_text[:, None], text_embedding, variables["params"]["null"][None])
        return 2.0 * message + self.keep_noise * x_t

    def sample_embeddings(self, *arguments):
        return denoise_embeddings(self, *arguments)

    def unscale_embedding(self, embedding):
        return embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True)


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def inputs():
    random = np.random.default_rng(0)
    return {
        "text_embedding": unit(random.normal(size=(3, SIZE))),
        "text": np.arange(12, dtype=np.int32).reshape(3, 4),
        "text_mask": np.ones((3, 4), bool),
    }


NULL = np.linspace(-0.3, 0.4, SIZE).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), 3)


def draw(prior, inputs, keys=KEYS, **sampling):
    sampling = Sampling(sampler="ddim", steps="3", **sampling)
    captions = EncodedCaptions(inputs["text"], inputs["text_mask"], inputs["text_embedding"])
    return np.asarray(sample_prior(keys, prior, {"null": jnp.asarray(NULL)}, PROCESS, sampling, captions))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_by_formula(inputs, scale):
    """The last step of DDIM is the predicted x0, which the formula says outright."""
    message = inputs["text_embedding"]
    np.testing.assert_allclose(
        draw(Prior(), inputs, guidance_scale=scale), unit(NULL + scale * (message - NULL)), atol=1e-5
    )


def test_the_null_half_keeps_the_noised_embedding(inputs):
    prior = Prior(keep_noise=0.5)
    with jax.disable_jit():
        draw(prior, inputs, guidance_scale=2.0, candidates=2)
    assert len(prior.calls) == 3
    for call in prior.calls:
        first, second = np.split(np.asarray(call["x_t"]), 2)
        assert first.shape == (6, SIZE) and np.abs(first).min() > 0
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(call["keep_text"], [True] * 6 + [False] * 6)
        np.testing.assert_array_equal(call["text"], np.tile(np.repeat(inputs["text"], 2, axis=0), (2, 1)))
    # Without guidance there is one half.
    prior = Prior()
    draw(prior, inputs)
    assert prior.calls[0]["x_t"].shape == (3, SIZE) and prior.calls[0]["text"].shape == (3, 4)


def test_the_best_of_the_candidates_is_kept(inputs):
    """A prior that answers with its noise alone: each candidate is another direction, drawn from its own key."""

    class Noise(Prior):
        def apply(self, variables, x_t, timesteps, **condition):
            return x_t

    picked = draw(Noise(), inputs, candidates=8)
    candidates = []
    for key in KEYS:
        own = [jax.random.split(k)[0] for k in jax.random.split(key, 8)]
        # x_t is only ever scaled by a positive number on its way, so its direction is that of the first noise.
        candidates.append(unit(np.stack([np.asarray(jax.random.normal(k, (SIZE,))) for k in own])))
    similarity = np.einsum("bmz,bz->bm", np.stack(candidates), inputs["text_embedding"])
    expected = np.stack(candidates)[np.arange(3), similarity.argmax(1)]
    np.testing.assert_allclose(picked, expected, atol=1e-5)
    assert len(set(similarity.argmax(1))) > 1


def test_a_caption_alone_is_the_caption_in_a_batch(inputs):
    settings = {"guidance_scale": 2.0, "candidates": 2, "eta": 0.5}
    together = draw(Prior(keep_noise=0.5), inputs, **settings)
    one = {name: value[1:2] for name, value in inputs.items()}
    np.testing.assert_allclose(draw(Prior(keep_noise=0.5), one, KEYS[1:2], **settings), together[1:2], atol=1e-6)
    assert (together != draw(Prior(keep_noise=0.5), inputs, KEYS[::-1], **settings)).any()
    np.testing.assert_allclose(np.linalg.norm(together, axis=-1), 1.0, rtol=1e-5)


def test_one_key_serves_all_and_vmaps(inputs):
    settings = {"guidance_scale": 2.0, "candidates": 2}
    one = jax.random.key(3)
    np.testing.assert_array_equal(
        draw(Prior(keep_noise=0.5), inputs, one, **settings),
        draw(Prior(keep_noise=0.5), inputs, jax.random.split(one, 3), **settings),
    )
    captions = EncodedCaptions(inputs["text"], inputs["text_mask"], inputs["text_embedding"])
    sampling = Sampling(sampler="ddim", steps=3, **settings)

    def alone(key, caption):
        batch = jax.tree.map(lambda value: value[None], caption)
        return sample_prior(key, Prior(keep_noise=0.5), {"null": jnp.asarray(NULL)}, PROCESS, sampling, batch)[0]

    together = jax.vmap(alone)(KEYS, captions)
    assert together.shape == (3, SIZE)
    np.testing.assert_allclose(together[1], alone(KEYS[1], captions[1]), atol=1e-6)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="no sampler 'euler'; the samplers are ddim, ddpm"):
        Sampling(sampler="euler")
    with pytest.raises(ValueError, match="candidates is 0; it must be 1 or more"):
        dataclasses.replace(Sampling(), candidates=0)
