"""CLIP retrieval: how often a caption finds its image, and an image its caption, among the first k."""

import numpy as np


def unit(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings `[n, z]` of unit norm; those of some CLIPs leave it as they are."""
    return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The mean of the cosines of embeddings `[n, z]`, row by row."""
    return float((unit(a) * unit(b)).sum(-1).mean())


def recall_at(
    image_embeddings: np.ndarray, text_embeddings: np.ndarray, captions: list[str], k: int
) -> dict[str, float]:
    """R@k in both directions over embeddings `[n, z]`, by cosine.

    An image is found by its caption if one of the k nearest images carries an equal caption, since equal captions
    cannot be told apart; a caption is found by an image among the k nearest distinct captions.
    """
    image_embeddings, text_embeddings = unit(image_embeddings), unit(text_embeddings)
    names = np.asarray(captions)
    distinct, first, label = np.unique(names, return_index=True, return_inverse=True)
    to_text = image_embeddings @ text_embeddings[first].T
    to_image = text_embeddings[first] @ image_embeddings.T
    k_text, k_image = min(k, len(distinct)), min(k, len(names))
    found_text = np.argsort(-to_text, axis=1)[:, :k_text] == label[:, None]
    found_image = label[np.argsort(-to_image, axis=1)[:, :k_image]] == np.arange(len(distinct))[:, None]
    return {
        f"image_to_text_r{k}": float(found_text.any(1).mean()),
        f"text_to_image_r{k}": float(found_image.any(1).mean()),
    }
