"""Karlo v1 in the layout of diffusers' UnCLIPPipeline: decoder with its caption projection, and the two upsamplers.

Sources: diffusers, pipelines/deprecated/unclip (pipeline_unclip.py, text_proj.py) and
scripts/convert_kakao_brain_unclip_to_diffusers.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dalle2_jax.decoder import Decoder, Upsampler
from dalle2_jax.layers.unet import UNet
from dalle2_jax.weights.table import Shape, Table
from dalle2_jax.weights.tensors import WeightsError
from dalle2_jax.weights.unet import Diffusers, unet_entries

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
    middle = config.get("mid_block_type", "UNetMidBlock2D") in ATTENDING
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
    table, tokens = Table(), module.image_tokens
    unet_entries(table, Diffusers(module.unet), "unet/", UNET, context=True)
    table.plain("null_image", f"{TEXT}learned_classifier_free_guidance_embeddings")
    table.dense("image_time", f"{TEXT}clip_image_embeddings_project_to_time_embeddings")
    table.dense("text_time", f"{TEXT}embedding_proj")
    table.dense("text_projection", f"{TEXT}encoder_hidden_states_proj")
    table.norm("text_norm", f"{TEXT}text_encoder_hidden_states_norm")

    # Theirs count [width, tokens], channel by channel; ours token by token.
    def ours(x: np.ndarray) -> np.ndarray:
        return np.swapaxes(x.reshape(-1, tokens, *x.shape[1:]), 0, 1).reshape(x.shape)

    name = f"{TEXT}clip_extra_context_tokens_proj"

    def turned(shape: Shape) -> list[Shape]:
        return [shape[::-1]]

    table.add("image_tokens_projection/kernel", [f"{name}.weight"], turned, lambda x: ours(x).T)
    table.add("image_tokens_projection/bias", [f"{name}.bias"], turned, ours)
    return table


def upsampler_module(first: UNet, last: UNet) -> Upsampler:
    """Karlo's upsampler: one network for all steps but the last, one for that."""
    return Upsampler(first, resize="bicubic", last=last.clone())


def upsampler_table(module: Upsampler) -> Table:
    """The table of the two networks: tensors below `first.` and `last.`."""
    table = Table()
    unet_entries(table, Diffusers(module.unet), "unet/", "first.")
    unet_entries(table, Diffusers(module.last), "last/", "last.")
    return table
