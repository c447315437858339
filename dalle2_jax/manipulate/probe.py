"""Principal components of CLIP's embeddings, and what an image keeps by the first of them alone (Sec. 4, Fig. 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.data.dataset import open_source
from dalle2_jax.errors import InputError
from dalle2_jax.layers.embedding import unit_norm
from dalle2_jax.manipulate.latent import Latent, decode_latent, read_squares, require_latent, same_key
from dalle2_jax.manipulate.series import Series
from dalle2_jax.prior.pca import PCA, fit_pca
from dalle2_jax.unclip.embed import batches_of, embed_images

if TYPE_CHECKING:
    from dalle2_jax.unclip import DALLE2

DIMENSIONS = (20, 30, 40, 80, 120, 160, 200, 320)


def pca_of_run(
    model: DALLE2, count: int = 2000, components: int | None = None, images: Sequence[np.ndarray] | None = None
) -> PCA:
    """Principal components of CLIP's embeddings of a run's own training images.

    count: how many images, evenly spread over the training split (all, where it has fewer). components: how many are
    kept; None: all, as far as the images go. images: uint8 `[h, w, 3]` each, instead of the training images.

    Raises:
        InputError: for more components than dimensions, not more images than components, or a run that does not record
            its data.
    """
    model.require("clip")
    if images is None:
        if count < 2:
            raise InputError(f"count is {count}; principal components need 2 images or more")
        data = model.recorded("data")
        source = open_source(data, data.train_split)
        index = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))
        number, batches = len(index), (source.examples(part)[0] for part in batches_of(index))
    else:
        number, batches = len(images), batches_of(images)
    components = min(model.clip.module.embedding_size, max(number - 1, 1)) if components is None else components
    return fit_pca((np.asarray(embed_images(model.clip, batch)) for batch in batches), components)


def probe(
    model: DALLE2,
    key: jax.Array,
    images: Sequence[np.ndarray],
    pca: PCA,
    dimensions: Sequence[int] | None = None,
    *,
    steps: str = "50",
    **options: Any,
) -> Series:
    """Images decoded from the first principal components of their embeddings alone (Fig. 7), an image a row.

    All are sampled by DDIM from one noise, the key's. images: as in `encode`. dimensions: how many components each
    column keeps; None: see `default_dimensions`. options: see `decode_latent`.

    Raises:
        InputError: for more dimensions than there are components, or images that `encode` would refuse.
    """
    require_latent(model)
    dimensions = default_dimensions(len(pca)) if dimensions is None else tuple(dimensions)
    if not dimensions:
        raise InputError("there is no number of dimensions; give at least one")
    embeddings = embed_images(model.clip, read_squares(model, images))
    columns = [restored(model, pca.first(count), embeddings) for count in dimensions]
    latent = Latent(jnp.stack(columns, axis=1).reshape(-1, embeddings.shape[-1]), None, str(steps))
    pixels = decode_latent(model, same_key(key, len(latent)), latent, **options)
    labels = [f"{count} of {pca.mean.shape[0]} dimensions" for count in dimensions] * len(embeddings)
    return Series(pixels, tuple(labels), len(dimensions))


def default_dimensions(components: int) -> tuple[int, ...]:
    """The paper's 20, 30, 40, 80, 120, 160, 200 and 320, or where there are fewer components the same shares of them.

    default_dimensions(24)   # 2, 3, 6, 9, 12, 15, 24
    """
    share = min(components / DIMENSIONS[-1], 1.0)
    return tuple(sorted({max(round(share * count), 1) for count in DIMENSIONS}))


def restored(model: DALLE2, pca: PCA, embeddings: jax.Array) -> jax.Array:
    """Embeddings `[b, z]` as components have them, of unit norm again where CLIP's have it."""
    kept = pca.restore(pca.project(embeddings))
    return unit_norm(kept) if model.clip.module.unit_norm else kept
