"""Cross-attention against a plain numpy formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.errors import InputError
from dalle2_jax.layers.cross_attention import CrossAttention

WIDTH, HEADS, MEMORY_WIDTH = 6, 3, 5


@pytest.fixture(scope="module")
def case():
    rng, module = np.random.default_rng(0), CrossAttention(WIDTH, HEADS)
    x, memory = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 4, WIDTH), (2, 7, MEMORY_WIDTH)))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, memory)["params"]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return module, params, x, memory, np.arange(7)[None] < np.array([[3], [7]])


def by_hand(params, x, memory, mask):
    """Outputs, and weights [b, heads, queries, keys]."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, memory = np.asarray(x, np.float64), np.asarray(memory, np.float64)
    query = np.einsum("bnd,dhk->bnhk", x, p["query"]["kernel"]) + p["query"]["bias"]
    both = np.einsum("bmd,dhtk->bmhtk", memory, p["key_value"]["kernel"]) + p["key_value"]["bias"]
    logits = np.einsum("bnhk,bmhk->bhnm", query, both[..., 0, :]) / np.sqrt(WIDTH / HEADS)
    weights = np.exp(logits) * mask[:, None, None]
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bhnm,bmhk->bnhk", weights, both[..., 1, :]).reshape(x.shape)
    return y @ p["out"]["kernel"] + p["out"]["bias"], weights


@pytest.mark.parametrize("masked", [True, False])
def test_against_numpy(case, masked):
    module, params, x, memory, mask = case
    expected, weights = by_hand(params, x, memory, mask if masked else np.ones_like(mask))

    @jax.jit
    def run(params, x, memory, mask):
        once = module.apply({"params": params}, memory, method="read")
        again = module.apply({"params": params}, x, once, mask)
        return module.apply({"params": params}, x, memory, mask, mutable=["intermediates"]), again

    (found, state), again = run(params, x, memory, mask if masked else None)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(state["intermediates"]["weights"][0], weights, atol=1e-6)
    np.testing.assert_allclose(again, found, atol=1e-6)


def test_kernels_start_with_the_variance_of_their_inputs():
    module = CrossAttention(64, 4)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 64)), jnp.zeros((1, 1, 256)))["params"]
    found = {name: float(jnp.std(layer["kernel"])) for name, layer in params.items()}
    assert found == pytest.approx({"query": 64**-0.5, "key_value": 256**-0.5, "out": 64**-0.5}, rel=0.05)


def test_heads_that_do_not_divide():
    with pytest.raises(InputError, match="width 6 does not divide into 4 heads; choose heads that divide it"):
        CrossAttention(6, 4).init(jax.random.key(0), jnp.zeros((1, 1, 6)), jnp.zeros((1, 1, 6)))
