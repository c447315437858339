"""The count of operations: loops, remat, gradients and convolutions, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from train.flops import count_flops


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def flops(function, *arguments) -> int:
    return count_flops(jax.make_jaxpr(function)(*arguments))


def stack(weights, x, remat=False):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)[0].sum()


@pytest.mark.parametrize("depth", [2, 24])
def test_a_scan_counts_as_often_as_it_runs(depth):
    product = 2 * 8 * 16 * 16
    arguments = shape(depth, 16, 16), shape(8, 16)
    assert flops(stack, *arguments) == depth * product
    assert flops(jax.grad(stack, argnums=(0, 1)), *arguments) == 3 * depth * product
    # The layer's product is computed again, for its tanh.
    remat = jax.grad(lambda w, x: stack(w, x, remat=True), argnums=(0, 1))
    assert flops(remat, *arguments) == 4 * depth * product


def test_batched_products():
    def attend(q, k):
        return jnp.einsum("bqhd,bkhd->bhqk", q, k)

    assert flops(jax.jit(attend), shape(2, 5, 3, 7), shape(2, 6, 3, 7)) == 2 * 2 * 3 * 5 * 6 * 7


def test_convolutions_and_their_gradients():
    def convolve(x, kernel):
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (y**2).sum()

    forward = 2 * 4 * 8 * 8 * 3 * 3 * 5 * 6
    arguments = shape(4, 8, 8, 5), shape(3, 3, 5, 6)
    assert flops(convolve, *arguments) == forward
    assert flops(jax.grad(convolve, argnums=(0, 1)), *arguments) == 3 * forward
    grouped = lambda x, kernel: jax.lax.conv_general_dilated(  # noqa: E731
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=5
    )
    assert flops(grouped, shape(4, 8, 8, 5), shape(3, 3, 1, 5)) == 2 * 4 * 8 * 8 * 5 * 9


def test_branches():
    def choose(x, flag):
        return jax.lax.cond(flag, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert flops(choose, shape(4, 4), jax.ShapeDtypeStruct((), jnp.bool_)) == 2 * 2 * 4**3
