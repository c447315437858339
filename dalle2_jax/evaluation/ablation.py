"""What a prior is good for (Sec. 5.1): images of the same captions by each prior, and by none.

    the run's priors     their image embeddings, and the caption, to the decoder
    text embedding       CLIP's text embedding in place of an image embedding
    caption alone        the image embedding withheld, so that the decoder works as GLIDE does

All are one decoder's, with the same keys, settings and captions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import jax
import numpy as np

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.data.dataset import Data, has_split
from dalle2_jax.data.pipeline import evaluation_examples
from dalle2_jax.evaluation.metrics.prior_cosines import prior_suite
from dalle2_jax.evaluation.metrics.retrieval import recall_at, unit
from dalle2_jax.evaluation.shapes import oracle_accuracies
from dalle2_jax.unclip import DALLE2
from dalle2_jax.unclip.embed import embed_images

TEXT_EMBEDDING, CAPTION_ALONE = "text embedding", "caption alone"
Figures = dict[str, float]


def ablate_priors(
    model: DALLE2,
    priors: Mapping[str, LoadedStage],
    data: Data,
    *,
    count: int = 240,
    diverse: int = 48,
    images: int = 4,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Figures]]:
    """{way: {split: figures}} over `count` captions of the test split and of the unseen one, where there is one.

    Figures: "r1", how often CLIP finds the image's caption first among the split's; "diversity", the mean of 1 - cosine
    of CLIP's embeddings of `images` images of one caption, over `diverse` captions; on captioned shapes of one object
    the oracle's "all" and its parts; for a prior "to_true_image" and "to_text", mean cosines.
    """
    splits = [data.test_split, *([data.unseen_split] if has_split(data, data.unseen_split) else [])]
    examples_of = {split: evaluation_examples(data, split, count) for split in splits}
    judged_by_oracle = data.name == "captioned_shapes" and data.config in (None, "one_object")
    found: dict[str, dict[str, Figures]] = {}
    for way in (*priors, TEXT_EMBEDDING, CAPTION_ALONE):
        working = dataclasses.replace(model, prior=priors.get(way, model.prior))
        for number, (split, examples) in enumerate(examples_of.items()):
            captions = examples.captions
            log(f"{way}: {len(captions)} captions of the {split} split")
            key = jax.random.fold_in(jax.random.key(seed), number)
            generated = working.generate(key, captions, return_stages=True, **_options(model, way, captions))
            embeddings = np.asarray(embed_images(model.clip, list(generated.images)))
            text = generated.text_embeddings
            figures = {"r1": recall_at(embeddings, text, captions, 1)["image_to_text_r1"]}
            if judged_by_oracle:
                figures |= oracle_accuracies(generated.images, examples.scenes)
            if way in priors:
                suite = prior_suite(generated.image_embeddings, np.asarray(model.encode_image(examples.images)), text)
                figures |= {name: suite[name] for name in ("to_true_image", "to_text")}
            if split == data.test_split:
                some = [caption for caption in captions[:diverse] for _ in range(images)]
                more = working.generate(jax.random.fold_in(key, 1), some, **_options(model, way, some))
                figures["diversity"] = diversity(np.asarray(embed_images(model.clip, list(more))), images)
            found.setdefault(way, {})[split] = figures
    return found


def _options(model: DALLE2, way: str, captions: Sequence[str]) -> dict[str, Any]:
    if way == TEXT_EMBEDDING:
        return {"image_embeddings": model.encode_text(captions).embedding}
    return {"embedding_to_decoder": False} if way == CAPTION_ALONE else {}


def diversity(embeddings: np.ndarray, images: int) -> float:
    """The mean of 1 - cosine over all pairs of the `images` embeddings `[b * images, z]` of each of b captions."""
    grouped = unit(embeddings).reshape(-1, images, embeddings.shape[-1])
    pairs = [1 - (grouped[:, a] * grouped[:, b]).sum(-1) for a, b in combinations(range(images), 2)]
    return float(np.mean(pairs))


# Columns of the table: its head, the split ("test" or "unseen") and the figure, and decimals.
COLUMNS = (
    ("all right", "test", "all", 2),
    ("unseen pairs", "unseen", "all", 2),
    ("R@1", "test", "r1", 2),
    ("unseen R@1", "unseen", "r1", 2),
    ("diversity", "test", "diversity", 3),
    ("to the true image", "test", "to_true_image", 3),
    ("to the caption", "test", "to_text", 3),
)


def format_ablation(reports: Sequence[Mapping[str, Mapping[str, Figures]]], data: Data) -> str:
    """A Markdown table, a line a way: the mean over the runs' reports and, of several, half the range."""
    names = {"test": data.test_split, "unseen": data.unseen_split}
    columns = [
        column
        for column in COLUMNS
        if any(column[2] in splits.get(names[column[1]], {}) for report in reports for splits in report.values())
    ]
    lines = ["| | " + " | ".join(head for head, *_ in columns) + " |", "|---|" + "---|" * len(columns)]
    for way in reports[0]:
        cells = []
        for _, split, figure, decimals in columns:
            values = [report[way].get(names[split], {}).get(figure) for report in reports if way in report]
            cells.append(_cell([value for value in values if value is not None], decimals))
        lines.append(f"| {way.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float], decimals: int) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{decimals}f}"
