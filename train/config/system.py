"""What a config file says: a `System` is data, a tokenizer's size and one `Recipe` a stage, in training order.

A recipe is a frozen dataclass, so that any field can be overridden on the command line by its path
(`decoder.optimizer.learning_rate=1e-4`), and it holds the network as a Linen module, which is its own config.
`recipe.build(stages)` binds the networks of earlier stages; the `Task` that it returns is all the loop knows of a
stage.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from dalle2_jax.data.dataset import Data
from dalle2_jax.errors import InputError
from dalle2_jax.layers.fields import module_fields
from dalle2_jax.sharding import DEFAULT_RULES, SMALLEST_SPLIT, Rules
from train.config.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class System:
    """One cascade: its data, tokenizer, stages in training order.

    vocabulary_size, context_length: of the tokenizer; None where no stage reads captions.
    optional: names of stages that `all` leaves out; they are trained by name.
    sharding, smallest_split: how parameters are split over a mesh (`dalle2_jax.sharding.partition`).
    given: folders of finished stages, by the names that they have here, which are taken as they are (see
    `train.run.given`). A stage that is given and also one of `stages` is the given one until it is trained.
    """

    name: str
    data: Data
    stages: dict[str, Recipe]
    vocabulary_size: int | None = None
    context_length: int | None = None
    given: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    sharding: Rules = DEFAULT_RULES
    smallest_split: int = SMALLEST_SPLIT

    @property
    def reads_captions(self) -> bool:
        """Whether any of its stages does, so that it has a tokenizer."""
        return any(recipe.reads_captions for recipe in self.stages.values())

    @property
    def usual_stages(self) -> list[str]:
        """The names of the stages that `all` trains."""
        return [name for name in self.stages if name not in self.optional]

    def __post_init__(self) -> None:
        if not self.reads_captions:
            return
        for name in ("vocabulary_size", "context_length"):
            if getattr(self, name) is None:
                readers = ", ".join(stage for stage, recipe in self.stages.items() if recipe.reads_captions)
                raise InputError(f"{self.name} has stages that read captions ({readers}) and no {name}; set it")
        for stage, recipe in self.stages.items():
            if not recipe.reads_captions:
                continue  # its tokens and their number, if it has any, are its own
            for path, own, value in module_fields(recipe.module, f"{stage}.module"):
                if own.name == "vocabulary_size" and value is not None and value < self.vocabulary_size:
                    raise InputError(
                        f"{path} is {value} but the tokenizer may have {self.vocabulary_size} tokens; "
                        f"set {path}={self.vocabulary_size}, or a smaller vocabulary_size"
                    )
                if own.name == "context_length" and value != self.context_length:
                    raise InputError(
                        f"{path} is {value} but captions have {self.context_length} tokens; "
                        f"set {path}={self.context_length}, or another context_length"
                    )

    def with_stage(self, name: str, recipe: Recipe) -> System:
        """This system with one stage's recipe replaced."""
        return dataclasses.replace(self, stages={**self.stages, name: recipe})
