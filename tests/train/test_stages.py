"""The real recipes, in the shrunk system of `tests.cascade`: resume, what is recorded, what is dropped and refused."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.checkpoint import checkpoint_steps, load_params, load_stage, read_record
from dalle2_jax.data import Data
from dalle2_jax.diffusion import sample_timesteps
from dalle2_jax.sharding import make_mesh
from tests import cascade
from tests.train import processes
from tests.train.processes import finish, wait_for
from tests.train.toy import ToyNet, toy_task
from train.config.system import System
from train.recipes.decoder import DecoderRecipe, DecoderTask
from train.recipes.embeddings import FrozenClip
from train.recipes.prior import PriorRecipe, PriorTask
from train.run.plan import check_stages, plan_stages
from train.step.lower import ANY_SIZE, abstract_batch

STAGES = ("clip", "prior", "decoder", "upsampler")
NEEDS = {"clip": (), "prior": ("clip",), "decoder": ("clip",), "upsampler": ()}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_ending(a: Path, b: Path) -> None:
    assert records(a) == records(b)
    for ema in (True, False):
        chex.assert_trees_all_equal(load_params(a, ema), load_params(b, ema))


# Training


def test_every_stage_is_trained_and_recorded(tiny):
    for name in STAGES:
        folder, info = tiny.run_dir / name, read_record(tiny.run_dir / name)
        assert (info.kind, info.finished, info.step) == (name, True, cascade.STEPS)
        assert checkpoint_steps(folder) == [2, 4]
        found = records(folder)
        assert [(r["kind"], r["step"]) for r in found] == [
            *(("train", step) for step in range(1, 5)),
            ("validation", 4),
        ]
        assert all(np.isfinite(r["loss"]) for r in found)
        before, after = (jax.tree.leaves(load_params(folder, ema)) for ema in (True, False))
        assert any((a != b).any() for a, b in zip(before, after, strict=True))
        assert (folder / "samples" / "step_4.png").is_file() == (name in ("decoder", "upsampler"))
        recipe = tiny.system.stages[name]
        assert load_stage(folder).module == recipe.module
        error = read_record(folder).measured.get("x0_error")
        assert (error is None) == (name == "clip")
        # The network has hardly learned: where all is noise it knows nothing of an image, where there is none a lot.
        assert error is None or (len(error) == 20 and np.isfinite(error).all() and min(error) >= 0)
    assert {name: set(read_record(tiny.run_dir / name).built_on) for name in STAGES} == {
        name: set(needs) for name, needs in NEEDS.items()
    }


def test_clips_temperature_is_recorded(tiny):
    scales = [record["logit_scale"] for record in records(tiny.run_dir / "clip")]
    # It starts at 1/0.07 (Radford et al. 2021), and four small steps do not take it far.
    assert scales[0] == pytest.approx(1 / 0.07, rel=1e-5) and scales[3] != scales[0]
    assert all(13 < scale < 16 for scale in scales)
    accuracies = {"accuracy_image_to_text", "accuracy_text_to_image"}
    assert all(accuracies <= set(record) for record in records(tiny.run_dir / "clip"))


# The loop is one for all of them, and the others are with the slow tests.
@pytest.mark.parametrize(
    "name", [name if name == "prior" else pytest.param(name, marks=pytest.mark.slow) for name in STAGES]
)
def test_a_stopped_stage_goes_on_bit_equal(tiny, tmp_path, name):
    for needed in NEEDS[name]:
        shutil.copytree(tiny.run_dir / needed, tmp_path / needed)
    # What is shown in between is no part of the training.
    system = tiny.system.with_stage(name, dataclasses.replace(tiny.system.stages[name], preview_every=0))
    result, lines = cascade.train(system, tmp_path, [name], stop_after_steps=3)
    assert (result.step, result.finished, result.signal) == (3, False, signal.SIGTERM)
    assert checkpoint_steps(tmp_path / name) == [2, 3]
    result, lines = cascade.train(system, tmp_path, [name])
    assert result.finished and f"{name} goes on from step 3" in lines
    assert_same_ending(tiny.run_dir / name, tmp_path / name)


def test_a_finished_cascade_stays_as_it_is(tiny):
    result, lines = cascade.train(tiny.system, tiny.run_dir)
    assert result.finished and [line.split(":")[0] for line in lines] == [f"{name} is finished" for name in STAGES]


# Frozen stages


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_clip_is_not_part_of_what_is_built_on_it(tiny, name):
    task = tiny.system.stages[name].build({"clip": load_stage(tiny.run_dir / "clip")})
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    own, saved = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (shapes, load_params(tiny.run_dir / name)))
    assert own == saved and set(task.frozen) == {"clip"}
    parts = {path.name for path in (tiny.run_dir / name / "checkpoints" / "4").iterdir() if path.is_dir()}
    assert parts == {"params", "ema", "optimizer", "progress"}
    assert read_record(tiny.run_dir / name).parameters == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert "clip" not in read_record(tiny.run_dir / name).module["fields"]


class Clip:
    """As much of CLIP as the recipes ask for; its embeddings are its parameter times what they should be."""

    embedding_size = 4
    vision = SimpleNamespace(image_size=2)
    text = SimpleNamespace(context_length=3, width=5)

    def apply(self, variables, *inputs, method):
        weight, batch = variables["params"]["weight"], inputs[0].shape[0]
        embedding = weight * jnp.ones((batch, 4)) / 2
        return embedding if method == "encode_image" else (embedding, weight * jnp.ones((batch, 3, 5)))


class Network:
    """A network that notes what it is given; its output depends on its parameter and on every condition."""

    embedding_size, text, text_width, residual = 4, object(), None, False
    needs_empty_caption, reads_tokens, last, inpainting = False, True, None, False
    unet = SimpleNamespace(image_size=2)

    def __init__(self):
        self.calls = []

    def scale_embedding(self, embedding):
        return 2 * embedding

    def apply(self, variables, x_t, timesteps, *inputs, **conditions):
        self.calls.append((x_t, *inputs, conditions))
        given = conditions.get("image_embedding", conditions.get("text_embedding"))
        message = 0.0 if given is None else given.sum()
        return variables["params"]["weight"] * x_t + message


def stubbed(recipe, **changes):
    network = Network()
    kind = {PriorRecipe: PriorTask, DecoderRecipe: DecoderTask}[type(recipe)]
    recipe = dataclasses.replace(recipe, module=network, **changes)
    return kind(recipe=recipe, clip=FrozenClip(Clip())), network


def blank(count: int) -> dict[str, jax.Array]:
    return {
        "image": jnp.zeros((count, 2, 2, 3), jnp.uint8),
        "tokens": jnp.ones((count, 3), jnp.int32),
        "mask": jnp.ones((count, 3), bool),
    }


WEIGHT = {"weight": jnp.float32(1.0)}


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_no_gradient_reaches_clip(tiny, name):
    recipe, _ = stubbed(tiny.system.stages[name])

    def loss(params, frozen):
        return recipe.loss(params, blank(4), jax.random.key(0), frozen, None)[0]

    own, frozen = jax.grad(loss, argnums=(0, 1))(WEIGHT, {"clip": WEIGHT})
    assert float(own["weight"]) != 0 and float(frozen["clip"]["weight"]) == 0
    # It would, were it not stopped: the loss does depend on it.
    assert float(loss(WEIGHT, {"clip": {"weight": jnp.float32(2.0)}})) != float(loss(WEIGHT, {"clip": WEIGHT}))


# Dropped conditions


def test_conditions_are_dropped_as_often_as_in_the_paper(tiny):
    """10% of the embeddings and 50% of the captions for the decoder, each by itself; 10% for the prior."""
    count, paper = 4000, {"image_drop": 0.1, "text_drop": 0.5}
    assert {name: DecoderRecipe.__dataclass_fields__[name].default for name in paper} == paper
    assert PriorRecipe.__dataclass_fields__["text_drop"].default == 0.1

    recipe, network = stubbed(tiny.system.stages["decoder"], **paper)
    recipe.loss(WEIGHT, blank(count), jax.random.key(3), {"clip": WEIGHT}, None)
    conditions = network.calls[-1][-1]
    image, text = (np.asarray(conditions[name]) for name in ("keep_image", "keep_text"))
    assert image.shape == text.shape == (count,) and image.dtype == text.dtype == bool
    # Four standard deviations.
    for dropped, share in ((~image, 0.1), (~text, 0.5), (~image & ~text, 0.05)):
        assert abs(dropped.mean() - share) < 4 * np.sqrt(share * (1 - share) / count)
    recipe.loss(WEIGHT, blank(count), jax.random.key(4), {"clip": WEIGHT}, None)
    assert (np.asarray(network.calls[-1][-1]["keep_text"]) != text).any()
    recipe.validate(WEIGHT, blank(8), jax.random.key(3), {"clip": WEIGHT})
    assert network.calls[-1][-1]["keep_image"].all() and network.calls[-1][-1]["keep_text"].all()

    recipe, network = stubbed(tiny.system.stages["prior"], text_drop=0.1)
    recipe.loss(WEIGHT, blank(count), jax.random.key(3), {"clip": WEIGHT}, None)
    kept = np.asarray(network.calls[-1][-1]["keep_text"])
    assert abs((~kept).mean() - 0.1) < 4 * np.sqrt(0.09 / count)
    recipe.validate(WEIGHT, blank(8), jax.random.key(3), {"clip": WEIGHT})
    assert network.calls[-1][-1]["keep_text"].all()


def test_the_decoders_loss_is_weighted_as_the_recipe_says(tiny):
    losses = {}
    for weighting, limit in (("uniform", 5.0), ("min_snr_plus_one", 1.0), ("min_snr_plus_one", 3.0)):
        recipe, network = stubbed(tiny.system.stages["decoder"], weighting=weighting, weight_limit=limit)
        losses[weighting, limit] = float(recipe.loss(WEIGHT, blank(64), jax.random.key(3), {"clip": WEIGHT}, None)[0])
    plain = losses["uniform", 5.0]
    assert losses["min_snr_plus_one", 1.0] == pytest.approx(plain, rel=1e-5)
    assert plain * 1.01 < losses["min_snr_plus_one", 3.0] < plain * 3


def test_timesteps_are_drawn_by_their_losses_and_weighted_back(tiny):
    recipe, network = stubbed(tiny.system.stages["decoder"], timesteps="loss")
    history = recipe.init_extra()
    steps = recipe.recipe.process.steps
    # All is known, and all but the losses of the last tenth of the timesteps is nothing.
    losses = jnp.full((steps, 10), 1e-6).at[-steps // 10 :].set(1.0)
    history = history._replace(losses=losses, counts=jnp.full(steps, 10))
    frozen = {"clip": WEIGHT}
    value, metrics, after = recipe.loss(WEIGHT, blank(64), jax.random.key(3), frozen, history)
    i, _ = sample_timesteps(jax.random.split(jax.random.split(jax.random.key(3), 5)[3])[0], history, 64)
    assert (i >= steps - steps // 10).mean() > 0.9
    changed = np.flatnonzero(np.asarray((after.losses != history.losses).any(1)))
    assert set(changed) == set(np.asarray(i).tolist())
    assert float(value) < 0.3 * float(after.losses[changed, -1].mean())
    plain, _ = stubbed(tiny.system.stages["decoder"], timesteps="loss", weighting="uniform")
    value, metrics, _ = plain.loss(WEIGHT, blank(64), jax.random.key(3), frozen, history)
    assert float(metrics["mse"]) == pytest.approx(float(value), rel=1e-5)  # what is logged is weighted back too
    with pytest.raises(ValueError, match="set decoder.optimizer.accumulation=1"):
        dataclasses.replace(
            tiny.system.stages["decoder"],
            timesteps="loss",
            optimizer=dataclasses.replace(recipe.recipe.optimizer, accumulation=2),
        )
    with pytest.raises(ValueError, match="decoder.timesteps is 'losses'; it must be uniform or loss"):
        dataclasses.replace(tiny.system.stages["decoder"], timesteps="losses")


def degraded(tiny):
    return dataclasses.replace(
        tiny.system.stages["upsampler"],
        degradation="bsr",
        crop_fraction=1.0,
        timesteps="loss",
        preview_every=0,
        validate_every=0,
    )


def test_an_upsampler_is_shown_images_as_bad_as_they_come(tiny):
    upsampler, recipe = tiny.system.stages["upsampler"], degraded(tiny)
    made = recipe.build({}).batch_spec.transform(np.full((20, 16, 3), 200, np.uint8), np.random.default_rng(0))
    assert {name: value.shape for name, value in made.items()} == {"image": (16, 16, 3), "low_resolution": (8, 8, 3)}
    with pytest.raises(ValueError, match="upsampler.degradation is 'noise'; it must be blur or bsr"):
        dataclasses.replace(upsampler, degradation="noise")
    with pytest.raises(ValueError, match="smaller than the upsampler's crops of 16"):
        recipe.build({}).batch_spec.transform(np.zeros((12, 40, 3), np.uint8), np.random.default_rng(0))


@pytest.mark.slow
def test_what_is_drawn_by_losses_from_degraded_images_goes_on_bit_equal(tiny, tmp_path):
    recipe = degraded(tiny)
    system = tiny.system.with_stage("upsampler", recipe)
    whole, _ = cascade.train(system, tmp_path / "whole", ["upsampler"])
    cascade.train(system, tmp_path / "parts", ["upsampler"], stop_after_steps=3)
    parts, _ = cascade.train(system, tmp_path / "parts", ["upsampler"])
    assert whole.finished and parts.finished
    assert_same_ending(tmp_path / "whole" / "upsampler", tmp_path / "parts" / "upsampler")
    assert read_record(tmp_path / "whole" / "upsampler").training["degradation"] == "bsr"


def test_a_new_sampling_of_a_finished_stage_is_recorded(tiny, tmp_path):
    for name in ("clip", "decoder"):
        shutil.copytree(tiny.run_dir / name, tmp_path / name)
    decoder = tiny.system.stages["decoder"]
    changed = dataclasses.replace(decoder, sampling=dataclasses.replace(decoder.sampling, guidance_scale=7.0))
    result, _ = cascade.train(tiny.system.with_stage("decoder", changed), tmp_path, ["decoder"])
    assert result.finished and load_stage(tmp_path / "decoder").record.rebuilt("sampling").guidance_scale == 7.0
    before, after = read_record(tiny.run_dir / "decoder"), read_record(tmp_path / "decoder")
    assert dataclasses.replace(before, sampling=after.sampling) == after


def test_noise_on_the_embedding_keeps_its_norm(tiny):
    recipe, network = stubbed(tiny.system.stages["decoder"], embedding_noise=0.5)
    recipe.loss(WEIGHT, blank(64), jax.random.key(3), {"clip": WEIGHT}, None)
    noisy = np.asarray(network.calls[-1][-1]["image_embedding"])
    np.testing.assert_allclose(np.linalg.norm(noisy, axis=-1), 1.0, rtol=1e-5)
    # 0.5 of noise beside 1 of signal: the cosine is about 1 / sqrt(1 + 0.25).
    cosines = noisy @ np.full(4, 0.5)
    assert 0.8 < cosines.mean() < 0.97 and cosines.std() > 0.02
    recipe.validate(WEIGHT, blank(4), jax.random.key(3), {"clip": WEIGHT})
    np.testing.assert_allclose(network.calls[-1][-1]["image_embedding"], 0.5)


# The upsampler's crops


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_an_upsampler_is_trained_on_matching_crops(tiny, fraction):
    """Crops of a share of the side, and with no blur the small one is the cell means of the large one."""
    network = Network()
    network.unet = SimpleNamespace(image_size=16)
    recipe = dataclasses.replace(
        tiny.system.stages["upsampler"], module=network, low_size=8, crop_fraction=fraction, blur_probability=0.0
    )
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    recipe.build({}).loss(WEIGHT, {"image": jnp.asarray(images)}, jax.random.key(0), {}, None)
    x_t, low, _ = network.calls[-1]
    side = int(16 * fraction)
    assert x_t.shape == (3, side, side, 3) and low.shape == (3, side // 2, side // 2, 3)
    cells = images.reshape(3, 8, 2, 8, 2, 3).mean((2, 4)) / 127.5 - 1
    for index in range(3):
        places = [
            (y, x)
            for y in range(8 - side // 2 + 1)
            for x in range(8 - side // 2 + 1)
            if np.allclose(cells[index, y : y + side // 2, x : x + side // 2], low[index], atol=1e-5)
        ]
        assert len(places) == 1
    blurred = dataclasses.replace(recipe, blur_probability=1.0)
    blurred.build({}).loss(WEIGHT, {"image": jnp.asarray(images)}, jax.random.key(0), {}, None)
    assert np.abs(network.calls[-1][1] - low).max() > 0.01


# Refusals


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_prior_of_another_size_is_refused(tiny):
    prior = tiny.system.stages["prior"]
    prior = dataclasses.replace(prior, module=prior.module.clone(embedding_size=12))
    with pytest.raises(ValueError) as error:
        prior.build({"clip": load_stage(tiny.run_dir / "clip")})
    assert "of size 12 but CLIP's have 8; set prior.module.embedding_size=8" in one_sentence(error)


def test_an_upsampler_whose_sizes_do_not_divide_is_refused(tiny):
    upsampler = tiny.system.stages["upsampler"]
    for changes in ({"low_size": 5}, {"low_size": 8, "crop_fraction": 0.3}, {"crop_fraction": 0.0}):
        with pytest.raises(ValueError) as error:
            dataclasses.replace(upsampler, **changes)
        assert "must be a multiple of the smaller and the crop a whole number" in one_sentence(error)
    with pytest.raises(ValueError) as error:
        dataclasses.replace(
            upsampler,
            module=upsampler.module.clone(residual=True),
            process=dataclasses.replace(upsampler.process, prediction="v"),
        )
    assert "a residual upsampler predicts x_0: set upsampler.process.prediction=x0" in one_sentence(error)


def test_images_that_are_smaller_than_those_to_draw_are_refused(tiny, tmp_path):
    small = dataclasses.replace(tiny.system, data=dataclasses.replace(tiny.system.data, image_size=12))
    for train in (
        lambda: cascade.train(small, tmp_path),
        lambda: plan_stages(small, ["upsampler"], tmp_path, make_mesh(devices=jax.devices()[:1])),
    ):
        with pytest.raises(ValueError) as error:
            train()
        assert "upsampler is to learn images of 16 pixels and the data's have 12" in one_sentence(error)
    assert not list(tmp_path.iterdir())


def test_a_batch_larger_than_the_split_is_refused_before_anything_is_written(tiny, tmp_path):
    prior = dataclasses.replace(tiny.system.stages["prior"], batch_size=128)
    with pytest.raises(ValueError) as error:
        cascade.train(tiny.system.with_stage("prior", prior), tmp_path)
    message = "prior.batch_size is 128 and the split 'train' of captioned_shapes has 96 images; set prior.batch_size=64"
    assert message in one_sentence(error) and not list(tmp_path.iterdir())


def test_timesteps_by_losses_begin_with_the_stage(tiny, tmp_path):
    shutil.copytree(tiny.run_dir / "clip", tmp_path / "clip")
    shutil.copytree(tiny.run_dir / "decoder", tmp_path / "decoder")
    decoder = dataclasses.replace(tiny.system.stages["decoder"], timesteps="loss", steps=8)
    with pytest.raises(ValueError) as error:
        cascade.train(tiny.system.with_stage("decoder", decoder), tmp_path, ["decoder"])
    assert "holds another stage: training.timesteps is 'uniform' there and 'loss' here" in one_sentence(error)


def test_a_stage_from_before_a_field_goes_on(tiny, tmp_path):
    """As if this version were the first whose U-Nets have `patch` and whose data has `seed`."""
    for name in ("clip", "decoder"):
        shutil.copytree(tiny.run_dir / name, tmp_path / name)
    path = tmp_path / "decoder" / "stage.json"
    record = json.loads(path.read_text())
    del record["module"]["fields"]["unet"]["fields"]["patch"]
    del record["data"]["fields"]["seed"]
    path.write_text(json.dumps(record))
    result, _ = cascade.train(tiny.system, tmp_path, ["decoder"])
    assert result.finished
    path.write_text(json.dumps(record))
    decoder = tiny.system.stages["decoder"]
    other = dataclasses.replace(decoder, module=decoder.module.clone(unet=decoder.module.unet.clone(patch=2)))
    with pytest.raises(ValueError) as error:
        cascade.train(tiny.system.with_stage("decoder", other), tmp_path, ["decoder"])
    assert "holds another stage: module.unet.patch is 1 there and 2 here" in one_sentence(error)


def test_training_on_fewer_timesteps_is_refused(tiny):
    prior = tiny.system.stages["prior"]
    with pytest.raises(ValueError) as error:
        dataclasses.replace(prior, process=dataclasses.replace(prior.process, respacing="fast27"))
    assert "all timesteps are trained on, and fewer are sampled: set prior.sampling.steps" in one_sentence(error)


def test_a_stage_before_the_one_it_needs_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError) as error:
        cascade.train(tiny.system, tmp_path, ["prior"])
    assert "prior needs clip, which is not trained yet; run first: python -m train" in one_sentence(error)
    assert not (tmp_path / "prior").exists()


# Real processes

CONFIG = """
import dataclasses
from tests.cascade import tiny_system


def system():
    result = tiny_system("data")
    for name, recipe in result.stages.items():
        result = result.with_stage(
            name, dataclasses.replace(recipe, steps=STEPS, checkpoint_every=3, validate_every=0, preview_every=0)
        )
    return result
"""


def start(place: Path, run: str, steps: int, slow_saves: float = 0.0) -> subprocess.Popen:
    return processes.start(place, CONFIG.replace("STEPS", str(steps)), "all", run, slow_saves)


@pytest.mark.slow
def test_all_stages_killed_at_five_random_points(tmp_path):
    """Once in every stage, the last time in the middle of a save; the run that goes on is the run left alone."""
    steps, rng = 30, random.Random(1)
    code, output = finish(start(tmp_path, "alone", steps))
    assert code == 0, output
    for name in STAGES:
        process = start(tmp_path, "hunted", steps)
        wait_for(process, f"{name} {rng.randrange(4, steps - 6)}/{steps} |")
        time.sleep(rng.uniform(0.0, 0.1))
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
        assert not read_record(tmp_path / "runs" / "hunted" / name).finished
    process = start(tmp_path, "hunted", steps, slow_saves=1.0)
    wait_for(process, "saving")
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    saves = tmp_path / "runs" / "hunted" / "upsampler" / "checkpoints"
    assert any(path.is_dir() and not (path / "CHECKSUMS").exists() for path in saves.iterdir())
    code, output = finish(start(tmp_path, "hunted", steps))
    assert code == 0, output
    for name in STAGES:
        assert_same_ending(tmp_path / "runs" / "alone" / name, tmp_path / "runs" / "hunted" / name)


def test_an_upsampler_with_a_network_for_its_last_step_is_not_trained(tiny):
    upsampler = tiny.system.stages["upsampler"]
    two = upsampler.module.clone(last=upsampler.module.unet.clone())
    with pytest.raises(ValueError) as error:
        dataclasses.replace(upsampler, module=two)
    assert "set upsampler.module.last=none" in one_sentence(error)


def test_every_random_choice_of_the_prior_has_a_key_of_its_own(tiny, monkeypatch):
    """No key is folded into that was split before: what is drawn with each is drawn with no other."""
    task, network = stubbed(tiny.system.stages["prior"])
    given, apply = [], network.apply
    network.apply = lambda *args, **kwargs: given.append(kwargs["rngs"]["dropout"]) or apply(*args, **kwargs)
    task.loss(WEIGHT, blank(4), jax.random.key(3), {"clip": WEIGHT}, None)
    expected = jax.random.split(jax.random.key(3), 3)
    np.testing.assert_array_equal(jax.random.key_data(given[0]), jax.random.key_data(expected[2]))
    assert len({jax.random.key_data(key).tobytes() for key in expected}) == 3


def test_a_stage_that_looks_at_images_of_any_size_is_checked(tmp_path):
    """Neither the data nor the task say how large images are: the check takes some size, and no 0 x 0 image."""
    task = toy_task(module=ToyNet(features=3 * ANY_SIZE**2))
    system = System(name="any", data=Data(name="folder", folder=str(tmp_path)), stages={"toy": task.recipe}, **TOKENS)
    assert system.data.image_size is None and task.batch_spec.image_size is None
    assert abstract_batch(system, task, None)["image"].shape == (16, ANY_SIZE, ANY_SIZE, 3)
    check_stages(system, ["toy"], make_mesh(devices=jax.devices()[:1]))


TOKENS = {"vocabulary_size": 300, "context_length": 40}
