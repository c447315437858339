"""The oracle reads the data set's own images, also blurred and off colour, and calls what is no scene none."""

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data.sources import scene as scenes
from dalle2_jax.data.sources.captioned_shapes import configured, example
from dalle2_jax.data.sources.scene import Scene, SceneObject, draw, parse_caption
from dalle2_jax.evaluation.oracle import judge, read, score, summarize
from dalle2_jax.images.resize import resize


def _drawn(config, split, count):
    made = [example(configured(config), split, index)[0] for index in range(count)]
    return np.stack([draw(scene) for scene in made]), made


@pytest.fixture(scope="module")
def one():
    return _drawn("one_object", "test", 240)


@pytest.fixture(scope="module")
def mixed():
    return _drawn("mixed", "test", 200)


def _none(images):
    return float(np.mean([read(image) is None for image in images]))


def _noisy(images, sigma, rng):
    return np.clip(np.rint(images + rng.normal(0, sigma, images.shape)), 0, 255).astype(np.uint8)


def _ragged(images, rng):
    """Each pixel taken from a place that wanders by about a pixel."""
    rows, columns = np.mgrid[:64, :64]
    out = np.empty_like(images)
    for i, image in enumerate(images):
        moved = []
        for at in (rows, columns):
            field = Image.fromarray(rng.normal(0, 1, (32, 32)).astype(np.float32)).resize((64, 64), 2)
            moved.append(np.clip(np.rint(at + np.asarray(field)), 0, 63).astype(int))
        out[i] = image[moved[0], moved[1]]
    return out


def test_its_own_images(one, mixed):
    fractions = score(*one)
    assert fractions.keys() == {"color", "background", "shape", "size", "all"}
    assert min(fractions.values()) >= 0.99
    assert score(*_drawn("one_object", "unseen", 96))["all"] >= 0.99
    fractions = score(*mixed)
    assert fractions.keys() == {"color", "background", "shape", "size", "relation", "all"}
    assert min(fractions.values()) >= 0.99, fractions


def test_readings_say_where(one):
    for image, scene in zip(one[0][:40], one[1], strict=False):
        reading = read(image).objects[0]
        assert abs(reading.extent - scene.objects[0].extent) <= 2 / 64
        assert np.abs(np.subtract(reading.center, scene.objects[0].center)).max() <= 1.5 / 64


@pytest.mark.parametrize("size", [32, 128])
def test_other_sizes(one, size):
    assert score(resize(one[0][:60], size), one[1][:60])["all"] >= 0.97


def test_it_is_fair_to_what_a_model_makes(one):
    images, made = one
    rng = np.random.default_rng(0)
    small = resize(resize(images, 16), 64)
    shifted = np.clip(images + rng.uniform(-25, 25, (len(images), 1, 1, 3)), 0, 255).astype(np.uint8)
    for changed in (small, _noisy(images, 8, rng), shifted, _ragged(images, rng), _noisy(small, 8, rng)):
        fractions = score(changed, made)
        assert min(fractions["color"], fractions["background"], fractions["size"]) >= 0.95, fractions
        assert fractions["shape"] >= 0.95, fractions


def test_no_scene_is_none(one, mixed):
    rng = np.random.default_rng(1)
    colors = [*scenes.BACKGROUNDS.values(), *scenes.COLORS.values(), *rng.integers(0, 256, (60, 3))]
    assert _none([np.full((64, 64, 3), color, np.uint8) for color in colors]) == 1
    blanks = np.stack([np.full((64, 64, 3), color, np.uint8) for color in scenes.BACKGROUNDS.values()])
    assert _none(_noisy(blanks.repeat(10, 0), 8, rng)) == 1
    assert _none(rng.integers(0, 256, (60, 64, 64, 3)).astype(np.uint8)) >= 0.95
    coarse = rng.integers(0, 256, (60, 12, 12, 3)).astype(np.uint8)
    assert _none(resize(coarse, 64)) >= 0.95
    for level, sigma in ((0, 60), (128, 20), (128, 60), (255, 60)):
        assert _none(_noisy(np.full((20, 64, 64, 3), level, np.uint8), sigma, rng)) >= 0.95
    for images, _ in (one, mixed):
        order = (np.arange(len(images)) + rng.integers(1, len(images))) % len(images)
        blends = np.rint(images / 2 + images[order] / 2).astype(np.uint8)
        assert _none(blends) >= 0.95


def test_shuffled_captions_score_as_the_captions_predict(one):
    images, made = one
    readings = [read(image) for image in images]
    # Prediction: how often two captions drawn apart agree, from the counts of each value alone.
    values = {
        "background": [scene.background for scene in made],
        **{name: [getattr(scene.objects[0], name) for scene in made] for name in ("color", "shape", "size")},
    }
    values["all"] = list(zip(*values.values(), strict=True))
    judged = []
    for shift in range(1, 240, 12):
        judged += [judge(reading, made[(i + shift) % len(made)]) for i, reading in enumerate(readings)]
    fractions = summarize(judged)
    for name, column in values.items():
        counts = np.array([column.count(value) for value in set(column)])
        expected = (counts * (counts - 1)).sum() / (len(made) * (len(made) - 1))
        assert abs(fractions[name] - expected) <= 0.03, (name, fractions[name], expected)


def test_an_unclear_outline_has_no_shape():
    rng = np.random.default_rng(2)
    rows, columns = np.mgrid[:64, :64]
    unclear = 0
    for _ in range(40):
        field = Image.fromarray(rng.normal(0, 1, (6, 6)).astype(np.float32)).resize((64, 64), 3)
        blob = np.hypot(rows - 32, columns - 32) < 18 * (1 + 0.35 * np.asarray(field))
        reading = read(np.where(blob[..., None], (250, 5, 5), (0, 0, 0)).astype(np.uint8))
        unclear += reading is None or reading.objects[0].shape is None
    assert unclear >= 20


def test_judging_asks_only_for_what_is_said():
    reading = Scene("gray", (SceneObject("circle", "red", "small"),))
    assert judge(reading, parse_caption("something red")) == {"color": True, "all": True}
    assert judge(reading, parse_caption("a large circle on a gray background")) == {
        "shape": True,
        "size": False,
        "background": True,
        "all": False,
    }
    assert judge(None, parse_caption("a red circle")) == {"color": False, "shape": False, "all": False}
    unclear = Scene("gray", (SceneObject(None, "red", "small"),))
    assert judge(unclear, parse_caption("a red circle")) == {"color": True, "shape": False, "all": False}
    two = Scene("gray", (SceneObject("circle", "red", "small"), SceneObject("cross", "blue", "large")), "above")
    assert judge(two, parse_caption("a red circle on a gray background")) == {
        "color": False,
        "shape": False,
        "background": True,
        "all": False,
    }
    assert summarize([{"color": True, "all": True}, {"shape": False, "all": False}]) == {
        "color": 1.0,
        "shape": 0.0,
        "all": 0.5,
    }


def test_relations_hold_for_the_objects_named(mixed):
    for image, scene in zip(*mixed, strict=True):
        if scene.relation:
            reading = read(image)
            turned = Scene(scene.background, scene.objects[::-1], scenes.INVERSE[scene.relation])
            wrong = Scene(scene.background, scene.objects, scenes.INVERSE[scene.relation])
            assert judge(reading, turned)["all"]
            assert judge(reading, wrong)["relation"] is False


@pytest.mark.parametrize("image", [np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.uint8)])
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match="uint8 .height, width, 3. images"):
        read(image)
