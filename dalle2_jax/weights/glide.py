"""GLIDE's released networks: the 64 px base, the upsampler to 256 px, and their inpainting twins.

Source: openai/glide-text2im, glide_text2im/text2im_model.py and model_creation.py. The files are state dicts
(`base.pt`, `upsample.pt`, `base_inpaint.pt`, `upsample_inpaint.pt`); their sizes follow from their shapes.
"""

from __future__ import annotations

from dalle2_jax.decoder import CaptionEncoder, Decoder, Upsampler
from dalle2_jax.layers.unet import UNet
from dalle2_jax.weights.table import Table
from dalle2_jax.weights.unet import GuidedDiffusion, unet_entries

CAPTIONS = CaptionEncoder(vocabulary_size=50_257, context_length=128, width=512, depth=16, heads=8)
BASE = UNet(
    image_size=64,
    out_channels=6,
    channels=192,
    channel_multipliers=(1, 2, 3, 4),
    depth=3,
    attention_resolutions=(32, 16, 8),
    head_channels=64,
    dropout=0.1,
)
UPSAMPLER = UNet(
    image_size=256,
    out_channels=6,
    channels=192,
    channel_multipliers=(1, 1, 2, 2, 4, 4),
    depth=2,
    attention_resolutions=(32, 16, 8),
    head_channels=64,
    dropout=0.1,
)


def decoder_module(inpainting: bool = False) -> Decoder:
    """The base network, as released."""
    return Decoder(BASE, image_tokens=0, text=CAPTIONS, reads_image=False, inpainting=inpainting)


def upsampler_module(inpainting: bool = False) -> Upsampler:
    """The upsampler, as released."""
    return Upsampler(UPSAMPLER, text=CAPTIONS, inpainting=inpainting)


def glide_table(module: Decoder | Upsampler) -> Table:
    """The table of either network: they share the names, and the caption encoder is of the same kind."""
    table, text = Table(), module.text
    unet_entries(table, GuidedDiffusion(module.unet), "unet/", context=True)
    table.plain("text/token_embedding/embedding", "token_embedding.weight")
    table.plain("text/positions", "positional_embedding")
    table.plain("text/padding", "padding_embedding")
    for layer in range(text.depth):
        name, blocks = f"transformer.resblocks.{layer}", "text/transformer/blocks"
        table.norm(f"{blocks}/attention_norm", f"{name}.ln_1", layer)
        table.heads(f"{blocks}/attention/qkv", f"{name}.attn.c_qkv", 3, text.width // text.heads, layer)
        table.dense(f"{blocks}/attention/out", f"{name}.attn.c_proj", layer)
        table.norm(f"{blocks}/mlp_norm", f"{name}.ln_2", layer)
        table.dense(f"{blocks}/mlp_in", f"{name}.mlp.c_fc", layer)
        table.dense(f"{blocks}/mlp_out", f"{name}.mlp.c_proj", layer)
    table.norm("text/final_norm", "final_ln")
    table.dense("text_time", "transformer_proj")
    return table
