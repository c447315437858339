"""What a config says of its data, and opening it."""

from __future__ import annotations

import dataclasses
import os

from dalle2_jax.data.source import Source
from dalle2_jax.data.sources.folder import SPLITS as FOLDER_SPLITS
from dalle2_jax.data.sources.folder import FolderRecords, read_folder
from dalle2_jax.data.sources.tfds import open_builder, open_records
from dalle2_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Which images and captions to train on: plain values only, so that a config file says it and a stage records it.

    `config` None is the data set's first. `folder` is the folder of images that the name "folder" reads
    (`dalle2_jax.data.sources.folder`). Environment variable DALLE2_DATA_DIR goes before `data_dir`, where data sets are
    prepared. `image_size` resizes on the host. `cache` decodes a split into memory once; without it images are
    decoded as they are needed. `caption_probability_full` is how often training takes an image's first caption;
    otherwise it draws another one. `counts` (train, validation, test, unseen) and `seed` are settings of
    captioned_shapes alone.
    """

    name: str = "captioned_shapes"
    config: str | None = None
    folder: str | None = None
    data_dir: str = "data_cache"
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    unseen_split: str = "unseen"
    image_size: int | None = None
    cache: bool = True
    caption_probability_full: float = 0.5
    counts: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.caption_probability_full <= 1:
            raise InputError(f"caption_probability_full is {self.caption_probability_full}; it must lie in 0 to 1")
        if self.counts is not None and len(self.counts) != 4:
            raise InputError("counts names four numbers of images: train, validation, test, unseen")

    @property
    def prepared_dir(self) -> str:
        return os.environ.get("DALLE2_DATA_DIR") or self.data_dir


def open_source(data: Data, split: str) -> Source:
    """The examples of one split, in a fixed order; draws captioned_shapes on its first use.

    Raises InputError, naming what there is, for a data set, config or split that does not exist.
    """
    if (data.name == "folder") != (data.folder is not None):
        raise InputError(
            f"data.name is {data.name!r} and data.folder {data.folder!r}; images of a folder want data.name=folder "
            "and data.folder=PATH, other data sets no folder"
        )
    if data.name == "folder":
        folder = read_folder(data.folder, data.prepared_dir)
        chosen = folder.split(split)
        records, files = FolderRecords(folder.root, chosen), [image.name for image in chosen]
        settings = {"image_size": data.image_size, "cache": data.cache, "notice": folder.summary(), "files": files}
        return Source(data.folder, split, records, "image", "captions", **settings)
    opened = open_records(data.name, _builder(data), split)
    scenes = data.name == "captioned_shapes"
    return Source(data.name, split, *opened, image_size=data.image_size, cache=data.cache, has_scenes=scenes)


def _builder(data: Data):
    changes = {}
    if data.name == "captioned_shapes":
        changes = dict(zip(("train", "validation", "test", "unseen"), data.counts or (), strict=False))
        changes["seed"] = data.seed
    return open_builder(data.name, data.config, data.prepared_dir, changes)


def has_split(data: Data, split: str) -> bool:
    """Whether the data set has a split of that name."""
    return split.split("[")[0] in (FOLDER_SPLITS if data.name == "folder" else _builder(data).info.splits)


def all_captions(data: Data, split: str, source: Source | None = None) -> list[str]:
    """Every caption of a split, for training a tokenizer."""
    source = source or open_source(data, split)
    return [caption for captions in source.captions() for caption in captions]
