"""The upsampler: sizes it never trained on, what it sees of the small image, and aligned crops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.decoder import Upsampler, random_crop
from dalle2_jax.layers.unet import UNet

MODEL = Upsampler(
    UNet(
        image_size=8,
        out_channels=3,
        channels=8,
        channel_multipliers=(1, 2),
        depth=1,
        attention_resolutions=(),
        middle_attention=False,
        groups=4,
    )
)


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    x_t = random.normal(size=(2, 8, 8, 3)).astype(np.float32)
    return x_t, np.array([5, 900], np.int32), random.uniform(-1, 1, (2, 2, 2, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params(inputs):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), *inputs)["params"]
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def test_other_sizes_than_it_trained_on(params, inputs):
    x_t, timesteps, low = inputs
    large = np.tile(x_t, (1, 2, 3, 1)), timesteps, np.tile(low, (1, 2, 3, 1))
    assert jax.jit(MODEL.apply)({"params": params}, *large).shape == (2, 16, 24, 3)


def test_small_image_and_examples(params, inputs):
    x_t, timesteps, low = inputs
    apply = jax.jit(MODEL.apply)
    before = np.asarray(apply({"params": params}, x_t, timesteps, low))
    changed = low.copy()
    changed[1] += 0.5
    after = np.asarray(apply({"params": params}, x_t, timesteps, changed))
    assert np.abs(after[1] - before[1]).max() > 1e-3
    np.testing.assert_allclose(after[0], before[0], atol=1e-5)


def test_is_the_network_on_six_channels(params, inputs):
    x_t, timesteps, low = inputs
    resized = np.asarray(MODEL.resize_input(low, (8, 8)))
    # Bilinear, pixel centres at (i + 0.5) / 4 - 0.5, the border repeated: one row of four columns by hand.
    left, right = low[:, 0, 0], low[:, 0, 1]
    np.testing.assert_allclose(resized[:, 0, 1], left, atol=1e-6)
    np.testing.assert_allclose(resized[:, 0, 2], 0.875 * left + 0.125 * right, atol=1e-6)
    np.testing.assert_allclose(resized[:, 0, 4], 0.375 * left + 0.625 * right, atol=1e-6)
    six = np.concatenate([x_t, resized], axis=-1)
    direct = jax.jit(MODEL.unet.apply)({"params": params["unet"]}, six, timesteps)
    np.testing.assert_allclose(jax.jit(MODEL.apply)({"params": params}, *inputs), direct, atol=1e-5)


def test_crops_are_aligned_random_and_cover_the_image():
    rows, columns = np.mgrid[:4, :6]
    low = np.broadcast_to(np.stack([rows, columns], -1), (64, 4, 6, 2)).astype(np.uint8)
    image = low.repeat(4, axis=1).repeat(4, axis=2)
    crop = jax.jit(random_crop, static_argnames="size")
    large, small = crop(jax.random.key(0), image, low, size=8)
    assert large.shape == (64, 8, 8, 2) and small.shape == (64, 2, 2, 2) and large.dtype == small.dtype == jnp.uint8
    np.testing.assert_array_equal(large, np.asarray(small).repeat(4, axis=1).repeat(4, axis=2))
    corners = {tuple(int(i) for i in corner) for corner in np.asarray(small)[:, 0, 0]}
    assert corners == {(y, x) for y in range(3) for x in range(5)}
    again, _ = crop(jax.random.key(0), image, low, size=8)
    np.testing.assert_array_equal(again, large)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x, t, low: MODEL.clone(resize="sharp").init(jax.random.key(0), x, t, low), "resize must be one of"),
        (lambda x, t, low: MODEL.init(jax.random.key(0), x, t, low[:1]), "low_resolution must be"),
        (lambda x, t, low: MODEL.init(jax.random.key(0), x[:, :7], t, low), "7x8 does not divide by 2"),
        (lambda x, t, low: random_crop(jax.random.key(0), x, low, 6), "multiple of 4"),
        (lambda x, t, low: random_crop(jax.random.key(0), x, low, 12), "at most 8"),
        (lambda x, t, low: random_crop(jax.random.key(0), x[:, :7], low, 4), "one whole number"),
    ],
)
def test_refusals(inputs, call, words):
    with pytest.raises(ValueError, match=words):
        call(*inputs)
