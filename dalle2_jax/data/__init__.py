"""Captioned pictures: the data sets drawn or read here, and the pipeline that makes batches of them."""

from dalle2_jax.data.pipeline import (
    Data,
    Examples,
    all_captions,
    evaluation_batches,
    evaluation_examples,
    open_source,
    train_iterator,
)

__all__ = [
    "Data",
    "Examples",
    "all_captions",
    "evaluation_batches",
    "evaluation_examples",
    "open_source",
    "train_iterator",
]
