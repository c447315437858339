"""DDPM's network against diffusers' UNet2DModel, and its bits per dimension against improved-diffusion's loop."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import variational_bound
from dalle2_jax.layers.unet import UNet
from dalle2_jax.lineage.ddpm import CIFAR10_UNET, DDPM, PROCESS, bits_per_dimension, for_evaluation
from dalle2_jax.weights.sources.unet import Diffusers, unet_entries
from dalle2_jax.weights.table import Table
from tests.parity.closeness import close
from tests.parity.drawn_weights import draw, noise
from tests.parity.reference import reference_path
from tests.parity.tables import convert

UNET: UNet = CIFAR10_UNET.clone(
    image_size=16, channels=16, channel_multipliers=(1, 2, 2), depth=1, attention_resolutions=(8,), groups=8
)
MODULE = DDPM(UNET, condition="class", num_classes=3)


@pytest.fixture(scope="module")
def reference():
    with np.load(reference_path("ddpm")) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def params(reference):
    table = Table()
    unet_entries(table, Diffusers(UNET), "unet/")
    table.plain("class_embedding/embedding", "class_embedding.weight")
    weights = {f"weights/{name}": value for name, value in draw(json.loads(str(reference["shapes"]))).items()}
    inputs = [reference[f"input/{name}"] for name in ("x_t", "timesteps", "labels")]
    return convert(table, MODULE, weights, *inputs)


def noises(shape, steps):
    return np.stack([noise(f"bound/{step}", shape) for step in range(steps)])


def test_the_network(reference, params):
    """A withheld label is the last row of theirs; dropout is off in both."""
    labels, keep = np.array([2, 1, 0], np.int32), np.array([True, False, True])
    assert reference["input/labels"].tolist() == [2, 3, 0]
    arguments = reference["input/x_t"], reference["input/timesteps"], labels
    found = jax.jit(MODULE.apply)({"params": params}, *arguments, keep=keep)
    close(found, reference["output"])


def test_bits_per_dimension_of_the_network(reference, params):
    images = jnp.asarray(reference["input/images"] / 127.5 - 1, jnp.float32)
    process = PROCESS.respaced("20")
    run = jax.jit(functools.partial(bits_per_dimension, jax.random.key(0), MODULE, process=process, labels=[1, 2]))
    found = run(params=params, images=images, noise=noises(images.shape, 20))
    for name in ("total", "prior", "terms", "mse"):
        np.testing.assert_allclose(found[name], reference[f"network/fixed_large/{name}"], rtol=3e-4, err_msg=name)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_the_bound_over_all_thousand_steps(reference, variance):
    images = jnp.asarray(reference["input/small_images"] / 127.5 - 1, jnp.float32)
    process = for_evaluation(dataclasses.replace(PROCESS, variance=variance))

    @jax.jit
    def run(images, added):
        return variational_bound(jax.random.key(0), lambda x, t: 0.9 * x + 0.1 * jnp.tanh(x), images, process, added)

    found = run(images, noises(images.shape, 1000))
    for name in ("total", "prior", "mse"):
        np.testing.assert_allclose(found[name], reference[f"function/{variance}/{name}"], rtol=3e-4, err_msg=name)
    terms = reference[f"function/{variance}/terms"]
    np.testing.assert_allclose(found["terms"], terms, rtol=3e-4, atol=1e-6)
