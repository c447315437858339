"""The script for a GPU, as far as it goes without one: its limits of time, how it is taken up again, its page."""

import json
import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks import gpu, gpu_cache, gpu_parts
from benchmarks.cases import CASES
from benchmarks.compare import SIDES
from configs import emoji_large
from train.config.overrides import apply_overrides

STEP = {"seconds": 0.25, "compile_seconds": 4.0, "steps": [0.25], "peak_bytes": 2**30, "flops": 1e12}
RESULT = {"case": "prior-1b", "side": "ours", "parameters": 1e9, "train_step": STEP, "round": 0, "load": None}
SETTINGS = {"machine": "one GPU", "dtype": "bfloat16", "rounds": 1, "reps": 10}


def test_it_asks_for_what_there_is():
    cases = [case for cases, _ in gpu_parts.COMPARISONS.values() for case in cases.split(",")]
    assert set(cases) <= set(CASES) and list(gpu_parts.COMPARISONS) == list(gpu_parts.SHARES)[:2]
    sides = {side.name: side for side in SIDES}
    assert all(sum(sides[name].has(CASES[case]) for name in gpu_parts.PEER_SIDES.split(",")) == 3 for case in cases), (
        "ours, and one peer compiled and not"
    )
    assert sum(gpu_parts.SHARES.values()) == 25 and set(gpu_parts.SECTIONS) == set(gpu_parts.SHARES)
    tests = (gpu_parts.ROOT / "tests" / "parity" / "test_full_size.py").read_text()
    assert all(f"def {name}(" in tests for name in gpu_parts.FULL_SIZE)


def test_share_of_steps():
    steps, speeds = {"clip": 100, "decoder": 1000}, {"clip": 0.1, "decoder": 0.01}
    assert gpu_parts.share_of_steps(steps, speeds, 60) == pytest.approx((60 - 2 * gpu_parts.STAGE_OVERHEAD) / 20)
    assert gpu_parts.share_of_steps(steps, speeds, 1000) == 1
    assert gpu_parts.share_of_steps(steps, speeds, 0) == 0


def test_deadlines():
    """Each part has its minutes where they are there; else all that is left, and the last ones wait."""
    parts = ["train-steps", "generation", "parity"]
    assert gpu.deadlines(parts, 100, 15) == {"train-steps": 580, "generation": 820, "parity": 1000}
    assert gpu.deadlines(parts, 0, 30) == {"train-steps": 960, "generation": 1440, "parity": 1800}
    assert gpu.deadlines(parts, 0, 9) == dict.fromkeys(parts, 540)
    assert gpu.deadlines([], 0, 9) == {}


def test_a_command_that_takes_too_long_is_stopped_with_its_children(tmp_path):
    started = time.monotonic()
    part = gpu_parts.Part(tmp_path, "emoji", started + 1.5)
    child = f"{sys.executable} -c 'import time; time.sleep(60)'"
    with part.log:
        assert part.run("-c", "print(5 * 5)", str(tmp_path / "x"), hidden=("word",)) == 0 and part.state == "done"
        assert part.printed() == ["25"] and part.ending() == []
        assert part.run("-c", "print('why'); raise SystemExit(3)") == 3 and part.state == "failed"
        assert "why" in part.ending()
        assert part.run("-c", f"import subprocess; subprocess.run({child!r}, shell=True)") is None
    assert time.monotonic() - started < 15 and part.left() == 0
    assert part.state == "cut off" and "Cut off by the time limit" in part.ending()[0]
    assert "\n25\n" in (tmp_path / "emoji.log").read_text() and len(part.commands) == 3
    assert part.commands[0] == "python -c 'print(5 * 5)' OUT/x", "no path of this machine, no time that is left"


def test_a_command_is_stopped_when_the_script_is(tmp_path, monkeypatch):
    part = gpu_parts.Part(tmp_path, "emoji", time.monotonic() + 60)
    monkeypatch.setattr(gpu_parts.Part, "left", lambda self: sys.exit(143))  # as a signal would
    with part.log, pytest.raises(SystemExit):
        part.run("-c", "import time; print('begun', flush=True); time.sleep(60)")
    assert part.printed() in ([], ["begun"])


def test_what_a_cut_off_comparison_measured_is_shown(tmp_path, monkeypatch):
    def run(part, *words, env=None, hidden=(), seconds=None):
        message = {"settings": SETTINGS, "finished": False, "results": [RESULT]}
        (tmp_path / "train-steps-results.json").write_text(json.dumps(message))
        part.commands.append("python -m benchmarks.compare")
        part.state = "done"
        assert hidden[0] == "--time-limit" and "--resume" in words

    monkeypatch.setattr(gpu_parts.Part, "run", run)
    about = {"date": "2026-11-29", "versions": "jax 0.11", "device": "H200"}
    part = gpu_parts.Part(tmp_path, "train-steps", time.monotonic() + 100, about)
    with part.log:
        part.save(gpu.section_of(part, sys.executable), part.state)
    record = gpu_parts.read_record(tmp_path, "train-steps")
    assert record["state"] == "cut off", "it ended well, but without some of the sides"
    page = gpu.page({"train-steps": record})
    assert page.startswith("# On one H200\n\n2026-11-29.\njax 0.11.\n") and "Cut off by the time limit" in page
    assert "## Train steps\n" in page and "| ours | 1000.00M | 0.25 |" in page
    assert "\npython -m benchmarks.compare\n" in page


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A GPU of the imagination: the folder OUT, and a list of the commands; `fate` says how each one ends.

    costs: the seconds that commands take, by words of theirs, on a clock of its own. Comparisons and trainings that are
    cut off are done with so much of it.
    """

    class Machine:
        out, root, commands, fate, costs, now = tmp_path / "out", tmp_path, [], {}, {}, 0.0

        def spend(self, text, most):
            word = next((word for word in self.costs if word in text), None)
            spent = min(most, self.costs.get(word, 0.0))
            self.now += spent
            whole = spent == self.costs.get(word, 0.0)
            if not whole and "pytest" not in text:
                self.costs[word] -= spent
            return 0 if whole else None

        def call(self, *words):
            self.commands.clear()
            assert gpu.main([str(self.out), *words]) == 0
            return {name: gpu_parts.read_record(self.out, name).get("state", "not begun") for name in gpu_parts.SHARES}

    machine = Machine()

    def run(part, *words, env=None, hidden=(), seconds=None):
        text = " ".join(words)
        machine.commands.append(text)
        part.note(words, env)
        part.printed_from = (machine.out / f"{part.name}.log").stat().st_size
        most = part.left() if seconds is None else min(part.left(), seconds)
        status = next((status for word, status in machine.fate.items() if word in text), machine.spend(text, most))
        part.state = "cut off" if status is None else "failed" if status else "done"
        part.log.write("one: 1.0e-05\n6 passed\n")
        part.log.flush()
        if "benchmarks.compare" in words:
            message = {"settings": SETTINGS, "finished": status == 0, "results": [RESULT]}
            (machine.out / f"{part.name}-results.json").write_text(json.dumps(message))
        if "train" in words:
            run = machine.root / "runs" / words[words.index("--run") + 1]
            for stage in ("clip", "prior", "decoder", "upsampler"):
                (run / stage).mkdir(parents=True, exist_ok=True)
                (run / stage / "speed.jsonl").write_text('{"step": 60, "seconds_per_step": 0.1}\n')
        if "evaluate" in words:
            (machine.root / words[-1] / "samples.png").write_text("an image")
        return status

    monkeypatch.setattr(gpu_parts.Part, "run", run)
    monkeypatch.setattr(gpu_parts, "ROOT", machine.root)
    monkeypatch.setattr(gpu, "ROOT", machine.root)
    monkeypatch.setattr(gpu, "device", lambda: "NVIDIA H200")
    for module in (gpu, gpu_parts):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: machine.now))
    return machine


def test_a_call_takes_up_what_another_left(machine):
    machine.fate = {"train-steps-results": None, "gpu-emoji": None, "configs/shapes_large.py": 1}
    assert machine.call() == {
        "train-steps": "cut off",
        "generation": "done",
        "parity": "done",
        "demo": "failed",
        "emoji": "cut off",
    }
    steps = [command for command in machine.commands if "--run gpu-emoji" in command]
    assert "clip.steps=" in steps[0] and "Failed" in (machine.out / "gpu.md").read_text()
    kept = machine.root / "runs" / "gpu-emoji" / "kept"
    kept.touch()
    machine.fate = {}
    assert set(machine.call("--minutes", "50").values()) == {"done"}
    assert kept.exists(), "training goes on in the same folder"
    assert not any("generate-karlo" in command or "tests/parity" in command for command in machine.commands)
    assert not any("gpu-probe" in command for command in machine.commands)
    assert [command for command in machine.commands if "--run gpu-emoji" in command] == steps, "as chosen at first"
    page = (machine.out / "gpu.md").read_text()
    assert page.index("## Train steps") < page.index("## Parity") < page.index("## Demo") < page.index("## Emoji")
    assert "| decoder | 60 | 100.0 |" in page and "![images of held-out captions](emoji_samples.png)" in page
    assert (machine.out / "emoji_samples.png").exists() and "Compiled programs take" in page
    assert "Cut off" not in page and "Failed" not in page and str(machine.root) not in page
    assert set(machine.call().values()) == {"done"} and machine.commands == []


def test_three_calls_of_nine_minutes_do_all_of_it(machine):
    machine.costs = {"--cases clip-b16": 520, "generate-karlo": 270, "-k bfloat16": 60}
    machine.costs |= {"not bfloat16": 80, "test_full_size": 50, "configs/shapes_large.py": 240, "evaluate": 40}
    machine.costs |= {"gpu-probe": 70, "gpu-emoji": 120}
    calls = [machine.call("--minutes", "9") for _ in range(3)]
    assert calls[0]["train-steps"] == "done" and calls[0]["generation"] == "not begun"
    assert calls[1]["generation"] == "done" and set(calls[2].values()) == {"done"}
    assert machine.now < 3 * 9 * 60


def test_a_fresh_start(machine):
    machine.call()
    kept = machine.root / "runs" / "gpu-demo" / "kept"
    kept.touch()
    machine.call("--parts", "demo", "--fresh")
    assert not kept.exists() and len(machine.commands) == 2
    assert "## Emoji" in (machine.out / "gpu.md").read_text(), "the page has the others still"


def test_parts_that_there_is_no_time_for_wait(machine, capsys):
    assert set(machine.call("--minutes", "0.5").values()) == {"not begun"} and not (machine.out / "gpu.md").exists()
    assert "for another call: train-steps, generation, parity, demo, emoji\n" in capsys.readouterr().out


def test_a_part_that_raises_has_failed_and_the_others_go_on(machine, monkeypatch):
    def broken(part, peers):
        raise KeyError("seconds_per_step")

    monkeypatch.setitem(gpu_parts.SECTIONS, "demo", broken)
    states = machine.call()
    assert states.pop("demo") == "failed" and set(states.values()) == {"done"}
    assert "**Failed:** KeyError: 'seconds_per_step'" in (machine.out / "gpu.md").read_text()


def test_parity_goes_on_with_the_tests_that_it_lacks(machine):
    machine.fate = {"not bfloat16": None, "test_glide": 1}
    assert machine.call("--parts", "parity")["parity"] == "cut off"
    assert len(machine.commands) == 2 and "-k bfloat16" in machine.commands[0]
    del machine.fate["not bfloat16"]
    assert machine.call("--parts", "parity")["parity"] == "done"
    assert len(machine.commands) == 1 + len(gpu_parts.FULL_SIZE) and "-k not bfloat16" in machine.commands[0]
    section = gpu_parts.read_record(machine.out, "parity")["section"]
    assert "Bfloat16, small networks:" in section and section.count("6 passed") == 2 + len(gpu_parts.FULL_SIZE)


def test_compiled_programs_travel_in_a_file_of_bounded_size(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    for folder in (out, other):
        folder.mkdir()
        gpu_cache.unpack(folder)
    for name, size in (("jax/tuning/kernel", 10), ("jax/step", 600), ("torch/graph", 300)):
        (out / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (out / "cache" / name).write_bytes(bytes(size))
    gpu_cache.pack(out, 400)
    assert "Compiled programs take 0.0 MiB in `cache`, of which `cache.tar.gz` has" in gpu_cache.sizes(out)
    (out / "cache.tar.gz").rename(other / "cache.tar.gz")
    (other / "cache").rmdir()
    gpu_cache.unpack(other)
    found = {str(path.relative_to(other / "cache")): size for path, size in gpu_cache.files(other / "cache")}
    assert found == {"jax/tuning/kernel": 10, "torch/graph": 300}
    gpu_cache.pack(other, 0)
    assert not (other / "cache.tar.gz").exists()


def test_the_emoji_take_the_fields_that_the_script_sets():
    system = emoji_large.system()
    words = [f"{stage}.{field}=60" for stage in system.stages for field in ("steps", "log_every", "preview_every")]
    assert all(recipe.steps == 60 for recipe in apply_overrides(system, words).stages.values())


@pytest.mark.parametrize(("words", "said"), [(["OUT", "--parts", "all"], "no part 'all'"), (["OUT"], "finds no GPU")])
def test_what_cannot_start(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gpu.main(words) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
