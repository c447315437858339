"""The comparison with the peers, as far as it goes without them: one small case of ours, the turns, the table."""

import json
import math
import os
import sys
import time

import jax
import pytest

from benchmarks import compare, ours
from benchmarks.cases import CASES, OF_DEVICE
from benchmarks.table import case_table, markdown

# What diffusers' networks of these cases have.
DIFFUSERS = {"prior-2": 39_449_088, "decoder": 109_943_174, "decoder-plain": 94_496_006, "upsampler": 21_593_603}


def measured(side: str, seconds: float, **more) -> dict:
    step = {"seconds": seconds, "compile_seconds": 4.0, "steps": [seconds], "peak_bytes": 3 * 2**30}
    return {"side": side, "case": "prior-2", "parameters": 39_449_088, "train_step": step, "load": 0.5, **more}


@pytest.mark.parametrize("case", DIFFUSERS)
def test_our_networks_are_as_large_as_diffusers(case):
    shapes = jax.eval_shape(ours.make_recipe(CASES[case], "float32").init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == pytest.approx(DIFFUSERS[case], rel=1e-3)


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


WORKER = """
import json, sys
name, turns = sys.argv[1], int(sys.argv[2])
for number in range(turns):
    print("turn", flush=True)
    assert sys.stdin.readline()
    with open("%s", "a") as said:
        said.write(name)
print("a word of a library")
if name == "b":
    sys.exit("b has no more memory")
print(json.dumps({"name": name}))
"""


def test_steps_are_taken_in_turn_and_a_process_that_dies_holds_nobody_up(tmp_path):
    order = tmp_path / "order"

    def call(name: str, turns: int) -> compare.Call:
        return compare.Call([sys.executable, "-c", WORKER % order, name, str(turns)], dict(os.environ))

    found = compare.run_in_turn([call("a", 4), call("b", 2), call("c", 4)])
    assert found == [{"name": "a"}, {"error": "exit 1: b has no more memory"}, {"name": "c"}]
    assert order.read_text() == "abcabcacac"


@pytest.mark.parametrize("child", ["pass", "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'])"])
def test_a_process_that_is_silent_too_long_is_stopped(child):
    """Even where a process that it started still holds its stdout."""
    text = f"import subprocess, sys, time; {child}; time.sleep(60)"
    started = time.monotonic()
    calls = [compare.Call([sys.executable, "-c", text], dict(os.environ))]
    assert compare.run_in_turn(calls, longest=1) == [{"error": "not done after 1 s"}]
    assert time.monotonic() - started < 20


def test_table():
    found = [measured("ours", seconds) for seconds in (0.5, 0.4, 0.9)]
    found += [measured("diffusers", 0.75), {"side": "dalle2-pytorch", "case": "prior-2", "error": "exit 1: no module"}]
    lines = case_table("prior-2", found).splitlines()
    assert lines[0] == "### prior-2: prior, 12 layers of 512, 82 positions, batch 2"
    assert lines[2] == "| side | parameters | train step, s | against ours | peak memory | compile, s |"
    assert lines[4] == "| ours | 39.45M | 0.5 (0.4 to 0.9) | 1.00 | 3.00 GiB | 4.0 |"
    assert lines[5] == "| diffusers | 39.45M | 0.75 | 1.50 | 3.00 GiB | 4.0 |"
    assert lines[-1] == "dalle2-pytorch was not run: exit 1: no module"


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
        (["--peers", "nowhere/python"], "there is no nowhere/python, where the peers would run: make it with `make"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(words, sentence, capsys):
    assert compare.main(words) == 2
    assert sentence in capsys.readouterr().err


def test_every_device_has_cases():
    assert {case for cases in OF_DEVICE.values() for case in cases} == {case for case in CASES if "tiny" not in case}
