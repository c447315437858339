"""Group norm, the affine after it and SiLU as one operation with its own derivative, for NVIDIA GPUs.

The plain form's derivative keeps the centred values in float32 for the backward pass, and reads and writes arrays of
the image's size more often; this one keeps the input as it came, and makes both sums of the backward pass at once.
Compiled for an H200, Karlo's decoder moves an eighth fewer bytes a step with it (docs/results/gpu.md, November 2026).
Forward-mode derivatives are the plain form's alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def group_norm(
    x: jax.Array, gain: jax.Array, bias: jax.Array, groups: int, epsilon: float, silu: bool, dtype: Any
) -> jax.Array:
    """silu(normalised x * gain + bias), all of it in float32.

    Args:
        x: `[b, h, w, c]`.
        gain, bias: float32 `[b, c]`.
        groups: how many groups the channels fall into; mean and variance are of a group's channels and all places.
        epsilon: added to the variance.
        silu: whether x * sigmoid(x) follows.
        dtype: of the result `[b, h, w, c]`.
    """
    return _forward(x, gain, bias, groups, epsilon, silu, dtype)[0]


def _forward(
    x: jax.Array, gain: jax.Array, bias: jax.Array, groups: int, epsilon: float, silu: bool, dtype: Any
) -> tuple[jax.Array, Residuals]:
    mean, inverse = _statistics(x, groups, epsilon)
    factor = gain * inverse
    y = x.astype(jnp.float32) * factor[:, None, None] + (bias - mean * factor)[:, None, None]
    y = y * jax.nn.sigmoid(y) if silu else y
    return y.astype(dtype), (x, gain, bias, mean, inverse)


def _statistics(x: jax.Array, groups: int, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Mean and inverse standard deviation of every channel's group `[b, c]`, in one pass over `x`.

    Each channel is shifted by its first pixel, so that the mean square minus the squared mean loses no digits.
    """
    shift = x[:, :1, :1].astype(jnp.float32)
    shifted = x.astype(jnp.float32) - shift
    places = x.shape[1] * x.shape[2]
    first, second = jnp.sum(shifted, axis=(1, 2)) / places, jnp.sum(shifted * shifted, axis=(1, 2)) / places
    channel_mean, channel_variance = first + shift[:, 0, 0], second - first * first
    mean = _group_mean(channel_mean, groups)
    variance = _group_mean(channel_variance + jnp.square(channel_mean - mean), groups)
    return mean, jax.lax.rsqrt(variance + epsilon)


def _group_mean(values: jax.Array, groups: int) -> jax.Array:
    """`[b, c]` to the mean over each channel's group, in every one of its channels."""
    grouped = values.reshape(values.shape[0], groups, -1)
    return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(values.shape)


def _backward(
    groups: int, epsilon: float, silu: bool, dtype: Any, residuals: Residuals, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, gain, bias, mean, inverse = residuals

    def parts(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The normalised x, and the derivative before SiLU."""
        normalised = (x.astype(jnp.float32) - mean[:, None, None]) * inverse[:, None, None]
        derivative = cotangent.astype(jnp.float32)
        if silu:
            y = normalised * gain[:, None, None] + bias[:, None, None]
            sigmoid = jax.nn.sigmoid(y)
            derivative = derivative * (sigmoid * (1 + y * (1 - sigmoid)))
        return normalised, derivative

    normalised, derivative = parts(x, cotangent)
    # Both sums in one reduction, which reads its inputs once.
    zero = jnp.zeros((), jnp.float32)
    of_bias, of_gain = jax.lax.reduce(
        (derivative, derivative * normalised), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (1, 2)
    )
    places = x.shape[1] * x.shape[2]
    first = _group_mean(of_bias * gain, groups) / places
    second = _group_mean(of_gain * gain, groups) / places
    # Else XLA keeps float32 arrays of the image's size from the sums to what follows.
    x, cotangent, first, second = jax.lax.optimization_barrier((x, cotangent, first, second))
    normalised, derivative = parts(x, cotangent)
    of_x = derivative * gain[:, None, None] - first[:, None, None] - normalised * second[:, None, None]
    return (inverse[:, None, None] * of_x).astype(x.dtype), of_gain, of_bias


group_norm.defvjp(_forward, _backward)
