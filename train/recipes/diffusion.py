"""What the stages that are diffusion models share: the loss, its weighting, its timesteps, and its measured error."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion import (
    LossHistory,
    Process,
    Sampling,
    check_loss,
    diffusion_loss,
    loss_history,
    sample_timesteps,
    update_history,
    x0_error,
)
from dalle2_jax.diffusion.sampler import Denoiser
from dalle2_jax.errors import InputError
from train.config.recipe import Batch, Parameters, Recipe, Task

TIMESTEPS = ("uniform", "loss")


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe(Recipe):
    """Trains `module` to reverse `process`.

    loss_kind: "simple" | "vlb" | "hybrid" (the last with a learned variance). weighting, weight_limit: of the
    timesteps, see `diffusion_loss`; the paper has none. timesteps: "uniform", or "loss" to sample them by the
    losses that were seen there (IDDPM Sec. 3.3).
    """

    training_fields: ClassVar[tuple[str, ...]] = ("loss_kind", "weighting", "weight_limit", "timesteps")

    process: Process = Process()
    sampling: Sampling = Sampling()
    loss_kind: str = "simple"
    weighting: str = "uniform"
    weight_limit: float = 5.0
    timesteps: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.process, self.loss_kind, self.weighting, self.weight_limit)
        self.preview_sampling.process(self.process)
        if self.process.respacing is not None:
            raise InputError(
                f"{self.kind}.process.respacing is {self.process.respacing!r}; all timesteps are trained on, and fewer "
                f"are sampled: set {self.kind}.sampling.steps"
            )
        if self.timesteps not in TIMESTEPS:
            raise InputError(f"{self.kind}.timesteps is {self.timesteps!r}; it must be {' or '.join(TIMESTEPS)}")
        if self.timesteps == "loss" and self.optimizer.accumulation > 1:
            raise InputError(
                f"{self.kind}.timesteps=loss needs the losses of a whole batch at once; set "
                f"{self.kind}.optimizer.accumulation=1"
            )

    @property
    def preview_sampling(self) -> Sampling:
        """How previews are sampled: as in the end, but for a variance that is measured only then."""
        if self.sampling.variance == "analytic":
            return dataclasses.replace(self.sampling, variance=None)
        return self.sampling

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "process": self.process, "sampling": self.sampling}


@dataclass(frozen=True, kw_only=True)
class DiffusionTask(Task):
    """The loss, validation and measured error of a diffusion recipe; subclasses say what is restored under what."""

    recipe: DiffusionRecipe

    @abstractmethod
    def denoising(
        self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, training: bool
    ) -> tuple[Denoiser, jax.Array, jax.Array]:
        """The denoiser under the batch's conditions, what it is to restore (x_0), and a key for the noise."""

    def init_extra(self) -> LossHistory | None:
        return loss_history(self.recipe.process.steps) if self.recipe.timesteps == "loss" else None

    def loss(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, extra: LossHistory | None):
        denoiser, x_0, key = self.denoising(params, batch, key, frozen, training=True)
        if extra is None:
            losses, metrics = self._losses(key, denoiser, x_0)
            return losses.mean(), _means(metrics), None
        draw_key, key = jax.random.split(key)
        i, weights = sample_timesteps(draw_key, extra, x_0.shape[0])
        losses, metrics = self._losses(key, denoiser, x_0, timesteps=i)
        metrics = {name: weights * value for name, value in metrics.items()}
        extra = update_history(extra, i, jax.lax.stop_gradient(losses))
        return (weights * losses).mean(), _means(metrics), extra

    def validate(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        denoiser, x_0, key = self.denoising(params, batch, key, frozen, training=False)
        losses, metrics = self._losses(key, denoiser, x_0)
        return {"loss": losses.mean(), **_means(metrics)}

    def _losses(self, key: jax.Array, denoiser: Denoiser, x_0: jax.Array, timesteps: jax.Array | None = None):
        recipe = self.recipe
        return diffusion_loss(
            key,
            denoiser,
            x_0,
            recipe.process,
            recipe.loss_kind,
            timesteps=timesteps,
            weighting=recipe.weighting,
            weight_limit=recipe.weight_limit,
        )

    def measure(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        denoiser, x_0, key = self.denoising(params, batch, key, frozen, training=False)
        return {"x0_error": x0_error(key, denoiser, x_0, self.recipe.process)}


def _means(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.mean(value) for name, value in metrics.items()}
