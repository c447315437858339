"""The recipes of the autoencoder and the VAE: metrics by hand, binarised pixels, training steps, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.errors import InputError
from dalle2_jax.lineage.autoencoder import Autoencoder, ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from dalle2_jax.lineage.vae import VAE
from dalle2_jax.sharding import make_mesh
from train.config.optimizer import Optimizer
from train.recipes.autoencoder import AutoencoderRecipe, VAERecipe
from train.step.state import abstract_state, create_state
from train.step.step import make_step

SIZE, BATCH, LATENTS = 4, 8, 3
NETWORKS = {"encoder": MLPEncoder((6,)), "decoder": MLPDecoder((6,)), "latent_size": LATENTS, "image_size": SIZE}
METRICS = {"reconstruction", "kl", "negative_elbo", "bits_per_dimension", "active_units", "psnr"}


def vae_recipe(**changes) -> VAERecipe:
    module = {name: changes.pop(name) for name in ("likelihood", "sigma", "channels", "image_size") if name in changes}
    return VAERecipe(module=VAE(**{**NETWORKS, **module}), **{"steps": 4, "batch_size": BATCH, **changes})


def ae_recipe(**module) -> AutoencoderRecipe:
    return AutoencoderRecipe(module=Autoencoder(**{**NETWORKS, **module}), steps=4, batch_size=BATCH)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {"image": jnp.asarray(rng.integers(0, 256, (BATCH, SIZE, SIZE, 3)), jnp.uint8)}


def constant(task, biases):
    """Parameters that are zero but for biases of these layers: what the network says whatever it sees."""
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), jax.eval_shape(task.init, jax.random.key(0)))
    for name, bias in biases.items():
        layer = params["decoder"]["out"] if name == "out" else params[name]
        layer["bias"] = np.broadcast_to(np.float32(bias), layer["bias"].shape)
    return params


def test_the_autoencoders_numbers_by_hand(batch):
    task = ae_recipe(channels=3).build({})
    params = constant(task, {"out": 0.2})
    x = np.asarray(batch["image"], float) / 127.5 - 1
    error = np.mean((x - 0.2) ** 2)

    @jax.jit
    def run(params, batch):
        loss, metrics, extra = task.loss(params, batch, jax.random.key(0), {}, None)
        key = jax.random.key(1)
        return loss, metrics, task.validate(params, batch, key, {}), task.preview(params, batch, key, {})

    loss, metrics, validated, shown = run(params, batch)
    assert loss == pytest.approx(error, rel=1e-5) and validated["loss"] == loss and set(metrics) == {"psnr"}
    # As evaluation/metrics/psnr.py, of pixels in 0..255.
    expected = 10 * np.log10(255**2 / np.mean((x * 127.5 - 0.2 * 127.5) ** 2))
    assert metrics["psnr"] == pytest.approx(expected, rel=1e-5) and validated["psnr"] == metrics["psnr"]
    assert shown.dtype == jnp.uint8
    np.testing.assert_array_equal(shown, np.full((BATCH, SIZE, SIZE, 3), round(1.2 * 127.5)))
    assert not task.recipe.reads_captions and not task.batch_spec.captions and task.batch_spec.image_size == SIZE


def test_the_vaes_numbers_by_hand(batch):
    """Grey pixels of a colour image twice as large, a posterior that is the same for all, and pixels of 0.7."""
    recipe = vae_recipe(beta=3.0, free_bits=0.4)
    task = recipe.build({})
    assert recipe.describe()["training"] == {
        "beta": 3.0,
        "free_bits": 0.4,
        "binarise": None,
        "importance_samples": 8,
    }
    means, log_variances, logit = np.array([1.0, 0.0, 0.5]), np.array([0.0, -2.0, 0.1]), np.log(7 / 3)
    params = constant(task, {"mean": means, "log_variance": log_variances, "out": logit})
    small = np.asarray(batch["image"], float).mean(-1, keepdims=True).round()
    images = {"image": jnp.repeat(jnp.repeat(batch["image"], 2, 1), 2, 2)}

    @jax.jit
    def run(params, batch):
        loss, metrics, _ = task.loss(params, batch, jax.random.key(0), {}, None)
        key = jax.random.key(1)
        return loss, metrics, task.validate(params, batch, key, {}), task.preview(params, batch, key, {})

    loss, metrics, validated, shown = run(params, images)
    x = small / 255
    reconstruction = -(x * np.log(0.7) + (1 - x) * np.log(0.3)).reshape(BATCH, -1).sum(1).mean()
    kl = 0.5 * (means**2 + np.exp(log_variances) - 1 - log_variances)
    assert set(metrics) == METRICS and set(validated) == METRICS | {"loss", "importance_bound"}
    assert metrics["reconstruction"] == pytest.approx(reconstruction, rel=1e-5)
    assert metrics["kl"] == pytest.approx(kl.sum(), rel=1e-5)
    assert metrics["negative_elbo"] == pytest.approx(reconstruction + kl.sum(), rel=1e-5)
    assert metrics["bits_per_dimension"] == pytest.approx((reconstruction + kl.sum()) / 16 / np.log(2), rel=1e-5)
    assert loss == pytest.approx(reconstruction + 3 * np.maximum(kl, 0.4).sum(), rel=1e-5)
    assert validated["loss"] == pytest.approx(float(loss), rel=1e-6) and metrics["active_units"] == 0
    assert metrics["psnr"] == pytest.approx(10 * np.log10(4 / np.mean((2 * x - 1 - 0.4) ** 2)), rel=1e-5)
    # What is seen says nothing of z, so that log p(x) is the reconstruction, and the bound lies between.
    assert reconstruction - 0.5 < validated["importance_bound"] < validated["negative_elbo"]
    np.testing.assert_array_equal(shown, np.full((BATCH, SIZE, SIZE, 3), round(0.7 * 255)))


def test_binarised_pixels_are_as_often_white_as_they_are_bright():
    levels = np.array([0, 64, 128, 255], np.uint8)
    batch = {"image": jnp.asarray(np.broadcast_to(levels[:, None, None, None], (4, 48, 48, 3)))}
    tasks = [vae_recipe(binarise=name, image_size=48).build({}) for name in ("sample", "threshold", None)]
    images = jax.jit(lambda batch, key: [task._images(batch, key) for task in tasks])
    sampled, cut, grey = images(batch, jax.random.key(0))
    again = images(batch, jax.random.key(1))[0]
    assert set(np.unique(sampled)) == set(np.unique(cut)) == {-1.0, 1.0} and (again != sampled).any()
    np.testing.assert_allclose((sampled > 0).mean((1, 2, 3)), levels / 255, atol=4 * 0.5 / 48)
    np.testing.assert_array_equal((cut > 0).mean((1, 2, 3)), [0, 0, 1, 1])
    np.testing.assert_allclose(grey[:, 0, 0, 0], levels / 127.5 - 1, atol=1e-6)


@pytest.mark.slow
def test_a_convolutional_vae_learns_on_a_mesh():
    """Two images over and over, on two devices: the bound falls below that of the best single colour."""
    module = VAE(
        ConvEncoder((8,), "silu"), ConvDecoder((8,), "silu"), LATENTS, SIZE, 3, likelihood="discretized_gaussian"
    )
    optimizer = Optimizer(name="adam", learning_rate=1e-2, warmup_steps=1)
    recipe = VAERecipe(module=module, steps=100, batch_size=BATCH, optimizer=optimizer)
    task, mesh = recipe.build({}), make_mesh(data=2, devices=jax.devices()[:2])
    abstract = abstract_state(task, mesh)
    state, step = create_state(task, abstract), make_step(task, mesh, abstract)
    colours = np.where(np.arange(BATCH)[:, None] % 2, [200, 30, 90], [20, 220, 100])
    batch = {"image": np.broadcast_to(colours[:, None, None].astype(np.uint8), (BATCH, SIZE, SIZE, 3))}
    reports = [None] * recipe.steps
    for number in range(recipe.steps):
        state, reports[number] = step(state, batch, {})
    first, last = jax.device_get((reports[0], reports[-1]))
    spread = (colours / 127.5 - 1).std(0)
    single = np.log2(np.sqrt(2 * np.pi * np.e) * spread / (2 / 255)).mean()
    assert first["bits_per_dimension"] > single > last["bits_per_dimension"] + 0.5
    assert last["psnr"] > first["psnr"] + 10 and last["active_units"] >= 1 and last["kl"] > np.log(2) - 0.05


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: vae_recipe(beta=-1.0), "vae.beta is -1.0; it must be 0 or more"),
        (lambda: vae_recipe(free_bits=-0.1), "vae.free_bits is -0.1; it must be 0 or more"),
        (lambda: vae_recipe(likelihood="poisson"), "the likelihood is 'poisson'; it must be one of bernoulli"),
        (lambda: vae_recipe(binarise="dither"), "vae.binarise is 'dither'; it must be None, sample or threshold"),
        (lambda: vae_recipe(binarise="sample", likelihood="gaussian"), "set vae.module.likelihood=bernoulli, or"),
        (lambda: vae_recipe(importance_samples=0), "vae.importance_samples is 0; it must be 1 or more"),
        (lambda: vae_recipe(channels=2), r"vae.module.channels is 2; it must be 1 \(grey\) or 3 \(colour\)"),
        (lambda: ae_recipe(channels=4), "autoencoder.module.channels is 4"),
        (lambda: ae_recipe(latent_size=0), "latent_size is 0; it must be 1 or more"),
        (lambda: ae_recipe(encoder=ConvEncoder((4, 4, 4))), "image_size is 4, which cannot be halved 3 times"),
        (lambda: ae_recipe(param_dtype="int8"), "autoencoder.module.param_dtype is 'int8'; it must be one of float32"),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")
