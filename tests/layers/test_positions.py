"""Sinusoidal positions against the paper's formula, and the learned table."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.errors import InputError
from dalle2_jax.layers.positions import Positions, sinusoidal_positions


def test_the_papers_formula():
    found = np.asarray(sinusoidal_positions(200, 6))
    assert found.dtype == np.float32 and found.shape == (200, 6)
    for p in (0, 1, 17, 199):
        for i in range(3):
            angle = p / 10000 ** (2 * i / 6)
            assert found[p, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert found[p, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_a_distance_is_a_rotation():
    """PE(p + k) is a linear function of PE(p), the same for all p (Sec. 3.5)."""
    pairs = np.asarray(sinusoidal_positions(60, 8)).reshape(60, 4, 2)
    angles = 7 / 10000 ** (np.arange(0, 8, 2) / 8)
    turned = np.einsum(
        "ist,pit->pis", np.moveaxis([[np.cos(angles), np.sin(angles)], [-np.sin(angles), np.cos(angles)]], 2, 0), pairs
    )
    np.testing.assert_allclose(turned[:-7], pairs[7:], atol=1e-5)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_a_place_is_the_same_alone_and_among_others(kind):
    module, x = Positions(kind, 9), jax.random.normal(jax.random.key(0), (2, 7, 4))
    params = module.init(jax.random.key(1), x)
    whole = module.apply(params, x)
    added = params["params"]["table"] if kind == "learned" else sinusoidal_positions(9, 4)
    assert (kind == "learned") == bool(jax.tree.leaves(params)) and added.shape == (9, 4)
    np.testing.assert_allclose(whole, x + added[None, :7], atol=1e-6)
    part = jax.jit(module.apply)
    for first in (0, 3, 5):
        found = part(params, x[:, first : first + 2], first)
        np.testing.assert_allclose(found, whole[:, first : first + 2], atol=1e-6)
    assert part._cache_size() == 1
    assert module.apply(params, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: sinusoidal_positions(4, 5), "an even width, got 5; set an even one, or positions=learned"),
        (lambda: Positions("rotary").init(jax.random.key(0), jnp.zeros((1, 2, 4))), "must be sinusoidal or learned"),
        (lambda: Positions("learned", 3).init(jax.random.key(0), jnp.zeros((1, 4, 4))), "has 4 tokens; the most are"),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")
