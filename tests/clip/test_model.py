"""CLIP's encoders: unit norm, padding, causality, the temperature's limit, dtypes and refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.clip import CLIP, TextTransformer, VisionTransformer

TEXT = TextTransformer(vocabulary_size=30, context_length=8, width=16, depth=2, heads=2)
VISION = VisionTransformer(image_size=8, patch_size=4, width=16, depth=2, heads=2)
MODEL = CLIP(vision=VISION, text=TEXT, embedding_size=12)


def _encode_text(params, tokens, mask):
    return MODEL.apply({"params": params}, tokens, mask, method="encode_text")


def _call(params, images, tokens, mask, model=MODEL):
    return model.apply({"params": params}, images, tokens, mask)


ENCODE_TEXT = jax.jit(_encode_text)
CALL = jax.jit(_call, static_argnames="model")


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    images = random.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    tokens = random.integers(0, 30, (3, 8), dtype=np.int32)
    mask = np.arange(8)[None, :] < np.array([8, 5, 2])[:, None]
    return images, tokens, mask


@pytest.fixture(scope="module")
def params(inputs):
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), *inputs)["params"]
    params = jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return params | {"logit_scale": np.float32(math.log(1 / 0.07))}


def test_embeddings_have_unit_norm(inputs, params):
    image_embedding, text_embedding, logit_scale = CALL(params, *inputs)
    assert image_embedding.shape == text_embedding.shape == (3, 12)
    np.testing.assert_allclose(jnp.linalg.norm(image_embedding, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(text_embedding, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(logit_scale, 1 / 0.07, rtol=1e-6)
    for embedding in (image_embedding, text_embedding):
        assert np.abs(embedding[0] - embedding[1]).max() > 1e-2


def test_text_is_read_at_the_last_real_token(inputs, params):
    _, tokens, mask = inputs
    pooled, states = jax.jit(TEXT.apply)({"params": params["text"]}, tokens, mask)
    for row, last in enumerate([7, 4, 1]):
        np.testing.assert_array_equal(pooled[row], states[row, last])


def test_padding_influences_nothing(inputs, params):
    _, tokens, mask = inputs
    before, states_before = ENCODE_TEXT(params, tokens, mask)
    after, states_after = ENCODE_TEXT(params, np.where(mask, tokens, (tokens + 7) % 30), mask)
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(np.asarray(states_before)[mask], np.asarray(states_after)[mask])


def test_a_shorter_array_gives_the_same_embedding(inputs, params):
    _, tokens, mask = inputs
    full, _ = ENCODE_TEXT(params, tokens[1:], mask[1:])
    short, _ = ENCODE_TEXT(params, tokens[1:, :5], mask[1:, :5])
    np.testing.assert_allclose(short, full, atol=1e-6)


def test_a_later_token_leaves_earlier_states(inputs, params):
    _, tokens, mask = inputs
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 30
    _, before = ENCODE_TEXT(params, tokens, mask)
    _, after = ENCODE_TEXT(params, changed, mask)
    np.testing.assert_array_equal(after[:, :5], before[:, :5])
    assert (np.abs(after[:, 5:] - before[:, 5:]).max(axis=(0, 2)) > 1e-3).all()


def test_images_are_normalised_by_mean_and_std(inputs, params):
    images, tokens, mask = inputs
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    model = MODEL.clone(vision=VISION.clone(mean=mean, std=std))
    # The default leaves [-1, 1] alone, so images normalised beforehand must give the same.
    normalised = ((images + 1) / 2 - np.float32(mean)) / np.float32(std)
    expected, _, _ = CALL(params, normalised, tokens, mask)
    np.testing.assert_allclose(CALL(params, images, tokens, mask, model=model)[0], expected, atol=1e-5)


def test_patches_are_read_row_by_row(inputs, params):
    images, tokens, mask = inputs
    # With a kernel of one patch's size, the patch embedding is the strided convolution of the original code.
    kernel = params["vision"]["patch_embedding"]["kernel"].reshape(4, 4, 3, 16)
    convolved = jax.lax.conv_general_dilated(
        images, kernel, window_strides=(4, 4), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    @jax.jit
    def intermediates(images):
        return VISION.apply(
            {"params": params["vision"]},
            images,
            capture_intermediates=lambda module, _: module.name == "patch_embedding",
            mutable="intermediates",
        )[1]

    (patches,) = intermediates(images)["intermediates"]["patch_embedding"]["__call__"]
    np.testing.assert_allclose(patches, convolved.reshape(3, 4, 16), atol=1e-5)


def test_temperature_is_clipped_and_can_come_back(inputs, params):
    def scale(logit_scale):
        return CALL(params | {"logit_scale": logit_scale}, *inputs)[2]

    assert scale(jnp.float32(10.0)) == pytest.approx(100, rel=1e-5)
    # At the limit, descent that would raise the temperature further finds no gradient; descent away from it does.
    assert jax.grad(lambda s: -scale(s))(jnp.float32(10.0)) == 0
    assert jax.grad(scale)(jnp.float32(10.0)) == pytest.approx(100, rel=1e-5)
    assert jax.grad(lambda s: -scale(s))(jnp.float32(1.0)) == pytest.approx(-math.e, rel=1e-5)


def test_bfloat16_keeps_float32_parameters_and_outputs(inputs, params):
    model = MODEL.clone(vision=VISION.clone(dtype="bfloat16"), text=TEXT.clone(dtype="bfloat16"), dtype="bfloat16")
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    low, full = CALL(params, *inputs, model=model), CALL(params, *inputs)
    assert {x.dtype for x in low} == {jnp.dtype("float32")}
    for a, b in zip(low, full, strict=True):
        np.testing.assert_allclose(a, b, atol=0.1)
    np.testing.assert_allclose(jnp.linalg.norm(low[0], axis=1), 1, atol=1e-6)


def test_remat_keeps_the_tree_and_the_values(inputs, params):
    remat = MODEL.clone(vision=VISION.clone(remat=True), text=TEXT.clone(remat=True))
    shapes = [jax.eval_shape(model.init, jax.random.key(0), *inputs) for model in (MODEL, remat)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    for a, b in zip(CALL(params, *inputs, model=remat), CALL(params, *inputs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_initial_scales_are_clips():
    model = CLIP(
        vision=VisionTransformer(image_size=8, patch_size=2, width=256, depth=1, heads=2),
        text=TextTransformer(vocabulary_size=500, context_length=64, width=64, depth=1, heads=2),
        embedding_size=64,
    )
    arguments = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), *arguments)["params"]
    for leaf, expected in [
        (params["text"]["token_embedding"]["embedding"], 0.02),
        (params["text"]["positions"], 0.01),
        (params["vision"]["positions"], 256**-0.5),
        (params["image_projection"]["kernel"], 256**-0.5),
        (params["text_projection"]["kernel"], 64**-0.5),
    ]:
        np.testing.assert_allclose(np.std(leaf), expected, rtol=0.06)
    np.testing.assert_allclose(params["logit_scale"], math.log(1 / 0.07))


def _shapes(model, images=(1, 8, 8, 3), tokens=(1, 8), mask=(1, 8), image_dtype="float32"):
    arguments = jnp.zeros(images, image_dtype), jnp.zeros(tokens, jnp.int32), jnp.ones(mask, bool)
    return jax.eval_shape(model.init, jax.random.key(0), *arguments)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (MODEL, {"images": (1, 9, 8, 3)}, r"needs images \[batch, 8, 8, 3\], got \[1, 9, 8, 3\]; resize them"),
        (MODEL, {"images": (1, 8, 8, 4)}, r"got \[1, 8, 8, 4\]"),
        (MODEL, {"image_dtype": "uint8"}, r"needs float images in \[-1, 1\], got uint8"),
        (MODEL.clone(vision=VISION.clone(patch_size=3)), {}, "image size 8 does not divide by patch size 3"),
        (MODEL.clone(vision=VISION.clone(heads=3)), {}, "width 16 does not divide into 3 heads"),
        (MODEL.clone(text=TEXT.clone(heads=5)), {}, "width 16 does not divide into 5 heads"),
        (MODEL, {"tokens": (1, 9), "mask": (1, 9)}, "9 tokens are longer than the context of 8"),
        (MODEL, {"mask": (1, 7)}, r"the mask \[1, 7\] must have the shape of the tokens \[1, 8\]"),
    ],
)
def test_bad_arguments_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        _shapes(model, **arguments)
