"""CLIP in the layout of transformers: OpenAI's B/32, B/16, L/14 and L/14-336, and the halves that Karlo carries.

Source: Hugging Face transformers, models/clip/modeling_clip.py; a folder has `config.json` and `model.safetensors`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dalle2_jax.clip import CLIP, TextTransformer, VisionTransformer
from dalle2_jax.tokenizer import ClipTokenizer
from dalle2_jax.weights.conversion import Conversion, Part, array
from dalle2_jax.weights.folder import open_part, read_json, read_tokenizer
from dalle2_jax.weights.table import Table
from dalle2_jax.weights.tensors import Tensors, WeightsError

HALVES = ("text", "vision")
# {(image encoder's width, patch, image size): parameters}: B/32, B/16, L/14, L/14-336; H/14, bigG/14 of open_clip.
PUBLISHED = {
    (768, 32, 224): 151_277_313,
    (768, 16, 224): 149_620_737,
    (1024, 14, 224): 427_616_513,
    (1024, 14, 336): 427_944_193,
    (1280, 14, 224): 986_109_441,
    (1664, 14, 224): 2_539_567_105,
}
LARGEST_LOGIT_SCALE = math.log(100.0)  # that of all of OpenAI's CLIPs, and the limit in training
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def text_module(config: dict[str, Any]) -> TextTransformer:
    """The caption encoder of a `CLIPTextConfig`."""
    return TextTransformer(
        vocabulary_size=config.get("vocab_size", 49_408),
        context_length=config.get("max_position_embeddings", 77),
        **_transformer_fields(config, width=512, depth=12, heads=8),
    )


def vision_module(config: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> VisionTransformer:
    """The image encoder of a `CLIPVisionConfig`; preprocessor: how images are normalised, if not as OpenAI's."""
    preprocessor = preprocessor or {}
    return VisionTransformer(
        image_size=config.get("image_size", 224),
        patch_size=config.get("patch_size", 32),
        mean=tuple(preprocessor.get("image_mean", MEAN)),
        std=tuple(preprocessor.get("image_std", STD)),
        **_transformer_fields(config, width=768, depth=12, heads=12),
    )


def _half(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of one half, which older files have under another name, or twice."""
    return {**(config.get(f"{name}_config") or {}), **(config.get(f"{name}_config_dict") or {})}


def _transformer_fields(config: dict[str, Any], width: int, depth: int, heads: int) -> dict[str, Any]:
    """Fields of a transformer; the arguments are what transformers takes where the file leaves a value out."""
    size = config.get("hidden_size", width)
    return {
        "width": size,
        "depth": config.get("num_hidden_layers", depth),
        "heads": config.get("num_attention_heads", heads),
        "mlp_ratio": config.get("intermediate_size", 4 * width) / size,
        "activation": config.get("hidden_act", "quick_gelu"),
        "epsilon": config.get("layer_norm_eps", 1e-5),
    }


def conversions(folder: Path, unit_norm: bool = True) -> list[Conversion]:
    """The one stage of a folder that `CLIPModel.save_pretrained` wrote, its vocabulary beside it.

    unit_norm: of the embeddings; False for Karlo's networks.

    Raises:
        WeightsError: if a file is missing, damaged, or of another model.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise WeightsError(f"{folder} holds a model of the type {config.get('model_type')!r}; a CLIP is wanted")
    text, vision = (_half(config, name) for name in HALVES)
    seen = read_json(path) if (path := folder / "preprocessor_config.json").is_file() else {}
    module = CLIP(
        vision=vision_module(vision, seen),
        text=text_module(text),
        embedding_size=config.get("projection_dim", 512),
        unit_norm=unit_norm,
    )
    return [conversion(module, open_part(folder), read_tokenizer(folder))]


def conversion(module: CLIP, tensors: Tensors, tokenizer: ClipTokenizer, logit_scale: bool = True) -> Conversion:
    """A CLIP, or its caption half, as a stage."""
    return stage(module, clip_table(module, logit_scale), tensors.renamed(_without_buffers), tokenizer)


def stage(module: CLIP, table: Table, tensors: Tensors, tokenizer: ClipTokenizer) -> Conversion:
    """A CLIP with the table of its weights as a stage.

    Raises:
        WeightsError: if the vocabulary is not that of its caption encoder.
    """
    if tokenizer.vocabulary_size != module.text.vocabulary_size:
        raise WeightsError(
            f"{tensors.where} has {module.text.vocabulary_size} tokens and the vocabulary beside it "
            f"{tokenizer.vocabulary_size}; they are of two models"
        )
    if tokenizer.context_length != module.text.context_length:
        raise WeightsError(
            f"{tensors.where} reads captions of {module.text.context_length} tokens and the tokenizer beside it makes "
            f"{tokenizer.context_length}; set model_max_length in its tokenizer_config.json"
        )
    record = {
        "tokenizer": tokenizer.to_json(),
        "image_size": None if module.vision is None else module.vision.image_size,
    }
    vision, method = module.vision, "encode_text" if module.vision is None else "__call__"
    published = vision and PUBLISHED.get((vision.width, vision.patch_size, vision.image_size))
    parts = (Part("CLIP", "", published),)
    return Conversion("clip", "clip", module, table, tensors, inputs(module), record, method=method, parts=parts)


def _without_buffers(name: str) -> str | None:
    return None if name.endswith(".position_ids") else name


def inputs(module: CLIP) -> dict[str, Any]:
    """The shapes by which a CLIP is built."""
    length = module.text.context_length
    shapes = {"tokens": array(1, length, dtype="int32"), "mask": array(1, length, dtype=bool)}
    if module.vision is not None:
        shapes["images"] = array(1, module.vision.image_size, module.vision.image_size, 3)
    return shapes


def clip_table(module: CLIP, logit_scale: bool = True) -> Table:
    """The table of a whole CLIP, or of its caption half where `module.vision` is None.

    logit_scale: whether the temperature is there; the halves that pipelines carry come without it.
    """
    table = Table()
    text_entries(table, module.text, "text/", "text_model.")
    table.dense("text_projection", "text_projection", bias=False)
    if module.vision is not None:
        vision_entries(table, module.vision, "vision/", "vision_model.")
        table.dense("image_projection", "visual_projection", bias=False)
    if logit_scale:
        table.plain("logit_scale", "logit_scale")
    else:
        table.constant("logit_scale", LARGEST_LOGIT_SCALE)
    return table


def text_entries(table: Table, module: TextTransformer, target: str, source: str) -> None:
    """Adds the caption encoder."""
    table.plain(f"{target}token_embedding/embedding", f"{source}embeddings.token_embedding.weight")
    table.plain(f"{target}positions", f"{source}embeddings.position_embedding.weight")
    _layers(table, module.depth, module.heads, f"{target}transformer/blocks", f"{source}encoder.layers")
    table.norm(f"{target}final_norm", f"{source}final_layer_norm")


def vision_entries(table: Table, module: VisionTransformer, target: str, source: str) -> None:
    """Adds the image encoder."""
    patch = module.patch_size
    table.add(
        f"{target}patch_embedding/kernel",
        [f"{source}embeddings.patch_embedding.weight"],
        lambda shape: [(shape[1], 3, patch, patch)],
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    )
    table.plain(f"{target}class_token", f"{source}embeddings.class_embedding")
    table.plain(f"{target}positions", f"{source}embeddings.position_embedding.weight")
    table.norm(f"{target}norm_before", f"{source}pre_layrnorm")
    _layers(table, module.depth, module.heads, f"{target}transformer/blocks", f"{source}encoder.layers")
    table.norm(f"{target}norm_after", f"{source}post_layernorm")


def _layers(table: Table, depth: int, heads: int, target: str, source: str) -> None:
    for layer in range(depth):
        name = f"{source}.{layer}"
        table.norm(f"{target}/attention_norm", f"{name}.layer_norm1", layer)
        parts = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
        table.fused(f"{target}/attention/qkv", parts, layer, heads=heads)
        table.dense(f"{target}/attention/out", f"{name}.self_attn.out_proj", layer)
        table.norm(f"{target}/mlp_norm", f"{name}.layer_norm2", layer)
        table.dense(f"{target}/mlp_in", f"{name}.mlp.fc1", layer)
        table.dense(f"{target}/mlp_out", f"{name}.mlp.fc2", layer)
