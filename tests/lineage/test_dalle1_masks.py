"""DALL-E 1's attention masks: by brute force from the paper's words, and against ru-dalle's."""

import jax
import numpy as np
import pytest

from dalle2_jax.errors import InputError
from dalle2_jax.lineage.dalle1_masks import KINDS, attention_mask, layer_kinds, layer_masks
from tests.parity.reference import reference_path


def seen_by(kind: str, query: int, width: int, window: int) -> set[int]:
    """The codes that a code sees, one by one, from Fig. 11 and its caption: rows go on where the row before ends."""
    walk = range(query, -1, -1)  # back through the image
    if kind == "row":
        return set(list(walk)[: width + 1])
    if kind == "column":
        return {key for key in walk if key % width == query % width}
    half = window // 2
    around = {query - above * width - beside for above in range(half + 1) for beside in range(-half, half + 1)}
    return {key for key in around if 0 <= key <= query}


@pytest.mark.parametrize(("text", "width", "window"), [(3, 4, 3), (0, 5, 11), (2, 12, 11), (1, 1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_by_brute_force(kind, text, width, window):
    expected = np.zeros((text + width**2, text + width**2), bool)
    for query in range(len(expected)):
        expected[query, : min(query + 1, text)] = True
        if query >= text:
            expected[query, [text + key for key in seen_by(kind, query - text, width, window)]] = True
    found = attention_mask(kind, text, width, window)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, expected)


def test_in_the_papers_size():
    """32 codes wide, 256 text tokens and a start token: how many codes the last sees, and windows in the plane."""
    counts, window = {}, None
    for kind in KINDS:
        mask = np.asarray(attention_mask(kind, 257, 32))
        assert mask.shape == (1281, 1281) and mask[257:, :257].all() and not mask[:257, 257:].any()
        np.testing.assert_array_equal(mask[:257, :257], np.tril(np.ones((257, 257), bool)))
        counts[kind] = int(mask[-1, 257:].sum())
        window = mask[257:, 257:]
    assert counts == {"row": 33, "column": 32, "convolution": 61}
    rows, columns = np.divmod(np.arange(1024), 32)
    for row, column in ((5, 5), (20, 16), (31, 26)):  # far enough from the borders for nothing to go around
        plane = (np.abs(rows - row) <= 5) & (np.abs(columns - column) <= 5)
        np.testing.assert_array_equal(window[32 * row + column], plane & (np.arange(1024) <= 32 * row + column))


@pytest.mark.parametrize("width", [4, 16])
def test_against_ru_dalle(width):
    """references/dalle1.npz, written by make_dalle1.py with ru-dalle's own functions, after 3 text tokens."""
    tokens = 3 + width**2
    with np.load(reference_path("dalle1")) as file:
        for kind in ("row", "column"):
            expected = np.unpackbits(file[f"masks/{kind}/{width}"], count=tokens**2).reshape(tokens, tokens)
            np.testing.assert_array_equal(attention_mask(kind, 3, width), expected.astype(bool))


def test_which_layer_has_which():
    """As App. B.1 says it of 64 layers; the last is the convolution's in any stack."""
    kinds = layer_kinds(64)
    assert [layer for layer, kind in enumerate(kinds, 1) if kind == "column"] == list(range(2, 63, 4))
    assert kinds[63] == "convolution" and set(kinds[2:5]) == {"row"} and kinds.count("row") == 47
    assert layer_kinds(1) == ("convolution",) and layer_kinds(3) == ("row", "column", "convolution")
    masks = jax.jit(lambda: layer_masks(6, 2, 3, 3))()
    for layer, kind in enumerate(layer_kinds(6)):
        np.testing.assert_array_equal(masks.masks[masks.kinds[layer]], attention_mask(kind, 2, 3, 3))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("axial", 2, 4), "there is no attention 'axial'; choose one of row, column, convolution"),
        (("row", 2, 0), "a grid has 1x1 or more"),
        (("convolution", 2, 4, 4), "the convolution's window is 4; it must be odd"),
    ],
)
def test_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        attention_mask(*arguments)
    assert not str(error.value).endswith(".")
