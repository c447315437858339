"""The choice among the prior's samples."""

import jax.numpy as jnp
import numpy as np

from dalle2_jax.prior import best_of


def test_keeps_the_largest_dot_product():
    text = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    wide, tall = [0.8, 0.6], [0.6, 0.8]
    candidates = jnp.array([[tall, wide], [tall, wide]])
    np.testing.assert_array_equal(best_of(candidates, text), jnp.array([wide, tall]))


def test_against_a_loop():
    random = np.random.default_rng(0)
    candidates, text = random.normal(size=(5, 4, 6)).astype(np.float32), random.normal(size=(5, 6)).astype(np.float32)
    expected = [max(row, key=lambda z, t=t: float(z @ t)) for row, t in zip(candidates, text, strict=True)]
    np.testing.assert_array_equal(best_of(candidates, text), expected)
