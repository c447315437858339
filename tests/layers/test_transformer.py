"""The transformer against a plain numpy stack, its masks, remat and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dalle2_jax.layers.stacking import stack_layers, unstack_layers
from dalle2_jax.layers.transformer import ACTIVATIONS, LayerNorm, Transformer

MODEL = Transformer(width=16, depth=3, heads=2, is_causal=True)
APPLY = jax.jit(MODEL.apply)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def params(x):
    random = np.random.default_rng(1)  # biases and norms too, which start at zero and one
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), x)["params"]
    return jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def _norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]


def _dense(x, params):
    return x @ params["kernel"] + params["bias"]


def _expected(x, blocks, depth, heads, causal):
    x = x.astype(np.float64)
    batch, tokens, width = x.shape
    for layer in range(depth):
        block = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer], np.float64), blocks)
        qkv = block["attention"]["qkv"]
        qkv = np.einsum("bnd,dkch->bnkch", _norm(x, block["attention_norm"]), qkv["kernel"]) + qkv["bias"]
        logits = np.einsum("bqhd,bkhd->bhqk", qkv[:, :, :, 0], qkv[:, :, :, 1]) / np.sqrt(width // heads)
        if causal:
            logits = np.where(np.tril(np.ones((tokens, tokens), bool)), logits, -np.inf)
        weights = np.exp(logits)
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bhqk,bkhd->bqhd", weights, qkv[:, :, :, 2]).reshape(x.shape)
        x = x + _dense(y, block["attention"]["out"])
        y = _dense(_norm(x, block["mlp_norm"]), block["mlp_in"])
        y = y / (1 + np.exp(-1.702 * y))
        x = x + _dense(y, block["mlp_out"])
    return x


def test_against_numpy(x, params):
    model = MODEL.clone(activation="quick_gelu")
    expected = _expected(x, params["blocks"], depth=3, heads=2, causal=True)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), expected, atol=1e-4)


def _last_apart(tree):
    """A whole stack's tree as `last_only` has it."""
    first, last = (jax.tree.map(lambda leaf, part=part: leaf[part], tree["blocks"]) for part in (np.s_[:-1], -1))
    return {"blocks": first, "last_block": last}


@pytest.mark.parametrize("padded", [False, True])
def test_the_last_state_alone_is_that_of_the_whole_stack(x, params, padded):
    """Values and gradients; the parameters are the same, the last layer's in a place of their own."""
    mask = np.ones((2, 6), bool)
    mask[0, 2] = not padded
    alone = MODEL.clone(last_only=True)

    def whole_loss(params):
        return (MODEL.apply({"params": params}, x, mask)[:, -1:] ** 2).mean()

    def loss(params):
        state = alone.apply({"params": params}, x, mask)
        assert state.shape == (2, 1, 16)
        return (state**2).mean()

    shapes = jax.eval_shape(alone.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, _last_apart(params))
    expected, expected_gradient = jax.jit(jax.value_and_grad(whole_loss))(params)
    value, gradient = jax.jit(jax.value_and_grad(loss))(_last_apart(params))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, _last_apart(expected_gradient))


def test_the_last_state_alone_of_one_layer(x, params):
    first = jax.tree.map(lambda leaf: leaf[:1], params)
    last = {"last_block": jax.tree.map(lambda leaf: leaf[0], params["blocks"])}
    expected = MODEL.clone(depth=1).apply({"params": first}, x)[:, -1:]
    state = MODEL.clone(depth=1, last_only=True).apply({"params": last}, x)
    np.testing.assert_allclose(state, expected, atol=1e-5)


def test_gelu_is_the_exact_one():
    assert ACTIVATIONS["gelu"](jnp.float32(1.0)) == pytest.approx(0.8413447, abs=1e-6)
    x = np.linspace(-8, 8, 201, dtype=np.float32)
    exact = np.asarray(jax.nn.gelu(x, approximate=False))
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), exact, atol=1e-6)
    low = ACTIVATIONS["gelu"](jnp.bfloat16(-2.0))
    assert low.dtype == jnp.bfloat16 and float(low) == pytest.approx(-0.0455003, rel=2**-8)
    assert ACTIVATIONS["quick_gelu"](jnp.float32(1.0)) == pytest.approx(0.8457958, abs=1e-6)


@pytest.mark.parametrize("remat", [True, "products"])
def test_remat_keeps_tree_values_and_gradients(x, params, remat):
    remat = MODEL.clone(remat=remat)
    shapes = [jax.eval_shape(model.init, jax.random.key(0), x) for model in (MODEL, remat)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])

    def loss(params, model):
        return (model.apply({"params": params}, x) ** 2).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, MODEL)
    value_remat, gradient_remat = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, remat)
    np.testing.assert_allclose(value_remat, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient_remat, gradient)


@pytest.mark.parametrize(("last_only", "remat"), [(False, False), (True, "products"), (False, True)])
def test_layers_written_out_compute_the_same(x, params, last_only, remat):
    if last_only:
        params = _last_apart(params)
    scanned = MODEL.clone(last_only=last_only)
    written = scanned.clone(scan_layers=False, remat=remat)
    apart = unstack_layers({"text": params})["text"]
    assert sorted(apart) == ["block_0", "block_1", "last_block" if last_only else "block_2"]
    shapes = jax.eval_shape(written.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, apart)
    jax.tree.map(np.testing.assert_array_equal, stack_layers({"text": apart}), {"text": params})

    def loss(params, model):
        return (model.apply({"params": params}, x) ** 2).mean()

    value_and_gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected, expected_gradient = value_and_gradient(params, scanned)
    value, gradient = value_and_gradient(apart, written)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, unstack_layers(expected_gradient))


def test_more_than_ten_layers_keep_their_order():
    tree = {"blocks": {"bias": np.arange(24).reshape(12, 2)}, "positions": np.zeros(3)}
    apart = unstack_layers(tree)
    assert apart["block_10"]["bias"].tolist() == [20, 21] and len(apart) == 13
    jax.tree.map(np.testing.assert_array_equal, stack_layers(apart), tree)


def kept(model, x, params):
    """Bytes that the forward pass keeps for the backward pass, parameters not counted."""

    def backward(params):
        return jax.vjp(lambda p: (model.apply({"params": p}, x) ** 2).mean(), params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, params))
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.shape not in shapes)


def test_remat_keeps_less(x, params):
    everything, products, nothing = (kept(MODEL.clone(remat=remat), x, params) for remat in (False, "products", True))
    layers, states = 3, x.size * 4
    # Of a layer: what goes in; and the outputs of qkv (three times the width), out, mlp_in (four times) and mlp_out.
    assert layers * states <= nothing < products <= layers * (1 + 9) * states + 4 * states < everything


def test_an_unknown_remat(x):
    with pytest.raises(ValueError, match="remat is 'dots'; it must be false, true or 'products'"):
        MODEL.clone(remat="dots").init(jax.random.key(0), x)


def test_a_later_token_leaves_earlier_states(x, params):
    changed = x.copy()
    changed[:, 4] *= -1
    before, after = APPLY({"params": params}, x), APPLY({"params": params}, changed)
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert (np.abs(after[:, 4:] - before[:, 4:]).max(axis=(0, 2)) > 1e-3).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_influences_nothing(x, params, is_causal):
    model = MODEL.clone(is_causal=is_causal)
    mask = np.ones((2, 6), bool)
    mask[0, 1] = mask[1, 4] = False  # in the middle: the causal mask alone does not hide it
    changed = np.where(mask[..., None], x, -x)
    apply = jax.jit(model.apply)
    before, after = apply({"params": params}, x, mask), apply({"params": params}, changed, mask)
    np.testing.assert_array_equal(np.asarray(after)[mask], np.asarray(before)[mask])
    unmasked = apply({"params": params}, x, np.ones_like(mask))
    assert np.abs(unmasked - before).max() > 1e-3


def test_bfloat16_computes_low_and_keeps_float32_parameters(x, params):
    model = MODEL.clone(dtype="bfloat16")
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    low = jax.jit(model.apply)({"params": params}, x)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), APPLY({"params": params}, x), atol=0.15)


def test_param_dtype(x):
    shapes = jax.eval_shape(MODEL.clone(param_dtype="bfloat16").init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


def test_dropout(x, params):
    model = MODEL.clone(dropout=0.5)
    np.testing.assert_array_equal(jax.jit(model.apply)({"params": params}, x), APPLY({"params": params}, x))

    @jax.jit
    def run(seed):
        return model.apply({"params": params}, x, deterministic=False, rngs={"dropout": jax.random.key(seed)})

    assert np.abs(run(0) - run(1)).max() > 1e-2
    np.testing.assert_array_equal(run(0), run(0))


def test_initial_scales():
    model = Transformer(width=128, depth=8, heads=2)
    blocks = jax.jit(model.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 2, 128)))["params"]["blocks"]
    for kernel, expected in [
        (blocks["attention"]["qkv"]["kernel"], 128**-0.5),
        (blocks["attention"]["out"]["kernel"], 128**-0.5 * 16**-0.5),
        (blocks["mlp_in"]["kernel"], 256**-0.5),
        (blocks["mlp_out"]["kernel"], 128**-0.5 * 16**-0.5),
    ]:
        np.testing.assert_allclose(np.asarray(kernel).reshape(8, -1).std(axis=1), expected, rtol=0.05)
    first, second = np.asarray(blocks["mlp_in"]["kernel"])[:2]
    assert np.abs(first - second).max() > 0.01, "layers start alike"


def test_layer_norm_survives_a_large_mean():
    x = np.random.default_rng(0).normal(1000, 1, size=(4, 64)).astype(np.float32)
    ours = LayerNorm().init_with_output(jax.random.key(0), x)[0]
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    small = x - 1000
    reference = nn.LayerNorm(epsilon=1e-5).init_with_output(jax.random.key(0), small)[0]
    np.testing.assert_allclose(LayerNorm().init_with_output(jax.random.key(0), small)[0], reference, atol=1e-5)


def test_bad_arguments_are_refused(x):
    with pytest.raises(ValueError, match="width 32 got states of width 16"):
        MODEL.clone(width=32).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="width 16 does not divide into 3 heads"):
        MODEL.clone(heads=3).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="unknown activation 'swish2'; choose one of gelu"):
        MODEL.clone(activation="swish2").init(jax.random.key(0), x)
