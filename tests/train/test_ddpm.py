"""The DDPM's recipe: batches with labels, metrics, flips, training steps on a mesh, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.data import Data
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.errors import InputError
from dalle2_jax.layers.caption_encoder import CaptionEncoder
from dalle2_jax.lineage.ddpm import CIFAR10_UNET, DDPM
from dalle2_jax.sharding import make_mesh
from tests.data import tiny_labels  # noqa: F401 - TFDS knows it once it is imported
from train.config.optimizer import Optimizer
from train.config.system import System
from train.recipes.augment import random_flip
from train.recipes.ddpm import DDPMRecipe
from train.run.feed import Feed
from train.run.plan import check_stages
from train.step.lower import abstract_batch
from train.step.state import abstract_state, create_state
from train.step.step import make_step

SIZE, BATCH = 4, 4
UNET = CIFAR10_UNET.clone(
    image_size=SIZE,
    channels=8,
    channel_multipliers=(1,),
    depth=1,
    attention_resolutions=(),
    middle_attention=False,
    groups=4,
    dropout=0.0,
)
TEXT = CaptionEncoder(vocabulary_size=300, context_length=6, width=8, depth=1, heads=2)


def ddpm_recipe(condition="none", fields=None, unet=UNET, **changes) -> DDPMRecipe:
    read = {"class": {"num_classes": 2}, "caption": {"text": TEXT}, "none": {}}[condition]
    module = DDPM(unet, condition, **{**read, **(fields or {})})
    return DDPMRecipe(module=module, **{"steps": 4, "batch_size": BATCH, **changes})


def system(tmp_path, recipe, **data) -> System:
    data = {"name": "tiny_labels", "image_size": SIZE, "validation_split": "train", **data}
    return System(
        name="ddpm",
        data=Data(**data, data_dir=str(tmp_path)),
        stages={"ddpm": recipe},
        vocabulary_size=300,
        context_length=6,
    )


def drawn(task):
    """Random parameters, but for a last convolution of zeros."""
    random, shapes = np.random.default_rng(0), jax.eval_shape(task.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.2 * random.normal(size=leaf.shape), shapes)
    zeros = jax.tree.map(np.zeros_like, params["unet"]["conv_out"])
    return {**params, "unet": {**params["unet"], "conv_out": zeros}}


@pytest.mark.slow
def test_labels_go_from_the_data_to_a_step_on_a_mesh(tmp_path):
    optimizer = Optimizer(name="adam", learning_rate=1e-2, warmup_steps=1)
    recipe = ddpm_recipe("class", {"num_classes": 3}, steps=25, optimizer=optimizer, condition_drop=0.2)
    assert recipe.classes == 3 and not recipe.reads_captions
    whole, task, mesh = system(tmp_path, recipe), recipe.build({}), make_mesh(data=2, devices=jax.devices()[:2])
    check_stages(whole, ["ddpm"], mesh)
    feed = Feed(whole, tmp_path / "run")
    feed.check("ddpm", recipe)
    batches = feed.training(task, mesh)
    batch = next(batches)
    shapes = {name: (value.shape, value.dtype) for name, value in batch.items()}
    expected = abstract_batch(whole, task, mesh)
    assert shapes == {name: (value.shape, value.dtype) for name, value in expected.items()}
    assert set(batch) == {"image", "label", "index"}
    abstract = abstract_state(task, mesh)
    state, step = create_state(task, abstract, initial=drawn(task)), make_step(task, mesh, abstract)
    table = np.asarray(state["params"]["class_embedding"]["embedding"])
    losses = []
    for _ in range(recipe.steps):
        state, report = step(state, next(batches), {})
        losses.append(report["mse"])
    batches.close()
    # The first output is zero, and the noise's square 1. Of the table, the third class is in no image.
    assert 0.6 < losses[0] < 1.4 and np.mean(losses[-5:]) < 0.6
    moved = np.abs(state["params"]["class_embedding"]["embedding"] - table).max(1)
    assert moved[2] == 0 and moved[[0, 1, 3]].min() > 1e-2

    (held_out,) = feed.validation(task, mesh)
    assert held_out["label"].tolist() == [0, 1, 0, 1] and held_out["captions"][:2] == ["dark gray", "bright"]
    rows = {name: value for name, value in held_out.items() if name != "captions"}
    key = jax.random.key(0)
    validate = jax.jit(task.validate)
    found = validate(state["params"], rows, key, {})
    assert set(found) == {"loss", "mse", "bits_per_dimension"} and found["loss"] == found["mse"] < 0.6
    wrong = {**rows, "label": 1 - rows["label"]}
    again = validate(state["params"], wrong, key, {})
    assert again["loss"] != found["loss"] and again["bits_per_dimension"] != found["bits_per_dimension"]
    assert 2 < found["bits_per_dimension"] < 20
    shown = jax.eval_shape(task.preview, state["params"], rows, key, {})
    assert shown.shape == (4, SIZE, SIZE, 3) and shown.dtype == jnp.uint8


def test_captions_are_read_where_it_is_conditional_on_them(tmp_path):
    recipe = ddpm_recipe("caption", loss_kind="hybrid", unet=UNET.clone(out_channels=6), process=Process("linear"))
    assert recipe.reads_captions and recipe.classes is None and not ddpm_recipe().reads_captions
    task, batch = recipe.build({}), abstract_batch(system(tmp_path, recipe), recipe.build({}), None)
    assert set(batch) == {"image", "tokens", "mask", "index"}
    params = jax.eval_shape(task.init, jax.random.key(0))
    _, metrics, _ = jax.eval_shape(lambda *a: task.loss(*a, {}, None), params, batch, jax.random.key(0))
    assert set(metrics) == {"mse", "vlb"}
    shown = jax.eval_shape(lambda *a: task.preview(*a, {}), params, batch, jax.random.key(0))
    assert shown.shape == (BATCH, SIZE, SIZE, 3)
    described = recipe.describe()
    assert described["image_size"] == SIZE and described["training"]["condition_drop"] == 0.1
    with pytest.raises(InputError, match="stages that read captions .ddpm. and no vocabulary_size"):
        System(name="ddpm", data=Data(), stages={"ddpm": recipe})


def test_grey_images_and_previews_over_few_steps():
    recipe = ddpm_recipe(fields={"channels": 1}, unet=UNET.clone(out_channels=1))
    assert recipe.preview_sampling == Sampling(sampler="ddim", steps="50")
    own = Sampling(sampler="dpmpp_2m", steps="20")
    assert dataclasses.replace(recipe, sampling=own).preview_sampling == own
    task = recipe.build({})
    batch = {"image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (BATCH, 8, 8, 3)), jnp.uint8)}
    small = np.asarray(batch["image"], float).reshape(BATCH, 4, 2, 4, 2, 3).mean((2, 4, 5))[..., None]
    _, images, _ = task.denoising({}, batch, jax.random.key(0), {}, training=False)
    np.testing.assert_allclose((np.asarray(images) + 1) * 127.5, small.round(), atol=1.01)
    levels = (np.asarray(images) + 1) * 127.5
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
    params = jax.eval_shape(task.init, jax.random.key(0))
    shown = jax.eval_shape(lambda *a: task.preview(*a, {}), params, batch, jax.random.key(0))
    assert shown.shape == (BATCH, SIZE, SIZE, 3)


def test_images_are_flipped_in_training_alone():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, SIZE, SIZE, 3)), jnp.uint8)
    tasks = [ddpm_recipe(horizontal_flip=flip).build({}) for flip in (True, False)]

    def seen(task, training):
        return task.denoising({}, {"image": images}, jax.random.key(0), {}, training=training)[1]

    plain = np.asarray(seen(tasks[1], True))
    np.testing.assert_array_equal(seen(tasks[0], False), plain)
    flipped = np.asarray(seen(tasks[0], True))
    mirrored = (flipped == plain[:, :, ::-1]).all((1, 2, 3))
    assert ((flipped == plain).all((1, 2, 3)) ^ mirrored).all() and 16 < mirrored.sum() < 48
    np.testing.assert_array_equal(random_flip(jax.random.key(1), random_flip(jax.random.key(1), plain)), plain)


def test_data_without_labels_are_refused_where_they_enter(tmp_path):
    shapes = system(tmp_path, ddpm_recipe("class"), name="captioned_shapes", counts=(8, 4, 4, 4))
    recipe = shapes.stages["ddpm"]
    with pytest.raises(InputError, match="ddpm is conditional on classes and the data set captioned_shapes has no"):
        Feed(shapes, tmp_path / "run").check("ddpm", recipe)
    Feed(shapes, tmp_path / "run").check("ddpm", ddpm_recipe())
    few = ddpm_recipe("class", {"num_classes": 1})
    with pytest.raises(InputError, match="tiny_labels has 2 classes and ddpm is made for 1; set ddpm.module.num_cla"):
        Feed(system(tmp_path, few), tmp_path / "run").check("ddpm", few)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ddpm_recipe(condition_drop=1.5), "ddpm.condition_drop is 1.5; it must lie in 0 to 1"),
        (lambda: ddpm_recipe(bound_evaluations=0), "ddpm.bound_evaluations is 0; it must be 1 or more"),
        (lambda: ddpm_recipe(preview_steps=0), "ddpm.preview_steps is 0; it must be 1 or more"),
        (lambda: ddpm_recipe(fields={"channels": 2}), r"ddpm.module.channels is 2; it must be 1 \(grey\) or 3"),
        (
            lambda: ddpm_recipe(process=Process("linear")),
            "out_channels is 3 and ddpm.process.variance learned_range, which needs 6; set one of them",
        ),
        (
            lambda: ddpm_recipe(sampling=Sampling(guidance_scale=2.0)),
            "ddpm.sampling.guidance_scale is 2.0 and ddpm.module has no condition to guide by",
        ),
        (lambda: ddpm_recipe(process=Process("linear", 10, variance="fixed_large")), "asks for 1000 steps"),
        (lambda: ddpm_recipe(loss_kind="hybrid"), "the hybrid loss needs variance='learned_range'"),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")
