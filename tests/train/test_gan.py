"""The GAN's recipe: Algorithm 1 against updates written by hand, resume within a cycle, warnings, what is refused."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.checkpoint import read_record
from dalle2_jax.checkpoint.store import load_part
from dalle2_jax.errors import InputError
from dalle2_jax.lineage.gan import (
    FAILURES,
    GAN,
    ConvDiscriminator,
    ConvGenerator,
    MaxoutDiscriminator,
    MLPGenerator,
    gan_noise,
    sample_gan,
)
from dalle2_jax.sharding import make_mesh
from tests.train.toy import ToyBatches
from train.config.optimizer import Optimizer
from train.loop.loop import LoopOptions
from train.recipes.gan import GANRecipe
from train.run.stage import run
from train.step.state import abstract_state, create_state
from train.step.step import make_step

SIZE, BATCH, LATENTS = 4, 8, 3
PLAYERS = ("generator", "discriminator")
SGD = Optimizer(name="sgd", learning_rate=0.3, momentum=0.5, warmup_steps=3, gradient_clip=0.0)


def gan(**changes) -> GAN:
    discriminator = MaxoutDiscriminator((4,), pieces=2, keep_input=1.0, keep_hidden=1.0, init_range=0.5)
    players = {"generator": MLPGenerator((5,), init_range=0.5), "discriminator": discriminator}
    return GAN(**{**players, "latent_size": LATENTS, "image_size": SIZE, "channels": 3, **changes})


def gan_recipe(module=None, **changes) -> GANRecipe:
    return GANRecipe(module=module or gan(), **{"steps": 8, "batch_size": BATCH, "optimizer": SGD, **changes})


def images_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8)


# Algorithm 1 by hand: explicit layers, and sigmoids, whose logarithms these losses are.


def made_by_hand(params, noise):
    hidden = jnp.maximum(noise @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"][None], 0)
    logits = hidden @ params["out"]["kernel"] + params["out"]["bias"][None]
    return 1 / (1 + jnp.exp(-logits))


def judged_by_hand(params, pixels):
    pieces = pixels @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"][None]
    hidden = jnp.maximum(pieces[:, 0::2], pieces[:, 1::2])
    return 1 / (1 + jnp.exp(-(hidden @ params["out"]["kernel"] + params["out"]["bias"][None])[:, 0]))


def discriminators_by_hand(own, other, pixels, noise):
    real, fake = judged_by_hand(own, pixels), judged_by_hand(own, made_by_hand(other, noise))
    return -(jnp.log(real).mean() + jnp.log(1 - fake).mean()) / 2


def generators_by_hand(own, other, pixels, noise, objective):
    fake = judged_by_hand(other, made_by_hand(own, noise))
    return jnp.log(1 - fake).mean() if objective == "minimax" else -jnp.log(fake).mean()


@pytest.mark.parametrize(
    ("k", "objective", "reuse", "parts"),
    [(1, "minimax", False, 1), (3, "non_saturating", True, 2)],
)
def test_updates_by_hand(k, objective, reuse, parts):
    """Two cycles: whose turn it is learns, by SGD with momentum and a warm-up of its own, and nothing else changes."""
    settings = {
        "generator": dataclasses.replace(SGD, accumulation=parts),
        "discriminator": dataclasses.replace(SGD, learning_rate=0.5, momentum=0.8, accumulation=parts),
    }
    recipe = gan_recipe(
        optimizer=settings["generator"],
        discriminator_optimizer=settings["discriminator"],
        discriminator_steps=k,
        objective=objective,
        reuse_noise=reuse,
    )
    task, mesh = recipe.build({}), make_mesh(devices=jax.devices()[:1])
    abstract = abstract_state(task, mesh)
    state, step = create_state(task, abstract), make_step(task, mesh, abstract)
    by_hand = {
        "discriminator": discriminators_by_hand,
        "generator": functools.partial(generators_by_hand, objective=objective),
    }
    gradients = {player: jax.jit(jax.value_and_grad(loss)) for player, loss in by_hand.items()}
    params = jax.device_get(state["params"])
    velocity, counts = jax.tree.map(np.zeros_like, params), dict.fromkeys(PLAYERS, 0)
    stage_key, base = jax.device_get(jax.random.key_data(state["key"])), None

    for number in range(2 * (k + 1)):
        player, other = PLAYERS if number % (k + 1) == k else PLAYERS[::-1]
        key = jax.random.fold_in(jax.random.wrap_key_data(stage_key), number)
        if player == "discriminator" or not reuse:
            base = jax.random.split(key if parts == 1 else jax.random.fold_in(key, 0), 3)[0]
        batch = images_of(number)
        found = []
        for part in range(parts):
            pixels = np.float32(batch[part::parts].reshape(BATCH // parts, -1) / 255)
            noise = gan_noise(jax.random.fold_in(base, part), task.module, BATCH // parts)
            players = {one: (params[one], params[two]) for one, two in (PLAYERS, PLAYERS[::-1])}
            found.append({one: gradients[one](*both, pixels, noise) for one, both in players.items()})
        found = jax.tree.map(lambda *parts: np.mean(parts, 0), *found)
        gradient = found[player][1]
        rate = settings[player].learning_rate * min((counts[player] + 1) / 3, 1)
        momentum = settings[player].momentum
        velocity[player] = jax.tree.map(lambda v, g, m=momentum: m * v + g, velocity[player], gradient)
        before, expected = params, jax.tree.map(lambda p, v, r=rate: p - r * v, params[player], velocity[player])

        state, report = step(state, {"image": jnp.asarray(batch)}, {})
        params, report = jax.device_get((state["params"], report))
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, params[player], expected)
        jax.tree.map(np.testing.assert_array_equal, params[other], before[other])
        counts[player] += 1
        for one, (value, slope) in found.items():
            assert report[f"{one}_loss"] == pytest.approx(float(value), rel=1e-5)
            norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(slope)))
            assert report[f"{one}_gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert report["loss"] == pytest.approx(float(sum(value for value, _ in found.values())), rel=1e-5)
        if player == "generator":
            assert report["learning_rate"] == pytest.approx(rate)
    extra = jax.device_get(state["extra"])
    assert (extra["step"], extra["micro_batch"], counts["generator"]) == (2 * (k + 1), 0, 2)
    assert [recipe.steps_of(player) for player in PLAYERS] == ([4, 4] if k == 1 else [2, 6])


def test_dropout_of_the_discriminator():
    """Another mask for real and for generated images, of each key its own, and none in validation."""
    module = gan(discriminator=MaxoutDiscriminator((), keep_input=0.5), channels=1)
    task = gan_recipe(module).build({})
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), jax.eval_shape(task.init, jax.random.key(0)))
    params["discriminator"]["out"]["kernel"] += 1.0  # of 16 pixels of about one half: the logit is how many are kept
    batch = {"image": jnp.full((BATCH, SIZE, SIZE, 3), 128, jnp.uint8)}

    @jax.jit
    def run(params, key):
        return task.loss(params, batch, key, {}, task.init_extra())[1], task.validate(params, batch, key, {})

    found = [run(params, jax.random.key(seed)) for seed in range(2)]
    real, fake = ([one[0][f"{kind}_probability"] for one in found] for kind in ("real", "fake"))
    assert all(abs(np.log((1 - a) / (1 - b))) > 0.1 for a, b in ((real[0], real[1]), (real[0], fake[0])))
    assert found[0][0]["generator_loss"] != found[1][0]["generator_loss"]
    assert found[0][1]["generator_loss"] == pytest.approx(math.log1p(math.exp(-8)), rel=1e-4)
    assert found[0][1]["generator_loss"] == found[1][1]["generator_loss"]


# Metrics


def test_validation_and_previews_by_hand():
    module = gan(channels=1)
    recipe = gan_recipe(module, objective="minimax", discriminator_optimizer=Optimizer(name="adam"))
    task = recipe.build({})
    params, batch = jax.jit(task.init)(jax.random.key(0)), {"image": jnp.asarray(images_of(0))}
    key = jax.random.key(1)
    found, shown = jax.jit(lambda p: (task.validate(p, batch, key, {}), task.preview(p, batch, key, {})))(params)
    pixels = np.asarray(batch["image"], float).mean(-1).round().reshape(BATCH, -1) / 255
    made = np.asarray(made_by_hand(params["generator"], gan_noise(key, module, BATCH)), float)
    real, fake = (
        np.asarray(judged_by_hand(params["discriminator"], np.float32(values)), float) for values in (pixels, made)
    )
    value = np.log(real).mean() + np.log(1 - fake).mean()  # V(G, D), Eq. 1
    expected = {
        "loss": (value + math.log(4)) / 2,
        "discriminator_loss": -value / 2,
        "generator_loss": np.log(1 - fake).mean(),
        "real_accuracy": (real > 0.5).mean(),
        "fake_accuracy": (fake < 0.5).mean(),
        "real_probability": real.mean(),
        "fake_probability": fake.mean(),
    }
    assert set(found) == {*expected, "sample_distance", "data_distance"}
    for name, number in expected.items():
        assert found[name] == pytest.approx(number, rel=1e-4, abs=1e-5), name
    for name, values in (("sample_distance", made), ("data_distance", pixels)):
        pairs = [np.mean((2 * a - 2 * b) ** 2) for n, a in enumerate(values) for b in values[:n]]
        assert found[name] == pytest.approx(np.sqrt(np.mean(pairs)), rel=1e-4)
    np.testing.assert_array_equal(shown, np.broadcast_to(shown[..., :1], (BATCH, SIZE, SIZE, 3)))
    np.testing.assert_allclose(shown[..., 0].reshape(BATCH, -1), made * 255, atol=0.51)
    training = recipe.describe()["training"]
    assert training["discriminator_optimizer"]["name"] == "adam" and training["objective"] == "minimax"
    assert not recipe.reads_captions and not task.batch_spec.captions and task.batch_spec.image_size == SIZE


def test_the_output_bias_starts_at_the_mean_image():
    task, mesh = gan_recipe(gan(channels=1), bias_batches=2).build({}), make_mesh(devices=jax.devices()[:1])
    batches = [images_of(seed) for seed in range(2)]
    for batch in batches:
        batch[:, 0, 0], batch[:, 0, 1] = 0, 255  # whose logits are infinite
    fitted = task.fit(iter({"image": jnp.asarray(batch)} for batch in batches), {}, mesh, print)
    abstract = abstract_state(task, mesh)
    started, plain = create_state(task, abstract, fitted=fitted)["params"], create_state(task, abstract)["params"]
    grey = np.concatenate(batches).astype(float).mean(-1).round() / 255
    mean = np.asarray(made_by_hand(started["generator"], jnp.zeros((1, LATENTS))))
    np.testing.assert_allclose(mean.ravel(), grey.mean(0).ravel(), atol=1e-6)
    assert np.isfinite(started["generator"]["out"]["bias"]).all()
    for tree in (started, plain):
        tree["generator"]["out"].pop("bias")
    jax.tree.map(np.testing.assert_array_equal, started, plain)
    assert gan_recipe().build({}).fit(iter(()), {}, mesh, print) == {}


# The loop


class BrightBatches(ToyBatches):
    """Images that a generator makes only when it has learned to."""

    def __next__(self):
        batch = super().__next__()
        return {**batch, "image": batch["image"] // 8 + np.uint8(220)}


def train(folder, recipe, stop=None):
    lines = []
    batches = BrightBatches(recipe.batch_size)
    place = {"stage_name": "gan", "stage_dir": folder, "batches": lambda: batches, "log": lines.append}
    settings = {"mesh": make_mesh(devices=jax.devices()[:1]), "options": LoopOptions(stop_after_steps=stop)}
    result = run(recipe.build({}), **place, **settings, validation=[next(BrightBatches(recipe.batch_size))])
    return result, lines


@pytest.mark.slow
def test_it_goes_on_within_a_cycle(tmp_path):
    """Stopped after two of the discriminator's three steps: what follows is bit-equal."""
    adam = Optimizer(name="adam", learning_rate=1e-2, warmup_steps=2)
    every = {"log_every": 1, "validate_every": 4, "preview_every": 8, "checkpoint_every": 4}
    recipe = gan_recipe(optimizer=adam, discriminator_optimizer=SGD, discriminator_steps=3, reuse_noise=True, **every)
    assert train(tmp_path / "whole", recipe)[0].finished
    stopped, _ = train(tmp_path / "parts", recipe, stop=2)
    assert stopped.step == 2 and train(tmp_path / "parts", recipe)[0].finished
    for part in ("params", "ema", "optimizer", "extra"):
        whole, parts = (load_part(tmp_path / name, part)[0] for name in ("whole", "parts"))
        jax.tree.map(np.testing.assert_array_equal, whole, parts)
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert texts[0] == texts[1]
    assert (tmp_path / "whole" / "samples" / "step_8.png").is_file() and read_record(tmp_path / "whole").kind == "gan"


def test_the_user_hears_that_the_discriminator_has_won(tmp_path):
    """Once, in the line after the numbers that show it."""
    fast = Optimizer(name="adam", learning_rate=0.1, warmup_steps=0)
    still = Optimizer(name="sgd", learning_rate=0.0, warmup_steps=0)
    every = {"log_every": 20, "validate_every": 0, "preview_every": 0, "checkpoint_every": 0}
    players = {"optimizer": still, "discriminator_optimizer": fast, "discriminator_steps": 3}
    recipe = gan_recipe(**players, steps=120, **every)
    _, lines = train(tmp_path, recipe)
    said = [line for line in lines if FAILURES["discriminator_won"] in line]
    assert len(said) == 1 and lines[lines.index(said[0]) - 1].startswith(said[0].split(" | ")[0])
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    task = recipe.build({})
    remarks = [task.remark(record["step"], record) for record in records]
    assert remarks[0] is None and remarks[-2:] == [FAILURES["discriminator_won"]] * 2
    assert task.remark(recipe.steps // 10, records[-1]) is None  # so early it means nothing


@pytest.mark.slow
def test_it_learns_two_colours_on_a_mesh():
    """Both of them, in about the right shares, but for what a continuous function makes between; on two devices."""
    discriminator = MaxoutDiscriminator((32,), pieces=2, keep_input=1.0, keep_hidden=1.0, init_range=0.3)
    module = GAN(MLPGenerator((32,), init_range=0.5), discriminator, 4, 2, 3, noise="normal")
    adam = Optimizer(name="adam", learning_rate=1e-2, beta1=0.5, warmup_steps=0, ema_decay=0.99)
    recipe = GANRecipe(module=module, steps=500, batch_size=64, optimizer=adam)
    task, mesh = recipe.build({}), make_mesh(data=2, devices=jax.devices()[:2])
    abstract = abstract_state(task, mesh)
    state, step = create_state(task, abstract), make_step(task, mesh, abstract)
    colours = np.array([[200, 60, 90], [50, 190, 140]])
    images = colours[np.arange(64) % 2][:, None, None] + np.random.default_rng(0).integers(-20, 21, (64, 2, 2, 1))
    batch = {"image": images.astype(np.uint8)}

    @jax.jit
    def shares(params):
        """Of samples near each colour."""
        made = 127.5 * (sample_gan(jax.random.key(5), module, params, 400) + 1)
        distances = jnp.sqrt(((made[:, None] - colours[None, :, None, None]) ** 2).mean((2, 3, 4)))
        return (distances < 40).mean(0)

    assert shares(state["ema"]).sum() < 0.2
    train = jax.jit(lambda state: jax.lax.scan(lambda state, _: step(state, batch, {}), state, length=recipe.steps)[0])
    state = train(state)
    found = shares(state["ema"])
    assert found.sum() > 0.65 and found.min() > 0.25 and state["skipped"] == 0


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: gan_recipe(discriminator_steps=0), "gan.discriminator_steps is 0; it must be 1 or more, since"),
        (lambda: gan_recipe(objective="wasserstein"), "'wasserstein'; it must be non_saturating or minimax"),
        (lambda: gan_recipe(bias_batches=-1), "gan.bias_batches is -1; it must be 0 or more"),
        (lambda: gan_recipe(gan(channels=2)), r"gan.module.channels is 2; it must be 1 \(grey\) or 3 \(colour\)"),
        (
            lambda: gan_recipe(GAN(ConvGenerator(), ConvDiscriminator(), image_size=8), bias_batches=1),
            "a ConvGenerator has no output bias for each pixel; set gan.bias_batches=0",
        ),
        (lambda: gan_recipe(gan(generator=MLPGenerator(dtype="half"))), "gan.module.generator.dtype is 'half'"),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")
