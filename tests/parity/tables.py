"""References' weights through the library's own tables."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dalle2_jax.weights.table import Table
from dalle2_jax.weights.tensors import Tensors

PREFIX = "weights/"


def convert(
    table: Table, model: Any, reference: dict[str, np.ndarray], *inputs: Any, without: Sequence[str] = (), **named: Any
) -> Any:
    """The parameters of `model` from the arrays below `weights/`; `inputs` and `named` are its call's."""
    arrays = {key.removeprefix(PREFIX): reference[key] for key in reference if key.startswith(PREFIX)}
    arrays = {key: array for key, array in arrays.items() if key not in without}
    shapes = {key: array.shape for key, array in arrays.items()}
    tensors = Tensors("the reference", shapes, {key: str(array.dtype) for key, array in arrays.items()}, arrays.get)
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **named))["params"]
    return table.convert(tensors, expected)
