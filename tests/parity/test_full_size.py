"""Networks of the published sizes (references/full.npz, by make_full.py), and one image of the whole of Karlo.

Weights are drawn tensor by tensor as the converter asks for them, so nothing of their size is on the disk.
"""

import gc
import json

import jax
import numpy as np
import pytest

from dalle2_jax.checkpoint import LoadedStage, StageRecord
from dalle2_jax.clip import CLIP
from dalle2_jax.layers.unet import UNet
from dalle2_jax.tokenizer import ClipTokenizer
from dalle2_jax.unclip import DALLE2
from dalle2_jax.weights.conversion import Conversion
from dalle2_jax.weights.sources import clip, glide, karlo, pipeline
from dalle2_jax.weights.sources.prior import STATISTICS, prior_module, prior_table
from dalle2_jax.weights.sources.unet import Diffusers, unet_entries
from dalle2_jax.weights.table import Table
from dalle2_jax.weights.tensors import Tensors, joined
from tests.parity.closeness import close
from tests.parity.drawn_weights import draw
from tests.parity.karlo_full import (
    CONTEXT,
    DECODER,
    EMBEDDING,
    LENGTHS,
    STRIDE,
    SUPER_RES,
    TEXT,
    TEXT_PROJECTION,
    TIMESTEPS,
    VISION,
    WEAK,
    WEAKENED,
    caption_ids,
    given,
)
from tests.parity.reference import reference_path

pytestmark = pytest.mark.slow
TOKENS = np.stack([caption_ids(length) for length in LENGTHS]).astype(np.int32)
MASK = np.arange(CONTEXT)[None] < np.asarray(LENGTHS)[:, None]
TOKENIZER = ClipTokenizer(("a", "b"), (), CONTEXT)


@pytest.fixture(scope="module")
def reference():
    with np.load(reference_path("full")) as file:
        return dict(file)


@pytest.fixture(autouse=True)
def memory_given_back():
    yield
    jax.clear_caches()
    gc.collect()


def tensors(reference: dict, name: str, weakened: bool = False) -> Tensors:
    """A network's weights, each drawn when it is read; weakened: with a weak last layer (karlo_full.py)."""
    shapes = {key: tuple(shape) for key, shape in json.loads(str(reference["shapes"]))[name].items()}

    def read(key: str) -> np.ndarray:
        drawn = draw({f"{name}/{key}": shapes[key]})[f"{name}/{key}"]
        return drawn * np.float32(WEAKENED) if weakened and key in WEAK else drawn

    return Tensors(name, shapes, dict.fromkeys(shapes, "float32"), read)


def nhwc(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 2, 3, 1)


def thin(images: np.ndarray) -> np.ndarray:
    """What the reference has of a large output."""
    return np.asarray(images)[:, ::STRIDE, ::STRIDE]


def caption(reference: dict, kind: str) -> dict[str, np.ndarray]:
    text = {"text_embedding": reference["text_embedding"], "text": reference["text_states"]}
    return {**text, "text_mask": MASK | (kind == "unpadded")}


def shapes_of(module, *inputs, **named):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **named))["params"]


def test_clip(reference):
    module = CLIP(vision=clip.vision_module(VISION), text=clip.text_module(TEXT), embedding_size=EMBEDDING)
    conversion = clip.conversion(module, tensors(reference, "clip"), _whole_vocabulary())
    shapes = conversion.shapes
    assert conversion.parameter_counts() == ["CLIP: 427,616,513 parameters (published: 427,616,513)"]
    params = {"params": conversion.table.convert(conversion.tensors, shapes)}
    pixels = nhwc(given("pixels", 2, 3, 224, 224))
    shown = 2 * (pixels * np.asarray(module.vision.std) + np.asarray(module.vision.mean)) - 1
    image, text, _ = jax.jit(module.apply)(params, shown.astype(np.float32), TOKENS, MASK)
    for name, ours in (("clip_image", image), ("clip_text", text)):
        theirs = reference[name]
        close(ours, theirs / np.linalg.norm(theirs, axis=-1, keepdims=True), name)


def _whole_vocabulary() -> ClipTokenizer:
    return ClipTokenizer(tuple(map(str, range(49_408))), (), CONTEXT)


def test_glide(reference):
    module = glide.decoder_module()
    inputs = {"x_t": nhwc(given("x", 2, 3, 64, 64)), "timesteps": np.asarray(TIMESTEPS)}
    inputs["text"] = np.random.RandomState(0).randint(0, 50_257, (2, 128))
    inputs["text_mask"] = np.arange(128)[None] < np.array([[128], [9]])
    params = glide.glide_table(module).convert(tensors(reference, "glide"), shapes_of(module, **inputs))
    close(thin(jax.jit(module.apply)({"params": params}, **inputs)), reference["glide"])


def prior_stage(reference: dict, clip_module: CLIP) -> Conversion:
    weights = tensors(reference, "prior")
    module = prior_module({}, weights)
    weights = weights.renamed(lambda name: None if name in STATISTICS else name)
    return pipeline.prior(module, prior_table(module), weights, clip_module, TOKENIZER, 5.0, karlo.PRIOR_PARAMETERS)


def decoder_stage(reference: dict, clip_module: CLIP, weakened: bool = False) -> Conversion:
    module = karlo.decoder_module(karlo.unet_module(DECODER, "the test"), TEXT_PROJECTION)
    weights = joined(
        [(karlo.TEXT, tensors(reference, "text_proj")), (karlo.UNET, tensors(reference, "decoder", weakened))]
    )
    return karlo.decoder(module, karlo.decoder_table(module), weights, clip_module, TOKENIZER)


def upsampler_stage(reference: dict, weakened: bool = False) -> Conversion:
    module = karlo.upsampler_module(*(karlo.unet_module(SUPER_RES, "the test") for _ in range(2)))
    names = (("first.", "super_res_first"), ("last.", "super_res_last"))
    weights = joined([(prefix, tensors(reference, name, weakened)) for prefix, name in names])
    return karlo.upsampler(module, karlo.upsampler_table(module), weights, 64)


def text_stage(reference: dict) -> Conversion:
    module = CLIP(vision=None, text=clip.text_module(TEXT), embedding_size=EMBEDDING, unit_norm=False)
    return clip.conversion(module, tensors(reference, "text_encoder"), _whole_vocabulary(), logit_scale=False)


def loaded(conversion: Conversion) -> LoadedStage:
    """As from a run, but without the disk."""
    params = jax.device_put(conversion.table.convert(conversion.tensors, conversion.shapes))
    module, names = conversion.module, {"stage": conversion.name, "kind": conversion.kind}
    return LoadedStage(module, params, StageRecord(**names, module=module, **conversion.record))


def published(conversion: Conversion) -> None:
    """Every part has as many parameters as the published one."""
    for line in conversion.parameter_counts():
        count, _, whole = line.partition(" parameters (published: ")
        assert count.split(": ")[1] == whole.rstrip(")")


def test_karlo_text_encoder(reference):
    stage = loaded(text_stage(reference))
    embedding, states = jax.jit(lambda params: stage.module.apply(params, TOKENS, MASK, method="encode_text"))(
        {"params": stage.params}
    )
    close(embedding, reference["text_embedding"], "embedding")
    close(np.asarray(states)[MASK], reference["text_states"][MASK], "states")


def test_karlo_prior(reference):
    conversion = prior_stage(reference, text_stage(reference).module)
    published(conversion)
    stage = loaded(conversion)
    inputs = given("z", 2, EMBEDDING), np.asarray(TIMESTEPS)
    apply = jax.jit(stage.module.apply)
    for kind in ("padded", "unpadded"):
        ours = apply({"params": stage.params}, *inputs, **caption(reference, kind))
        close(ours, reference[f"prior_{kind}"], kind)


def test_karlo_decoder(reference):
    conversion = decoder_stage(reference, text_stage(reference).module)
    published(conversion)
    stage = loaded(conversion)
    inputs = nhwc(given("x", 2, 3, 64, 64)), np.asarray(TIMESTEPS), given("z", 2, EMBEDDING)
    apply = jax.jit(stage.module.apply)
    for kind in ("padded", "unpadded"):
        ours = apply({"params": stage.params}, *inputs, **caption(reference, kind))
        close(thin(ours), reference[f"decoder_{kind}"], kind)


@pytest.mark.parametrize("name", ["super_res_first", "super_res_last"])
def test_karlo_super_resolution(reference, name):
    published(upsampler_stage(reference))
    module: UNet = karlo.unet_module(SUPER_RES, "the test")
    table = Table()
    unet_entries(table, Diffusers(module), "")
    inputs = nhwc(given("y", 2, 6, 256, 256)), np.asarray(TIMESTEPS)
    params = jax.device_put(table.convert(tensors(reference, name), shapes_of(module, *inputs)))
    apply = jax.jit(module.apply)
    ours = np.concatenate(  # one at a time: activations of 256 px are large
        [np.asarray(apply({"params": params}, inputs[0][[row]], inputs[1][[row]])) for row in range(2)]
    )
    close(thin(ours), reference[name])


class Tokens:
    """In the tokenizer's place: the caption of make_full.py, and the empty one."""

    def encode(self, captions, **_):
        return np.stack([caption_ids(9)] * len(captions)).astype(np.int32), np.arange(CONTEXT)[None] < 9

    def empty(self):
        return caption_ids(2)[None].astype(np.int32), np.arange(CONTEXT)[None] < 2


def test_karlo_draws_diffusers_image(reference, given_noise):
    """5 + 5 + 3 steps; one stage in memory at a time."""
    key = jax.random.split(jax.random.key(0), 1)
    text = loaded(text_stage(reference))

    def model(**stages) -> DALLE2:
        return DALLE2(
            **{"clip": text, "prior": None, "decoder": None, "upsamplers": (), "tokenizer": Tokens(), **stages}
        )

    given_noise("prior", 5)
    one = model(prior=loaded(prior_stage(reference, text.module)))
    embeddings = one.sample_prior(key, ["a caption"], steps="5")
    del one
    given_noise("decoder", 5)
    one = model(decoder=loaded(decoder_stage(reference, text.module, weakened=True)))
    small = one.decode(key, embeddings, ["a caption"], steps="5")
    del one
    gc.collect()
    given_noise("super_res", 3)
    one = model(upsamplers=(loaded(upsampler_stage(reference, weakened=True)),))
    image = np.asarray(one.upsample(key, small, steps="3"))[:, ::2, ::2] * 0.5 + 0.5
    found = np.abs(image - reference["picture"]).max() * 255
    print(f"image: {found:.2e} of 255, standard deviation {reference['picture'].std() * 255:.0f}")
    assert found <= 1
