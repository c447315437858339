"""Batches: right images with right captions, exact resumption, the same for any number of processes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dalle2_jax.data import (
    Data,
    all_captions,
    evaluation_batches,
    evaluation_examples,
    open_source,
    train_iterator,
)
from dalle2_jax.data.sources.captioned_shapes import example
from dalle2_jax.data.sources.scene import draw, full_caption
from dalle2_jax.images.resize import resize, to_square_rgb
from dalle2_jax.tokenizer import Tokenizer
from tests.data import tiny_labels  # noqa: F401 - TFDS knows it once it is imported

COUNTS = (50, 12, 10, 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Data(data_dir=str(tmp_path_factory.mktemp("data")), counts=COUNTS)


@pytest.fixture(scope="module")
def source(data):
    return open_source(data, "train")


@pytest.fixture(scope="module")
def tokenizer(data, source):
    return Tokenizer.train(all_captions(data, "train", source), 400, 24)


def _equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("cache", [True, False])
def test_batches_hold_images_with_their_captions(data, tokenizer, cache):
    uncached = Data(data_dir=data.data_dir, counts=COUNTS, cache=cache)
    source = open_source(uncached, "train")
    iterator = train_iterator(uncached, "train", tokenizer, 8, 0)
    full, total, seen = 0, 0, []
    for _ in range(12):
        batch = next(iterator)
        assert batch["image"].shape == (8, 64, 64, 3) and batch["image"].dtype == np.uint8
        assert batch["tokens"].shape == batch["mask"].shape == (8, 24)
        assert (batch["tokens"].dtype, batch["mask"].dtype, batch["index"].dtype) == (np.int32, bool, np.int32)
        np.testing.assert_array_equal(batch["image"], source.images(batch["index"]))
        captions, texts = source.captions(batch["index"]), tokenizer.decode(batch["tokens"])
        assert all(text in group for text, group in zip(texts, captions, strict=True))
        full += sum(text == group[0] for text, group in zip(texts, captions, strict=True))
        total += 8
        seen += batch["index"].tolist()
    iterator.close()
    assert 0.3 < full / total < 0.7
    assert sorted(seen[:50]) == list(range(50)) and seen[:40] != list(range(40))
    assert seen[:40] != seen[50:90]  # each epoch in an order of its own


def test_caption_probability(data, tokenizer):
    for probability, expected in ((1.0, {0}), (0.0, {1, 2, 3})):
        always = Data(data_dir=data.data_dir, counts=COUNTS, caption_probability_full=probability)
        source, iterator = open_source(always, "train"), train_iterator(always, "train", tokenizer, 50, 0)
        chosen = set()
        for _ in range(4):
            batch = next(iterator)
            for text, group in zip(tokenizer.decode(batch["tokens"]), source.captions(batch["index"]), strict=True):
                chosen.add(group.index(text))
        iterator.close()
        assert chosen == expected


@pytest.mark.parametrize("cache", [True, False])
def test_resumes_exactly(data, tokenizer, cache):
    same = Data(data_dir=data.data_dir, counts=COUNTS, cache=cache)
    iterator = train_iterator(same, "train", tokenizer, 8, 3)
    for _ in range(9):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(9)]
    again = train_iterator(same, "train", tokenizer, 8, 3)
    next(again)
    again.set_state(json.loads(state))
    assert all(_equal(next(again), batch) for batch in expected)
    iterator.set_state(json.loads(state))
    assert all(_equal(next(iterator), batch) for batch in expected)
    other = train_iterator(same, "train", tokenizer, 8, 4)
    assert not _equal(next(other), expected[0])
    for each in (iterator, again, other):
        each.close()


def test_a_position_of_another_split_is_refused(data, tokenizer):
    state = train_iterator(data, "validation", tokenizer, 4, 0).get_state()
    with pytest.raises(ValueError, match="split of 12 images, this one has 50"):
        train_iterator(data, "train", tokenizer, 4, 0).set_state(state)


def test_processes_share_the_batches_of_one(data, source, tokenizer):
    whole = train_iterator(data, "train", tokenizer, 12, 0, source=source)
    shares = ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 2, 3])
    parts = [train_iterator(data, "train", tokenizer, 12, 0, rows=rows, source=source) for rows in shares]
    for _ in range(6):
        batch = next(whole)
        for rows, part in zip(shares, parts, strict=True):
            assert _equal(next(part), {key: value[rows] for key, value in batch.items()})
            assert part.get_state() == whole.get_state()


def test_image_size(data, tokenizer):
    small = Data(data_dir=data.data_dir, counts=COUNTS, image_size=16)
    by_field = next(train_iterator(small, "train", tokenizer, 8, 0))
    by_argument = next(train_iterator(data, "train", tokenizer, 8, 0, image_size=16))
    assert _equal(by_field, by_argument)
    large = next(train_iterator(data, "train", tokenizer, 8, 0))["image"]
    mean = large.reshape(8, 16, 4, 16, 4, 3).mean((2, 4))
    assert np.abs(by_field["image"] - mean).max() <= 0.5
    np.testing.assert_array_equal(evaluation_examples(small, "test", 99).images.shape, (10, 16, 16, 3))


def test_evaluation_batches_are_fixed(data, tokenizer):
    batches = evaluation_batches(data, "test", tokenizer, 4, 10, with_captions=True, with_scenes=True)
    assert [len(batch["image"]) for batch in batches] == [4, 4, 2]
    assert np.concatenate([batch["index"] for batch in batches]).tolist() == list(range(10))
    for batch in batches:
        for image, caption, scene in zip(batch["image"], batch["captions"], batch["scenes"], strict=True):
            np.testing.assert_array_equal(draw(scene), image)
            assert full_caption(scene) == caption
        assert tokenizer.decode(batch["tokens"]) == batch["captions"]
    plain = evaluation_batches(data, "test", tokenizer, 4, 8)
    assert len(plain) == 2 and plain[0].keys() == {"image", "tokens", "mask", "index"}
    halves = [evaluation_batches(data, "test", tokenizer, 4, 8, rows=rows)[1] for rows in ([0, 1], [2, 3])]
    assert [half["index"].tolist() for half in halves] == [[4, 5], [6, 7]]
    examples = evaluation_examples(data, "test", 3)
    assert examples.captions == batches[0]["captions"][:3] and examples.scenes == batches[0]["scenes"][:3]


def test_the_environment_names_the_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("DALLE2_DATA_DIR", data.data_dir)
    elsewhere = Data(data_dir=str(tmp_path), counts=COUNTS)
    assert len(open_source(elsewhere, "test")) == 10
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused_in_one_sentence(data, tokenizer):
    with pytest.raises(ValueError, match="batch_size is 51, but captioned_shapes .train. has only 50"):
        train_iterator(data, "train", tokenizer, 51, 0)
    with pytest.raises(ValueError, match="rows must be some of the 9 of a batch"):
        train_iterator(data, "train", tokenizer, 9, 0, rows=[8, 9])
    with pytest.raises(ValueError, match="10 examples leave a part of 4"):
        evaluation_batches(data, "test", tokenizer, 4, 10, rows=[0, 1])
    with pytest.raises(ValueError, match="no split 'tests'; it has .*test"):
        open_source(data, "tests")
    with pytest.raises(ValueError, match="it has one_object, mixed"):
        open_source(Data(config="two", data_dir=data.data_dir), "train")
    with pytest.raises(ValueError, match="no data set 'captioned_shape'; did you mean captioned_shapes"):
        open_source(Data(name="captioned_shape", data_dir=data.data_dir), "train")
    with pytest.raises(ValueError, match="which has 10"):
        evaluation_batches(data, "test", tokenizer, 4, 11)
    with pytest.raises(ValueError, match="0 to 1"):
        Data(caption_probability_full=1.5)
    with pytest.raises(ValueError, match="four numbers"):
        Data(counts=(1, 2))


def test_long_captions_warn_once_and_are_cut(data, source):
    short = Tokenizer.train(all_captions(data, "train", source), 400, 6)
    with pytest.warns(UserWarning, match="captions are longer than 6 tokens and are cut") as caught:
        iterator = train_iterator(data, "train", short, 8, 0, source=source)
    assert len(caught) == 1
    assert (next(iterator)["mask"].sum(1) <= 6).all()
    iterator.close()


def test_other_tfds_builders_are_read_by_name(tmp_path, tokenizer):
    data = Data(name="tiny_labels", data_dir=str(tmp_path), image_size=8)
    source = open_source(data, "train")
    assert source.captions() == [("dark gray",), ("bright",)] * 3
    images = source.images()
    assert images.shape == (6, 8, 8, 3)
    assert images[0].tolist() == np.full((8, 8, 3), 40).tolist() and (images[1] == 200).all()
    batch = next(train_iterator(data, "train", tokenizer, 4, 0, source=source))
    assert tokenizer.decode(batch["tokens"]) == [("dark gray", "bright")[i % 2] for i in batch["index"]]
    assert len(open_source(data, "train[:50%]")) == 3
    with pytest.raises(ValueError, match="several sizes .10 to 12 px.; set data.image_size"):
        open_source(Data(name="tiny_labels", data_dir=str(tmp_path)), "train").images()
    with pytest.raises(ValueError, match="does not record scenes"):
        source.scenes()


@pytest.mark.parametrize("cache", [True, False])
def test_labels_come_with_their_images(tmp_path, tokenizer, cache):
    data = Data(name="tiny_labels", data_dir=str(tmp_path), image_size=8, cache=cache)
    source = open_source(data, "train")
    assert source.class_names == ("dark_gray", "bright") and source.labels().tolist() == [0, 1] * 3
    iterator = train_iterator(data, "train", tokenizer, 4, 0, source=source, labels=True)
    half = train_iterator(data, "train", None, 4, 0, source=source, labels=True, rows=[1, 3])
    for _ in range(4):
        batch, part = next(iterator), next(half)
        assert batch["label"].dtype == np.int32 and batch["label"].shape == (4,)
        np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] == 200)
        np.testing.assert_array_equal(batch["label"], batch["index"] % 2)
        np.testing.assert_array_equal(part["label"], batch["label"][[1, 3]])
        assert "tokens" in batch and "tokens" not in part
    for each in (iterator, half):
        each.close()
    assert "label" not in next(train_iterator(data, "train", tokenizer, 4, 0, source=source))
    held_out = evaluation_batches(data, "train", None, 4, labels=True, rows=None, source=source)
    assert [batch["label"].tolist() for batch in held_out] == [[0, 1, 0, 1], [0, 1]]
    assert all(batch["label"].dtype == np.int32 for batch in held_out)
    with pytest.raises(ValueError, match="the split 'unlabelled' of tiny_labels has images without a label; take ano"):
        evaluation_batches(data, "unlabelled", None, 4, labels=True)


def test_data_without_labels_have_none_to_give(data, source):
    assert source.class_names is None
    for ask in (train_iterator, evaluation_batches):
        with pytest.raises(ValueError, match="the data set captioned_shapes has no labels; TFDS data sets with the"):
            ask(data, "train", None, 4, 0 if ask is train_iterator else 8, labels=True, source=source)


def test_images_become_square_rgb():
    gray = np.arange(12, dtype=np.uint8).reshape(2, 6)
    assert to_square_rgb(gray).tolist() == [[[2] * 3, [3] * 3], [[8] * 3, [9] * 3]]
    clear = np.zeros((2, 2, 4), np.uint8)
    assert (to_square_rgb(clear) == 255).all()
    noise = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3)).astype(np.uint8)
    assert resize(noise, 5).shape == (3, 5, 5, 3) and resize(noise, 30).shape == (3, 30, 30, 3)
    np.testing.assert_array_equal(resize(np.full((1, 12, 12, 3), 77, np.uint8), 5), np.full((1, 5, 5, 3), 77))


def test_data_loads_neither_tfds_nor_grain_before_it_is_used():
    code = (
        "import sys, dalle2_jax.data, dalle2_jax.tokenizer;"
        "loaded = {'tensorflow_datasets', 'grain', 'PIL', 'tokenizers', 'jax'} & set(sys.modules);"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_drawing_the_examples_again_gives_the_images(data, source):
    from dalle2_jax.data.sources.captioned_shapes import configured

    config = configured("one_object", **dict(zip(("train", "validation", "test", "unseen"), COUNTS, strict=True)))
    np.testing.assert_array_equal(source.images([7])[0], draw(example(config, "train", 7)[0]))


def test_a_transform_makes_the_same_of_an_image_in_any_process(data, tokenizer):
    def transform(image, rng):
        return {"image": image[:4], "noise": rng.integers(0, 1000, 3)}

    def first(**settings):
        iterator = train_iterator(data, "train", tokenizer, 8, 0, transform=transform, **settings)
        next(iterator)
        return next(iterator)

    whole = first()
    assert whole["image"].shape == (8, 4, 64, 3) and len({tuple(row) for row in whole["noise"]}) == 8
    assert _equal(whole, first())
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7]):
        assert _equal(first(rows=rows), {name: value[rows] for name, value in whole.items()})


def test_images_are_sent_no_larger_than_they_are_wanted(data, tokenizer, source):
    small = next(train_iterator(data, "train", tokenizer, 8, 0, image_size=16))
    np.testing.assert_array_equal(small["image"], resize(source.images(small["index"]), 16))
    assert next(train_iterator(data, "train", tokenizer, 8, 0, image_size=100))["image"].shape == (8, 64, 64, 3)


def test_an_empty_split_is_no_test(tmp_path):
    from PIL import Image

    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a thing")
    folder = Data(name="folder", folder=str(tmp_path), data_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="the split 'test' of .* is empty"):
        evaluation_examples(folder, "test", 10)
