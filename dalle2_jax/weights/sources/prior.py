"""Diffusion priors of Karlo's shape: Karlo v1, Kandinsky 2.1 and 2.2, as diffusers' PriorTransformer.

Source: diffusers, models/transformers/prior_transformer.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dalle2_jax.prior import DiffusionPrior
from dalle2_jax.weights.table import Table
from dalle2_jax.weights.tensors import FLOATS, Tensors, WeightsError

STATISTICS = ("clip_mean", "clip_std")
SPECIAL = {"added_emb_type": "prd", "encoder_hid_proj_type": "linear", "embedding_proj_norm_type": None}


def prior_module(config: dict[str, Any], tensors: Tensors) -> DiffusionPrior:
    """The network of a `PriorTransformer`'s config, with the statistics that its weights carry.

    Raises:
        WeightsError: for a PriorTransformer of another shape than Karlo's, or statistics that are missing.
    """
    for name, value in SPECIAL.items():
        if config.get(name, value) != value:
            raise WeightsError(
                f"the prior of {tensors.where} has {name}={config[name]!r}; those with {value!r} are known here"
            )
    heads, head_channels = config.get("num_attention_heads", 32), config.get("attention_head_dim", 64)
    size = config.get("embedding_dim", 768)
    mean, std = (read_statistic(tensors, name, size) for name in STATISTICS)
    return DiffusionPrior(
        embedding_size=size,
        width=heads * head_channels,
        depth=config.get("num_layers", 20),
        heads=heads,
        context_length=config.get("num_embeddings", 77),
        embedding_scale=1.0,
        embedding_mean=mean,
        embedding_std=std,
        learned_null=False,
    )


def read_statistic(tensors: Tensors, name: str, size: int) -> tuple[float, ...]:
    """Means or standard deviations of CLIP's image embeddings, which no table checks as they are no parameters."""
    if name not in tensors.shapes:
        raise WeightsError(f"{tensors.where} has no tensor {name}; is it a prior of Karlo's kind?")
    values = tensors.read(name).reshape(-1) if tensors.dtypes[name] in FLOATS else np.empty(0)
    if values.shape != (size,) or not np.isfinite(values).all() or (name == STATISTICS[1] and (values == 0).any()):
        raise WeightsError(
            f"the tensor {name} of {tensors.where} is not what it should be, {size} finite numbers (deviations other "
            "than zero); download it again"
        )
    return tuple(values.astype(np.float32).tolist())


def block_of(module: DiffusionPrior, layer: int) -> tuple[str, int | None]:
    """The path of a layer's parameters, and its place where they are stacked: the last one lies by itself."""
    return ("transformer/last_block", None) if layer == module.depth - 1 else ("transformer/blocks", layer)


def prior_table(module: DiffusionPrior) -> Table:
    """The table of a `PriorTransformer`; its clip_mean and clip_std are the module's own fields."""
    table = Table()
    table.plain("positions", "positional_embedding", leading=1)
    table.plain("query", "prd_embedding", leading=2)
    table.dense("time_in", "time_embedding.linear_1")
    table.dense("time_out", "time_embedding.linear_2")
    table.dense("image_embedding_projection", "proj_in")
    table.dense("text_embedding_projection", "embedding_proj")
    table.dense("text_projection", "encoder_hidden_states_proj")
    for layer in range(module.depth):
        name, (block, place) = f"transformer_blocks.{layer}", block_of(module, layer)
        table.norm(f"{block}/attention_norm", f"{name}.norm1", place)
        parts = [f"{name}.attn1.to_{part}" for part in "qkv"]
        table.fused(f"{block}/attention/qkv", parts, place, heads=module.heads)
        table.dense(f"{block}/attention/out", f"{name}.attn1.to_out.0", place)
        table.norm(f"{block}/mlp_norm", f"{name}.norm3", place)
        table.dense(f"{block}/mlp_in", f"{name}.ff.net.0.proj", place)
        table.dense(f"{block}/mlp_out", f"{name}.ff.net.2", place)
    table.norm("final_norm", "norm_out")
    table.dense("out", "proj_to_clip_embeddings")
    return table
