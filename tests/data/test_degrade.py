"""BSR degradation: each of its parts against what it should be, and the whole as training sees it."""

import numpy as np
import pytest

from dalle2_jax.data.degrade import (
    add_noise,
    blur_kernel,
    bsr,
    convolve,
    gaussian_kernel,
    jpeg,
    resize_without_smoothing,
)
from dalle2_jax.data.sources.captioned_shapes import configured, example
from dalle2_jax.data.sources.scene import draw
from tests.parity.reference import reference_path


@pytest.fixture(scope="module")
def image():
    return draw(example(configured("one_object"), "train", 3)[0], 256)


def test_the_whole(image):
    rng = np.random.default_rng(0)
    small = image.reshape(64, 4, 64, 4, 3).mean((1, 3))
    errors = []
    for _ in range(40):
        made = bsr(image, 4, rng)
        assert made.shape == (64, 64, 3) and made.dtype == np.uint8
        errors.append(np.sqrt(np.mean((made - small) ** 2)))
    # Worse than the clean small image, more or less so, and still that image.
    assert 2 < min(errors) < 12 < max(errors) < 60 and np.std(errors) > 2
    np.testing.assert_array_equal(bsr(image, 4, np.random.default_rng(1)), bsr(image, 4, np.random.default_rng(1)))
    assert bsr(image, 2, rng).shape == (128, 128, 3)


def test_kernels():
    rng = np.random.default_rng(0)
    for _ in range(50):
        kernel = blur_kernel(4, rng)
        assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] in range(7, 26, 2)
        assert kernel.sum() == pytest.approx(1) and (kernel >= 0).all()
    kernel = gaussian_kernel(25, np.array([6.0, 1.5]), np.pi / 6)
    rows, columns = np.mgrid[-12:13, -12:13]
    along = np.cos(np.pi / 6) * columns + np.sin(np.pi / 6) * rows
    across = -np.sin(np.pi / 6) * columns + np.cos(np.pi / 6) * rows
    assert (kernel * along**2).sum() == pytest.approx(6, rel=0.02)
    assert (kernel * across**2).sum() == pytest.approx(1.5, rel=0.02)


def test_convolution_mirrors_at_the_border():
    from scipy import ndimage

    rng = np.random.default_rng(0)
    image, kernel = rng.random((20, 17, 3)).astype(np.float32), gaussian_kernel(9, np.array([4.0, 2.0]), 0.7)
    expected = ndimage.convolve(image, kernel[..., None], mode="mirror")
    np.testing.assert_allclose(convolve(image, kernel), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "cubic", "area"])
@pytest.mark.parametrize("size", [(11, 7), (32, 24), (45, 50), (16, 12)])
def test_sizes_change_as_opencv_changes_them(method, size):
    with np.load(reference_path("resize")) as file:
        image, expected = file["image"], file[f"{method}/{size[0]}x{size[1]}"]
    found = resize_without_smoothing(image, size, method)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_noise():
    gray = np.full((64, 64, 3), 0.5, np.float32)
    kinds = set()
    for seed in range(30):
        noise = add_noise(gray, np.random.default_rng(seed)) - 0.5
        assert 1 / 255 < noise.std() < 27 / 255
        correlation = np.corrcoef(noise.reshape(-1, 3).T)[0, 1]
        kinds.add("gray" if correlation > 0.999 else "apart" if abs(correlation) < 0.1 else "mixed")
    assert kinds == {"gray", "apart", "mixed"}


def test_jpeg_is_worse_the_lower_its_quality(image):
    pixels = image.astype(np.float32) / 255
    errors = [np.abs(jpeg(pixels, quality) - pixels).mean() for quality in (95, 60, 30)]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.05


@pytest.mark.parametrize("shape", [(255, 256, 3), (24, 24, 3), (64, 64, 4), (64, 64)])
def test_other_images_are_refused(shape):
    with pytest.raises(ValueError, match="cannot be made 4 times smaller"):
        bsr(np.zeros(shape, np.uint8), 4, np.random.default_rng(0))
