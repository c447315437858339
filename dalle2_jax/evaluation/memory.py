"""What drawing one picture takes of memory, stage by stage, from the shapes of a run alone.

Each stage is compiled for one picture on the devices at hand and its working memory is what the compiler plans, beside
the weights; nothing is read but `stage.json` and the checkpoints' metadata, and nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax import stages
from dalle2_jax.checkpoint import LoadedStage, Run, StageFolder, load_shapes
from dalle2_jax.checkpoint.run import KINDS, first_of_kind, require
from dalle2_jax.clip import CLIP
from dalle2_jax.decoder import Decoder, caption_for
from dalle2_jax.layers.precision import cast, with_dtype
from dalle2_jax.prior import DiffusionPrior
from dalle2_jax.tokenizer import tokenizer_from_json


@dataclass(frozen=True)
class Memory:
    """Bytes of a stage: its weights, and what is at work beside them while one picture is drawn."""

    stage: str
    weights: int
    working: int


def memory_of_drawing(run: str | Path, dtype: str | None = None) -> Iterator[Memory]:
    """One `Memory` a stage of a run, in the order in which they work; dtype: as in `DALLE2.load`.

    Raises, before anything is compiled:
        CheckpointError: for a run or stage that cannot be read, or if no stage reads captions.
        InputError: if prior or decoder work with a CLIP that is not there.
    """
    folders = Run(run)
    found = [_planned(folder, dtype) for folder in folders if folder.kind in KINDS]
    clip = first_of_kind(found, "clip")
    length = tokenizer_from_json(folders.caption_reader.record.tokenizer).context_length
    if any(_reads_clip(stage) for stage in found):
        require(found, "clip")
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    encoded = encoded_shapes(clip, length)
    return (_memory(stage, key, encoded) for stage in found)


def _memory(stage: LoadedStage, key: Any, encoded: tuple[Any, Any, Any, Any]) -> Memory:
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stage.params))
    return Memory(stage.name, weights, _working(trace_drawing(stage, key, encoded).lower()))


def _reads_clip(stage: LoadedStage) -> bool:
    """Whether a stage is given CLIP's embeddings, or a decoder its text states."""
    if isinstance(stage.module, Decoder):
        return stage.module.reads_image or stage.module.text_width is not None
    return isinstance(stage.module, DiffusionPrior)


def _planned(folder: StageFolder, dtype: str | None) -> LoadedStage:
    module, params = folder.record.rebuilt("module"), load_shapes(folder.path)
    if dtype is not None:
        module, params = with_dtype(module, dtype), jax.eval_shape(lambda tree: cast(tree, dtype), params)
    return LoadedStage(module, params, folder.record)


def encoded_shapes(clip: LoadedStage | None, length: int) -> tuple[Any, Any, Any, Any]:
    """Shapes of what `DALLE2` knows of a caption: embedding, states (None without a CLIP), tokens and mask."""
    tokens, mask = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, length), bool)
    if clip is None:
        return None, None, tokens, mask
    embedding, states = jax.eval_shape(
        lambda *inputs: stages.encode_text(*inputs, module=clip.module), clip.params, tokens, mask
    )
    return embedding, states, tokens, mask


def trace_drawing(stage: LoadedStage, key: Any, encoded: tuple[Any, Any, Any, Any]) -> jax.stages.Traced:
    """What a stage runs for one image, traced from shapes: of its parameters, one key `[1]` and the caption."""
    embedding, states, tokens, mask = encoded
    module = stage.module
    if isinstance(module, CLIP):
        return stages.encode_text.trace(stage.params, tokens, mask, module=module)
    settings = {"module": module, "process": stages.process_of(stage), "sampling": stages.sampling_of(stage, {})}
    null = (embedding, states, mask)
    if isinstance(module, DiffusionPrior):
        text = tokens if module.vocabulary_size is not None else states
        null = None if module.learned_null else null
        return stages.draw_embeddings.trace(key, stage.params, embedding, text, mask, null, **settings)
    if isinstance(module, Decoder):
        caption = caption_for(module, encoded, jax.ShapeDtypeStruct((1,), bool), lambda: null)
        image = embedding if module.reads_image else None
        return stages.decode.trace(key, stage.params, image, caption, None, **settings)
    size = stage.record.low_size
    small = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    caption = (tokens, mask) if module.text is not None else None
    settings |= {"size": stage.record.image_size, "tile": None}
    return stages.upsample.trace(key, stage.params, small, caption, **settings)


def _working(lowered: Any) -> int:
    analysis = lowered.compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes
