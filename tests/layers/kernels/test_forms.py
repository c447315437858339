"""What networks compute as traced for an NVIDIA GPU, run on a CPU in float32, against their plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.layers.convolution import GroupNorm
from dalle2_jax.layers.kernels.group_norm import group_norm
from dalle2_jax.layers.transformer import Transformer
from dalle2_jax.layers.unet import UNet
from tests.lowering import DEVICES, traced_for


def _random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def both(function, *arguments):
    """Values and gradients by all arguments, plain and as for the GPU."""
    gradient = jax.value_and_grad(function, argnums=tuple(range(len(arguments))))
    plain = jax.jit(gradient)(*arguments)
    with traced_for(DEVICES["cuda"]):
        other = jax.jit(gradient)(*arguments)
    return jax.tree.leaves(plain), jax.tree.leaves(other)


def same(function, *arguments):
    for plain, other in zip(*both(function, *arguments), strict=True):
        np.testing.assert_allclose(other, plain, rtol=1e-4, atol=2e-5 * max(1.0, np.abs(plain).max()))


def _normal_params(module, *inputs):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [0.3 * _random(i, *leaf.shape) for i, leaf in enumerate(leaves)])


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(("is_causal", "last_only"), [(True, True), (True, False), (False, False)])
def test_a_transformer_under_a_mask_with_holes(is_causal, last_only, scan_layers):
    module = Transformer(width=16, depth=3, heads=2, is_causal=is_causal, last_only=last_only, scan_layers=scan_layers)
    x = _random(0, 2, 6, 16)
    mask = np.array([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]], bool)
    read = np.ones((2, 1, 1), np.float32) if last_only else mask[:, :, None].astype(np.float32)
    params = _normal_params(module, x, mask)
    same(lambda params, x: ((module.apply({"params": params}, x, mask) * read) ** 2).sum(), params, x)


def test_a_unet_with_masked_context():
    module = UNet(
        image_size=8,
        channels=8,
        channel_multipliers=(1,),
        depth=1,
        attention_resolutions=(8,),
        head_channels=8,
        groups=4,
    )
    x, context, timesteps = _random(0, 2, 8, 8, 3), _random(1, 2, 5, 6), np.array([3, 700])
    mask = np.array([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], bool)
    params = _normal_params(module, x, timesteps, None, context, mask)

    def loss(params, x, context):
        return (module.apply({"params": params}, x, timesteps, None, context, mask) ** 2).mean()

    same(loss, params, x, context)


@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_far_from_zero(silu):
    """Channels with means of a thousand deviations: the variance in one pass keeps its digits."""
    module = GroupNorm(groups=4)
    x = _random(0, 2, 6, 6, 16) + 20 * _random(1, 16)
    scale, shift, weights = _random(2, 2, 16), _random(3, 2, 16), _random(4, *x.shape)
    params = {"scale": 1 + 0.3 * _random(5, 16), "bias": _random(6, 16)}

    def loss(params, x, scale, shift):
        return (module.apply({"params": params}, x, scale, shift, silu=silu) * weights).sum()

    same(loss, params, x, scale, shift)


def test_group_norm_against_float64():
    x = _random(0, 2, 5, 7, 12).astype(np.float64) + 1000
    gain, bias = 1 + _random(1, 2, 12).astype(np.float64), _random(2, 2, 12).astype(np.float64)
    groups = x.reshape(2, 35, 3, 4)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    normalised = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
    y = normalised * gain[:, None, None] + bias[:, None, None]
    found = group_norm(*(value.astype(np.float32) for value in (x, gain, bias)), 3, 1e-5, True, jnp.float32)
    np.testing.assert_allclose(found, y / (1 + np.exp(-y)), atol=2e-3)  # x itself is rounded at 6e-5
    half = group_norm(*(value.astype(np.float32) for value in (x, gain, bias)), 3, 1e-5, True, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
