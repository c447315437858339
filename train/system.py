"""What a config file says: a `System` is data, a tokenizer's size and one `Recipe` a stage, in training order.

A recipe is all the loop knows of a stage. It is a frozen dataclass, so that any field can be overridden on the command
line by its path (`decoder.optimizer.learning_rate=1e-4`), and it holds the network as a Linen module, which is its own
config.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np

from dalle2_jax.checkpoint.rebuild import field_names
from dalle2_jax.data.pipeline import Data
from dalle2_jax.errors import InputError

Batch = Mapping[str, jax.Array]
Parameters = Any

DTYPES = ("float32", "bfloat16", "float16")
SIZES = ("image_size", "patch_size", "patch", "width", "heads", "channels", "head_channels", "groups", "embedding_size")


def module_fields(module: nn.Module, path: str) -> Iterator[tuple[str, str, Any]]:
    """(path, name, value) of every field of a network and of the networks among its fields."""
    for name in field_names(type(module)) if isinstance(module, nn.Module) else ():
        value = getattr(module, name)
        if isinstance(value, nn.Module):
            yield from module_fields(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}", name, value


def check_share(path: str, value: float) -> None:
    """Raises InputError unless `value` lies in 0 to 1."""
    if not 0 <= value <= 1:
        raise InputError(f"{path} is {value}; it must lie in 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW with warm-up, gradient clipping, accumulation and an exponential moving average of the parameters.

    moment_dtype: in which the first moment is kept: "bfloat16" spares 2 bytes a parameter of the device's memory and 4
    of what a step reads and writes; None: as the parameters.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: str = "constant"  # after the warm-up: "constant" | "cosine" (to zero at the last step)
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    accumulation: int = 1
    ema_decay: float = 0.9999
    moment_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise InputError(f"optimizer.schedule is {self.schedule!r}; it must be 'constant' or 'cosine'")
        if self.moment_dtype not in (None, "float32", "bfloat16"):
            raise InputError(f"optimizer.moment_dtype is {self.moment_dtype!r}; it must be None, float32 or bfloat16")


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """How one stage is trained. Subclasses give `kind`, `needs` and the methods below; the loop calls nothing else.

    init_from: the folder of a trained stage to start from (runs/emoji/decoder), instead of random parameters.

    Shapes: a batch is `{"image": uint8 [b, h, w, 3], "tokens": int32 [b, n], "mask": bool [b, n]}`.
    """

    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

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
            if getattr(self, name) < 1:
                raise InputError(f"{self.kind}.{name} is {getattr(self, name)}; it must be 1 or more")
        for path, name, value in module_fields(self.module, f"{self.kind}.module"):
            if name in ("dtype", "param_dtype") and value not in DTYPES:
                raise InputError(f"{path} is {value!r}; it must be one of {', '.join(DTYPES)}")
            if name in SIZES and value is not None and value < 1:
                raise InputError(f"{path} is {value}; it must be 1 or more")

    @property
    def picture_size(self) -> int | None:
        """The side of the pictures that the stage looks at, so that the host need not send larger ones; None: any."""
        return None

    @property
    def drawn_size(self) -> int | None:
        """The side of the pictures that the stage learns to draw, of which the data must not be smaller; None: any."""
        return None

    def prepare(self) -> Callable[[np.ndarray, np.random.Generator], dict[str, np.ndarray]] | None:
        """What the host does to each training picture (uint8 [h, w, 3]): entries of the batch; None: nothing."""
        return None

    def init_carry(self) -> Any:
        """What a recipe keeps from step to step beside the parameters, a pytree; None: nothing.

        `loss` finds it as `frozen["carry"]`, and what it gives as `metrics["carry"]` goes to `update_carry`.
        """
        return None

    def update_carry(self, carry: Any, seen: Any) -> Any:
        """The carry after a step."""
        return carry

    def attach(self, stages: Mapping[str, Any]) -> tuple[Recipe, Parameters]:
        """Binds the earlier stages' networks into the recipe; returns it and the pytree of their parameters."""
        return self, {}

    @abstractmethod
    def init(self, key: jax.Array) -> Parameters:
        """The parameters at step 0."""

    @abstractmethod
    def loss(
        self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The training loss, a float32 scalar, and a dict of scalar metrics."""

    @abstractmethod
    def validate(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        """Scalar metrics on held-out data, without dropout or dropped conditioning; `"loss"` among them."""

    def preview(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> jax.Array | None:
        """uint8 pictures `[n, h, w, 3]`, one a caption of the batch, or None where a stage has nothing to show."""
        return None

    def measure(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        """What of the trained network is measured on held-out data when its training ends, for `stage.json`."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What makes the trained stage what it is (JSON-able values and dataclasses), recorded in `stage.json`."""
        return {"kind": self.kind, "module": self.module}


@dataclass(frozen=True, kw_only=True)
class System:
    """One cascade: its data, tokenizer, stages in training order.

    given: folders of finished stages, by the names that they have here, which are taken as they are (see
    `train.given`). A stage that is given and also one of `stages` is the given one until it is trained.
    """

    name: str
    data: Data
    vocabulary_size: int
    context_length: int
    stages: dict[str, Recipe]
    given: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for stage, recipe in self.stages.items():
            for path, name, value in module_fields(recipe.module, f"{stage}.module"):
                if name == "vocabulary_size" and value is not None and value < self.vocabulary_size:
                    raise InputError(
                        f"{path} is {value} but the tokenizer may have {self.vocabulary_size} tokens; "
                        f"set {path}={self.vocabulary_size}, or a smaller vocabulary_size"
                    )
                if name == "context_length" and value != self.context_length:
                    raise InputError(
                        f"{path} is {value} but captions have {self.context_length} tokens; "
                        f"set {path}={self.context_length}, or another context_length"
                    )

    def with_stage(self, name: str, recipe: Recipe) -> System:
        """This system with one stage's recipe replaced."""
        return dataclasses.replace(self, stages={**self.stages, name: recipe})
