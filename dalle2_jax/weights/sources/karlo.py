"""Karlo v1 in the layout of diffusers' UnCLIPPipeline: decoder with its caption projection, and the two upsamplers.

Sources: diffusers, pipelines/deprecated/unclip (pipeline_unclip.py, text_proj.py) and
scripts/convert_kakao_brain_unclip_to_diffusers.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.clip import CLIP
from dalle2_jax.decoder import Decoder, Upsampler
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.layers.unet import UNet
from dalle2_jax.tokenizer import ClipTokenizer
from dalle2_jax.weights.conversion import Conversion, Part, array
from dalle2_jax.weights.folder import open_part, read_json, read_tokenizer
from dalle2_jax.weights.sources.pipeline import clip_halves, folder_prior, read_pipeline
from dalle2_jax.weights.sources.unet import Diffusers, unet_entries
from dalle2_jax.weights.table import Shape, Table
from dalle2_jax.weights.tensors import Tensors, WeightsError, joined

# Of the published networks.
PRIOR_PARAMETERS, DECODER_PARAMETERS, TEXT_PROJECTION_PARAMETERS = 1_022_028_544, 885_439_686, 7_878_400
UPSAMPLER_PARAMETERS = 691_579_523

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


def conversions(folder: Path, whole_clip: Conversion | None = None) -> list[Conversion]:
    """The stages of a folder that diffusers' `UnCLIPPipeline.save_pretrained` wrote, or `UnCLIPImageVariationPipeline`.

    The former has a prior and no image encoder, the latter an image encoder and no prior. whole_clip: stands in for
    the pipeline's halves of CLIP, with both of which a run samples from captions and varies images.

    Raises:
        WeightsError: if a part is missing, damaged, or not Karlo's.
    """
    index = read_pipeline(folder, PIPELINES)
    tokenizer = read_tokenizer(folder / "tokenizer")
    clip = clip_halves(folder, tokenizer) if whole_clip is None else whole_clip
    decoder, upsampler = _decoder(folder, clip.module, tokenizer), _upsampler(folder)
    prior = []
    if "prior" in index:
        prior = [folder_prior(folder, "prior_scheduler", clip.module, tokenizer, PRIOR_PARAMETERS)]
    return [clip, *prior, decoder, upsampler]


def _decoder(folder: Path, clip: CLIP, tokenizer: ClipTokenizer) -> Conversion:
    unet = unet_module(read_json(folder / "decoder" / "config.json"), str(folder / "decoder"))
    module = decoder_module(unet, read_json(folder / "text_proj" / "config.json"))
    tensors = joined([(TEXT, open_part(folder / "text_proj")), (UNET, open_part(folder / "decoder"))])
    return decoder(module, decoder_table(module), tensors, clip, tokenizer)


def decoder(module: Decoder, table: Table, tensors: Tensors, clip: CLIP, tokenizer: ClipTokenizer) -> Conversion:
    """Karlo's decoder as a stage; sampled in 25 steps ("fast"; 50 is the other setting) at guidance 8."""
    size, length, unet = clip.embedding_size, clip.text.context_length, module.unet
    inputs = {
        "x_t": array(1, unet.image_size, unet.image_size, 3),
        "timesteps": array(1, dtype="int32"),
        "image_embedding": array(1, size),
        "text": array(1, length, clip.text.width),
        "text_mask": array(1, length, dtype=bool),
        "text_embedding": array(1, size),
    }
    record = {
        "process": Process(schedule="cosine", prediction="epsilon", variance="learned_range", clip=1.0),
        "sampling": Sampling(sampler="ddpm", steps="25", guidance_scale=8.0),
        "image_size": unet.image_size,
        "tokenizer": tokenizer.to_json(),
    }
    parts = (Part("decoder", "unet", DECODER_PARAMETERS), Part("text projection", "", TEXT_PROJECTION_PARAMETERS))
    return Conversion("decoder", "decoder", module, table, tensors, inputs, record, ("clip",), parts=parts)


def _upsampler(folder: Path) -> Conversion:
    names = ("super_res_first", "super_res_last")
    unets = [unet_module(read_json(folder / name / "config.json"), str(folder / name)) for name in names]
    module = upsampler_module(*unets)
    low_size = read_json(folder / "decoder" / "config.json")["sample_size"]
    tensors = joined([("first.", open_part(folder / names[0])), ("last.", open_part(folder / names[1]))])
    return upsampler(module, upsampler_table(module), tensors, low_size)


def upsampler(module: Upsampler, table: Table, tensors: Tensors, low_size: int) -> Conversion:
    """Karlo's upsampler as a stage: seven steps, the last of them by the second network."""
    size = module.unet.image_size
    inputs = {
        "x_t": array(1, size, size, 3),
        "timesteps": array(1, dtype="int32"),
        "low_resolution": array(1, low_size, low_size, 3),
    }
    record = {
        "process": Process(schedule="cosine", prediction="epsilon", variance="fixed_small", clip=1.0),
        "sampling": Sampling(sampler="ddpm", steps="7"),
        "image_size": size,
        "low_size": low_size,
    }
    parts = (
        Part("super resolution, first steps", "unet", UPSAMPLER_PARAMETERS),
        Part("super resolution, last step", "last", UPSAMPLER_PARAMETERS),
    )
    return Conversion("upsampler", "upsampler", module, table, tensors, inputs, record, parts=parts)
