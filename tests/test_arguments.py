"""Command lines: prompts after options and after `--`, and what is no value."""

import pytest

from dalle2_jax import cli
from dalle2_jax.cli import generate
from train.__main__ import parser


@pytest.fixture
def read(monkeypatch):
    """What `dalle2 generate` is asked for."""

    def of(*arguments):
        found = []
        monkeypatch.setattr(generate, "USES_JAX", False)
        monkeypatch.setattr(generate, "run", lambda options: found.append(options) or 0)
        assert cli.main(["generate", *arguments]) == 0
        return found[0]

    return of


@pytest.mark.parametrize(
    ("arguments", "prompts"),
    [
        (["RUN", "a cross", "--count", "2"], ["a cross"]),
        (["RUN", "--count", "2", "a cross"], ["a cross"]),
        (["--count", "2", "RUN", "a cross"], ["a cross"]),
        (["RUN", "a cross", "--count", "2", "a circle"], ["a cross", "a circle"]),
        (["RUN", "--count", "2", "--", "--a cross", "-x"], ["--a cross", "-x"]),
        (["RUN", "a cross", "--count", "2", "--", "--grid"], ["a cross", "--grid"]),
        (["RUN", "--count", "2"], []),
    ],
)
def test_prompts_and_options_in_any_order(read, arguments, prompts):
    options = read(*arguments)
    assert (options.run, options.prompt, options.count, options.grid) == ("RUN", prompts, 2, False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "RUN", "x", "--seed=--"], "argument --seed: -- is no value"),
        (["generate", "RUN", "x", "--steps", "4", "--steps=--"], "argument --steps: -- is no value"),
        (["generate", "RUN", "x", "--sead", "4"], "unrecognized arguments: --sead 4"),
        (["generate"], "the following arguments are required: run"),
        (["edit", "RUN"], "the following arguments are required"),
        (["data", "export", "emoji", "test", "out", "--count=--"], "-- is no value"),
    ],
)
def test_refused(arguments, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert sentence in capsys.readouterr().err


def test_of_training():
    options = parser().parse_args(["shapes.py", "--run", "x", "clip", "--seed", "3", "clip.steps=4"])
    assert options.config == "shapes.py" and options.rest == ["clip", "clip.steps=4"] and options.seed == 3
    with pytest.raises(SystemExit):
        parser().parse_args(["shapes.py", "clip", "--seed=--"])
