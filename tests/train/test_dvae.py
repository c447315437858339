"""The recipe of the discrete VAE: metrics by hand, its schedules, crops, and that its codes tell colours apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.errors import InputError
from dalle2_jax.lineage.dvae import DVAE, CosineSchedule
from dalle2_jax.sharding import make_mesh
from train.config.optimizer import Optimizer
from train.recipes.augment import resized_crop
from train.recipes.dvae import DVAERecipe
from train.step.state import abstract_state, create_state
from train.step.step import make_step

SIZE, BATCH, CODES = 8, 8, 6
TINY = DVAE(image_size=SIZE, codebook_size=CODES, code_width=8, width=8, multipliers=(1, 2), blocks=1)
TRAINING = {"reconstruction", "kl", "negative_elbo", "bits_per_dimension", "perplexity", "usage"}


def recipe(**changes) -> DVAERecipe:
    return DVAERecipe(**{"module": TINY, "steps": 4, "batch_size": BATCH, **changes})


def test_the_numbers_by_hand():
    """A network that says the same whatever it sees, and images twice as large as its own."""
    made = recipe(temperature=CosineSchedule(1.0, 0.5, 8), kl_weight=CosineSchedule(0.0, 4.0, 8))
    task = made.build({})
    assert made.describe()["training"] == {"temperature": made.temperature, "kl_weight": made.kl_weight, "crop": False}
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8)
    batch = {"image": jnp.repeat(jnp.repeat(pixels, 2, 1), 2, 2)}
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), jax.eval_shape(task.init, jax.random.key(0)))
    logits, mean, log_scale = np.array([0, 2, 1, 0, -1, 0.5]), np.array([-0.5, 0.1, 1.0]), np.array([0.3, -0.2, 0.0])
    params["encoder"]["output"]["bias"] = np.float32(logits)
    params["decoder"]["output"]["bias"] = np.float32(np.concatenate([mean, log_scale]))

    @jax.jit
    def run(params, batch, extra):
        key = jax.random.key(1)
        return (
            task.loss(params, batch, key, {}, extra),
            task.validate(params, batch, key, {}),
            task.preview(params, batch, key, {}),
        )

    (loss, metrics, extra), validated, shown = run(params, batch, jnp.int32(2))
    x = 0.8 * pixels / 255 + 0.1
    density = np.exp(-np.abs(np.log(x / (1 - x)) - mean) / np.exp(log_scale)) / (2 * np.exp(log_scale) * x * (1 - x))
    reconstruction = -np.log(density).reshape(BATCH, -1).sum(1).mean()
    q = np.exp(logits) / np.exp(logits).sum()
    kl = 16 * (q * np.log(q * CODES)).sum()
    weight = 4 * (1 - np.cos(np.pi / 4)) / 2
    assert int(extra) == 3 and set(metrics) == TRAINING | {"temperature", "kl_weight"}
    assert metrics["temperature"] == pytest.approx(0.5 + 0.25 * (1 + np.cos(np.pi / 4)), rel=1e-6)
    assert metrics["kl_weight"] == pytest.approx(weight, rel=1e-5)
    assert loss == pytest.approx((reconstruction + weight * kl) / (SIZE * SIZE * 3), rel=1e-5)
    assert set(validated) == TRAINING | {"loss", "relaxed_negative_elbo", "psnr"}
    assert validated["loss"] == pytest.approx((reconstruction + 4 * kl) / (SIZE * SIZE * 3), rel=1e-5)
    assert validated["relaxed_negative_elbo"] == pytest.approx(reconstruction + kl, rel=1e-5)
    for found in (metrics, validated):
        assert found["reconstruction"] == pytest.approx(reconstruction, rel=1e-5)
        assert found["kl"] == pytest.approx(kl, rel=1e-5)
        assert found["negative_elbo"] == pytest.approx(reconstruction + kl, rel=1e-5)
        bits = (reconstruction + kl) / (SIZE * SIZE * 3) / np.log(2)
        assert found["bits_per_dimension"] == pytest.approx(bits, rel=1e-5)
        assert found["perplexity"] == pytest.approx(1) and found["usage"] == pytest.approx(1 / CODES)
    colour = np.clip((1 / (1 + np.exp(-mean)) - 0.1) / 0.8, 0, 1)
    assert validated["psnr"] == pytest.approx(10 * np.log10(1 / np.mean((colour - pixels / 255) ** 2)), rel=1e-5)
    np.testing.assert_array_equal(shown, np.broadcast_to(np.round(255 * colour), (BATCH, SIZE, SIZE, 3)))


def test_the_schedules_count_steps_whatever_a_step_accumulates():
    made = recipe(optimizer=Optimizer(accumulation=2), temperature=CosineSchedule(1.0, 0.5, 2))
    task = made.build({})
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(task.init, jax.random.key(0)))
    batch = {"image": jnp.zeros((BATCH // 2, SIZE, SIZE, 3), jnp.uint8)}
    loss = jax.jit(lambda extra: task.loss(params, batch, jax.random.key(0), {}, extra)[1:])
    extra, temperatures = task.init_extra(), []
    for _ in range(6):
        metrics, extra = loss(extra)
        temperatures.append(float(metrics["temperature"]))
    np.testing.assert_allclose(temperatures, [1, 1, 0.75, 0.75, 0.5, 0.5], rtol=1e-6)


@pytest.mark.slow
def test_four_colours_become_codes():
    """Each cell of four colours has a code that no other colour has, of which the images come back, and relaxed codes
    are at the end as good as hard ones."""
    module = TINY.clone(codebook_size=16, code_width=32, width=32, least_scale=0.3)
    made = recipe(
        module=module,
        steps=120,
        batch_size=16,
        optimizer=Optimizer(name="adam", learning_rate=1e-2, warmup_steps=10),
        temperature=CosineSchedule(1.0, 1 / 16, 80),
        kl_weight=CosineSchedule(0.0, 4.0, 20),
    )
    task, mesh = made.build({}), make_mesh(data=1, devices=jax.devices()[:1])
    abstract = abstract_state(task, mesh)
    state, step = create_state(task, abstract), make_step(task, mesh, abstract)
    colours = np.array([[220, 40, 40], [40, 200, 60], [30, 60, 220], [240, 240, 240]], np.uint8)
    rng = np.random.default_rng(0)

    def draw():
        cells = rng.integers(0, 4, (16, module.grid, module.grid))
        return cells, colours[cells].repeat(module.cell, 1).repeat(module.cell, 2)

    reports = [None] * made.steps
    for number in range(made.steps):
        state, reports[number] = step(state, {"image": draw()[1]}, {})
    cells, pixels = draw()

    @jax.jit
    def run(params, pixels):
        codes = module.apply({"params": params}, pixels / 127.5 - 1, method="encode")
        return codes, task.validate(params, {"image": pixels}, jax.random.key(0), {})

    codes, found = run(state["params"], pixels)
    assert reports[-1]["loss"] < reports[0]["loss"] - 0.7 and found["psnr"] > 15
    counts = np.zeros((16, 4))
    np.add.at(counts, (np.ravel(codes), cells.ravel()), 1)
    assert counts.max(1).sum() > 0.95 * counts.sum() and found["perplexity"] > 3.5  # of codes, those of one colour
    assert abs(found["relaxed_negative_elbo"] - found["negative_elbo"]) < 0.1 * abs(found["negative_elbo"])


def test_crops_are_of_smaller_images_and_mirrored():
    """Each pixel of a ramp tells the column that it is from; the sides are 9/8 to 12/8 of the crop's."""
    task = recipe(module=TINY.clone(image_size=16), crop=True).build({})
    assert task.batch_spec.image_size == 24
    ramp = np.broadcast_to(np.arange(240, dtype=np.uint8)[None, :, None], (240, 240, 3))
    rng = np.random.default_rng(0)
    crops = [task.batch_spec.transform(ramp, rng)["image"] for _ in range(60)]
    assert {crop.shape for crop in crops} == {(16, 16, 3)}
    steps = np.array([np.diff(crop[8, 3:-3, 0].astype(float)).mean() for crop in crops])  # 240 / side a column
    assert 0.25 < (steps < 0).mean() < 0.75
    sides = np.round(240 / np.abs(steps)).astype(int)
    assert set(sides) <= set(range(17, 26)) and len(set(sides)) > 4
    # A source of the crop's own size is only mirrored.
    small = np.ascontiguousarray(ramp[:16, :16])
    found = {resized_crop(small, rng, size=16)["image"].tobytes() for _ in range(20)}
    assert found == {small.tobytes(), np.ascontiguousarray(small[:, ::-1]).tobytes()}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: recipe(temperature=CosineSchedule(1.0, 0.0, 5)), "dvae.temperature.end is 0.0; it must be above 0"),
        (lambda: recipe(kl_weight=CosineSchedule(-1.0, 1.0, 5)), "dvae.kl_weight.start is -1.0; it must be 0 or more"),
        (lambda: recipe(module=TINY.clone(channels=2)), r"dvae.module.channels is 2; it must be 1 \(grey\) or 3"),
        (
            lambda: resized_crop(np.zeros((8, 8, 3), np.uint8), np.random.default_rng(0), size=16),
            "an image of 8 x 8 pixels is smaller than the crops of 16; use larger images",
        ),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")
