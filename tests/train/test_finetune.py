"""Stages that start from another run's: what is taken over, what is fitted, what is refused, and what starts afresh."""

import dataclasses
import shutil
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest

from dalle2_jax.checkpoint import load_params, load_stage, read_record
from dalle2_jax.layers.stacking import stack_layers
from dalle2_jax.tokenizer import ClipTokenizer, Tokenizer
from tests import cascade
from train import __main__ as command
from train.run.init_from import inherited_tokenizer, initial_parameters


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer.from_json(read_record(tiny.run_dir / "clip").tokenizer)


def started(tiny, name, **changes):
    return dataclasses.replace(tiny.system.stages[name], init_from=str(tiny.run_dir / name), **changes)


def test_a_stage_starts_from_the_average_of_another(tiny, tmp_path):
    """With a rate of zero what was taken over is what comes out; optimizer and step are new."""
    recipe = started(tiny, "clip")
    still = dataclasses.replace(recipe.optimizer, learning_rate=0.0)
    system = tiny.system.with_stage("clip", dataclasses.replace(recipe, optimizer=still))
    result, log = cascade.train(system, tmp_path / "run", ["clip"])
    assert result.finished and result.step == cascade.STEPS
    theirs = load_params(tiny.run_dir / "clip", ema=True)
    for ema in (True, False):
        chex.assert_trees_all_close(load_params(tmp_path / "run" / "clip", ema=ema), theirs, atol=1e-6)
    info = read_record(tmp_path / "run" / "clip")
    assert info.init_from == str(tiny.run_dir / "clip")
    assert info.tokenizer == read_record(tiny.run_dir / "clip").tokenizer
    said = "\n".join(log)
    assert f"the tokenizer is that of {tiny.run_dir / 'clip'}" in said
    assert f"clip starts from {tiny.run_dir / 'clip'} (step 4); optimizer and average start afresh" in said
    # The same command goes on, and does not start again.
    result, log = cascade.train(system, tmp_path / "run", ["clip"])
    assert result.finished and not any("starts from" in line for line in log)


@pytest.mark.parametrize("name", ["prior", "decoder", "upsampler"])
def test_every_stage_fits_itself(tiny, tokenizer, name):
    clip = load_stage(tiny.run_dir / "clip")
    task = started(tiny, name).build({"clip": clip})
    chex.assert_trees_all_equal(
        initial_parameters(name, task, tokenizer, lambda line: None), load_params(tiny.run_dir / name)
    )


def test_layers_may_lie_otherwise(tiny, tokenizer):
    clip = tiny.system.stages["clip"].module
    apart = clip.clone(text=clip.text.clone(scan_layers=False), vision=clip.vision.clone(scan_layers=False))
    found = initial_parameters("clip", started(tiny, "clip", module=apart).build({}), tokenizer, lambda line: None)
    theirs = load_params(tiny.run_dir / "clip")
    assert "block_0" in found["text"]["transformer"] and "blocks" in theirs["text"]["transformer"]
    chex.assert_trees_all_equal(stack_layers(found), theirs)


def test_a_new_tokenizer_keeps_the_rows_of_the_tokens_it_shares(tiny, tokenizer):
    other = Tokenizer.train(["a small red circle", "a large green hexagon", "zebra zebra"], 280, 12)
    shared = [token for token in other.vocabulary if token in tokenizer.vocabulary]
    assert 250 < len(shared) < len(other.vocabulary) and other.vocabulary != tokenizer.vocabulary
    log = []
    recipe = started(tiny, "clip")
    found = initial_parameters("clip", recipe.build({}), other, log.append)
    theirs = load_params(tiny.run_dir / "clip")
    fresh = jax.device_get(jax.jit(recipe.build({}).init)(jax.random.key(recipe.seed)))
    table, old, new = (tree["text"]["token_embedding"]["embedding"] for tree in (found, theirs, fresh))
    rows, places = other.token_rows(), tokenizer.token_rows()
    for token, row in rows.items():
        expected = old[places[token]] if token in places else new[row]
        np.testing.assert_allclose(table[row], expected, rtol=1e-6)
    assert f"{len(shared) + 3} of {other.vocabulary_size} tokens are known" in log[0]
    chex.assert_trees_all_equal(found["vision"], theirs["vision"])


def test_the_tokenizer_is_inherited_where_there_is_room(tiny, tokenizer):
    lines = []
    system = tiny.system.with_stage("clip", started(tiny, "clip"))
    assert inherited_tokenizer(system, lines.append) == tokenizer
    small = SimpleNamespace(stages=system.stages, vocabulary_size=270, context_length=12)
    assert inherited_tokenizer(small, lines.append) is None
    assert "a new one is made of the captions" in lines[-1]
    assert inherited_tokenizer(tiny.system, lines.append) is None


def test_refusals(tiny, tokenizer, tmp_path):
    def refused(name, recipe):
        task = recipe.build({"clip": load_stage(tiny.run_dir / "clip")})
        with pytest.raises(ValueError) as error:
            initial_parameters(name, task, tokenizer, lambda line: None)
        assert "\n" not in str(error.value)
        return str(error.value)

    clip = tiny.system.stages["clip"]
    nowhere = dataclasses.replace(clip, init_from=str(tmp_path / "nowhere"))
    assert "is not a stage's folder" in refused("clip", nowhere) and "such as runs/emoji/clip" in refused(
        "clip", nowhere
    )
    other = dataclasses.replace(clip, init_from=str(tiny.run_dir / "upsampler"))
    assert "which is of kind upsampler and not clip" in refused("clip", other)
    wider = started(tiny, "clip", module=clip.module.clone(embedding_size=9))
    assert "module.embedding_size is 8 there and 9 here; set clip.module.embedding_size as" in refused("clip", wider)
    upsampler = tiny.system.stages["upsampler"]
    attending = upsampler.module.clone(unet=upsampler.module.unet.clone(attention_resolutions=(16,)))
    assert "is a parameter of this one alone" in refused("upsampler", started(tiny, "upsampler", module=attending))
    larger = clip.module.clone(vision=clip.module.vision.clone(image_size=32))
    assert "vision/positions is (5, 16) there and (17, 16) here" in refused(
        "clip", started(tiny, "clip", module=larger)
    )
    # What shapes do not show.
    heads = clip.module.clone(vision=clip.module.vision.clone(heads=4))
    assert "module.vision.heads is 2 there and 4 here" in refused("clip", started(tiny, "clip", module=heads))
    decoder = tiny.system.stages["decoder"]
    process = dataclasses.replace(decoder.process, prediction="v")
    message = refused("decoder", started(tiny, "decoder", process=process))
    assert "process.prediction is 'x0' there and 'v' here; set decoder.process.prediction as it is there" in message
    shutil.copytree(tiny.run_dir / "clip", tmp_path / "clip")
    for path in (tmp_path / "clip" / "checkpoints").rglob("CHECKSUMS"):
        path.unlink()
    damaged = dataclasses.replace(clip, init_from=str(tmp_path / "clip"))
    assert "clip cannot start from" in refused("clip", damaged)


def test_another_kind_of_tokenizer(tiny):
    """No table can be fitted to it; what has no table does not mind."""
    theirs = ClipTokenizer(("a", "a</w>", "<|startoftext|>", "<|endoftext|>"), (), 12)
    with pytest.raises(ValueError) as error:
        initial_parameters("clip", started(tiny, "clip").build({}), theirs, lambda line: None)
    message = (
        "it reads tokens learned from captions and this run's tokens are those of CLIP's tokenizer; leave init_from"
    )
    assert message in str(error.value) and "\n" not in str(error.value)
    initial_parameters("upsampler", started(tiny, "upsampler").build({}), theirs, lambda line: None)


def test_a_run_gives_all_its_stages(tiny, tmp_path):
    system = command.with_start(tiny.system, tiny.run_dir)
    starts = {name: recipe.init_from for name, recipe in system.stages.items()}
    assert starts == dict.fromkeys(system.stages) | {name: str(tiny.run_dir / name) for name in system.usual_stages}
    with pytest.raises(ValueError, match="has none of the stages clip, prior, decoder, upsampler"):
        command.with_start(tiny.system, tmp_path)
