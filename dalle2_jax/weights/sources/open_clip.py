"""CLIP in the layout of open_clip, which is that of OpenAI's own files: H/14, bigG/14 and the smaller ones.

Source: open_clip, src/open_clip/model.py and transformer.py; a folder has `open_clip_config.json` and
`open_clip_model.safetensors`.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.clip import CLIP, TextTransformer, VisionTransformer
from dalle2_jax.tokenizer import ClipTokenizer
from dalle2_jax.weights.conversion import Conversion
from dalle2_jax.weights.folder import read_json
from dalle2_jax.weights.sources import clip
from dalle2_jax.weights.sources.clip import MEAN, STD
from dalle2_jax.weights.table import Table
from dalle2_jax.weights.tensors import WeightsError, open_tensors

CONFIG = "open_clip_config.json"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
MASK = "attn_mask"  # a buffer that some files carry


def conversions(folder: Path, vocabulary: Path | None = None) -> list[Conversion]:
    """The one stage of a folder that open_clip published.

    vocabulary: where CLIP's vocabulary is, if it is not in the folder.

    Raises:
        WeightsError: if a file is missing, damaged, or of a model that is no CLIP of transformers.
    """
    path = folder / CONFIG
    module = clip_module(read_json(path), str(path))
    files = [folder / name for name in FILES if (folder / name).is_file()]
    if not files:
        raise WeightsError(f"there are no weights in {folder}; looked for {', '.join(FILES)}")
    length = module.text.context_length
    tokenizer = ClipTokenizer.read(vocabulary or folder, context_length=length)
    tensors = open_tensors(files[0]).renamed(lambda name: None if name == MASK else name)
    return [clip.stage(module, clip_table(module), tensors, tokenizer)]


def clip_module(config: dict[str, Any], where: str) -> CLIP:
    """The CLIP of an `open_clip_config.json`.

    Raises:
        WeightsError: for a model whose encoders are not CLIP's transformers (ResNets, timm's, other pooling).
    """
    model = config.get("model_cfg", config)
    preprocess = config.get("preprocess_cfg", {})
    try:
        vision, text, size = model["vision_cfg"], model["text_cfg"], model["embed_dim"]
    except KeyError as error:
        raise WeightsError(f"{where} is no configuration of open_clip's: it has no {error}") from error
    known = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
    odd = sorted({name for name, value in vision.items() if value} - known) + sorted(
        {name for name, value in text.items() if value}
        - {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
    )
    if odd or not isinstance(vision.get("layers"), int):
        raise WeightsError(f"{where} has encoders that are not CLIP's transformers ({', '.join(odd) or 'a ResNet'})")
    for name, wanted in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
        if preprocess.get(name, wanted) != wanted:
            raise WeightsError(f"{where} prepares images by {name} {preprocess[name]!r}; {wanted!r} is known here")
    common = {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu"}
    return CLIP(
        vision=VisionTransformer(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["width"],
            depth=vision["layers"],
            heads=vision["width"] // vision.get("head_width", 64),
            mlp_ratio=_mlp_ratio(vision),
            mean=tuple(preprocess.get("mean", MEAN)),
            std=tuple(preprocess.get("std", STD)),
            **common,
        ),
        text=TextTransformer(
            vocabulary_size=text["vocab_size"],
            context_length=text["context_length"],
            width=text["width"],
            depth=text["layers"],
            heads=text["heads"],
            mlp_ratio=_mlp_ratio(text),
            **common,
        ),
        embedding_size=size,
    )


def _mlp_ratio(config: dict[str, Any]) -> float:
    """The ratio that is left when the width of the MLP is cut to a whole number, as open_clip does."""
    return int(config["width"] * config.get("mlp_ratio", 4.0)) / config["width"]


def clip_table(module: CLIP) -> Table:
    """The table of a whole CLIP."""
    table, patch = Table(), module.vision.patch_size
    table.plain("text/token_embedding/embedding", "token_embedding.weight")
    table.plain("text/positions", "positional_embedding")
    _layers(table, module.text.depth, module.text.heads, "text/transformer/blocks", "transformer.resblocks")
    table.norm("text/final_norm", "ln_final")
    table.plain("text_projection/kernel", "text_projection")
    table.add(
        "vision/patch_embedding/kernel",
        ["visual.conv1.weight"],
        lambda shape: [(shape[1], 3, patch, patch)],
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    )
    table.plain("vision/class_token", "visual.class_embedding")
    table.plain("vision/positions", "visual.positional_embedding")
    table.norm("vision/norm_before", "visual.ln_pre")
    _layers(
        table, module.vision.depth, module.vision.heads, "vision/transformer/blocks", "visual.transformer.resblocks"
    )
    table.norm("vision/norm_after", "visual.ln_post")
    table.plain("image_projection/kernel", "visual.proj")
    table.plain("logit_scale", "logit_scale")
    return table


def _layers(table: Table, depth: int, heads: int, target: str, source: str) -> None:
    def by_head(x: np.ndarray) -> np.ndarray:  # [3, heads, head_dim, ...] to [heads, 3, head_dim, ...]
        return np.swapaxes(x.reshape(3, heads, -1, *x.shape[1:]), 0, 1).reshape(x.shape)

    for layer in range(depth):
        name = f"{source}.{layer}"
        table.norm(f"{target}/attention_norm", f"{name}.ln_1", layer)
        table.add(
            f"{target}/attention/qkv/kernel",
            [f"{name}.attn.in_proj_weight"],
            lambda shape: [(prod(shape[1:]), shape[0])],
            lambda x: by_head(x).T,
            layer,
        )
        bias = f"{target}/attention/qkv/bias"
        table.add(bias, [f"{name}.attn.in_proj_bias"], lambda shape: [(prod(shape),)], by_head, layer)
        table.dense(f"{target}/attention/out", f"{name}.attn.out_proj", layer)
        table.norm(f"{target}/mlp_norm", f"{name}.ln_2", layer)
        table.dense(f"{target}/mlp_in", f"{name}.mlp.c_fc", layer)
        table.dense(f"{target}/mlp_out", f"{name}.mlp.c_proj", layer)
