"""Stages that a run is given: how they come into its folder, what is built on them, what takes their place."""

import dataclasses
import errno
import json
import os
import shutil

import jax
import pytest

from dalle2_jax import DALLE2
from dalle2_jax.checkpoint import Run, checkpoint_steps, load_stage, read_record
from dalle2_jax.sharding import make_mesh
from tests import cascade
from train import __main__ as command
from train.describe import describe
from train.run import given
from train.run.plan import plan_stages
from train.run.status import is_given


@pytest.fixture
def system(tiny):
    """Trains a prior and a decoder; all stages of the tiny run are given."""
    return dataclasses.replace(
        tiny.system,
        stages={name: tiny.system.stages[name] for name in ("prior", "decoder")},
        given={name: str(tiny.run_dir / name) for name in tiny.system.usual_stages},
    )


def changed(system, **folders):
    return dataclasses.replace(system, given={**system.given, **{name: str(path) for name, path in folders.items()}})


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_run_is_whole_after_one_of_its_stages_is_trained(tiny, system, tmp_path):
    run = tmp_path / "run"
    before = {name: load_stage(tiny.run_dir / name).version for name in tiny.system.usual_stages}
    result, log = cascade.train(system, run, ["decoder"])
    assert result.finished and sorted(path.name for path in run.iterdir()) == ["clip", "decoder", "prior", "upsampler"]
    for name in ("clip", "prior", "upsampler"):
        assert f"{name} is that of {tiny.run_dir / name}" in log
        assert load_stage(run / name).version == before[name]
        assert checkpoint_steps(run / name) == [4], "the newest checkpoint alone"
        for file in files(run / name):
            assert os.path.samefile(run / name / file, tiny.run_dir / name / file)
    info = read_record(run / "decoder")
    assert info.built_on == {"clip": before["clip"]}
    assert info.tokenizer == read_record(tiny.run_dir / "clip").tokenizer
    assert DALLE2.load(run).image_size == 16

    # What is trained takes the given one's place, and nothing else does.
    result, log = cascade.train(system, run, ["prior"])
    assert result.finished and not any(" is that of " in line for line in log)
    assert load_stage(run / "prior").version != before["prior"] and checkpoint_steps(run / "prior") == [2, 4]
    trained = load_stage(run / "prior").version
    result, log = cascade.train(system, run, ["decoder"])
    assert [line.split(":")[0] for line in log] == ["decoder is finished"]
    assert load_stage(run / "prior").version == trained
    assert {name: load_stage(tiny.run_dir / name).version for name in tiny.system.usual_stages} == before
    DALLE2.load(run)


def test_a_stage_that_was_begun_goes_on(tiny, system, tmp_path):
    cascade.train(system, tmp_path, ["prior"], stop_after_steps=3)
    assert not is_given(system, "prior", Run(tmp_path)) and is_given(system, "decoder", Run(tmp_path))
    result, log = cascade.train(system, tmp_path, ["prior"])
    assert result.finished and "prior goes on from step 3" in log


def test_files_are_copied_where_they_cannot_be_linked(tiny, system, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / ".clip.partial").mkdir()  # as a kill leaves it
    (tmp_path / ".clip.partial" / "stage.json").write_text("{")
    given.place_given(system, ["prior", "decoder"], tmp_path, lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "upsampler"]
    assert not os.path.samefile(tmp_path / "clip" / "stage.json", tiny.run_dir / "clip" / "stage.json")
    assert load_stage(tmp_path / "clip").version == load_stage(tiny.run_dir / "clip").version


def test_nothing_half_written_is_left(system, tmp_path, monkeypatch):
    link = given._link_or_copy

    def full(source, target):
        if str(source).endswith("stage.json"):
            raise OSError(errno.ENOSPC, "the disk is full")
        link(source, target)

    monkeypatch.setattr(given, "_link_or_copy", full)
    with pytest.raises(ValueError, match="clip could not be put into .*the disk is full"):
        given.place_given(system, [], tmp_path, lambda line: None)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_and_a_description_write_nothing(tiny, system, tmp_path, capsys):
    lines, mesh = [], make_mesh(devices=jax.devices()[:1])
    plan_stages(system, ["prior"], tmp_path / "run", mesh, lines.append)
    assert f"clip: that of {tiny.run_dir / 'clip'}" in lines
    assert not any(line.startswith("prior: that") for line in lines)
    assert not list(tmp_path.iterdir())
    given.place_given(system, [], tmp_path / "run", lines.append)
    plan_stages(system, ["prior"], tmp_path / "run", mesh, lines.append)
    assert any(line.startswith("prior: ") and line.endswith("(in place of the given one)") for line in lines)
    assert describe(system, ["prior"]) == 0
    shown = capsys.readouterr().out
    assert f"given: clip, that of {tiny.run_dir / 'clip'}" in shown
    assert f"given until it is trained: prior, that of {tiny.run_dir / 'prior'}" in shown


def test_refusals(tiny, system, tmp_path):
    run = tmp_path / "run"

    def refused(system, run=run, names=("decoder",)):
        before = files(tmp_path)
        with pytest.raises(ValueError) as error:
            cascade.train(system, run, list(names))
        assert "\n" not in str(error.value) and files(tmp_path) == before
        return str(error.value)

    message = refused(changed(system, clip=tmp_path / "nowhere"))
    assert message.startswith(f"clip is to be given and {tmp_path / 'nowhere'} is not a stage's folder")
    assert message.endswith("set given.clip to a finished stage's folder")
    shutil.copytree(tiny.run_dir / "clip", tmp_path / "unfinished")
    path = tmp_path / "unfinished" / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "finished": False}))
    assert "unfinished is not trained to its end" in refused(changed(system, clip=tmp_path / "unfinished"))

    shutil.copytree(tiny.run_dir / "upsampler", run / "clip")
    message = refused(system)
    assert f"{run / 'clip'} is another clip than that of {tiny.run_dir / 'clip'}" in message
    assert message.endswith("choose another --run")
    assert "is the run that clip is taken from; choose another --run" in refused(system, tiny.run_dir)

    short = dataclasses.replace(system, vocabulary_size=270, given={"clip": system.given["clip"]}, stages={})
    with pytest.raises(
        ValueError, match=r"the given clip of .* reads captions of 12 tokens out of \d+, and this system"
    ):
        given.given_tokenizer(short)
    none = dataclasses.replace(system, given={"prior": system.given["prior"]})
    assert "the stage 'prior' needs a stage of the kind 'clip' before it" in refused(
        none, tmp_path / "other", ["prior"]
    )


def test_a_given_stage_is_not_trained(system):
    with pytest.raises(
        ValueError, match="clip is given to shapes as it is in .*; the stages that it trains are prior, "
    ):
        command.find_stage("clip", dataclasses.replace(system, name="shapes"))
