"""A run of small networks of Karlo's shape, converted with both a prior and an image encoder; and a folder of images
with captions to tune it on."""

from pathlib import Path

import numpy as np
from PIL import Image

from dalle2_jax.weights.run import write_run
from dalle2_jax.weights.sources import karlo
from tests.parity.karlo_folder import TEXT2IMG, read_reference, write_folder

CAPTIONS = ("a cat", "red", "a dog", "my hat")  # within the nine tokens of the small CLIP


def write_karlo_run(place: Path, dtype: str = "float32") -> Path:
    """Writes `place/karlo`, converted from `place/source`; returns it."""
    source = write_folder(place / "source", read_reference(), (*TEXT2IMG, "image_encoder"), "UnCLIPPipeline")
    write_run(place / "karlo", karlo.conversions(source), {"licence": "none"}, log=lambda line: None, dtype=dtype)
    return place / "karlo"


def write_images(folder: Path, count: int = 24) -> Path:
    """Writes images of 24 x 20 pixels, each with a caption beside it; returns the folder."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTIONS[number % len(CAPTIONS)])
    return folder
