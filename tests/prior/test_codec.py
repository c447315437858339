"""Principal components from a stream against numpy's SVD, and the buckets against what they are defined by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.errors import InputError
from dalle2_jax.prior import CodecFit, fit_pca
from dalle2_jax.prior.pca import Moments

COUNT, SIZE = 3000, 6


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    """Correlated, far from the origin, with a variance of its own in each direction."""
    rng = np.random.default_rng(0)
    mixing = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0] * np.array([5.0, 3, 2, 1, 0.5, 0.1])
    return (rng.normal(size=(COUNT, SIZE)) @ mixing.T + 20).astype(np.float32)


def in_batches(values: np.ndarray, sizes=(1, 999, 1500, 500)):
    return np.split(values, np.cumsum(sizes)[:-1])


def fitted(embeddings: np.ndarray, texts: np.ndarray | None = None, most_kept: int = COUNT, **options):
    fit = CodecFit(SIZE, most_kept)
    texts = embeddings if texts is None else texts
    for images, captions in zip(in_batches(embeddings), in_batches(texts), strict=True):
        fit.add(images, captions)
    return fit.codec(**{"components": 4, "buckets": 32, "similarity_buckets": 8, **options})


def test_components_are_those_of_an_svd(embeddings):
    pca = fit_pca(in_batches(embeddings), 4)
    exact = embeddings.astype(np.float64)
    _, singular, rows = np.linalg.svd(exact - exact.mean(0), full_matrices=False)
    np.testing.assert_allclose(pca.mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(pca.variances, singular[:4] ** 2 / (COUNT - 1), rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(pca.components) * rows[:4], axis=1)), 1, atol=1e-6)
    assert (np.take_along_axis(np.asarray(pca.components), np.abs(pca.components).argmax(1)[:, None], 1) > 0).all()
    # Any order and any batches give the same.
    again = fit_pca(in_batches(embeddings[::-1], (2000, 700, 300)), 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), pca, again)


def test_what_is_left_out_is_the_variance_of_the_other_components(embeddings):
    pca = fit_pca(in_batches(embeddings), SIZE)
    shortened = pca.first(3)
    error = embeddings - np.asarray(shortened.restore(shortened.project(jnp.asarray(embeddings))))
    np.testing.assert_allclose((error**2).sum(1).mean(), pca.variances[3:].sum(), rtol=1e-2)
    np.testing.assert_allclose(pca.restore(pca.project(jnp.asarray(embeddings))), embeddings, atol=1e-3)


def test_uniform_buckets(embeddings):
    codec = fitted(embeddings, percentile=0.5)
    pca, coefficients = codec.pca, np.asarray(codec.pca.project(jnp.asarray(embeddings)))
    low, high = np.percentile(coefficients, (0.5, 99.5), axis=0)
    np.testing.assert_allclose(codec.edges[:, 0], low, rtol=1e-3)
    np.testing.assert_allclose(codec.edges[:, -1], high, rtol=1e-3)
    width = (high - low) / 32
    codes = np.asarray(codec.encode(jnp.asarray(embeddings)))
    expected = np.clip(np.floor((coefficients - low) / width), 0, 31)
    assert codes.dtype == np.int32 and (codes == expected).mean() > 0.999, "but for the rounding of edges"
    # Of a smooth density a bucket's error is that of a uniform one, but for the outer two, which have the tails.
    inside = ((codes > 0) & (codes < 31)).all(1)
    decoded = np.asarray(pca.project(codec.decode(jnp.asarray(codes), normalised=False)))
    error = ((decoded - coefficients)[inside] ** 2).mean(0)
    np.testing.assert_allclose(error, width**2 / 12, rtol=0.1)
    np.testing.assert_allclose(codec.beyond(jnp.asarray(embeddings)), 0.01, atol=2e-3)
    assert float(fitted(embeddings, percentile=0).beyond(jnp.asarray(embeddings))) < 1e-3


def test_quantile_buckets_hold_as_many_each(embeddings):
    codec = fitted(embeddings, edges="quantile")
    codes = np.asarray(codec.encode(jnp.asarray(embeddings)))
    counts = np.stack([np.bincount(column, minlength=32) for column in codes.T])
    assert abs(counts - COUNT / 32).max() <= 2
    coefficients = np.asarray(codec.pca.project(jnp.asarray(embeddings)))
    means = [[coefficients[codes[:, k] == b, k].mean() for b in range(32)] for k in range(4)]
    np.testing.assert_allclose(codec.centroids, means, rtol=1e-3, atol=1e-3)


def test_codes_come_back_to_unit_norm_and_to_themselves(embeddings):
    unit = embeddings - embeddings.mean(0)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    codec = fitted(unit, components=6, buckets=256, percentile=0)
    codes = codec.encode(jnp.asarray(unit))
    decoded = codec.decode(codes)
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), 1, rtol=1e-5)
    assert (np.asarray(decoded) * unit).sum(1).min() > 0.999
    again = codec.encode(codec.decode(codes, normalised=False))
    assert (np.asarray(again) == np.asarray(codes)).mean() > 0.999


def test_similarity_buckets_are_equally_full(embeddings):
    texts = np.random.default_rng(1).normal(size=embeddings.shape).astype(np.float32)
    codec = fitted(embeddings, texts)
    buckets = np.asarray(codec.similarity_bucket(jnp.asarray(embeddings), jnp.asarray(texts)))
    assert abs(np.bincount(buckets, minlength=8) - COUNT / 8).max() <= 2
    cosines = (embeddings * texts).sum(1) / np.linalg.norm(embeddings, axis=1) / np.linalg.norm(texts, axis=1)
    assert cosines[buckets >= 4].min() >= cosines[buckets < 4].max() - 1e-6
    # The norms of the embeddings do not matter.
    np.testing.assert_array_equal(codec.similarity_bucket(jnp.asarray(embeddings) * 3, jnp.asarray(texts)), buckets)


def test_the_edges_of_a_long_stream_are_those_of_a_uniform_sample(embeddings):
    numbered = np.zeros((COUNT, SIZE), np.float32)
    numbered[:, 0] = np.arange(COUNT)
    numbered[:, 1] = 1
    fit = CodecFit(SIZE, most_kept=600)
    for batch in in_batches(numbered):
        fit.add(batch, batch)
    kept = np.sort(fit.kept[:, 0])
    assert len(np.unique(kept)) == len(kept) == 600
    tenths = np.histogram(kept, 10, (0, COUNT))[0]
    assert abs(tenths - 60).max() < 4 * np.sqrt(60 * 0.9 * 0.8), "4 standard deviations of a draw without replacement"


@pytest.mark.parametrize(
    ("refused", "sentence"),
    [
        (lambda x: fit_pca([x[:4]], 4), "4 principal components need more than 4 embeddings; there are 4"),
        (lambda x: fit_pca([x], 7), "7 principal components were asked for of embeddings of size 6"),
        (lambda x: fit_pca([x], 3).first(4), "4 dimensions were asked for; there are 3 principal components"),
        (lambda x: fit_pca([], 3), "there is no embedding to find principal components of"),
        (lambda x: Moments(SIZE).add(x * np.nan), "an image embedding is not finite"),
        (lambda x: fitted(x).decode(jnp.array([[0, 1, 32, 2]])), "the codes go from 0 to 32; they must lie in 0 to 31"),
        (lambda x: fitted(x).decode(jnp.array([[0, -1, 3, 2]])), "the codes go from -1 to 3; they must lie in 0 to 31"),
        (lambda x: fitted(x).decode(jnp.array([[0, 1, 2]])), r"codes must be integers \[b, 4\], not int32 \[1, 3\]"),
        (lambda x: fitted(x, edges="log"), "edges are 'log'; they must be uniform or quantile"),
        (lambda x: fitted(x, percentile=50), "percentile is 50; it must lie in 0 to below 50"),
        (lambda x: fitted(x * np.array([1, 1, 1, 0, 0, 0], np.float32)), "principal component 3 is the same in all"),
    ],
)
def test_what_is_refused(embeddings, refused, sentence):
    with pytest.raises(InputError, match=sentence.replace("(", r"\(")) as error:
        refused(embeddings)
    assert "\n" not in str(error.value)
