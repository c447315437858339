"""What diffusers' unCLIP pipelines share, by their folders: tokenizer, the halves of CLIP, and the prior.

Sources: diffusers, pipelines/deprecated/unclip and pipelines/kandinsky, kandinsky2_2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dalle2_jax.clip import CLIP
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.prior import DiffusionPrior
from dalle2_jax.tokenizer import ClipTokenizer
from dalle2_jax.weights.conversion import Conversion, Part, array
from dalle2_jax.weights.folder import open_part, read_json
from dalle2_jax.weights.sources import clip as clips
from dalle2_jax.weights.sources.prior import STATISTICS, prior_module, prior_table
from dalle2_jax.weights.table import Table
from dalle2_jax.weights.tensors import Tensors, WeightsError, joined


def read_pipeline(folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """`model_index.json` of a folder that holds one of these pipelines.

    Raises:
        WeightsError: if it holds another one, or none.
    """
    index = read_json(folder / "model_index.json")
    if (kind := index.get("_class_name")) not in kinds:
        raise WeightsError(f"{folder} holds a {kind}; a folder of {' or '.join(kinds)} is wanted")
    return index


def clip_halves(folder: Path, tokenizer: ClipTokenizer) -> Conversion:
    """The CLIP of a pipeline: its text encoder, and its image encoder where there is one."""
    config, tensors = read_json(folder / "text_encoder" / "config.json"), open_part(folder / "text_encoder")
    vision = None
    if (folder / "image_encoder").is_dir():
        vision = clips.vision_module(read_json(folder / "image_encoder" / "config.json"))
        tensors = joined([("", tensors), ("", open_part(folder / "image_encoder"))])
    module = CLIP(
        vision=vision,
        text=clips.text_module(config),
        embedding_size=config.get("projection_dim", 768),
        unit_norm=False,
    )
    return clips.conversion(module, tensors, tokenizer, logit_scale=False)


def prior(
    module: DiffusionPrior,
    table: Table,
    tensors: Tensors,
    clip: CLIP,
    tokenizer: ClipTokenizer,
    clamp: float,
    published: int | None = None,
) -> Conversion:
    """A prior of Karlo's kind, sampled as Karlo and Kandinsky do: 25 steps, guidance 4; clamp: of its x_0."""
    length, size = module.context_length, module.embedding_size
    if clip.embedding_size != size:
        raise WeightsError(
            f"the prior of {tensors.where} makes embeddings of {size} numbers and its CLIP's have "
            f"{clip.embedding_size}; give the CLIP it was trained with"
        )
    inputs = {
        "noised_image_embedding": array(1, size),
        "timesteps": array(1, dtype="int32"),
        "text_embedding": array(1, size),
        "text": array(1, length, clip.text.width),
        "text_mask": array(1, length, dtype=bool),
    }
    record = {
        "process": Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=clamp),
        "sampling": Sampling(sampler="ddpm", steps="25", guidance_scale=4.0),
        "tokenizer": tokenizer.to_json(),
    }
    parts = (Part("prior", "", published),)
    return Conversion("prior", "prior", module, table, tensors, inputs, record, ("clip",), parts=parts)


def folder_prior(folder: Path, scheduler: str, clip: CLIP, tokenizer: ClipTokenizer, published: int) -> Conversion:
    """The prior of a pipeline's folder; scheduler: the folder beside it that says where x_0 is clamped."""
    tensors = open_part(folder / "prior")
    module = prior_module(read_json(folder / "prior" / "config.json"), tensors)
    settings = read_json(folder / scheduler / "scheduler_config.json")
    clamp = float(settings.get("clip_sample_range", 1.0)) if settings.get("clip_sample", True) else None
    tensors = tensors.renamed(lambda name: None if name in STATISTICS else name)
    return prior(module, prior_table(module), tensors, clip, tokenizer, clamp, published)
