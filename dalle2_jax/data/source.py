"""Random access to the images and captions of one split of any TFDS builder, without TensorFlow."""

import functools
from collections.abc import Sequence

import numpy as np

from dalle2_jax.data.sources.scene import Scene
from dalle2_jax.errors import InputError
from dalle2_jax.images.read import ImageError, open_square
from dalle2_jax.images.resize import scaled, shrink

AT_ONCE = 32  # undecoded records in memory: photographs are large
LABEL = "label"

Captions = list[tuple[str, ...]]  # of each example, the full one first


class Source:
    """The examples of one split; made by `dalle2_jax.data.open_source`.

    `records` is a TFDS data source whose images are left encoded, `image` the image's feature, `caption` the
    feature that captions come from, which may be `LABEL`, and `class_names` the classes of that feature; None: there
    are no labels. With `cache` everything is decoded into memory at first use. `notice` is what to tell people of it.
    `has_scenes`: the records say what is drawn, as those of captioned_shapes do. `files` names each image's file, where
    it has one.
    """

    def __init__(
        self,
        name,
        split,
        records,
        image,
        caption,
        class_names=None,
        image_size=None,
        cache=True,
        notice=None,
        has_scenes=False,
        files=None,
    ):
        self.name, self.split, self.image_size, self.cache = name, split, image_size, cache
        self.notice, self.has_scenes, self._files = notice, has_scenes, files
        self._records, self._image, self._caption, self.class_names = records, image, caption, class_names

    def __len__(self) -> int:
        return len(self._records)

    def _decode(self, index: int, record, at_most: int | None) -> tuple[np.ndarray, int]:
        """The image of a record as a square uint8 [s, s, 3] no larger than `at_most`, and its side before that."""
        try:
            with open_square(record[self._image]) as image:
                image = image if self.image_size is None else scaled(image, self.image_size)
                small = at_most is not None and at_most < image.width
                return np.asarray(scaled(image, at_most) if small else image), image.width
        except ImageError as error:
            which = f"image {index} of {self.name} ({self.split})"
            which = which if self._files is None else f"{self._files[index]} in {self.name}"
            raise InputError(f"{which} cannot be used: {error}; mend it or take it out") from error

    def _texts(self, record) -> tuple[str, ...]:
        value = record[self._caption]
        if self._caption == LABEL and self.class_names is not None:
            return (self.class_names[int(value)].replace("_", " "),)
        if isinstance(value, dict):
            value = value["text"]
        texts = [value] if isinstance(value, bytes | str) else list(value)
        texts = [item["text"] if isinstance(item, dict) else item for item in texts]
        texts = [item.decode() if isinstance(item, bytes) else str(item) for item in texts]
        texts = tuple(text for text in texts if text.strip())
        if not texts:
            raise InputError(f"an example of {self.name} ({self.split}) has no caption")
        return texts

    def _read(self, indices: Sequence[int], at_most: int | None = None) -> tuple[np.ndarray, Captions, np.ndarray]:
        """Images, captions and labels, decoded; each image is made no larger than `at_most` before the next is read."""
        images, captions, labels, sizes = [], [], [], set()
        for start in range(0, len(indices), AT_ONCE):
            some = [int(i) for i in indices[start : start + AT_ONCE]]
            for index, record in zip(some, self._fetch(some), strict=True):
                image, side = self._decode(index, record, at_most)
                sizes.add(side)
                images.append(image)
                captions.append(self._texts(record))
                labels.append(-1 if self.class_names is None else int(record[LABEL]))
        if len(sizes) > 1:
            raise InputError(
                f"the images of {self.name} have several sizes ({min(sizes)} to {max(sizes)} px); set data.image_size"
            )
        return np.stack(images), captions, np.asarray(labels, np.int32)

    @functools.cached_property
    def _all(self) -> tuple[np.ndarray, Captions, np.ndarray]:
        return self._read(range(len(self)))

    def _fetch(self, indices: Sequence[int]):
        return self._records.__getitems__([int(i) for i in indices])

    def images(self, indices: Sequence[int] | None = None) -> np.ndarray:
        """Images uint8 [len(indices), h, w, 3], of the whole split by default."""
        if self.cache:
            return self._all[0] if indices is None else self._all[0][np.asarray(indices, np.int64)]
        return self._read(range(len(self)) if indices is None else indices)[0]

    def captions(self, indices: Sequence[int] | None = None) -> Captions:
        """The captions of each example, the full one first."""
        indices = range(len(self)) if indices is None else indices
        if self.cache:
            return [self._all[1][int(i)] for i in indices]
        return [self._texts(record) for record in self._fetch(indices)]

    def examples(self, indices: Sequence[int], at_most: int | None = None) -> tuple[np.ndarray, Captions]:
        """`images` and `captions` of the same examples, read once; larger images made `at_most` that large."""
        if self.cache:
            return shrink(self.images(indices), at_most), self.captions(indices)
        return self._read(indices, at_most)[:2]

    def labelled_examples(
        self, indices: Sequence[int], at_most: int | None = None
    ) -> tuple[np.ndarray, Captions, np.ndarray]:
        """`examples` and `labels` of the same examples, read once."""
        if self.cache:
            return *self.examples(indices, at_most), self.labels(indices)
        images, captions, labels = self._read(indices, at_most)
        return images, captions, self._checked(labels)

    def labels(self, indices: Sequence[int] | None = None) -> np.ndarray:
        """The classes int32 [len(indices)], of the whole split by default.

        Raises:
            InputError: for a data set without labels, and where an example has none.
        """
        self.check_labels()
        indices = np.arange(len(self)) if indices is None else np.asarray(indices, np.int64)
        if self.cache:
            return self._checked(self._all[2][indices])
        return self._checked(np.asarray([int(record[LABEL]) for record in self._fetch(indices)], np.int32))

    def check_labels(self) -> None:
        """Raises InputError for a data set without labels."""
        if self.class_names is None:
            raise InputError(
                f"the data set {self.name} has no labels; TFDS data sets with the feature '{LABEL}' have, such as "
                "mnist and cifar10"
            )

    def _checked(self, labels: np.ndarray) -> np.ndarray:
        if (labels < 0).any():  # as TFDS has it where a test set comes without them
            raise InputError(f"the split {self.split!r} of {self.name} has images without a label; take another split")
        return labels

    def scenes(self, indices: Sequence[int] | None = None) -> list[Scene]:
        """What is drawn in each image, for data sets that know it; InputError for others."""
        if not self.has_scenes:
            raise InputError(f"the data set {self.name} does not record scenes; captioned_shapes does")
        records = self._fetch(range(len(self)) if indices is None else indices)
        return [Scene.from_json(record["scene"].decode()) for record in records]
