"""Images decoded as they are needed: by several threads, as the cached ones, resumable, bounded in memory."""

import json
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data import Data, all_captions, open_source, train_iterator
from dalle2_jax.data.pipeline import AHEAD_BYTES, _ahead
from dalle2_jax.images.resize import resize
from dalle2_jax.tokenizer import Tokenizer

SIDE, BATCH = 48, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JPEG and PNG files of several modes, with EXIF data that turn some of them."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(60):
        noise = rng.integers(0, 256, (SIDE, SIDE + 5 * (number % 3), 3)).astype(np.uint8)
        image, exif = Image.fromarray(noise).convert(("RGB", "L", "RGBA")[number % 3]), Image.Exif()
        exif[0x0112] = 1 + number % 8
        image.save(root / f"{number:02d}.{'png' if image.mode == 'RGBA' else 'jpg'}", exif=exif)
        (root / f"{number:02d}.txt").write_text(f"image {number}\nanother name of {number}")
    return root


def opened(folder, cache: bool, **fields):
    data = Data(name="folder", folder=str(folder), data_dir=str(folder.parent / "cache"), cache=cache, **fields)
    source = open_source(data, "train")
    return data, source, Tokenizer.train(all_captions(data, "train", source), 300, 12)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(("first", "then"), [(None, None), (None, 16), (None, 24), (36, 20), (96, 12), (16, 32)])
def test_images_decoded_as_needed_are_those_decoded_at_once(folder, first, then):
    iterators = []
    for cache in (True, False):
        data, source, tokenizer = opened(folder, cache, image_size=first)
        iterators.append(train_iterator(data, "train", tokenizer, BATCH, 5, image_size=then, source=source))
    for _ in range(12):
        assert_equal(*(next(iterator) for iterator in iterators))
    for iterator in iterators:
        iterator.close()


def test_several_threads_read_and_resume_exactly(folder):
    data, source, tokenizer = opened(folder, False)
    fetch, meeting, readers = source._records.__getitems__, threading.Barrier(2, timeout=60), set()

    class Meeting:
        """Records whose first two readers wait for one another: one thread alone would wait in vain."""

        def __getitems__(self, indices):
            if threading.current_thread() is not threading.main_thread() and len(readers) < 2:
                readers.add(threading.get_ident())
                meeting.wait()
            return fetch(indices)

        def __len__(self):
            return len(source)

    read = opened(folder, False)[1]
    read._records = Meeting()
    iterator = train_iterator(data, "train", tokenizer, BATCH, 5, image_size=16, source=read)
    for _ in range(11):
        next(iterator)
    assert len(readers) == 2
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(11)]
    again = train_iterator(data, "train", tokenizer, BATCH, 5, image_size=16, source=source)
    again.set_state(json.loads(state))
    for batch in expected:
        assert_equal(next(again), batch)
    for each in (iterator, again):
        each.close()


def test_reading_in_threads_leaves_warnings_on(folder):
    def read():
        for _ in range(20):
            source.examples(range(8))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = opened(folder, False)[1]
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(UserWarning, match="still heard"):
            warnings.warn("still heard", stacklevel=1)


def test_a_file_that_is_damaged_later_is_named(tmp_path):
    for number in range(12):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number}.jpg")
        (tmp_path / f"{number}.txt").write_text("a thing")
    data, source, tokenizer = opened(tmp_path, False)
    number = int(next(train_iterator(data, "train", tokenizer, 1, 0, source=source))["index"][0])
    name = source._files[number]
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    iterator = train_iterator(data, "train", tokenizer, len(source), 0, source=source)
    with pytest.raises(ValueError, match=f"^{name} in {tmp_path} cannot be used: it is damaged or cut short .*mend it"):
        next(iterator)
    iterator.close()


@pytest.mark.parametrize("factor", [2, 3, 4, 5, 7, 8, 12, 16])
def test_a_side_that_divides_is_averaged_and_rounded(factor):
    rng = np.random.default_rng(factor)
    cells = rng.integers(0, 256, (2, 6, 1, 6, 1, 3))
    images = np.clip(cells + rng.integers(-2, 3, (2, 6, factor, 6, factor, 3)), 0, 255)
    expected = (2 * images.sum((2, 4)) + factor**2) // (2 * factor**2)
    resized = resize(images.reshape(2, 6 * factor, 6 * factor, 3).astype(np.uint8), 6)
    np.testing.assert_array_equal(resized, expected)


def test_batches_ahead_are_bounded_in_memory():
    small, large = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 1024, 1024, 3), np.uint8)
    threads, ahead = _ahead(small, 128)
    assert 4 <= threads <= 16 and ahead == 2 * threads
    threads, ahead = _ahead(large, 128)
    assert threads == ahead == 2 and ahead * 128 * large.nbytes <= AHEAD_BYTES
    assert _ahead(large, 4096)[1] == 2  # one in use and one on its way, whatever they take
