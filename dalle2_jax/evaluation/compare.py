"""Systems of any kind side by side on captioned shapes: what each one samples, what it costs, how long it trained.

valid         share of images that the oracle reads as one clean object
combinations  distinct (shape, colour, size, background) among the valid images, as a share of those among as many
              real images
captions      share of images with all that their captions say, of systems that read them
unseen        the same for pairs of shape and colour that no system has seen
sharpness     the finest detail's mean square, as a share of real images'
distance      Fréchet distance to real images, of the features of one CLIP that judges all
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from dalle2_jax.data.dataset import Data, has_split
from dalle2_jax.data.pipeline import evaluation_examples
from dalle2_jax.evaluation.metrics.frechet import frechet_distance
from dalle2_jax.evaluation.metrics.sharpness import sharpness
from dalle2_jax.evaluation.oracle import read, score
from dalle2_jax.images.resize import resize
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.layers.flops import count_flops
from dalle2_jax.systems import ImageModel
from dalle2_jax.unclip import DALLE2
from dalle2_jax.unclip.embed import embed_images
from dalle2_jax.unclip.memory import call_for_one_image, caption_shapes

Model = DALLE2 | ImageModel
Figures = dict[str, float]
REAL = "real images"
BATCH = 64


def data_of(model: Model) -> Data:
    """What a system was trained on; InputError where it does not say."""
    return model.recorded("data") if isinstance(model, DALLE2) else model.stage.record.rebuilt("data")


def compare(
    models: Mapping[str, Model],
    data: Data,
    *,
    count: int = 240,
    seed: int = 0,
    judge: DALLE2 | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Figures], dict[str, np.ndarray]]:
    """Figures of each system and of real images by name, and `count` images of each, uint8 `[count, h, w, 3]`.

    Systems that read captions sample those of the test split, one image each; the others as many images. Real images
    are those of the test split at the size of the largest system's, and judged against the validation split.

    judge: whose CLIP's features the Fréchet distance is of; None: there is none in the table.

    Raises:
        InputError: where nothing of a system can be sampled.
    """
    shapes = data.name == "captioned_shapes" and data.config in (None, "one_object")
    test = evaluation_examples(data, data.test_split, count)
    count = len(test.captions)
    unseen = (
        evaluation_examples(data, data.unseen_split, count) if shapes and has_split(data, data.unseen_split) else None
    )
    size = max(model.image_size for model in models.values())
    real = resize(test.images, size)
    features = (
        None
        if judge is None
        else _features(judge, resize(evaluation_examples(data, data.validation_split, count).images, size))
    )
    images: dict[str, np.ndarray] = {REAL: real}
    found: dict[str, Figures] = {}
    for name, model in models.items():
        log(f"{name}: sampling {count} images")
        key = jax.random.key(seed)
        captions = test.captions if model.reads_captions else None
        images[name], seconds = _timed(model, key, captions, count)
        found[name] = {
            "parameters": float(sum(count_parameters(stage.params) for stage in model.stages)),
            "gflops": flops_of_one_image(model, test.captions[0]) / 1e9,
            "milliseconds": 1000 * seconds / count,
            "training_seconds": float(sum(stage.record.seconds or 0.0 for stage in model.stages)),
        }
        if shapes and captions is not None:
            found[name]["captions"] = score(images[name], test.scenes)["all"]
            if unseen is not None:
                made = model.generate(jax.random.fold_in(key, 1), unseen.captions)
                found[name]["unseen"] = score(made, unseen.scenes)["all"]
    combinations = len(set(_combinations(real))) if shapes else 0
    detail = sharpness(real)
    for name, shown in images.items():
        figures = found.setdefault(name, {})
        if shapes:
            seen = _combinations(shown)
            figures["valid"] = len(seen) / len(shown)
            figures["combinations"] = len(set(seen)) / max(combinations, 1)
        figures["sharpness"] = sharpness(resize(shown, size)) / detail
        if features is not None:
            figures["distance"] = frechet_distance(_features(judge, shown), features)
    return found, images


def flops_of_one_image(model: Model, caption: str) -> int:
    """Operations of matrix products and convolutions that sampling one image takes, over all stages.

    caption: any that the system reads, where it reads captions; their number does not depend on it."""
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    if isinstance(model, DALLE2):
        captions = caption_shapes(model.clip, model.tokenizer.context_length)
        calls = [call_for_one_image(stage, key, captions) for stage in model.stages]
    else:
        calls = [model.call(key, model.encode([caption]) if model.reads_captions else None)]
    return sum(count_flops(call.trace().jaxpr) for call in calls)


def _timed(model: Model, key: jax.Array, captions: Sequence[str] | None, count: int) -> tuple[np.ndarray, float]:
    """The images, and the seconds that they took once all was compiled."""

    def sample(some: int) -> np.ndarray:
        if captions is not None:
            return model.generate(key, captions[:some], batch_size=BATCH)
        return model.generate(key, count=some, batch_size=BATCH)

    sample(min(count, BATCH))  # every batch is as large
    start = time.perf_counter()
    images = sample(count)
    return images, time.perf_counter() - start


def _features(judge: DALLE2, images: np.ndarray) -> np.ndarray:
    return np.asarray(embed_images(judge.clip, list(images)))


def _combinations(images: np.ndarray) -> list[tuple[str | None, ...]]:
    """(background, shape, colour, size) of each image that the oracle reads as one clean object of a known shape."""
    scenes = [scene for scene in map(read, images) if scene is not None and len(scene.objects) == 1]
    things = [(scene.background, scene.objects[0]) for scene in scenes]
    return [(background, thing.shape, thing.color, thing.size) for background, thing in things if thing.shape]


# Columns of the table: figure, head, how it is written.
COLUMNS = (
    ("valid", "valid", "{:.2f}"),
    ("combinations", "combinations", "{:.2f}"),
    ("captions", "captions", "{:.2f}"),
    ("unseen", "unseen pairs", "{:.2f}"),
    ("sharpness", "sharpness", "{:.2f}"),
    ("distance", "Fréchet distance", "{:.4f}"),
    ("parameters", "parameters", "{:,.0f}"),
    ("gflops", "GFLOPs an image", "{:.3f}"),
    ("milliseconds", "ms an image", "{:.1f}"),
    ("training_seconds", "training, s", "{:.0f}"),
)


def format_comparison(reports: Sequence[Mapping[str, Figures]]) -> str:
    """A Markdown table, a line a system: the mean over the reports and, of several, half the range."""
    columns = [column for column in COLUMNS if any(column[0] in row for report in reports for row in report.values())]
    lines = ["| | " + " | ".join(head for _, head, _ in columns) + " |", "|---|" + "---|" * len(columns)]
    for name in reports[0]:
        cells = [
            _cell([report[name][figure] for report in reports if figure in report.get(name, {})], text)
            for figure, _, text in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float], text: str) -> str:
    if not values:
        return ""
    mean = text.format(float(np.mean(values)))
    if max(values) == min(values):
        return mean
    return f"{mean} ± {text.format((max(values) - min(values)) / 2)}"
