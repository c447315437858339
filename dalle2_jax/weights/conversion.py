"""What a conversion is: one stage to be, its tensors, and where each goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.weights.table import Table
from dalle2_jax.weights.tensors import Tensors, WeightsError


@dataclass(frozen=True)
class Part:
    """Parameters that are counted together: those below `prefix`, or with "" all that no other part counts.

    published: how many the published network has; None: nobody says.
    """

    name: str
    prefix: str = ""
    published: int | None = None


@dataclass(frozen=True)
class Conversion:
    """One stage to be: our module, whose parameters `table` makes of `tensors`.

    inputs: shapes by which the module is built, the arguments of its `method`. record: what `stage.json` says beside
    the module: process, sampling, sizes, tokenizer. needs: kinds of stages that it was trained on. parts: how its
    parameters are counted; () as one.
    """

    name: str
    kind: str
    module: nn.Module
    table: Table
    tensors: Tensors
    inputs: dict[str, jax.ShapeDtypeStruct]
    record: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    method: str = "__call__"
    parts: tuple[Part, ...] = ()

    @cached_property
    def shapes(self) -> Any:
        """Our parameters, as shapes."""

        def init(inputs: dict[str, jax.Array]) -> Any:
            return self.module.init(jax.random.key(0), **inputs, method=self.method)

        return jax.eval_shape(init, self.inputs)["params"]

    def parameter_counts(self) -> list[str]:
        """A line a part: its parameters, and how many the published one has."""
        counts = {name: count_parameters(tree) for name, tree in self.shapes.items()}
        prefixes = {part.prefix for part in self.parts}
        lines = []
        for part in self.parts or (Part(self.name),):
            own = [name for name in counts if name == part.prefix or (not part.prefix and name not in prefixes)]
            line = f"{part.name}: {sum(counts[name] for name in own):,} parameters"
            lines.append(line + (f" (published: {part.published:,})" if part.published else ""))
        return lines


@contextmanager
def settings_of(where: str) -> Iterator[None]:
    """For reading the settings of `where` or building a network by them: what trips over them is a WeightsError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise WeightsError(
            f"the settings of {where} are not what they should be ({type(error).__name__}: {error}); is it the "
            "folder of another model?"
        ) from error


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An input's shape."""
    return jax.ShapeDtypeStruct(shape, dtype)
