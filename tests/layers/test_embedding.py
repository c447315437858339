"""Timestep embeddings against a plain numpy loop; normalisation at its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.layers.embedding import timestep_embedding, unit_norm


def test_timestep_embedding_is_cosines_then_sines():
    timesteps, width = [0, 7, 999], 8
    expected = np.zeros((3, width))
    for row, t in enumerate(timesteps):
        for i in range(width // 2):
            frequency = 10000.0 ** (-i / (width // 2))
            expected[row, i] = np.cos(t * frequency)
            expected[row, width // 2 + i] = np.sin(t * frequency)
    result = timestep_embedding(jnp.array(timesteps), width)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, atol=1e-4)


def test_ddpms_layout_is_sines_then_cosines_down_to_the_last_frequency():
    """1/10000 itself is among them, as in the paper's code."""
    frequencies = np.array([1, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4])
    angles = np.array([0, 7, 999])[:, None] * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(timestep_embedding(jnp.array([0, 7, 999]), 8, "ddpm"), expected, atol=1e-4)
    with pytest.raises(ValueError, match="width of 4 or more, got 2"):
        timestep_embedding(jnp.array([1]), 2, "ddpm")
    with pytest.raises(ValueError, match="'adm'; it must be glide or ddpm"):
        timestep_embedding(jnp.array([1]), 8, "adm")


def test_timestep_embedding_is_float32_for_low_precision_timesteps():
    half = timestep_embedding(jnp.array([3.0], jnp.bfloat16), 8)
    np.testing.assert_array_equal(half, timestep_embedding(jnp.array([3]), 8))


def test_odd_width_is_refused():
    with pytest.raises(ValueError, match="even width, got 7"):
        timestep_embedding(jnp.array([1]), 7)


def test_unit_norm():
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    np.testing.assert_allclose(unit_norm(x), x / np.linalg.norm(x, axis=-1, keepdims=True), rtol=1e-6)
    assert unit_norm(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32


def test_unit_norm_of_zero_is_zero_with_a_finite_gradient():
    zero = jnp.zeros((1, 3))
    np.testing.assert_array_equal(unit_norm(zero), zero)
    assert jnp.isfinite(jax.grad(lambda x: unit_norm(x).sum())(zero)).all()
