"""What `dalle2 evaluate` measures of a run on any images with captions: retrieval, CLIP scores, prior, upsampler.

Generated images are held against the captions of held-out splits by a CLIP: the run's own, which has seen the
training split alone, or another run's that had no part in making them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dalle2_jax.data.dataset import Data, has_split
from dalle2_jax.data.pipeline import Examples, evaluation_examples
from dalle2_jax.evaluation.fidelity import ddim_reconstruction, upsampler_against_bicubic
from dalle2_jax.evaluation.metrics.prior_cosines import prior_suite
from dalle2_jax.evaluation.metrics.retrieval import mean_cosine, recall_at
from dalle2_jax.evaluation.report import Report
from dalle2_jax.unclip import DALLE2


def evaluate_images(
    model: DALLE2,
    data: Data,
    *,
    split: str | None = None,
    count: int = 240,
    seed: int = 0,
    judge: DALLE2 | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Report, dict[str, Any]]:
    """Measures `model` on the test split of `data`, and on its unseen split where it has one; or on one other split.

    split: such as "train" or "validation+test", in place of those two. judge: whose CLIP judges the images; None: the
    model's own. Returns the report and what `samples.png` shows: "test" (or `split`) and "unseen" (examples) and what
    was sampled of their captions, "generated" and "unseen_generated".
    """
    names = ("test", "unseen", "upsampler")
    keys = dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))
    report: Report = {"data": data.folder or data.name, "split": split or data.test_split, "seed": seed}
    shown: dict[str, Any] = {}
    parts = {"test": report["split"]}
    if split is None and has_split(data, data.unseen_split):
        parts["unseen"] = data.unseen_split
    for part, name in parts.items():
        examples = evaluation_examples(data, name, count)
        log(f"sampling {len(examples.captions)} captions of the {name} split")
        generated = model.generate(keys[part], examples.captions, return_stages=True)
        report[part] = _judged(judge or model, examples, generated.images)
        true = np.asarray(model.encode_image(examples.images))
        report[part]["prior"] = prior_suite(generated.image_embeddings, true, generated.text_embeddings)
        shown |= {part: examples, "generated" if part == "test" else "unseen_generated": generated}
    test = shown["test"]
    report["inversion"] = ddim_reconstruction(model, test.images[:64], test.captions[:64])
    if model.upsamplers:
        report["upsampler"] = upsampler_against_bicubic(model, keys["upsampler"], test.images[:64])
    return report, shown


def _judged(judge: DALLE2, examples: Examples, images: np.ndarray) -> dict[str, Any]:
    """Retrieval among these captions, and mean cosines, of the generated and of the true images."""
    captions = list(examples.captions)
    text = np.asarray(judge.encode_text(captions).embedding)
    result: dict[str, Any] = {"captions": len(captions)}
    for name, shown in (("generated", images), ("real", examples.images)):
        image = np.asarray(judge.encode_image(shown))
        result[name] = {
            **recall_at(image, text, captions, 1),
            **recall_at(image, text, captions, 5),
            "clip_score": mean_cosine(image, text),
        }
    distinct = len(set(captions))
    result["chance"] = {f"r{k}": min(k, distinct) / distinct for k in (1, 5)}
    return result
