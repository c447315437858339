"""CLIP against transformers' CLIPModel with random weights (references/clip.npz, written by make_clip.py)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from dalle2_jax.clip import CLIP, TextTransformer, VisionTransformer, contrastive_loss
from tests.parity.torch_weights import TorchWeights, assert_same_shapes, stack_layers

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


def _transformer(weights: TorchWeights, prefix: str, depth: int) -> dict:
    def layer(name: str) -> dict:
        return {
            "attention_norm": weights.norm(f"{name}.layer_norm1"),
            "attention": {
                "qkv": weights.fused_dense([f"{name}.self_attn.{part}_proj" for part in "qkv"]),
                "out": weights.dense(f"{name}.self_attn.out_proj"),
            },
            "mlp_norm": weights.norm(f"{name}.layer_norm2"),
            "mlp_in": weights.dense(f"{name}.mlp.fc1"),
            "mlp_out": weights.dense(f"{name}.mlp.fc2"),
        }

    return {"blocks": stack_layers([layer(f"{prefix}.encoder.layers.{i}") for i in range(depth)])}


def _params(tensors: dict[str, np.ndarray]) -> dict:
    weights = TorchWeights(tensors)
    patches = weights.take("vision_model.embeddings.patch_embedding.weight")
    params = {
        "vision": {
            "patch_embedding": {"kernel": patches.transpose(2, 3, 1, 0).reshape(-1, patches.shape[0])},
            "class_token": weights.take("vision_model.embeddings.class_embedding"),
            "positions": weights.take("vision_model.embeddings.position_embedding.weight"),
            "norm_before": weights.norm("vision_model.pre_layrnorm"),
            "transformer": _transformer(weights, "vision_model", MODEL.vision.depth),
            "norm_after": weights.norm("vision_model.post_layernorm"),
        },
        "text": {
            "token_embedding": {"embedding": weights.take("text_model.embeddings.token_embedding.weight")},
            "positions": weights.take("text_model.embeddings.position_embedding.weight"),
            "transformer": _transformer(weights, "text_model", MODEL.text.depth),
            "final_norm": weights.norm("text_model.final_layer_norm"),
        },
        "image_projection": weights.dense("visual_projection", bias=False),
        "text_projection": weights.dense("text_projection", bias=False),
        "logit_scale": weights.take("logit_scale"),
    }
    weights.assert_all_used()
    return params


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "references" / "clip.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def params(reference):
    prefix = "weights/"
    return _params({name.removeprefix(prefix): reference[name] for name in reference if name.startswith(prefix)})


@pytest.fixture(scope="module")
def inputs(reference):
    tokens = reference["input/tokens"]
    mask = np.arange(tokens.shape[1])[None, :] < reference["input/lengths"][:, None]
    return reference["input/pictures"], tokens, mask


def test_mapping_fills_every_parameter(params, inputs):
    expected = jax.eval_shape(MODEL.init, jax.random.key(0), *inputs)["params"]
    assert_same_shapes(params, expected)


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
