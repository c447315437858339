"""CLIP's recipe: what its training does to images, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import shapes
from dalle2_jax.errors import InputError
from train.recipes.augment import random_grayscale, random_shift

RECIPE = shapes.system().stages["clip"]


def test_shifted_images_are_the_same_images_elsewhere():
    images = np.zeros((200, 8, 8, 1), np.float32)
    images[:, 4, 3] = 1
    moved = np.asarray(random_shift(jax.random.key(0), jnp.asarray(images), 2))
    assert moved.shape == images.shape and (moved.sum(axis=(1, 2, 3)) == 1).all()
    _, rows, columns, _ = np.nonzero(moved)
    assert set(zip((rows - 4).tolist(), (columns - 3).tolist(), strict=True)) == {
        (y, x) for y in range(-2, 3) for x in range(-2, 3)
    }


def test_the_border_is_repeated_behind_a_shifted_image():
    images = jnp.broadcast_to(jnp.arange(1.0, 5.0)[None, :, None, None], (50, 4, 4, 1))
    moved = np.asarray(random_shift(jax.random.key(1), images, 1))[:, :, 0, 0]
    assert {tuple(column) for column in moved.tolist()} == {(1, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 4)}


def test_gray_images_are_random_means_of_the_channels():
    count = 2000
    images = jax.random.uniform(jax.random.key(0), (count, 2, 2, 3), minval=-1)
    made, images = np.asarray(random_grayscale(jax.random.key(1), images, 0.3)), np.asarray(images)
    same = (made == images).all(axis=(1, 2, 3))
    assert abs((~same).mean() - 0.3) < 4 * np.sqrt(0.21 / count)
    gray = made[~same]
    assert (gray == gray[..., :1]).all()
    # One set of weights an image, that sum to one and differ from image to image.
    for before, after in zip(images[~same][:20], gray[:20], strict=True):
        weights = np.linalg.lstsq(before.reshape(4, 3), after[..., 0].reshape(4), rcond=None)[0]
        assert (weights > -1e-4).all() and abs(weights.sum() - 1) < 1e-3
        np.testing.assert_allclose(before.reshape(4, 3) @ weights, after[..., 0].reshape(4), atol=1e-5)
    assert np.std(gray[:, 0, 0, 0] - images[~same][:, 0, 0].mean(axis=-1)) > 0.1


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 1), (4, 4), (6, 4)])
def test_an_example_alone_is_nothing_to_contrast(batch, accumulation):
    """Its loss is 0 whatever the network says."""
    optimizer = dataclasses.replace(RECIPE.optimizer, accumulation=accumulation)
    with pytest.raises(InputError, match=f"clip.batch_size is {batch} in {accumulation} .* must have 2 examples"):
        dataclasses.replace(RECIPE, batch_size=batch, optimizer=optimizer)
    dataclasses.replace(RECIPE, batch_size=2 * accumulation, optimizer=optimizer)


@pytest.mark.parametrize("changes", [{"chunk": 0}, {"chunk": 3}, {"grayscale": 1.5}, {"grayscale": float("nan")}])
def test_fields_out_of_range(changes):
    ((name, _),) = changes.items()
    with pytest.raises(InputError, match=f"clip.{name} is"):
        dataclasses.replace(RECIPE, **changes)
