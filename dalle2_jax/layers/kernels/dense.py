"""The product of states with a dense layer's kernel, arranged for a fast gradient on a CPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def product(x: jax.Array, kernel: jax.Array, *_: Any, precision: Any = None, **__: Any) -> jax.Array:
    """`x` `[..., width]` times `kernel` `[width, ...]`, called as `flax.linen.Dense` and `DenseGeneral` call their
    `dot_general`, whose other arguments say no more than that.

    The value and its derivatives are the plain product's. On a CPU the kernel's gradient is made by XLA's fast kernels,
    which want the kernel with two axes and `x` transposed in memory; by itself XLA takes the transposed copies of a
    larger kernel, and a library that is half as fast. The backward pass transposes; nothing more is kept for it. Both
    together are a tenth of a prior's step.
    """
    y = _transposing(x, kernel.reshape(kernel.shape[0], -1), precision)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    return jnp.matmul(x, kernel, precision=precision)


@_product.defjvp
def _product_derivative(precision: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
    plain = functools.partial(jnp.matmul, precision=precision)

    def by_columns(x: jax.Array, kernel: jax.Array) -> jax.Array:
        columns = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
        y = jax.lax.dot_general(columns, kernel, (((0,), (0,)), ((), ())), precision=precision)
        return y.reshape(*x.shape[:-1], -1)

    of_kernel = jax.lax.platform_dependent(x, kernel_tangent, cpu=by_columns, default=plain)
    return plain(x, kernel), plain(x_tangent, kernel) + of_kernel


# So that `x` is kept for the backward pass, as it would be anyway, and not its transposed copy.
_transposing = jax.checkpoint(_product, prevent_cse=False, static_argnums=(2,))
