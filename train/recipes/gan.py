"""A generative adversarial network, on images without captions (Goodfellow et al. 2014)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.errors import InputError
from dalle2_jax.layers.pixels import in_colour
from dalle2_jax.lineage.autoencoder import to_unit
from dalle2_jax.lineage.gan import (
    FAILURES,
    GAN,
    MLPGenerator,
    check_objective,
    discriminator_loss,
    divergence_bound,
    failure,
    gan_noise,
    generator_loss,
    pairwise_distance,
    sample_gan,
)
from dalle2_jax.sharding import replicate
from train.config.optimizer import Optimizer, by_part, in_turn, learning_rate_schedule
from train.config.recipe import Batch, Parameters
from train.recipes.autoencoder import LatentRecipe, LatentTask

GENERATOR, DISCRIMINATOR = "generator", "discriminator"
LEAST_MARGINAL = 1e-7  # of a pixel's mean, so that its logit is finite
# The share of the steps in which nothing is remarked: players begin alike, and samples too.
QUIET = 0.1


@dataclass(frozen=True, kw_only=True)
class GANRecipe(LatentRecipe):
    """Algorithm 1 of Goodfellow et al. (2014): some steps of the discriminator, then one of the generator.

    A step of the loop is one player's, on a batch of its own: `steps` counts both players' together. Schedules and
    moments of a player's optimizer count its own steps alone; accumulation and ema_decay are those of `optimizer`, for
    both players.

    optimizer: the generator's. discriminator_optimizer: None: the same. objective: the generator's (`generator_loss`).
    discriminator_steps: k, for each step of the generator. reuse_noise: the generator's step is on the noise of the
    discriminator's last one, as in PyTorch's DCGAN example; else on noise of its own, as in Algorithm 1. bias_batches:
    so many batches give the mean image at which the output bias of an `MLPGenerator` starts, as in the code published
    for MNIST; 0: at grey.
    """

    kind: ClassVar[str] = "gan"
    training_fields: ClassVar[tuple[str, ...]] = ("objective", "discriminator_steps", "reuse_noise", "bias_batches")

    module: GAN
    discriminator_optimizer: Optimizer | None = None
    objective: str = "non_saturating"
    discriminator_steps: int = 1
    reuse_noise: bool = False
    bias_batches: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_objective(self.objective)
        if self.discriminator_steps < 1:
            raise InputError(
                f"gan.discriminator_steps is {self.discriminator_steps}; it must be 1 or more, since the generator "
                "learns from the discriminator alone"
            )
        if self.bias_batches < 0:
            raise InputError(f"gan.bias_batches is {self.bias_batches}; it must be 0 or more")
        if self.bias_batches and not isinstance(self.module.generator, MLPGenerator):
            kind = type(self.module.generator).__name__
            raise InputError(f"a {kind} has no output bias for each pixel; set gan.bias_batches=0")

    def optimizer_of(self, player: str) -> Optimizer:
        """The "generator"'s or the "discriminator"'s."""
        return self.optimizer if player == GENERATOR else self.discriminator_optimizer or self.optimizer

    def turns(self, player: str) -> tuple[bool, ...]:
        """The cycle of steps, True where they are the player's."""
        return tuple((number == self.discriminator_steps) == (player == GENERATOR) for number in range(self.cycle))

    def steps_of(self, player: str) -> int:
        """How many of `steps` are the player's."""
        turns, (cycles, rest) = self.turns(player), divmod(self.steps, self.cycle)
        return cycles * sum(turns) + sum(turns[:rest])

    @property
    def cycle(self) -> int:
        """The steps from one of the generator to the next."""
        return self.discriminator_steps + 1

    def build(self, stages: Mapping[str, LoadedStage]) -> GANTask:
        return GANTask(recipe=self)

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        training = {**described["training"]}
        if self.discriminator_optimizer is not None:
            training["discriminator_optimizer"] = dataclasses.asdict(self.discriminator_optimizer)
        return {**described, "training": training}


@dataclass(frozen=True, kw_only=True)
class GANTask(LatentTask):
    """Metrics: discriminator_loss and generator_loss, in nats, and "loss", their sum; discriminator_gradient_norm and
    generator_gradient_norm, before clipping; real_accuracy and fake_accuracy, the share of images that the
    discriminator knows for what they are; real_probability and fake_probability, the mean D(x) and D(G(z));
    sample_distance and data_distance (`pairwise_distance`); learning_rate, the generator's.

    Both players' gradients are taken in every step, and one of them is used: so every step has all metrics, and one
    program serves both. XLA for CPUs takes ten times as long for convolutions in a branch of `lax.cond` (jaxlib 0.10),
    which would spare the other player's."""

    recipe: GANRecipe

    def init(self, key: jax.Array) -> Parameters:
        return self.module.init(key, jnp.zeros((1, self.module.latent_size)))["params"]

    def fit(
        self, batches: Iterator[Batch], frozen: Parameters, mesh: Mesh, log: Callable[[str], None]
    ) -> dict[str, Any]:
        """The logits of the mean image, if the recipe asks for them."""
        if not self.recipe.bias_batches:
            return {}
        mean_image = jax.jit(lambda batch: to_unit(self._images(batch)).mean(0), out_shardings=replicate(mesh))
        found = [np.asarray(mean_image(next(batches)), np.float64) for _ in range(self.recipe.bias_batches)]
        marginals = np.clip(np.mean(found, axis=0), LEAST_MARGINAL, 1 - LEAST_MARGINAL)
        return {GENERATOR: {"out": {"bias": np.log(marginals / (1 - marginals)).ravel()}}}

    def gradient_transformation(self) -> optax.GradientTransformation:
        def of(player: str) -> optax.GradientTransformation:
            steps = self.recipe.steps_of(player)
            return in_turn(self.recipe.optimizer_of(player).gradient_transformation(steps), self.recipe.turns(player))

        return by_part({player: of(player) for player in (GENERATOR, DISCRIMINATOR)})

    def init_extra(self) -> dict[str, jax.Array]:
        """Steps taken, micro-batches of this one, and the last noise's key."""
        zero, key = jnp.zeros((), jnp.int32), jax.random.key(0)
        return {"step": zero, "micro_batch": zero, "noise_key": jax.random.key_data(key)}

    def loss(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, extra: dict[str, jax.Array]):
        recipe, images = self.recipe, self._images(batch)
        noise_key, real_key, fake_key = jax.random.split(key, 3)
        noise, noise_key = self.noise(noise_key, len(images), extra)
        made = self._generate(params, noise)
        real = self._logits(params, images, real_key)
        fake = self._logits(params, jax.lax.stop_gradient(made), fake_key)
        # The same logits, as a function of the generator alone.
        fooled = self._logits(jax.lax.stop_gradient(params), made, fake_key)
        losses = discriminator_loss(real, fake), generator_loss(fooled, recipe.objective)
        rate = learning_rate_schedule(recipe.optimizer, recipe.steps_of(GENERATOR))
        metrics = {
            "discriminator_loss": losses[0],
            "generator_loss": losses[1],
            **judged(real, fake),
            "sample_distance": pairwise_distance(made),
            "data_distance": pairwise_distance(images),
            "learning_rate": rate(extra["step"] // recipe.cycle),
        }
        done = extra["micro_batch"] + 1
        last = done == recipe.optimizer.accumulation
        extra = {
            "step": extra["step"] + last.astype(jnp.int32),
            "micro_batch": jnp.where(last, 0, done),
            "noise_key": noise_key,
        }
        return sum(losses), metrics, extra

    def gradient_metrics(self, gradient: Parameters) -> dict[str, jax.Array]:
        return {f"{player}_gradient_norm": optax.tree.norm(part) for player, part in gradient.items()}

    def noise(self, key: jax.Array, count: int, extra: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The noise `[count, z]` of a micro-batch, and its step's key as data: `key`, or that of the last step."""
        is_generators = extra["step"] % self.recipe.cycle == self.recipe.discriminator_steps
        again = (extra["micro_batch"] > 0) | (is_generators & self.recipe.reuse_noise)
        used = jnp.where(again, extra["noise_key"], jax.random.key_data(key))
        key = jax.random.fold_in(jax.random.wrap_key_data(used), extra["micro_batch"])
        return gan_noise(key, self.module, count), used

    def _generate(self, params: Parameters, noise: jax.Array) -> jax.Array:
        return self.module.apply({"params": params}, noise, method="generate")

    def _logits(self, params: Parameters, images: jax.Array, key: jax.Array | None) -> jax.Array:
        """With dropout by the key; None: without."""
        rngs = None if key is None else {"dropout": key}
        return self.module.apply({"params": params}, images, key is None, rngs=rngs, method="discriminate")

    def validate(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        """The metrics but for those of gradients, without dropout. "loss" is `divergence_bound`: from 0, where the
        discriminator cannot tell samples from held-out images, to log 2, where it always can. It is what this
        discriminator sees, and falls too where that gets worse."""
        images = self._images(batch)
        made = sample_gan(key, self.module, params, len(images))
        real, fake = self._logits(params, images, None), self._logits(params, made, None)
        return {
            "loss": divergence_bound(real, fake),
            "discriminator_loss": discriminator_loss(real, fake),
            "generator_loss": generator_loss(fake, self.recipe.objective),
            **judged(real, fake),
            "sample_distance": pairwise_distance(made),
            "data_distance": pairwise_distance(images),
        }

    def preview(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> jax.Array:
        """Samples, of the same noise for the same key."""
        return in_colour(sample_gan(key, self.module, params, len(batch["image"])))

    def remark(self, step: int, values: Mapping[str, float]) -> str | None:
        """That one player has won, once a tenth of the steps is over."""
        found = failure(values) if step > QUIET * self.recipe.steps else None
        return None if found is None else FAILURES[found]


def judged(real: jax.Array, fake: jax.Array) -> dict[str, jax.Array]:
    """How the discriminator's logits `[b]` of real and of generated images tell these apart."""
    return {
        "real_accuracy": jnp.mean(real > 0),
        "fake_accuracy": jnp.mean(fake < 0),
        "real_probability": jax.nn.sigmoid(real).mean(),
        "fake_probability": jax.nn.sigmoid(fake).mean(),
    }
