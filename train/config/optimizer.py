"""The optimizers of the stages: warm-up, clipping, accumulation, and a moving average of the parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle2_jax.errors import InputError, check_number

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("constant", "cosine", "inverse_sqrt", "exponential")
# Scanned stacks give biases and scales a leading axis, so what decays goes by name and not by rank.
DECAYED = ("kernel", "embedding")

# With a moment that never forgets, or an average that never moves, nothing is trained; and whatever is not finite is
# in all parameters after the first step.
_AVERAGE = {"at_least": 0, "below": 1}
_RANGES: dict[str, dict[str, Any]] = {
    "learning_rate": {"at_least": 0},
    "warmup_steps": {"at_least": 0, "whole": True},
    "decay_rate": {"above": 0, "at_most": 1},
    "least_learning_rate": {"at_least": 0},
    "momentum": _AVERAGE,
    "momentum_final": _AVERAGE,
    "momentum_ramp_steps": {"at_least": 0, "whole": True},
    "beta1": _AVERAGE,
    "beta2": _AVERAGE,
    "epsilon": {"above": 0},
    "weight_decay": {"at_least": 0},
    "gradient_clip": {"at_least": 0},
    "accumulation": {"at_least": 1, "whole": True},
    "ema_decay": _AVERAGE,
}


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer with warm-up, gradient clipping, accumulation and an exponential moving average of the parameters.

    name: "adamw", "adam" (without weight decay) or "sgd" (with `momentum`; Nesterov's is not taken). weight_decay: of
    matrices only. gradient_clip: of the global norm; 0: none. accumulation: micro-batches a step.
    moment_dtype: in which the first moment is kept: "bfloat16" spares 2 bytes a parameter of the device's memory and 4
    of what a step reads and writes; None: as the parameters.

    schedule: after the warm-up: "constant"; "cosine", to zero at the last step; "inverse_sqrt", of the step (Vaswani et
    al. 2017, Sec. 5.3, whose d^-0.5 min(step^-0.5, step warmup^-1.5) has a learning_rate of (d warmup)^-0.5); or
    "exponential", times `decay_rate` a step, down to `least_learning_rate`. momentum_final: what sgd's momentum goes
    to, along a line of `momentum_ramp_steps`; None: it stays.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: str = "constant"
    decay_rate: float = 0.99999
    least_learning_rate: float = 0.0
    momentum: float = 0.9
    momentum_final: float | None = None
    momentum_ramp_steps: int = 0
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
        if self.schedule not in SCHEDULES:
            raise InputError(f"optimizer.schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}")
        for name, range_ in _RANGES.items():
            value = getattr(self, name)
            if value is not None or name != "momentum_final":
                check_number(f"optimizer.{name}", value, **range_)
        if self.momentum_final is not None and self.name != "sgd":
            raise InputError(f"optimizer.momentum_final is {self.momentum_final} with {self.name}; take sgd, or None")
        if self.momentum_final is not None and self.momentum_ramp_steps < 1:
            raise InputError(
                f"optimizer.momentum_ramp_steps is {self.momentum_ramp_steps}; with a momentum_final it must be 1 or "
                "more"
            )
        if self.moment_dtype not in (None, "float32", "bfloat16"):
            raise InputError(f"optimizer.moment_dtype is {self.moment_dtype!r}; it must be None, float32 or bfloat16")

    def gradient_transformation(self, steps: int) -> optax.GradientTransformation:
        """Clipping by the global norm, then the optimizer; steps: at which a cosine schedule ends."""
        clip = optax.clip_by_global_norm(self.gradient_clip) if self.gradient_clip else optax.identity()
        rate = learning_rate_schedule(self, steps)
        if self.name == "sgd":
            if self.momentum_final is None:
                return optax.chain(clip, optax.sgd(rate, momentum=self.momentum, accumulator_dtype=self.moment_dtype))
            momentum = optax.linear_schedule(self.momentum, self.momentum_final, self.momentum_ramp_steps)
            trace = optax.inject_hyperparams(optax.trace)(decay=momentum, accumulator_dtype=self.moment_dtype)
            return optax.chain(clip, trace, optax.scale_by_learning_rate(rate))
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


def in_turn(transformation: optax.GradientTransformation, turns: Sequence[bool]) -> optax.GradientTransformation:
    """`transformation` in those updates of a cycle where `turns` is True; in the others nothing changes, its state
    (moments, and the count that its schedule goes by) neither.

    by_part({"a": in_turn(one, (True, False)), "b": in_turn(other, (False, True))}) trains the two alternately.
    """

    def has_turn(count: jax.Array) -> jax.Array:
        return jnp.asarray(turns)[count % len(turns)]

    return optax.conditionally_mask(transformation, has_turn)


def learning_rate_schedule(optimizer: Optimizer, steps: int) -> optax.Schedule:
    """Linear from near zero over `warmup_steps`, then as `Optimizer.schedule` says; a cosine is zero at `steps`."""
    rate, warmup = optimizer.learning_rate, optimizer.warmup_steps

    def schedule(count: jax.Array) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum(1.0, (count + 1.0) / max(warmup, 1))
        if optimizer.schedule == "constant":
            return rate * warm
        if optimizer.schedule == "exponential":
            decayed = rate * jnp.exp(math.log(optimizer.decay_rate) * jnp.maximum(count - warmup, 0.0))
            return warm * jnp.maximum(decayed, optimizer.least_learning_rate)
        if optimizer.schedule == "inverse_sqrt":
            return rate * warm * jnp.minimum(1.0, jnp.sqrt(max(warmup, 1) / (count + 1.0)))
        progress = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return rate * warm * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    return schedule


def decay_mask(params: Any) -> Any:
    """True for matrices (kernels and embedding tables), False for biases, scales and lone vectors."""

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        return str(getattr(path[-1], "key", path[-1])) in DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)
