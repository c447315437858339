"""Sampling decoder and upsampler: both halves of guidance, a withheld caption, the key of each image, the range."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.decoder import Caption, CaptionEncoder, Decoder, caption_for, sample_decoder, sample_upsampler
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.layers import UNet

SIZE = 4
PROCESS = Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=None)
KEYS = jax.random.split(jax.random.key(0), 3)


class Formula:
    """A decoder by formula: an image of one level, 0.1 of the embedding's sum and 0.01 of the tokens' where kept."""

    unet = SimpleNamespace(image_size=SIZE)
    reads_image, inpainting = True, False

    def __init__(self, noise=0.0):
        self.noise, self.calls = noise, []

    def apply(self, variables, x_t, timesteps, *, image_embedding, text, text_mask, keep_image, keep_text):
        self.calls.append({"x_t": x_t, "keep_image": keep_image, "keep_text": keep_text, "timesteps": timesteps})
        level = jnp.where(keep_image, 0.1 * image_embedding.sum(-1), 0.0)
        if text is not None:
            level = level + jnp.where(keep_text, 0.01 * text.sum(-1), 0.0)
        return level[:, None, None, None] + self.noise * x_t


EMBEDDING = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]], np.float32)
TEXT = np.array([[1, 2], [3, 4], [5, 6]], np.int32)
SUMS, TOKENS = 0.1 * EMBEDDING.sum(-1), 0.01 * TEXT.sum(-1)


def draw(decoder, keep_text=(True, True, True), embedding=EMBEDDING, text=TEXT, keys=KEYS, **sampling):
    sampling = Sampling(**{"sampler": "ddim", "steps": "3", **sampling})
    mask = None if text is None else np.ones(text.shape, bool)
    keep_text = jnp.asarray(keep_text)
    caption = Caption({"text": text, "text_mask": mask}, keep_text)
    return np.asarray(sample_decoder(keys, decoder, {}, PROCESS, sampling, embedding, caption))


def level(images: np.ndarray) -> np.ndarray:
    """The one value of each image."""
    assert images.shape[1:] == (SIZE, SIZE, 3)
    assert np.ptp(images, axis=(1, 2, 3)).max() < 1e-5
    return images.mean((1, 2, 3))


def test_guidance_drops_both_conditions():
    np.testing.assert_allclose(level(draw(Formula())), SUMS + TOKENS, atol=1e-5)
    np.testing.assert_allclose(level(draw(Formula(), guidance_scale=3.0)), 3 * (SUMS + TOKENS), atol=1e-5)
    np.testing.assert_allclose(level(draw(Formula(), guidance_scale=0.0)), 0.0, atol=1e-6)
    np.testing.assert_allclose(level(draw(Formula(), text=None)), SUMS, atol=1e-5)


def test_a_withheld_caption_is_withheld_in_both_halves():
    kept = (True, False, True)
    withheld = level(draw(Formula(), kept, guidance_scale=2.0))
    np.testing.assert_allclose(withheld, 2 * (SUMS + np.where(kept, TOKENS, 0.0)), atol=1e-5)
    np.testing.assert_allclose(level(draw(Formula(), kept))[1], SUMS[1], atol=1e-5)


def test_the_null_half_keeps_x_t():
    decoder = Formula(noise=0.3)
    with jax.disable_jit():
        draw(decoder, (True, False, True), guidance_scale=2.0)
    assert len(decoder.calls) == 3
    for call in decoder.calls:
        first, second = np.split(np.asarray(call["x_t"]), 2)
        assert first.shape == (3, SIZE, SIZE, 3) and np.ptp(first) > 0.1
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(call["keep_image"], [True] * 3 + [False] * 3)
        np.testing.assert_array_equal(call["keep_text"], [True, False, True] + [False] * 3)
        assert len(set(np.asarray(call["timesteps"]).tolist())) == 1
    times = [int(call["timesteps"][0]) for call in decoder.calls]
    assert times == sorted(times, reverse=True) and times[-1] == 0


@pytest.mark.parametrize("settings", [{"sampler": "ddim", "eta": 0.7}, {"sampler": "ddpm"}])
def test_an_image_alone_is_the_image_in_a_batch(settings):
    together = draw(Formula(noise=0.4), guidance_scale=2.0, **settings)
    alone = draw(Formula(noise=0.4), (True,), EMBEDDING[1:2], TEXT[1:2], KEYS[1:2], guidance_scale=2.0, **settings)
    np.testing.assert_allclose(alone[0], together[1], atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01


STATES = {"text": "states", "text_mask": "mask"}
NULL = {"text": "no states", "text_mask": "no mask"}


@pytest.mark.parametrize(
    ("own", "width", "pools", "learned", "read", "null"),
    [
        (True, None, False, True, {"text": "tokens", "text_mask": "mask"}, None),
        (False, None, False, True, {"text": None, "text_mask": None}, None),
        (False, 7, False, True, STATES, None),
        (False, 7, True, True, STATES | {"text_embedding": "embedding"}, None),
        (False, 7, False, False, STATES, NULL),
        (False, 7, True, False, STATES | {"text_embedding": "embedding"}, NULL | {"text_embedding": "no embedding"}),
    ],
)
def test_what_each_kind_of_decoder_reads(own, width, pools, learned, read, null):
    """And of the empty caption: only where it stands for a withheld one."""
    text = CaptionEncoder(vocabulary_size=8, context_length=4, width=8, depth=1, heads=1) if own else None
    fields = {"text_width": width, "pools_embedding": pools, "learned_null_text": learned}
    decoder = Decoder(UNet(image_size=8), text=text, **fields)
    captions = EncodedCaptions("tokens", "mask", "embedding", "states")
    empty = EncodedCaptions("no tokens", "no mask", "no embedding", "no states")
    caption = caption_for(decoder, captions, "keep", empty)
    assert (caption.read, caption.keep, caption.null) == (read, "keep", null)
    assert decoder.needs_empty_caption == (not learned)


def test_images_are_clipped():
    images = draw(Formula(), text=None, guidance_scale=100.0)
    assert images.min() == -1.0 and images.max() == 1.0


def test_an_upsampler_sees_the_small_image():
    calls = []

    class Upsampler:
        inpainting = False

        def apply(self, variables, x_t, timesteps, low_resolution):
            calls.append(x_t)
            return jnp.repeat(jnp.repeat(low_resolution, 2, 1), 2, 2)

    low = np.random.default_rng(0).uniform(-1.5, 1.5, (3, 2, 2, 3)).astype(np.float32)
    sampling = Sampling(sampler="ddim", steps="2")
    drawn = sample_upsampler(KEYS, Upsampler(), {}, PROCESS, sampling, low, SIZE)
    expected = np.clip(low.repeat(2, axis=1).repeat(2, axis=2), -1, 1)
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
    assert calls[0].shape == (3, SIZE, SIZE, 3)
