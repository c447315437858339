"""DALLE2 as users meet it: what generate returns, what an image depends on, and what is refused."""

import dataclasses
import gc
import json
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import DALLE2
from dalle2_jax.checkpoint import CheckpointError, load_params
from dalle2_jax.diffusion import Sampling
from dalle2_jax.errors import StageMismatch
from dalle2_jax.evaluation.captioned import evaluate_images
from dalle2_jax.evaluation.metrics.retrieval import recall_at
from dalle2_jax.evaluation.report import format_images_report
from dalle2_jax.layers.pixels import to_uint8
from tests.cascade import DECODER_SIZE, EMBEDDING, FINAL_SIZE

CAPTIONS = ["a small red circle on a gray background", "a large blue cross", "a yellow square on a white background"]
OTHERS = ["a green triangle", "a small purple square on a black background", "a cyan circle"]
LONG = " ".join(["a small red circle on a gray background"] * 3) + " and a zebra"


@pytest.fixture(scope="module")
def model(tiny):
    return DALLE2.load(tiny.run_dir)


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(7), len(CAPTIONS))


@pytest.fixture(scope="module")
def generated(model, keys):
    return model.generate(keys, CAPTIONS, return_stages=True)


@pytest.fixture(scope="module")
def lively(model):
    """The model with random parameters in the decoder: after four steps its caption pathway says next to nothing."""
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), model.decoder.params)
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, params=params))


def test_it_is_short_in_print(model):
    assert repr(model) == "DALLE2(clip: clip, prior: prior, decoder: decoder, upsampler: upsampler)"
    assert repr(model.decoder) == "LoadedStage(decoder: decoder, Decoder)" and len(str(model.stages)) < 300


def test_what_is_loaded(model, tiny):
    names = [stage.name for stage in (model.clip, model.prior, model.decoder, *model.upsamplers)]
    assert names == tiny.system.usual_stages
    assert model.decoder.module == tiny.system.stages["decoder"].module and model.image_size == FINAL_SIZE
    jax.tree.map(np.testing.assert_array_equal, model.decoder.params, load_params(tiny.run_dir / "decoder", ema=True))
    raw = DALLE2.load(tiny.run_dir, ema=False)
    jax.tree.map(np.testing.assert_array_equal, raw.prior.params, load_params(tiny.run_dir / "prior", ema=False))


def test_each_stage_has_its_part(model, generated):
    assert generated.captions == tuple(CAPTIONS)
    for embeddings in (generated.text_embeddings, generated.image_embeddings):
        assert embeddings.shape == (3, EMBEDDING)
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1.0, rtol=1e-5)
    assert generated.decoded.shape == (3, DECODER_SIZE, DECODER_SIZE, 3) and len(generated.upsampled) == 1
    assert generated.images is generated.upsampled[-1] and generated.images.shape == (3, FINAL_SIZE, FINAL_SIZE, 3)
    assert generated.decoded.dtype == generated.images.dtype == np.uint8
    encoded = model.encode_text(CAPTIONS)
    np.testing.assert_allclose(generated.text_embeddings, encoded.embedding, atol=1e-6)
    assert encoded.tokens.shape == encoded.mask.shape and model.tokenizer.decode(encoded.tokens) == CAPTIONS
    assert encoded.states.shape[:2] == encoded.tokens.shape and len(encoded) == 3


def test_the_parts_are_those_of_the_stages(model, keys, generated):
    """generate is the stages one after the other, each with its own key of the image's."""
    stage_keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    embeddings = model.sample_prior(stage_keys[:, 0], CAPTIONS)
    np.testing.assert_allclose(generated.image_embeddings, embeddings, atol=1e-6)
    small = model.decode(stage_keys[:, 1], embeddings, CAPTIONS)
    np.testing.assert_array_equal(generated.decoded, to_uint8(small))
    np.testing.assert_array_equal(generated.images, to_uint8(model.upsample(stage_keys[:, 2], small)))


def test_the_same_key_draws_the_same(model, keys, generated):
    again = model.generate(keys, CAPTIONS)
    assert again.dtype == np.uint8
    np.testing.assert_array_equal(again, generated.images)
    first = model.generate(jax.random.key(0), CAPTIONS)
    np.testing.assert_array_equal(first, model.generate(jax.random.key(0), CAPTIONS))
    assert (first != model.generate(jax.random.key(1), CAPTIONS)).any()


def test_an_image_alone_is_the_image_in_a_batch(model, keys, generated):
    alone = model.generate(keys[1:2], CAPTIONS[1], return_stages=True)
    np.testing.assert_allclose(alone.image_embeddings[0], generated.image_embeddings[1], atol=1e-5)
    assert np.abs(alone.images[0].astype(int) - generated.images[1]).max() <= 1
    # Batches of one, put together, and with the last batch filled up.
    parts = model.generate(keys, CAPTIONS, batch_size=1)
    assert np.abs(parts.astype(int) - generated.images).max() <= 1


def test_a_batch_is_shared_out_among_the_devices(model, keys, generated):
    captions, many = [CAPTIONS[0]] + [CAPTIONS[1]] * 7, jnp.concatenate([keys[:1], jnp.repeat(keys[1:2], 7)])
    assert len(model.sample_prior(many, captions).sharding.device_set) == len(jax.local_devices()) == 8
    shared = model.generate(many, captions, return_stages=True)
    np.testing.assert_allclose(shared.image_embeddings[:2], generated.image_embeddings[:2], atol=1e-5)
    assert np.abs(shared.images[:2].astype(int) - generated.images[:2]).max() <= 1
    assert np.abs(shared.images[2:].astype(int) - shared.images[1:2]).max() <= 1


def test_one_caption_and_one_key_need_no_list(model):
    key = jax.random.key(3)
    one = model.sample_prior(key, CAPTIONS[1])
    np.testing.assert_array_equal(one, model.sample_prior(jax.random.split(key, 1), [CAPTIONS[1]]))
    np.testing.assert_array_equal(one, model.sample_prior(jax.random.PRNGKey(3), CAPTIONS[1]))
    assert model.encode_text(CAPTIONS[1]).embedding.shape == one.shape == (1, EMBEDDING)


def test_a_clip_that_was_trained_on_is_noticed(tiny, tmp_path):
    run = shutil.copytree(tiny.run_dir, tmp_path / "run")
    info = json.loads((run / "prior" / "stage.json").read_text())
    info["built_on"]["clip"] = "another"
    (run / "prior" / "stage.json").write_text(json.dumps(info))
    with pytest.warns(StageMismatch, match="the stage prior of .* was trained on another clip than the one"):
        DALLE2.load(run)


def test_embeddings_in_place_of_the_priors(model, keys, generated):
    given = model.generate(keys, CAPTIONS, image_embeddings=generated.image_embeddings)
    np.testing.assert_array_equal(given, generated.images)
    turned = np.roll(generated.image_embeddings, 1, axis=0)
    other = model.generate(keys, CAPTIONS, image_embeddings=turned, return_stages=True)
    np.testing.assert_array_equal(other.image_embeddings, turned)


def test_a_withheld_caption_does_not_show(lively, keys, generated):
    given = {"image_embeddings": generated.image_embeddings, "return_stages": True}
    with_caption = [lively.generate(keys, captions, **given).decoded for captions in (CAPTIONS, OTHERS)]
    assert (with_caption[0] != with_caption[1]).any()
    given["caption_to_decoder"] = False
    without = [lively.generate(keys, captions, **given).decoded for captions in (CAPTIONS, OTHERS)]
    np.testing.assert_array_equal(*without)
    assert (without[0] != with_caption[0]).any()
    given["image_embeddings"] = -generated.image_embeddings
    assert (lively.generate(keys, CAPTIONS, **given).decoded != without[0]).any()


def test_inverted_images(model, keys, generated):
    """The noise is the image's: another image, another embedding or caption asks for other noise."""
    images = generated.images
    embeddings, x_T = model.invert(images, CAPTIONS, steps="3")
    np.testing.assert_allclose(embeddings, model.encode_image(images), atol=1e-6)
    assert x_T.shape == (3, DECODER_SIZE, DECODER_SIZE, 3) and np.isfinite(x_T).all()
    assert np.abs(model.invert(images[::-1], CAPTIONS[::-1], steps="3")[1][::-1] - x_T).max() < 1e-4
    # Where the noise is given the keys play no part.
    settings = {"x_T": x_T, "steps": "3", "sampler": "ddim", "guidance_scale": 1.0}
    drawn = model.decode(keys, embeddings, CAPTIONS, **settings)
    np.testing.assert_array_equal(drawn, model.decode(keys[::-1], embeddings, CAPTIONS, **settings))
    assert (drawn != model.decode(keys, embeddings, CAPTIONS, **{**settings, "x_T": -x_T})).any()


def test_changed_settings_reach_their_stage(lively, keys, generated):
    settings = {"image_embeddings": generated.image_embeddings, "return_stages": True}
    usual = lively.generate(keys, CAPTIONS, **settings)
    scale = lively.decoder.record.rebuilt("sampling").guidance_scale
    same = lively.generate(keys, CAPTIONS, guidance_scale=scale, **settings)
    np.testing.assert_array_equal(usual.decoded, same.decoded)
    assert (lively.generate(keys, CAPTIONS, guidance_scale=scale + 2, **settings).decoded != usual.decoded).any()
    unguided = lively.generate(keys, CAPTIONS, guidance_scale=1.0, decoder={"steps": "1"}, **settings)
    assert (unguided.decoded != usual.decoded).any()
    # Sampled otherwise by default, it is inverted along DDIM's own timesteps all the same.
    images = np.asarray(usual.decoded)
    record = dataclasses.replace(lively.decoder.record, sampling=Sampling(sampler="dpmpp_2m", steps="3"))
    other = dataclasses.replace(lively, decoder=dataclasses.replace(lively.decoder, record=record))
    both = (each.invert(images, CAPTIONS, steps="3")[1] for each in (lively, other))
    np.testing.assert_array_equal(*both)
    with pytest.raises(ValueError, match="no sampler 'euler'"):
        lively.generate(keys, CAPTIONS, upsampler={"sampler": "euler"}, **settings)


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_other_numbers_compile_nothing(lively, keys, generated):
    """Guidance scale, guidance interval and eta are arguments of the compiled program."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    settings = {"image_embeddings": generated.image_embeddings}

    def draw(scale: float, eta: float = 0.5, interval: tuple[float, float] = (0.0, 0.9)) -> np.ndarray:
        changes = {"sampler": "ddim", "eta": eta, "guidance_interval": interval}
        return lively.generate(keys, CAPTIONS, guidance_scale=scale, decoder=changes, **settings)

    first = draw(2.0)
    compiled.clear()
    draw(2.5)
    before = resident_bytes()
    drawn = [draw(3.0 + number / 4) for number in range(12)]
    assert resident_bytes() - before < 5 * 2**20
    drawn += [draw(2.0, eta=0.25), draw(2.0, interval=(0.5, 1.0))]
    assert compiled == []
    assert len({images.tobytes() for images in (first, *drawn)}) == 1 + len(drawn)
    np.testing.assert_array_equal(first, draw(2.0))


def test_variations_are_of_no_caption(model, keys, generated):
    photo = np.asarray(generated.images[0])
    varied = model.vary(keys[:1], [photo], return_stages=True)
    assert varied.captions == ()
    np.testing.assert_allclose(varied.image_embeddings, varied_embedding := model.encode_image(photo[None]), atol=1e-6)
    alone = model.generate(keys[:1], ["a cross"], image_embeddings=varied_embedding, caption_to_decoder=False)
    np.testing.assert_array_equal(varied.images, alone)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"captions": None}, "neither captions nor image embeddings; give one of them"),
        ({"captions": []}, "there is no caption; give at least one"),
        ({"captions": ["a red circle", "  "]}, "the prompt is empty"),
        ({"keys": 2}, "2 keys were given for 3 examples"),
        ({"image_embeddings": np.ones((2, EMBEDDING), np.float32)}, "2 image embeddings were given for 3 captions"),
        ({"captions": [LONG], "strict": True}, "longer than 12 tokens; this part is cut: .* zebra"),
        ({"captions": ["caf\udce9"]}, "not valid Unicode text: 'caf.*udce9'; write it in UTF-8"),
        ({"decoder": {"variance": "fixed_large"}}, "variance has no effect with the sampler ddim; take ddpm"),
        ({"decoder": {"sampler": "dpmpp_2m", "eta": 1.0}}, "eta has no effect with the sampler dpmpp_2m; take ddim"),
        ({"decoder": {"percentile": 0.9}}, "percentile has no effect with this threshold; take threshold dynamic"),
        ({"decoder": {"candidates": 2}}, "candidates has no effect with the decoder; the prior samples them"),
        (
            {"upsampler": {"guidance_scale": 2.0}},
            "guidance_scale has no effect with an upsampler, which is not guided",
        ),
        ({"tile": 0}, "tile is 0; tiles of the stage upsampler must be multiples of 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(model, arguments, sentence):
    settings = {"captions": CAPTIONS, **arguments}
    keys, key = settings.pop("keys", None), jax.random.key(0)
    with pytest.raises(ValueError, match=sentence):
        model.generate(key if keys is None else jax.random.split(key, keys), **settings)


def test_a_long_prompt_is_cut_with_one_warning(model, keys):
    with pytest.warns(UserWarning, match="this part is cut: .* zebra") as caught:
        images = model.generate(keys[:1], [LONG])
    assert len(caught) == 1 and images.shape == (1, FINAL_SIZE, FINAL_SIZE, 3)
    # What is cut away does not matter.
    with pytest.warns(UserWarning):
        np.testing.assert_array_equal(images, model.generate(keys[:1], [LONG.replace("zebra", "giraffe")]))


def test_runs_that_cannot_be_loaded(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="there is no run at .*nowhere; train one"):
        DALLE2.load(tmp_path / "nowhere")
    run = tmp_path / "run"
    shutil.copytree(tiny.run_dir, run)
    path = run / "upsampler" / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "low_size": 12}))
    with pytest.raises(CheckpointError, match="upsampler of .* upsamples 12 px images but the stage before it makes 8"):
        DALLE2.load(run)
    shutil.rmtree(run / "upsampler")
    assert DALLE2.load(run).image_size == DECODER_SIZE
    shutil.rmtree(run / "prior")
    with pytest.raises(ValueError, match="has no prior, which samples image embeddings .* stages are: clip, decoder"):
        DALLE2.load(run).generate(jax.random.key(0), ["a red circle"])
    shutil.rmtree(run / "clip" / "checkpoints")
    with pytest.raises(CheckpointError, match="clip holds no finished checkpoint"):
        DALLE2.load(run)


def test_images_are_judged_by_retrieval(model, tiny):
    report, shown = evaluate_images(model, tiny.system.data, count=6, judge=model)
    assert report["data"] == "captioned_shapes" and report["test"]["captions"] == 6
    drawn = model.generate(jax.random.split(jax.random.key(0), 3)[0], shown["test"].captions)
    np.testing.assert_array_equal(drawn, shown["generated"].images)
    image = np.asarray(model.encode_image(drawn))
    text = np.asarray(model.encode_text(shown["test"].captions).embedding)
    generated = report["test"]["generated"]
    assert generated["clip_score"] == pytest.approx(float((image * text).sum(-1).mean()), abs=1e-5)
    assert generated["image_to_text_r5"] == recall_at(image, text, shown["test"].captions, 5)["image_to_text_r5"]
    assert report["test"]["chance"] == {"r1": 1 / 6, "r5": 5 / 6}
    assert report["unseen"]["captions"] == 3 and report["unseen"]["chance"]["r5"] == 1.0
    text = format_images_report(report)
    assert "6 test captions; R@1 / R@5 by chance 0.17 / 0.83" in text and "3 unseen combinations" in text
    report, shown = evaluate_images(model, tiny.system.data, split="validation", count=2)
    assert "unseen" not in report and "2 validation captions" in format_images_report(report)
    with pytest.raises(ValueError, match="validate"):
        evaluate_images(model, tiny.system.data, split="validate", count=2)
