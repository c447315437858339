"""The comparison with the peers, as far as it goes without them: one small case of ours, what is left out, the table.

The processes themselves: test_processes.py.
"""

import json
import math

import jax
import numpy as np
import pytest

from benchmarks import compare, ours
from benchmarks.cases import CASES, OF_DEVICE
from benchmarks.table import case_table, markdown

# What the peers' networks of these cases have: transformers' CLIP, and diffusers' others.
THEIRS = {
    "clip-b16": 149_620_737,
    "prior-2": 39_449_088,
    "decoder": 109_943_174,
    "decoder-plain": 94_496_006,
    "upsampler": 21_593_603,
}


def measured(side: str, seconds: float, **more) -> dict:
    step = {"seconds": seconds, "compile_seconds": 4.0, "steps": [seconds], "peak_bytes": 3 * 2**30}
    return {"side": side, "case": "prior-2", "parameters": 39_449_088, "train_step": step, "load": 0.5, **more}


@pytest.mark.parametrize("case", THEIRS)
def test_our_networks_are_as_large_as_theirs(case):
    shapes = jax.eval_shape(ours.make_task(CASES[case], "float32").init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == pytest.approx(THEIRS[case], rel=1e-3)


def test_weights_are_drawn_on_the_host():
    shapes = {"a": jax.ShapeDtypeStruct((64, 64), "float32"), "b": [jax.ShapeDtypeStruct((), "bfloat16")]}
    drawn, again = ours.draw(shapes), ours.draw(shapes, np.asarray, dtype="bfloat16")
    assert isinstance(drawn["a"], jax.Array) and isinstance(again["a"], np.ndarray)
    assert (drawn["a"].dtype, drawn["b"][0].dtype, again["a"].dtype) == ("float32", "bfloat16", "bfloat16")
    np.testing.assert_array_equal(np.asarray(drawn["a"]).astype(again["a"].dtype), again["a"])
    assert drawn["a"].std() == pytest.approx(0.02, rel=0.1) and drawn["b"][0].shape == ()


def test_one_case_of_ours(tmp_path, capsys):
    """A process of its own measures what was asked; the forward pass has the operations counted here by hand."""
    out = tmp_path / "found.json"
    words = [
        "--cases",
        "tiny-prior",
        "--sides",
        "ours",
        "--rounds",
        "1",
        "--reps",
        "1",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    assert compare.main(words) == 0
    (found,) = json.loads(out.read_text())["results"]
    assert "error" not in found, found
    batch, text, width = 2, 4, 16
    tokens = text + 4
    block = 3 * tokens + 9  # queries, keys and values of every token; the rest of the only layer for the last one
    dense = (text + 4) * width**2 + block * width**2 + width**2  # inputs, block, output
    attention = 2 * tokens * width
    assert found["forward"]["flops"] == 2 * batch * (dense + attention)
    assert found["train_step"]["seconds"] > 0 and found["train_step"]["peak_bytes"] > 2**20
    assert found["devices"] == 1 and found["dtype"] == "float32"
    assert found["setup_seconds"] > 0 and found["train_step"]["compile_seconds"] > 0
    assert found["train_step"]["cache_hits"] == 0 and found["train_step"]["flops"] > 2 * found["forward"]["flops"]
    assert "| ours | 0.01M |" in capsys.readouterr().out


def test_sides_take_turns_and_one_that_fails_is_left_out():
    asked = compare.arguments(["--cases", "prior-2,prior-8", "--sides", "diffusers,ours", "--rounds", "2"])
    turns = []

    def run(sides, case):
        for side in sides:
            turns.append((case, side.name))
            yield {"case": case, "error": "no luck"} if turns[-1] == ("prior-2", "diffusers") else measured("", 1.0)

    results = compare.compare(asked, run, lambda line: None)
    first = [("prior-2", "ours"), ("prior-2", "diffusers"), ("prior-2", "ours")]
    both = [("prior-8", "ours"), ("prior-8", "diffusers")]
    assert turns == [*first, *both, *reversed(both)], "in the opposite order in every second round"
    assert [result["round"] for result in results] == [0, 0, 1, 0, 0, 1, 1]


def tiny(**more):
    asked = compare.arguments(["--cases", "prior-2,prior-8", "--sides", "ours,diffusers", "--rounds", "1"])
    for name, value in more.items():
        setattr(asked, name, value)
    return asked


def test_a_side_without_such_networks_is_left_out():
    words = "--cases clip-b16,generate-karlo --sides ours,diffusers,dalle2-pytorch,transformers".split()
    asked, ran = compare.arguments([*words, "--rounds", "1"]), []

    def run(sides, case):
        ran.extend((case, side.name) for side in sides)
        return [measured("", 1.0, case=case) for side in sides]

    results = compare.compare(asked, run, lambda line: None)
    clip, karlo = [("clip-b16", "ours"), ("clip-b16", "transformers")], ["ours", "diffusers"]
    assert ran == clip + [("generate-karlo", side) for side in karlo], "its prior is not as wide as its embeddings"
    settings = {"machine": "one GPU", "dtype": "bfloat16", "rounds": 1, "reps": 5}
    text = markdown({**settings, "lacking": {"clip-b16": ["diffusers", "dalle2-pytorch"]}}, results)
    assert text.count("No such network") == 1 and "\n\nNo such network: diffusers, dalle2-pytorch\n" in text
    assert "was not run" not in text


def test_what_was_cut_off_is_measured_again_and_nothing_else():
    asked, saved, ran = tiny(turns="process"), [], []
    cut = {**measured("", 2.0), "error": "cut off by the time limit", "cut_off": True}
    answers = {("prior-2", "ours"): {"error": "no luck"}, ("prior-2", "diffusers"): cut}

    def run(sides, case):
        (side,) = sides
        ran.append((case, side.name))
        return [answers.get(ran[-1], measured("", 1.0, case=case))]

    results = compare.compare(asked, run, lambda line: None, saved.append, over=lambda: len(ran) == 2)
    assert ran == [("prior-2", "ours"), ("prior-2", "diffusers")] and len(saved) == 2
    assert [(case, [side.name for side in sides]) for case, _, sides in compare.missing(asked, results)] == [
        ("prior-2", ["diffusers"]),
        ("prior-8", ["ours"]),
        ("prior-8", ["diffusers"]),
    ]
    answers.clear()
    results = compare.compare(asked, run, lambda line: None, earlier=results)
    assert ran[2:] == [("prior-2", "diffusers"), ("prior-8", "ours"), ("prior-8", "diffusers")]
    assert not list(compare.missing(asked, results)) and not any("cut_off" in result for result in results)


def test_a_comparison_is_taken_up_only_with_the_same_settings(tmp_path, capsys):
    out = tmp_path / "found.json"
    settings = {**vars(tiny()), "reps": 3}
    results = [{**measured("ours", 1.0, case=case), "round": 0} for case in ("prior-2", "prior-8")]
    out.write_text(json.dumps({"settings": settings, "results": results}, default=str))
    words = ["--cases", "prior-2,prior-8", "--sides", "ours", "--rounds", "1", "--out", str(out), "--resume"]
    assert compare.main([*words, "--reps", "4"]) == 2
    assert "was measured with reps 3, not 4: leave --resume out" in capsys.readouterr().err
    assert compare.main([*words, "--reps", "3"]) == 0
    message = json.loads(out.read_text())
    assert message["results"] == results and message["finished"]


def test_table():
    found = [measured("ours", seconds) for seconds in (0.5, 0.4, 0.9)]
    found += [measured("diffusers", 0.75), {"side": "dalle2-pytorch", "case": "prior-2", "error": "exit 1: no module"}]
    lines = case_table("prior-2", found).splitlines()
    assert lines[0] == "### prior-2: prior, 12 layers of 512, 82 positions, batch 2"
    assert lines[2] == "| side | parameters | train step, s | against ours | peak memory | compile, s |"
    assert lines[4] == "| ours | 39.45M | 0.5 (0.4 to 0.9) | 1.00 | 3.00 GiB | 4.0 |"
    assert lines[5] == "| diffusers | 39.45M | 0.75 | 1.50 | 3.00 GiB | 4.0 |"
    assert lines[-1] == "dalle2-pytorch was not run: exit 1: no module"


def test_a_stopped_side_has_a_row_of_what_it_measured():
    forward = {"seconds": 0.1, "compile_seconds": 1.0, "steps": [0.1], "peak_bytes": 2**30, "cache_hits": 2}
    stopped = {**measured("theirs", 1.0), "forward": forward, "error": "not compiled after 240 s"}
    del stopped["train_step"]
    lines = case_table("prior-2", [measured("ours", 0.5), stopped]).splitlines()
    assert lines[4] == "| ours | 39.45M |  |  | 0.5 | 1.00 | 3.00 GiB | 4.0 |"
    assert lines[5] == "| theirs | 39.45M | 0.1 |  |  |  | 1.00 GiB | 1.0 (cached) |"
    assert lines[-1] == "theirs was stopped: not compiled after 240 s"


def test_a_single_round_shows_the_middle_half_of_its_steps():
    found = measured("ours", 3.0)
    found["train_step"]["steps"] = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert "| 3 (1.5 to 4.5) | 1.00 |" in case_table("prior-2", [found])
    text = markdown({"machine": "2 CPU cores", "dtype": "float32", "rounds": 1, "reps": 5, "turns": "step"}, [found])
    assert "repetitions: 5, the sides in turn step by step; load" in text


def test_share_of_the_peak():
    found = measured("ours", 0.5, device_kind="NVIDIA H100 80GB HBM3", dtype="bfloat16", versions={"jax": "0.10.2"})
    found["train_step"]["flops"] = 989e12 / 4
    text = markdown({"machine": "one GPU", "dtype": "bfloat16", "rounds": 1, "reps": 5}, [found])
    assert "| 494,500G (50% of the peak) |" in text
    assert text.startswith("one GPU, bfloat16, rounds: 1, repetitions: 5; load before a round 0.5 to 0.5, jax 0.10.2")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--cases", "prior-3"], "there is no case 'prior-3'; there are prior-2, prior-8, decoder"),
        (["--sides", "theirs"], "there is no side 'theirs'; there are ours, ours-one-device, diffusers"),
        (["--resume"], "--resume goes on with the file that --out names"),
        (["--peers", "nowhere/python"], "there is no nowhere/python, where the peers would run: make it with `make"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(words, sentence, capsys):
    assert compare.main(words) == 2
    assert sentence in capsys.readouterr().err


def test_every_device_has_cases():
    assert {case for cases in OF_DEVICE.values() for case in cases} == {case for case in CASES if "tiny" not in case}
