"""The diffusion prior: guidance's null, padding, the two kinds of text, scaling, dtypes and refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.prior import DiffusionPrior

MODEL = DiffusionPrior(embedding_size=12, width=16, depth=2, heads=2, context_length=6)
TOKENS = MODEL.clone(vocabulary_size=20)


def _apply(params, inputs, keep_text=None, model=MODEL):
    return model.apply({"params": params}, **inputs, keep_text=keep_text)


APPLY = jax.jit(_apply, static_argnames="model")


def _params(model, inputs):
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    return jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    unit = random.normal(size=(3, 12))
    return {
        "noised_image_embedding": random.normal(size=(3, 12)).astype(np.float32),
        "timesteps": np.array([0, 500, 999], np.int32),
        "text_embedding": (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(np.float32),
        "text": random.normal(size=(3, 6, 10)).astype(np.float32),
        "text_mask": np.arange(6)[None, :] < np.array([6, 4, 1])[:, None],
    }


@pytest.fixture(scope="module")
def params(inputs):
    return _params(MODEL, inputs)


def _rows_that_change(a, b):
    return (np.abs(np.asarray(a) - np.asarray(b)).max(axis=1) > 1e-3).tolist()


def test_every_input_reaches_the_prediction(inputs, params):
    before = APPLY(params, inputs)
    assert before.shape == (3, 12) and before.dtype == jnp.float32
    for name in ("noised_image_embedding", "text_embedding", "text"):
        assert _rows_that_change(before, APPLY(params, inputs | {name: -inputs[name]})) == [True] * 3, name
    assert (
        _rows_that_change(before, APPLY(params, inputs | {"timesteps": np.array([1, 400, 900], np.int32)}))
        == [True] * 3
    )


def test_dropped_text_keeps_the_noised_embedding_and_the_timestep(inputs, params):
    drop = np.zeros(3, bool)
    before = APPLY(params, inputs, drop)
    for name, value in [
        ("noised_image_embedding", -inputs["noised_image_embedding"]),
        ("timesteps", np.array([1, 400, 900], np.int32)),
    ]:
        assert _rows_that_change(before, APPLY(params, inputs | {name: value}, drop)) == [True] * 3, name


def test_dropped_text_hides_tokens_embedding_and_length(inputs, params):
    drop = np.zeros(3, bool)
    before = APPLY(params, inputs, drop)
    for name, value in [
        ("text", -inputs["text"]),
        ("text_embedding", -inputs["text_embedding"]),
        ("text_mask", ~inputs["text_mask"]),
    ]:
        np.testing.assert_array_equal(before, APPLY(params, inputs | {name: value}, drop), err_msg=name)


def test_text_is_dropped_row_by_row(inputs, params):
    kept, dropped = APPLY(params, inputs), APPLY(params, inputs, np.zeros(3, bool))
    mixed = APPLY(params, inputs, np.array([True, False, True]))
    np.testing.assert_allclose(mixed, np.stack([kept[0], dropped[1], kept[2]]), atol=1e-6)
    assert _rows_that_change(kept, dropped) == [True] * 3
    np.testing.assert_array_equal(kept, APPLY(params, inputs, np.ones(3, bool)))


def test_both_nulls_and_only_they_learn_from_dropped_text(inputs, params):
    @jax.jit
    @jax.grad
    def slope(params, keep_text):
        return (_apply(params, inputs, keep_text) ** 2).sum()

    moved = {}
    for name, keep_text in [("kept", np.ones(3, bool)), ("dropped", np.zeros(3, bool))]:
        gradient = slope(params, keep_text)
        moved[name] = {key: max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient[key])) > 0 for key in gradient}
    nulls = {"null_text_token", "null_text_embedding"}
    assert {name for name, moves in moved["kept"].items() if not moves} == nulls
    unused = {name for name, moves in moved["dropped"].items() if not moves}
    assert unused == {"text_projection", "text_embedding_projection"}


def test_padding_influences_nothing(inputs, params):
    mask = inputs["text_mask"]
    changed = np.where(mask[..., None], inputs["text"], -inputs["text"])
    np.testing.assert_array_equal(APPLY(params, inputs), APPLY(params, inputs | {"text": changed}))
    everything = APPLY(params, inputs | {"text_mask": np.ones_like(mask)})
    assert _rows_that_change(APPLY(params, inputs), everything) == [False, True, True]


def test_a_shorter_array_gives_the_same_prediction(inputs, params):
    rows = {name: value[1:] for name, value in inputs.items()}
    short = rows | {"text": rows["text"][:, :4], "text_mask": rows["text_mask"][:, :4]}
    keep_text = np.array([True, False])
    np.testing.assert_allclose(APPLY(params, rows, keep_text), APPLY(params, short, keep_text), atol=1e-6)


def test_text_as_tokens(inputs):
    inputs = inputs | {"text": np.random.default_rng(2).integers(0, 20, (3, 6), dtype=np.int32)}
    params = _params(TOKENS, inputs)
    assert "text_projection" not in params and params["token_embedding"]["embedding"].shape == (20, 16)
    before = APPLY(params, inputs, model=TOKENS)
    other = np.where(inputs["text_mask"], inputs["text"], 0)
    np.testing.assert_array_equal(before, APPLY(params, inputs | {"text": other}, model=TOKENS))
    other = np.where(np.arange(6)[None, :] == 0, (inputs["text"] + 1) % 20, inputs["text"])
    assert _rows_that_change(before, APPLY(params, inputs | {"text": other}, model=TOKENS)) == [True] * 3


def test_scale():
    assert MODEL.scale == pytest.approx(math.sqrt(12))
    paper = MODEL.clone(embedding_size=1024, embedding_scale=17.2)
    assert paper.scale == 17.2
    z = np.random.default_rng(0).normal(size=(4, 1024)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    scaled = paper.scale_embedding(z)
    np.testing.assert_allclose(np.asarray(scaled).std(), 17.2 / 32, rtol=1e-2)
    np.testing.assert_allclose(paper.unscale_embedding(scaled), z, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(paper.unscale_embedding(3 * scaled), axis=1), 1, atol=1e-6)


def test_text_embedding_is_scaled_inside(inputs, params):
    plain = MODEL.clone(embedding_scale=1.0)
    scaled = inputs | {"text_embedding": inputs["text_embedding"] * math.sqrt(12)}
    np.testing.assert_allclose(APPLY(params, scaled, model=plain), APPLY(params, inputs), atol=1e-5)


def test_remat_keeps_the_tree_and_the_values(inputs, params):
    remat = MODEL.clone(remat=True)
    assert jax.tree.structure(_params(remat, inputs)) == jax.tree.structure(params)
    np.testing.assert_allclose(APPLY(params, inputs, model=remat), APPLY(params, inputs), atol=1e-6)


def test_bfloat16_keeps_float32_parameters_and_output(inputs, params):
    low = MODEL.clone(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(_params(low, inputs))} == {np.dtype("float32")}
    result = APPLY(params, inputs, model=low)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, APPLY(params, inputs), atol=0.15)


def test_final_norm_is_optional(inputs, params):
    without = MODEL.clone(final_norm=False)
    rest = {name: value for name, value in params.items() if name != "final_norm"}
    assert jax.tree.structure(_params(without, inputs)) == jax.tree.structure(rest)
    assert _rows_that_change(APPLY(rest, inputs, model=without), APPLY(params, inputs)) == [True] * 3


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (MODEL.clone(heads=3), {}, "width 16 does not divide into 3 heads"),
        (MODEL.clone(embedding_size=13), {}, "image embeddings of size 13, got 12"),
        (MODEL.clone(text_embedding_size=11), {}, "text embeddings of size 11, got 12"),
        (MODEL, {"text": np.zeros((3, 6), np.int32)}, r"needs text states \[batch, length, width\], got \[3, 6\]"),
        (TOKENS, {}, r"needs int32 tokens \[batch, length\], got float32 \[3, 6, 10\]"),
        (MODEL.clone(context_length=5), {}, "6 tokens are longer than the context of 5"),
        (MODEL, {"text_mask": np.ones((3, 5), bool)}, r"text mask \[3, 5\] must be \[batch, length\] \[3, 6\]"),
    ],
)
def test_bad_arguments_are_refused(inputs, model, changes, message):
    with pytest.raises(ValueError, match=message):
        _params(model, inputs | changes)
