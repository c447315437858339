"""Between images: slerp against the plane rotation it is, and ends that are the reconstructions to the last bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.errors import InputError
from dalle2_jax.manipulate import Latent, interpolate, interpolate_grid, reconstruct, slerp
from tests.cascade import DECODER_SIZE, EMBEDDING

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def latent():
    z, x = jax.random.normal(KEY, (4, EMBEDDING)), jax.random.normal(KEY, (4, DECODER_SIZE, DECODER_SIZE, 3))
    return Latent(z / jnp.linalg.norm(z, axis=-1, keepdims=True), x, "3")


def test_slerp_turns_at_an_even_pace():
    """By an angle of theta times the whole in the plane of both; the length goes from the one to the other."""
    a, b = np.asarray([3.0, 0, 0], np.float32), np.asarray([0, 0.6, 0.8], np.float32) * 5
    for theta in (0.1, 0.5, 0.9):
        angle = theta * np.pi / 2
        expected = (np.cos(angle) * a / 3 + np.sin(angle) * b / 5) * (3 + 2 * theta)
        np.testing.assert_allclose(slerp(a, b, theta), expected, atol=1e-5)
    random = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    a, b = random / np.linalg.norm(random, axis=-1, keepdims=True)
    whole = np.arccos((a * b).sum(-1))
    between = np.asarray(slerp(a, b, jnp.linspace(0.2, 0.8, 5)))
    np.testing.assert_allclose(np.linalg.norm(between, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(np.arccos((a * between).sum(-1)), whole * np.linspace(0.2, 0.8, 5), atol=1e-4)


def test_slerp_ends_and_directions_that_are_one():
    a, b = np.random.default_rng(1).normal(size=(2, 9)).astype(np.float32)
    np.testing.assert_array_equal(slerp(a, b, 0.0), a)
    np.testing.assert_array_equal(slerp(a, b, 1.0), b)
    np.testing.assert_allclose(slerp(a, 3 * a, 0.5), 2 * a, rtol=1e-5)
    nudged = a + 1e-5 * b
    np.testing.assert_allclose(slerp(a, nudged, 0.5), (a + nudged) / 2, atol=1e-6)
    assert np.isfinite(slerp(a, -a, 0.3)).all() and (np.asarray(slerp(a * 0, a, 0.0)) == 0).all()


def test_the_ends_are_the_reconstructions(model, latent):
    two = latent[:2]
    series = interpolate(model, KEY, two, 5)
    assert series.labels == ("theta 0.00", "theta 0.25", "theta 0.50", "theta 0.75", "theta 1.00")
    np.testing.assert_array_equal(series.images[[0, -1]], reconstruct(model, KEY, two).images)
    middle = Latent(
        *(slerp(v[0].ravel(), v[1].ravel(), 0.5).reshape(v[:1].shape) for v in (two.image_embedding, two.x_T)), "3"
    )
    alone = reconstruct(model, KEY, middle).images[0]
    assert np.abs(series.images[2].astype(int) - alone).max() <= 1
    assert interpolate(model, KEY, two, [0.5]).images.shape[0] == 1


def test_a_grid_has_the_four_in_its_corners(model, latent):
    series = interpolate_grid(model, KEY, latent, rows=2, columns=3, batch_size=3)
    assert len(series) == 6 and series.columns == 3 and series.labels[5] == "down 1.00, right 1.00"
    np.testing.assert_array_equal(series.images[[0, 2, 3, 5]], reconstruct(model, KEY, latent, batch_size=3).images)
    top = interpolate(model, KEY, latent[:2], [0.5], batch_size=3).images[0]
    assert np.abs(series.images[1].astype(int) - top).max() <= 1


def test_one_noise_for_all(model, latent):
    series = interpolate(model, KEY, latent[:2], 3, noise="fixed")
    fixed = reconstruct(model, KEY, dataclasses.replace(latent[:2], x_T=None)).images
    np.testing.assert_array_equal(series.images[[0, 2]], fixed)
    assert (series.images[0] != reconstruct(model, KEY, latent[:2]).images[0]).any()


@pytest.mark.parametrize(
    ("rows", "thetas", "settings", "sentence"),
    [
        ([0], 5, {}, "1 images were given; this interpolation is of 2"),
        ([0, 1], [0, 1.5], {}, "theta is 1.5; it must lie in 0 to 1"),
        ([0, 1], [float("nan")], {}, "theta is nan; it must lie in 0 to 1"),
        ([0, 1], 1, {}, "1 thetas were asked for; an interpolation has 2 or more"),
        ([0, 1], [], {}, "thetas must be a list of at least one number"),
        ([0, 1], 5, {"noise": "none"}, "noise is 'none'; it must be interpolated or fixed"),
    ],
)
def test_what_cannot_be_interpolated_is_refused(model, latent, rows, thetas, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        interpolate(model, KEY, latent[rows], thetas, **settings)


def test_images_with_no_way_between(model, latent):
    opposite = dataclasses.replace(latent[:2], image_embedding=latent.image_embedding[:1] * jnp.asarray([[1.0], [-1]]))
    with pytest.raises(InputError, match="images 1 and 2 have opposite embeddings, between which there is no one way"):
        interpolate(model, KEY, opposite)
    with pytest.raises(InputError, match="captions cannot be interpolated"):
        interpolate(model, KEY, dataclasses.replace(latent[:2], captions=("a cross", "a circle")))
    with pytest.raises(InputError, match="3 images were given; this interpolation is of 4"):
        interpolate_grid(model, KEY, latent[:3])
    with pytest.raises(InputError, match="the grid has 1 rows and 5 columns; it needs 2 or more of each"):
        interpolate_grid(model, KEY, latent, rows=1)
