"""The two-part latent: what is encoded comes back, and what of an image goes in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import DALLE2
from dalle2_jax.diffusion import Process
from dalle2_jax.errors import InputError
from dalle2_jax.evaluation.metrics.psnr import psnr
from dalle2_jax.manipulate import Latent, Series, default_steps, embed, encode, reconstruct
from dalle2_jax.manipulate.latent import concatenate, decode_latent, whole_batches
from tests.cascade import DECODER_SIZE, EMBEDDING, FINAL_SIZE

KEY = jax.random.key(3)
FAST = {"steps": "3", "batch_size": 8}
CAPTIONS = ["a large blue cross", "a yellow square"]


@pytest.fixture(scope="module")
def photos():
    """Two images: of 16 px in cells of 2 x 2, and of 20 x 40 px, whose central square is the columns 10 to 30."""
    random = np.random.default_rng(0)
    small, wide = (random.integers(0, 256, (*size, 3), np.uint8) for size in ((8, 8), (20, 40)))
    return [small.repeat(2, 0).repeat(2, 1), wide]


@pytest.fixture(scope="module")
def latent(model, photos):
    return encode(model, photos, **FAST)


def test_what_goes_in_is_the_central_square(model, photos, latent):
    assert isinstance(latent, Latent) and len(latent) == 2 and latent.steps == "3" and latent.captions is None
    assert latent.image_embedding.shape == (2, EMBEDDING) and latent.x_T.shape == (2, DECODER_SIZE, DECODER_SIZE, 3)
    np.testing.assert_allclose(latent.image_embedding[0], model.encode_image(photos[0][None])[0], atol=1e-5)
    other = photos[1].copy()
    other[:, :10], other[:, 30:] = 0, 255
    again = encode(model, [photos[0], other], **FAST)
    jax.tree.map(np.testing.assert_array_equal, again, latent)
    gray, rgba = photos[0][..., 0], np.concatenate([photos[0], np.zeros((16, 16, 1), np.uint8)], axis=-1)
    several = encode(model, [gray, rgba], **FAST)
    same = encode(model, [np.repeat(gray[..., None], 3, -1), np.full_like(photos[0], 255)], **FAST)
    jax.tree.map(np.testing.assert_array_equal, several, same)


def test_an_encoded_image_comes_back(model, photos):
    """By the decoder's part of it; a network that was hardly trained says of the noise what it is, not of the image."""
    process = Process(schedule="linear", prediction="epsilon", variance="fixed_small", clip=None)
    record = dataclasses.replace(model.decoder.record, process=process)
    alone = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, record=record), upsamplers=())
    found = []
    for refinements in (0, 3):
        latent = encode(alone, photos, steps="20", batch_size=2, refinements=refinements)
        found.append(psnr(reconstruct(alone, KEY, latent, batch_size=2).images[:1], photos[0][None, ::2, ::2]))
    assert found[1] > max(40, found[0] + 3)


def test_the_series_has_its_labels_and_sheet(model, latent):
    series = reconstruct(model, KEY, latent)
    assert series.images.shape == (2, FINAL_SIZE, FINAL_SIZE, 3) and series.labels == ("image 1", "image 2")
    sheet = series.sheet(cell=FINAL_SIZE)
    pixels = np.asarray(sheet)[6 : 6 + FINAL_SIZE]
    for row in range(2):
        left = 6 + row * (FINAL_SIZE + 6)
        inside = pixels[1:-1, left + 1 : left + FINAL_SIZE - 1]
        np.testing.assert_array_equal(inside, series.images[row, 1:-1, 1:-1])
    given = np.broadcast_to(np.uint8([7, 99, 7]), (2, 40, 40, 3))
    beside = dataclasses.replace(series, given=given).sheet(cell=FINAL_SIZE)
    assert (np.asarray(beside) == [7, 99, 7]).all(-1).sum() == 2 * FINAL_SIZE**2
    with pytest.raises(InputError, match="1 labels were given for 2 images"):
        Series(series.images, ("one",), 2)


def test_a_caption_is_used_there_and_back(model, photos, monkeypatch):
    seen = []
    generate = DALLE2.generate
    monkeypatch.setattr(DALLE2, "generate", lambda *a, **k: seen.append((a[2], k)) or generate(*a, **k))
    latent = encode(model, photos, CAPTIONS, **FAST)
    decode_latent(model, jax.random.split(KEY, 2), latent[[1, 0]])
    captions, settings = seen[0]
    assert captions[:2] == CAPTIONS[::-1] and settings["decoder"]["steps"] == "3"
    _, x_T = model.invert(photos[0][None].repeat(2, 0), [CAPTIONS[0]] * 2, steps="3")
    np.testing.assert_allclose(latent.x_T[0], x_T[0], rtol=1e-3, atol=1e-2)
    assert np.abs(np.asarray(latent.x_T[0] - encode(model, photos, **FAST).x_T[0])).max() > 0.1


def test_the_steps_begin_where_the_network_knows_the_noise(model):
    """A decoder that predicts x_0, on the cosine schedule, whose abar is a squared cosine."""
    t = np.arange(1, 1001)
    abar = np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    first = int(np.flatnonzero(1 - abar >= 0.05**2)[0])
    assert default_steps(model) == f"from{first}:250" and default_steps(model, 20) == f"from{first}:20"
    epsilon = dataclasses.replace(model.decoder.record, process=Process(prediction="epsilon"))
    other = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, record=epsilon))
    assert default_steps(other) == "250"
    assert embed(model, [np.zeros((16, 16, 3), np.uint8)]).steps == f"from{first}:250"


def test_rows_of_latents():
    latent = Latent(jnp.arange(6.0).reshape(3, 2), jnp.arange(3.0).reshape(3, 1, 1, 1), "9", ("a", "b", "c"))
    some = latent[1:]
    assert some.captions == ("b", "c") and some.image_embedding.tolist() == [[2, 3], [4, 5]] and some.steps == "9"
    both = concatenate(some, latent[[0]])
    bare = dataclasses.replace(latent, x_T=None, captions=None)
    assert len(concatenate(bare, bare[:1])) == 4 and concatenate(bare, bare[:1]).x_T is None
    assert both.captions == ("b", "c", "a") and both.x_T.ravel().tolist() == [1, 2, 0]
    assert len(jax.tree.leaves(latent)) == 2
    assert [batch.tolist() for batch in whole_batches(5, 3)] == [[0, 1, 2], [3, 4, 0]]
    assert [batch.tolist() for batch in whole_batches(1, 3)] == [[0, 0, 0]]


def test_noise_given_to_generate(model, latent):
    settings = {"decoder": {"sampler": "ddim", "steps": "4", "guidance_scale": 1.0}, "return_stages": True}
    given = {"image_embeddings": latent.image_embedding, **settings}
    drawn = model.generate(KEY, None, x_T=latent.x_T, **given)
    direct = model.decode(KEY, latent.image_embedding, x_T=latent.x_T, **settings["decoder"])
    np.testing.assert_array_equal(drawn.decoded, np.clip(np.round((np.asarray(direct) + 1) * 127.5), 0, 255))
    np.testing.assert_array_equal(
        drawn.decoded, model.generate(jax.random.key(9), None, x_T=latent.x_T, **given).decoded
    )
    parts = model.generate(KEY, None, x_T=latent.x_T, batch_size=1, **given)
    assert np.abs(parts.decoded.astype(int) - drawn.decoded).max() <= 1
    with pytest.raises(InputError, match=r"x_T has the shape \[1, 8, 8, 3\]; .* 2 images from noise of .*\[2, 8, 8, 3"):
        model.generate(KEY, None, x_T=latent.x_T[:1], **given)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"images": []}, "there is no image; give at least one"),
        ({"images": [np.zeros((1, 1, 3), np.uint8)]}, "image 1 has 1 x 1 pixels; give one of at least 8 x 8"),
        ({"images": [np.zeros((64, 7, 3), np.uint8)]}, "image 1 has 7 x 64 pixels"),
        ({"images": [np.zeros((16, 16, 3))]}, r"image 1 is float64 \[16, 16, 3\]; images are uint8"),
        ({"images": [np.zeros((16, 16, 2), np.uint8)]}, r"image 1 is uint8 \[16, 16, 2\]"),
        ({"captions": ["one"] * 3}, "3 captions were given for 2 images; give one an image, or none"),
        ({"refinements": -1}, "refinements is -1; it must be 0 or more"),
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"steps": "2000"}, "2000"),
    ],
)
def test_what_cannot_be_encoded_is_refused(model, photos, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        encode(model, **{"images": photos, "steps": "3", "batch_size": 2, **arguments})


def test_runs_without_a_latent(model, latent):
    for stage in ("clip", "decoder"):
        with pytest.raises(InputError, match=f"this run has no {stage}"):
            encode(dataclasses.replace(model, **{stage: None}), [np.zeros((16, 16, 3), np.uint8)])
    blind = dataclasses.replace(model.decoder, module=model.decoder.module.clone(reads_image=False))
    with pytest.raises(InputError, match="decoder reads captions alone; a latent needs one that reads image"):
        reconstruct(dataclasses.replace(model, decoder=blind), KEY, latent)
    with pytest.raises(InputError, match="2 keys were given; give one, which all images share"):
        reconstruct(model, jax.random.split(KEY, 2), latent)
    with pytest.raises(InputError, match="eta is 1.5; it must lie in 0 to 1"):
        decode_latent(model, jax.random.split(KEY, 2), latent, eta=1.5)
