"""Real processes that are killed or told to stop, through the command line and real data; they go on bit-equal."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from dalle2_jax.checkpoint import checkpoint_steps, load_params, read_record
from tests.train import processes
from tests.train.processes import finish, wait_for

CONFIG = """
from dalle2_jax.data import Data
from tests.train.toy import toy_recipe
from train.config.system import System


def system():
    return System(
        name="toy",
        data=Data(name="captioned_shapes", config="one_object", image_size=4, counts=(64, 32, 8, 8)),
        vocabulary_size=300,
        context_length=40,
        stages={"toy": toy_recipe(steps=STEPS, checkpoint_every=EVERY)},
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder for configs, runs and data."""
    return tmp_path_factory.mktemp("resume")


def start(place: Path, run: str, steps: int, every: int = 10, slow_saves: float = 0.0) -> subprocess.Popen:
    config = CONFIG.replace("STEPS", str(steps)).replace("EVERY", str(every))
    return processes.start(place, config, "toy", run, slow_saves)


def losses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_ending(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    for ema in (True, False):
        left, right = load_params(a, ema), load_params(b, ema)
        for layer in left:
            for name in left[layer]:
                np.testing.assert_array_equal(left[layer][name], right[layer][name])


def test_killed_and_stopped_runs_go_on_bit_equal(place):
    steps, runs = 100, place / "runs"
    alone = start(place, "alone", steps)
    assert finish(alone)[0] == 0

    killed = start(place, "killed", steps)
    wait_for(killed, "toy 34/100 ")
    killed.kill()
    assert finish(killed)[0] == -signal.SIGKILL
    assert checkpoint_steps(runs / "killed" / "toy") and not read_record(runs / "killed" / "toy").finished
    again = start(place, "killed", steps)
    code, output = finish(again)
    assert code == 0 and "toy goes on from step" in output
    assert_same_ending(runs / "alone" / "toy", runs / "killed" / "toy")

    stopped = start(place, "stopped", steps)
    wait_for(stopped, "toy 21/100 ")
    stopped.send_signal(signal.SIGTERM)
    code, output = finish(stopped)
    assert code == 128 + signal.SIGTERM and "the same command goes on from there" in output
    assert "Traceback" not in output
    at = checkpoint_steps(runs / "stopped" / "toy")[-1]
    assert 21 <= at < steps and f"saved at step {at} of {steps}" in output
    code, output = finish(start(place, "stopped", steps))
    assert code == 0 and f"toy goes on from step {at}" in output
    assert_same_ending(runs / "alone" / "toy", runs / "stopped" / "toy")


@pytest.mark.slow
def test_five_random_kills_also_while_saving(place):
    """Five kills at random moments, with saves that take most of the time, and a sixth in the middle of a save."""
    steps, rng = 120, random.Random(0)
    assert finish(start(place, "left_alone", steps, every=2))[0] == 0
    folder, reached = place / "runs" / "hunted" / "toy", []
    for _ in range(5):
        process = start(place, "hunted", steps, every=2, slow_saves=0.2)
        wait_for(process, "/120 |")
        time.sleep(rng.uniform(0.0, 1.5))
        process.kill()
        finish(process)
        reached.append(max(checkpoint_steps(folder), default=0))
    process = start(place, "hunted", steps, every=2, slow_saves=0.5)
    wait_for(process, "saving")
    process.kill()
    finish(process)
    assert any(path.is_dir() and not (path / "CHECKSUMS").exists() for path in (folder / "checkpoints").iterdir())
    assert reached == sorted(reached) and 0 < reached[-1] < steps
    assert finish(start(place, "hunted", steps, every=2))[0] == 0
    assert_same_ending(place / "runs" / "left_alone" / "toy", folder)
