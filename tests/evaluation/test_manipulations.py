"""What the figures of the latent count: by scenes that are drawn, and by a run from end to end."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from dalle2_jax import DALLE2, cli
from dalle2_jax.data.sources.scene import draw
from dalle2_jax.evaluation import manipulations
from dalle2_jax.evaluation.manipulations import change_pairs, judge_changes

WHAT = {"color", "shape"}


@pytest.mark.parametrize(("what", "count"), [("color", 6 * 5 * 4), ("shape", 4 * 3 * 3)])
def test_changes_of_one_attribute(what, count):
    before, after = change_pairs(what)
    assert len(before) == len(after) == count
    for a, b in zip(before, after, strict=True):
        one, other = a.objects[0], b.objects[0]
        assert getattr(one, what) != getattr(other, what)
        assert dataclasses.replace(one, **{what: getattr(other, what)}) == other and a.background == b.background
    some = slice(0, None, 7)
    changed, unchanged = ([draw(scene) for scene in scenes[some]] for scenes in (after, before))
    number = {"pairs": len(changed)}
    assert judge_changes(changed, after[some], what) == {"changed": 1.0, "kept": 1.0, "both": 1.0, **number}
    assert judge_changes(unchanged, after[some], what) == {"changed": 0.0, "kept": 1.0, "both": 0.0, **number}
    blank = [np.zeros((64, 64, 3), np.uint8)] * len(changed)
    assert judge_changes(blank, after[some], what) == {"changed": 0.0, "kept": 0.0, "both": 0.0, **number}


@pytest.mark.slow
def test_a_run_is_measured(tiny, tmp_path, monkeypatch, capsys):
    """Four steps of training: the figures mean nothing, but all of them are there."""
    monkeypatch.setattr(manipulations, "BATCH", 8)
    few = lambda what, seed: tuple(scenes[:8] for scenes in change_pairs(what, seed))  # noqa: E731
    monkeypatch.setattr(manipulations, "change_pairs", few)
    report = manipulations.measure_latent(DALLE2.load(tiny.run_dir), tiny.system.data, count=4, steps="3")
    assert report["images"] == 4 and report["interpolation_ends_equal"] is True
    assert set(report["reconstruction"]) == {"decoder_psnr", "final_psnr"} and set(report["text_diffs"]) == WHAT
    assert set(report["variations"]) == {"content", "semantics"} and list(report["probe"]) == [
        "1",
        "2",
        "3",
        "4",
        "5",
        "8",
    ]
    for figures in report["variations"].values():
        assert figures["shape_and_color"] <= min(figures["kept"][name] for name in WHAT) and figures["psnr"] < 40

    def told(model, data, *, count, seed, log):
        log("measuring")
        return {**report, "count": count, "seed": seed}

    monkeypatch.setattr(manipulations, "measure_latent", told)
    run = shutil.copytree(tiny.run_dir, tmp_path / "run")
    assert cli.main(["evaluate", str(run), "--latent", "--count", "3", "--seed", "5"]) == 0
    saved = json.loads((run / "latent.json").read_text())
    assert saved["seed"] == 5 and saved["count"] == 3 and saved["probe"] == report["probe"]
    text = capsys.readouterr().out
    assert (
        "equal to reconstructions" in text and "NOT equal" not in text and text.endswith(f"wrote {run}/latent.json\n")
    )
    assert not (run / "report.json").exists()
