"""A stage small enough to train in a test: a two-layer network that removes noise from 4x4 images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from train.config.optimizer import Optimizer
from train.config.recipe import Recipe, Task

SIZE = 4
# A batch that holds this token has a loss that is not a number.
POISON = -1


class ToyNet(nn.Module):
    """[b, d] -> [b, d]."""

    width: int = 16
    features: int = SIZE * SIZE * 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.features, name="out")(nn.relu(nn.Dense(self.width, name="hidden")(x)))


@dataclass(frozen=True, kw_only=True)
class ToyRecipe(Recipe):
    """Predicts the image from the image with noise; noise 0 makes the loss a plain function of the batch."""

    kind: ClassVar[str] = "toy"

    module: ToyNet = ToyNet()
    noise: float = 0.1

    def build(self, stages: Any) -> ToyTask:
        return ToyTask(recipe=self)


@dataclass(frozen=True, kw_only=True)
class ToyTask(Task):
    """The toy's functions."""

    def init(self, key: jax.Array) -> Any:
        return self.module.init(key, jnp.zeros((1, self.module.features)))["params"]

    def loss(self, params: Any, batch: Any, key: jax.Array, frozen: Any, extra: Any = None):
        x = batch["image"].reshape(batch["image"].shape[0], -1).astype(jnp.float32) / 127.5 - 1.0
        noisy = x + self.recipe.noise * jax.random.normal(key, x.shape)
        loss = jnp.mean((self.module.apply({"params": params}, noisy) - x) ** 2)
        loss = jnp.where(jnp.any(batch["tokens"] == POISON), jnp.nan, loss)
        return loss, {"brightness": x.mean()}, extra

    def validate(self, params: Any, batch: Any, key: jax.Array, frozen: Any):
        return {"loss": self.loss(params, batch, key, frozen)[0]}

    def preview(self, params: Any, batch: Any, key: jax.Array, frozen: Any) -> jax.Array:
        x = batch["image"].reshape(batch["image"].shape[0], -1).astype(jnp.float32) / 127.5 - 1.0
        out = self.module.apply({"params": params}, x).reshape(batch["image"].shape)
        return jnp.clip(jnp.round((out + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


class ToyBatches:
    """Batch number n is a function of n alone; `poisoned` names batches whose loss is not a number."""

    def __init__(self, batch_size: int, poisoned: tuple[int, ...] = ()):
        self.batch_size, self.poisoned, self.position, self.closed = batch_size, poisoned, 0, False

    def __next__(self) -> dict[str, Any]:
        random = np.random.default_rng(self.position)
        levels = random.integers(0, 256, (self.batch_size, 1, 1, 3))
        image = np.clip(levels + random.integers(-9, 9, (self.batch_size, SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
        tokens = np.full((self.batch_size, 2), POISON if self.position in self.poisoned else 1, np.int32)
        self.position += 1
        captions = [f"image {index}" for index in range(self.batch_size)]
        return {"image": image, "tokens": tokens, "mask": tokens > 0, "captions": captions}

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]

    def close(self) -> None:
        self.closed = True


def toy_task(**changes: Any) -> ToyTask:
    """The task of `toy_recipe`."""
    return toy_recipe(**changes).build({})


def toy_recipe(**changes: Any) -> ToyRecipe:
    """A recipe of 12 steps of 16 images that logs each step; `optimizer` takes a dict of its fields."""
    optimizer = {"learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.9, **changes.pop("optimizer", {})}
    settings = {
        "steps": 12,
        "batch_size": 16,
        "log_every": 1,
        "validate_every": 0,
        "preview_every": 0,
        "checkpoint_every": 5,
        **changes,
    }
    return ToyRecipe(optimizer=Optimizer(**optimizer), **settings)
