"""What a user can mend is one sentence and exit code 2; a fault of ours shows its traceback and ends with 1."""

import ast
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from dalle2_jax import cli
from dalle2_jax.checkpoint import CheckpointError
from dalle2_jax.cli import describe
from dalle2_jax.data.pipeline import _encode
from dalle2_jax.errors import CaptionTruncated, InputError, check_number, nearest, sentence_for_user
from dalle2_jax.images.read import ImageError
from dalle2_jax.weights.tensors import WeightsError

ROOT = Path(__file__).resolve().parents[1]

# A config with a recipe of its own, which raises `{error}` when it is built.
CONFIG = """
from dalle2_jax.data import Data
from dalle2_jax.errors import InputError
from tests.train.toy import ToyRecipe, toy_recipe
from train.config.system import System


class Broken(ToyRecipe):
    def build(self, stages):
        raise {error}


def system():
    toy = vars(toy_recipe(steps=3))
    data = Data(image_size=4, counts=(64, 32, 8, 8))
    return System(name="broken", data=data, vocabulary_size=300, context_length=40, stages={{"toy": Broken(**toy)}})
"""


def train(config: Path, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "train", config, "toy", "--dry-run", "--runs-dir", folder / "runs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_fault_in_a_recipe_has_a_traceback_and_bad_input_one_sentence(tmp_path):
    for error, code in (("ValueError('zip() argument 2 is shorter')", 1), ("InputError('toy.width is 3')", 2)):
        config = tmp_path / f"broken_{code}.py"
        config.write_text(CONFIG.format(error=error))
        done = train(config, tmp_path)
        assert done.returncode == code, done.stderr
        if code == 1:
            assert "Traceback" in done.stderr and "zip() argument 2 is shorter" in done.stderr
            assert f'File "{config}"' in done.stderr
        else:
            assert done.stderr.strip().splitlines()[-1] == "error: toy.width is 3" and "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [ValueError("zip() argument 2 is shorter"), KeyError("image_size"), OSError("?")])
def test_a_fault_in_a_command_is_not_caught(error, monkeypatch, capsys):
    def fail(options):
        raise error

    monkeypatch.setattr(describe, "run", fail)
    with pytest.raises(type(error)) as caught:  # which ends the process with 1 and a traceback
        cli.main(["describe", "runs/none"])
    assert caught.value is error and capsys.readouterr().err == ""


def test_bad_input_to_a_command_is_one_sentence(monkeypatch, capsys):
    def fail(options):
        raise InputError("the caption is empty; write one")

    monkeypatch.setattr(describe, "run", fail)
    assert cli.main(["describe", "runs/none"]) == 2
    assert capsys.readouterr().err == "dalle2: the caption is empty; write one\n"


def test_what_is_told_to_the_user(tmp_path):
    for kind in (CheckpointError, WeightsError, ImageError):
        assert issubclass(kind, InputError) and sentence_for_user(kind("it is damaged")) == "it is damaged"
    with pytest.raises(OSError) as caught:
        (tmp_path / "none" / "a.png").write_bytes(b"")
    assert sentence_for_user(caught.value) == f"{tmp_path / 'none' / 'a.png'} cannot be used: No such file or directory"
    for fault in (ValueError("x"), TypeError("x"), OSError("no file is named"), KeyboardInterrupt()):
        assert sentence_for_user(fault) is None


def test_every_refusal_is_an_input_error():
    """No plain ValueError is raised on purpose: the commands would take it for a fault."""
    for top in ("dalle2_jax", "train", "configs"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                raised = node.exc.func if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else None
                assert not (isinstance(raised, ast.Name) and raised.id == "ValueError"), f"{path}:{node.lineno}"
            assert not re.search(r"difflib\.get_close", path.read_text()) or path.name == "errors.py", path


def test_the_nearest_name():
    assert nearest("decodr", ["clip", "prior", "decoder"]) == "decoder"
    assert nearest("zzz", ["clip", "prior"]) in ("clip", "prior") and nearest("zzz", ["clip"], cutoff=0.5) is None
    assert nearest("clip", []) is None


class Tokenizer:
    """Warns of one caption that is too long, and of something else."""

    context_length = 4

    def encode(self, captions):
        warnings.warn("the prompt is longer than 4 tokens", CaptionTruncated, stacklevel=1)
        warnings.warn("something else", DeprecationWarning, stacklevel=1)
        return captions, captions


def test_only_cut_captions_are_counted_as_cut():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _encode(Tokenizer(), ["a", "b"])
    assert {(w.category, str(w.message)) for w in caught} == {
        (DeprecationWarning, "something else"),
        (CaptionTruncated, "1 of 2 captions are longer than 4 tokens and are cut"),
    }


@pytest.mark.parametrize(
    ("value", "bounds", "sentence"),
    [
        (float("nan"), {"at_least": 0}, "size is nan; it must be a finite number, 0 or more"),
        (float("inf"), {}, "size is inf; it must be a finite number"),
        (-1, {"at_least": 0, "below": 1}, "size is -1; it must be 0 or more and below 1"),
        (1, {"at_least": 0, "below": 1}, "size is 1; it must be"),
        (0, {"above": 0, "at_most": 1}, "size is 0; it must be above 0 and at most 1"),
        (2.5, {"whole": True}, "size is 2.5; it must be a whole number"),
        (True, {"at_least": 0}, "size is True; it must be"),
        ("4", {"at_least": 0}, "size is '4'; it must be"),
        (None, {}, "size is None; it must be"),
    ],
)
def test_a_number_out_of_its_range(value, bounds, sentence):
    with pytest.raises(InputError, match="^" + re.escape(sentence)):
        check_number("size", value, **bounds)
    for fits in (0, 1, 0.5, np.float32(0.5), np.int64(1)):
        check_number("size", fits, at_least=0, at_most=1)
