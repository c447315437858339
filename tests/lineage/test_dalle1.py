"""DALL-E 1's transformer: against torch, what depends on what, its cache, its samples counted, and its full size."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from dalle2_jax.checkpoint.rebuild import rebuild, to_json
from dalle2_jax.errors import InputError
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.layers.transformer import Transformer
from dalle2_jax.lineage.dalle1 import DALLE1, dalle1_loss
from dalle2_jax.lineage.dalle1_sampling import DALLE1Sampling, sample_dalle1
from tests.parity.reference import reference_path

TEXT, GRID, CODEBOOK, VOCABULARY = 3, 4, 7, 11
MODULE = DALLE1(
    transformer=Transformer(width=8, depth=3, heads=2, is_causal=True),
    vocabulary_size=VOCABULARY,
    context_length=TEXT,
    codebook_size=CODEBOOK,
    grid=GRID,
    window=3,
)
SMALL = MODULE.clone(codebook_size=2, grid=2)


def random_params(module: DALLE1):
    """Large enough for captions to matter, with norms near one."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs(module, 1))["params"]
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        return rng.normal(path[-1].key == "scale", 0.4, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def inputs(module: DALLE1, count: int):
    """Captions of different lengths, and codes."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (count, TEXT)), jnp.int32)
    mask = jnp.arange(TEXT)[None] < 1 + jnp.arange(count)[:, None] % TEXT
    codes = rng.integers(0, module.codebook_size, (count, module.grid, module.grid))
    return tokens, mask, jnp.asarray(codes, jnp.int32)


@pytest.fixture(scope="module")
def params():
    return random_params(MODULE)


@pytest.fixture(scope="module")
def reference():
    with np.load(reference_path("dalle1")) as file:
        return dict(file)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, *arguments):
    return module.apply({"params": params}, *arguments)


def test_the_network_of_torchs_attention_layers(reference):
    """Logits, both losses and all gradients at the same weights, with ru-dalle's masks (make_dalle1.py)."""

    def tree(kind):
        found = {name.split("/", 1)[1]: value for name, value in reference.items() if name.startswith(kind)}
        return unflatten_dict(found, sep="/")

    tokens, mask, codes = (jnp.asarray(reference[f"input/{name}"]) for name in ("tokens", "mask", "codes"))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        logits = MODULE.apply({"params": params}, tokens, mask, codes)
        losses = dalle1_loss(logits, tokens, mask, codes)
        return losses.loss, (logits, losses)

    (value, (logits, losses)), gradients = loss(tree("weights/"))
    np.testing.assert_allclose(logits.text, reference["output/text"], atol=2e-5)
    np.testing.assert_allclose(logits.image.reshape(2, GRID**2, CODEBOOK), reference["output/image"], atol=2e-5)
    for name, found in (("loss", value), ("text_loss", losses.text), ("image_loss", losses.image)):
        np.testing.assert_allclose(found, reference[f"output/{name}"], rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)
    jax.tree.map(close, gradients, tree("gradients/"))


def test_what_a_token_depends_on(params):
    """By gradient: on the text before it, and of the image on the rows before it and what stands before it in its own;
    never on what comes after."""
    tokens, _, codes = inputs(MODULE, 1)
    mask = jnp.ones((1, TEXT), bool)

    @jax.jit
    @jax.jacrev
    def gradient(learned):
        logits = MODULE.apply({"params": {**params, **learned}}, tokens, mask, codes)
        return logits.text[0], logits.image[0]

    names = ("positions", "rows")
    text, image = gradient({name: params[name] for name in names})
    by = {name: np.abs(text[name]).max((1, 3)) > 0 for name in names}
    np.testing.assert_array_equal(by["positions"], np.tril(np.ones((TEXT, TEXT), bool), -1))
    assert not by["rows"].any()
    by = {name: np.abs(image[name]).max((2, 4)) > 0 for name in names}
    assert by["positions"].all()
    for row, column in itertools.product(range(GRID), repeat=2):
        # With three layers, among them a row's and a column's, everything before is reached.
        last = row if column else row - 1
        np.testing.assert_array_equal(by["rows"][row, column], np.arange(GRID) <= last)


def test_padding_and_the_empty_caption(params):
    """What stands under the padding is not read, and of an empty caption nothing is left but its logits' own."""
    tokens, mask, codes = inputs(MODULE, 3)
    expected = apply(MODULE, params, tokens, mask, codes)
    other = apply(MODULE, params, jnp.where(mask, tokens, 5), mask, codes)
    jax.tree.map(np.testing.assert_array_equal, other, expected)
    changed = apply(MODULE, params, jnp.where(mask, (tokens + 1) % VOCABULARY, tokens), mask, codes)
    assert (np.abs(changed.image - expected.image).max((1, 2, 3)) > 1e-3).all()
    nothing = jnp.zeros_like(mask)
    empty = [apply(MODULE, params, some, nothing, codes) for some in (tokens, tokens[::-1])]
    jax.tree.map(np.testing.assert_array_equal, *empty)
    assert np.abs(empty[0].image - expected.image).max() > 1e-2


@pytest.mark.parametrize("rows", [0, 2])
def test_with_the_cache_is_without(params, rows):
    """One program for all codes, from the beginning and behind given rows."""
    tokens, mask, codes = inputs(MODULE, 3)
    whole = apply(MODULE, params, tokens, mask, codes).image.reshape(3, GRID**2, CODEBOOK)
    given = codes[:, :rows] if rows else None

    @jax.jit
    def cached(params, codes):
        start = MODULE.apply({"params": params}, tokens, mask, given, method="start")

        def step(carry, code):
            logits, cache = carry
            return MODULE.apply({"params": params}, code, cache, method="advance"), logits

        (last, _), found = jax.lax.scan(step, start, codes.reshape(3, -1).T[rows * GRID : -1])
        return jnp.concatenate([jnp.moveaxis(found, 0, 1), last[:, None]], axis=1)

    np.testing.assert_allclose(cached(params, codes), whole[:, rows * GRID :], atol=2e-5)


def test_the_losses_by_hand(params):
    tokens, mask, codes = inputs(MODULE, 3)
    logits = apply(MODULE, params, tokens, mask, codes)

    def nats(logits, found):
        logits = np.asarray(logits, np.float64)
        return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(found)[..., None], -1)[..., 0]

    text, image = nats(logits.text, tokens)[np.asarray(mask)], nats(logits.image, codes)
    assert (text.size, image.size) == (1 + 2 + 3, 3 * 16)
    found = dalle1_loss(logits, tokens, mask, codes)
    np.testing.assert_allclose(found, (text.mean() / 8 + image.mean() * 7 / 8, text.mean(), image.mean()), rtol=1e-5)
    weighted = dalle1_loss(logits, tokens, mask, codes, text_weight=0.5)
    np.testing.assert_allclose(weighted.loss, (text.mean() + image.mean()) / 2, rtol=1e-5)
    dropped = dalle1_loss(logits, tokens, jnp.zeros_like(mask), codes)
    np.testing.assert_allclose(dropped, (image.mean() * 7 / 8, 0, image.mean()), rtol=1e-5)


def test_text_and_image_have_logits_of_their_own(params):
    """The text's loss says nothing to the codes' output layer, nor the image's to the vocabulary's."""
    tokens, mask, codes = inputs(MODULE, 2)
    logits = apply(MODULE, params, tokens, mask, codes)
    assert logits.text.shape == (2, TEXT, VOCABULARY) and logits.image.shape == (2, GRID, GRID, CODEBOOK)
    assert logits.text.dtype == logits.image.dtype == jnp.float32

    outputs = ("text_out", "image_out")

    @jax.jit
    @jax.jacrev
    def gradient(learned):
        logits = MODULE.apply({"params": {**params, **learned}}, tokens, mask, codes)
        return dalle1_loss(logits, tokens, mask, codes)

    found = gradient({name: params[name] for name in outputs})
    for loss, own, other in ((found.text, *outputs), (found.image, *outputs[::-1])):
        assert np.abs(loss[own]["kernel"]).max() > 1e-4 and not np.abs(loss[other]["kernel"]).any()
    low = MODULE.clone(transformer=MODULE.transformer.clone(dtype="bfloat16"))
    rough = apply(low, params, tokens, mask, codes)
    assert rough.image.dtype == jnp.float32
    np.testing.assert_allclose(rough.image, logits.image, atol=0.5)


# Sampling


@pytest.mark.parametrize(("guidance_scale", "rows"), [(1.0, 0), (2.5, 1)])
def test_images_are_sampled_as_often_as_they_are_probable(guidance_scale, rows):
    """All 16 images of 2x2 codes of two, counted, against the products of their probabilities; also of those that
    begin with a given row."""
    params = random_params(SMALL)
    params["image_out"] = jax.tree.map(lambda leaf: leaf / 2, params["image_out"])  # or one image would be all of them
    tokens, mask, _ = inputs(SMALL, 2)
    images = jnp.array(list(itertools.product(range(2), repeat=4)), jnp.int32).reshape(16, 2, 2)
    given = jnp.array([[[0, 1]]], jnp.int32)[:, :rows]

    def many(count):
        return jnp.broadcast_to(tokens[1], (count, TEXT)), jnp.broadcast_to(mask[1], (count, TEXT))

    logs = [
        jax.nn.log_softmax(apply(SMALL, params, many(16)[0], some, images).image)
        for some in (many(16)[1], jnp.zeros((16, TEXT), bool))
    ]
    logs = np.asarray(jax.nn.log_softmax(logs[1] + guidance_scale * (logs[0] - logs[1])), np.float64)
    logs = np.take_along_axis(logs, np.asarray(images)[..., None], -1)[..., 0]
    allowed = (np.asarray(images)[:, :rows] == np.asarray(given)).all((1, 2))
    expected = np.where(allowed, np.exp(logs[:, rows:].sum((1, 2))), 0.0)
    np.testing.assert_allclose(expected.sum(), 1, rtol=1e-5)

    count = 6000
    sample = jax.jit(lambda keys, given, sampling: sample_dalle1(keys, SMALL, params, *many(count), sampling, given))
    keys = jax.random.split(jax.random.key(0), count)
    start = jnp.broadcast_to(given, (count, rows, 2)) if rows else None
    found = np.asarray(sample(keys, start, DALLE1Sampling(guidance_scale=guidance_scale).turned()))
    seen = np.bincount(found.reshape(count, 4) @ [8, 4, 2, 1], minlength=16) / count
    assert (np.abs(seen - expected) < 4.5 * np.sqrt(expected * (1 - expected) / count) + 1e-4).all()
    assert expected.max() < 0.9, "the case tells something"


@pytest.mark.slow
def test_other_settings_compile_nothing_and_each_key_is_its_own(params):
    tokens, mask, codes = inputs(MODULE, 6)

    @jax.jit
    def sample(key, tokens, mask, given, sampling):
        return sample_dalle1(key, MODULE, params, tokens, mask, sampling, given)

    keys = jax.random.split(jax.random.key(3), 6)
    plain = DALLE1Sampling(guidance_scale=2.0).turned()
    first = sample(keys, tokens, mask, codes[:, :1], plain)
    assert first.shape == (6, GRID, GRID) and first.dtype == jnp.int32
    assert first.min() >= 0 and first.max() == CODEBOOK - 1
    np.testing.assert_array_equal(first[:, 0], codes[:, 0])
    for changes in ({"guidance_scale": 0.5}, {"temperature": 9.0}, {"top_k": 1}, {"top_p": 0.1}):
        sampling = DALLE1Sampling(**{"guidance_scale": 2.0, **changes}).turned()
        assert (sample(keys, tokens, mask, codes[:, :1], sampling) != first).any(), changes
    greedy = DALLE1Sampling(guidance_scale=2.0, top_k=1).turned()
    found = [sample(some, tokens, mask, codes[:, :1], greedy) for some in (keys, keys[::-1])]
    np.testing.assert_array_equal(*found)
    # At scale 0 the largest logits of the forward pass under the empty caption, each under the codes before it.
    found = sample(keys, tokens, mask, codes[:, :1], DALLE1Sampling(guidance_scale=0.0, top_k=1).turned())
    expected = jnp.argmax(apply(MODULE, params, tokens, jnp.zeros_like(mask), found).image, -1)
    np.testing.assert_array_equal(found[:, 1:], expected[:, 1:])
    assert sample._cache_size() == 1
    alone = sample(keys[4:5], tokens[4:5], mask[4:5], codes[4:5, :1], plain)
    np.testing.assert_array_equal(alone[0], first[4])


# Sizes


def test_the_papers_has_12_billion_parameters():
    module, width = DALLE1(), 3968
    tokens, codes = jnp.zeros((1, 256), jnp.int32), jnp.zeros((1, 32, 32), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens > 0, codes)["params"]
    matrices = 64 * 12 * width**2
    assert matrices == pytest.approx(12.09e9, rel=1e-3)
    assert count_parameters(shapes["transformer"]) == matrices + 64 * 13 * width
    rest = (16_384 + 8192) * (2 * width + 1)  # embeddings and outputs
    rest += (1 + 2 * 256 + 2 * 32 + 2) * width  # start, positions, padding, rows, columns, norm
    assert count_parameters(shapes) == matrices + 64 * 13 * width + rest


def test_recorded_and_rebuilt():
    for value in (MODULE, DALLE1Sampling(top_k=5, guidance_scale=3.0)):
        assert rebuild(to_json(value)) == value
    leaves = jax.tree.leaves(DALLE1Sampling(guidance_scale=2.0).turned())
    assert len(leaves) == 4 and dataclasses.replace(DALLE1Sampling(), top_p=0.5).top_p == 0.5


def case(**changes):
    tokens, mask, codes = inputs(MODULE, 2)
    values = {"module": MODULE, "tokens": tokens, "mask": mask, "codes": codes, **changes}
    module = values.pop("module")
    return lambda: jax.eval_shape(lambda: module.init(jax.random.key(0), **values))


def given(rows, key=None):
    tokens, mask, _ = inputs(MODULE, 2)
    key = jax.random.key(0) if key is None else key
    return lambda: sample_dalle1(key, MODULE, {}, tokens, mask, DALLE1Sampling(), rows)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (case(module=MODULE.clone(context_length=4)), "the captions have 3 tokens and the transformer a context of 4"),
        (case(module=MODULE.clone(grid=5)), r"the codes are \[2, 4, 4\]; they must be \[b, 5, 5\]"),
        (case(codes=jnp.full((2, 4, 4), CODEBOOK)), "the codes go from 7 to 7; .* 0 to 6"),
        (case(codes=np.full((2, 4, 4), -1)), "the codes go from -1 to -1"),
        (case(codes=jnp.zeros((2, 4, 4))), "codes must be integers"),
        (case(tokens=jnp.zeros((2, 3))), r"captions must be tokens int32 \[b, n\], not float32"),
        (case(mask=jnp.ones((2, 1), bool)), r"the captions' mask is \[2, 1\]; it must be \[2, 3\]"),
        (case(module=MODULE.clone(transformer=Transformer(8, 3, 2))), "has to be causal"),
        (case(module=MODULE.clone(window=4)), "the convolution's window is 4; it must be odd"),
        (given(jnp.zeros((2, 4, 4), jnp.int32)), "4 of 4 rows are given of 2 images for 2 captions; give fewer"),
        (given(jnp.zeros((1, 1, 4), jnp.int32)), "1 of 4 rows are given of 1 images for 2 captions"),
        (given(jnp.full((2, 1, 4), 9)), "the codes go from 9 to 9"),
        (given(jnp.zeros((2, 1, 3), jnp.int32)), r"the codes are \[2, 1, 3\]; they must be \[b, 1, 4\]"),
        (given(None, jax.random.split(jax.random.key(0), 3)), "3 keys were given for 2 examples"),
        (lambda: DALLE1Sampling(temperature=0.0), "temperature is 0.0; it must be above 0"),
        (lambda: DALLE1Sampling(temperature=-1.0), "temperature is -1.0; it must be"),
        (lambda: DALLE1Sampling(top_k=0), "top_k is 0; it must be 1 or more"),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")
