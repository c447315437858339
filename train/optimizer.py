"""The optimizer of every stage: AdamW with warm-up, clipping, accumulation, and a moving average of the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.system import Optimizer

# Scanned stacks give biases and scales a leading axis, so what decays goes by name and not by rank.
DECAYED = ("kernel", "embedding")


def learning_rate_schedule(optimizer: Optimizer, steps: int) -> optax.Schedule:
    """Linear from near zero over `warmup_steps`, then constant or along a cosine to zero at `steps`."""
    rate, warmup = optimizer.learning_rate, optimizer.warmup_steps

    def schedule(count: jax.Array) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum(1.0, (count + 1.0) / max(warmup, 1))
        if optimizer.schedule == "constant":
            return rate * warm
        progress = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return rate * warm * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    return schedule


def decay_mask(params: Any) -> Any:
    """True for matrices (kernels and embedding tables), False for biases, scales and lone vectors."""

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        return str(getattr(path[-1], "key", path[-1])) in DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(optimizer: Optimizer, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm (0 is none), then AdamW with decay on matrices only (`optimizer` of a recipe)."""
    clip = optax.clip_by_global_norm(optimizer.gradient_clip) if optimizer.gradient_clip else optax.identity()
    adam = optax.adamw(
        learning_rate_schedule(optimizer, steps),
        b1=optimizer.beta1,
        b2=optimizer.beta2,
        eps=optimizer.epsilon,
        mu_dtype=optimizer.moment_dtype,
        weight_decay=optimizer.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(clip, adam)


def update_ema(ema: Any, params: Any, updates: jax.Array, decay: float) -> Any:
    """The float32 moving average after one more update, whose decay is warmed up: min(decay, (1 + n) / (10 + n))."""
    count = updates.astype(jnp.float32)
    decay = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new.astype(jnp.float32) - old), ema, params)


def accumulated_gradient(
    loss: Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    params: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    parts: int,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """(loss, metrics, gradient), each the mean over `parts` micro-batches that are taken one after the other.

    A loss that is a mean over examples gets the gradient of the whole batch; one that ties the examples of a batch to
    each other (CLIP's) sees them in micro-batches only.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, metrics), gradient = value_and_grad(params, batch, key)
        return value, metrics, gradient

    # Every parts-th example, so that a micro-batch is spread over the devices like the batch.
    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    def step(total: Any, part: tuple[jax.Array, Any]) -> tuple[Any, None]:
        index, micro = part
        (value, metrics), gradient = value_and_grad(params, micro, jax.random.fold_in(key, index))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (value, metrics, gradient)), None

    first = jax.tree.map(lambda x: x[: x.shape[0] // parts], batch)
    shapes = jax.eval_shape(value_and_grad, params, first, key)
    (value, metrics), gradient = shapes
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (value, metrics, gradient))
    total, _ = jax.lax.scan(step, zeros, (jnp.arange(parts), jax.tree.map(split, batch)))
    value, metrics, gradient = jax.tree.map(lambda x: x / parts, total)
    return value, metrics, jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, params)
