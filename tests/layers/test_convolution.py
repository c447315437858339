"""Group norm, resampling and the residual block against plain numpy."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.layers.convolution import (
    Conv,
    GroupNorm,
    Resample,
    ResBlock,
    depth_to_space,
    downsample,
    space_to_depth,
    upsample,
)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(0.5, 2.0, (2, 4, 6, 8)).astype(np.float32)


def _draw(module, *inputs):
    """Random numpy parameters; norms, biases and what starts at zero included."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def _init(module, *inputs):
    return jax.jit(module.init)(jax.random.key(0), *inputs)["params"]


def _apply(module, params, *inputs):
    return np.asarray(jax.jit(module.apply)({"params": params}, *inputs))


def _group_norm(x, groups, params, scale=0.0, shift=0.0):
    batch, height, width, channels = x.shape
    out = np.empty(x.shape)
    size = channels // groups
    for b in range(batch):
        for g in range(groups):
            part = x[b, :, :, g * size : (g + 1) * size].astype(np.float64)
            out[b, :, :, g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    return (out * params["scale"] + params["bias"]) * (1 + scale) + shift


def _conv(x, params):
    """A 3x3 convolution with a border of zeros, one tap at a time."""
    kernel, (_, height, width, _) = params["kernel"], x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)]
    return sum(taps) + params["bias"]


def _silu(x):
    return x / (1 + np.exp(-x))


def test_group_norm(x):
    norm = GroupNorm(groups=4)
    params = _draw(norm, x)
    np.testing.assert_allclose(_apply(norm, params, x), _group_norm(x, 4, params), atol=2e-5)

    random = np.random.default_rng(2)
    scale, shift = random.normal(size=(2, 2, 8)).astype(np.float32)
    ours = _apply(norm, params, x, scale, shift)
    np.testing.assert_allclose(ours, _group_norm(x, 4, params, scale[:, None, None], shift[:, None, None]), atol=2e-5)


def test_group_norm_is_stable_far_from_zero(x):
    norm = GroupNorm(groups=4)
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    far = x + np.float32(4096)
    np.testing.assert_allclose(_apply(norm, params, far), _group_norm(far, 4, params), atol=1e-3)


def test_group_norm_of_bfloat16_is_float32(x):
    norm = GroupNorm(groups=4)
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    rounded = jnp.asarray(x, jnp.bfloat16)
    ours = _apply(norm, params, rounded)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, _group_norm(np.asarray(rounded, np.float32), 4, params), atol=2e-5)


def test_resampling_by_two(x):
    np.testing.assert_array_equal(upsample(x), x.repeat(2, axis=1).repeat(2, axis=2))
    means = (x[:, ::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2] + x[:, 1::2, 1::2]) / 4
    np.testing.assert_allclose(downsample(x), means, atol=1e-6)


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_res_block(x, scale_shift, resample):
    block = ResBlock(channels=12, groups=4, scale_shift=scale_shift, resample=resample)
    embedding = np.random.default_rng(3).normal(size=(2, 5)).astype(np.float32)
    params = _draw(block, x, embedding)

    change = {None: lambda h: h, "up": upsample, "down": downsample}[resample]
    h = change(_silu(_group_norm(x, 4, params["norm_1"])).astype(np.float32))
    h = _conv(np.asarray(h), params["conv_1"])
    time = _silu(embedding) @ params["time"]["kernel"] + params["time"]["bias"]
    if scale_shift:
        h = _group_norm(h, 4, params["norm_2"], time[:, None, None, :12], time[:, None, None, 12:])
    else:
        h = _group_norm(h + time[:, None, None], 4, params["norm_2"])
    expected = np.asarray(change(x)) @ params["skip"]["kernel"][0, 0] + params["skip"]["bias"]
    expected = expected + _conv(_silu(h), params["conv_2"])
    np.testing.assert_allclose(_apply(block, params, x, embedding), expected, atol=1e-4)


def test_res_block_keeps_its_input_where_the_channels_agree(x):
    block = ResBlock(channels=8, groups=4)
    embedding = np.ones((2, 5), np.float32)
    params = _init(block, x, embedding)
    assert "skip" not in params
    np.testing.assert_allclose(_apply(block, params, x, embedding), x, atol=1e-6)


def test_dropout_needs_a_key_and_changes_the_result(x):
    block = ResBlock(channels=8, groups=4, dropout=0.5)
    embedding = np.ones((2, 5), np.float32)
    params = _draw(block, x, embedding)
    apply = jax.jit(block.apply, static_argnums=3)
    first, second, still = (
        np.asarray(apply({"params": params}, x, embedding, deterministic, rngs={"dropout": jax.random.key(key)}))
        for deterministic, key in ((False, 0), (False, 1), (True, 0))
    )
    assert np.abs(first - second).max() > 0.01 and np.abs(first - still).max() > 0.01
    np.testing.assert_allclose(still, _apply(block, params, x, embedding), atol=1e-6)


def test_plain_resampling_pads_one_pixel_on_every_side(x):
    layer = Resample(channels=8, direction="down")
    params = _draw(layer, x)
    np.testing.assert_allclose(_apply(layer, params, x), _conv(x, params["conv"])[:, ::2, ::2], atol=1e-4)
    # "after": the kernel's centre is one to the right and one down.
    layer = Resample(channels=8, direction="down", padding="after")
    np.testing.assert_allclose(_apply(layer, params, x), _conv(x, params["conv"])[:, 1::2, 1::2], atol=1e-4)
    layer = Resample(channels=8, direction="up")
    expected = _conv(np.asarray(upsample(x)), params["conv"])
    np.testing.assert_allclose(_apply(layer, params, x), expected, atol=1e-4)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: GroupNorm(groups=3).init(jax.random.key(0), x), "8 channels do not divide into 3 groups"),
        (lambda x: downsample(x[:, :3]), "3x6 cannot be halved"),
        (lambda x: ResBlock(8, 4, resample="sideways").init(jax.random.key(0), x, x[:, 0, 0]), "'sideways'"),
        (lambda x: Resample(8, "sideways").init(jax.random.key(0), x), "'sideways'"),
        (lambda x: Resample(8, "down", padding="same").init(jax.random.key(0), x), "both or after, not 'same'"),
    ],
)
def test_refusals(x, call, words):
    with pytest.raises(ValueError, match=words):
        call(x)


def test_fold_moves_squares_of_pixels_into_channels_and_unfold_brings_them_back():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3).astype(np.float32)
    folded = np.asarray(space_to_depth(x, 2))
    assert folded.shape == (2, 2, 3, 12)
    for row in range(2):
        for column in range(3):
            square = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(folded[:, row, column], square.reshape(2, -1))
    np.testing.assert_array_equal(depth_to_space(folded, 2), x)
    np.testing.assert_array_equal(space_to_depth(x, 1), x)
    np.testing.assert_array_equal(depth_to_space(x, 1), x)


def _has_convolutions(function, platform, *arguments):
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    return "stablehlo.convolution" in lowered.as_text()


@pytest.mark.parametrize(
    ("size", "features", "options", "products"),
    [
        (1, 5, {}, {"cpu", "tpu"}),
        (3, 24, {}, {"cpu"}),
        (3, 24, {"padding": 1}, {"cpu"}),
        (3, 5, {}, set()),
        (3, 24, {"strides": 2, "padding": 1}, set()),
        (3, 24, {"padding": 0}, set()),
    ],
)
def test_convolution_as_a_product_is_the_convolution(x, size, features, options, products):
    ours = Conv(features, (size, size), **options)
    theirs = flax.linen.Conv(features, (size, size), **options)
    params = _draw(ours, x)

    def scalar(module):
        return lambda params, x: jnp.sum(jnp.sin(module.apply({"params": params}, x)))

    for platform in ("cpu", "tpu"):
        assert _has_convolutions(scalar(theirs), platform, params, x)
        assert _has_convolutions(scalar(ours), platform, params, x) is (platform not in products)
    results = [jax.jit(jax.value_and_grad(scalar(module), (0, 1)))(params, x) for module in (ours, theirs)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)
