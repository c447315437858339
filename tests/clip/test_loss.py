"""The contrastive loss against a plain numpy formula, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.clip import contrastive_loss
from dalle2_jax.sharding import batch_sharding, make_mesh


@pytest.fixture(scope="module")
def embeddings():
    random = np.random.default_rng(3)
    image = random.normal(size=(16, 6)).astype(np.float32)
    text = image + random.normal(size=(16, 6)).astype(np.float32)
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))


def _expected(image, text, scale):
    total, image_hits, text_hits = 0.0, 0, 0
    for i in range(len(image)):
        to_text = [scale * float(image[i].astype(np.float64) @ t) for t in text]
        to_image = [scale * float(text[i].astype(np.float64) @ z) for z in image]
        for row in (to_text, to_image):
            total += np.log(np.sum(np.exp(row))) - row[i]
        image_hits += to_text[i] == max(to_text)
        text_hits += to_image[i] == max(to_image)
    return total / (2 * len(image)), image_hits / len(image), text_hits / len(image)


def test_against_numpy(embeddings):
    loss, metrics = contrastive_loss(*embeddings, jnp.float32(10.0))
    expected, image_to_text, text_to_image = _expected(*embeddings, 10.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert 0 < image_to_text < 1 and image_to_text != text_to_image, "the case tells the two directions apart"
    np.testing.assert_allclose(metrics["accuracy_image_to_text"], image_to_text)
    np.testing.assert_allclose(metrics["accuracy_text_to_image"], text_to_image)


def test_eight_devices_equal_one(embeddings):
    function = jax.value_and_grad(contrastive_loss, argnums=(0, 1, 2), has_aux=True)
    expected = jax.jit(function)(*embeddings, jnp.float32(10.0))
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    image, text = (jax.device_put(x, split) for x in embeddings)
    result = jax.jit(function, in_shardings=(split, split, whole))(image, text, jnp.float32(10.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), result, expected)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunks_give_the_plain_loss(embeddings, chunk, devices):
    def function(image, text, scale, chunk):
        return jax.value_and_grad(contrastive_loss, argnums=(0, 1, 2), has_aux=True)(image, text, scale, chunk)

    scale = jnp.float32(20.0)
    expected = jax.jit(function, static_argnums=3)(*embeddings, scale, None)
    split = batch_sharding(make_mesh(devices=jax.devices()[:devices]))
    image, text = (jax.device_put(x, split) for x in embeddings)
    result = jax.jit(function, static_argnums=3)(image, text, scale, chunk)
    # Where a row is sure of its own, its gradient is what is left of two terms of the size of the scale.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-7 * scale), result, expected)


def test_chunks_spare_the_full_logits():
    """Forwards and backwards, no array of the compiled program has a row for each image and a column for each."""
    images = jax.ShapeDtypeStruct((512, 4), jnp.float32)
    function = jax.grad(lambda *x: contrastive_loss(*x, jnp.float32(10.0), 64)[0], argnums=(0, 1))
    text = jax.jit(function).lower(images, images).compile().as_text()
    assert "512,64]" in text and "512,512]" not in text


def test_a_chunk_that_does_not_divide(embeddings):
    with pytest.raises(ValueError, match="16 does not divide into chunks of 5"):
        contrastive_loss(*embeddings, jnp.float32(10.0), 5)


def test_low_precision_embeddings_give_a_float32_loss(embeddings):
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in embeddings)
    loss, _ = contrastive_loss(image, text, jnp.float32(100.0))
    assert loss.dtype == jnp.float32 and jnp.isfinite(loss)
