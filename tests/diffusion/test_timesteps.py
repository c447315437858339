"""Importance sampling of timesteps leaves the expected loss as it is and makes its estimate steadier (IDDPM 3.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import loss_history, sample_timesteps, timestep_probabilities, update_history

STEPS = 20


@pytest.fixture(scope="module")
def losses():
    return jnp.asarray(np.exp(np.linspace(0, 4, STEPS)), jnp.float32)


@pytest.fixture(scope="module")
def history(losses):
    update, history = jax.jit(update_history), loss_history(STEPS)
    for _ in range(10):
        history = update(history, jnp.arange(STEPS), losses)
    return history


def test_uniform_until_every_timestep_is_known(losses):
    history = loss_history(STEPS)
    for _ in range(9):
        history = update_history(history, jnp.arange(STEPS), losses)
    history = update_history(history, jnp.arange(STEPS - 1), losses[:-1])
    np.testing.assert_allclose(timestep_probabilities(history), 1 / STEPS)
    i, weights = sample_timesteps(jax.random.key(0), history, 4000)
    np.testing.assert_allclose(weights, 1.0, rtol=1e-6)
    assert np.bincount(i, minlength=STEPS).min() > 130


def test_by_the_losses_and_unbiased(history, losses):
    probabilities = np.asarray(timestep_probabilities(history))
    expected = 0.999 * np.asarray(losses / losses.sum()) + 0.001 / STEPS
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    i, weights = sample_timesteps(jax.random.key(1), history, 40_000)
    np.testing.assert_allclose(np.bincount(i, minlength=STEPS) / 40_000, probabilities, atol=0.006)
    weighted = np.asarray(weights * losses[i])
    assert abs(weighted.mean() / float(losses.mean()) - 1) < 0.01
    assert weighted.std() < 0.2 * float(losses.std())


def test_the_oldest_loss_goes_first_and_an_example_counts_once_each():
    history = loss_history(2, length=3)
    history = update_history(history, jnp.asarray([1, 1, 1, 1, 0]), jnp.asarray([1.0, 2.0, 3.0, 4.0, 9.0]))
    np.testing.assert_array_equal(history.losses, [[9, 0, 0], [2, 3, 4]])
    np.testing.assert_array_equal(history.counts, [1, 3])
