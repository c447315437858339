"""Variations, text diffs and PCA probes: which latents they decode, by formulas of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import DALLE2
from dalle2_jax.data.dataset import open_source
from dalle2_jax.errors import InputError
from dalle2_jax.manipulate import Latent, edit, pca_of_run, probe, reconstruct, vary
from dalle2_jax.manipulate.edit import text_diff, turned
from dalle2_jax.manipulate.probe import default_dimensions, restored
from tests.cascade import DECODER_SIZE, EMBEDDING, FINAL_SIZE

KEY = jax.random.key(6)
RED, BLUE = "a small red circle", "a small blue circle"
IMAGES = [np.random.default_rng(2).integers(0, 256, (16, 16, 3), np.uint8) for _ in range(2)]


@pytest.fixture(scope="module")
def latent():
    z, x = jax.random.normal(KEY, (2, EMBEDDING)), jax.random.normal(KEY, (2, DECODER_SIZE, DECODER_SIZE, 3))
    return Latent(z / jnp.linalg.norm(z, axis=-1, keepdims=True), x, "3")


@pytest.fixture
def decoded(monkeypatch):
    """What `generate` is asked for, in place of sampling: images of the first entry of each embedding."""
    calls = []

    def generate(self, keys, captions, **settings):
        calls.append({"keys": keys, "captions": captions, **settings})
        values = np.asarray(settings["image_embeddings"])[:, 0]
        return np.broadcast_to(np.uint8(127 * (1 + values))[:, None, None, None], (len(values), 4, 4, 3))

    monkeypatch.setattr(DALLE2, "generate", generate)
    return calls


def test_variations_share_content_or_semantics(model, latent, decoded):
    series = vary(model, KEY, latent, 3)
    assert series.labels[:4] == (*(f"image 1, variation {number}" for number in (1, 2, 3)), "image 2, variation 1")
    assert series.images.shape[0] == 6 and series.columns == 3
    vary(model, KEY, latent, 3, share="semantics")
    content, semantics = decoded
    for call in decoded:
        np.testing.assert_array_equal(call["image_embeddings"][:6], np.repeat(latent.image_embedding, 3, axis=0))
        assert len({tuple(key) for key in np.asarray(jax.random.key_data(call["keys"]))[:6].tolist()}) == 6
        assert call["decoder"] | {"eta": 0} == {"sampler": "ddim", "steps": "3", "eta": 0, "guidance_scale": 1.0}
    np.testing.assert_array_equal(content["x_T"][:6], np.repeat(latent.x_T, 3, axis=0))
    assert content["decoder"]["eta"] > 0 and semantics["decoder"]["eta"] == 0 and semantics["x_T"] is None
    vary(model, KEY, dataclasses.replace(latent, captions=(RED, BLUE)), 2, eta=0.3)
    assert decoded[2]["captions"][:4] == [RED, RED, BLUE, BLUE] and decoded[2]["decoder"]["eta"] == 0.3


def test_variations_differ_from_the_image_and_each_other(model, latent):
    images = vary(model, KEY, latent[:1], 2).images
    assert images.shape == (2, FINAL_SIZE, FINAL_SIZE, 3) and (images[0] != images[1]).any()
    assert (images[0] != reconstruct(model, KEY, latent[:1]).images[0]).any()


def test_a_text_diff_is_the_direction_between_captions(model):
    z = np.asarray(model.encode_text([BLUE, RED]).embedding, np.float64)
    difference = (z[0] - z[1]) / np.linalg.norm(z[0] - z[1])
    np.testing.assert_allclose(text_diff(model, [BLUE], [RED])[0], difference, atol=1e-3)
    np.testing.assert_allclose(text_diff(model, [BLUE])[0], z[0] / np.linalg.norm(z[0]), atol=1e-5)


def test_edits_turn_the_embedding_alone(model, latent, decoded):
    series = edit(model, KEY, latent, [BLUE, RED], [RED, BLUE], [0.0, 0.25, 0.5])
    call = decoded[0]
    direction = np.asarray(text_diff(model, [BLUE, RED], [RED, BLUE]))
    z = np.asarray(call["image_embeddings"])[:6].reshape(2, 3, -1)
    np.testing.assert_array_equal(z[:, 0], latent.image_embedding)
    for row in range(2):
        start = np.asarray(latent.image_embedding[row])
        whole = np.arccos(start @ direction[row])
        np.testing.assert_allclose(np.arccos(z[row, 1:] @ start), whole * np.asarray([0.25, 0.5]), atol=1e-3)
        np.testing.assert_allclose(np.arccos(z[row, 1:] @ direction[row]), whole * np.asarray([0.75, 0.5]), atol=1e-3)
    np.testing.assert_array_equal(call["x_T"][:6], np.repeat(latent.x_T, 3, axis=0))
    assert call["captions"] is None and call["decoder"]["eta"] == 0 and series.columns == 3
    assert series.labels[1] == f"{BLUE}, theta 0.25" and series.labels[5] == f"{RED}, theta 0.50"
    assert len(edit(model, KEY, latent[:1], BLUE)) == 5


def test_embeddings_keep_their_norm():
    """Karlo's CLIP leaves them as they are; z_d has unit norm all the same."""
    z, direction = np.asarray([[0.0, 20.0]], np.float32), np.asarray([[1.0, 0.0]], np.float32)
    half = np.asarray(turned(z, direction, jnp.asarray([0.5])))
    np.testing.assert_allclose(half, [[20 / np.sqrt(2), 20 / np.sqrt(2)]], rtol=1e-5)


@pytest.mark.parametrize(
    ("to", "settings", "sentence"),
    [
        ([BLUE], {}, "1 captions were given for 2 images; give one for all, or one each"),
        (BLUE, {"origin": [RED] * 3}, "3 captions were given for 2 images"),
        (BLUE, {"thetas": [0.2, -0.1]}, "theta is -0.1; it must lie in 0 to 1"),
        (BLUE, {"origin": BLUE}, f"the image is to become '{BLUE}', which it is said to be already"),
        ("  ", {}, "the prompt is empty"),
    ],
)
def test_edits_that_cannot_be_are_refused(model, latent, to, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        edit(model, KEY, latent, to, **settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"share": "nothing"}, "share is 'nothing'; it must be content or semantics"),
        ({"count": 0}, "count is 0; it must be 1 or more"),
        ({"eta": 0.0}, "eta is 0, at which all variations that share content are the reconstruction"),
        ({"eta": 1.1}, "eta is 1.1; it must lie in 0 to 1"),
    ],
)
def test_variations_that_cannot_be_are_refused(model, latent, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        vary(model, KEY, latent, **settings)


def test_components_of_the_runs_own_images(model, tiny):
    pca = pca_of_run(model, 40)
    data = tiny.system.data
    source = open_source(data, data.train_split)
    chosen = source.examples(np.linspace(0, len(source) - 1, 40).astype(int))[0]
    embeddings = np.asarray(pca_of_run(model, images=list(chosen)).components)
    np.testing.assert_allclose(pca.components, embeddings, atol=1e-6)
    assert len(pca) == EMBEDDING
    assert len(pca_of_run(model, 5)) == 4 and len(pca_of_run(model, 5, components=3)) == 3
    with pytest.raises(InputError, match="6 principal components need more than 6 embeddings; there are 5"):
        pca_of_run(model, 5, components=6)
    with pytest.raises(InputError, match="9 principal components were asked for of embeddings of size 8"):
        pca_of_run(model, 20, components=9)
    with pytest.raises(InputError, match="count is 1; principal components need 2 images"):
        pca_of_run(model, 1)


def test_probes_keep_the_first_components(model, decoded):
    pca = pca_of_run(model, images=[np.roll(image, turn, axis=0) for image in IMAGES for turn in range(8)])
    series = probe(model, KEY, IMAGES, pca, (2, 8))
    assert series.labels == ("2 of 8 dimensions", "8 of 8 dimensions") * 2 and series.columns == 2
    call = decoded[0]
    true = np.asarray(model.encode_image(np.stack(IMAGES)), np.float64)
    z = np.asarray(call["image_embeddings"], np.float64)[:4].reshape(2, 2, -1)
    np.testing.assert_allclose(z[:, 1], true, atol=1e-4)
    basis, mean = np.asarray(pca.components[:2], np.float64), np.asarray(pca.mean, np.float64)
    kept = mean + (true - mean) @ basis.T @ basis
    np.testing.assert_allclose(z[:, 0], kept / np.linalg.norm(kept, axis=-1, keepdims=True), atol=1e-4)
    assert call["x_T"] is None and len({*np.asarray(jax.random.key_data(call["keys"]))[:, 1].tolist()}) == 1
    loose = dataclasses.replace(model.clip, module=model.clip.module.clone(unit_norm=False))
    as_they_are = restored(dataclasses.replace(model, clip=loose), pca.first(2), jnp.asarray(true, jnp.float32))
    np.testing.assert_allclose(as_they_are, kept, atol=1e-4)
    with pytest.raises(InputError, match="9 dimensions were asked for; there are 8 principal components"):
        probe(model, KEY, IMAGES, pca, (2, 9))
    with pytest.raises(InputError, match="there is no number of dimensions"):
        probe(model, KEY, IMAGES, pca, ())


def test_the_papers_dimensions_or_their_share():
    paper = (20, 30, 40, 80, 120, 160, 200, 320)
    assert default_dimensions(320) == default_dimensions(1024) == paper
    assert default_dimensions(160) == (10, 15, 20, 40, 60, 80, 100, 160)
    assert default_dimensions(3) == (1, 2, 3) and default_dimensions(1) == (1,)
