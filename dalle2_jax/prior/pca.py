"""Principal components of CLIP image embeddings, fitted in one pass over a stream (Sec. 2.2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PCA:
    """Principal components by decreasing variance; a pytree.

    Fields:
        mean: `[z]`. components: `[k, z]`, of unit norm and orthogonal. variances: `[k]`, of the coefficients.
    """

    mean: jax.Array
    components: jax.Array
    variances: jax.Array

    def __len__(self) -> int:
        """How many components there are."""
        return self.components.shape[0]

    def first(self, count: int) -> PCA:
        """The first `count` components alone; InputError where there are not so many."""
        if not 1 <= count <= len(self):
            raise InputError(f"{count} dimensions were asked for; there are {len(self)} principal components")
        return PCA(self.mean, self.components[:count], self.variances[:count])

    def project(self, embeddings: jax.Array) -> jax.Array:
        """The coefficients `[b, k]` of embeddings `[b, z]`."""
        return (embeddings.astype(jnp.float32) - self.mean[None]) @ self.components.T

    def restore(self, coefficients: jax.Array) -> jax.Array:
        """The embeddings `[b, z]` of coefficients `[b, k]`; shorter than what was projected where k is less than z."""
        return coefficients @ self.components + self.mean[None]


class Moments:
    """Count, mean and scatter of embeddings that come in batches, in float64 on the host; any order gives the same.

    moments = Moments(z)
    for batch in batches:
        moments.add(batch)
    pca = moments.pca(319)
    """

    def __init__(self, size: int):
        self.count, self.mean, self.scatter = 0, np.zeros(size), np.zeros((size, size))

    def add(self, embeddings: np.ndarray) -> None:
        """Adds embeddings `[b, z]` (Chan et al. 1979: stable, whatever the mean)."""
        embeddings = np.asarray(embeddings, np.float64)
        if not np.isfinite(embeddings).all():
            raise InputError("an image embedding is not finite; train CLIP anew, with a lower learning rate")
        count, mean = len(embeddings), embeddings.mean(0)
        centred, shift = embeddings - mean, mean - self.mean
        total = self.count + count
        self.scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def variance(self) -> float:
        """Of all dimensions together."""
        return float(np.trace(self.scatter)) / max(self.count - 1, 1)

    def pca(self, components: int) -> PCA:
        """The first components; each one's largest entry is positive, since the sign is nobody's.

        Raises:
            InputError: for more components than dimensions, or not more embeddings than components.
        """
        size = len(self.mean)
        if not 1 <= components <= size:
            raise InputError(f"{components} principal components were asked for of embeddings of size {size}")
        if self.count <= components:
            raise InputError(
                f"{components} principal components need more than {components} embeddings; there are {self.count}"
            )
        variances, vectors = np.linalg.eigh(self.scatter / (self.count - 1))
        order = np.argsort(variances)[::-1][:components]
        vectors = vectors[:, order].T
        largest = np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], axis=1)
        vectors = vectors * np.sign(largest)
        return PCA(*map(jnp.float32, (self.mean, vectors, np.maximum(variances[order], 0.0))))


def fit_pca(batches: Iterable[np.ndarray], components: int) -> PCA:
    """Principal components of batches of embeddings `[b, z]`; see `Moments`."""
    moments = None
    for batch in batches:
        moments = moments or Moments(batch.shape[1])
        moments.add(batch)
    if moments is None:
        raise InputError("there is no embedding to find principal components of")
    return moments.pca(components)
