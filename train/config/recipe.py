"""How one stage is trained: the recipe that a config says, and the task that it builds for the loop."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.errors import InputError, check_number
from dalle2_jax.layers.fields import module_fields
from train.config.optimizer import Optimizer

Batch = Mapping[str, jax.Array]
Parameters = Any

# Not float16, whose small gradients would need a scaled loss to be other than 0.
DTYPES = ("float32", "bfloat16")


def check_share(path: str, value: float) -> None:
    """Raises InputError unless `value` lies in 0 to 1."""
    if not 0 <= value <= 1:
        raise InputError(f"{path} is {value}; it must lie in 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """How one stage is trained, as the config says it. Subclasses give `kind`, `needs`, `reads_captions` and `build`.

    kind: what the stage does in a run (`checkpoint.run.KINDS`), or a kind of your own. needs: kinds of the earlier
    stages that it is built on. reads_captions: whether its batches have tokens; the system then needs a tokenizer.
    training_fields: fields that its record has under "training".

    init_from: the folder of a trained stage to start from (runs/emoji/decoder), instead of random parameters.
    """

    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    reads_captions: ClassVar[bool] = True
    training_fields: ClassVar[tuple[str, ...]] = ()

    module: nn.Module
    steps: int
    batch_size: int
    optimizer: Optimizer = field(default_factory=Optimizer)
    seed: int = 0
    init_from: str | None = None
    log_every: int = 50
    validate_every: int = 1000
    validation_batches: int = 4
    preview_every: int = 2000
    preview_count: int = 8
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "preview_count"):
            check_number(f"{self.kind}.{name}", getattr(self, name), at_least=1, whole=True)
        for name in ("validate_every", "validation_batches", "preview_every", "checkpoint_every"):
            check_number(f"{self.kind}.{name}", getattr(self, name), at_least=0, whole=True)
        check_number(f"{self.kind}.seed", self.seed, at_least=0, below=2**32, whole=True)
        for path, own, value in module_fields(self.module, f"{self.kind}.module"):
            if own.name in ("dtype", "param_dtype") and value not in DTYPES:
                raise InputError(f"{path} is {value!r}; it must be one of {', '.join(DTYPES)}")
            least = own.metadata.get("minimum", 1)
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise InputError(f"{path} is {value}; it must be {least} or more")

    @property
    def classes(self) -> int | None:
        """How many classes the labels in its batches are of; None: it reads no labels."""
        return None

    @property
    def output_size(self) -> int | None:
        """The side of the images that the stage learns to make, of which the data must not be smaller; None: any."""
        return None

    @abstractmethod
    def build(self, stages: Mapping[str, LoadedStage]) -> Task:
        """The task, with the networks of the earlier stages, by kind, bound to it. Parameters may be shapes."""

    def describe(self) -> dict[str, Any]:
        """What makes the trained stage what it is (entries of a `StageRecord`, others go to its `extra`)."""
        training = {name: getattr(self, name) for name in self.training_fields}
        return {"kind": self.kind, "module": self.module, "training": training}


@dataclass(frozen=True)
class BatchSpec:
    """What a task wants to be in its batches: `{"image": uint8 [b, h, w, 3], "index": int32 [b]}`, and more.

    image_size: the side of the images it looks at, so that the host need not send larger ones; None: as the data has.
    captions: whether there are "tokens" int32 `[b, n]` and their "mask" bool `[b, n]`.
    labels: whether there is "label" int32 `[b]`, the class of each image.
    transform: what the host makes of each training image (uint8 `[h, w, 3]`): entries of the batch in place of "image".
    """

    image_size: int | None = None
    captions: bool = True
    labels: bool = False
    transform: Callable[[np.ndarray, np.random.Generator], dict[str, np.ndarray]] | None = None


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A stage as the loop trains it: a recipe with the networks of earlier stages bound to it.

    frozen: the parameters of the earlier stages by kind, which the loop places and passes to the functions below.
    """

    recipe: Recipe
    frozen: Parameters = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        return self.recipe.module

    def with_module(self, module: nn.Module) -> Task:
        """The same task of another network."""
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, module=module))

    @property
    def batch_spec(self) -> BatchSpec:
        """What its batches hold."""
        return BatchSpec(captions=self.recipe.reads_captions, labels=self.recipe.classes is not None)

    def gradient_transformation(self) -> optax.GradientTransformation:
        """Gradients to changes of the parameters; another one a part of them: `train.config.optimizer.by_part`."""
        return self.recipe.optimizer.gradient_transformation(self.recipe.steps)

    @abstractmethod
    def init(self, key: jax.Array) -> Parameters:
        """The parameters at step 0."""

    def fit(
        self, batches: Iterator[Batch], frozen: Parameters, mesh: Mesh, log: Callable[[str], None]
    ) -> dict[str, Any]:
        """Parameters that are computed from the training data before the first step: a part of the tree of them.

        They stand in place of what `init` gives for them. batches: endless, on the devices. Called in every process,
        and has to give the same in each.
        """
        return {}

    def init_extra(self) -> Any:
        """What is kept from step to step beside the parameters, a pytree; None: nothing."""
        return None

    @abstractmethod
    def loss(
        self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, extra: Any
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        """The training loss, a float32 scalar; a dict of scalar metrics; and `extra` after the step."""

    @abstractmethod
    def validate(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        """Scalar metrics on held-out data, without dropout or dropped conditioning; `"loss"` among them."""

    def preview(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> jax.Array | None:
        """uint8 images `[n, h, w, 3]`, one an example of the batch, or None where a stage has nothing to show."""
        return None

    def gradient_metrics(self, gradient: Parameters) -> dict[str, jax.Array]:
        """More scalar metrics of a training step, of its gradient before clipping."""
        return {}

    def remark(self, step: int, values: Mapping[str, float]) -> str | None:
        """What the user should hear of the means over the logging interval that ends with `step` (of the training
        step's metrics), one sentence; None: nothing. The loop says each sentence once."""
        return None

    def measure(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        """What of the trained network is measured on held-out data when its training ends, for its record."""
        return {}
