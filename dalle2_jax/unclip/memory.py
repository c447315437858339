"""What sampling one image takes of memory, stage by stage, from the shapes of a run alone.

Each stage is compiled for one image on the devices at hand and its working memory is what the compiler plans, beside
the weights; nothing is read but `stage.json` and the checkpoints' metadata, and nothing is sampled.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.checkpoint import LoadedStage, Run, StageFolder, load_shapes
from dalle2_jax.checkpoint.run import CASCADE, first_of_kind, require
from dalle2_jax.clip import CLIP, encode_captions
from dalle2_jax.decoder import Decoder
from dalle2_jax.layers.precision import cast, with_dtype
from dalle2_jax.prior import Prior
from dalle2_jax.tokenizer import tokenizer_from_json
from dalle2_jax.unclip import sample
from dalle2_jax.unclip.sample import Call


@dataclass(frozen=True)
class Memory:
    """Bytes of a stage: its weights, and what is at work beside them while one image is sampled."""

    stage: str
    weights: int
    working: int


def memory_of_sampling(run: str | Path, dtype: str | None = None) -> Iterator[Memory]:
    """One `Memory` a stage of a run, in the order in which they work; dtype: as in `DALLE2.load`.

    Raises, before anything is compiled:
        CheckpointError: for a run or stage that cannot be read, or if no stage reads captions.
        InputError: if prior or decoder work with a CLIP that is not there.
    """
    folders = Run(run)
    found = [_planned(folder, dtype) for folder in folders if folder.kind in CASCADE]
    clip = first_of_kind(found, "clip")
    length = tokenizer_from_json(folders.caption_reader.record.tokenizer).context_length
    if any(_reads_clip(stage) for stage in found):
        require(found, "clip")
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    captions = caption_shapes(clip, length)
    return (_memory(stage, key, captions) for stage in found)


def _memory(stage: LoadedStage, key: Any, captions: EncodedCaptions) -> Memory:
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stage.params))
    return Memory(stage.name, weights, _working(call_for_one_image(stage, key, captions).trace().lower()))


def _reads_clip(stage: LoadedStage) -> bool:
    """Whether a stage is given CLIP's embeddings, or a decoder its text states."""
    if isinstance(stage.module, Decoder):
        return stage.module.reads_image or stage.module.text_width is not None
    return isinstance(stage.module, Prior)


def _planned(folder: StageFolder, dtype: str | None) -> LoadedStage:
    module, params = folder.record.rebuilt("module"), load_shapes(folder.path)
    if dtype is not None:
        module, params = with_dtype(module, dtype), jax.eval_shape(lambda tree: cast(tree, dtype), params)
    return LoadedStage(module, params, folder.record)


def caption_shapes(clip: LoadedStage | None, length: int) -> EncodedCaptions:
    """The shapes of one encoded caption; without embedding and states where there is no CLIP."""
    tokens, mask = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, length), bool)
    if clip is None:
        return EncodedCaptions(tokens, mask)
    return jax.eval_shape(functools.partial(encode_captions, clip.module), clip.params, tokens, mask)


def call_for_one_image(stage: LoadedStage, key: Any, captions: EncodedCaptions) -> Call[Any]:
    """What a stage runs for one image, as `generate` calls it, on the shapes of one key `[1]` and one caption."""
    module, empty = stage.module, captions
    if isinstance(module, CLIP):
        return sample.encode_captions(stage, captions.tokens, captions.mask)
    if isinstance(module, Prior):
        return sample.sample_image_embeddings(stage, captions, key, empty if module.needs_empty_caption else None)
    if isinstance(module, Decoder):
        embedding = captions.embedding if module.reads_image else None
        return sample.decode(stage, captions, key, embedding, empty=empty if module.needs_empty_caption else None)
    size = stage.record.low_size
    small = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return sample.upsample(stage, key, small, captions=captions)


def _working(lowered: Any) -> int:
    analysis = lowered.compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes
