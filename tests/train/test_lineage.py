"""The systems of configs/lineage.py, shrunk: trained, gone on with, recorded, loaded, sampled from by one command."""

import dataclasses
import shutil
import signal
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import dalle2_jax
from dalle2_jax import cli
from dalle2_jax.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    load_params,
    load_stage,
    read_record,
    write_record,
)
from dalle2_jax.errors import InputError
from dalle2_jax.evaluation.compare import flops_of_one_image
from tests import cascade
from tests.tiny_lineage import SIZE, STAGES, STEPS, tiny_lineage
from tests.train import processes
from tests.train.processes import finish, wait_for
from tests.train.test_stages import assert_same_ending, records
from train.interactive import start
from train.run.record import stage_record

CAPTION = "a small red circle on a gray background"
NEEDS = {"dalle1": ["dvae"]}
READ_CAPTIONS = ("ddpm_captions", "dalle1")
# The others have quick tests of their own, with the same loop.
QUICK = ("gan",)
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STAGES]


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> Path:
    """A run in which stages are trained when a test asks for them."""
    return tmp_path_factory.mktemp("lineage")


def trained(tiny, runs: Path, name: str) -> Path:
    system, run = tiny_lineage(tiny.system.data), runs / "alone"
    result, _ = cascade.train(system, run, [*NEEDS.get(name, []), name])
    assert result.finished
    return run / name


def untrained(tiny, run: Path, name: str) -> Path:
    """A stage's folder with random parameters, in a moment."""
    recipe = tiny_lineage(tiny.system.data).stages[name]
    task = recipe.build({kind: load_stage(run / kind) for kind in recipe.needs})
    params = with_noise(jax.jit(task.init)(jax.random.key(0)))
    with CheckpointWriter(run / name) as writer:
        writer.save(recipe.steps, {"ema": params})
    read = {"tokenizer": read_record(tiny.run_dir / "clip").tokenizer} if recipe.reads_captions else {}
    recorded = {"step": recipe.steps, "finished": True, "data": tiny.system.data, **read}
    write_record(run / name, dataclasses.replace(stage_record(recipe, name), **recorded))
    return run / name


@pytest.mark.parametrize("name", CASES)
def test_a_stage_is_trained_goes_on_and_samples(tiny, runs, name, tmp_path, capsys, monkeypatch):
    alone, system = trained(tiny, runs, name), tiny_lineage(tiny.system.data)
    recipe, record = system.stages[name], read_record(alone)
    assert (record.kind, record.finished, record.step) == (recipe.kind, True, STEPS)
    assert load_stage(alone).module == recipe.module and (record.tokenizer is not None) == recipe.reads_captions
    assert all(np.isfinite(entry["loss"]) for entry in records(alone))
    assert (alone / "samples" / f"step_{STEPS}.png").is_file() == (name != "encoder_decoder")

    # Stopped in between and gone on with.
    for needed in NEEDS.get(name, []):
        shutil.copytree(alone.parent / needed, tmp_path / "run" / needed)
    result, _ = cascade.train(system, tmp_path / "run", [name], stop_after_steps=3)
    assert (result.step, result.signal) == (3, signal.SIGTERM)
    assert cascade.train(system, tmp_path / "run", [name])[0].finished
    assert_same_ending(alone, tmp_path / "run" / name)

    monkeypatch.chdir(tmp_path)
    if name in ("encoder_decoder", "dvae"):
        return
    prompts = [CAPTION] if name in READ_CAPTIONS else []
    assert cli.main(["generate", str(alone), *prompts, "--count", "3", "--seed", "1", "--out", "several"]) == 0
    files = sorted((tmp_path / "several").iterdir())
    assert len(files) == 3 and len({file.read_bytes() for file in files}) == 3
    assert cli.main(["generate", str(alone), *prompts, "--seed", "2", "--out", "alone.png"]) == 0
    second = np.asarray(Image.open(files[1])).astype(int)
    assert second.shape == (SIZE, SIZE, 3)
    # In a batch of another size sums are made in another order.
    assert np.abs(np.asarray(Image.open("alone.png")).astype(int) - second).max() <= 1
    wrong, sentence = ([], "there is nothing to sample") if prompts else ([CAPTION], "reads no captions; leave them")
    capsys.readouterr()
    assert cli.main(["generate", str(alone), *wrong]) == 2 and sentence in capsys.readouterr().err


def with_noise(params):
    """What a few steps have taught is next to nothing, whatever the settings."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.3 * random.normal(size=leaf.shape).astype("f4"), params)


@pytest.mark.slow
def test_sampling_settings_of_a_stage(tiny, runs, tmp_path):
    folder = trained(tiny, runs, "ddpm_captions")
    model = dalle2_jax.load(folder)
    model = dataclasses.replace(model, stage=dataclasses.replace(model.stage, params=with_noise(model.stage.params)))
    first, other = (model.generate(jax.random.key(0), CAPTION, steps=steps) for steps in ("3", "2"))
    assert (first == model.generate(jax.random.key(0), CAPTION)).all() and (first != other).any()
    guided = model.generate(jax.random.key(0), CAPTION, guidance_scale=6.0)
    assert (guided != first).any() and flops_of_one_image(model, CAPTION) > 0
    assert cli.main(["generate", str(folder), CAPTION, "--steps", "2", "--out", str(tmp_path / "a.png")]) == 0
    for changes, sentence in (
        ({"stepz": "3"}, "has no sampling setting 'stepz'; the nearest of .* is steps"),
        ({"steps": "5000"}, "5000"),
        ({"candidates": 3}, "candidates"),
    ):
        with pytest.raises(InputError, match=sentence):
            model.generate(jax.random.key(0), CAPTION, **changes)


def test_dalle1_works_on_its_dvae_and_reranks_by_a_clip(tiny, tmp_path):
    untrained(tiny, tmp_path / "first", "dvae")
    folder = untrained(tiny, tmp_path / "first", "dalle1")
    model = dalle2_jax.load(folder)
    assert repr(model) == "DALLE1Model(dvae: dvae, dalle1: dalle1)" and model.image_size == SIZE
    with pytest.raises(InputError, match="temperature is 0"):
        model.generate(jax.random.key(0), CAPTION, temperature=0.0)
    with pytest.raises(InputError, match="this run has no clip"):
        model.scores(np.zeros((1, SIZE, SIZE, 3), np.uint8), [CAPTION])
    shutil.copytree(folder, tmp_path / "run" / "dalle1")
    with pytest.raises(CheckpointError, match="works with a stage of the kind 'dvae', and .* has none"):
        dalle2_jax.load(tmp_path / "run" / "dalle1")
    shutil.copytree(folder.parent / "dvae", tmp_path / "run" / "dvae")
    assert repr(dalle2_jax.load(tmp_path / "run")) == repr(model), "the dVAE is a part, and no second system"
    dvae = dalle2_jax.load(tmp_path / "run" / "dvae")
    with pytest.raises(InputError, match="encodes images as codes and samples none"):
        dvae.generate(jax.random.key(0))
    assert dvae.reconstruct([np.zeros((20, 30, 3), np.uint8)]).shape == (1, SIZE, SIZE, 3)
    # The run's CLIP finds the image of one caption that is nearest to it.
    shutil.copytree(tiny.run_dir / "clip", tmp_path / "run" / "clip")
    reranked = dalle2_jax.load(tmp_path / "run" / "dalle1")
    assert flops_of_one_image(reranked, CAPTION) > 0
    keys = jax.numpy.stack([jax.random.key(seed) for seed in range(4)])
    images = reranked.generate(keys, CAPTION, 4)
    best = int(np.argmax(np.asarray(reranked.scores(list(images), [CAPTION]))[:, 0]))
    command = ["generate", str(tmp_path / "run" / "dalle1"), CAPTION, "--candidates", "4"]
    assert cli.main([*command, "--out", str(tmp_path / "best.png")]) == 0
    with Image.open(tmp_path / "best.png") as image:
        assert image.text["seed"] == str(best)
        np.testing.assert_array_equal(np.asarray(image), images[best])


@pytest.mark.slow
def test_a_transformer_translates_on_the_command_line(tiny, runs, capsys):
    folder = trained(tiny, runs, "encoder_decoder")
    model = dalle2_jax.load(folder)
    written = model.generate(None, ["3 1 4", "1 5"])
    assert len(written) == 2 and written[0] == model.generate(None, "3 1 4")[0]
    capsys.readouterr()
    assert cli.main(["generate", str(folder), "3 1 4", "1 5"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"3 1 4 -> {written[0]}", f"1 5 -> {written[1]}"]
    assert cli.main(["compare", str(folder)]) == 2
    assert "translates sequences and samples no images; leave it out" in capsys.readouterr().err
    for sequence, sentence in (("3 x", "'x' in the sequence '3 x' is no symbol"), ("1 2 3 4 5", "has 5 symbols")):
        assert cli.main(["generate", str(folder), sequence]) == 2
        assert sentence in capsys.readouterr().err


CONFIG = """
from dalle2_jax.data import Data
from tests.tiny_lineage import tiny_lineage


def system():
    return tiny_lineage(Data(name="captioned_shapes", config="one_object", counts=(64, 32, 8, 8)), steps=60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in STAGES if name != "dvae"])
def test_a_killed_stage_goes_on_bit_equal(tmp_path, name):
    runs = tmp_path / "runs"
    for needed in NEEDS.get(name, []):
        for run in ("alone", "killed"):
            assert finish(processes.start(tmp_path, CONFIG, needed, run))[0] == 0
    assert finish(processes.start(tmp_path, CONFIG, name, "alone"))[0] == 0
    killed = processes.start(tmp_path, CONFIG, name, "killed")
    wait_for(killed, f"{name} 21/60 ")
    killed.kill()
    assert finish(killed)[0] == -signal.SIGKILL
    code, output = finish(processes.start(tmp_path, CONFIG, name, "killed"))
    assert code == 0 and f"{name} goes on from step" in output
    assert_same_ending(runs / "alone" / name, runs / "killed" / name)


def test_a_stage_trained_in_a_notebook_is_what_the_command_trains(tiny, runs):
    """Of the same seed, on one device: parameters, their average and the metrics of each step."""
    folder, system = trained(tiny, runs, "gan"), tiny_lineage(tiny.system.data)
    training = start(system, "gan")
    reached = [now.step for now in training.steps(every=1)]
    assert reached == [1, 2, 3, 4]
    for ema, params in ((True, training.params), (False, training.raw_params)):
        chex.assert_trees_all_close(params, load_params(folder, ema), rtol=1e-5, atol=1e-6)
    losses = [entry["loss"] for entry in records(folder) if entry["kind"] == "train"]
    np.testing.assert_allclose([value for _, value in training.history["loss"]], losses, rtol=1e-5)
    validated = next(entry for entry in records(folder) if entry["kind"] == "validation")
    assert training.validate()["loss"] == pytest.approx(validated["loss"], rel=1e-5)
    assert training.preview(2).shape == (2, SIZE, SIZE, 3) and training.loaded().record.kind == "gan"
