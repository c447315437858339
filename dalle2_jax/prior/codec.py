"""CLIP image embeddings as sequences of codes, and back: principal components, each in buckets (Sec. 2.2).

The paper keeps 319 of 1,024 components and quantises each into 1,024 buckets; it does not say where their edges are.
They are "uniform", between two percentiles of the component, or "quantile", as many examples in each bucket. Either
way a code stands for the mean of the examples in its bucket.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.layers.embedding import unit_norm
from dalle2_jax.prior.pca import PCA, Moments

EDGES = ("uniform", "quantile")
# Embeddings of a longer stream that are kept for the edges; of any one bucket in 1,024 these are 64.
MOST_KEPT = 65536


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Codec:
    """Between embeddings and codes; a pytree.

    Fields:
        pca: k principal components.
        edges: `[k, buckets + 1]`, increasing; what lies beyond the outer ones belongs to the outer buckets.
        centroids: `[k, buckets]`, the coefficient for which a code stands.
        similarity_edges: `[s - 1]`, the inner edges of s buckets of z_i . z_t with as many training examples in each.
    """

    pca: PCA
    edges: jax.Array
    centroids: jax.Array
    similarity_edges: jax.Array

    def encode(self, embeddings: jax.Array) -> jax.Array:
        """The codes int32 `[b, k]` of embeddings `[b, z]`, by decreasing variance."""
        coefficients = self.pca.project(embeddings)
        find = jax.vmap(lambda edges, values: jnp.searchsorted(edges, values, side="right"), (0, 1), 1)
        return find(self.edges[:, 1:-1], coefficients).astype(jnp.int32)

    def decode(self, codes: jax.Array, normalised: bool = True) -> jax.Array:
        """The embeddings `[b, z]` of codes int32 `[b, k]`; normalised: of unit norm, which the dropped components and
        the rounding would shorten. Raises InputError for codes that there are not."""
        check_codes(codes, *self.centroids.shape)
        coefficients = jax.vmap(lambda centroids, codes: centroids[codes], (0, 1), 1)(self.centroids, codes)
        embeddings = self.pca.restore(coefficients)
        return unit_norm(embeddings) if normalised else embeddings

    def beyond(self, embeddings: jax.Array) -> jax.Array:
        """The share of the coefficients of `[b, z]` that lie beyond the outer edges, and are clipped to them."""
        coefficients = self.pca.project(embeddings)
        outside = (coefficients < self.edges[None, :, 0]) | (coefficients > self.edges[None, :, -1])
        return outside.mean()

    def similarity_bucket(self, image_embeddings: jax.Array, text_embeddings: jax.Array) -> jax.Array:
        """The bucket int32 `[b]` of z_i . z_t, the dot product of unit vectors whatever norm they come with."""
        return jnp.searchsorted(
            self.similarity_edges, similarities(image_embeddings, text_embeddings), side="right"
        ).astype(jnp.int32)


def check_codes(codes: jax.Array, components: int, buckets: int) -> None:
    """Raises InputError unless codes are int `[b, components]`, and where their values are known, in 0..buckets - 1."""
    if codes.ndim != 2 or codes.shape[1] != components or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise InputError(f"codes must be integers [b, {components}], not {codes.dtype} {list(codes.shape)}")
    if isinstance(codes, jax.core.Tracer) or not codes.size:
        return
    values = np.asarray(codes)
    if values.min() < 0 or values.max() >= buckets:
        raise InputError(f"the codes go from {values.min()} to {values.max()}; they must lie in 0 to {buckets - 1}")


def similarities(image_embeddings: jax.Array, text_embeddings: jax.Array) -> jax.Array:
    """The cosines `[b]` of embeddings `[b, z]`."""
    return (unit_norm(image_embeddings) * unit_norm(text_embeddings)).sum(-1)


class CodecFit:
    """Fits a codec to a stream in one pass: exact moments of all, and a uniform sample of them for the edges.

    fit = CodecFit(z)
    for image_embeddings, text_embeddings in batches:
        fit.add(image_embeddings, text_embeddings)
    codec = fit.codec(components=319)
    """

    def __init__(self, size: int, most_kept: int = MOST_KEPT):
        self.moments = Moments(size)
        self.random = np.random.default_rng(0)
        # Embedding and similarity of each example that is kept.
        self._kept = np.empty((most_kept, size + 1), np.float32)

    @property
    def kept(self) -> np.ndarray:
        """What the edges are found from, `[n, z + 1]`: embeddings, and their similarities to the captions."""
        return self._kept[: self.moments.count]

    def add(self, image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> None:
        """Adds the embeddings `[b, z]` of images and of their captions."""
        images, texts = np.asarray(image_embeddings, np.float32), np.asarray(text_embeddings, np.float32)
        seen = self.moments.count
        self.moments.add(images)
        rows = np.column_stack([images, similarities(images, texts)])
        room = min(max(len(self._kept) - seen, 0), len(rows))
        self._kept[seen : seen + room] = rows[:room]
        # Vitter's Algorithm R: the n-th example takes a random place of n, if there is one of that number.
        places = self.random.integers(0, seen + 1 + np.arange(room, len(rows)))
        for row, place in zip(rows[room:], places, strict=True):
            if place < len(self._kept):
                self._kept[place] = row

    def codec(
        self,
        components: int,
        buckets: int = 1024,
        similarity_buckets: int = 1024,
        edges: str = "uniform",
        percentile: float = 0.1,
    ) -> Codec:
        """The codec of what was added.

        Args:
            edges: "uniform" or "quantile".
            percentile: of the uniform ones: from that percentile of a component to 100 less it.

        Raises:
            InputError: for unknown edges, too few embeddings, or a component that is the same in all of them.
        """
        if edges not in EDGES:
            raise InputError(f"the codec's edges are {edges!r}; they must be {' or '.join(EDGES)}")
        if not 0 <= percentile < 50:
            raise InputError(f"the codec's percentile is {percentile}; it must lie in 0 to below 50")
        pca = self.moments.pca(components)
        embeddings, cosines = self.kept[:, :-1], self.kept[:, -1]
        coefficients = (embeddings - np.asarray(pca.mean)) @ np.asarray(pca.components).T
        if edges == "uniform":
            low, high = np.percentile(coefficients, (percentile, 100 - percentile), axis=0)
            found = np.linspace(low, high, buckets + 1, axis=1)
        else:
            found = np.quantile(coefficients, np.linspace(0, 1, buckets + 1), axis=0).T
        flat = np.flatnonzero(found[:, 0] >= found[:, -1])
        if flat.size:
            raise InputError(
                f"principal component {flat[0]} is the same in all embeddings; keep {flat[0]} components or fewer"
            )
        centroids = np.stack([_centroids(*pair) for pair in zip(found, coefficients.T, strict=True)])
        similarity_edges = np.quantile(cosines, np.linspace(0, 1, similarity_buckets + 1)[1:-1])
        return Codec(pca, *map(jnp.float32, (found, centroids, similarity_edges)))


def _centroids(edges: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of the values `[n]` in each bucket; the middle of a bucket that has none."""
    codes = np.searchsorted(edges[1:-1], values, side="right")
    counts = np.bincount(codes, minlength=len(edges) - 1)
    sums = np.bincount(codes, weights=values, minlength=len(edges) - 1)
    return np.where(counts, sums / np.maximum(counts, 1), (edges[1:] + edges[:-1]) / 2)
