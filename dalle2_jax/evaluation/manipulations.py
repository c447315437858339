"""How well the latent (z_i, x_T) and its uses keep what they should and change what they should (Sec. 3 and 4).

On captioned shapes, whose oracle reads colour, shape, size and background from an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import jax
import numpy as np

from dalle2_jax.data.dataset import Data
from dalle2_jax.data.pipeline import Examples, evaluation_examples
from dalle2_jax.data.sources.scene import (
    BACKGROUNDS,
    COLORS,
    SEEN_PAIRS,
    SHAPES,
    SIZES,
    Scene,
    coverage,
    draw,
    full_caption,
    place_one,
)
from dalle2_jax.errors import InputError
from dalle2_jax.evaluation.metrics.psnr import psnr
from dalle2_jax.evaluation.oracle import judge_all, score
from dalle2_jax.evaluation.report import ATTRIBUTES
from dalle2_jax.images.resize import resize
from dalle2_jax.manipulate import edit, encode, interpolate, pca_of_run, probe, reconstruct, vary
from dalle2_jax.manipulate.edit import LARGEST_THETA
from dalle2_jax.manipulate.inpaint import inpaint
from dalle2_jax.manipulate.latent import Latent, default_steps
from dalle2_jax.unclip import DALLE2

BATCH = 32
PROBED = 48


def measure_latent(
    model: DALLE2,
    data: Data,
    *,
    count: int = 64,
    theta: float = LARGEST_THETA,
    steps: str | None = None,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Figures of every use of the latent on held-out images of `data` (captioned_shapes, one_object).

    count: test images. theta: where text diffs are judged. steps: of DDIM; None: `default_steps`. Images are taken as
    they come out, from one seed.

    Raises:
        InputError: for other data, or a run that has no latent.
    """
    if data.name != "captioned_shapes" or data.config not in (None, "one_object"):
        raise InputError(
            f"the latent is measured on captioned_shapes/one_object, and this run was trained on {data.name}"
            f"{f'/{data.config}' if data.config else ''}; leave --latent out"
        )
    steps = default_steps(model) if steps is None else steps
    names = ("reconstruct", "vary", "edit", "probe", "inpaint")
    keys = {name: jax.random.fold_in(jax.random.key(seed), number) for number, name in enumerate(names)}
    test = evaluation_examples(data, data.test_split, count)
    log(f"encoding {len(test.images)} images of the {data.test_split} split in {steps} steps of DDIM")
    latent = encode(model, list(test.images), steps=steps, batch_size=BATCH)
    report: dict[str, Any] = {"images": len(test.images), "steps": steps, "seed": seed, "theta": theta}
    log("reconstructing and varying them")
    report["reconstruction"] = reconstruction(model, keys["reconstruct"], latent, test.images)
    report["interpolation_ends_equal"] = ends_equal(model, keys["reconstruct"], latent)
    report["variations"] = {
        share: variations(model, keys["vary"], latent, test, share) for share in ("content", "semantics")
    }
    log("changing one word of their captions")
    report["text_diffs"] = {
        what: text_diffs(model, keys["edit"], what, theta, steps=steps, seed=seed) for what in ("color", "shape")
    }
    log("painting other objects into them")
    report["inpainting"] = inpainting(model, keys["inpaint"], test, seed=seed)
    log("decoding them from few dimensions")
    report["probe"] = probed(model, keys["probe"], test)
    return report


def reconstruction(model: DALLE2, key: jax.Array, latent: Latent, images: np.ndarray) -> dict[str, float]:
    """PSNR in dB of reconstructed images `[b, h, h, 3]`, at the decoder's size and at the final one."""
    figures = {}
    for name, system in (("decoder_psnr", dataclasses.replace(model, upsamplers=())), ("final_psnr", model)):
        made = reconstruct(system, key, latent, batch_size=BATCH).images
        figures[name] = psnr(made, resize(images, made.shape[1]))
    return figures


def ends_equal(model: DALLE2, key: jax.Array, latent: Latent, pairs: int = 4) -> bool:
    """Whether the ends of interpolations are the two reconstructions, byte for byte."""
    pairs = min(pairs, len(latent) // 2)
    for start in range(0, 2 * pairs, 2):
        two = latent[start : start + 2]
        ends = interpolate(model, key, two, (0.0, 0.5, 1.0)).images[[0, 2]]
        if not np.array_equal(ends, reconstruct(model, key, two).images):
            return False
    return True


def variations(model: DALLE2, key: jax.Array, latent: Latent, test: Examples, share: str, **options: Any) -> dict:
    """What one variation of each image keeps of it, by the oracle, and how far its pixels are from it.

    "kept" has shares of 1 an attribute, "shape_and_color" of both; "psnr" is the mean in dB over images.
    """
    images = vary(model, key, latent, 1, share=share, batch_size=BATCH, **options).images
    judged = judge_all(images, test.scenes)
    real = resize(test.images, images.shape[1])
    return {
        "kept": {name: float(np.mean([one[name] for one in judged])) for name in ATTRIBUTES},
        "shape_and_color": float(np.mean([one["shape"] and one["color"] for one in judged])),
        "psnr": float(np.mean([psnr(*pair) for pair in zip(images, real, strict=True)])),
    }


def text_diffs(
    model: DALLE2, key: jax.Array, what: str, theta: float, *, steps: str | None = None, seed: int = 0, **options: Any
) -> dict[str, float]:
    """Scenes whose color or shape is turned into every other by text diffs: did it change, and it alone?

    Returns shares of 1: "changed" to what the caption says, the other attributes "kept", "both" at once.
    """
    before, after = change_pairs(what, seed)
    images = [draw(scene) for scene in before]
    to, origin = ([full_caption(scene) for scene in scenes] for scenes in (after, before))
    latent = encode(model, images, steps=steps, batch_size=BATCH)
    edited = edit(model, key, latent, to, origin, (theta,), batch_size=BATCH, **options).images
    return judge_changes(edited, after, what)


def change_pairs(what: str, seed: int = 0) -> tuple[list[Scene], list[Scene]]:
    """Scenes before and after a change of "color" or "shape", over all ordered pairs of its values.

    Each pair of colours is shown with all shapes, each pair of shapes with half of the colours; sizes and backgrounds
    are drawn.
    """
    values, others = (tuple(COLORS), SHAPES) if what == "color" else (SHAPES, tuple(COLORS)[::2])
    random = np.random.default_rng(seed)
    before, after = [], []
    for first, second in permutations(values, 2):
        for other in others:
            shape, color = (other, first) if what == "color" else (first, other)
            background, size = random.choice(tuple(BACKGROUNDS)), random.choice(SIZES)
            scene = place_one(random, str(background), shape, color, str(size))
            changed = dataclasses.replace(scene.objects[0], **{what: second})
            before.append(scene)
            after.append(dataclasses.replace(scene, objects=(changed,)))
    return before, after


def judge_changes(images: Sequence[np.ndarray], after: Sequence[Scene], what: str) -> dict[str, float]:
    """Shares of images that "changed" the attribute `what` as the scenes have it, "kept" the others, or did "both"."""
    judged = judge_all(images, after)
    kept = [all(one[name] for name in ATTRIBUTES if name not in (what, "all")) for one in judged]
    return {
        "changed": float(np.mean([one[what] for one in judged])),
        "kept": float(np.mean(kept)),
        "both": float(np.mean([one["all"] for one in judged])),
        "pairs": len(judged),
    }


def probed(model: DALLE2, key: jax.Array, test: Examples) -> dict[str, dict[str, float]]:
    """The oracle's fractions of images decoded from their first principal components, by the number of these."""
    pca = pca_of_run(model)
    images, scenes = list(test.images[:PROBED]), test.scenes[:PROBED]
    series = probe(model, key, images, pca, batch_size=BATCH)
    grid = series.images.reshape(len(images), series.columns, *series.images.shape[1:])
    dimensions = [int(label.split()[0]) for label in series.labels[: series.columns]]
    return {str(count): score(grid[:, column], scenes) for column, count in enumerate(dimensions)}


def inpainting(model: DALLE2, key: jax.Array, test: Examples, *, seed: int = 0, **options: Any) -> dict[str, Any]:
    """The object of each image masked out, and another one of another shape and color asked for in its place.

    The mask is a square around the object, a tenth of its side wider on each side; the caption names the new object and
    the image's own background and size. Returns the oracle's shares of 1 for what is painted, and whether everything
    outside of the masks is byte for byte what went in. options: those of `inpaint`.
    """
    random = np.random.default_rng(seed)
    after, masks = [], []
    for scene, image in zip(test.scenes, test.images, strict=True):
        old = scene.objects[0]
        others = [(shape, color) for shape, color in SEEN_PAIRS if shape != old.shape and color != old.color]
        shape, color = others[random.integers(len(others))]
        after.append(dataclasses.replace(scene, objects=(dataclasses.replace(old, shape=shape, color=color),)))
        masks.append(coverage("square", old.center, 1.2 * old.extent, image.shape[0]) > 0)
    painted = inpaint(model, key, list(test.images), masks, [full_caption(scene) for scene in after], **options)
    kept = np.broadcast_to(~painted.mask[..., None], painted.images.shape)
    real = resize(test.images, painted.images.shape[1])
    return {
        **score(painted.images, after),
        "outside_unchanged": bool(np.array_equal(painted.images[kept], real[kept])),
        "images": len(after),
    }


def format_latent(report: dict[str, Any]) -> str:
    """The report as lines to read."""
    made = report["reconstruction"]
    lines = [
        f"{report['images']} test images, {report['steps']} steps of DDIM",
        f"{'reconstruction':>20}  {made['decoder_psnr']:.1f} dB by the decoder, {made['final_psnr']:.1f} dB in the end",
        f"{'interpolation ends':>20}  {'' if report['interpolation_ends_equal'] else 'NOT '}equal to reconstructions",
    ]
    for share, figures in report["variations"].items():
        kept = "  ".join(f"{name} {figures['kept'][name]:.2f}" for name in ATTRIBUTES)
        both, distance = figures["shape_and_color"], figures["psnr"]
        lines.append(f"{'shared ' + share:>20}  {kept}  shape and color {both:.2f}  {distance:.1f} dB to the original")
    for what, figures in report["text_diffs"].items():
        lines.append(
            f"{what + ' by text diff':>20}  changed {figures['changed']:.2f}  rest kept {figures['kept']:.2f}  both "
            f"{figures['both']:.2f}  ({figures['pairs']} pairs, theta {report['theta']:g})"
        )
    made = report["inpainting"]
    parts = "  ".join(f"{name} {made[name]:.2f}" for name in ATTRIBUTES)
    outside = "unchanged" if made["outside_unchanged"] else "CHANGED"
    lines.append(f"{'another painted in':>20}  {parts}  outside of the mask {outside}")
    for count, figures in report["probe"].items():
        lines.append(f"{count + ' dimensions':>20}  {'  '.join(f'{name} {figures[name]:.2f}' for name in ATTRIBUTES)}")
    return "\n".join(lines)
