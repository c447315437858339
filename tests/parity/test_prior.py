"""The diffusion prior against diffusers' PriorTransformer (references/prior.npz, written by make_prior.py)."""

import jax
import numpy as np
import pytest

from dalle2_jax.layers.stacking import unstack_layers
from dalle2_jax.prior import DiffusionPrior
from dalle2_jax.weights.sources.prior import STATISTICS, prior_table
from tests.parity.reference import reference_path
from tests.parity.tables import convert

# Karlo's inputs come unscaled.
MODEL = DiffusionPrior(
    embedding_size=16, width=24, depth=3, heads=2, context_length=9, embedding_scale=1.0, learned_null=False
)


@pytest.fixture(scope="module")
def reference():
    with np.load(reference_path("prior")) as file:
        return dict(file)


@pytest.fixture(scope="module")
def params(reference):
    inputs = _inputs(reference, reference["input/text_mask"])
    return convert(prior_table(MODEL), MODEL, reference, *inputs, without=STATISTICS)


def test_a_prior_of_layers_by_themselves(reference, params):
    """The same tensors for the other place where layers lie, and the same answer."""
    model, inputs = MODEL.clone(scan_layers=False), _inputs(reference, reference["input/text_mask"])
    apart = convert(prior_table(model), model, reference, *inputs, without=STATISTICS)
    jax.tree.map(np.testing.assert_array_equal, apart, unstack_layers(params))
    expected = reference["output/padded"]
    predicted = jax.jit(model.apply)({"params": apart}, *inputs)
    np.testing.assert_allclose(predicted, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def _inputs(reference, mask):
    names = ("noised_image_embedding", "timesteps", "text_embedding", "text_states")
    return *(reference[f"input/{name}"] for name in names), mask


@pytest.mark.parametrize("output", ["padded", "unpadded"])
def test_prediction(reference, params, output):
    mask = reference["input/text_mask"] if output == "padded" else np.ones_like(reference["input/text_mask"])
    predicted = jax.jit(MODEL.apply)({"params": params}, *_inputs(reference, mask))
    expected = reference[f"output/{output}"]
    np.testing.assert_allclose(predicted, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
