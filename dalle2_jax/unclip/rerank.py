"""The best of several finished images of a caption, by CLIP (DALL-E, Sec. 2.6, reranks so), for either prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dalle2_jax.diffusion.sampler import keys_for
from dalle2_jax.diffusion.sampling import MOST_CANDIDATES
from dalle2_jax.errors import InputError, check_number
from dalle2_jax.unclip.generate import Generated

if TYPE_CHECKING:
    from dalle2_jax.unclip.system import DALLE2


def check_candidates(candidates: int, keep: int) -> None:
    """Raises InputError where not so many images can be kept of the candidates."""
    check_number("candidates", candidates, at_least=1, at_most=MOST_CANDIDATES, whole=True)
    if not 1 <= keep <= candidates:
        raise InputError(f"{keep} images are to be kept of {candidates} candidates; keep 1 to {candidates}")


def nearest_images(model: DALLE2, images: np.ndarray, caption: str, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the images uint8 `[n, h, w, 3]` are nearest to a caption by CLIP, the best first, `[keep]`; and all
    cosines `[n]`."""
    scores = np.asarray(model.scores(images, [caption]))[:, 0]
    return np.argsort(-scores, kind="stable")[:keep], scores


def generate_best(
    model: DALLE2, key: jax.Array, captions: Sequence[str] | str, *, candidates: int, keep: int = 1, **options: Any
) -> tuple[Generated, np.ndarray]:
    """Samples `candidates` images a caption and keeps those whose CLIP embeddings are nearest to the caption's.

    Args:
        key: as that of `DALLE2.generate`; a caption's candidates have keys of their own, split from the caption's.
        options: those of `DALLE2.generate`, without `image_embeddings`.

    Returns:
        The kept images, `keep` a caption, the captions in their order and a caption's best image first, with each
        stage's part; and their cosines `[captions * keep]`.

    Raises:
        InputError: for a run without CLIP, more images to keep than candidates, or anything `generate` refuses.
    """
    check_candidates(candidates, keep)
    model.require("clip")
    captions = [captions] if isinstance(captions, str) else list(captions)
    keys = jax.vmap(lambda one: jax.random.split(one, candidates))(keys_for(key, len(captions))).reshape(-1)
    repeated = [caption for caption in captions for _ in range(candidates)]
    generated = model.generate(keys, repeated, return_stages=True, **options)
    rows, scores = [], []
    for number, caption in enumerate(captions):
        start = number * candidates
        best, found = nearest_images(model, generated.images[start : start + candidates], caption, keep)
        rows.extend(start + best)
        scores.extend(found[best])
    return generated.rows(rows), np.asarray(scores)
