"""Quality against network evaluations: one stage sampled by several samplers, steps and guidance scales."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dalle2_jax.data.dataset import Data
from dalle2_jax.data.pipeline import Examples, evaluation_examples
from dalle2_jax.evaluation.metrics.retrieval import mean_cosine, recall_at
from dalle2_jax.evaluation.shapes import oracle_accuracies
from dalle2_jax.images.files import save_figure
from dalle2_jax.unclip import DALLE2

Row = dict[str, Any]


def sweep(
    model: DALLE2,
    data: Data,
    *,
    stage: str = "decoder",
    samplers: Sequence[str] = ("ddim", "dpmpp_2m", "ddpm"),
    steps: Sequence[str] = ("5", "10", "20", "50", "100"),
    guidance_scales: Sequence[float] = (1.0, 1.5, 2.5),
    count: int = 120,
    seed: int = 0,
    log: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """One row a combination: its settings, network evaluations an image, seconds an image, and quality.

    The captions are the first of the test split, and the keys are the same in every row; where it is not the prior
    that is swept, its embeddings are sampled once. Quality on captioned shapes is the oracle's fractions, elsewhere R@5
    and the mean cosine of the images to their captions by the run's own CLIP. Seconds leave out compiling.

    stage: "prior", "decoder" or "upsampler".

    Raises:
        InputError: for settings that the stage does not have, before anything is sampled.
    """
    examples = evaluation_examples(data, data.test_split, count)
    key = jax.random.key(seed)
    combinations = list(itertools.product(samplers, steps, guidance_scales if stage != "upsampler" else (1.0,)))
    rows_of = [{"sampler": a, "steps": b, "guidance_scale": float(c)} for a, b, c in combinations]
    unused = ("guidance_scale",) if stage == "upsampler" else ()
    changes = [{name: value for name, value in row.items() if name not in unused} for row in rows_of]
    for one in changes:
        model.check_sampling(**{stage: one})
    embeddings = None
    if stage != "prior":
        sampled = model.generate(key, examples.captions, return_stages=True)
        embeddings = sampled.image_embeddings
    rows = []
    for one, row in zip(changes, rows_of, strict=True):
        settings = {stage: one, "image_embeddings": embeddings}
        size = min(64, len(examples.captions))
        model.generate(key, examples.captions[:size], **{**settings, "image_embeddings": _first(embeddings, size)})
        start = time.monotonic()
        generated = model.generate(key, examples.captions, return_stages=True, **settings)
        seconds = (time.monotonic() - start) / len(examples.captions)
        evaluations = model.evaluations(stage, one)
        row = {**row, "evaluations": evaluations, "seconds": round(seconds, 4), "captions": len(examples.captions)}
        rows.append({**row, **_quality(model, examples, generated)})
        log(rows[-1])
    return rows


def _first(embeddings: np.ndarray | None, count: int) -> np.ndarray | None:
    return None if embeddings is None else embeddings[:count]


def _quality(model: DALLE2, examples: Examples, generated: Any) -> dict[str, float]:
    if examples.scenes is not None:
        return oracle_accuracies(generated.images, examples.scenes)
    image = np.asarray(model.encode_image(generated.images))
    text = generated.text_embeddings
    return {
        "r5": recall_at(image, text, examples.captions, 5)["image_to_text_r5"],
        "clip_score": mean_cosine(image, text),
    }


def format_row(row: Row) -> str:
    """A row as a line; `header` names its columns."""
    cells = []
    for name, value in row.items():
        text = f"{value:.3f}" if isinstance(value, float) and name not in ("guidance_scale",) else f"{value}"
        cells.append(text.rjust(max(len(name), 8)))
    return "  ".join(cells)


def header(row: Row) -> str:
    """The names of a row's columns."""
    return "  ".join(name.rjust(max(len(name), 8)) for name in row)


def plot(rows: Sequence[Row], quality: str, path: str) -> None:
    """Draws `quality` against network evaluations, a line for each sampler and guidance scale, as a PNG."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["sampler"], row["guidance_scale"]), []).append(row)
    styles = dict(zip(dict.fromkeys(name for name, _ in groups), ("-", "--", ":", "-."), strict=False))
    colors = {scale: f"C{number}" for number, scale in enumerate(dict.fromkeys(scale for _, scale in groups))}

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for (sampler, scale), found in groups.items():
            found = sorted(found, key=lambda row: row["evaluations"])
            x, y = [row["evaluations"] for row in found], [row[quality] for row in found]
            label = f"{sampler}, {scale:g}"
            axes.plot(x, y, styles[sampler], color=colors[scale], marker="o", markersize=3, label=label)
        axes.set_xscale("log")
        axes.set_xlabel("network evaluations an image")
        axes.set_ylabel(quality)
        axes.grid(alpha=0.3)
        axes.legend(title="sampler, guidance", fontsize="small")

    save_figure(path, draw, (8, 5))
