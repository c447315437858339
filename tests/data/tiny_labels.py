"""A TFDS data set of labelled images that a test prepares, as mnist and cifar10 are."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class TinyLabels(tfds.core.GeneratorBasedBuilder):
    """Gray images of two sizes; those of the split `unlabelled` have the label -1, as TFDS has it without any."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        label = tfds.features.ClassLabel(names=["dark_gray", "bright"])
        image = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "unlabelled")}

    def _generate_examples(self, split):
        for i in range(6):
            file = io.BytesIO()
            image = np.full((10 + 2 * (i % 2), 12), 40 + 160 * (i % 2), np.uint8)
            Image.fromarray(image).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 2 if split == "train" else -1}
