"""CLIP's recipe: what it refuses."""

import dataclasses

import pytest

from configs import shapes
from dalle2_jax.errors import InputError

RECIPE = shapes.system().stages["clip"]


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 1), (4, 4), (6, 4)])
def test_an_example_alone_is_nothing_to_contrast(batch, accumulation):
    """Its loss is 0 whatever the network says."""
    optimizer = dataclasses.replace(RECIPE.optimizer, accumulation=accumulation)
    with pytest.raises(InputError, match=f"clip.batch_size is {batch} in {accumulation} .* must have 2 examples"):
        dataclasses.replace(RECIPE, batch_size=batch, optimizer=optimizer)
    dataclasses.replace(RECIPE, batch_size=2 * accumulation, optimizer=optimizer)


@pytest.mark.parametrize("changes", [{"chunk": 0}, {"chunk": 3}, {"grayscale": 1.5}, {"grayscale": float("nan")}])
def test_fields_out_of_range(changes):
    ((name, _),) = changes.items()
    with pytest.raises(InputError, match=f"clip.{name} is"):
        dataclasses.replace(RECIPE, **changes)
