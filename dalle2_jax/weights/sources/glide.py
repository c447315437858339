"""GLIDE's released networks: the 64 px base, the upsampler to 256 px, and their inpainting twins.

Source: openai/glide-text2im, glide_text2im/text2im_model.py and model_creation.py. The files are state dicts
(`base.pt`, `upsample.pt`, `base_inpaint.pt`, `upsample_inpaint.pt`); their sizes follow from their shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dalle2_jax.decoder import CaptionEncoder, Decoder, Upsampler
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.layers.unet import UNet
from dalle2_jax.tokenizer import GlideTokenizer
from dalle2_jax.weights.conversion import Conversion, Part, array
from dalle2_jax.weights.sources.unet import GuidedDiffusion, unet_entries
from dalle2_jax.weights.table import Table
from dalle2_jax.weights.tensors import PICKLES, WeightsError, open_tensors

ENDINGS = (".safetensors", *PICKLES)
PAIRS = (("base", "upsample"), ("base_inpaint", "upsample_inpaint"))
# Of the released networks, counted from their own code.
PARAMETERS = {
    "base": 385_030_726,
    "upsample": 398_361_286,
    "base_inpaint": 385_037_638,
    "upsample_inpaint": 398_368_198,
}

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


def conversions(folder: Path, vocabulary: Path | None = None) -> list[Conversion]:
    """Base network and upsampler of a folder with `base.pt` and `upsample.pt`, or their inpainting twins.

    vocabulary: the folder of GPT-2's vocabulary, if it is not this one.

    Raises:
        WeightsError: if a file is missing, damaged, or not GLIDE's, or there are both pairs.
    """
    found = {name: [path for path in sorted(folder.glob(f"{name}.*")) if path.suffix in ENDINGS] for name in PARAMETERS}
    pairs = [names for names in PAIRS if any(found[name] for name in names)]
    if len(pairs) != 1 or not all(len(found[name]) == 1 for name in pairs[0]):
        wanted = " or ".join(" and ".join(names) for names in PAIRS)
        raise WeightsError(f"{folder} does not hold {wanted} (.pt or .safetensors), one file each and one pair alone")
    inpainting = pairs[0] == PAIRS[1]
    base, upsampling = (open_tensors(found[name][0]) for name in pairs[0])
    decoder, upsampler = decoder_module(inpainting), upsampler_module(inpainting)
    tokenizer = GlideTokenizer.read(vocabulary or folder, context_length=CAPTIONS.context_length)
    if tokenizer.vocabulary_size != CAPTIONS.vocabulary_size:
        raise WeightsError(
            f"{folder} has {CAPTIONS.vocabulary_size} tokens and the vocabulary {tokenizer.vocabulary_size}; give "
            "GPT-2's, which GLIDE reads"
        )
    size, low_size = upsampler.unet.image_size, decoder.unet.image_size
    captions = {
        "text": array(1, CAPTIONS.context_length, dtype="int32"),
        "text_mask": array(1, CAPTIONS.context_length, dtype=bool),
    }

    def inputs(side: int) -> dict[str, Any]:
        known = {"known": array(1, side, side, 4)} if inpainting else {}
        return {"x_t": array(1, side, side, 3), "timesteps": array(1, dtype="int32"), **captions, **known}

    def record(schedule: str, sampling: Sampling, side: int) -> dict[str, Any]:
        process = Process(schedule=schedule, prediction="epsilon", variance="learned_range", clip=1.0)
        sizes = {"image_size": side, "tokenizer": tokenizer.to_json()}
        return {"process": process, "sampling": sampling, **sizes}

    return [
        Conversion(
            "decoder",
            "decoder",
            decoder,
            glide_table(decoder),
            base,
            inputs(low_size),
            record("cosine", Sampling(sampler="ddpm", steps="100", guidance_scale=3.0), low_size),
            parts=(Part(pairs[0][0], "", PARAMETERS[pairs[0][0]]),),
        ),
        Conversion(
            "upsampler",
            "upsampler",
            upsampler,
            glide_table(upsampler),
            upsampling,
            {**inputs(size), "low_resolution": array(1, low_size, low_size, 3)},
            {**record("linear", Sampling(sampler="ddim", steps="fast27"), size), "low_size": low_size},
            parts=(Part(pairs[0][1], "", PARAMETERS[pairs[0][1]]),),
        ),
    ]


def decoder_module(inpainting: bool = False) -> Decoder:
    """The base network, as released."""
    return Decoder(BASE, image_tokens=0, text=CAPTIONS, reads_image=False, inpainting=inpainting)


def upsampler_module(inpainting: bool = False) -> Upsampler:
    """The upsampler, as released."""
    return Upsampler(UPSAMPLER, text=CAPTIONS, inpainting=inpainting)


def block_entries(table: Table, target: str, source: str, layer: int | None) -> None:
    """Adds a transformer's layer, of which Karlo's own code has the names too."""
    table.norm(f"{target}/attention_norm", f"{source}.ln_1", layer)
    table.dense(f"{target}/attention/qkv", f"{source}.attn.c_qkv", layer)
    table.dense(f"{target}/attention/out", f"{source}.attn.c_proj", layer)
    table.norm(f"{target}/mlp_norm", f"{source}.ln_2", layer)
    table.dense(f"{target}/mlp_in", f"{source}.mlp.c_fc", layer)
    table.dense(f"{target}/mlp_out", f"{source}.mlp.c_proj", layer)


def glide_table(module: Decoder | Upsampler) -> Table:
    """The table of either network: they share the names, and the caption encoder is of the same kind."""
    table, text = Table(), module.text
    unet_entries(table, GuidedDiffusion(module.unet), "unet/", context=True)
    table.plain("text/token_embedding/embedding", "token_embedding.weight")
    table.plain("text/positions", "positional_embedding")
    table.plain("text/padding", "padding_embedding")
    for layer in range(text.depth):
        block_entries(table, "text/transformer/blocks", f"transformer.resblocks.{layer}", layer)
    table.norm("text/final_norm", "final_ln")
    table.dense("text_time", "transformer_proj")
    return table
