"""The prior's cosine suite: is what it draws as near to the caption, and to the true picture, as it should be?

The measures are those that users of the PyTorch trainer judged a prior by; the ranges say what "healthy" means here.
"""

import numpy as np

HEALTHY = {
    "to_true_picture": "0.75 or more",
    "to_text_minus_baseline": "within 0.05 of 0: as near to its caption as true pictures are",
    "to_unrelated_text": "0.35 or more below to_text",
}


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum(-1).mean())


def prior_suite(drawn: np.ndarray, true: np.ndarray, text: np.ndarray) -> dict[str, object]:
    """Mean cosines of unit-norm embeddings `[n, z]`: drawn by the prior, of the true pictures, of the captions.

    `to_text_minus_baseline` is the difference between drawn and true pictures' similarity to the caption; the unrelated
    captions are the others in turn, so neighbours in the list should differ.
    """
    unrelated = np.roll(text, (len(text) + 1) // 2, axis=0)
    measured = {
        "to_text": _cosine(drawn, text),
        "baseline_true_to_text": _cosine(true, text),
        "to_text_minus_baseline": _cosine(drawn, text) - _cosine(true, text),
        "to_true_picture": _cosine(drawn, true),
        "to_unrelated_text": _cosine(drawn, unrelated),
    }
    healthy = {
        "to_true_picture": measured["to_true_picture"] >= 0.75,
        "to_text_minus_baseline": abs(measured["to_text_minus_baseline"]) <= 0.05,
        "to_unrelated_text": measured["to_text"] - measured["to_unrelated_text"] >= 0.35,
    }
    return {**measured, "healthy": healthy, "healthy_ranges": HEALTHY}
