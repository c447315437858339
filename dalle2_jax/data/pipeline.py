"""From a data set's name to batches: shuffled ones that can be resumed exactly, and fixed ones for evaluation.

data = Data(name="captioned_shapes", config="one_object")
tokenizer = Tokenizer.train(all_captions(data, data.train_split), 512, 32)
batches = train_iterator(data, data.train_split, tokenizer, batch_size=128, seed=0)
batch = next(batches)   # {"image": uint8 [b, h, w, 3], "tokens": int32 [b, n], "mask": bool [b, n], "index": int32 [b]}
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax.data.dataset import Data, open_source
from dalle2_jax.data.source import Captions, Source
from dalle2_jax.data.sources.scene import Scene
from dalle2_jax.errors import CaptionTruncated, InputError
from dalle2_jax.images.resize import shrink
from dalle2_jax.tokenizer import Tokenizer


def _encode(tokenizer: Tokenizer, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """As `Tokenizer.encode`, but with one warning for all the captions that are too long."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CaptionTruncated)
        tokens, mask = tokenizer.encode(captions)
    cut = [warning for warning in caught if issubclass(warning.category, CaptionTruncated)]
    for other in caught:
        if other not in cut:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    if cut:
        longer = f"{len(cut)} of {len(captions)} captions are longer than {tokenizer.context_length} tokens and are cut"
        warnings.warn(longer, CaptionTruncated, stacklevel=3)
    return tokens, mask


Transform = Callable[[np.ndarray, np.random.Generator], dict[str, np.ndarray]]


AHEAD_BYTES = 2**30  # of images, in all batches that are fetched ahead


def _ahead(images: np.ndarray, rows: int) -> tuple[int, int]:
    """(threads, batches fetched ahead of the one in use) where images are decoded or transformed as they are needed.

    `images` is one image as it is decoded. Pillow and NumPy let other threads run while they work, and two threads
    a core hide some of the storage's latency; more take turns at Python's lock more often. Two batches a thread even
    out the time that a batch takes; fewer where they would fill more than `AHEAD_BYTES`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(max(4, 2 * cores), 16)
    batches = min(max(AHEAD_BYTES // (rows * images.nbytes), 2), 2 * threads)
    return min(threads, batches), batches


class _Gather:
    """Turns {"index", "draws", "seeds"} into a batch. Cached images and tokens are gathered by one indexing each."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer | None,
        image_size: int | None,
        full: float,
        labels: bool,
        transform: Transform | None,
    ):
        self.source, self.tokenizer, self.image_size, self.full = source, tokenizer, image_size, full
        self.labels, self.transform = labels, transform
        if not source.cache:
            return
        self.images = shrink(source.images(), image_size)
        if labels:
            self.label = source.labels()
        if tokenizer is None:
            return
        captions = source.captions()
        numbers: dict[str, int] = {}
        flat = [numbers.setdefault(caption, len(numbers)) for group in captions for caption in group]
        self.caption = np.asarray(flat, np.int32)  # of each (image, caption), its number among the distinct ones
        self.count = np.asarray([len(group) for group in captions])
        self.start = np.cumsum(self.count) - self.count
        self.tokens, self.mask = _encode(tokenizer, list(numbers))

    def _choose(self, draws: np.ndarray, count: np.ndarray) -> np.ndarray:
        others = 1 + np.floor(draws[:, 1] * (count - 1)).astype(np.int64)
        return np.where((draws[:, 0] < self.full) | (count == 1), 0, others)

    def __call__(self, drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        index, draws, read = drawn["index"], drawn["draws"], {}
        if self.source.cache:
            image, label = self.images[index], self.label[index] if self.labels else None
            if self.tokenizer is not None:
                caption = self.caption[self.start[index] + self._choose(draws, self.count[index])]
                read = {"tokens": self.tokens[caption], "mask": self.mask[caption]}
        else:
            image, captions, label = _examples(self.source, index, self.image_size, self.labels)
            if self.tokenizer is not None:
                chosen = self._choose(draws, np.asarray([len(group) for group in captions]))
                texts = [group[i] for group, i in zip(captions, chosen, strict=True)]
                read = dict(zip(("tokens", "mask"), self.tokenizer.encode(texts, warn=False), strict=True))
        images = {"image": image}
        if self.transform is not None:
            made = [
                self.transform(single, np.random.default_rng(seed))
                for single, seed in zip(image, drawn["seeds"], strict=True)
            ]
            images = {name: np.stack([one[name] for one in made]) for name in made[0]}
        if self.labels:
            read["label"] = label
        return {**images, **read, "index": index.astype(np.int32)}


def _examples(
    source: Source, index: np.ndarray, image_size: int | None, labels: bool
) -> tuple[np.ndarray, Captions, np.ndarray | None]:
    if labels:
        return source.labelled_examples(index, image_size)
    return *source.examples(index, image_size), None


class TrainIterator:
    """Endless batches; `set_state` of what `get_state` gave (JSON-able) goes on exactly, in any process."""

    def __init__(self, batches, examples: int):
        self._batches, self._examples = iter(batches), examples

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def get_state(self) -> dict:
        return {"examples": self._examples, "position": json.loads(json.dumps(self._batches.get_state()))}

    def set_state(self, state: dict) -> None:
        if state.get("examples") != self._examples:
            raise InputError(
                f"the saved position is of a split of {state.get('examples')} images, this one has {self._examples}; "
                "bring the images back as they were, or start another run from this one (--run NEW --init-from)"
            )
        self._batches.set_state(state["position"])

    def close(self) -> None:
        if hasattr(self._batches, "close"):
            self._batches.close()


def train_iterator(
    data: Data,
    split: str,
    tokenizer: Tokenizer | None,
    batch_size: int,
    seed: int,
    image_size: int | None = None,
    rows: Sequence[int] | None = None,
    source: Source | None = None,
    labels: bool = False,
    transform: Transform | None = None,
) -> TrainIterator:
    """Shuffled batches without end: {"image" uint8, "tokens" int32, "mask" bool, "index" int32}.

    Without a tokenizer there are no tokens and mask; with `labels` there is also "label" int32, each image's class.
    Images larger than `image_size` are made smaller. `transform` turns each image (uint8 [h, w, 3], with a random
    generator that depends on the seed and the image's place alone) into entries of the batch instead of "image".
    `batch_size` is that of all processes together, and `rows` are those of each batch that this one reads (all by
    default): the rows of one batch are the same however many processes share them, and so is the position that
    `get_state` gives. Raises InputError for a batch larger than the split, for rows that it has not, and for labels
    that the data have not. `source` spares opening the split again.
    """
    import grain

    source = source or open_source(data, split)
    if batch_size > len(source):
        raise InputError(f"batch_size is {batch_size}, but {data.name} ({split}) has only {len(source)} images")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    if labels:
        source.check_labels()
    mine = _rows(rows, batch_size)

    def draw(number: int, index: np.ndarray) -> dict[str, np.ndarray]:
        draws = np.random.default_rng((seed, number)).random((batch_size, 2))
        seeds = [(seed, number, int(row)) for row in mine]
        return {"index": np.asarray(index)[mine], "draws": draws[mine], "seeds": seeds}

    gather = _Gather(source, tokenizer, image_size, data.caption_probability_full, labels, transform)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    batches = order.batch(batch_size, drop_remainder=True).map_with_index(draw).map(gather)
    threads, ahead = 1, 4  # enough where a batch is one indexing
    if transform is not None or not source.cache:
        one = gather.images[:1] if source.cache else source.examples([0], image_size)[0]
        threads, ahead = _ahead(one, len(mine))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return TrainIterator(batches.to_iter_dataset(options), len(source))


def _rows(rows: Sequence[int] | None, batch_size: int) -> np.ndarray:
    mine = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    if not len(mine) or mine.min() < 0 or mine.max() >= batch_size:
        raise InputError(f"rows must be some of the {batch_size} of a batch, and not {mine.tolist()}")
    return mine


def evaluation_batches(
    data: Data,
    split: str,
    tokenizer: Tokenizer | None,
    batch_size: int,
    count: int | None = None,
    *,
    image_size: int | None = None,
    with_captions: bool = False,
    with_scenes: bool = False,
    labels: bool = False,
    rows: Sequence[int] | None = None,
    source: Source | None = None,
) -> list[dict]:
    """The first `count` examples of a split (all by default) with their full captions, in fixed batches.

    Without a tokenizer there are no tokens and mask; with `labels` there is also "label" int32. The last batch is
    smaller where `batch_size` does not divide `count`. `with_captions` adds "captions" (list of str) and `with_scenes`
    "scenes" (list of `Scene`) to each batch.
    `rows` are those of each batch that are read (all by default), as in `train_iterator`. Raises InputError where the
    split has fewer examples, or no labels.
    """
    source = source or open_source(data, split)
    count = len(source) if count is None else count
    if not 1 <= count <= len(source):
        raise InputError(f"{count} examples are asked of {data.name} ({split}), which has {len(source)}")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    if rows is not None and count % batch_size:
        raise InputError(f"with rows, all batches must be of one size; {count} examples leave a part of {batch_size}")
    mine, batches = _rows(rows, batch_size), []
    for start in range(0, count, batch_size):
        index = start + mine[mine < count - start]
        image, captions, label = _examples(source, index, image_size, labels)
        captions = [group[0] for group in captions]
        batch = {"image": image, "index": index.astype(np.int32)}
        if labels:
            batch["label"] = label
        if tokenizer is not None:
            batch["tokens"], batch["mask"] = _encode(tokenizer, captions)
        if with_captions:
            batch["captions"] = captions
        if with_scenes:
            batch["scenes"] = source.scenes(index)
        batches.append(batch)
    return batches


@dataclasses.dataclass(frozen=True)
class Examples:
    """Images uint8 [n, h, w, 3] with their full captions, and their scenes where the data set records them."""

    images: np.ndarray
    captions: list[str]
    scenes: list[Scene] | None


def evaluation_examples(data: Data, split: str, count: int, *, source: Source | None = None) -> Examples:
    """The first `count` examples of a split (all, where it has fewer), untokenized.

    Splits of captioned_shapes run evenly through their combinations, so these do too.
    """
    source = source or open_source(data, split)
    if not len(source):
        raise InputError(f"the split {split!r} of {data.folder or data.name} is empty; there is nothing to measure on")
    index = range(min(count, len(source)))
    images, captions = source.examples(index)
    scenes = source.scenes(index) if source.has_scenes else None
    return Examples(images, [group[0] for group in captions], scenes)
