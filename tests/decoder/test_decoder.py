"""The decoder: both ways in for the image embedding, captions of both kinds, and what withholding them means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.decoder import CaptionEncoder, Decoder
from dalle2_jax.layers.unet import UNet

UNET = UNet(
    image_size=8,
    out_channels=6,
    channels=8,
    channel_multipliers=(1, 2),
    depth=1,
    attention_resolutions=(4,),
    head_channels=4,
    groups=4,
)
TEXT = CaptionEncoder(vocabulary_size=20, context_length=5, width=12, depth=1, heads=2)
MODELS = {"tokens": Decoder(UNET, text=TEXT), "states": Decoder(UNET, text_width=12), "none": Decoder(UNET)}
YES, NO = np.array([True, True]), np.array([False, False])


def _inputs(kind):
    random = np.random.default_rng(0)
    embedding = random.normal(size=(2, 6))
    inputs = {
        "x_t": random.normal(size=(2, 8, 8, 3)).astype(np.float32),
        "timesteps": np.array([10, 700], np.int32),
        "image_embedding": (embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)).astype(np.float32),
    }
    if kind == "tokens":
        inputs["text"] = random.integers(0, 20, (2, 5)).astype(np.int32)
    if kind == "states":
        inputs["text"] = random.normal(size=(2, 5, 7)).astype(np.float32)
    if kind != "none":
        inputs["text_mask"] = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    return inputs


def _other(inputs, *names):
    """The same inputs with other values for `names`, the mask kept."""
    random = np.random.default_rng(9)
    changed = dict(inputs)
    for name in names:
        old = inputs[name]
        if old.dtype == np.int32:
            changed[name] = ((old + random.integers(1, 20, old.shape)) % 20).astype(np.int32)
        else:
            changed[name] = random.normal(size=old.shape).astype(np.float32)
    return changed


class Case:
    """One kind of decoder with random parameters, its inputs, and its jitted forward pass."""

    def __init__(self, kind):
        self.model, self.inputs = MODELS[kind], _inputs(kind)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), **self.inputs)["params"]
        random = np.random.default_rng(1)
        self.params = jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
        self._apply = jax.jit(self.model.apply)

    def run(self, inputs=None, params=None, **changes):
        inputs = (self.inputs if inputs is None else inputs) | changes
        return np.asarray(self._apply({"params": self.params if params is None else params}, **inputs))


@pytest.fixture(scope="module")
def cases():
    return {kind: Case(kind) for kind in MODELS}


@pytest.fixture(params=list(MODELS))
def case(request, cases):
    return cases[request.param]


def test_starts_at_zero(case):
    """Whatever the rest: only the last convolution and the nulls are initialised here, which is quick."""

    def init():
        params = case.model.init(jax.random.key(0), **case.inputs)["params"]
        return params["unet"]["conv_out"], params["null_image"], params.get("null_text", jnp.zeros(7))

    last, null_image, null_text = jax.jit(init)()
    output = case.run(params=case.params | {"unet": case.params["unet"] | {"conv_out": last}})
    assert output.shape == (2, 8, 8, 6) and output.dtype == np.float32
    assert not output.any() and case.run().any()
    assert null_image.shape == (6,) and not null_image.any()
    assert null_text.shape == (7,) and not null_text.any()


def test_withheld_image_embedding_is_not_seen(case):
    kept = case.run(keep_image=YES, keep_text=YES)
    np.testing.assert_allclose(kept, case.run(), atol=1e-5)
    other = _other(case.inputs, "image_embedding")
    assert np.abs(case.run(other, keep_image=YES, keep_text=YES) - kept).max() > 1e-3
    withheld = case.run(keep_image=NO, keep_text=YES)
    np.testing.assert_array_equal(case.run(other, keep_image=NO, keep_text=YES), withheld)
    assert np.abs(withheld - kept).max() > 1e-3
    assert np.abs(case.run(_other(case.inputs, "x_t"), keep_image=NO, keep_text=YES) - withheld).max() > 1e-3


@pytest.mark.parametrize("kind", ["tokens", "states"])
def test_withheld_caption_is_not_seen(cases, kind):
    case = cases[kind]
    kept = case.run(keep_image=YES, keep_text=YES)
    other = _other(case.inputs, "text") | {"text_mask": np.array([[1] * 5, [1, 1, 0, 0, 0]], bool)}
    assert np.abs(case.run(other, keep_image=YES, keep_text=YES) - kept).max() > 1e-3
    withheld = case.run(keep_image=YES, keep_text=NO)
    np.testing.assert_allclose(case.run(other, keep_image=YES, keep_text=NO), withheld, atol=1e-5)
    assert np.abs(withheld - kept).max() > 1e-3
    other_image = _other(case.inputs, "image_embedding")
    assert np.abs(case.run(other_image, keep_image=YES, keep_text=NO) - withheld).max() > 1e-3


def test_withholding_is_decided_for_each_example(case):
    mixed = case.run(keep_image=np.array([True, False]), keep_text=np.array([False, True]))
    first, second = case.run(keep_image=YES, keep_text=NO), case.run(keep_image=NO, keep_text=YES)
    np.testing.assert_allclose(mixed, np.stack([first[0], second[1]]), atol=1e-5)


def test_image_embedding_enters_the_time_embedding_and_the_tokens(case):
    """With either way in closed, the other one still carries it; with both closed, nothing does."""
    other = _other(case.inputs, "image_embedding")

    def effect(*closed):
        params = case.params | {name: jax.tree.map(np.zeros_like, case.params[name]) for name in closed}
        return np.abs(case.run(other, params=params) - case.run(params=params)).max()

    assert effect("image_time") > 1e-3
    assert effect("image_tokens_projection") > 1e-3
    assert effect("image_time", "image_tokens_projection") == 0


@pytest.mark.parametrize("kind", ["tokens", "states"])
def test_caption_enters_the_time_embedding_and_the_tokens(cases, kind):
    case, closed = cases[kind], {"kernel": np.zeros((12, 32), np.float32), "bias": np.zeros(32, np.float32)}
    if kind == "states":
        closed["kernel"] = closed["kernel"][:7]
    other = _other(case.inputs, "text")
    only_tokens = case.params | {"text_time": closed}
    assert np.abs(case.run(other, params=only_tokens) - case.run(params=only_tokens)).max() > 1e-3

    def without_context(name, block):  # the keys and values of the context, whatever it says, are those of zeros
        if not isinstance(block, dict) or "context_kv" not in block:
            return block
        kernel = np.zeros_like(block["context_kv"]["kernel"])
        return block | {"context_kv": block["context_kv"] | {"kernel": kernel}}

    unet = {name: without_context(name, block) for name, block in case.params["unet"].items()}
    only_pooled = case.params | {"unet": unet}
    assert np.abs(case.run(other, params=only_pooled) - case.run(params=only_pooled)).max() > 1e-3


def test_states_under_the_mask_are_not_seen_and_the_last_real_one_is_pooled(cases):
    case = cases["states"]
    text, mask = case.inputs["text"], case.inputs["text_mask"]
    before = case.run()
    hidden = np.where(mask[:, :, None], text, 5.0).astype(np.float32)
    np.testing.assert_allclose(case.run(text=hidden), before, atol=1e-5)
    pooled = np.stack([text[0, 2], text[1, 4]])
    np.testing.assert_allclose(case.run(text_embedding=pooled), before, atol=1e-5)
    assert np.abs(case.run(text_embedding=pooled + 1) - before).max() > 1e-3


def test_inputs_have_unit_variance_by_default(cases):
    case = cases["none"]
    scaled = Decoder(UNET, embedding_scale=6**0.5)
    ours = jax.jit(scaled.apply)({"params": case.params}, **case.inputs)
    np.testing.assert_allclose(ours, case.run(), atol=1e-5)
    unscaled = Decoder(UNET, embedding_scale=1.0)
    by_hand = case.inputs | {"image_embedding": case.inputs["image_embedding"] * np.float32(6**0.5)}
    ours = jax.jit(unscaled.apply)({"params": case.params}, **by_hand)
    np.testing.assert_allclose(ours, case.run(), atol=1e-5)


def test_bfloat16_keeps_float32_parameters_and_output(cases):
    text = TEXT.clone(dtype="bfloat16")
    model = Decoder(UNET.clone(dtype="bfloat16"), text=text, dtype="bfloat16")
    case = cases["tokens"]
    shapes = jax.eval_shape(model.init, jax.random.key(0), **case.inputs)["params"]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), case.params
    )
    output = jax.jit(model.apply)({"params": case.params}, **case.inputs)
    assert output.dtype == jnp.float32
    assert np.abs(output - case.run()).max() < 0.15 * np.abs(case.run()).max()


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("tokens", {"text": None}, "reads captions"),
        ("tokens", {"text": np.zeros((2, 5, 7), np.float32)}, "int32"),
        ("states", {"text": np.zeros((2, 5), np.int32)}, "states"),
        ("states", {"text_mask": np.ones((2, 4), bool)}, "text_mask must have shape"),
        ("none", {"text": np.zeros((2, 5), np.int32)}, "no caption pathway"),
        ("tokens", {"text_embedding": np.zeros((2, 7), np.float32)}, "encodes captions itself"),
        ("none", {"image_embedding": np.zeros((3, 6), np.float32)}, "image_embedding must be"),
        ("none", {"x_t": np.zeros((2, 8, 5, 3), np.float32)}, "8x5 does not divide by 2"),
    ],
)
def test_refusals(kind, changes, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(MODELS[kind].init, jax.random.key(0), **_inputs(kind) | changes)


def test_two_caption_pathways_are_refused():
    with pytest.raises(ValueError, match="not both"):
        model = Decoder(UNET, text=TEXT, text_width=12)
        jax.eval_shape(model.init, jax.random.key(0), **_inputs("tokens"))
