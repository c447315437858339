"""The product of a dense layer is the plain one, value and derivatives of both kinds, on every platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.layers.kernels.dense import product

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(2, 5, 6)).astype(np.float32)
KERNELS = {"flat": (6, 4), "by head": (6, 2, 3, 2)}


def plain(x, kernel):
    return jnp.tensordot(x, kernel, 1)


@pytest.mark.parametrize("shape", KERNELS.values(), ids=KERNELS)
def test_value_and_derivatives(shape):
    kernel, weight = (RANDOM.normal(size=size).astype(np.float32) for size in (shape, (2, 5, *shape[1:])))

    def both(function):
        def loss(x, kernel):
            return (weight * jnp.sin(function(x, kernel))).sum()

        forward = jax.jvp(function, (X, kernel), (X + 1, kernel - 1))
        curved = jax.jvp(jax.grad(loss, (0, 1)), (X, kernel), (X + 1, kernel - 1))
        return forward, jax.value_and_grad(loss, (0, 1))(X, kernel), curved

    ours, expected = jax.jit(lambda: (both(product), both(plain)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected)


@pytest.mark.parametrize(("platform", "transposes"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_only_a_cpu_is_given_the_transposed_states(platform, transposes):
    gradient = jax.jit(jax.grad(lambda kernel: product(X, kernel).sum()))
    text = gradient.trace(np.ones((6, 4), np.float32)).lower(lowering_platforms=(platform,)).as_text()
    assert ("tensor<6x10xf32>\n" in text and "optimization_barrier %" in text) == transposes, text


def test_the_states_are_kept_and_not_a_transposed_copy():
    _, backward = jax.vjp(lambda kernel: product(2 * X, kernel), np.ones((6, 4), np.float32))
    shapes = [leaf.shape for leaf in jax.tree.leaves(backward)]
    assert (2, 5, 6) in shapes and (6, 10) not in shapes, shapes
