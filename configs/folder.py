"""Your own images: a folder of them with captions, in the networks of configs/emoji.py.

    dalle2 data check IMAGES                                                          # what is in it
    python -m train configs/folder.py IMAGES all                                      # from nothing
    python -m train configs/folder.py IMAGES all --run tuned --init-from runs/emoji   # fine-tuned from a trained run
    dalle2 evaluate runs/tuned

A caption is `NAME.txt` beside `NAME.png`, or a line of one `metadata.jsonl` or `metadata.csv` with `file_name` and
`text`. Images are cut to their central square. The steps are for some hundred images, about a quarter of an hour
on two CPU cores; with thousands, give as many as configs/emoji.py has, or more (`decoder.steps=50000`). For an
accelerator take configs/folder_large.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from configs import emoji
from dalle2_jax.data.dataset import Data
from train.config.system import System

# What 271 emoji bore: with more steps the prior and the decoder got worse on held-out ones.
STEPS = {"clip": 250, "prior": 120, "decoder": 900, "upsampler": 300, "autoregressive_prior": 120}


def system(folder: str) -> System:
    """The cascade of configs/emoji.py for the images in `folder`; the run is named after it."""
    return on_folder(emoji.system(), folder, STEPS)


def on_folder(full: System, folder: str, steps_of: Mapping[str, int]) -> System:
    """The stages of a system for the images in `folder`, with other numbers of steps."""
    stages = {}
    for name, recipe in full.stages.items():
        steps = steps_of[name]
        optimizer = replace(recipe.optimizer, warmup_steps=steps // 10)
        stages[name] = replace(
            recipe,
            steps=steps,
            batch_size=min(recipe.batch_size, 64),
            validate_every=steps // 5,
            checkpoint_every=steps // 5,
            optimizer=optimizer,
        )
    place = Path(folder).expanduser().resolve()
    data = Data(name="folder", folder=str(place), image_size=full.data.image_size)
    return replace(full, name=place.name or "folder", data=data, stages=stages)
