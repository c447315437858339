"""The data set `captioned_shapes`, drawn on the spot by a TFDS builder that needs no TensorFlow.

    prepare("data_cache", "one_object")                      # captioned_shapes/one_object/1.0.0 under the folder
    tfds.data_source("captioned_shapes/one_object", split="train", data_dir="data_cache")

Features: `image` (64 px PNG), `captions` (the full one first, then partial ones), `scene` (JSON of a `Scene`).
`HELD_OUT_PAIRS` of (shape, color) are shown and named in the split `unseen` and nowhere else. Every example is a
function of (seed, split, index), and each split runs evenly through all its combinations of shape, color, size and
background.
"""

import dataclasses
import functools
import itertools
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from dalle2_jax.data.sources import scene as scenes
from dalle2_jax.data.sources.build import prepare_builder
from dalle2_jax.errors import InputError
from dalle2_jax.images.files import png

IMAGE_SIZE = 64
MOST_CAPTIONS = 16  # beside the full one, there is no other thing to say of a single object
SPLITS = ("train", "validation", "test", "unseen")


@dataclasses.dataclass(kw_only=True)
class CaptionedShapesConfig(tfds.core.BuilderConfig):
    """`two_objects` is the share of images with two objects and a relation; the counts are examples a split."""

    two_objects: float = 0.0
    train: int = 12000
    validation: int = 512
    test: int = 512
    unseen: int = 256
    captions: int = 3
    seed: int = 0


CONFIGS = {
    "one_object": CaptionedShapesConfig(name="one_object", description="One shape near the centre."),
    "mixed": CaptionedShapesConfig(
        name="mixed", description="One shape, or two and how they stand to each other.", two_objects=0.5, train=24000
    ),
}


def configured(config: str, **changes: int) -> CaptionedShapesConfig:
    """The builder config of that name, or a variant with other counts or seed that is kept in a folder of its own."""
    if config not in CONFIGS:
        raise InputError(f"captioned_shapes has no config {config!r}; it has {', '.join(CONFIGS)}")
    base = CONFIGS[config]
    allowed = (*SPLITS, "captions", "seed")
    for name, value in changes.items():
        if name not in allowed:
            raise InputError(f"captioned_shapes has no setting {name!r}; it has {', '.join(allowed)}")
        if value < (0 if name == "seed" else 1):
            raise InputError(f"captioned_shapes cannot have {name}={value}; use a larger number")
    if changes.get("captions", 1) > MOST_CAPTIONS:
        raise InputError(
            f"captioned_shapes cannot have captions={changes['captions']}; there are {MOST_CAPTIONS} to say"
        )
    changes = {name: changes[name] for name in allowed if name in changes and changes[name] != getattr(base, name)}
    if not changes:
        return base
    suffix = "".join(f"_{name}{value}" for name, value in changes.items())
    return dataclasses.replace(base, name=config + suffix, **changes)


def example(config: CaptionedShapesConfig, split: str, index: int) -> tuple[scenes.Scene, list[str]]:
    """The scene of one example and its captions, the full one first."""
    number = SPLITS.index(split)
    pairs = scenes.HELD_OUT_PAIRS if split == "unseen" else scenes.SEEN_PAIRS
    rng = np.random.default_rng((config.seed, number, 0, index))
    # Blocks of all combinations, each block in its own order.
    combinations = list(itertools.product(pairs, scenes.SIZES, scenes.BACKGROUNDS))
    block, position = divmod(index, len(combinations))
    order = np.random.default_rng((config.seed, number, 1, block)).permutation(len(combinations))
    (shape, color), size, background = combinations[order[position]]
    if rng.random() < config.two_objects:
        others = [pair for pair in pairs if pair != (shape, color)]
        other = (*others[rng.integers(len(others))], scenes.SIZES[rng.integers(len(scenes.SIZES))])
        relation = scenes.RELATIONS[rng.integers(len(scenes.RELATIONS))]
        scene = scenes.place_two(rng, background, relation, [(shape, color, size), other])
    else:
        scene = scenes.place_one(rng, background, shape, color, size)
    return scene, [scenes.full_caption(scene), *scenes.partial_captions(rng, scene, config.captions)]


class CaptionedShapes(tfds.core.GeneratorBasedBuilder):
    """Images of one or two coloured shapes on a background, captioned by a small grammar."""

    VERSION = tfds.core.Version("1.1.0")  # of the images: another one for any change of how scenes are drawn
    BUILDER_CONFIGS = list(CONFIGS.values())
    url_infos = None  # nothing is downloaded; TFDS would import importlib_resources to look for checksums

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                # An encoded file as the value: TFDS would need TensorFlow to encode an array.
                "image": tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format="png"),
                "captions": tfds.features.Sequence(tfds.features.Text()),
                "scene": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str):
        for index in range(getattr(self.builder_config, split)):
            scene, captions = example(self.builder_config, split, index)
            image = png(scenes.draw(scene, IMAGE_SIZE))
            yield index, {"image": image, "captions": captions, "scene": scene.to_json()}


def prepare(data_dir: str, config: str = "one_object", **changes: int) -> CaptionedShapes:
    """The prepared builder; draws the data set under `data_dir` first where it is not there yet.

    `changes` are other counts a split (`train=64`), `captions` or `seed`. What an interrupted preparation left behind
    is removed. Raises InputError for an unknown config or setting.
    """
    settings = configured(config, **changes)
    root = str(Path(data_dir).expanduser())
    make = functools.partial(CaptionedShapes, data_dir=root, config=settings, file_format="array_record")
    total = sum(getattr(settings, split) for split in SPLITS)
    return prepare_builder(make, root, f"drawing captioned_shapes/{settings.name}: {total} images")
