"""The command line: what is wrong with the input is one sentence and exit code 2, and nothing is written."""

import sys
from pathlib import Path

import pytest

from dalle2_jax.checkpoint import read_record
from dalle2_jax.checkpoint.stage import stage_version
from train import __main__ as command
from train.config.find import load_config
from train.config.overrides import apply_overrides
from train.machine import backend

ROOT = Path(__file__).resolve().parents[2]

TWO_STAGES = """
import dataclasses
from typing import ClassVar
from dalle2_jax.data import Data
from tests.train.toy import ToyRecipe, ToyTask, toy_recipe
from train.config.system import System


class Second(ToyRecipe):
    kind: ClassVar[str] = "second"
    needs: ClassVar[tuple[str, ...]] = ("toy",)

    def build(self, stages):
        return ToyTask(recipe=self, frozen={"toy": stages["toy"].params})


def system():
    first = toy_recipe(steps=3)
    second = Second(**{field.name: getattr(first, field.name) for field in dataclasses.fields(first)})
    data = Data(image_size=4, counts=(64, 32, 8, 8))
    stages = {"toy": first, "second": second}
    return System(name="two", data=data, vocabulary_size=300, context_length=40, stages=stages)
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> str:
    # The tests' own jax settings stay.
    monkeypatch.setattr(backend, "setup", lambda *_: None)
    monkeypatch.setenv("DALLE2_DATA_DIR", str(tmp_path / "data"))
    path = tmp_path / "two.py"
    path.write_text(TWO_STAGES)
    return str(path)


def call(*arguments) -> int:
    return command.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{config}", "secnd"], "there is no stage 'secnd' in two: it has toy, second, all; the nearest is 'second'"),
        (["configs/shape.py", "clip"], "there is no config 'configs/shape.py'; the nearest is configs/shapes.py"),
        (["{config}", "toy", "toy.stepz=3"], "did you mean 'toy.steps'"),
        (["{config}", "toy", "toy.steps=x"], "toy.steps takes a whole number, not 'x'"),
        (["{config}", "toy", "toy.batch_size=12"], "a batch of 12 does not divide over the 8 devices"),
        (["{config}", "toy", "--dry-run", "toy.batch_size=12"], "a batch of 12 does not divide"),
        (["{config}", "toy", "toy.steps=0"], "toy.steps is 0; it must be 1 or more"),
        (["{config}", "toy", "toy.module.width=0"], "toy.module.width is 0; it must be 1 or more"),
        (["{config}", "toy", "toy.module.features=-3"], "toy.module.features is -3; it must be 1 or more"),
        (
            ["shapes", "decoder", "decoder.module.image_tokens=-1"],
            "decoder.module.image_tokens is -1; it must be 0 or more",
        ),
        (["{config}", "toy", "--topology", "v5e:4x4"], "--topology v5e:4x4 goes with describe"),
        (["shapes", "clip", "clip.module.vision.patch_size=5"], "divide"),
        (["shapes", "clip", "clip.module.dtype=float33"], "clip.module.dtype is 'float33'; it must be one of float32,"),
        (["shapes", "clip", "clip.module.dtype=float16"], "is 'float16'; it must be one of float32, bfloat16"),
        (["shapes", "clip", "clip.optimizer.ema_decay=nan"], "optimizer.ema_decay is nan; it must be a finite number"),
        (["shapes", "clip", "clip.validate_every=-1"], "clip.validate_every is -1; it must be 0 or more"),
        (["shapes", "clip", "clip.seed=4294967296"], "clip.seed is 4294967296; it must be 0 or more and below"),
        (["shapes", "clip", "clip.batch_size=1"], "clip.batch_size is 1 in 1 micro-batches"),
        (["shapes", "clip", "clip.module.text.vocabulary_size=300"], "set clip.module.text.vocabulary_size=512"),
        (["shapes", "all", "prior.module.context_length=8"], "set prior.module.context_length=12"),
        (["shapes", "all", "decoder.loss_kind=hybrid"], "the hybrid loss needs variance='learned_range'"),
        (["shapes", "all", "decoder.weight_limit=0.5"], "weight_limit is 0.5"),
        (["shapes", "all", "decoder.weighting=snr"], "unknown weighting 'snr'"),
        (["shapes", "clip", "clip.init_from=runs/none/clip"], "clip.init_from: runs/none/clip is not a stage's folder"),
        (["shapes", "all", "--init-from", "none"], "--init-from none has none of the stages"),
        (["describe"], "describe wants a config"),
        (["describe", "shapes", "--distributed"], "describe runs in one process"),
        (["{config}", "toy", "--processes", "2"], "--coordinator HOST:PORT and --process I is missing"),
        (["shapes", "all", "decoder.image_drop=2"], "decoder.image_drop is 2.0; it must lie in 0 to 1"),
        (["shapes", "all", "prior.sampling.steps=many"], "'many'"),
        (["shapes", "all", "decoder.module.unet.image_size=15"], "15x15 does not divide"),
        (["{config}", "toy", "--seed", "-1"], "--seed is -1; it must lie in 0 to 4294967295"),
        (["{config}", "toy", "--mesh", "fsdp=3"], "does not fit 8 devices"),
        (["{config}", "toy", "--mesh", "model=8"], "the mesh 'model=8' is not a list of sizes"),
        (["{config}", "second"], "second needs toy, which is not trained yet; run first: python -m train {config} toy"),
        (["--profile", "{config}", "toy"], "--profile takes steps as FIRST:LAST or their number, not '{config}'"),
        (["describe", "confgs/shapes.py"], "there is no config"),
        (["{config}", "toy", "toy.optimizer.schedule=linear"], "it must be one of constant, cosine"),
    ],
)
def test_bad_input(config, tmp_path, capsys, arguments, sentence):
    filled = [argument.format(config=config) for argument in arguments]
    assert call(*filled, "--runs-dir", tmp_path / "runs") == 2
    shown = capsys.readouterr().err
    assert sentence.format(config=config) in shown and shown.count("\n") == 1 and shown.startswith("error: ")
    assert not (tmp_path / "runs").exists()


def test_a_config_that_asks_for_an_argument(config, tmp_path, capsys):
    asking = tmp_path / "asking.py"
    asking.write_text(
        TWO_STAGES.replace("def system():", "def system(width):")
        .replace("toy_recipe(steps=3)", "toy_recipe(steps=3, module=ToyNet(width=int(width)))")
        .replace("import ToyRecipe", "import ToyNet, ToyRecipe")
    )
    assert call(asking, "5", "toy", "toy.steps=2", "--runs-dir", tmp_path / "runs") == 0
    assert "hidden 245" not in capsys.readouterr().err
    info = read_record(tmp_path / "runs" / "two" / "toy")
    assert info.module["fields"]["width"] == 5 and info.config["arguments"] == ["5"] and info.steps == 2
    assert call(asking, "--runs-dir", tmp_path / "runs") == 2
    assert f"wants more arguments: python -m train {asking} WIDTH STAGE|all" in capsys.readouterr().err
    assert call(asking, "5", "second", "--runs-dir", tmp_path / "other") == 2
    assert f"run first: python -m train {asking} 5 toy" in capsys.readouterr().err
    assert call(config, "--runs-dir", tmp_path / "runs") == 2
    assert f"wants a stage: python -m train {config} STAGE|all" in capsys.readouterr().err


def test_the_folder_config_reads_a_folder(config, tmp_path, capsys):
    folder = tmp_path / "my pets"
    folder.mkdir()
    assert call("folder", folder, "clip", "--runs-dir", tmp_path / "runs") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: no captioned image is left in") and shown.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_runs_folder_that_is_a_file(config, tmp_path, capsys):
    (tmp_path / "runs").write_text("here")
    assert call(config, "toy", "--runs-dir", tmp_path / "runs") == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ") and str(tmp_path / "runs") in last and "cannot be used" in last
    assert (tmp_path / "runs").read_text() == "here"


def test_a_config_of_ones_own_stands_beside_ours(tmp_path):
    """Its name replaces none of ours, and it can import ours of that name and the files beside it."""
    from configs import emoji

    (tmp_path / "emoji.py").write_text(
        "import beside_emoji\nfrom configs import emoji\n\ndef system():\n    return emoji, beside_emoji.NUMBER\n"
    )
    (tmp_path / "beside_emoji.py").write_text("NUMBER = 7\n")
    make = load_config(tmp_path / "emoji.py")
    assert make() == (emoji, 7) and make.__module__ == "emoji"
    assert sys.modules["configs.emoji"] is emoji
    for name in ("emoji", "beside_emoji"):
        del sys.modules[name]
    sys.path.remove(str(tmp_path))
    (tmp_path / "numpy.py").write_text("def system():\n    return None\n")
    with pytest.raises(ValueError, match="has the name of the module 'numpy', which is another one; rename the file"):
        load_config(tmp_path / "numpy.py")


def test_a_file_that_is_no_config(tmp_path, config, capsys):
    (tmp_path / "other.py").write_text("x = 1\n")
    assert call(tmp_path / "other.py", "all") == 2
    assert "defines no function system()" in capsys.readouterr().err


def test_errors_that_are_not_ours_keep_their_traceback(tmp_path, config):
    (tmp_path / "broken.py").write_text("def system():\n    return int('x')\n")
    with pytest.raises(ValueError, match="invalid literal"):
        call(tmp_path / "broken.py", "all")


def test_dry_run_lowers_and_writes_nothing(config, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*.json"))
    assert call(config, "all", "--dry-run", "--runs-dir", tmp_path / "runs") == 0
    shown = capsys.readouterr().out
    assert "toy: 1,600 parameters, 3 steps of 16 images on 8 x cpu" in shown and "second: 1,600 parameters" in shown
    assert sorted(tmp_path.rglob("*.json")) == before and not (tmp_path / "runs").exists()
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_the_shapes_config_lowers(config, capsys, tmp_path):
    assert call("shapes", "upsampler", "--dry-run", "--runs-dir", tmp_path / "runs") == 0
    assert "upsampler: " in capsys.readouterr().out


def test_a_seed_is_that_of_every_stage_unless_one_is_given_its_own():
    system = command.with_seed(command.load_config(command.find_config("shapes"))(), 7)
    assert {stage.seed for stage in system.stages.values()} == {7}
    assert apply_overrides(system, ["clip.seed=8"]).stages["clip"].seed == 8


def test_all_stages_in_order(config, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert call(config, "all", "--runs-dir", runs, "second.steps=2") == 0
    first, second = read_record(runs / "two" / "toy"), read_record(runs / "two" / "second")
    assert first.finished and second.finished and second.step == 2
    assert first.tokenizer == second.tokenizer and '"context_length": 40' in first.tokenizer
    assert second.built_on == {"toy": stage_version(runs / "two" / "toy", 3)} and first.built_on == {}
    assert first.data["fields"]["image_size"] == 4 and first.versions["jax"]
    assert first.config["text"] == TWO_STAGES and second.config["overrides"] == ["second.steps=2"]
    capsys.readouterr()
    assert call(config, "all", "--runs-dir", runs, "second.steps=2") == 0
    assert capsys.readouterr().out.count("is finished") == 2
    # The first stage went on: what was built on it does not.
    assert call(config, "toy", "--runs-dir", runs, "toy.steps=4") == 0
    assert call(config, "second", "--runs-dir", runs, "second.steps=4") == 2
    assert "was trained on another toy" in capsys.readouterr().err


def test_the_profile_of_a_stage(config, tmp_path, capsys):
    assert call(config, "toy", "--profile", "2:3", "--runs-dir", tmp_path / "runs") == 0
    assert "toy: steps 2 to 3 of this start are recorded" in capsys.readouterr().out
    assert list((tmp_path / "runs" / "two" / "toy" / "profile").rglob("*.xplane.pb"))


def test_a_stage_that_needs_an_unfinished_one(config, tmp_path, capsys):
    assert call(config, "all", "--runs-dir", tmp_path / "runs", "--stop-after-steps", 2) == 128 + 15
    assert not (tmp_path / "runs" / "two" / "second").exists()
    capsys.readouterr()
    assert call(config, "second", "--runs-dir", tmp_path / "runs") == 2
    assert "toy, which has stopped at step 2 of 3" in capsys.readouterr().err


def test_a_runs_folder_that_is_an_address(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(config, "toy", "--runs-dir", "gs://bucket/runs") == 2
    assert "--runs-dir gs:/bucket/runs is an address; mount what it names" in capsys.readouterr().err
    assert not (tmp_path / "gs:").exists()
