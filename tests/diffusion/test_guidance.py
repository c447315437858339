"""Classifier-free guidance: one doubled batch, x_t kept in both halves, the variance channels left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import Process, classifier_free_guidance, ddim


def _denoiser(x_t, t, condition):
    """Non-linear in x_t: a null half without x_t, or with another, changes the result; variance channels follow."""
    strength = condition["strength"][:, None, None, None] + 0.001 * t.astype(jnp.float32)[:, None, None, None]
    prediction = jnp.tanh(x_t) * strength + condition["shift"]
    return jnp.concatenate([prediction, jnp.sin(3 * prediction)], axis=-1)


@pytest.fixture
def example():
    keys = jax.random.split(jax.random.key(0), 4)
    x_t = jax.random.normal(keys[0], (3, 4, 4, 2))
    condition = {"strength": jax.random.normal(keys[1], (3,)), "shift": jax.random.normal(keys[2], (3, 4, 4, 2))}
    null = {"strength": jnp.full((3,), 0.3), "shift": jnp.zeros((3, 4, 4, 2))}
    return x_t, jnp.asarray([0, 500, 999], jnp.int32), condition, null


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, jnp.float32(1.0)])
def test_guidance_extrapolates_from_two_separate_evaluations(example, scale):
    x_t, t, condition, null = example
    guided = classifier_free_guidance(_denoiser, condition, null, scale)(x_t, t)
    conditional, unconditional = _denoiser(x_t, t, condition), _denoiser(x_t, t, null)
    expected = unconditional[..., :2] + scale * (conditional[..., :2] - unconditional[..., :2])
    np.testing.assert_allclose(guided[..., :2], expected, atol=1e-6)
    np.testing.assert_array_equal(guided[..., 2:], conditional[..., 2:])


def test_both_halves_hold_x_t_and_there_is_one_evaluation(example):
    x_t, t, condition, null = example
    calls = []

    def recording(x, timesteps, conditions):
        calls.append((x, timesteps, conditions))
        return _denoiser(x, timesteps, conditions)

    classifier_free_guidance(recording, condition, null, 2.0)(x_t, t)
    ((x, timesteps, conditions),) = calls
    np.testing.assert_array_equal(x, jnp.concatenate([x_t, x_t]))
    np.testing.assert_array_equal(timesteps, jnp.concatenate([t, t]))
    np.testing.assert_array_equal(conditions["strength"][:3], condition["strength"])
    np.testing.assert_array_equal(conditions["strength"][3:], null["strength"])


def test_a_python_one_evaluates_the_condition_alone(example):
    x_t, t, condition, null = example
    shapes = []

    def recording(x, timesteps, conditions):
        shapes.append(x.shape)
        return _denoiser(x, timesteps, conditions)

    for scale in (1, 1.0):
        plain = classifier_free_guidance(recording, condition, null, scale)(x_t, t)
        np.testing.assert_array_equal(plain, _denoiser(x_t, t, condition))
    assert shapes == [x_t.shape] * 2


def test_scales_may_be_traced_and_differ_by_example(example):
    x_t, t, condition, null = example
    scales = jnp.asarray([0.0, 1.0, 4.0])
    guided = jax.jit(lambda s: classifier_free_guidance(_denoiser, condition, null, s)(x_t, t))
    together = guided(scales)
    for row, scale in enumerate(scales):
        np.testing.assert_allclose(guided(scale)[row], together[row], atol=1e-6)
    np.testing.assert_allclose(together[0, ..., :2], _denoiser(x_t, t, null)[0, ..., :2], atol=1e-6)


def test_channels_says_what_is_guided_and_bfloat16_variance_is_untouched(example):
    x_t, t, condition, null = example

    def half_precision(*arguments):
        return _denoiser(*arguments).astype(jnp.bfloat16)

    guided = classifier_free_guidance(half_precision, condition, null, 7.5, channels=1)(x_t, t)
    assert guided.dtype == jnp.float32
    np.testing.assert_array_equal(guided[..., 1:], half_precision(x_t, t, condition)[..., 1:].astype(jnp.float32))
    assert np.abs(guided[..., :1] - half_precision(x_t, t, condition)[..., :1].astype(jnp.float32)).max() > 0.1


def test_a_sampler_takes_a_guided_denoiser_of_embeddings():
    """With an x0-predictor that copies its condition, [batch, width], scale s lands on null + s (condition - null)."""
    process = Process(prediction="x0", variance="fixed_small", clip=None, respacing="5")
    condition, null = jnp.full((2, 3), 0.5), jnp.full((2, 3), 0.1)
    guided = classifier_free_guidance(lambda x, t, c: c, condition, null, 2.0)
    x_0 = ddim(jax.random.key(0), guided, jnp.ones((2, 3)), process)
    np.testing.assert_allclose(x_0, np.full((2, 3), 0.9), atol=1e-6)


def test_outside_the_interval_the_prediction_is_the_conditional_one(example):
    x_t, t, condition, null = example
    within = classifier_free_guidance(_denoiser, condition, null, 3.0, interval=(400, 999))(x_t, t)
    guided = classifier_free_guidance(_denoiser, condition, null, 3.0)(x_t, t)
    conditional = _denoiser(x_t, t, condition)
    np.testing.assert_allclose(np.asarray(within)[[0, 2]], np.asarray(conditional)[[0, 2]], atol=1e-5)
    np.testing.assert_array_equal(within[1], guided[1])
    assert np.abs(within[1] - conditional[1]).max() > 0.1
