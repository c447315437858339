"""The autoregressive prior against its definition in numpy, its cache, what its codes depend on, and its sampling."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.errors import InputError
from dalle2_jax.layers import CaptionEncoder, Transformer
from dalle2_jax.prior import AutoregressivePrior, AutoregressiveSampling, CodecFit, caption_condition, sample_prior
from dalle2_jax.prior.autoregressive import stored
from dalle2_jax.prior.autoregressive_sampling import draw_similarity, sample_codes

BATCH, CONTEXT, SIZE, CODES, BUCKETS = 3, 6, 8, 5, 7
FIELDS = {
    "transformer": Transformer(width=16, depth=2, heads=2, is_causal=True),
    "embedding_size": SIZE,
    "components": CODES,
    "buckets": BUCKETS,
    "similarity_buckets": 4,
    "context_length": CONTEXT,
}
OWN = CaptionEncoder(vocabulary_size=20, context_length=CONTEXT, width=12, depth=1, heads=2)
READING = {
    "tokens": {"vocabulary_size": 20},
    "states": {"text_components": True},
    "its own encoder": {"text": OWN},
}


def prior(reading: str = "tokens", **changes) -> AutoregressivePrior:
    return AutoregressivePrior(**{**FIELDS, **READING[reading], **changes})


@pytest.fixture(scope="module")
def captions() -> EncodedCaptions:
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 20, (BATCH, CONTEXT)), jnp.int32)
    mask = jnp.arange(CONTEXT)[None] < jnp.array([[2], [4], [6]])
    return EncodedCaptions(tokens, mask, *(jnp.float32(rng.normal(size=(BATCH, *n))) for n in ((SIZE,), (CONTEXT, 10))))


@pytest.fixture(scope="module")
def codes() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(0, BUCKETS, (BATCH, CODES)), jnp.int32), jnp.array([0, 3, 2], jnp.int32)


def drawn(module: AutoregressivePrior, captions: EncodedCaptions, codes) -> dict:
    """Random parameters everywhere, so that nothing is zero, and a real codec."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *codes, **caption_condition(module, captions)))
    rng = np.random.default_rng(3)
    leaves, tree = jax.tree.flatten(shapes["params"])
    leaves = [rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
    fit = CodecFit(SIZE)
    fit.add(*np.random.default_rng(2).normal(size=(2, 200, SIZE)))
    codec = fit.codec(module.components, module.buckets, module.similarity_buckets)
    params = jax.tree.unflatten(tree, leaves)
    params["final_norm"]["scale"] = np.ones(module.transformer.width, np.float32)
    return {**params, "codec": stored(codec)}


@pytest.fixture(scope="module", params=READING)
def built(request, captions, codes):
    module = prior(request.param)
    return module, drawn(module, captions, codes)


@pytest.fixture(scope="module")
def by_tokens(captions, codes):
    module = prior()
    return module, drawn(module, captions, codes)


def logits_of(module, params, captions, codes, keep=None):
    keep = jnp.ones(len(captions), bool) if keep is None else keep
    return _logits_of(module, params, captions, codes, keep)


@functools.partial(jax.jit, static_argnums=0)
def _logits_of(module, params, captions, codes, keep):
    return module.apply({"params": params}, *codes, **caption_condition(module, captions), keep_text=keep)


def test_it_is_the_network_of_its_docstring(by_tokens, captions, codes):
    """Written out in numpy, float64, one caption at a time and without its padding."""
    module, params = by_tokens
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * at["scale"] + at["bias"]

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))

    def layer(x, at):
        qkv = np.einsum("nd,dhcf->nhcf", norm(x, at["attention_norm"]), at["attention"]["qkv"]["kernel"])
        q, k, v = np.moveaxis(qkv + at["attention"]["qkv"]["bias"], 2, 0)
        scores = np.einsum("qhf,khf->hqk", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("hqk,khf->qhf", weights, v).reshape(len(x), -1)
        x = x + y @ at["attention"]["out"]["kernel"] + at["attention"]["out"]["bias"]
        hidden = gelu(norm(x, at["mlp_norm"]) @ at["mlp_in"]["kernel"] + at["mlp_in"]["bias"])
        return x + hidden @ at["mlp_out"]["kernel"] + at["mlp_out"]["bias"]

    logits = np.asarray(logits_of(module, params, captions, codes))
    for row in range(BATCH):
        length = int(captions.mask[row].sum())
        tokens = p["token_embedding"]["embedding"][np.asarray(captions.tokens[row, :length])]
        text = np.asarray(captions.embedding[row], np.float64) * np.sqrt(SIZE)
        text = text @ p["text_embedding_projection"]["kernel"] + p["text_embedding_projection"]["bias"]
        similarity = p["similarity_embedding"]["embedding"][int(codes[1][row])]
        inputs = p["code_embedding"]["embedding"][np.asarray(codes[0][row, :-1])]
        x = np.concatenate([tokens, text[None], similarity[None], inputs])
        x = x + np.concatenate([p["positions"][:length], p["positions"][CONTEXT:]])
        for number in range(2):
            x = layer(x, jax.tree.map(lambda leaf, number=number: leaf[number], p["transformer"]["blocks"]))
        expected = norm(x[length + 1 :], p["final_norm"]) @ p["out"]["kernel"] + p["out"]["bias"]
        np.testing.assert_allclose(logits[row], expected, atol=2e-4)


def test_what_a_code_depends_on(built, captions, codes):
    module, params = built
    logits = logits_of(module, params, captions, codes)
    assert logits.shape == (BATCH, CODES, BUCKETS) and logits.dtype == jnp.float32
    for number in range(CODES):
        other = codes[0].at[:, number].set((codes[0][:, number] + 1) % BUCKETS), codes[1]
        changed = np.abs(logits_of(module, params, captions, other) - logits).max((0, 2)) > 1e-6
        np.testing.assert_array_equal(changed, np.arange(CODES) > number)
    other = logits_of(module, params, captions, (codes[0], (codes[1] + 1) % 4))
    assert (np.abs(other - logits).max((1, 2)) > 1e-4).all()
    # Not on what is under the padding.
    noise = EncodedCaptions(
        jnp.where(captions.mask, captions.tokens, 3),
        captions.mask,
        captions.embedding,
        jnp.where(captions.mask[:, :, None], captions.states, 9.0),
    )
    np.testing.assert_allclose(logits_of(module, params, noise, codes), logits, atol=1e-5)
    # Of a dropped caption on nothing, not even its length.
    drop = jnp.array([False, True, False])
    dropped = logits_of(module, params, captions, codes, keep=drop)
    np.testing.assert_allclose(dropped[1], logits[1], atol=1e-5)
    same = jax.tree.map(lambda leaf: leaf.at[0].set(leaf[2]), (captions, codes))
    alike = logits_of(module, params, same[0], codes, keep=drop)
    np.testing.assert_allclose(alike, dropped, atol=1e-5)
    assert np.abs(dropped[0] - logits[0]).max() > 1e-3


def test_with_the_cache_is_without(built, captions, codes):
    """One program whatever the captions' lengths, and the logits of the whole sequence at once."""
    module, params = built

    @jax.jit
    def cached(captions, codes, similarity):
        condition = {**caption_condition(module, captions), "similarity": similarity}
        first = module.apply({"params": params}, **condition, method="start")

        def step(carry, code):
            logits, progress = carry
            return module.apply({"params": params}, code, progress, method="advance"), logits

        (last, _), found = jax.lax.scan(step, first, codes.T[:-1])
        return jnp.concatenate([jnp.moveaxis(found, 0, 1), last[:, None]], axis=1)

    for lengths in ((2, 4, 6), (6, 1, 3)):
        mask = jnp.arange(CONTEXT)[None] < jnp.asarray(lengths)[:, None]
        some = dataclasses.replace(captions, mask=mask)
        np.testing.assert_allclose(cached(some, *codes), logits_of(module, params, some, codes), atol=1e-5)
    assert cached._cache_size() == 1


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_codes_are_sampled_as_often_as_they_are_probable(guidance_scale, captions):
    """All nine sequences of two codes of three, counted, against the products of their probabilities."""
    module = prior(components=2, buckets=3, similarity_buckets=1)
    one = captions[jnp.array([1])]
    params = drawn(module, one, (jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32)))
    params["out"] = jax.tree.map(lambda leaf: leaf / 3, params["out"])  # or one of them would be all but certain
    pairs = jnp.array([(a, b) for a in range(3) for b in range(3)], jnp.int32)
    nine, zeros = one[jnp.zeros(9, int)], jnp.zeros(9, jnp.int32)
    halves = [logits_of(module, params, nine, (pairs, zeros), keep=jnp.full(9, keep)) for keep in (True, False)]
    logs = jax.nn.log_softmax(jnp.stack(halves).astype(jnp.float32))
    logs = jax.nn.log_softmax(logs[1] + guidance_scale * (logs[0] - logs[1]))
    expected = np.exp(np.asarray([logs[n, 0, a] + logs[n, 1, b] for n, (a, b) in enumerate(pairs.tolist())]))
    np.testing.assert_allclose(expected.sum(), 1, rtol=1e-5)
    count = 6000
    sampling = AutoregressiveSampling(guidance_scale=guidance_scale, top_similarity=1.0)
    many = one[jnp.zeros(count, int)]
    keys = jax.random.split(jax.random.key(0), count)
    found = jax.jit(functools.partial(sample_codes, module))(params, keys, many, sampling.turned())
    seen = np.bincount(np.asarray(found[:, 0] * 3 + found[:, 1]), minlength=9) / count
    assert (np.abs(seen - expected) < 4.5 * np.sqrt(expected * (1 - expected) / count) + 1e-4).all()
    assert expected.max() < 0.9, "the case tells something"


@pytest.mark.parametrize(("share", "least"), [(0.5, 8), (0.25, 12), (1.0, 0)])
def test_the_similarity_is_drawn_from_the_upper_buckets(share, least):
    keys = jax.random.split(jax.random.key(0), 4000)
    found = np.asarray(draw_similarity(keys, 16, share))
    counts = np.bincount(found, minlength=16)
    assert counts[:least].sum() == 0 and counts.shape == (16,)
    expected = 4000 / (16 - least)
    assert (np.abs(counts[least:] - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.slow
def test_other_settings_compile_nothing_and_each_key_is_its_own(by_tokens, captions):
    module, params = by_tokens
    draw = jax.jit(lambda keys, captions, sampling: sample_prior(keys, module, params, None, sampling, captions))
    captions = captions[jnp.arange(8 * BATCH) % BATCH]
    keys = jax.random.split(jax.random.key(3), len(captions))
    first = draw(keys, captions, AutoregressiveSampling(guidance_scale=2.0).turned())
    assert first.shape == (len(captions), SIZE)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-5)
    for changes in ({"guidance_scale": 0.0}, {"temperature": 9.0}, {"top_k": 1}, {"top_p": 0.1}):
        other = draw(keys, captions, AutoregressiveSampling(**{"guidance_scale": 2.0, **changes}).turned())
        assert np.abs(other - first).max() > 1e-3, changes
    assert draw._cache_size() == 1
    coldest = AutoregressiveSampling(temperature=0.0, top_similarity=0.1).turned()
    np.testing.assert_array_equal(draw(keys, captions, coldest), draw(keys[::-1], captions, coldest))
    sampling = AutoregressiveSampling(candidates=2).turned()
    batch = draw(keys, captions, sampling)
    np.testing.assert_allclose(draw(keys[1:2], captions[jnp.array([1])], sampling)[0], batch[1], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_similarity": 1.5}, "top_similarity is 1.5; it must be above 0 and at most 1"),
        ({"top_k": 0}, "top_k is 0; it must be 1 or more"),
        ({"candidates": 0}, "candidates is 0; it must be 1 or more and at most 65536"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a finite number"),
        ({"temperature": float("inf")}, "temperature is inf; it must be a finite number"),
    ],
)
def test_refused_settings(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        AutoregressiveSampling(**changes)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (prior(transformer=Transformer(width=16, depth=2, heads=2)), "transformer has to be causal"),
        (prior(components=9), "keeps 9 principal components of embeddings of size 8"),
        (prior(text=OWN), "reads captions in one way"),
        (prior("states"), r"this prior reads CLIP's text states \[b, n, d\], not int32"),
        (prior(context_length=4), "captions of 6 tokens are longer than the context of 4"),
        (prior(text_embedding_size=5), "needs text embeddings of size 5, got 8"),
    ],
)
def test_refused_networks_and_inputs(module, sentence, captions, codes):
    condition = {"text_embedding": captions.embedding, "text": captions.tokens, "text_mask": captions.mask}
    with pytest.raises(InputError, match=sentence):
        jax.eval_shape(lambda: module.init(jax.random.key(0), *codes, **condition))
