"""The tokenizer encodes any text, says what it cuts, and comes back from JSON as it was."""

import copy
import itertools
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from dalle2_jax.data.sources.scene import BACKGROUNDS, COLORS, SHAPES, SIZES
from dalle2_jax.tokenizer import END, PAD, START, Tokenizer

CAPTIONS = [
    f"a {size} {color} {shape} on a {background} background"
    for size, color, shape, background in itertools.product(SIZES, COLORS, SHAPES, BACKGROUNDS)
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 400, 32)


def test_layout(tokenizer):
    tokens, mask = tokenizer.encode(["a small red circle on a gray background", "a cross"])
    assert tokens.dtype == np.int32 and mask.dtype == bool and tokens.shape == mask.shape == (2, 32)
    for row, real in zip(tokens, mask, strict=True):
        length = real.sum()
        assert real.tolist() == [True] * length + [False] * (32 - length)
        assert row[0] == START and row[length - 1] == END and (row[length:] == PAD).all()
        assert (row[1 : length - 1] > END).all()
    assert tokens.max() < tokenizer.vocabulary_size <= 400
    # Every word of the grammar became one token: 8 words and the two ends.
    assert mask.sum(1).tolist() == [10, 4]


TEXTS = [
    "a red circle",
    "größe straße",
    "κόκκινος κύκλος",
    "红色的圆圈",
    "دائرة حمراء",
    "🎉 👩🏽\u200d🚀",
    "<pad> <end> </s>",
    "\x00\x7f",
]


@pytest.mark.parametrize("text", TEXTS)
def test_any_alphabet_comes_back(tokenizer, text):
    wide = Tokenizer(tokenizer.vocabulary, tokenizer.merges, 128)
    tokens, mask = wide.encode([text])
    assert wide.decode(tokens) == [text]
    assert (tokens[mask] == END).sum() == 1


def test_case_and_white_space_do_not_matter(tokenizer):
    one, other = tokenizer.encode(["  A\tRED \n circle ", "a red circle"])[0]
    np.testing.assert_array_equal(one, other)


def test_a_long_prompt_is_cut_aloud(tokenizer):
    short = Tokenizer(tokenizer.vocabulary, tokenizer.merges, 6)
    with pytest.warns(UserWarning, match="longer than 6 tokens; this part is cut: 'on a gray background'$"):
        tokens, mask = short.encode(["a small red circle on a gray background"])
    assert tokens[0, 0] == START and tokens[0, -1] == END and mask.all()
    assert short.decode(tokens) == ["a small red circle"]
    with pytest.raises(ValueError, match="this part is cut: 'on a gray background'$"):
        short.encode(["a small red circle on a gray background"], strict=True)
    with pytest.warns(UserWarning, match="cut: 'zxqvwyk'$"):  # a word cut in its middle is named whole
        short.encode(["a red zxqvwyk"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short.encode(["a small red circle"])


@pytest.mark.parametrize("captions", [[""], ["a circle", " \n\t "]])
def test_an_empty_prompt_is_refused(tokenizer, captions):
    with pytest.raises(ValueError, match="the prompt is empty"):
        tokenizer.encode(captions)


def test_json_round_trip_and_equality(tokenizer):
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again == tokenizer and hash(again) == hash(tokenizer)
    np.testing.assert_array_equal(again.encode(CAPTIONS)[0], tokenizer.encode(CAPTIONS)[0])
    assert Tokenizer(tokenizer.vocabulary, tokenizer.merges, 16) != tokenizer
    assert pickle.loads(pickle.dumps(tokenizer)) == copy.deepcopy(tokenizer) == tokenizer


def test_training_is_deterministic(tokenizer):
    assert Tokenizer.train(CAPTIONS[::-1], 400, 32) == tokenizer
    code = (
        "import json, sys; from dalle2_jax.tokenizer import Tokenizer;"
        "print(Tokenizer.train(json.load(sys.stdin), 400, 32).to_json())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(CAPTIONS),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert Tokenizer.from_json(done.stdout) == tokenizer, done.stderr


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="take 259"):
        Tokenizer.train(CAPTIONS, 258, 32)
    with pytest.raises(ValueError, match="context length of 2"):
        Tokenizer.train(CAPTIONS, 300, 2)
    assert Tokenizer.train(CAPTIONS, 259, 32).vocabulary_size == 259
