"""The builder prepares the same bytes from the same seed, keeps the held-out pairs apart, and needs no TensorFlow."""

import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dalle2_jax.data.sources import build
from dalle2_jax.data.sources import scene as scenes
from dalle2_jax.data.sources.captioned_shapes import CONFIGS, SPLITS, CaptionedShapes, configured, example, prepare

COUNTS = {"train": 40, "validation": 10, "test": 12, "unseen": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=list(CONFIGS))
def builder(request, folder):
    return prepare(folder, request.param, **COUNTS)


def test_features_and_counts(builder):
    for split in SPLITS:
        source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        assert len(source) == COUNTS[split]
        for index in range(len(source)):
            record = source[index]
            scene, captions = example(builder.builder_config, split, index)
            assert [caption.decode() for caption in record["captions"]] == captions
            assert scenes.Scene.from_json(record["scene"].decode()) == scene
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(record["image"]))), scenes.draw(scene))


def test_runs_without_tensorflow(tmp_path):
    code = (
        "import sys; from dalle2_jax.data.sources.captioned_shapes import prepare;"
        f"b = prepare({str(tmp_path)!r}, train=3, validation=1, test=1, unseen=1);"
        "assert b.as_data_source(split='train')[0]['image'].shape == (64, 64, 3);"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr.startswith("drawing captioned_shapes/one_object_train3")


@pytest.mark.parametrize("config", list(CONFIGS))
def test_held_out_pairs_are_in_unseen_alone(config):
    settings = configured(config)
    for split in SPLITS:
        pairs = Counter()
        for index in range(240):
            scene, captions = example(settings, split, index)
            pairs.update((item.shape, item.color) for item in scene.objects)
            for stated in map(scenes.parse_caption, captions):
                pairs.update((item.shape, item.color) for item in stated.objects if item.shape and item.color)
        expected = scenes.HELD_OUT_PAIRS if split == "unseen" else scenes.SEEN_PAIRS
        assert set(pairs) == set(expected)


def test_splits_run_evenly_through_all_combinations():
    settings = configured("one_object")
    for split, pairs, total in (("test", 20, settings.test), ("unseen", 4, settings.unseen)):
        seen = Counter()
        for index in range(total):
            scene = example(settings, split, index)[0]
            item = scene.objects[0]
            seen[item.shape, item.color, item.size, scene.background] += 1
        assert len(seen) == pairs * 3 * 2
        assert max(seen.values()) - min(seen.values()) <= 1


def test_same_seed_same_bytes(tmp_path):
    small = {"train": 6, "validation": 2, "test": 2, "unseen": 2}
    made = [Path(prepare(str(tmp_path / name), **small).data_dir) for name in "ab"]
    files = [sorted(path.glob("*.array_record*")) for path in made]
    assert len(files[0]) == 4
    for one, other in zip(*files, strict=True):
        assert one.name == other.name
    images = []
    for path in (*made, Path(prepare(str(tmp_path / "a"), seed=1, **small).data_dir)):
        source = tfds.builder_from_directory(path).as_data_source(
            split="train", decoders={"image": tfds.decode.SkipDecoding()}
        )
        images.append([source[i]["image"] for i in range(len(source))])
    assert images[0] == images[1]
    assert images[0] != images[2]
    scenes_of = [{example(configured("one_object", seed=0), s, i)[0] for i in range(200)} for s in SPLITS[:3]]
    assert not scenes_of[0] & scenes_of[1] and not scenes_of[1] & scenes_of[2]


def test_what_was_left_half_prepared_is_replaced(tmp_path, capfd):
    small = {"train": 3, "validation": 1, "test": 1, "unseen": 1}
    version = str(CaptionedShapes.VERSION)
    final = tmp_path / "captioned_shapes" / configured("one_object", **small).name / version
    final.mkdir(parents=True)
    (final / "captioned_shapes-train.array_record-00000-of-00001").write_bytes(b"half")
    left = final.parent / f"{version}.incompleteABC_{version}"
    left.mkdir()
    builder = prepare(str(tmp_path), **small)
    assert len(builder.as_data_source(split="train")) == 3
    assert sorted(path.name for path in final.parent.iterdir()) == [version]
    assert "drawing" in capfd.readouterr().err
    prepare(str(tmp_path), **small)
    assert capfd.readouterr() == ("", "")


def test_unknown_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="it has one_object, mixed"):
        prepare(str(tmp_path), "three_objects")
    with pytest.raises(ValueError, match="no setting 'trian'; it has train, validation"):
        prepare(str(tmp_path), trian=3)
    with pytest.raises(ValueError, match="train=0"):
        prepare(str(tmp_path), train=0)


def test_a_prepared_data_set_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    small = {"train": 3, "validation": 1, "test": 1, "unseen": 1}
    prepare(str(tmp_path), **small)
    monkeypatch.setattr(build, "_alone", lambda folder: pytest.fail("a lock was asked for"))
    assert len(prepare(str(tmp_path), **small).as_data_source(split="train")) == 3


def test_more_captions_than_there_are_to_say_are_refused():
    with pytest.raises(ValueError, match="captions=17; there are 16 to say"):
        configured("one_object", captions=17)
    assert len(set(example(configured("one_object", captions=16), "train", 0)[1])) == 17
