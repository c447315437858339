"""Images between uint8 and [-1, 1], and from one size to another, against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.layers.pixels import resize, to_float, to_uint8


def test_every_level_comes_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    inside = to_float(levels)
    assert inside.dtype == jnp.float32
    np.testing.assert_allclose(inside, levels.astype(np.float64) / 127.5 - 1, atol=1e-6)
    assert (float(inside.min()), float(inside.max())) == (-1.0, 1.0)
    back = to_uint8(inside)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, levels)


def test_rounded_and_clipped():
    values = np.array([-3.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1.0, 7.0], np.float32)
    np.testing.assert_array_equal(to_uint8(values), [0, 0, 0, 1, 255, 255])
    floats = np.array([-0.25, 2.0], np.float32)
    np.testing.assert_array_equal(to_float(floats), floats)
    assert to_float(floats.astype(jnp.bfloat16)).dtype == jnp.float32


def test_shrinking_by_a_whole_factor_is_the_mean_of_each_cell():
    images = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    expected = np.empty((2, 4, 4, 3))
    for row in range(4):
        for column in range(4):
            expected[:, row, column] = images[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].mean((1, 2))
    np.testing.assert_allclose(resize(images, 4), expected, atol=1e-6)
    assert resize(images, 12) is images


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -1/2."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1 - np.abs(x))


def weights(old: int, new: int, kernel) -> np.ndarray:
    """[new, old]: pixel centres at halves, the kernel stretched when it shrinks, rows that sum to one."""
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale - 0.5
    matrix = kernel((np.arange(old)[None] - centres[:, None]) / max(scale, 1.0))
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("method", "old", "new", "kernel"),
    [("area", 4, 8, cubic), ("area", 6, 4, cubic), ("cubic", 8, 4, cubic), ("linear", 4, 6, triangle)],
)
def test_other_sizes_are_interpolated(method, old, new, kernel):
    images = np.random.default_rng(1).normal(size=(2, old, old, 3)).astype(np.float32)
    matrix = weights(old, new, kernel)
    expected = np.einsum("yi,xj,bijc->byxc", matrix, matrix, images)
    np.testing.assert_allclose(resize(images, new, method), expected, atol=1e-5)


def test_images_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="8x6; resize takes square ones"):
        resize(np.zeros((1, 8, 6, 3), np.float32), 4)
