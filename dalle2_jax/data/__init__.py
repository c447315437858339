"""Captioned images: the data sets drawn or read here, and the pipeline that makes batches of them."""

from dalle2_jax.data.dataset import Data, all_captions, open_source
from dalle2_jax.data.pipeline import Examples, evaluation_batches, evaluation_examples, train_iterator

__all__ = [
    "Data",
    "Examples",
    "all_captions",
    "evaluation_batches",
    "evaluation_examples",
    "open_source",
    "train_iterator",
]
