"""Attention against a plain numpy formula in float64, and the choice of the kernel."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.layers import attention
from dalle2_jax.layers.attention import (
    MultiHeadAttention,
    attention_weights,
    dot_product_attention,
    flash_attention,
    last_of,
    pack,
)


def _expected(query, key, value, mask):
    logits = np.einsum("bqhd,bkhd->bhqk", query, key, dtype=np.float64) / np.sqrt(query.shape[-1])
    logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, value)


def _random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_against_numpy(is_causal, padded):
    query, key, value = _random(2, 6, 3, 8), _random(2, 6, 3, 8) + 1, _random(2, 6, 3, 8) - 1
    mask = np.ones((2, 1, 1, 6), bool)
    if padded:
        mask[1, ..., 4:] = False
    full = np.broadcast_to(mask, (2, 3, 6, 6))
    if is_causal:
        full = full & np.tril(np.ones((6, 6), bool))
    result = dot_product_attention(query, key, value, mask=mask if padded else None, is_causal=is_causal)
    np.testing.assert_allclose(result, _expected(query, key, value, full), atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_in_float32_are_those_of_jax(is_causal):
    arguments = [_random(2, 6, 3, 8), _random(2, 6, 3, 8) + 1, _random(2, 6, 3, 8) - 1]
    mask = np.ones((2, 1, 1, 6), bool)
    mask[1, ..., 4:] = False

    def gradients(function):
        return jax.grad(lambda x: jnp.sum(jnp.sin(function(*x, mask=mask, is_causal=is_causal))))(arguments)

    expected = gradients(jax.nn.dot_product_attention)
    for ours, theirs in zip(gradients(dot_product_attention), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_large_logits_stay_finite():
    x = 1000 * _random(1, 4, 1, 8)
    values, gradients = jax.value_and_grad(lambda q: dot_product_attention(q, x, x).sum())(x)
    assert np.isfinite(values) and np.isfinite(gradients).all()


def test_more_keys_than_queries():
    query, key, value = _random(2, 4, 2, 8), _random(2, 7, 2, 8), _random(2, 7, 2, 8)
    expected = _expected(query, key, value, np.ones((2, 2, 4, 7), bool))
    np.testing.assert_allclose(dot_product_attention(query, key, value), expected, atol=1e-5)


def test_softmax_is_float32_for_bfloat16():
    query, key = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 512, 1, 8), jnp.bfloat16)
    graph = jax.make_jaxpr(dot_product_attention)(query, key, key)
    exponentials = [line for line in str(graph).splitlines() if "= exp " in line]
    assert exponentials and all("f32[" in line for line in exponentials)
    assert dot_product_attention(query, key, key).dtype == jnp.bfloat16


def test_a_query_that_sees_no_key_stays_finite():
    x = _random(1, 3, 1, 8)
    mask = np.zeros((1, 1, 1, 3), bool)
    assert np.isfinite(dot_product_attention(x, x, x, mask=mask)).all()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("bfloat16", 64, 64, 64, False, True), "cudnn"),
        (("float16", 64, 80, 64, False, True), "cudnn"),
        (("float32", 64, 64, 64, False, True), "normalised last"),
        (("bfloat16", 64, 64, 60, False, True), "xla"),
        (("bfloat16", 64, 64, 256, False, True), "xla"),
        (("bfloat16", 1, 81, 64, False, True), "xla"),
        (("bfloat16", 81, 81, 64, True, True), "cudnn" if attention.MASKS_IN_CUDNN else "xla"),
        (("bfloat16", 257, 257, 64, False, True), "cudnn"),
        (("bfloat16", 64, 1105, 64, False, True), "cudnn"),
        (("bfloat16", 64, 64, 64, False, False), "xla"),
    ],
)
def test_choice_of_kernel_is_logged_once(caplog, arguments, expected):
    attention._implementation.cache_clear()
    with caplog.at_level(logging.INFO, logger=attention.logger.name):
        names = {attention._implementation(*arguments) for _ in range(3)}
    attention._implementation.cache_clear()
    assert names == {expected}
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith(expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("hidden", [None, "mask", "lengths"])
@pytest.mark.parametrize(("queries", "keys"), [(8, 8), (9, 9), (8, 9), (9, 8)])
def test_odd_lengths_made_even_change_nothing(queries, keys, hidden, is_causal):
    """What cuDNN is asked for, computed by XLA, against jax's own attention: values and gradients."""
    arguments = [_random(2, queries, 3, 16), _random(2, keys, 3, 16), _random(2, keys, 3, 16) - 1]
    seen = np.arange(keys)[None] < np.array([[keys - 3], [keys]])
    mask, lengths = seen[:, None, None, :], jnp.array([keys - 3, keys])
    given = {"mask": mask, "key_lengths": None} if hidden == "mask" else {"mask": None, "key_lengths": lengths}
    given = given if hidden else {"mask": None, "key_lengths": None}
    weights = _random(2, queries, 3, 16)

    def ours(arguments):
        y = flash_attention(*arguments, is_causal=is_causal, implementation="xla", **given)
        assert y.shape == (2, queries, 3, 16)
        return (y * weights).sum()

    def theirs(arguments):
        y = jax.nn.dot_product_attention(*arguments, mask=mask if hidden else None, is_causal=is_causal)
        return (y * weights).sum()

    for a, b in zip(*(jax.tree.leaves(jax.value_and_grad(f)(arguments)) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lengths_hide_what_a_mask_hides(dtype):
    query, key, value = (jnp.asarray(_random(2, n, 3, 8), dtype) for n in (4, 7, 7))
    mask = jnp.array([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]], bool)
    by_length = dot_product_attention(query, key, value, key_lengths=jnp.array([3, 7]))
    np.testing.assert_array_equal(by_length, dot_product_attention(query, key, value, mask=mask[:, None, None]))


@pytest.mark.parametrize("hidden", ["nothing", "causal", "lengths", "mask", "all"])
def test_the_weights_are_those_of_the_values(hidden):
    query, key, value = _random(2, 6, 3, 8), _random(2, 6, 3, 8) + 1, _random(2, 6, 3, 8) - 1
    given = {
        "is_causal": hidden in ("causal", "all"),
        "key_lengths": jnp.array([4, 6]) if hidden in ("lengths", "all") else None,
        "mask": jnp.asarray(np.arange(6) != 1)[None, None, None] if hidden in ("mask", "all") else None,
    }
    weights = attention_weights(query, key, **given)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), np.ones((2, 3, 6)), rtol=1e-6)
    found = np.einsum("bhqk,bkhd->bqhd", weights, value)
    np.testing.assert_allclose(found, dot_product_attention(query, key, value, **given), atol=1e-5)


def test_weights_are_stored_where_they_are_asked_for():
    module, x = MultiHeadAttention(3, is_causal=True), _random(2, 6, 24)
    variables = module.init(jax.random.key(0), x)
    assert set(variables) == {"params"}
    _, state = module.apply(variables, x, mutable=["intermediates"])
    stored = state["intermediates"]["weights"][0]
    assert stored.shape == (2, 3, 6, 6) and (stored[..., ~np.tri(6, dtype=bool)] == 0).all()


def test_packing_moves_real_tokens_to_the_front():
    x = np.arange(10.0).reshape(2, 5, 1)
    mask = np.array([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0]], bool)
    packed, lengths, order = pack(x, mask)
    np.testing.assert_array_equal(lengths, [3, 2])
    np.testing.assert_array_equal(packed[0, :3, 0], [1, 3, 4])
    np.testing.assert_array_equal(packed[1, :2, 0], [5, 6])
    np.testing.assert_array_equal(np.take_along_axis(x[:, :, 0], np.asarray(order), axis=1), packed[:, :, 0])
    np.testing.assert_array_equal(last_of(packed, lengths)[:, 0, 0], [4, 6])


def test_layout_of_the_fused_projection():
    module = MultiHeadAttention(heads=2)
    x = _random(2, 5, 8)
    params = jax.tree.map(np.asarray, jax.jit(module.init)(jax.random.key(0), x)["params"])
    params["qkv"]["bias"] = _random(2, 3, 4)
    qkv = np.einsum("bnd,dkch->bnkch", x, params["qkv"]["kernel"]) + params["qkv"]["bias"]
    y = _expected(qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2], np.ones((2, 2, 5, 5), bool)).reshape(2, 5, 8)
    expected = y @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, x), expected, atol=1e-5)


def test_initial_kernels_have_clips_scale():
    module = MultiHeadAttention(heads=4, out_scale=0.25)
    params = jax.jit(module.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 2, 256)))["params"]
    np.testing.assert_allclose(np.std(params["qkv"]["kernel"]), 256**-0.5, rtol=0.02)
    np.testing.assert_allclose(np.std(params["out"]["kernel"]), 256**-0.5 / 4, rtol=0.02)


def test_width_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="width 10 does not divide into 4 heads"):
        MultiHeadAttention(heads=4).init(jax.random.key(0), jnp.zeros((1, 2, 10)))
