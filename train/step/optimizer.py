"""What a step does with gradients and parameters beside the optimizer's own update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def update_ema(ema: Any, params: Any, updates: jax.Array, decay: float) -> Any:
    """The float32 moving average after one more update, whose decay is warmed up: min(decay, (1 + n) / (10 + n))."""
    count = updates.astype(jnp.float32)
    decay = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new.astype(jnp.float32) - old), ema, params)


def accumulated_gradient(
    loss: Callable[[Any, Any, jax.Array, Any], tuple[jax.Array, dict[str, jax.Array], Any]],
    params: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    extra: Any,
    parts: int,
) -> tuple[jax.Array, dict[str, jax.Array], Any, Any]:
    """(loss, metrics, gradient, extra), the first three the mean over `parts` micro-batches, one after the other.

    A loss that is a mean over examples gets the gradient of the whole batch; one that ties the examples of a batch to
    each other (CLIP's) sees them in micro-batches only. loss: of (params, batch, key, extra), as `Task.loss` without
    the frozen parameters; a micro-batch's `extra` is the one that the micro-batch before it left.
    """

    def with_auxiliaries(params: Any, batch: Any, key: jax.Array, extra: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        value, metrics, extra = loss(params, batch, key, extra)
        return value, (metrics, extra)

    value_and_grad = jax.value_and_grad(with_auxiliaries, has_aux=True)
    if parts == 1:
        (value, (metrics, extra)), gradient = value_and_grad(params, batch, key, extra)
        return value, metrics, gradient, extra

    # Every parts-th example, so that a micro-batch is spread over the devices like the batch.
    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    def step(carry: tuple[Any, Any], part: tuple[jax.Array, Any]) -> tuple[Any, None]:
        (total, extra), (index, micro) = carry, part
        (value, (metrics, extra)), gradient = value_and_grad(params, micro, jax.random.fold_in(key, index), extra)
        return (jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (value, metrics, gradient)), extra), None

    first = jax.tree.map(lambda x: x[: x.shape[0] // parts], batch)
    (value, (metrics, _)), gradient = jax.eval_shape(value_and_grad, params, first, key, extra)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (value, metrics, gradient))
    (total, extra), _ = jax.lax.scan(step, (zeros, extra), (jnp.arange(parts), jax.tree.map(split, batch)))
    value, metrics, gradient = jax.tree.map(lambda x: x / parts, total)
    return value, metrics, jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, params), extra
