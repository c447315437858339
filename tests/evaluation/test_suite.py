"""The parts of `dalle2 evaluate` by themselves: PSNR, retrieval, the prior's verdicts, chance, the sheet."""

import json

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data.sources.scene import Scene, SceneObject
from dalle2_jax.evaluation.metrics.prior_cosines import prior_suite
from dalle2_jax.evaluation.metrics.psnr import psnr
from dalle2_jax.evaluation.metrics.retrieval import recall_at
from dalle2_jax.evaluation.report import format_report
from dalle2_jax.evaluation.shapes import _shared_attributes
from dalle2_jax.images import sheet as grid
from dalle2_jax.images.files import save_png
from dalle2_jax.images.sheet import caption_grid


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def test_psnr():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(black, black + 255) == pytest.approx(0.0)
    assert psnr(black, black + 51) == pytest.approx(20 * np.log10(5))
    # Over the whole batch: one image off by 10, the other right, is a mean squared error of 50.
    half = black.copy()
    half[0] += 10
    assert psnr(half, black) == pytest.approx(10 * np.log10(255**2 / 50)) == psnr(black, half)
    assert psnr(black, black) > 100


@pytest.mark.parametrize("k", [1, 3, 50])
def test_recall_against_brute_force(k):
    random = np.random.default_rng(0)
    names = [f"caption {number}" for number in random.integers(0, 9, 20)]
    of_name = {name: unit(random.normal(size=6)) for name in sorted(set(names))}
    text = np.stack([of_name[name] for name in names])
    image = unit(text + 0.5 * random.normal(size=text.shape))
    to_text, to_image = [], []
    for i, name in enumerate(names):
        ranked = sorted(of_name, key=lambda other: -float(image[i] @ of_name[other]))
        to_text.append(name in ranked[:k])
    for name in of_name:
        ranked = sorted(range(20), key=lambda i: -float(image[i] @ of_name[name]))
        to_image.append(name in [names[i] for i in ranked[:k]])
    found = recall_at(image, text, names, k)
    assert found == {
        f"image_to_text_r{k}": pytest.approx(np.mean(to_text)),
        f"text_to_image_r{k}": pytest.approx(np.mean(to_image)),
    }
    assert k < 50 or found["image_to_text_r50"] == 1.0


def embeddings(count=40, size=32):
    """True images at a cosine of about 0.7 to captions that have nothing to do with each other."""
    random = np.random.default_rng(0)
    text = unit(random.normal(size=(count, size)))
    return unit(text + unit(random.normal(size=text.shape))), text


def test_a_healthy_prior():
    true, text = embeddings()
    drawn = unit(true + 0.3 * unit(np.random.default_rng(1).normal(size=true.shape)))
    found = prior_suite(drawn, true, text)
    assert found["healthy"] == {"to_true_image": True, "to_text_minus_baseline": True, "to_unrelated_text": True}
    assert found["to_text"] == pytest.approx(np.mean(np.sum(drawn * text, -1)))
    assert found["to_text_minus_baseline"] == pytest.approx(found["to_text"] - found["baseline_true_to_text"])
    assert set(found["healthy"]) == set(found["healthy_ranges"])
    json.dumps(found)


def test_priors_that_are_not_healthy():
    true, text = embeddings()
    assert prior_suite(text, true, text)["healthy"]["to_text_minus_baseline"] is False  # hands the caption through
    others = prior_suite(np.roll(true, 3, axis=0), true, text)["healthy"]  # of other captions
    assert others["to_true_image"] is False and others["to_text_minus_baseline"] is False
    same = np.broadcast_to(unit(true.mean(0)), true.shape)  # says the same of everything
    assert prior_suite(same, true, text)["healthy"]["to_unrelated_text"] is False


@pytest.mark.parametrize("count", [2, 3, 8])
def test_unrelated_captions_are_never_the_own(count):
    text = np.eye(8)[:count]
    assert prior_suite(text, text, text)["to_unrelated_text"] == 0.0


def test_chance():
    def scene(shape, color, size, background):
        return Scene(background=background, objects=(SceneObject(shape=shape, color=color, size=size),))

    a, b = scene("circle", "red", "small", "gray"), scene("circle", "blue", "small", "white")
    shared = _shared_attributes([a, a], [a, b])
    assert shared == {"color": 0.5, "background": 0.5, "shape": 1.0, "size": 1.0, "all": 0.5}


def test_the_report_as_text():
    fractions = {name: 0.25 for name in ("color", "background", "shape", "size", "all")}
    names = ("oracle", "oracle_embedding_only", "oracle_other_embedding", "chance", "oracle_unseen_pairs")
    true, text = embeddings()
    report = {
        **{name: fractions for name in names},
        "captions": 3,
        "captions_unseen_pairs": 2,
        "retrieval": {f"{a}_r{k}": 0.5 for a in ("image_to_text", "text_to_image") for k in (1, 5)},
        "prior": prior_suite(text, true, text),
        "inversion": {"psnr": 31.0, "steps": "50"},
        "upsampler": {"psnr": 30.0, "psnr_bicubic": 27.5, "gain_db": 2.5},
    }
    shown = format_report(report)
    assert "3 test captions" in shown and "2 unseen pairs" in shown and "gain +2.5 dB" in shown
    assert shown.count("NOT healthy") == 2 and "color 0.25" in shown
    del report["upsampler"]
    assert "DDIM there and back  31.0 dB in 50 steps each way" in shown and "bicubic" not in format_report(report)


# The sheet of images


def red(count: int, side: int) -> np.ndarray:
    return np.broadcast_to(np.uint8([255, 0, 0]), (count, side, side, 3))


def test_captions_of_any_alphabet_are_written():
    plain = grid._fonts()[0]
    assert grid._missing(plain, "a red cafe, 3 x") == 0 and grid._missing(plain, "круг") == 4
    wider = np.asarray(caption_grid(red(2, 8), ["красный круг", "红色的圆圈在白色背景上" * 3]))
    # What is long without spaces is broken, not written across its neighbour's caption.
    assert wider.shape[0] > np.asarray(caption_grid(red(2, 8), ["a circle", "a circle"])).shape[0]
    text = "a red circle on a gray background " * 3
    assert " ".join(grid._wrapped(text, plain, 96)) == text.strip()
    assert grid._wrapped("02_a_small_red_circle", plain, 70) == ["02_a_small_", "red_circle"]
    for long in (text, "x" * 99, "02_a_small_red_triangle_on_gray"):
        lines = grid._wrapped(long, plain, 96)
        assert len(lines) > 1 and all(plain.getlength(line) <= 96 for line in lines)
    assert grid._wrapped(" \n", plain, 96) == []


def test_a_sheet_of_images():
    single = np.asarray(caption_grid(red(5, 16), ["a red square"] * 5, columns=2, cell=32))
    assert (single == [255, 0, 0]).all(-1).sum() == 5 * 32 * 32
    rows = np.flatnonzero((single == [255, 0, 0]).all(-1).any(1))
    assert (np.diff(rows) > 1).sum() == 2  # three rows of two with captions between
    captions = ["a red square", "ein rotes Viereck mit vielen weiteren Woertern, die umbrochen werden"]
    several = np.asarray(caption_grid([red(2, 4), red(2, 100) // 2], captions, labels=("real", "drawn")))
    # Both are brought to the larger side, and stand above each other.
    assert (several == [255, 0, 0]).all(-1).sum() == 2 * 100 * 100 == (several == [127, 0, 0]).all(-1).sum()
    unlabelled = np.asarray(caption_grid([red(2, 4), red(2, 100)], captions))
    assert unlabelled.shape[0] == several.shape[0] and unlabelled.shape[1] < several.shape[1]
    assert np.asarray(caption_grid(red(1, 4), [""])).shape[0] > 96  # small images are shown at 96 px


@pytest.mark.parametrize(("images", "captions"), [([red(1, 4), red(2, 4)], ["a", "b"]), (red(0, 4), [])])
def test_a_sheet_needs_an_image_a_caption(images, captions):
    with pytest.raises(ValueError, match="one image a caption"):
        caption_grid(images, captions)


def test_png_files(tmp_path):
    path = tmp_path / "deep" / "a.png"
    save_png(path, red(1, 8)[0], {"prompt": "ein grüner Kreis"})
    save_png(path.with_name("b.png"), caption_grid(red(1, 8), ["a"]))
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.png", "b.png"]
    with Image.open(path) as image:
        assert image.text == {"prompt": "ein grüner Kreis"}
        np.testing.assert_array_equal(np.asarray(image), red(1, 8)[0])
