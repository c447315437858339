"""Karlo in the layout of diffusers, converted (references/karlo.npz, written by make_karlo.py): each network, and both
pipelines with the noise of every step given."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dalle2_jax import DALLE2
from dalle2_jax.weights.run import write_run
from dalle2_jax.weights.sources import karlo
from tests.parity.closeness import close
from tests.parity.drawn_weights import noise
from tests.parity.karlo_folder import TEXT2IMG, VARIATION, read_reference, write_folder

TIMESTEPS = np.array([0, 37, 999])


@pytest.fixture(scope="module")
def reference():
    return read_reference()


@pytest.fixture(scope="module")
def folders(reference, tmp_path_factory):
    place = tmp_path_factory.mktemp("karlo")
    return {
        "text2img": write_folder(place / "text2img", reference, TEXT2IMG, "UnCLIPPipeline"),
        "variation": write_folder(place / "variation", reference, VARIATION, "UnCLIPImageVariationPipeline"),
    }


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    for name, folder in folders.items():
        write_run(place / name, karlo.conversions(folder), {"licence": "none"}, log=lambda line: None)
    return {name: DALLE2.load(place / name) for name in folders}


def nhwc(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def test_clip(reference, runs):
    clip = runs["variation"].clip
    ids, mask = (reference[f"network/{name}"] for name in ("ids", "mask"))
    embedding, states = clip.module.apply({"params": clip.params}, ids, mask, method="encode_text")
    close(embedding, reference["network/text_embedding"])
    close(np.asarray(states)[mask], reference["network/text_states"][mask])
    pixels = nhwc(noise("input/pixels", (3, 3, 16, 16)))
    # Theirs is given normalised pixels.
    images = 2 * (pixels * np.asarray(clip.module.vision.std) + np.asarray(clip.module.vision.mean)) - 1
    embedding = clip.module.apply({"params": clip.params}, images.astype(np.float32), method="encode_image")
    close(embedding, reference["network/image_embedding"])


@pytest.mark.parametrize("caption", ["padded", "unpadded"])
def test_prior(reference, runs, caption):
    prior = runs["text2img"].prior
    mask = reference["network/mask"] | (caption == "unpadded")
    text = (reference["network/text_embedding"], reference["network/text_states"], mask)
    ours = jax.jit(prior.module.apply)({"params": prior.params}, noise("input/z", (3, 24)), TIMESTEPS, *text)
    close(ours, reference[f"network/prior_{caption}"])


@pytest.mark.parametrize("caption", ["padded", "unpadded"])
def test_decoder(reference, runs, caption):
    decoder = runs["text2img"].decoder
    mask = reference["network/mask"] | (caption == "unpadded")
    x, z = nhwc(noise("input/x", (3, 3, 16, 16))), noise("input/z", (3, 24))
    text = {"text": reference["network/text_states"], "text_mask": mask}
    pooled = {"text_embedding": reference["network/text_embedding"]}
    ours = jax.jit(decoder.module.apply)({"params": decoder.params}, x, TIMESTEPS, z, **text, **pooled)
    close(ours, nhwc(reference[f"network/decoder_{caption}"]))


def test_upsamplers(reference, runs):
    (upsampler,) = runs["text2img"].upsamplers
    y = nhwc(noise("input/y", (3, 6, 32, 32)))
    apply = jax.jit(upsampler.module.apply)
    for place, timestep in enumerate(TIMESTEPS):
        ours = apply({"params": upsampler.params}, y[..., :3], np.full(3, timestep), y[..., 3:])
        name = "super_res_last" if timestep == 0 else "super_res_first"
        close(ours[place], nhwc(reference[f"network/{name}"])[place])


class Tokens:
    """In the tokenizer's place: the captions of make_karlo.py."""

    def __init__(self, reference):
        self.vocabulary = json.loads(str(reference["configs"]))["text_encoder"]["vocab_size"]

    def encode(self, captions, **_):
        rows = [self._row(caption) for caption in captions]
        return np.stack([tokens for tokens, _ in rows]), np.stack([mask for _, mask in rows])

    def empty(self):
        tokens, mask = self._row("")
        return tokens[None], mask[None]

    def _row(self, caption):
        length, row = min(len(caption) + 2, 9), np.zeros(9, np.int32)
        words = np.random.RandomState(len(caption)).randint(1, self.vocabulary - 2, length - 2)
        row[:length] = [self.vocabulary - 2, *words, self.vocabulary - 1]
        return row, np.arange(9) < length


def drawn(model, given_noise, captions, embeddings=None):
    """The image of every stage, one stage after the other; floats in [0, 1]."""
    keys = jax.random.split(jax.random.key(0), len(captions) if captions else len(embeddings))
    if embeddings is None:
        given_noise("prior", 5)
        embeddings = model.sample_prior(keys, captions, steps="5")
    given_noise("decoder", 5)
    small = model.decode(keys, embeddings, captions, steps="5")
    given_noise("super_res", 3)
    return np.asarray(model.upsample(keys, small, steps="3")) * 0.5 + 0.5


def test_text_to_image(reference, runs, given_noise):
    model = dataclasses.replace(runs["text2img"], tokenizer=Tokens(reference))
    images = drawn(model, given_noise, ["abc", "abcdef"])
    assert images.shape == reference["pipeline/text2img"].shape == (2, 32, 32, 3)
    print(np.abs(images - reference["pipeline/text2img"]).max() * 255, reference["pipeline/text2img"].std())
    assert np.abs(images - reference["pipeline/text2img"]).max() <= 1 / 255


def test_image_variation(reference, runs, given_noise):
    model = dataclasses.replace(runs["variation"], tokenizer=Tokens(reference))
    from dalle2_jax.images.resize import clip_pixels

    embedding = model.encode_image(clip_pixels(reference["pipeline/source"], 16)[None])
    images = drawn(model, given_noise, None, embedding)
    print(np.abs(images - reference["pipeline/variation"]).max() * 255, reference["pipeline/variation"].std())
    assert np.abs(images - reference["pipeline/variation"]).max() <= 1 / 255
