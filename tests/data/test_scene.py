"""Scenes are drawn where and as large as they say, and captions say what is in them and parse back."""

import itertools

import numpy as np
import pytest

from dalle2_jax.data.sources import scene as scenes
from dalle2_jax.data.sources.captioned_shapes import configured, example
from dalle2_jax.data.sources.scene import Scene, SceneObject


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("image_size", [16, 64, 200])
def test_coverage_has_the_area_and_the_box_of_the_shape(shape, image_size):
    extent, center = 0.5, (0.48, 0.53)
    covered = scenes.coverage(shape, center, extent, image_size)
    assert covered.min() >= 0 and covered.max() <= 1
    share = {"circle": np.pi / 4, "square": 1, "triangle": 1 / 2, "cross": 5 / 9}[shape]
    np.testing.assert_allclose(covered.sum(), share * (extent * image_size) ** 2, rtol=0.02)
    # Against a count of points inside, eight by eight to a pixel.
    u = (np.arange(image_size * 8) + 0.5) / (image_size * 8)
    x, y = (u - center[0])[None, :] / extent, (u - center[1])[:, None] / extent
    inside = {
        "circle": np.hypot(x, y) < 0.5,
        "square": (abs(x) < 0.5) & (abs(y) < 0.5),
        "triangle": (abs(y) < 0.5) & (2 * abs(x) < y + 0.5),
        "cross": ((abs(x) < 0.5) & (abs(y) < 1 / 6)) | ((abs(y) < 0.5) & (abs(x) < 1 / 6)),
    }[shape]
    counted = inside.reshape(image_size, 8, image_size, 8).mean((1, 3))
    assert np.abs(covered - counted).max() < 0.3
    assert np.abs(covered - counted).mean() < 0.012


def test_draw_paints_colors_on_the_background():
    item = SceneObject("square", "cyan", "large", (0.5, 0.5), 0.5, 0.96)
    image = scenes.draw(Scene("gray", (item,)))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert image[0, 0].tolist() == [128, 128, 128]
    assert image[32, 32].tolist() == [5, 240, 240]
    assert (image == image[32, 32]).all(-1).sum() == 32 * 32


@pytest.mark.parametrize("config", ["one_object", "mixed"])
def test_scenes_are_as_their_captions_say(config):
    for index in range(300):
        scene, captions = example(configured(config), "train", index)
        assert len(captions) == len(set(captions)) == 4
        stated = [scenes.parse_caption(caption) for caption in captions]
        assert all(scenes.fits(item, scene) for item in stated)
        full = stated[0]
        assert (full.background, full.relation) == (scene.background, scene.relation)
        for said, item in zip(full.objects, scene.objects, strict=True):
            assert (said.shape, said.color, said.size) == (item.shape, item.color, item.size)
        for item in scene.objects:
            low, high = scenes.EXTENTS[len(scene.objects)][item.size]
            assert low <= item.extent <= high
            assert all(0 <= c - item.extent / 2 and c + item.extent / 2 <= 1 for c in item.center)
        if scene.relation:
            first, second = scene.objects
            right, down = first.center[0] - second.center[0], first.center[1] - second.center[1]
            along, across = (down, right) if scene.relation in ("above", "below") else (right, down)
            assert (along < 0) == (scene.relation in ("above", "left of"))
            # Apart along the axis of the relation, which is the longer way between the centres.
            assert abs(along) >= (first.extent + second.extent) / 2 + scenes.GAP - 1e-9 and abs(along) > abs(across)
        else:
            assert max(abs(c - 0.5) for c in scene.objects[0].center) <= 6 / 64
        assert Scene.from_json(scene.to_json()) == scene


def test_every_attribute_is_said_on_its_own():
    single = {"color": 0, "shape": 0, "size": 0, "background": 0}
    for index in range(400):
        for caption in example(configured("one_object"), "train", index)[1]:
            stated = scenes.parse_caption(caption)
            item = stated.objects[0] if stated.objects else SceneObject()
            said = {name for name in ("color", "shape", "size") if getattr(item, name)}
            said |= {"background"} if stated.background else set()
            if len(said) == 1:
                single[said.pop()] += 1
    assert min(single.values()) >= 40


def test_full_caption():
    first, second = SceneObject("circle", "red", "small"), SceneObject("square", "blue", "large")
    assert scenes.full_caption(Scene("gray", (first,))) == "a small red circle on a gray background"
    assert (
        scenes.full_caption(Scene("white", (first, second), "left of"))
        == "a small red circle left of a large blue square on a white background"
    )


@pytest.mark.parametrize(
    "caption, scene",
    [
        ("a circle", Scene(None, (SceneObject("circle"),))),
        ("something red", Scene(None, (SceneObject(None, "red"),))),
        ("  A  LARGE shape ", Scene(None, (SceneObject(None, None, "large"),))),
        ("a black background", Scene("black")),
        (
            "something red above a small cross on a white background",
            Scene("white", (SceneObject(None, "red"), SceneObject("cross", None, "small")), "above"),
        ),
    ],
)
def test_parse_partial_captions(caption, scene):
    assert scenes.parse_caption(caption) == scene


@pytest.mark.parametrize("caption", ["", "a dog", "a red", "a red small circle", "a circle on a red background", "red"])
def test_captions_outside_the_grammar_are_refused(caption):
    with pytest.raises(ValueError, match="outside the grammar"):
        scenes.parse_caption(caption)


def test_fits_tells_true_from_false():
    first, second = SceneObject("circle", "blue", "small"), SceneObject("square", "red", "large")
    scene = Scene("gray", (first, second), "above")
    for caption in ("a circle above a square", "a square below a circle", "something red", "a gray background"):
        assert scenes.fits(scenes.parse_caption(caption), scene), caption
    for caption in (
        "a circle below a square",
        "a red circle",
        "a circle left of a square",
        "a cross",
        "a small square",
    ):
        assert not scenes.fits(scenes.parse_caption(caption), scene), caption


def test_palette_is_far_apart():
    every = [np.array(value) for value in (*scenes.COLORS.values(), *scenes.BACKGROUNDS.values())]
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(every, 2)) >= 120
    assert {shape for shape, _ in scenes.HELD_OUT_PAIRS} == set(scenes.SHAPES)
