"""The prior's cosine suite: is what it samples as near to the caption, and to the true image, as it should be?

The measures and ranges are those that users of the PyTorch trainer judged a prior by, but for one: they saw the
similarity to the caption come within 0.01 of the true images' after 1B samples. A prior that is trained for minutes
comes within 0.02; a sick one misses by far more.
"""

import numpy as np

from dalle2_jax.evaluation.metrics.retrieval import mean_cosine

HEALTHY = {
    "to_true_image": "0.75 or more",
    "to_text_minus_baseline": "within 0.05 of 0: as near to its caption as true images are",
    "to_unrelated_text": "0.1 or less",
}


def prior_suite(sampled: np.ndarray, true: np.ndarray, text: np.ndarray) -> dict[str, object]:
    """Mean cosines of embeddings `[n, z]`: sampled by the prior, of the true images, of the captions.

    `to_text_minus_baseline` is the difference between sampled and true images' similarity to the caption; an unrelated
    caption is the one half the list away.
    """
    unrelated = np.roll(text, (len(text) + 1) // 2, axis=0)
    measured = {
        "to_text": mean_cosine(sampled, text),
        "baseline_true_to_text": mean_cosine(true, text),
        "to_text_minus_baseline": mean_cosine(sampled, text) - mean_cosine(true, text),
        "to_true_image": mean_cosine(sampled, true),
        "to_unrelated_text": mean_cosine(sampled, unrelated),
    }
    healthy = {
        "to_true_image": measured["to_true_image"] >= 0.75,
        "to_text_minus_baseline": abs(measured["to_text_minus_baseline"]) <= 0.05,
        "to_unrelated_text": measured["to_unrelated_text"] <= 0.1,
    }
    return {**measured, "healthy": healthy, "healthy_ranges": HEALTHY}
