"""Classifier-free guidance: a denoiser with a condition in, a denoiser out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def is_guided(guidance_scale: jax.Array | float | None) -> bool:
    """Whether both predictions are asked for: not where the scale is None or a Python 1."""
    return not (guidance_scale is None or (isinstance(guidance_scale, int | float) and guidance_scale == 1))


def classifier_free_guidance(
    denoiser: Callable[[jax.Array, jax.Array, Any], jax.Array],
    condition: Any,
    null_condition: Any,
    guidance_scale: jax.Array | float | None,
    channels: int | None = None,
    interval: tuple[jax.Array | float, jax.Array | float] | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Guide a denoiser (Ho & Salimans 2021; GLIDE Sec. 2.3): unconditional + scale (conditional - unconditional).

    Both predictions come from one batch of twice the size, x_t and t in both halves, the condition in the first and the
    null condition in the second. A scale of 0 is unconditional, 1 is conditional; a Python 1 or None leaves the batch
    as it is.

    Args:
      denoiser: f(x_t, t, condition) -> [batch, ..., channels or more].
      condition: any pytree of arrays [batch, ...].
      null_condition: the same tree, with what stands for no condition; only the condition may differ, never x_t.
      guidance_scale: a number, or a (traced) scalar, or [batch], one an example.
      interval: guide only at timesteps from the first to below the second of these (Kynkaanniemi et al. 2024), and
        leave the conditional prediction as it is elsewhere; None: at all.
      channels: how many of the output's first channels are guided; None: as many as x_t has. The others (those of a
        learned variance) are the conditional half's, unchanged.

    Returns:
      f(x_t, t) -> guided prediction, float32 (the denoiser's own dtype at a Python 1).
    """
    if not is_guided(guidance_scale):
        return lambda x_t, t: denoiser(x_t, t, condition)
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), condition, null_condition)

    def guided(x_t: jax.Array, t: jax.Array) -> jax.Array:
        output = denoiser(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both).astype(jnp.float32)
        count = x_t.shape[-1] if channels is None else channels
        conditional, unconditional = jnp.split(output, 2)
        prediction, null_prediction = conditional[..., :count], unconditional[..., :count]
        scale = jnp.asarray(guidance_scale, jnp.float32)
        if interval is not None:
            scale = jnp.where((interval[0] <= t) & (t < interval[1]), scale, 1.0)
        scale = scale.reshape(scale.shape + (1,) * (x_t.ndim - scale.ndim)) if scale.ndim else scale
        prediction = null_prediction + scale * (prediction - null_prediction)
        return jnp.concatenate([prediction, conditional[..., count:]], axis=-1)

    return guided
