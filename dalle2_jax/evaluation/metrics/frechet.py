"""The Fréchet distance of two sets of features, each taken as a normal distribution (Heusel et al. 2017)."""

import numpy as np

from dalle2_jax.errors import InputError


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C^1/2 C' C^1/2)^1/2) of features `[n, z]` and `[m, z]`, in float64.

    The symmetric product has a real root whatever the rounding, which the product C C' has not. With few features the
    distance is too large, so that only figures of one n and m compare.

    Raises:
        InputError: for fewer than two features, or features of two sizes.
    """
    features, reference = (np.asarray(one, np.float64) for one in (features, reference))
    if min(len(features), len(reference)) < 2:
        raise InputError(
            f"a Fréchet distance of {len(features)} and {len(reference)} images was asked for; it takes 2 of each"
        )
    if features.shape[1:] != reference.shape[1:]:
        raise InputError(f"features {list(features.shape)} and {list(reference.shape)} are not of one size")
    means, covariances = zip(
        *((one.mean(0), np.cov(one, rowvar=False, ddof=1)) for one in (features, reference)), strict=True
    )
    own, other = map(np.atleast_2d, covariances)
    values, vectors = np.linalg.eigh(own)
    root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other @ root), 0.0)).sum()
    distance = np.sum((means[0] - means[1]) ** 2) + np.trace(own) + np.trace(other) - 2.0 * shared
    return float(max(distance, 0.0))
