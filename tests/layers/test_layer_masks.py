"""A transformer whose layers see different tokens: what reaches what, by gradient; scanned, written out and cached."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.errors import InputError
from dalle2_jax.layers.stacking import unstack_layers
from dalle2_jax.layers.transformer import LayerMasks, Transformer

BATCH, TOKENS, WIDTH = 2, 6, 8
MODEL = Transformer(width=WIDTH, depth=3, heads=2, is_causal=True)
# Each token sees itself; the rest is random, and what lies behind it is to be hidden by causality.
MASKS = np.random.default_rng(0).random((2, TOKENS, TOKENS)) < 0.5
MASKS |= np.eye(TOKENS, dtype=bool)
KINDS = (1, 0, 1)
LAYERS = LayerMasks(jnp.asarray(MASKS), jnp.asarray(KINDS, jnp.int32))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (BATCH, TOKENS, WIDTH))


@pytest.fixture(scope="module")
def params(x):
    """Large enough for gradients through all layers to be far from zero."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(1), x)["params"]
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: random.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


def reach(model, params, x, layer_masks):
    """Which inputs each output depends on, bool `[tokens, tokens]`, by its gradient; the most of the batch."""

    @jax.jit
    def norms(params, x):
        jacobian = jax.jacrev(lambda one: model.apply({"params": params}, one[None], layer_masks=layer_masks)[0])
        return jnp.abs(jax.vmap(jacobian)(x)).max((0, 2, 4))

    return np.asarray(norms(params, x)) > 1e-7


def test_a_token_depends_on_what_the_layers_masks_let_through(x, params):
    causal = np.tril(np.ones((TOKENS, TOKENS), bool))
    for layer, kind in enumerate(KINDS):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer : layer + 1], params)
        own = LayerMasks(LAYERS.masks, LAYERS.kinds[layer : layer + 1])
        np.testing.assert_array_equal(reach(MODEL.clone(depth=1), one, x, own), MASKS[kind] & causal)
    paths = functools.reduce(np.matmul, [(MASKS[kind] & causal).astype(int) for kind in reversed(KINDS)])
    assert (paths > 0).sum() < causal.sum(), "the case tells something"
    np.testing.assert_array_equal(reach(MODEL, params, x, LAYERS), paths > 0)


def test_scanned_written_out_and_token_by_token(x, params):
    """Also with gradients, recomputation and a mask of tokens."""
    mask = jnp.ones((BATCH, TOKENS), bool).at[0, 2].set(False)
    written = MODEL.clone(scan_layers=False, remat=True)
    apart = unstack_layers({"it": params})["it"]

    @functools.partial(jax.jit, static_argnums=1)
    def value_and_gradient(params, model):
        def loss(params):
            y = model.apply({"params": params}, x, mask, layer_masks=LAYERS)
            return jnp.mean(y**2), y

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, whole), gradient = value_and_gradient(params, MODEL)
    (_, other), other_gradient = value_and_gradient(apart, written)
    np.testing.assert_allclose(other, whole, atol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, other_gradient, unstack_layers({"it": gradient})["it"])

    for model, weights in ((MODEL, params), (written, apart)):
        advance = jax.jit(
            lambda weights, x, cache, model=model: model.apply(
                {"params": weights}, x, mask, cache=cache, layer_masks=LAYERS
            )
        )
        cache, states = model.empty_cache(BATCH, TOKENS), []
        for place in range(TOKENS):
            state, cache = advance(weights, x[:, place : place + 1], cache)
            states.append(state)
        assert advance._cache_size() == 1
        np.testing.assert_allclose(np.concatenate(states, axis=1), whole, atol=1e-5)


def test_a_deeper_stack_is_no_longer_program(x):
    def products(depth):
        model = MODEL.clone(depth=depth)
        own = LayerMasks(LAYERS.masks, jnp.zeros(depth, jnp.int32))
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        apply = jax.jit(lambda variables: model.apply(variables, x, layer_masks=own))
        return apply.lower(variables).as_text().count("dot_general")

    assert products(3) == products(9) > 0


@pytest.mark.parametrize(
    ("model", "masks", "sentence"),
    [
        (MODEL.clone(last_only=True), LAYERS, "go with a transformer without last_only"),
        (MODEL, LAYERS._replace(kinds=LAYERS.kinds[:2]), r"tokens and \[2\] layers; .* for \[6, 6\] and \[3\]"),
        (MODEL, LAYERS._replace(masks=LAYERS.masks[:, :, :5]), r"for \[6, 5\] tokens"),
    ],
)
def test_refused(x, model, masks, sentence):
    with pytest.raises(InputError, match=sentence):
        model.init(jax.random.key(0), x, layer_masks=masks)
