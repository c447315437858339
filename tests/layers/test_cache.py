"""A causal transformer token by token, from its cache, computes what it computes of all tokens at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.errors import InputError
from dalle2_jax.layers.transformer import Transformer

BATCH, TOKENS, WIDTH = 2, 7, 16


def transformer(**changes) -> Transformer:
    return Transformer(**{"width": WIDTH, "depth": 3, "heads": 4, "is_causal": True, **changes})


@pytest.mark.parametrize("scan_layers", [True, False])
def test_token_by_token_is_all_at_once(scan_layers):
    module = transformer(scan_layers=scan_layers)
    x = jax.random.normal(jax.random.key(0), (BATCH, TOKENS, WIDTH))
    mask = jnp.arange(TOKENS)[None] != jnp.array([[1], [2]])  # another token hidden in each row
    params = module.init(jax.random.key(1), x)
    whole = module.apply(params, x, mask)

    @jax.jit
    def advance(x, cache):
        return module.apply(params, x, mask, cache=cache)

    start, cache = advance(x[:, :3], module.empty_cache(BATCH, TOKENS))
    states = [start]
    for place in range(3, TOKENS):
        state, cache = advance(x[:, place : place + 1], cache)
        states.append(state)
    np.testing.assert_allclose(np.concatenate(states, axis=1), whole, atol=1e-5)
    assert int(cache.length) == TOKENS and advance._cache_size() == 2


def test_what_is_in_no_place_yet_is_not_seen():
    """Rubbish in the places behind a token changes nothing."""
    module = transformer()
    x = jax.random.normal(jax.random.key(0), (BATCH, 1, WIDTH))
    params, empty = module.init(jax.random.key(1), x), module.empty_cache(BATCH, TOKENS)
    dirty = jax.tree.map(lambda leaf: leaf + 100 if leaf.ndim else leaf, empty)
    clean, _ = module.apply(params, x, cache=empty)
    np.testing.assert_array_equal(module.apply(params, x, cache=dirty)[0], clean)
    np.testing.assert_allclose(clean, module.apply(params, x), atol=1e-6)


@pytest.mark.parametrize("changes", [{"is_causal": False}, {"last_only": True}])
def test_only_a_causal_one_has_a_cache(changes):
    module, x = transformer(**changes), jnp.zeros((1, 2, WIDTH))
    params = module.init(jax.random.key(0), x)
    with pytest.raises(InputError, match="a cache goes with a causal transformer"):
        module.apply(params, x, cache=module.empty_cache(1, 2))
