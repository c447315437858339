"""The autoencoder: parameter counts, the linear one against principal components, shapes of the convolutional one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.errors import InputError
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.lineage.autoencoder import (
    Autoencoder,
    ConvDecoder,
    ConvEncoder,
    MLPDecoder,
    MLPEncoder,
    autoencoder_loss,
    reconstruct,
)

LATENTS, SIDE, COUNT = 3, 4, 40


def shapes(module):
    size = module.image_size
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, module.channels)))["params"]


def test_the_linear_one_is_at_its_best_at_the_principal_components():
    """No gradient there, and what is lost is the sum of the other eigenvalues, of numpy's covariance in float64."""
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(COUNT, 16)) @ (rng.normal(size=(16, 16)) * 0.9 ** np.arange(16)) * 0.1
    mean = flat.mean(0)
    eigenvalues, vectors = np.linalg.eigh(np.cov(flat.T, bias=True))
    first = vectors[:, ::-1][:, :LATENTS]
    lost = eigenvalues[::-1][LATENTS:].sum()

    module = Autoencoder(MLPEncoder(()), MLPDecoder(()), LATENTS, SIDE)
    params = {
        "latent": {"kernel": first, "bias": -mean @ first},
        "decoder": {"out": {"kernel": first.T, "bias": mean}},
    }
    params = jax.tree.map(jnp.float32, params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes(module))
    images = jnp.float32(flat.reshape(COUNT, SIDE, SIDE, 1))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return autoencoder_loss(module.apply({"params": params}, images), images).mean()

    found, gradient = loss(params)
    assert float(found) * 16 == pytest.approx(lost, rel=1e-4)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    # Elsewhere it is worse, and has a gradient.
    turned = jax.tree.map(lambda leaf: leaf, params)
    turned["latent"]["kernel"] = jnp.float32(vectors[:, ::-1][:, 1 : LATENTS + 1])
    worse, other = loss(turned)
    assert largest < 1e-5 and float(worse) > float(found)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(other)) > 1e-3


def test_losses_by_hand():
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (2, 2, 2, 3)).astype(np.float32)
    outputs = rng.normal(size=images.shape).astype(np.float32)
    squared = ((images.astype(float) - outputs) ** 2).reshape(2, -1).mean(1)
    np.testing.assert_allclose(autoencoder_loss(outputs, images), squared, rtol=1e-5)
    p, x = 1 / (1 + np.exp(-outputs.astype(float))), (images.astype(float) + 1) / 2
    crossed = -(x * np.log(p) + (1 - x) * np.log(1 - p)).reshape(2, -1).mean(1)
    np.testing.assert_allclose(autoencoder_loss(outputs, images, "bce"), crossed, rtol=1e-5)


@pytest.mark.parametrize(("size", "channels", "levels"), [(8, 3, 3), (12, 1, 2)])
def test_the_convolutional_one(size, channels, levels):
    widths = (4, 6, 8)[:levels]
    module = Autoencoder(ConvEncoder(widths), ConvDecoder(widths[::-1]), 5, size, channels, loss_kind="bce")
    side, features = size // 2**levels, widths[-1]
    ins, outs = (channels, *widths), (*widths[::-1], channels)
    convolutions = sum(9 * a * b + b for a, b in [*zip(ins, ins[1:], strict=False), *zip(outs, outs[1:], strict=False)])
    dense = side * side * features * 5
    assert count_parameters(shapes(module)) == convolutions + dense + 5 + dense + side * side * features
    images = jax.random.uniform(jax.random.key(0), (2, size, size, channels), minval=-1.0)

    @jax.jit
    def run(images):
        params = module.init(jax.random.key(1), images)["params"]

        def encode(images):
            latent = module.apply({"params": params}, images, method="encode")
            return latent.sum(), latent

        gradient, latent = jax.grad(encode, has_aux=True)(images)
        return latent, module.apply({"params": params}, images), reconstruct(module, params, images), gradient

    latent, outputs, shown, gradient = run(images)
    assert latent.shape == (2, 5) and shown.shape == images.shape and shown.dtype == jnp.float32
    np.testing.assert_allclose(shown, 2 / (1 + np.exp(-np.asarray(outputs, float))) - 1, atol=1e-6)
    # Every pixel counts in the latent, those at the borders too.
    assert (np.abs(gradient).max(-1) > 0).mean() > 0.9


def test_bfloat16_is_inside_alone():
    fields = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    module = Autoencoder(ConvEncoder((4,), **fields), ConvDecoder((4,), **fields), 2, 4, param_dtype="bfloat16")
    leaves = jax.tree.leaves(shapes(module))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    outputs = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))[0])
    assert outputs.dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Autoencoder(latent_size=0), "latent_size is 0; it must be 1 or more"),
        (lambda: Autoencoder(loss_kind="l1"), "loss_kind is 'l1'; it must be mse or bce"),
        (lambda: Autoencoder(ConvEncoder()), "image_size is 28, which cannot be halved 3 times, as the encoder does"),
        (lambda: Autoencoder(decoder=ConvDecoder((1,) * 5), image_size=48), "a multiple of 32, or give decoder.widths"),
        (lambda: MLPEncoder(activation="relu6"), "MLPEncoder.activation is 'relu6'; it must be one of relu, tanh"),
        (lambda: ConvDecoder(()), "ConvDecoder.widths is empty"),
        (lambda: MLPDecoder((5, 0)), r"MLPDecoder has layers of widths \(5, 0\); each must be 1 or more"),
        (lambda: autoencoder_loss(jnp.zeros(1), jnp.zeros(1), "l1"), "loss is 'l1'; it must be mse or bce"),
        (
            lambda: jax.eval_shape(Autoencoder().init, jax.random.key(0), jnp.zeros((2, 28, 28, 3))),
            r"the images must be \[b, 28, 28, 1\], not \[2, 28, 28, 3\]",
        ),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")
