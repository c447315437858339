"""The script for a GPU, as far as it goes without one: its limits of time, its shares of steps, its page."""

import json
import sys
import time

import pytest

from benchmarks import gpu
from benchmarks.cases import CASES
from benchmarks.compare import SIDES
from configs import emoji
from train.overrides import apply_overrides


def test_it_asks_for_what_there_is():
    assert set(gpu.CASES.split(",")) <= set(CASES)
    assert set(gpu.PEER_SIDES.split(",")) <= {side.name for side in SIDES}
    assert sum(gpu.SHARES.values()) == 25


def test_share_of_steps():
    steps, speeds = {"clip": 100, "decoder": 1000}, {"clip": 0.1, "decoder": 0.01}
    assert gpu.share_of_steps(steps, speeds, 60) == pytest.approx((60 - 2 * gpu.STAGE_OVERHEAD) / 20)
    assert gpu.share_of_steps(steps, speeds, 1000) == 1
    assert gpu.share_of_steps(steps, speeds, 0) == 0


def test_a_command_that_takes_too_long_is_stopped_with_its_children(tmp_path):
    started = time.monotonic()
    part = gpu.Part(tmp_path, "emoji", started + 1.5)
    child = f"{sys.executable} -c 'import time; time.sleep(60)'"
    with part.log:
        assert part.run("-c", "print('done')") == 0 and part.run("-c", "raise SystemExit(3)") == 3
        assert part.run("-c", f"import subprocess; subprocess.run({child!r}, shell=True)") is None
    assert time.monotonic() - started < 15 and part.left() == 0
    assert "done" in (tmp_path / "emoji.log").read_text() and len(part.commands) == 3
    assert gpu.said(None) and gpu.said(3) == "**Failed with exit status 3.**" and gpu.said(0) == ""


def test_what_a_cut_off_benchmark_measured_is_shown(tmp_path, monkeypatch):
    step = {"seconds": 0.25, "compile_seconds": 4.0, "steps": [0.25], "peak_bytes": 2**30, "flops": 1e12}
    result = {"case": "prior-1b", "side": "ours", "parameters": 1e9, "train_step": step, "round": 0, "load": None}
    settings = {"machine": "one GPU", "dtype": "bfloat16", "rounds": 1, "reps": 10}

    def run(part, *words, env=None):
        (tmp_path / "benchmark.json").write_text(json.dumps({"settings": settings, "results": [result]}))
        part.commands.append("python -m benchmarks.compare")

    monkeypatch.setattr(gpu.Part, "run", run)
    part = gpu.Part(tmp_path, "benchmark", time.monotonic() + 1)
    with part.log:
        section = gpu.run_part(part, sys.executable)
    page = gpu.page("H200", {"benchmark": section}, {"benchmark": part.commands})
    assert page.startswith("# On one H200\n") and "Cut off by the time limit" in page
    assert "| ours | 1000.00M | 0.25 |" in page and "\npython -m benchmarks.compare\n" in page


def test_the_emoji_take_the_fields_that_the_script_sets():
    system = emoji.system(accelerator=True)
    words = [f"{stage}.{field}=60" for stage in system.stages for field in ("steps", "log_every", "preview_every")]
    assert all(recipe.steps == 60 for recipe in apply_overrides(system, words).stages.values())


@pytest.mark.parametrize(("words", "said"), [(["OUT", "--parts", "all"], "no part 'all'"), (["OUT"], "finds no GPU")])
def test_what_cannot_start(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gpu.main(words) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
