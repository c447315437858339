"""CLIP against transformers' CLIPModel with random weights (references/clip.npz, written by make_clip.py)."""

import jax
import numpy as np
import pytest

from dalle2_jax.clip import CLIP, TextTransformer, VisionTransformer, contrastive_loss
from dalle2_jax.weights.sources.clip import clip_table
from tests.parity.reference import reference_path
from tests.parity.tables import convert

MODEL = CLIP(
    vision=VisionTransformer(
        image_size=16,
        patch_size=4,
        width=32,
        depth=3,
        heads=4,
        activation="quick_gelu",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
    text=TextTransformer(vocabulary_size=40, context_length=10, width=24, depth=2, heads=3, activation="quick_gelu"),
    embedding_size=20,
)


@pytest.fixture(scope="module")
def reference():
    with np.load(reference_path("clip")) as file:
        return dict(file)


@pytest.fixture(scope="module")
def params(reference, inputs):
    return convert(clip_table(MODEL), MODEL, reference, *inputs)


@pytest.fixture(scope="module")
def inputs(reference):
    tokens = reference["input/tokens"]
    mask = np.arange(tokens.shape[1])[None, :] < reference["input/lengths"][:, None]
    return reference["input/pictures"], tokens, mask


def test_embeddings_logits_and_loss(reference, params, inputs):
    image_embedding, text_embedding, logit_scale = jax.jit(MODEL.apply)({"params": params}, *inputs)
    np.testing.assert_allclose(image_embedding, reference["output/image_embedding"], atol=1e-5)
    np.testing.assert_allclose(text_embedding, reference["output/text_embedding"], atol=1e-5)
    logits = logit_scale * image_embedding @ text_embedding.T
    expected = reference["output/logits_per_image"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    loss, _ = contrastive_loss(image_embedding, text_embedding, logit_scale)
    np.testing.assert_allclose(loss, reference["output/loss"], rtol=1e-4)


def test_states_of_all_tokens(reference, params, inputs):
    _, tokens, mask = inputs
    _, states = jax.jit(MODEL.text.apply)({"params": params["text"]}, tokens, mask)
    np.testing.assert_allclose(states, reference["output/text_states"], atol=1e-4)
