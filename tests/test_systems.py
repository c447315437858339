"""Systems of any kind from their folders: which one a run is, what it samples, from Python and the command line."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import dalle2_jax
from dalle2_jax import DALLE2, cli
from dalle2_jax.checkpoint import CheckpointError
from dalle2_jax.errors import InputError
from dalle2_jax.lineage.autoencoder import Autoencoder, MLPDecoder, MLPEncoder, latent_moments, sample_autoencoder
from dalle2_jax.lineage.vae import VAE
from tests import cascade
from train.config.optimizer import Optimizer
from train.config.system import System
from train.recipes.autoencoder import AutoencoderRecipe, VAERecipe

SIZE = 8
NETWORKS = {"encoder": MLPEncoder((8,)), "decoder": MLPDecoder((8,)), "latent_size": 3, "image_size": SIZE}
SHORT = {
    "steps": 2,
    "batch_size": 8,
    "validation_batches": 1,
    "preview_count": 2,
    "optimizer": Optimizer(learning_rate=1e-3),
}


@pytest.fixture(scope="module")
def lineage(tiny, tmp_path_factory):
    """A run with an autoencoder of grey and a VAE of coloured images."""
    stages = {
        "autoencoder": AutoencoderRecipe(module=Autoencoder(**NETWORKS), **SHORT),
        "vae": VAERecipe(module=VAE(**NETWORKS, channels=3), **SHORT),
    }
    run = tmp_path_factory.mktemp("runs") / "lineage"
    result, _ = cascade.train(System(name="lineage", data=tiny.system.data, stages=stages), run)
    assert result.finished
    return run


def test_a_run_is_the_system_that_it_has(lineage, tiny, tmp_path):
    assert isinstance(dalle2_jax.load(tiny.run_dir), DALLE2)
    assert isinstance(dalle2_jax.load(tiny.run_dir / "decoder"), DALLE2)
    with pytest.raises(InputError, match=f"has several systems: autoencoder, vae; name one, such as {lineage}/vae"):
        dalle2_jax.load(lineage)
    (tmp_path / "vae").symlink_to(lineage / "vae")
    alone, named = dalle2_jax.load(tmp_path), dalle2_jax.load(lineage / "vae")
    assert repr(alone) == repr(named) == "VAEModel(vae: vae)" and not alone.reads_captions and alone.image_size == SIZE
    with pytest.raises(CheckpointError, match="there is no run at nowhere"):
        dalle2_jax.load("nowhere")


def test_images_of_a_key_and_of_keys(lineage):
    model = dalle2_jax.load(lineage / "vae")
    images = model.generate(jax.random.key(0), count=5, batch_size=2)
    assert images.shape == (5, SIZE, SIZE, 3) and images.dtype == np.uint8 and len(np.unique(images, axis=0)) == 5
    keys = jax.random.split(jax.random.key(0), 5)
    np.testing.assert_array_equal(model.generate(keys[2:3]), images[2:3])
    grey = dalle2_jax.load(lineage / "autoencoder").generate(jax.random.key(1), count=2)
    assert grey.shape == (2, SIZE, SIZE, 3) and (grey == grey[..., :1]).all()
    for arguments, sentence in (
        ({"captions": ["a cross"]}, "the stage vae reads no captions; leave them out"),
        ({"count": 0}, "count is 0; it must be 1 or more"),
        ({"count": 2, "steps": 3}, "the stage vae has no sampling settings; leave steps out"),
        ({"count": 2, "batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(InputError, match=sentence):
            model.generate(jax.random.key(0), **arguments)


def test_an_autoencoder_samples_latents_of_its_images_moments(lineage):
    """Of those that its record has, which are those of the held-out images; by its linear decoder's own moments."""
    model = dalle2_jax.load(lineage / "autoencoder")
    measured = model.stage.record.measured
    mean, square = (np.asarray(measured[name]) for name in ("latent_mean", "latent_square"))
    assert mean.shape == (3,) and np.linalg.eigvalsh(square - np.outer(mean, mean)).min() > -1e-6
    latents = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32) @ np.diag([1.0, 2.0, 0.0]).astype("f4")
    found = latent_moments(jax.numpy.asarray(latents))
    np.testing.assert_allclose(found[1] - np.outer(*[found[0]] * 2), np.cov(latents.T, ddof=0), atol=1e-5)
    # A decoder that writes the three latents into three pixels shows which latents were sampled.
    module = Autoencoder(MLPEncoder(()), MLPDecoder(()), latent_size=3, image_size=2, channels=1)
    params = {
        "decoder": {"out": {"kernel": np.eye(3, 4, dtype=np.float32) * 0.1, "bias": np.zeros(4, np.float32)}},
        "latent": {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, np.float32)},
    }
    images = sample_autoencoder(jax.random.key(0), module, params, *found, 4000)
    sampled = np.asarray(images).reshape(4000, 4)[:, :3] * 10
    np.testing.assert_allclose(sampled.mean(0), latents.mean(0), atol=0.15)
    np.testing.assert_allclose(np.cov(sampled.T), np.cov(latents.T, ddof=0), atol=0.25)


def test_count_of_a_cascade_is_of_each_caption(tiny):
    model = DALLE2.load(tiny.run_dir)
    captions = ["a cross", "a red circle"]
    images = model.generate(jax.random.key(0), captions, 2)
    repeated = [caption for caption in captions for _ in range(2)]
    np.testing.assert_array_equal(images, model.generate(jax.random.key(0), repeated))
    with pytest.raises(InputError, match="count goes with captions"):
        model.generate(jax.random.key(0), count=2)
    with pytest.raises(InputError, match="there is no caption; give at least one"):
        model.generate(jax.random.key(0), [])


def test_on_the_command_line(lineage, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = str(lineage / "vae")
    assert cli.main(["generate", vae, "--count", "3", "--seed", "4", "--out", "several"]) == 0
    assert [path.name for path in sorted((tmp_path / "several").iterdir())] == [f"000_image_{n}.png" for n in (4, 5, 6)]
    assert cli.main(["generate", vae, "--seed", "6", "--out", "alone.png"]) == 0
    alone, third = (np.asarray(Image.open(name)) for name in ("alone.png", "several/000_image_6.png"))
    np.testing.assert_array_equal(alone, third)
    assert cli.main(["generate", vae, "--count", "4", "--grid", "--out", "sheet.png"]) == 0
    assert cli.main(["reconstruct", vae, "alone.png", "--out", "again.png"]) == 0
    model = dalle2_jax.load(vae)
    np.testing.assert_array_equal(np.asarray(Image.open("again.png")), model.reconstruct([alone])[0])
    capsys.readouterr()
    for arguments, sentence in (
        (["generate", vae, "a cross"], "reads no captions; leave them out, and say by --count how many images"),
        (["generate", str(lineage), "--count", "2"], "has several systems: autoencoder, vae"),
        (["generate", vae, "--steps", "4"], "has no sampling settings; leave steps out"),
        (["generate", vae, "--steps", "prior=4"], "has no prior whose steps could be changed"),
        (["generate", vae, "--tile", "8"], "--tile is of DALL-E 2's stages"),
        (["generate", vae, "--candidates", "4"], "and there is none"),
        (["reconstruct", vae, "alone.png", "--caption", "x"], "leave captions and sampling options out"),
    ):
        assert cli.main(arguments) == 2
        assert sentence in capsys.readouterr().err


def test_systems_side_by_side(lineage, tiny, tmp_path, capsys):
    """A VAE and the cascade: real images are as valid and as sharp as themselves, and farther from noise than 0."""
    out = tmp_path / "both"
    names = ["VAE", str(tiny.run_dir)]
    command = ["compare", f"VAE={lineage / 'vae'}", names[1], "--count", "12", "--judge", str(tiny.run_dir / "clip")]
    assert cli.main([*command, "--out", str(out)]) == 0
    table = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in (*names, "real images")]
    report = json.loads((tmp_path / "both.json").read_text())
    vae, both, real = (report["systems"][name] for name in (*names, "real images"))
    assert report["judge"] == str(tiny.run_dir) and real["combinations"] == real["sharpness"] == 1.0
    assert real["valid"] > 0.9 > max(vae["valid"], both["valid"]) and vae["distance"] > real["distance"] >= 0
    assert set(both) - set(vae) == {"captions", "unseen"} and both["gflops"] > vae["gflops"] > 0
    # Of the VAE's multiply-adds: 3 x 8 and 8 x 192 a layer of the decoder.
    assert vae["gflops"] * 1e9 == 2 * (3 * 8 + 8 * SIZE * SIZE * 3)
    params = dalle2_jax.load(lineage / "vae").stage.params
    assert vae["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    with Image.open(tmp_path / "both.png") as sheet:
        assert sheet.text["systems"] == ", ".join(names)
    # Of several seeds the mean and half the range.
    valid = vae["valid"]
    report["systems"]["VAE"]["valid"] = valid + 0.5
    (tmp_path / "other.json").write_text(json.dumps(report))
    assert cli.main(["compare", "--join", f"{out}.json", str(tmp_path / "other.json")]) == 0
    row = capsys.readouterr().out.splitlines()[2].split(" | ")
    assert row[0] == "| VAE" and row[1] == f"{valid + 0.25:.2f} ± 0.25"
    (tmp_path / "none.json").write_text("[]")
    for arguments, sentence in (
        ([str(lineage / "vae"), "--out", str(tmp_path)], "is a folder; give the beginning of the files' names"),
        ([], "there is nothing to compare; name two runs or more"),
        (["--join", "nowhere.json"], "--join nowhere.json cannot be read: No such file"),
        (["--join", str(tmp_path / "none.json")], "is no comparison; name a .json that dalle2 compare wrote"),
    ):
        assert cli.main(["compare", *arguments]) == 2
        assert sentence in capsys.readouterr().err
