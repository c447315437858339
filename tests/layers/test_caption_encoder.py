"""The caption encoder: padding, its lack of a mask, and what it refuses."""

import jax
import numpy as np
import pytest

from dalle2_jax.layers import CaptionEncoder

MODEL = CaptionEncoder(vocabulary_size=20, context_length=6, width=8, depth=2, heads=2)
TOKENS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32)
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), TOKENS, MASK)["params"]


@pytest.fixture(scope="module")
def encode(params):
    apply = jax.jit(MODEL.apply)
    return lambda tokens, mask=None: np.asarray(apply({"params": params}, tokens, mask))


def test_padding_is_learned_and_hides_the_token_under_it(encode, params):
    states = encode(TOKENS, MASK)
    assert states.shape == (2, 6, 8)
    other = np.where(MASK, TOKENS, 9).astype(np.int32)
    np.testing.assert_array_equal(encode(other, MASK), states)
    moved = jax.tree.map(np.array, params)
    moved["padding"][5] = np.linspace(-1, 1, 8)
    assert np.abs(MODEL.apply({"params": moved}, TOKENS, MASK)[:, 0] - states[:, 0]).max() > 1e-4  # seen: no mask


def test_result_does_not_depend_on_how_far_a_caption_came_padded(encode):
    longer = np.pad(TOKENS, ((0, 0), (0, 2))), np.pad(MASK, ((0, 0), (0, 2)))
    np.testing.assert_allclose(encode(*longer), encode(TOKENS, MASK), atol=1e-6)


def test_not_causal_and_without_mask_all_tokens_are_real(encode):
    states = encode(TOKENS)
    np.testing.assert_allclose(states, encode(TOKENS, np.ones_like(MASK)), atol=1e-6)
    later = TOKENS.copy()
    later[:, 3] = 9
    assert np.abs(encode(later)[:, 0] - states[:, 0]).max() > 1e-4


def test_final_norm(encode):
    states = encode(TOKENS, MASK)
    np.testing.assert_allclose(states.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(states.std(-1), 1, atol=1e-2)


def test_bfloat16_keeps_float32_parameters():
    model = MODEL.clone(dtype="bfloat16")
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS, MASK)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(shapes)} == {"float32"}
    assert str(jax.eval_shape(model.apply, shapes, TOKENS, MASK).dtype) == "bfloat16"


@pytest.mark.parametrize(
    "tokens, words",
    [
        (np.zeros((2, 7), np.int32), "7 tokens, the caption encoder a context of 6"),
        (np.zeros((2, 4), np.float32), "wants tokens"),
        (np.zeros(4, np.int32), "wants tokens"),
    ],
)
def test_refusals(tokens, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(MODEL.init, jax.random.key(0), tokens)
