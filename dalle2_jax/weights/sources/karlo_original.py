"""Karlo v1 as Kakao Brain published it: three Lightning checkpoints and the statistics of CLIP's embeddings.

    prior-ckpt-step=01000000-of-01000000.ckpt       decoder-ckpt-step=01000000-of-01000000.ckpt
    improved-sr-ckpt-step=1.2M.ckpt                 ViT-L-14_stats.th

Sources: kakaobrain/karlo, karlo/modules; diffusers, scripts/convert_kakao_brain_unclip_to_diffusers.py. CLIP itself is
not among them: it is OpenAI's ViT-L/14, in the layout of transformers.
"""

from __future__ import annotations

from pathlib import Path

from dalle2_jax.decoder import Decoder, Upsampler
from dalle2_jax.layers.unet import UNet
from dalle2_jax.prior import DiffusionPrior
from dalle2_jax.tokenizer import tokenizer_from_json
from dalle2_jax.weights.conversion import Conversion
from dalle2_jax.weights.sources import karlo, pipeline
from dalle2_jax.weights.sources.glide import block_entries
from dalle2_jax.weights.sources.prior import STATISTICS, block_of, read_statistic
from dalle2_jax.weights.sources.unet import GuidedDiffusion, unet_entries
from dalle2_jax.weights.table import Table
from dalle2_jax.weights.tensors import Tensors, WeightsError, open_tensors

PRIOR_MODULE = DiffusionPrior(
    embedding_size=768,
    width=2048,
    depth=20,
    heads=32,
    context_length=77,
    embedding_scale=1.0,
    learned_null=False,
)
DECODER_UNET = UNet(
    image_size=64,
    out_channels=6,
    channels=320,
    channel_multipliers=(1, 2, 3, 4),
    depth=3,
    attention_resolutions=(32, 16, 8),
    head_channels=64,
    dropout=0.1,
)
UPSAMPLER_UNET = UNet(
    image_size=256,
    out_channels=3,
    channels=320,
    channel_multipliers=(1, 2, 3, 4),
    depth=3,
    attention_resolutions=(),
    scale_shift=False,
    middle_attention=False,
)
TEXT_WIDTH = 1536
CLAMP = 10.0  # of the prior's x_0; diffusers' schedulers say 5

PRIOR, FIRST, LAST = "model.", "model_first_steps.", "model_last_step."
FILES = {"prior": "prior-ckpt*", "decoder": "decoder-ckpt*", "upsampler": "*sr-ckpt*", "statistics": "*_stats.*"}


def conversions(folder: Path, clip: Conversion) -> list[Conversion]:
    """The stages of a folder with these four files; clip: ViT-L/14, which is not among them.

    Raises:
        WeightsError: if a file is missing, damaged, or not Karlo's.
    """
    mean, std = statistics(find(folder, "statistics"), PRIOR_MODULE.embedding_size)
    tokenizer = tokenizer_from_json(clip.record["tokenizer"])
    module = PRIOR_MODULE.clone(embedding_mean=mean, embedding_std=std)
    prior = pipeline.prior(
        module, prior_table(module), find(folder, "prior"), clip.module, tokenizer, CLAMP, karlo.PRIOR_PARAMETERS
    )
    unet = DECODER_UNET.clone()
    module = karlo.decoder_module(unet, {"cross_attention_dim": TEXT_WIDTH})
    decoder = karlo.decoder(module, decoder_table(module), find(folder, "decoder"), clip.module, tokenizer)
    module = karlo.upsampler_module(UPSAMPLER_UNET.clone(), UPSAMPLER_UNET.clone())
    upsampler = karlo.upsampler(module, upsampler_table(module), find(folder, "upsampler"), unet.image_size)
    return [clip, prior, decoder, upsampler]


def is_there(folder: Path) -> bool:
    """Whether a folder has any of these files."""
    return any(any(folder.glob(FILES[kind])) for kind in ("prior", "decoder", "upsampler"))


def find(folder: Path, kind: str) -> Tensors:
    """The tensors of one of the four files, by the beginning of its name.

    Raises:
        WeightsError: naming the pattern, where there is not exactly one.
    """
    found = sorted(folder.glob(FILES[kind]))
    if len(found) != 1:
        raise WeightsError(f"{folder} has {len(found)} files {FILES[kind]}; Karlo's {kind} is one")
    return open_tensors(found[0])


def statistics(tensors: Tensors, size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of CLIP's image embeddings; the file holds the two of them in that order."""
    if sorted(tensors.shapes) != ["0", "1"]:
        raise WeightsError(f"{tensors.where} is no pair of mean and standard deviation")
    named = tensors.renamed(dict(zip(("0", "1"), STATISTICS, strict=True)).get)
    mean, std = (read_statistic(named, name, size) for name in STATISTICS)
    return mean, std


def prior_table(module: DiffusionPrior) -> Table:
    """The table of the prior."""
    table = Table()
    table.plain("positions", f"{PRIOR}positional_embedding", leading=1)
    table.plain("query", f"{PRIOR}prd_emb", leading=2)
    table.dense("time_in", f"{PRIOR}time_embed.0")
    table.dense("time_out", f"{PRIOR}time_embed.2")
    table.dense("image_embedding_projection", f"{PRIOR}clip_img_proj")
    table.dense("text_embedding_projection", f"{PRIOR}text_emb_proj")
    table.dense("text_projection", f"{PRIOR}text_enc_proj")
    for layer in range(module.depth):
        block, place = block_of(module, layer)
        block_entries(table, block, f"{PRIOR}transformer.resblocks.{layer}", place)
    table.norm("final_norm", f"{PRIOR}final_ln")
    table.dense("out", f"{PRIOR}out_proj")
    return table


def decoder_table(module: Decoder) -> Table:
    """The table of the decoder, whose caption projection is part of the same file."""
    table = Table()
    unet_entries(table, GuidedDiffusion(module.unet), "unet/", PRIOR, context=True)
    table.plain("null_image", f"{PRIOR}cf_param")
    table.dense("image_time", f"{PRIOR}clip_emb")
    table.dense("text_time", f"{PRIOR}text_feat_proj")
    table.dense("text_projection", f"{PRIOR}text_seq_proj.0")
    table.norm("text_norm", f"{PRIOR}text_seq_proj.1")
    karlo.token_entries(table, f"{PRIOR}clip_tok_proj", module.image_tokens)
    return table


def upsampler_table(module: Upsampler) -> Table:
    """The table of the two networks of the upsampler, in one file."""
    table = Table()
    unet_entries(table, GuidedDiffusion(module.unet), "unet/", FIRST)
    unet_entries(table, GuidedDiffusion(module.last), "last/", LAST)
    return table
