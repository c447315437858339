"""The Fréchet distance against closed forms and SciPy's matrix root; sharpness against sums by hand."""

import numpy as np
import pytest
import scipy.linalg

from dalle2_jax.errors import InputError
from dalle2_jax.evaluation.metrics.frechet import frechet_distance
from dalle2_jax.evaluation.metrics.sharpness import sharpness


def test_against_scipys_root_of_the_product():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)) + 0.3
    b = rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5))
    own, other = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(own @ other).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(own + other - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a.astype(np.float32), a.astype(np.float32)) == pytest.approx(0, abs=1e-9)


def test_in_one_dimension_and_with_fewer_features_than_dimensions():
    """(m - m')^2 + (s - s')^2; and a shift of the same features by v, of which the distance is |v|^2."""
    a, b = np.array([[0.0], [2.0]]), np.array([[5.0], [5.5]])
    expected = (1.0 - 5.25) ** 2 + (np.sqrt(2.0) - np.sqrt(0.125)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    few, shift = np.random.default_rng(1).normal(size=(4, 10)), np.linspace(0, 1, 10)
    assert frechet_distance(few, few + shift) == pytest.approx(np.sum(shift**2), rel=1e-6)
    with pytest.raises(InputError, match="of 1 and 4 images"):
        frechet_distance(few[:1], few)
    with pytest.raises(InputError, match="not of one size"):
        frechet_distance(few, few[:, :3])


def test_sharpness_by_hand():
    """One white pixel on black: the Laplacian is 1 there and -1/4 at its four neighbours; a ramp has none."""
    images = np.zeros((1, 7, 7, 1), np.uint8)
    images[0, 3, 3] = 255
    assert sharpness(images) == pytest.approx((1 + 4 / 16) / 25)
    ramp = np.broadcast_to(np.arange(9, dtype=np.uint8)[:, None, None] * 20, (9, 9, 3))
    assert sharpness(ramp[None]) == pytest.approx(0, abs=1e-12)
