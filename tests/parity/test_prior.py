"""The diffusion prior against diffusers' PriorTransformer (references/prior.npz, written by make_prior.py)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from dalle2_jax.prior import DiffusionPrior
from tests.parity.torch_weights import TorchWeights, assert_same_shapes, stack_layers

# Karlo's inputs come unscaled.
MODEL = DiffusionPrior(embedding_size=16, width=24, depth=3, heads=2, context_length=9, embedding_scale=1.0)


def _layer(weights: TorchWeights, name: str) -> dict:
    return {
        "attention_norm": weights.norm(f"{name}.norm1"),
        "attention": {
            "qkv": weights.fused_dense([f"{name}.attn1.to_{part}" for part in "qkv"]),
            "out": weights.dense(f"{name}.attn1.to_out.0"),
        },
        "mlp_norm": weights.norm(f"{name}.norm3"),
        "mlp_in": weights.dense(f"{name}.ff.net.0.proj"),
        "mlp_out": weights.dense(f"{name}.ff.net.2"),
    }


def _params(tensors: dict[str, np.ndarray]) -> dict:
    weights = TorchWeights(tensors)
    params = {
        "positions": weights.take("positional_embedding")[0],
        "query": weights.take("prd_embedding")[0, 0],
        "time_in": weights.dense("time_embedding.linear_1"),
        "time_out": weights.dense("time_embedding.linear_2"),
        "image_embedding_projection": weights.dense("proj_in"),
        "text_embedding_projection": weights.dense("embedding_proj"),
        "text_projection": weights.dense("encoder_hidden_states_proj"),
        "transformer": {
            "blocks": stack_layers([_layer(weights, f"transformer_blocks.{i}") for i in range(MODEL.depth)])
        },
        "final_norm": weights.norm("norm_out"),
        "out": weights.dense("proj_to_clip_embeddings"),
    }
    # The statistics by which Karlo's samples are unscaled are not part of the network.
    weights.take("clip_mean"), weights.take("clip_std")
    weights.assert_all_used()
    # Karlo's null caption is CLIP's embedding of the empty one, so it has no learned nulls.
    nulls = {name: np.full(MODEL.width, np.nan, np.float32) for name in ("null_text_token", "null_text_embedding")}
    return params | nulls


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "references" / "prior.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def params(reference):
    prefix = "weights/"
    return _params({name.removeprefix(prefix): reference[name] for name in reference if name.startswith(prefix)})


def _inputs(reference, mask):
    names = ("noised_image_embedding", "timesteps", "text_embedding", "text_states")
    return *(reference[f"input/{name}"] for name in names), mask


def test_mapping_fills_every_parameter(reference, params):
    inputs = _inputs(reference, reference["input/text_mask"])
    assert_same_shapes(params, jax.eval_shape(MODEL.init, jax.random.key(0), *inputs)["params"])


@pytest.mark.parametrize("output", ["padded", "unpadded"])
def test_prediction(reference, params, output):
    mask = reference["input/text_mask"] if output == "padded" else np.ones_like(reference["input/text_mask"])
    predicted = jax.jit(MODEL.apply)({"params": params}, *_inputs(reference, mask))
    expected = reference[f"output/{output}"]
    np.testing.assert_allclose(predicted, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
