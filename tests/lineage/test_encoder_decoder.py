"""The Transformer of 2017: PyTorch's at the same weights, what sees what, its loss, decoding from a cache."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from jax.sharding import PartitionSpec

from dalle2_jax.checkpoint.rebuild import rebuild, to_json
from dalle2_jax.errors import InputError
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.lineage.encoder_decoder import (
    END,
    PAD,
    START,
    EncoderDecoder,
    attention_maps,
    sequence_loss,
    token_accuracy,
)
from dalle2_jax.lineage.encoder_decoder_sampling import greedy_decode, sample_decode
from dalle2_jax.sharding import make_mesh, partition
from tests.parity.reference import reference_path

BATCH, LENGTH = 3, 7

forward = jax.jit(lambda module, params, *tokens: module.apply({"params": params}, *tokens), static_argnums=0)
greedy = jax.jit(greedy_decode, static_argnums=(0, 3))
sample = jax.jit(sample_decode, static_argnums=(1, 4))


def network(**changes) -> EncoderDecoder:
    sizes = {"vocabulary_size": 6, "width": 8, "depth": 2, "heads": 2, "hidden": 12, "dropout": 0.0, "max_length": 9}
    return EncoderDecoder(**{**sizes, **changes})


@functools.cache
def made(**changes):
    """A network, random parameters of which none is 0 or 1, and sources and targets, of which the first is padded."""
    module, rng = network(**changes), np.random.default_rng(0)
    source, target = (rng.integers(3, module.vocabulary_size, (BATCH, LENGTH)).astype(np.int32) for _ in range(2))
    source[0, 4:], source[:, 0], target[:, 0] = PAD, END, START
    shapes = jax.eval_shape(module.init, jax.random.key(1), source, target)["params"]

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + 0.4 * rng.normal(size=leaf.shape), jnp.float32)

    return module, jax.tree_util.tree_map_with_path(draw, shapes), jnp.asarray(source), jnp.asarray(target)


# Against others


@pytest.mark.parametrize("norm_first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pytorchs_transformer(norm_first):
    """references/encoder_decoder.npz, written by make_encoder_decoder.py: logits, loss, gradients, attention maps."""
    with np.load(reference_path("encoder_decoder")) as file:
        reference = dict(file)

    def part(kind):
        return {name.removeprefix(kind): value for name, value in reference.items() if name.startswith(kind)}

    sizes = {"vocabulary_size": 9, "hidden": 10, "norm_first": norm_first, "final_norm": True}
    module, expected = network(**sizes), part("norm_first/" if norm_first else "norm_last/")
    params = unflatten_dict(part("weights/"), sep="/")
    source, target = (reference[f"input/{name}"].astype(np.int32) for name in ("source", "target"))
    shapes = jax.eval_shape(module.init, jax.random.key(0), source, target)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)

    @jax.jit
    def run(params):
        def loss(params):
            logits = module.apply({"params": params}, source, target[:, :-1])
            return sequence_loss(logits, target[:, 1:], 0.1), logits

        return jax.value_and_grad(loss, has_aux=True)(params), attention_maps(module, params, source, target[:, :-1])

    ((loss, logits), gradients), maps = run(params)
    np.testing.assert_allclose(logits, expected["output/logits"], atol=2e-5)
    assert loss == pytest.approx(float(expected["output/loss"]), rel=1e-5)
    found = {
        f"gradients/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
    }
    assert set(found) == {name for name in expected if name.startswith("gradients/")}
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[name], atol=1e-5, err_msg=name)
    assert set(maps) == {"encoder", "decoder", "cross"}
    for name, weights in maps.items():
        np.testing.assert_allclose(weights, expected[f"maps/{name}"], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "count"),
    [({}, 44_138_496), ({"final_norm": True}, 44_140_544), ({"positions": "learned"}, 44_138_496 + 2 * 512 * 512)],
)
def test_the_base_model_has_its_size(changes, count):
    """6 layers each; beside them the table of 37,000 tokens."""
    tokens = jnp.zeros((1, 3), jnp.int32)
    shapes = jax.eval_shape(EncoderDecoder(**changes).init, jax.random.key(0), tokens, tokens)["params"]
    assert count_parameters(shapes.pop("token_embedding")) == 37_000 * 512
    assert count_parameters(shapes) == count


# What sees what


def test_causality_by_gradient():
    """By the learned positions of target and source, of which each token has its own."""
    module, params, source, target = made(positions="learned")
    weights = jax.random.normal(jax.random.key(3), (BATCH, LENGTH, 6))

    def seen(row):
        def outputs(source_table, target_table):
            tables = {"source_positions": {"table": source_table}, "target_positions": {"table": target_table}}
            variables = {"params": {**params, **tables}}
            memory = module.apply(variables, source, method="encode")
            logits = module.apply(variables, target, memory, source != PAD, method="decode")
            return (logits * weights)[row].sum(-1), memory[row, :, 0]

        given = [params[f"{name}_positions"]["table"] for name in ("source", "target")]
        slopes = jax.jit(jax.jacrev(outputs, (0, 1)))(*given)
        return jax.tree.map(lambda slope: np.abs(slope).max(-1)[:, :LENGTH], slopes)

    real = np.asarray(source[0] != PAD)
    ((by_source, by_target), (memory_by_source, memory_by_target)) = seen(0)
    past = np.tri(LENGTH, dtype=bool)
    assert (by_target[~past] == 0).all() and (by_target[past] > 1e-6).all()
    assert (by_source[:, ~real] == 0).all() and (by_source[:, real] > 1e-6).all()
    assert (memory_by_source[:, real][real] > 1e-6).all() and (memory_by_source[real][:, ~real] == 0).all()
    assert (memory_by_target == 0).all()


def test_without_positions_a_source_is_a_set():
    module, params, source, target = made(positions=None)
    order = np.random.default_rng(1).permutation(LENGTH)

    @jax.jit
    def run(source):
        memory = module.apply({"params": params}, source, method="encode")
        return memory, module.apply({"params": params}, target, memory, source != PAD, method="decode")

    (memory, logits), (mixed, of_mixed) = run(source), run(source[:, order])
    np.testing.assert_allclose(mixed, memory[:, order], atol=1e-5)
    np.testing.assert_allclose(of_mixed, logits, atol=1e-5)
    assert np.abs(memory[:, 1] - memory[:, 0]).max() > 0.1
    # With sinusoids, which have no parameters, it is a sequence.
    straight, of_mixed = (forward(network(), params, tokens, target) for tokens in (source, source[:, order]))
    assert np.abs(of_mixed - straight).max() > 0.01


def test_masks_given_are_those_of_padding():
    """And what stands in hidden places is nothing."""
    module, params, source, target = made()
    shown, expected = source != PAD, forward(module, params, source, target)
    filled = jnp.where(shown, source, 5)
    found = forward(module, params, filled, target, shown, target != PAD)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(forward(module, params, filled, target) - expected)[0].max() > 1e-3


def test_bfloat16_is_near_and_its_logits_are_float32():
    module, params, source, target = made()
    half = forward(network(dtype="bfloat16"), params, source, target)
    expected = forward(module, params, source, target)
    assert half.dtype == jnp.float32 and 0 < np.abs(half - expected).max() < 0.1 * np.abs(expected).max()


def test_dropout_is_in_training_alone():
    module, params, source, target = made()
    dropping = network(dropout=0.4)

    @jax.jit
    def train(key):
        return dropping.apply({"params": params}, source, target, deterministic=False, rngs={"dropout": key})

    evaluated = forward(dropping, params, source, target)
    np.testing.assert_allclose(evaluated, forward(module, params, source, target), atol=1e-6)
    one, same, other = map(train, map(jax.random.key, (0, 0, 1)))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01 and np.abs(one - evaluated).max() > 0.01


# The loss


def test_label_smoothing_by_hand():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5))
    labels = np.array([[3, 4, END], [2, PAD, PAD]])
    expected = []
    for row, place in np.argwhere(labels != PAD):
        log_p = logits[row, place] - np.log(np.exp(logits[row, place]).sum())
        wanted = np.full(5, 0.3 / 5)
        wanted[labels[row, place]] += 0.7
        expected.append(-(wanted * log_p).sum())
    loss = jax.jit(jax.value_and_grad(sequence_loss))
    found, _ = loss(jnp.float32(logits), labels, 0.3)
    assert found == pytest.approx(np.mean(expected), rel=1e-5)
    assert loss(jnp.zeros((2, 3, 5)), labels, 0.3)[0] == pytest.approx(math.log(5), rel=1e-6)
    # The best there is has the entropy of what is wanted, and its gradient is 0.
    best = jnp.log(jnp.where(jax.nn.one_hot(labels, 5) > 0, 0.7 + 0.06, 0.06))
    value, gradient = loss(best, labels, 0.3)
    assert value == pytest.approx(-(0.76 * math.log(0.76) + 4 * 0.06 * math.log(0.06)), rel=1e-5)
    np.testing.assert_allclose(gradient, np.zeros((2, 3, 5)), atol=1e-6)
    assert loss(best, np.full((2, 3), PAD), 0.3)[0] == 0
    assert jax.jit(token_accuracy)(best.at[0, 0].set(0.0), labels) == 0.75


# Decoding


def by_hand(module, params, source, choose):
    """The whole target again for every token, on the host."""
    target = np.full((BATCH, LENGTH + 1), PAD, np.int32)
    target[:, 0], ended = START, np.zeros(BATCH, bool)
    for number in range(LENGTH):
        logits = np.array(forward(module, params, source, target[:, :-1]))[:, number]
        logits[:, [PAD, START]] = -np.inf
        target[:, number + 1] = np.where(ended, PAD, choose(logits, number))
        ended |= target[:, number + 1] == END
    return target[:, 1:]


@pytest.mark.parametrize("changes", [{}, {"norm_first": True, "final_norm": True, "positions": "learned"}])
def test_the_cache_is_the_plain_decoder_token_by_token(changes):
    module, params, source, target = made(**changes)
    apply = functools.partial(module.apply, {"params": params})
    advance = jax.jit(functools.partial(apply, method="advance"))
    expected = forward(module, params, source, target)
    progress = jax.jit(lambda: apply(source, LENGTH, method="start"))()
    for place in range(LENGTH):
        logits, progress = advance(target[:, place], progress)
        np.testing.assert_allclose(logits, expected[:, place], atol=2e-5)
    assert advance._cache_size() == 1 and int(progress.cache.length) == LENGTH


def test_greedy_is_the_plain_decoder_again_and_again():
    module, params, source, _ = made()
    found = np.asarray(greedy(module, params, source, LENGTH))
    expected = by_hand(module, params, source, lambda logits, _: logits.argmax(-1))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int32 and found.shape == (BATCH, LENGTH)


def test_sampling_is_the_plain_decoder_again_and_again():
    """With a key a row; each row is the same alone; and other temperatures compile nothing."""
    module, params, source, _ = made()
    keys = jax.random.split(jax.random.key(4), BATCH)

    def choose(temperature):
        def chosen(logits, number):
            each = [jax.random.fold_in(key, number) for key in keys]
            return [jax.random.categorical(key, row / temperature) for key, row in zip(each, logits, strict=True)]

        return chosen

    before = sample._cache_size()
    found = {t: np.asarray(sample(keys, module, params, source, LENGTH, t)) for t in (0.5, 3.0, 1e-4)}
    assert sample._cache_size() == before + 1
    for temperature in (0.5, 3.0):
        expected = by_hand(module, params, source, choose(np.float32(temperature)))
        np.testing.assert_array_equal(found[temperature], expected)
    np.testing.assert_array_equal(found[1e-4], greedy(module, params, source, LENGTH))
    alone = sample(keys[1:2], module, params, source[1:2], LENGTH, 3.0)
    np.testing.assert_array_equal(alone, found[3.0][1:2])


def test_what_is_written_ends():
    """Many samples of a flat distribution: padding behind the first END alone, and no second START."""
    module, params, source, _ = made()
    many = jnp.repeat(source[:1], 400, axis=0)
    found = np.asarray(sample(jax.random.key(0), module, params, many, 5, 1e4))
    ends = np.where((found == END).any(1), (found == END).argmax(1), 5)
    assert ((found == PAD) == (np.arange(5)[None] > ends[:, None])).all() and (found != START).all()
    # END, 3, 4 and 5 are equally probable.
    for number in range(5):
        assert (ends >= number).mean() == pytest.approx(0.75**number, abs=0.1)
    assert np.bincount(found[found > END], minlength=6)[3:].std() < 0.1 * (found > END).sum()


# As the rest of the library has it


def test_it_is_recorded_and_its_heads_are_split():
    module, params, *_ = made()
    assert rebuild(to_json(module)) == module
    specs = jax.tree.map(lambda s: s.spec, partition(params, make_mesh(tensor=2), smallest=1))
    block, cross = specs["decoder_blocks"], specs["decoder_blocks"]["cross_attention"]
    assert cross["query"]["kernel"] == PartitionSpec(None, None, "tensor")
    assert cross["key_value"]["kernel"] == PartitionSpec(None, None, "tensor")
    assert cross["out"]["kernel"] == block["attention"]["out"]["kernel"] == PartitionSpec(None, "tensor")
    assert block["attention"]["qkv"]["kernel"] == PartitionSpec(None, None, "tensor")
    assert block["mlp_in"]["kernel"] == PartitionSpec(None, None, "tensor")
    assert specs["encoder_blocks"]["attention"]["qkv"]["bias"] == PartitionSpec(None, "tensor")


TOKENS = np.full((1, 3), 4, np.int32)


def run(source, target, **changes):
    """Traced alone; the tokens' values are known all the same."""
    jax.eval_shape(lambda: network(**changes).init(jax.random.key(0), source, target))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: network(width=9, heads=3), "width is 9, and sinusoidal positions need an even one; set one, or"),
        (lambda: network(heads=3), "width 8 does not divide into 3 heads"),
        (lambda: network(positions="rotary"), "positions is 'rotary'; it must be sinusoidal, learned or None"),
        (lambda: network(vocabulary_size=3), "vocabulary_size is 3; padding, start and end alone take 3"),
        (lambda: network(dropout=1.0), "dropout is 1.0; it must be 0 or more and below 1"),
        (lambda: network(depth=0), "depth is 0; it must be 1 or more"),
        (lambda: run(TOKENS + 2, TOKENS), "source's tokens go from 6 to 6; they must"),
        (lambda: run(TOKENS, TOKENS - 5), "target's tokens go from -1 to -1"),
        (lambda: run(np.zeros((1, 10), int), TOKENS), "source has 10 tokens; the most"),
        (lambda: run(TOKENS, TOKENS / 2), r"target must be integers \[b, n\], not"),
        (
            lambda: greedy_decode(network(), made()[1], TOKENS, 10),
            "10 tokens are to be decoded; it must be 1 to max_le",
        ),
        (lambda: greedy_decode(network(), made()[1], TOKENS, 0), "0 tokens are to be decoded"),
        (lambda: sample_decode(jax.random.key(0), network(), {}, TOKENS, 3, 0.0), "temperature is 0.0; it must be"),
        (lambda: sample_decode(jax.random.key(0), network(), {}, TOKENS, 3, -1.0), "temperature is -1.0"),
        (lambda: sample_decode(jax.random.split(jax.random.key(0)), network(), {}, TOKENS, 3), "2 keys were given"),
        (lambda: sequence_loss(jnp.zeros((1, 3, 6)), TOKENS, 1.0), "label smoothing is 1.0; it must be 0 or more and"),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")
