"""Everything `dalle2 evaluate` measures of a run on captioned shapes: the oracle, retrieval, the prior, the upsampler.

Each figure is over images that no stage was trained on, one image a caption, from a fixed seed, with no choice
among images. The test split says what the training split says too; what only the unseen pairs say is new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dalle2_jax.data.dataset import Data
from dalle2_jax.data.pipeline import evaluation_examples
from dalle2_jax.evaluation.fidelity import ddim_reconstruction, upsampler_against_bicubic
from dalle2_jax.evaluation.metrics.prior_cosines import prior_suite
from dalle2_jax.evaluation.metrics.retrieval import recall_at
from dalle2_jax.evaluation.oracle import score
from dalle2_jax.evaluation.report import ATTRIBUTES, Report
from dalle2_jax.unclip import DALLE2


def oracle_accuracies(images: np.ndarray, scenes: list[Any]) -> dict[str, float]:
    """The oracle's fractions for one-object scenes: colour, background, shape, size, and all four at once."""
    fractions = score(images, scenes)
    return {name: float(fractions[name]) for name in ATTRIBUTES}


def evaluate(
    model: DALLE2,
    data: Data,
    *,
    count: int = 240,
    unseen_count: int = 192,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Report, dict[str, Any]]:
    """Measures `model` on `data` (captioned_shapes, one_object); returns the report and what `samples.png` shows.

    The second value holds "test" and "unseen" (images, captions and scenes) and what was sampled of their captions:
    "generated" and "unseen_generated".
    `oracle_embedding_only` withholds the caption from the decoder; `oracle_other_embedding` scores those same images
    against other captions of the split, which is sampling from another caption's embedding, and `chance` is what the
    captions' own attributes share with those.
    """
    key = jax.random.key(seed)
    names = ("test", "embedding_only", "unseen", "upsampler")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    test = evaluation_examples(data, data.test_split, count)
    unseen = evaluation_examples(data, data.unseen_split, unseen_count)
    count, unseen_count = len(test.captions), len(unseen.captions)

    log(f"sampling {count} captions of the {data.test_split} split")
    generated = model.generate(keys["test"], test.captions, return_stages=True)
    report: Report = {"captions": count, "seed": seed, "oracle": oracle_accuracies(generated.images, test.scenes)}

    log(f"sampling {count} captions with the caption withheld from the decoder")
    embedding_only = model.generate(
        keys["embedding_only"],
        test.captions,
        caption_to_decoder=False,
        image_embeddings=generated.image_embeddings,
    )
    report["oracle_embedding_only"] = oracle_accuracies(embedding_only, test.scenes)
    order = np.random.default_rng(seed).permutation(count)
    others = [test.scenes[i] for i in np.roll(order, 1)[np.argsort(order)]]
    report["oracle_other_embedding"] = oracle_accuracies(embedding_only, others)
    report["chance"] = _shared_attributes(test.scenes, others)

    log(f"sampling {unseen_count} captions of pairs that no stage has seen")
    unseen_generated = model.generate(keys["unseen"], unseen.captions, return_stages=True)
    report["oracle_unseen_pairs"] = oracle_accuracies(unseen_generated.images, unseen.scenes)
    report["captions_unseen_pairs"] = unseen_count
    report["oracle_real_images"] = oracle_accuracies(test.images, test.scenes)

    log("measuring retrieval, the prior and the upsampler")
    true = np.asarray(model.encode_image(test.images))
    text = generated.text_embeddings
    report["retrieval"] = {**recall_at(true, text, test.captions, 1), **recall_at(true, text, test.captions, 5)}
    report["prior"] = prior_suite(generated.image_embeddings, true, text)
    report["inversion"] = ddim_reconstruction(model, test.images[:64], test.captions[:64])
    if model.upsamplers:
        report["upsampler"] = upsampler_against_bicubic(model, keys["upsampler"], test.images[:64])
    return report, {"test": test, "generated": generated, "unseen": unseen, "unseen_generated": unseen_generated}


def _shared_attributes(scenes: list[Any], others: list[Any]) -> dict[str, float]:
    def attributes(scene: Any) -> dict[str, str]:
        thing = scene.objects[0]
        return {"color": thing.color, "background": scene.background, "shape": thing.shape, "size": thing.size}

    pairs = [(attributes(a), attributes(b)) for a, b in zip(scenes, others, strict=True)]
    shared = {name: float(np.mean([a[name] == b[name] for a, b in pairs])) for name in ATTRIBUTES[:-1]}
    return {**shared, "all": float(np.mean([a == b for a, b in pairs]))}
