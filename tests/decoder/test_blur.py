"""The gaussian blur against a formula in numpy."""

import jax
import numpy as np
import pytest

from dalle2_jax.decoder import gaussian_blur


def _images(shape=(2, 5, 7, 3)):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("kernel_size, sigma", [(3, 0.6), (5, 1.3), (1, 0.6)])
def test_against_the_formula(kernel_size, sigma):
    images = _images()
    radius = kernel_size // 2
    expected = np.zeros(images.shape)
    for y in range(5):
        for x in range(7):
            total = 0.0
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    weight = np.exp(-(dy * dy + dx * dx) / (2 * sigma**2))
                    total += weight
                    expected[:, y, x] += weight * images[:, np.clip(y + dy, 0, 4), np.clip(x + dx, 0, 6)]
            expected[:, y, x] /= total
    np.testing.assert_allclose(gaussian_blur(images, sigma, kernel_size), expected, atol=1e-6)


def test_keeps_constants_and_sums():
    constant = np.full((1, 4, 4, 3), 0.7, np.float32)
    np.testing.assert_allclose(gaussian_blur(constant, 0.6), constant, atol=1e-6)
    inner = np.zeros((1, 9, 9, 1), np.float32)
    inner[0, 3:6, 3:6] = _images((3, 3, 1))
    np.testing.assert_allclose(gaussian_blur(inner, 1.0, 5).sum(), inner.sum(), atol=1e-5)


def test_sigma_may_be_traced():
    images = _images()
    blurred = jax.jit(gaussian_blur)(images, 0.6)
    np.testing.assert_allclose(blurred, gaussian_blur(images, 0.6), atol=1e-6)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: gaussian_blur(_images(), 0.6, 4), "kernel_size must be odd"),
        (lambda: gaussian_blur(_images(), 0.0), "sigma must be positive"),
        (lambda: gaussian_blur(_images()[0], 0.6), "wants images"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
