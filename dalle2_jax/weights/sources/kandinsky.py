"""The priors of Kandinsky 2.1 (CLIP L/14) and 2.2 (open_clip's bigG/14), in the layout of diffusers.

Source: diffusers, pipelines/kandinsky/pipeline_kandinsky_prior.py and kandinsky2_2/pipeline_kandinsky2_2_prior.py. They
are of Karlo's shape. Kandinsky's decoders work in the space of a VQGAN and are no decoders of unCLIP's kind.
"""

from __future__ import annotations

from pathlib import Path

from dalle2_jax.weights.conversion import Conversion
from dalle2_jax.weights.folder import read_tokenizer
from dalle2_jax.weights.sources.pipeline import clip_halves, folder_prior, read_pipeline

PIPELINES = ("KandinskyPriorPipeline", "KandinskyV22PriorPipeline")


def conversions(folder: Path) -> list[Conversion]:
    """CLIP and prior of a folder that either pipeline's `save_pretrained` wrote.

    Raises:
        WeightsError: if a part is missing, damaged, or of another model.
    """
    read_pipeline(folder, PIPELINES)
    tokenizer = read_tokenizer(folder / "tokenizer")
    clip = clip_halves(folder, tokenizer)
    return [clip, folder_prior(folder, "scheduler", clip.module, tokenizer, None)]
