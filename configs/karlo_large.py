"""Karlo on an accelerator, fine-tuned on your own images: as configs/karlo.py, in bfloat16, with more and larger steps.

python -m train configs/karlo_large.py runs/karlo IMAGES decoder --run tuned
"""

from configs.karlo import Size, tuned
from train.config.system import System

ACCELERATOR = Size("bfloat16", True, 1000, 64, 2000, 32, 100, 0.995, 50, 200, 500, 500)


def system(run: str, images: str) -> System:
    """Prior and decoder of the converted `run`, trained on the folder `images`, after which the new run is named."""
    return tuned(run, images, ACCELERATOR)
