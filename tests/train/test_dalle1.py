"""The recipe of DALL-E 1: its losses by hand, dropped captions, learning two images, and the paper's step lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.checkpoint import LoadedStage, StageRecord
from dalle2_jax.data.dataset import Data
from dalle2_jax.errors import InputError
from dalle2_jax.layers.transformer import Transformer
from dalle2_jax.lineage.dalle1 import DALLE1
from dalle2_jax.lineage.dalle1_sampling import DALLE1Sampling
from dalle2_jax.lineage.dvae import DVAE
from dalle2_jax.sharding import make_mesh
from tests.lowering import DEVICES, analyse, pretended
from train.config.optimizer import Optimizer
from train.config.system import System
from train.recipes.dalle1 import DALLE1Recipe, DALLE1Task
from train.recipes.dvae import DVAERecipe
from train.step.lower import trace_step
from train.step.state import abstract_state, create_state
from train.step.step import make_step

TEXT, VOCABULARY, CODEBOOK, GRID, BATCH = 4, 9, 6, 2, 8
DISCRETE = DVAE(image_size=4, codebook_size=CODEBOOK, code_width=8, width=8, multipliers=(1, 2), blocks=1)
MODULE = DALLE1(
    transformer=Transformer(width=16, depth=2, heads=2, is_causal=True),
    vocabulary_size=VOCABULARY,
    context_length=TEXT,
    codebook_size=CODEBOOK,
    grid=GRID,
    window=3,
)


def recipe(**changes) -> DALLE1Recipe:
    module = MODULE.clone(**{name: changes.pop(name) for name in ("codebook_size", "grid") if name in changes})
    return DALLE1Recipe(**{"module": module, "steps": 60, "batch_size": BATCH, **changes})


@pytest.fixture(scope="module")
def dvae() -> LoadedStage:
    """Random, and larger than initial parameters are, so that its codes differ."""
    shapes = jax.eval_shape(DISCRETE.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jax.random.key(0))["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)
    return LoadedStage(DISCRETE, params, StageRecord.of({"stage": "dvae", "kind": "dvae", "module": DISCRETE}))


@pytest.fixture(scope="module")
def batch():
    """Four images each of two colours, with a caption for either."""
    first = np.arange(BATCH) % 2 == 0
    colours = np.where(first[:, None], [250, 20, 90], [10, 240, 30])[:, None, None]
    noise = np.random.default_rng(0).integers(0, 60, (2, 8, 8, 3))
    images = np.clip(colours + noise[first.astype(int)] - 30, 0, 255).astype(np.uint8)
    tokens = np.where(first[:, None], [1, 3, 4, 2], [1, 5, 2, 0]).astype(np.int32)
    return {"image": images, "tokens": tokens, "mask": tokens > 0}


def task_of(dvae, **changes) -> DALLE1Task:
    return recipe(**changes).build({"dvae": dvae})


def test_the_losses_of_constant_logits(dvae, batch):
    """Without weights but the biases of the outputs, each token costs what its bias says, and the codes are those of
    the frozen dVAE for images of its own size."""
    task = task_of(dvae, text_weight=0.25)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    rng = np.random.default_rng(1)
    for name in ("text_out", "image_out"):
        params[name]["bias"] = rng.normal(size=params[name]["bias"].shape).astype(np.float32)

    @jax.jit
    def run(params, batch):
        key, frozen = jax.random.key(0), task.frozen
        loss, metrics, _ = task.loss(params, batch, key, frozen, None)
        return {"loss": loss, **metrics}, task.validate(params, batch, key, frozen)

    found, validated = run(params, batch)
    small = batch["image"].reshape(BATCH, 4, 2, 4, 2, 3).mean((2, 4)).round() / 127.5 - 1
    codes = np.asarray(DISCRETE.apply({"params": dvae.params}, jnp.float32(small), method="encode"))
    assert codes.shape == (BATCH, GRID, GRID) and len(np.unique(codes)) > 1
    text, image = (
        np.log(np.exp(params[name]["bias"].astype(float)).sum()) - params[name]["bias"].astype(float)
        for name in ("text_out", "image_out")
    )
    expected = {"text_loss": text[batch["tokens"][batch["mask"]]].mean(), "image_loss": image[codes].mean()}
    expected["loss"] = 0.25 * expected["text_loss"] + 0.75 * expected["image_loss"]
    for metrics in (found, validated):
        assert metrics == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_captions_are_dropped_as_often_as_said(dvae, batch):
    """Of one image many times over: its loss lies between that with its caption and that without, by their shares."""
    count, task = 256, task_of(dvae, text_drop=0.3)
    one = {name: value[:1] for name, value in batch.items()}
    many = {name: np.repeat(value, count, axis=0) for name, value in one.items()}

    @jax.jit
    def run(key):
        params = jax.tree.map(lambda leaf: 5 * leaf, task.init(jax.random.key(1)))
        none = {**one, "mask": jnp.zeros((1, TEXT), bool)}
        kept, empty = (task.validate(params, batch, key, task.frozen) for batch in (one, none))
        return kept, empty, task.loss(params, many, key, task.frozen, None)[1]

    kept, empty, found = run(jax.random.key(0))
    assert kept["text_loss"] > 0 and empty["text_loss"] == 0
    assert found["text_loss"] == pytest.approx(float(kept["text_loss"]), rel=1e-5)
    apart = empty["image_loss"] - kept["image_loss"]
    dropped = count * (found["image_loss"] - kept["image_loss"]) / apart
    assert abs(apart) > 1e-2 and abs(dropped - 0.3 * count) < 4 * np.sqrt(count * 0.3 * 0.7)


@pytest.mark.slow
def test_two_images_are_learned_on_a_mesh(dvae, batch):
    """On two devices: the codes of both captions become certain, and previews are what the dVAE makes of them."""
    task = task_of(
        dvae,
        optimizer=Optimizer(name="adam", learning_rate=1e-2, warmup_steps=1),
        text_drop=0.1,
        sampling=DALLE1Sampling(top_p=0.9, guidance_scale=1.5),
    )
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    abstract = abstract_state(task, mesh)
    state, step = create_state(task, abstract), make_step(task, mesh, abstract)
    reports = []
    for _ in range(task.recipe.steps):
        state, report = step(state, batch, task.frozen)
        reports.append(report)
    first, last = jax.device_get((reports[0], reports[-1]))
    assert first["image_loss"] > 1 and last["image_loss"] < 0.5
    assert last["loss"] == pytest.approx(last["text_loss"] / 8 + last["image_loss"] * 7 / 8, rel=1e-4)

    @jax.jit
    def run(params, batch, key):
        images = jnp.float32(batch["image"]).reshape(BATCH, 4, 2, 4, 2, 3).mean((2, 4)).round() / 127.5 - 1
        rebuilt = DISCRETE.apply({"params": dvae.params}, images, method="reconstruct")
        return task.preview(params, batch, key, task.frozen), jnp.round((rebuilt + 1) * 127.5).astype(jnp.uint8)

    shown, rebuilt = run(jax.device_get(state["params"]), batch, jax.random.key(5))
    assert shown.shape == (BATCH, 4, 4, 3) and shown.dtype == jnp.uint8
    np.testing.assert_array_equal(shown, rebuilt)
    assert (rebuilt[0] != rebuilt[1]).any()


def test_what_is_recorded_and_read(dvae):
    own = recipe(text_drop=0.2, sampling=DALLE1Sampling(top_k=3))
    record = StageRecord.of({"stage": "dalle1", **own.describe()})
    assert record.rebuilt("module") == MODULE and record.rebuilt("sampling") == own.sampling
    assert record.training == {"text_weight": 1 / 8, "text_drop": 0.2}
    task = own.build({"dvae": dvae})
    assert own.reads_captions and own.needs == ("dvae",) and task.batch_spec.captions
    assert task.batch_spec.image_size == 4 and set(task.frozen) == {"dvae"}


@pytest.mark.slow
def test_the_papers_step_is_lowered():
    """12 billion parameters over 1024 images, for a GPU: one layer's program, and no large product in float32 but those
    of the logits, which App. D has in float32."""
    discrete = DVAERecipe(module=DVAE(dtype="bfloat16"), steps=1, batch_size=1)
    transformer = Transformer(width=3968, depth=64, heads=62, is_causal=True, remat=True, dtype="bfloat16")
    own = DALLE1Recipe(module=DALLE1(transformer=transformer), steps=430_000, batch_size=1024)
    stages = {"dvae": discrete, "dalle1": own}
    system = System(name="dalle1", data=Data(name="none"), stages=stages, vocabulary_size=16_384, context_length=256)
    params = jax.eval_shape(discrete.build({}).init, jax.random.key(0))
    record = StageRecord.of({"stage": "dvae", **discrete.describe()})
    task = own.build({"dvae": LoadedStage(discrete.module, params, record)})
    with pretended(DEVICES["cuda"]) as mesh:
        abstract = abstract_state(task, mesh)
        lowered = trace_step(system, task, abstract, mesh).lower(lowering_platforms=("cuda",))
    program = analyse(lowered)
    assert program.float32_products(r"(text|image)_out/|DVAE") == []
    state, given, _ = lowered.args_info[0]
    assert given["image"].shape == (1024, 256, 256, 3) and given["tokens"].shape == (1024, 256)
    _, metrics = lowered.out_info
    assert {"loss", "text_loss", "image_loss"} <= set(metrics) and metrics["loss"].dtype == jnp.float32
    assert jax.tree.structure(state["params"]) == jax.tree.structure(abstract["params"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"grid": 3}, "dalle1.module.grid is 3 and the dVAE's is 2; set dalle1.module.grid=2"),
        ({"codebook_size": 5}, "dalle1.module.codebook_size is 5 and the dVAE's is 6"),
        ({"text_drop": 1.5}, "dalle1.text_drop is 1.5; it must lie in 0 to 1"),
        ({"text_weight": -0.1}, "dalle1.text_weight is -0.1; it must lie in 0 to 1"),
        ({"codebook_size": 0}, "dalle1.module.codebook_size is 0; it must be 1 or more"),
    ],
)
def test_refused(dvae, changes, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        task_of(dvae, **changes)
    assert not str(error.value).endswith(".")


def test_a_tokenizer_of_another_length_is_refused():
    with pytest.raises(InputError, match="dalle1.module.context_length is 4 but captions have 5 tokens"):
        System(
            name="it", data=Data(name="none"), stages={"dalle1": recipe()}, vocabulary_size=VOCABULARY, context_length=5
        )
