"""The U-Net: its attention against numpy, where conditions enter, what it refuses, dtypes and remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.layers.unet import AttentionBlock, UNet

MODEL = UNet(
    image_size=8,
    out_channels=6,
    channels=8,
    channel_multipliers=(1, 2),
    depth=1,
    attention_resolutions=(4,),
    head_channels=4,
    groups=4,
)


def _draw(shapes, seed=1):
    """Random numpy parameters; initialising whole networks would cost more than the tests."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    return {
        "x": random.normal(size=(2, 8, 8, 3)).astype(np.float32),
        "timesteps": np.array([10, 700], np.int32),
        "condition": random.normal(size=(2, 32)).astype(np.float32),
        "context": random.normal(size=(2, 5, 6)).astype(np.float32),
        "context_mask": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool),
    }


@pytest.fixture(scope="module")
def shapes(inputs):
    return jax.eval_shape(MODEL.init, jax.random.key(0), **inputs)["params"]


@pytest.fixture(scope="module")
def params(shapes):
    return _draw(shapes)


@pytest.fixture(scope="module")
def run(params):
    apply = jax.jit(MODEL.apply)
    return lambda params=params, **inputs: np.asarray(apply({"params": params}, **inputs))


def test_attention_block_with_context():
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 2, 3, 8)).astype(np.float32)
    context = random.normal(size=(2, 4, 5)).astype(np.float32)
    mask = np.array([[1, 0, 1, 0], [1, 1, 1, 1]], bool)
    block = AttentionBlock(head_channels=4, groups=2)
    params = block.init(jax.random.key(0), x, context, mask)["params"]
    np.testing.assert_array_equal(block.apply({"params": params}, x, context, mask), x)  # starts as nothing
    params = _draw(params)

    def dense(h, name):
        return h @ params[name]["kernel"] + params[name]["bias"]

    grouped = x.reshape(2, 6, 2, 4)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    h = ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(2, 6, 8) * params["norm"]["scale"] + params["norm"][
        "bias"
    ]
    qkv, kv = dense(h, "qkv"), dense(context, "context_kv")
    out = np.zeros((2, 6, 8))
    for b in range(2):
        for head in range(2):
            own = slice(4 * head, 4 * head + 4)
            query, key, value = qkv[b, :, :8][:, own], qkv[b, :, 8:16][:, own], qkv[b, :, 16:][:, own]
            key = np.concatenate([kv[b, :, :8][mask[b]][:, own], key])
            value = np.concatenate([kv[b, :, 8:][mask[b]][:, own], value])
            weights = np.exp(query @ key.T / 2)
            out[b, :, own] = weights / weights.sum(-1, keepdims=True) @ value
    expected = x + dense(out, "out").reshape(x.shape)
    np.testing.assert_allclose(block.apply({"params": params}, x, context, mask), expected, atol=1e-5)


def test_output_starts_at_zero_in_float32(run, params, inputs):
    """Whatever the rest: the last convolution alone is initialised here, which is quick."""
    last = jax.jit(lambda: MODEL.init(jax.random.key(0), **inputs)["params"]["conv_out"])()
    output = run(params | {"conv_out": last}, **inputs)
    assert output.shape == (2, 8, 8, 6) and output.dtype == np.float32
    assert not output.any() and run(**inputs).any()


def test_blocks_of_the_tree(shapes):
    """Depth 1: one block a level down, two up; level 1 (4x4) attends; the middle is residual, attention, residual."""
    assert set(shapes) == {
        *("time_1", "time_2", "conv_in", "norm_out", "conv_out"),
        *("down_0_res_0", "down_0_resample", "down_1_res_0", "down_1_attention_0"),
        *("middle_res_0", "middle_attention_0", "middle_res_1"),
        *("up_1_res_0", "up_1_attention_0", "up_1_res_1", "up_1_attention_1", "up_1_resample"),
        *("up_0_res_0", "up_0_res_1"),
    }
    assert shapes["up_1_res_0"]["conv_1"]["kernel"].shape == (3, 3, 16 + 16, 16)
    assert shapes["up_1_res_1"]["conv_1"]["kernel"].shape == (3, 3, 16 + 8, 16)
    assert shapes["up_0_res_0"]["conv_1"]["kernel"].shape == (3, 3, 16 + 8, 8)


@pytest.mark.parametrize("name", ["x", "timesteps", "condition", "context"])
def test_every_input_matters_and_examples_do_not_mix(run, inputs, name):
    changed = dict(inputs)
    changed[name] = inputs[name].copy()
    changed[name][1] += 1
    before, after = run(**inputs), run(**changed)
    assert np.abs(after[1] - before[1]).max() > 1e-3
    np.testing.assert_allclose(after[0], before[0], atol=1e-5)


def test_masked_context_is_not_seen(run, inputs):
    changed = inputs | {"context": np.where(inputs["context_mask"][:, :, None], inputs["context"], 7.0)}
    np.testing.assert_allclose(run(**changed), run(**inputs), atol=1e-5)


def test_runs_on_other_sizes(run, inputs):
    wide = np.tile(inputs["x"], (1, 1, 2, 1))
    assert run(**inputs | {"x": wide}).shape == (2, 8, 16, 6)


def test_plain_network_without_attention():
    model = MODEL.clone(attention_resolutions=(), middle_attention=False, scale_shift=False, resblock_resampling=False)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1))["params"]
    assert not [name for name in shapes if "attention" in name]
    assert set(shapes["down_0_resample"]) == {"conv"}
    assert shapes["down_0_res_0"]["time"]["kernel"].shape == (32, 8)


def test_remat_has_the_same_tree_values_and_gradients(inputs):
    plain = MODEL.clone(channel_multipliers=(1,), attention_resolutions=(8,), dropout=0.2)
    others = [plain.clone(remat=remat) for remat in (True, "products")]
    shapes = jax.eval_shape(plain.init, jax.random.key(0), **inputs)["params"]
    assert all(jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"] == shapes for model in others)

    def loss(params, model):
        rngs = {"dropout": jax.random.key(3)}
        return jnp.mean(model.apply({"params": params}, **inputs, deterministic=False, rngs=rngs) ** 2)

    def all_of_them(params):
        return tuple(jax.value_and_grad(loss)(params, model) for model in (plain, *others))

    (value, gradient), *found = jax.jit(all_of_them)(_draw(shapes))
    for value_remat, gradient_remat in found:
        np.testing.assert_allclose(value, value_remat, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), gradient, gradient_remat)


def test_bfloat16_keeps_float32_parameters_and_output(params, inputs, run):
    model = MODEL.clone(dtype="bfloat16")
    shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    output = jax.jit(model.apply)({"params": params}, **inputs)
    assert output.dtype == jnp.float32
    expected = run(**inputs)
    error = np.abs(output - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 0.1  # rounded, so the blocks did compute in bfloat16

    half = jax.eval_shape(model.clone(param_dtype="bfloat16").init, jax.random.key(0), **inputs)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    "fields, changes, words",
    [
        ({}, {"x": np.zeros((2, 7, 8, 3), np.float32)}, "7x8 does not divide by 2"),
        ({}, {"x": np.zeros((2, 8, 3), np.float32)}, "wants x"),
        ({"groups": 3}, {}, "8 channels at level 0 do not divide into 3 groups"),
        ({"head_channels": 3}, {}, "16 channels at level 1 do not divide into heads of 3"),
        ({}, {"context": np.zeros((2, 6), np.float32), "context_mask": None}, "context must be"),
        ({}, {"context_mask": np.ones((2, 4), bool)}, "context_mask"),
        ({}, {"context": None}, "context_mask .* needs a context"),
        ({}, {"condition": np.zeros((2, 8), np.float32)}, "condition must be"),
        ({}, {"timesteps": np.zeros((), np.int32)}, "one timestep an example"),
    ],
)
def test_refusals(inputs, fields, changes, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(MODEL.clone(**fields).init, jax.random.key(0), **inputs | changes)


def test_one_head_of_all_channels(inputs):
    """The same parameters; only the attention is split otherwise."""
    random = np.random.default_rng(3)
    x = random.normal(size=(1, 2, 2, 8)).astype(np.float32)
    one, two = (AttentionBlock(head_channels=size, groups=2) for size in (None, 4))
    params = _draw(jax.eval_shape(one.init, jax.random.key(0), x)["params"])
    assert jax.eval_shape(two.init, jax.random.key(0), x)["params"] == jax.eval_shape(lambda: params)
    found = one.apply({"params": params}, x)
    np.testing.assert_array_equal(found, AttentionBlock(head_channels=8, groups=2).apply({"params": params}, x))
    assert np.abs(found - two.apply({"params": params}, x)).max() > 1e-3
    jax.eval_shape(MODEL.clone(head_channels=None).init, jax.random.key(0), **inputs)


def test_heads_need_not_divide_where_nothing_attends(inputs):
    model = MODEL.clone(head_channels=3, attention_resolutions=(), middle_attention=False)
    jax.eval_shape(model.init, jax.random.key(0), inputs["x"], inputs["timesteps"])


def test_folded_pixels(inputs):
    """A network with patch 2 is one of half the size on folded images: the same blocks, wider at both ends."""
    folded = MODEL.clone(patch=2, image_size=16)
    x = np.random.default_rng(2).normal(size=(2, 16, 16, 3)).astype(np.float32)
    params = _draw(jax.eval_shape(folded.init, jax.random.key(0), x, inputs["timesteps"])["params"])
    out = np.asarray(jax.jit(folded.apply)({"params": params}, x, inputs["timesteps"]))
    assert out.shape == (2, 16, 16, 6) and folded.attends(1) and not folded.attends(0)
    assert params["conv_in"]["kernel"].shape == (3, 3, 12, 8) and params["conv_out"]["kernel"].shape == (3, 3, 8, 24)
    plain = MODEL.clone(out_channels=24)
    small = x.reshape(2, 8, 2, 8, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 8, 8, 12)
    expected = np.asarray(jax.jit(plain.apply)({"params": params}, small, inputs["timesteps"]))
    expected = expected.reshape(2, 8, 8, 2, 2, 6).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 16, 6)
    np.testing.assert_allclose(out, expected, atol=1e-6 * np.abs(expected).max())


def test_folded_pixels_need_a_size_that_divides(inputs):
    folded = MODEL.clone(patch=4)
    with pytest.raises(ValueError, match="12x12 does not divide by 8, .* 2 levels and patches of 4 need: pad or crop"):
        jax.eval_shape(folded.init, jax.random.key(0), np.zeros((2, 12, 12, 3), np.float32), inputs["timesteps"])
