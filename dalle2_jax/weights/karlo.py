"""Karlo v1 in the layout of diffusers' UnCLIPPipeline: decoder with its caption projection, and the two upsamplers.

Sources: diffusers, pipelines/deprecated/unclip (pipeline_unclip.py, text_proj.py) and
scripts/convert_kakao_brain_unclip_to_diffusers.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.clip import CLIP
from dalle2_jax.decoder import Decoder, Upsampler
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.layers.unet import UNet
from dalle2_jax.tokenizer import ClipTokenizer
from dalle2_jax.weights import clip
from dalle2_jax.weights.folder import open_part, read_json
from dalle2_jax.weights.prior import STATISTICS, prior_module, prior_table
from dalle2_jax.weights.run import Conversion, array
from dalle2_jax.weights.table import Shape, Table
from dalle2_jax.weights.tensors import WeightsError, joined
from dalle2_jax.weights.unet import Diffusers, unet_entries

PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")

ATTENDING = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D", "UNetMidBlock2DSimpleCrossAttn")
PLAIN = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
TEXT, UNET = "text_proj.", "unet."


def unet_module(config: dict[str, Any], where: str) -> UNet:
    """The U-Net of a `UNet2DModel`'s or `UNet2DConditionModel`'s config.

    Raises:
        WeightsError: for blocks of another kind.
    """
    down, up = tuple(config["down_block_types"]), tuple(config["up_block_types"])
    odd = sorted({*down, *up} - {*ATTENDING, *PLAIN})
    attends = [kind in ATTENDING for kind in down]
    if odd or attends != [kind in ATTENDING for kind in reversed(up)]:
        raise WeightsError(f"the U-Net of {where} has blocks {', '.join(odd or up)} that are not Karlo's")
    size, widths = config["sample_size"], tuple(config["block_out_channels"])
    if any(width % widths[0] for width in widths):
        raise WeightsError(f"the U-Net of {where} has channels {list(widths)}; they must be multiples of the first")
    middle = config.get("mid_block_type", "UNetMidBlock2D") in ATTENDING or bool(config.get("add_attention"))
    return UNet(
        image_size=size,
        out_channels=config["out_channels"],
        channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        depth=config.get("layers_per_block", 2),
        attention_resolutions=tuple(size // 2**level for level, there in enumerate(attends) if there),
        head_channels=_head_channels(config),
        groups=config.get("norm_num_groups", 32),
        dropout=config.get("dropout", 0.0),
        scale_shift=config.get("resnet_time_scale_shift", "default") == "scale_shift",
        middle_attention=middle,
        epsilon=config.get("norm_eps", 1e-5),
    )


def _head_channels(config: dict[str, Any]) -> int:
    size = config.get("attention_head_dim", 8)
    return size if isinstance(size, int) else size[0]


def decoder_module(unet: UNet, text: dict[str, Any]) -> Decoder:
    """The decoder of a U-Net and an `UnCLIPTextProjModel`'s config."""
    return Decoder(
        unet,
        image_tokens=text.get("clip_extra_context_tokens", 4),
        text_width=text["cross_attention_dim"],
        embedding_scale=1.0,
        pools_embedding=True,
        learned_null_text=False,
    )


def decoder_table(module: Decoder) -> Table:
    """The table of a decoder: tensors of the caption projection below `text_proj.`, of the U-Net below `unet.`."""
    table = Table()
    unet_entries(table, Diffusers(module.unet), "unet/", UNET, context=True)
    table.plain("null_image", f"{TEXT}learned_classifier_free_guidance_embeddings")
    table.dense("image_time", f"{TEXT}clip_image_embeddings_project_to_time_embeddings")
    table.dense("text_time", f"{TEXT}embedding_proj")
    table.dense("text_projection", f"{TEXT}encoder_hidden_states_proj")
    table.norm("text_norm", f"{TEXT}text_encoder_hidden_states_norm")

    token_entries(table, f"{TEXT}clip_extra_context_tokens_proj", module.image_tokens)
    return table


def token_entries(table: Table, source: str, tokens: int) -> None:
    """Adds the projection to context tokens: theirs count [width, tokens], ours token by token."""

    def ours(x: np.ndarray) -> np.ndarray:
        return np.swapaxes(x.reshape(-1, tokens, *x.shape[1:]), 0, 1).reshape(x.shape)

    def turned(shape: Shape) -> list[Shape]:
        return [shape[::-1]]

    table.add("image_tokens_projection/kernel", [f"{source}.weight"], turned, lambda x: ours(x).T)
    table.add("image_tokens_projection/bias", [f"{source}.bias"], turned, ours)


def upsampler_module(first: UNet, last: UNet) -> Upsampler:
    """Karlo's upsampler: one network for all steps but the last, one for that."""
    return Upsampler(first, resize="bicubic", last=last.clone())


def upsampler_table(module: Upsampler) -> Table:
    """The table of the two networks: tensors below `first.` and `last.`."""
    table = Table()
    unet_entries(table, Diffusers(module.unet), "unet/", "first.")
    unet_entries(table, Diffusers(module.last), "last/", "last.")
    return table


def conversions(folder: str | Path) -> list[Conversion]:
    """The stages of a folder that diffusers' `UnCLIPPipeline.save_pretrained` wrote, or `UnCLIPImageVariationPipeline`.

    The former has a prior and no picture encoder, the latter a picture encoder and no prior.

    Raises:
        WeightsError: if a part is missing, damaged, or not Karlo's.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    if (kind := index.get("_class_name")) not in PIPELINES:
        raise WeightsError(f"{folder} holds a {kind}; a folder of {' or '.join(PIPELINES)} is wanted")
    tokenizer = _tokenizer(folder / "tokenizer")
    clip = _clip(folder, tokenizer)
    decoder, upsampler = _decoder(folder, clip, tokenizer), _upsampler(folder)
    prior = [_prior(folder, clip, tokenizer)] if "prior" in index else []
    return [clip, *prior, decoder, upsampler]


def _tokenizer(folder: Path) -> ClipTokenizer:
    settings = read_json(folder / "tokenizer_config.json")
    tokenizer = ClipTokenizer.read(folder, context_length=settings.get("model_max_length", 77))
    pad = settings.get("pad_token", "!")
    pad = pad if isinstance(pad, str) else pad["content"]
    return replace(tokenizer, padding=tokenizer.token_rows()[pad])


def _clip(folder: Path, tokenizer: ClipTokenizer) -> Conversion:
    config, tensors = read_json(folder / "text_encoder" / "config.json"), open_part(folder / "text_encoder")
    vision = None
    if (folder / "image_encoder").is_dir():
        vision = clip.vision_module(read_json(folder / "image_encoder" / "config.json"))
        tensors = joined([("", tensors), ("", open_part(folder / "image_encoder"))])
    module = CLIP(
        vision=vision,
        text=clip.text_module(config),
        embedding_size=config.get("projection_dim", 768),
        unit_norm=False,
    )
    tensors = tensors.renamed(lambda name: None if name.endswith(".position_ids") else name)
    return Conversion(
        "clip",
        "clip",
        module,
        clip.clip_table(module, logit_scale=False),
        tensors,
        clip.inputs(module),
        {"tokenizer": tokenizer.to_json(), "image_size": None if vision is None else vision.image_size},
        method="encode_text" if vision is None else "__call__",
    )


def _prior(folder: Path, clip: Conversion, tokenizer: ClipTokenizer) -> Conversion:
    config, tensors = read_json(folder / "prior" / "config.json"), open_part(folder / "prior")
    module = prior_module(config, tensors)
    clamp = read_json(folder / "prior_scheduler" / "scheduler_config.json").get("clip_sample_range", 1.0)
    length, width = module.context_length, clip.module.text.width
    inputs = {
        "noised_image_embedding": array(1, module.embedding_size),
        "timesteps": array(1, dtype="int32"),
        "text_embedding": array(1, module.embedding_size),
        "text": array(1, length, width),
        "text_mask": array(1, length, dtype=bool),
    }
    info = {
        "process": Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=float(clamp)),
        "sampling": Sampling(sampler="ddpm", steps="25", guidance_scale=4.0),
        "tokenizer": tokenizer.to_json(),
    }
    tensors = tensors.renamed(lambda name: None if name in STATISTICS else name)
    return Conversion("prior", "prior", module, prior_table(module), tensors, inputs, info, ("clip",))


def _decoder(folder: Path, clip: Conversion, tokenizer: ClipTokenizer) -> Conversion:
    unet = unet_module(read_json(folder / "decoder" / "config.json"), str(folder / "decoder"))
    text = read_json(folder / "text_proj" / "config.json")
    module = decoder_module(unet, text)
    tensors = joined([(TEXT, open_part(folder / "text_proj")), (UNET, open_part(folder / "decoder"))])
    size, length = clip.module.embedding_size, clip.module.text.context_length
    inputs = {
        "x_t": array(1, unet.image_size, unet.image_size, 3),
        "timesteps": array(1, dtype="int32"),
        "image_embedding": array(1, text.get("clip_embeddings_dim", 768)),
        "text": array(1, length, clip.module.text.width),
        "text_mask": array(1, length, dtype=bool),
        "text_embedding": array(1, size),
    }
    info = {
        "process": Process(schedule="cosine", prediction="epsilon", variance="learned_range", clip=1.0),
        "sampling": Sampling(sampler="ddpm", steps="25", guidance_scale=8.0),
        "image_size": unet.image_size,
        "tokenizer": tokenizer.to_json(),
    }
    return Conversion("decoder", "decoder", module, decoder_table(module), tensors, inputs, info, ("clip",))


def _upsampler(folder: Path) -> Conversion:
    names = ("super_res_first", "super_res_last")
    unets = [unet_module(read_json(folder / name / "config.json"), str(folder / name)) for name in names]
    module = upsampler_module(*unets)
    size = unets[0].image_size
    low_size = read_json(folder / "decoder" / "config.json")["sample_size"]
    inputs = {
        "x_t": array(1, size, size, 3),
        "timesteps": array(1, dtype="int32"),
        "low_resolution": array(1, low_size, low_size, 3),
    }
    tensors = joined([("first.", open_part(folder / names[0])), ("last.", open_part(folder / names[1]))])
    info = {
        "process": Process(schedule="cosine", prediction="epsilon", variance="fixed_small", clip=1.0),
        "sampling": Sampling(sampler="ddpm", steps="7"),
        "image_size": size,
        "low_size": low_size,
    }
    return Conversion("upsampler", "upsampler", module, upsampler_table(module), tensors, inputs, info)
