"""The optimizers of the stages: warm-up, clipping, accumulation, and a moving average of the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle2_jax.errors import InputError

OPTIMIZERS = ("adamw", "adam", "sgd")
# Scanned stacks give biases and scales a leading axis, so what decays goes by name and not by rank.
DECAYED = ("kernel", "embedding")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer with warm-up, gradient clipping, accumulation and an exponential moving average of the parameters.

    name: "adamw", "adam" (without weight decay) or "sgd" (with `momentum`; Nesterov's is not taken). weight_decay: of
    matrices only. gradient_clip: of the global norm; 0: none. accumulation: micro-batches a step.
    moment_dtype: in which the first moment is kept: "bfloat16" spares 2 bytes a parameter of the device's memory and 4
    of what a step reads and writes; None: as the parameters.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: str = "constant"  # after the warm-up: "constant" | "cosine" (to zero at the last step)
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    accumulation: int = 1
    ema_decay: float = 0.9999
    moment_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise InputError(f"optimizer.name is {self.name!r}; it must be {', '.join(OPTIMIZERS)}")
        if self.name != "adamw" and self.weight_decay:
            raise InputError(
                f"optimizer.weight_decay is {self.weight_decay} with {self.name}, which has none; take adamw"
            )
        if self.schedule not in ("constant", "cosine"):
            raise InputError(f"optimizer.schedule is {self.schedule!r}; it must be 'constant' or 'cosine'")
        if self.moment_dtype not in (None, "float32", "bfloat16"):
            raise InputError(f"optimizer.moment_dtype is {self.moment_dtype!r}; it must be None, float32 or bfloat16")

    def gradient_transformation(self, steps: int) -> optax.GradientTransformation:
        """Clipping by the global norm, then the optimizer; steps: at which a cosine schedule ends."""
        clip = optax.clip_by_global_norm(self.gradient_clip) if self.gradient_clip else optax.identity()
        rate = learning_rate_schedule(self, steps)
        if self.name == "sgd":
            return optax.chain(clip, optax.sgd(rate, momentum=self.momentum, accumulator_dtype=self.moment_dtype))
        moments = {"b1": self.beta1, "b2": self.beta2, "eps": self.epsilon, "mu_dtype": self.moment_dtype}
        if self.name == "adam":
            return optax.chain(clip, optax.adam(rate, **moments))
        return optax.chain(clip, optax.adamw(rate, **moments, weight_decay=self.weight_decay, mask=decay_mask))


def by_part(parts: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """One transformation a part of the parameters, by the first name of a parameter's path.

    by_part({"generator": one, "discriminator": other}) trains `{"generator": ..., "discriminator": ...}`.
    """

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)

    return optax.multi_transform(dict(parts), labels)


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
