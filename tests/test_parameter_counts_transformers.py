"""Parameter counts of the full-size transformers, by shapes alone."""

import math

import jax
import jax.numpy as jnp
import pytest

from dalle2_jax.clip import CLIP, TextTransformer, VisionTransformer
from dalle2_jax.prior import DiffusionPrior

CLIP_L14 = CLIP(
    vision=VisionTransformer(image_size=224, patch_size=14, width=1024, depth=24, heads=16, activation="quick_gelu"),
    text=TextTransformer(
        vocabulary_size=49408, context_length=77, width=768, depth=12, heads=12, activation="quick_gelu"
    ),
    embedding_size=768,
)
# The paper's own CLIP (App. C), with 16 heads as other ViT-H have.
CLIP_H16 = CLIP(
    vision=VisionTransformer(image_size=256, patch_size=16, width=1280, depth=32, heads=16),
    text=TextTransformer(vocabulary_size=49408, context_length=256, width=1024, depth=24, heads=16),
    embedding_size=1024,
)


def _count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _clip_shapes(model: CLIP):
    size, length = model.vision.image_size, model.text.context_length
    arguments = jnp.zeros((1, size, size, 3)), jnp.zeros((1, length), jnp.int32), jnp.ones((1, length), bool)
    return jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]


def _prior_shapes(model: DiffusionPrior, text_width: int):
    length = model.context_length
    embedding = jnp.zeros((1, model.embedding_size))
    text, mask = jnp.zeros((1, length, text_width)), jnp.ones((1, length), bool)
    return jax.eval_shape(model.init, jax.random.key(0), embedding, jnp.zeros(1, int), embedding, text, mask)["params"]


def test_openai_clip_l14():
    assert _count(_clip_shapes(CLIP_L14)) == 427_616_513


def test_paper_clip_h16():
    shapes = _clip_shapes(CLIP_H16)
    # Twelve times the squared width a layer, give or take biases and norms.
    assert _count(shapes["vision"]["transformer"]) == pytest.approx(12 * 32 * 1280**2, rel=0.01)
    assert _count(shapes["text"]["transformer"]) == pytest.approx(12 * 24 * 1024**2, rel=0.01)
    assert shapes["vision"]["positions"].shape == (257, 1280)


def test_karlo_prior():
    model = DiffusionPrior(embedding_size=768, width=2048, depth=20, heads=32, context_length=77)
    shapes = _prior_shapes(model, text_width=768)
    assert _count(shapes) == pytest.approx(1_022_028_544, rel=1e-3)
    nulls = _count([shapes["null_text_token"], shapes["null_text_embedding"]])
    assert _count(shapes) - nulls == 1_022_028_544, "all but our learned nulls"


def test_paper_prior():
    model = DiffusionPrior(embedding_size=1024, embedding_scale=17.2)
    assert (model.width, model.depth, model.heads, model.context_length) == (2048, 24, 32, 256)
    shapes = _prior_shapes(model, text_width=1024)
    assert _count(shapes["transformer"]) == pytest.approx(1.209e9, rel=0.01)
    assert _count(shapes) == pytest.approx(1.2e9, rel=0.05)
