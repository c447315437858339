"""Toy translations against Python's own, and what is held out by counting."""

import collections
import functools
import itertools

import jax
import numpy as np
import pytest

from dalle2_jax.checkpoint.rebuild import rebuild, to_json
from dalle2_jax.errors import InputError
from dalle2_jax.lineage.encoder_decoder import END, PAD, START
from dalle2_jax.lineage.sequence_tasks import FIRST, SequenceTask, is_held_out, make_sequences, translate

PYTHON = {"reverse": lambda symbols: symbols[::-1], "sort": sorted, "copy": list}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def made(key, task, count, held_out=False):
    return make_sequences(key, task, count, held_out)


def symbols_of(tokens) -> list[int]:
    """What stands before END, and only padding behind it."""
    tokens = np.asarray(tokens).tolist()
    end = tokens.index(END)
    assert set(tokens[end + 1 :]) <= {PAD} and all(FIRST <= token for token in tokens[:end])
    return [token - FIRST for token in tokens[:end]]


@pytest.mark.parametrize(("name", "shortest"), [("reverse", None), ("reverse", 1), ("sort", 1), ("copy", 1)])
def test_targets_are_what_python_makes_of_the_sources(name, shortest):
    task = SequenceTask(name, symbols=7, length=5, shortest=shortest)
    source, target = map(np.asarray, made(jax.random.key(0), task, 200))
    assert source.shape == (200, 6) and target.shape == (200, 7) and source.dtype == target.dtype == np.int32
    assert (target[:, 0] == START).all() and task.vocabulary_size == 10
    found = [(symbols_of(a), symbols_of(b)) for a, b in zip(source, target[:, 1:], strict=True)]
    assert all(PYTHON[name](one) == other for one, other in found)
    lengths, symbols = ({len(one) for one, _ in found}, {symbol for one, _ in found for symbol in one})
    assert lengths == ({5} if shortest is None else {1, 2, 3, 4, 5}) and symbols == set(range(7))


def test_held_out_are_others_and_both_are_all():
    """Of three symbols, all 9 + 27 sequences of two and three: each is of one kind, and as frequent as the others."""
    task = SequenceTask("sort", symbols=3, length=3, shortest=2)
    counts = {}
    for held_out in (False, True):
        source, target = map(np.asarray, made(jax.random.key(held_out), task, 6000, held_out))
        counts[held_out] = collections.Counter(tuple(symbols_of(tokens)) for tokens in source)
        assert (is_held_out(task, source) == held_out).all() and (is_held_out(task, target) == held_out).all()
    everything = {symbols for n in (2, 3) for symbols in itertools.product(range(3), repeat=n)}
    assert set(counts[True]) | set(counts[False]) == everything and not set(counts[True]) & set(counts[False])
    assert len(counts[True]) == len(everything) / 3
    for held_out, kinds in ((True, (3, 9)), (False, (6, 18))):
        for length, kind in zip((2, 3), kinds, strict=True):
            seen = [count for symbols, count in counts[held_out].items() if len(symbols) == length]
            np.testing.assert_allclose(seen, 3000 / kind, atol=5 * (3000 / kind) ** 0.5)


def test_a_key_is_a_sequence():
    task, keys = SequenceTask(length=6, shortest=2), jax.random.split(jax.random.key(5), 8)
    together, some = made(keys, task, 8), made(keys[2:4], task, 2)
    jax.tree.map(lambda many, few: np.testing.assert_array_equal(many[2:4], few), together, some)
    jax.tree.map(np.testing.assert_array_equal, made(jax.random.key(5), task, 8), together)
    assert (made(jax.random.key(6), task, 8).source != together.source).any()
    assert rebuild(to_json(task)) == task


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SequenceTask("sorted"), "there is no sequence task 'sorted'; the nearest is 'sort'"),
        (lambda: translate("revers", np.zeros((1, 2), int), np.ones(1, int)), "the nearest is 'reverse'"),
        (lambda: SequenceTask(symbols=1), "a sequence task has 1 symbols; it must be 2 or more"),
        (lambda: SequenceTask(length=0), "a sequence task's length is 0; it must be 1 or more"),
        (lambda: SequenceTask(length=4, shortest=5), "shortest sequence has 5 symbols; it must be 1 to length=4"),
        (lambda: make_sequences(jax.random.split(jax.random.key(0)), SequenceTask(), 3), "2 keys were given for 3"),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")
