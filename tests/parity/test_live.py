"""What the peers' own code made a moment ago (make_live.py); run by `make parity`."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from dalle2_jax import DALLE2
from dalle2_jax.cli import main
from dalle2_jax.tokenizer import ClipTokenizer, GlideTokenizer
from tests.parity.drawn_weights import noise

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def live():
    if "PARITY_REFERENCES" not in os.environ:
        pytest.skip("run by make parity")
    return Path(os.environ["PARITY_REFERENCES"])


@pytest.fixture(scope="module")
def tokens(live):
    with np.load(live / "tokens.npz") as file:
        return dict(file)


def compare(tokenizer: ClipTokenizer, strings: list[str], theirs: np.ndarray, mask: np.ndarray | None) -> None:
    empty = 0
    for number, string in enumerate(strings):
        try:
            ours, our_mask = tokenizer.encode([string], warn=False)
        except ValueError:  # nothing is left of it: as a prompt it is refused
            ours, our_mask = tokenizer.empty()
            empty += 1
        np.testing.assert_array_equal(ours[0], theirs[number], err_msg=repr(string))
        if mask is not None:
            np.testing.assert_array_equal(our_mask[0], mask[number], err_msg=repr(string))
    print(f"{len(strings)} strings have the same tokens; nothing is left of {empty} of them")
    assert empty < 0.01 * len(strings)


def test_open_clip_tokens(live, tokens):
    packed = ClipTokenizer.read(live / "bpe_simple_vocab_16e6.txt.gz")
    assert packed == ClipTokenizer.read(live / "vocabulary")
    compare(packed, json.loads(str(tokens["strings"])), tokens["open_clip"], None)


def test_transformers_tokens(live, tokens):
    tokenizer = dataclasses.replace(ClipTokenizer.read(live / "vocabulary"), padding=49_407, cleaning="nfc")
    compare(tokenizer, json.loads(str(tokens["strings"])), tokens["transformers"], tokens["transformers_mask"])


def test_glide_tokens(live):
    if not (live / "glide_tokens.npz").is_file():
        pytest.skip("no checkout of glide-text2im was given (make parity CHECKOUTS=DIR)")
    tokenizer = GlideTokenizer.read(live / "glide_vocabulary")
    with np.load(live / "glide_tokens.npz") as file:
        strings, theirs, mask = json.loads(str(file["strings"])), file["tokens"], file["mask"]
    for number, string in enumerate(strings):
        if string.strip():
            ours, our_mask = tokenizer.encode([string], warn=False)
            np.testing.assert_array_equal(ours[0], theirs[number], err_msg=repr(string))
            np.testing.assert_array_equal(our_mask[0], mask[number], err_msg=repr(string))
    print(f"{len(strings)} strings have the same tokens")


@pytest.mark.parametrize("pipeline", ["karlo", "variation"])
def test_what_save_pretrained_wrote(live, tmp_path, pipeline):
    """As it is; its networks are those of karlo.npz."""
    assert main(["convert", "karlo", str(live / pipeline), str(tmp_path / "run")]) == 0
    model = DALLE2.load(tmp_path / "run")
    assert model.tokenizer.padding == 0 and model.tokenizer.context_length == 9
    assert (model.prior is None) == (pipeline == "variation")
    assert np.asarray(model.encode_text(["a b"]).embedding).shape == (1, 24)
    with np.load(live / "karlo.npz") as file:
        ids, mask, theirs = (file[f"network/{name}"] for name in ("ids", "mask", "text_embedding"))
    params = {"params": model.clip.params}
    ours, _ = model.clip.module.apply(params, ids, mask, method="encode_text")
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * np.abs(theirs).max()
    if pipeline == "variation":
        pixels = noise("input/pixels", (3, 3, 16, 16)).transpose(0, 2, 3, 1)
        shown = 2 * (pixels * np.asarray(model.clip.module.vision.std) + np.asarray(model.clip.module.vision.mean)) - 1
        ours = model.clip.module.apply(params, shown.astype(np.float32), method="encode_image")
        with np.load(live / "karlo.npz") as file:
            theirs = file["network/image_embedding"]
        assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * np.abs(theirs).max()
