"""What `--profile` takes."""

import pytest

from train.loop.profile import profiled_steps


@pytest.mark.parametrize(("text", "steps"), [("", (10, 15)), ("3", (10, 12)), ("2:2", (2, 2)), ("100:120", (100, 120))])
def test_steps(text, steps):
    assert profiled_steps(text) == steps


@pytest.mark.parametrize("text", ["x", "1:", ":5", "2-4", "-3", "configs/shapes.py"])
def test_what_is_no_steps(text):
    with pytest.raises(ValueError, match="--profile takes steps as FIRST:LAST or their number, not"):
        profiled_steps(text)


@pytest.mark.parametrize("text", ["1:4", "0:3", "5:4", "0"])
def test_steps_that_cannot_be_recorded(text):
    with pytest.raises(ValueError, match=f"--profile {text}: the first step must be 2 or more"):
        profiled_steps(text)
