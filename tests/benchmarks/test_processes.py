"""The measured processes: their turns, their limits of time, and what is left of one that is stopped."""

import argparse
import json
import os
import sys
import time

import pytest

from benchmarks import worker
from benchmarks.processes import Call, Limits, environment_of, run_in_turn

USUAL = Limits(compile=60, steps=60)
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
# Says what a worker says, and sleeps for as long as a number among its words.
SAYS = """
import sys, time
for word in sys.argv[1:]:
    time.sleep(float(word)) if word[0].isdigit() else print(word, flush=True)
"""


def python(text: str, *words: str) -> Call:
    return Call([sys.executable, "-c", text, *words], dict(os.environ))


def test_steps_are_taken_in_turn_and_a_process_that_dies_holds_nobody_up(tmp_path):
    order = tmp_path / "order"
    calls = [python(WORKER % order, name, str(turns)) for name, turns in (("a", 4), ("b", 2), ("c", 4))]
    found = run_in_turn(calls, USUAL)
    assert found == [{"name": "a"}, {"error": "exit 1: b has no more memory"}, {"name": "c"}]
    assert order.read_text() == "abcabcacac"


@pytest.mark.parametrize("child", ["pass", "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'])"])
def test_a_process_that_is_silent_too_long_is_stopped(child):
    """Even where a process that it started still holds its stdout."""
    text = f"import subprocess, sys, time; {child}; time.sleep(60)"
    started = time.monotonic()
    assert run_in_turn([python(text)], Limits(compile=1, steps=60)) == [{"error": "not compiled after 1 s"}]
    assert time.monotonic() - started < 20


def test_a_stopped_process_leaves_what_it_has_reported():
    """The limits are of each measure: here the first is measured, the second compiles for too long."""
    said = (
        "compiling forward",
        "compiled 0.1",
        '{"forward": 1}',
        '{"forward": 2}',
        "{1}",
        "compiling train_step",
        "30",
    )
    assert run_in_turn([python(SAYS, *said)], Limits(compile=1, steps=60)) == [
        {"forward": 2, "error": "not compiled after 1 s"}
    ]


def test_the_steps_have_a_limit_of_their_own():
    said = ("compiling forward", "0.2", "compiled 0.2", '{"forward": 1}', "30")
    assert run_in_turn([python(SAYS, *said)], Limits(compile=60, steps=0.5)) == [
        {"forward": 1, "error": "steps not done after 0.5 s"}
    ]


def test_the_end_of_all_time_is_told_apart():
    said = ("compiling forward", "compiled 0.1", '{"forward": 1}', "30")
    limits = Limits(compile=60, steps=60, end=time.monotonic() + 1)
    assert run_in_turn([python(SAYS, *said)], limits) == [
        {"forward": 1, "error": "cut off by the time limit", "cut_off": True}
    ]


def test_a_process_that_fails_late_leaves_what_it_has_reported():
    text = "import sys; print('{\"forward\": 1}', flush=True); sys.exit('no more memory')"
    found = run_in_turn([python(text), python("pass")], USUAL)
    assert found == [{"forward": 1, "error": "exit 1: no more memory"}, {"error": "it ended without a report"}]


def test_what_a_worker_says(capsys, monkeypatch):
    """Set-up, compiling and steps apart; a whole report after every step."""
    monkeypatch.setenv(worker.STARTED, str(time.time() - 100))
    orders = argparse.Namespace(
        case="tiny-prior", device="cpu", dtype="float32", threads=1, batch=None, reps=2, in_turn=False
    )
    calls, hits = [], []

    def step():
        hits.append(1)
        time.sleep(0 if calls else 0.05)
        calls.append(1)

    report = worker.Report("ours", orders, lambda: 7, lambda: len(hits), parameters=3)
    report.measure("forward", step)
    report.measure("train_step", step)
    report.add("train_step", flops=9)
    assert len(calls) == 2 * (1 + worker.WARM_UP + 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0][:9] for line in lines] == 2 * ["compiling", "compiled", '{"side":', '{"side":']
    first, last = json.loads(lines[2]), json.loads(lines[-1])
    assert len(first["forward"]["steps"]) == 1 and "train_step" not in first
    assert 100 <= last["setup_seconds"] == first["setup_seconds"] < 160
    assert last["forward"]["compile_seconds"] >= 0.04 and last["forward"]["peak_bytes"] == 7
    assert last["forward"]["cache_hits"] == 1 and len(last["train_step"]["steps"]) == 2
    assert (last["batch"], last["parameters"], report.found["train_step"]["flops"]) == (2, 3, 9)


def test_compiled_programs_are_kept_where_it_is_said(tmp_path):
    environment = environment_of(tmp_path, "cuda", 2)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "jax")
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "torch")
    assert "OMP_NUM_THREADS" in environment_of(tmp_path, "cpu", 2)
