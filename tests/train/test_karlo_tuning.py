"""configs/karlo.py on a small converted run: what is taken over, trained and recorded, and that it draws images."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import karlo, karlo_large
from dalle2_jax import DALLE2
from dalle2_jax.checkpoint import load_params, load_stage, read_record, rebuild, write_record
from dalle2_jax.data import open_source
from dalle2_jax.sharding import make_mesh
from dalle2_jax.tokenizer import ClipTokenizer, tokenizer_from_json
from tests import cascade
from tests.train.karlo_run import write_images, write_karlo_run
from train import __main__ as command
from train.machine import backend
from train.run.init_from import initial_parameters
from train.step.state import abstract_state, create_state

TUNED = ("prior", "decoder")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the run karlo and the folder images."""
    place = tmp_path_factory.mktemp("tuning")
    write_karlo_run(place)
    write_images(place / "images")
    return place


@pytest.fixture(scope="module")
def system(place):
    """The config's system in two steps a stage."""
    result = karlo.system(str(place / "karlo"), str(place / "images"))
    for name, recipe in result.stages.items():
        short = dataclasses.replace(
            recipe,
            steps=2,
            batch_size=4,
            log_every=1,
            validate_every=2,
            validation_batches=1,
            preview_every=2 if name == "decoder" else 0,
            preview_count=1,
            checkpoint_every=2,
            sampling=dataclasses.replace(recipe.sampling, steps="2"),
        )
        result = result.with_stage(name, short)
    # So few images leave none to hold out.
    data = dataclasses.replace(result.data, data_dir=str(place / "data"), validation_split="train")
    return dataclasses.replace(result, data=data)


@pytest.fixture(scope="module")
def tuned(place, system):
    """The run after its decoder was trained, and after that its prior: (the run's folder, the versions in between)."""
    run = place / "tuned"
    assert cascade.train(system, run, ["decoder"])[0].finished
    between = {name: load_stage(run / name).version for name in karlo.STAGES}
    DALLE2.load(run)
    assert cascade.train(system, run, ["prior"])[0].finished
    return run, between


def built(system, place, name):
    return system.stages[name].build({"clip": load_stage(place / "karlo" / "clip")})


def test_the_config_is_that_of_the_run(place, system):
    for name in TUNED:
        info, recipe = read_record(place / "karlo" / name), system.stages[name]
        assert recipe.module == rebuild(info.module) and recipe.process == rebuild(info.process)
        assert recipe.init_from == str(place / "karlo" / name)
    assert system.stages["prior"].process.clip == 5 and not system.stages["prior"].module.learned_null
    assert not system.stages["decoder"].module.learned_null_text
    assert system.name == "images" and system.data.image_size == 16
    assert list(system.given) == list(karlo.STAGES) and list(system.stages) == list(TUNED)
    larger = karlo_large.system(str(place / "karlo"), str(place / "images"))
    for recipe in larger.stages.values():
        network = getattr(recipe.module, "unet", recipe.module)
        assert (recipe.module.dtype, network.dtype, network.param_dtype) == ("bfloat16", "bfloat16", "float32")
        assert network.remat and recipe.steps > 2 * system.stages["prior"].steps


@pytest.mark.slow
def test_a_tuned_run_draws_images(place, system, tuned):
    run, between = tuned
    theirs = {name: load_stage(place / "karlo" / name).version for name in karlo.STAGES}
    versions = {name: load_stage(run / name).version for name in karlo.STAGES}
    assert {name for name in theirs if theirs[name] != between[name]} == {"decoder"}
    assert {name for name in theirs if theirs[name] != versions[name]} == set(TUNED)
    for name in TUNED:
        info = read_record(run / name)
        assert info.built_on == {"clip": theirs["clip"]} and info.finished and info.step == 2
        assert info.tokenizer == read_record(place / "karlo" / "clip").tokenizer
        assert info.source == read_record(place / "karlo" / name).source  # the licence goes along
        lines = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["kind"] for line in lines] == ["train", "train", "validation"]
        assert all(np.isfinite(line["loss"]) for line in lines)
        chex.assert_trees_all_equal_shapes(load_params(run / name), load_params(place / "karlo" / name))
    assert (run / "decoder" / "samples" / "step_2.png").is_file()
    model = DALLE2.load(run)
    assert isinstance(model.tokenizer, ClipTokenizer)
    images = model.generate(jax.random.key(0), ["a cat", "red"], upsampler={"steps": "2"})
    assert images.shape == (2, 32, 32, 3) and images.std() > 0


@pytest.mark.parametrize("name", TUNED)
def test_what_is_trained_starts_from_the_public_weights(place, system, name):
    task = built(system, place, name)
    tokenizer = tokenizer_from_json(read_record(place / "karlo" / "clip").tokenizer)
    initial = initial_parameters(name, task, tokenizer, lambda line: None)
    state = create_state(task, abstract_state(task, make_mesh(devices=jax.devices()[:1])), initial)
    theirs = load_params(place / "karlo" / name)
    for part in ("params", "ema"):
        chex.assert_trees_all_equal(jax.device_get(state[part]), theirs)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(jax.device_get(state["optimizer"])))


def test_bfloat16_weights_are_trained_in_float32(tmp_path, place):
    run = write_karlo_run(tmp_path, dtype="bfloat16")
    system = karlo.system(str(run), str(place / "images"))
    task = system.stages["prior"].build({"clip": load_stage(run / "clip")})
    theirs = load_params(run / "prior")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(theirs)} == {"bfloat16"}
    tokenizer = tokenizer_from_json(read_record(run / "clip").tokenizer)
    initial = initial_parameters("prior", task, tokenizer, lambda line: None)
    state = create_state(task, abstract_state(task, make_mesh(devices=jax.devices()[:1])), initial)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state["params"])} == {"float32"}
    chex.assert_trees_all_equal(
        jax.device_get(state["params"]), jax.tree.map(lambda leaf: leaf.astype(np.float32), theirs)
    )


@pytest.mark.parametrize("name", ["prior", pytest.param("decoder", marks=pytest.mark.slow)])
def test_a_dropped_caption_is_the_empty_one(place, system, name):
    """The loss of dropped captions is that of empty ones, whatever they said."""
    task = built(system, place, name)
    params = load_params(place / "karlo" / name)
    tokenizer = tokenizer_from_json(read_record(place / "karlo" / "clip").tokenizer)
    images = open_source(system.data, "train").images([0, 1])
    cats, said = (np.asarray(x) for x in tokenizer.encode(["a cat", "red"]))
    nothing, unsaid = (np.repeat(np.asarray(x), 2, axis=0) for x in tokenizer.empty())

    def loss(drop, tokens, mask):
        changed = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, text_drop=drop))
        batch = {"image": jnp.asarray(images), "tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}
        return float(jax.jit(changed.loss)(params, batch, jax.random.key(1), task.frozen, None)[0])

    dropped = loss(1.0, cats, said)
    assert dropped == pytest.approx(loss(0.0, nothing, unsaid), rel=1e-5)
    assert abs(dropped / loss(0.0, cats, said) - 1) > 1e-4


def test_the_command(place, system, monkeypatch, capsys):
    monkeypatch.setattr(backend, "setup", lambda *_: None)
    arguments = ["configs/karlo.py", str(place / "karlo"), str(place / "images")]
    assert command.main(["describe", *arguments, "prior", "decoder.batch_size=8", "prior.process.clip=10"]) == 0
    shown = capsys.readouterr().out
    assert "images: 2 stages on folder, a vocabulary of 600, captions of up to 9 tokens" in shown
    assert f"given: upsampler, that of {place / 'karlo' / 'upsampler'}" in shown
    assert command.main([*arguments, "upsampler"]) == 2
    assert "upsampler is given to images as it is in" in capsys.readouterr().err
    assert (
        command.main([*arguments, "decoder", "decoder.batch_size=8", "--runs-dir", str(place), "--run", "karlo"]) == 2
    )
    assert "is the run that clip is taken from; choose another --run" in capsys.readouterr().err


def test_refusals(place, tmp_path):
    with pytest.raises(ValueError, match="nowhere is no whole run of Karlo: .*/clip is not a stage's folder"):
        karlo.system(str(tmp_path / "nowhere"), "images")
    records = {name: read_record(place / "karlo" / name) for name in karlo.STAGES}
    for name in ("clip", "prior", "decoder"):
        write_record(tmp_path / "run" / name, records[name])
    with pytest.raises(ValueError, match="/upsampler is not a stage's folder.*; make one with: dalle2 convert karlo"):
        karlo.system(str(tmp_path / "run"), "images")
    write_record(tmp_path / "run" / "upsampler", records["upsampler"])
    karlo.system(str(tmp_path / "run"), "images")
    module = records["clip"].rebuilt("module").clone(vision=None)
    write_record(tmp_path / "run" / "clip", dataclasses.replace(records["clip"], module=module))
    with pytest.raises(ValueError, match="no image encoder, .*; convert again with --clip openai/clip-vit-large"):
        karlo.system(str(tmp_path / "run"), "images")
