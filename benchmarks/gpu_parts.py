"""The parts of `benchmarks.gpu`: what each of them runs, and the section that it gives for the page."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, caches
from benchmarks.table import markdown
from dalle2_jax.checkpoint.files import write_atomically

# Minutes of each part, in the order of the page.
SHARES = {"train-steps": 8, "generation": 4, "parity": 3, "demo": 5, "emoji": 5}
# The cases of a comparison, and the steps of each.
COMPARISONS = {"train-steps": ("clip-b16,prior-1b,decoder-1b", 10), "generation": ("generate-karlo", 5)}
PEER_SIDES = "ours,diffusers,diffusers-compiled,transformers,transformers-compiled"
# Steps by which a stage's speed is measured; the first of their intervals compiles.
PROBE_STEPS, PROBE_INTERVAL = 60, 20
# Beside a stage's steps: to read the data, compile, validate and save, in seconds; and to evaluate the run.
STAGE_OVERHEAD, EVALUATION = 25.0, 60.0
# Seconds in which a command that is sent a signal may save what it has.
PATIENCE = 20.0
PARITY = {
    "bfloat16, small networks": ("-k", "bfloat16", "-m", "not live"),
    "float32, small networks": ("-k", "not bfloat16", "-m", "not slow and not live"),
}
# In float32, each for as long as the part's own minutes last.
FULL_SIZE = (
    "test_clip",
    "test_karlo_prior",
    "test_karlo_decoder",
    "test_glide",
    "test_karlo_text_encoder",
    "test_karlo_super_resolution",
    "test_karlo_draws_diffusers_image",
)
PARITY_ENVIRONMENT = {
    "JAX_PLATFORMS": "cuda,cpu",
    # Float32 is compared with float32: not with the TF32 that a GPU would take for it.
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    # Else the tests turn the compiler's optimisation off.
    "XLA_FLAGS": "--xla_backend_optimization_level=3",
}
LEAST_FOR_A_TEST = 45.0


def read_record(out: Path, name: str) -> dict[str, Any]:
    """What OUT/NAME.json says of a part; empty if it has not been begun."""
    path = out / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class Part:
    """Runs the commands of one part until its deadline, and records in OUT/NAME.json what it has come to.

    state: how the last command ended: "done", "cut off" by the deadline, or "failed"; a part that is not done is taken
    again. kept: what it must know then. begun: whether it is taken again now. about: what the record says beside.
    minutes: its own; the deadline may be later by what others left over.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        deadline: float,
        about: Mapping[str, Any] | None = None,
        minutes: float | None = None,
    ) -> None:
        self.out, self.name, self.deadline, self.about = out, name, deadline, dict(about or {})
        self.minutes = SHARES[name] if minutes is None else minutes
        self.started, self.state = time.monotonic(), "cut off"
        record = read_record(out, name)
        self.begun = bool(record)
        self.commands: list[str] = record.get("commands", [])
        self.kept: dict[str, Any] = record.get("kept", {})
        self.section: list[str] = record.get("section", [])
        self.seconds_before: float = record.get("seconds", 0.0)
        self.log = open(out / f"{name}.log", "a", encoding="utf-8")
        self.printed_from = 0

    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())

    def own_left(self) -> float:
        """Seconds until the part's own minutes are over, without what earlier parts left over."""
        return max(0.0, min(self.left(), self.started + 60 * self.minutes - time.monotonic()))

    def save(self, section: Sequence[str] | None = None, state: str = "cut off") -> None:
        """Writes the record, so that a call that is ended at any moment can be taken up."""
        self.section = self.section if section is None else list(section)
        record = {
            "part": self.name,
            "state": state,
            "seconds": round(self.seconds_before + time.monotonic() - self.started, 1),
            **self.about,
            "commands": self.commands,
            "kept": self.kept,
            "section": self.section,
        }
        write_atomically(self.out / f"{self.name}.json", json.dumps(record, indent=1) + "\n")

    def run(
        self,
        *words: str,
        env: Mapping[str, str] | None = None,
        hidden: Sequence[str] = (),
        seconds: float | None = None,
    ) -> int | None:
        """A command's exit status; None if the deadline came first: it is then sent a signal, or killed.

        hidden: further words, which the page does not show. seconds: an earlier deadline.
        """
        self.note(words, env)
        self.log.write(f"$ {' '.join(('python', *words, *hidden))}\n")
        self.log.flush()
        self.printed_from = os.path.getsize(self.log.name)
        process = subprocess.Popen(
            [sys.executable, *words, *hidden],
            cwd=ROOT,
            env={**os.environ, **caches(self.out / "cache"), **(env or {})},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status = None
        try:
            status = process.wait(self.left() if seconds is None else min(self.left(), seconds))
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                _end(process)
        self.state = "cut off" if status is None else "failed" if status else "done"
        return status

    def note(self, words: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Has the page show a command, once, and without this machine's paths."""
        shown = [f"{name}={shlex.quote(value)}" for name, value in (env or {}).items()] + ["python"]
        for word in words:
            word = "python" if word == sys.executable else word.replace(str(self.out), "OUT")
            shown.append(shlex.quote(Path(word).name if os.path.isabs(word) else word))
        if " ".join(shown) not in self.commands:
            self.commands.append(" ".join(shown))

    def printed(self) -> list[str]:
        """The lines that the last command printed."""
        with open(self.log.name, "rb") as log:
            log.seek(self.printed_from)
            return log.read().decode("utf-8", "replace").splitlines()

    def ending(self) -> list[str]:
        """How the last command ended, for the page; nothing if well."""
        if self.state == "cut off":
            return ["**Cut off by the time limit; another call goes on from here.**", ""]
        if self.state == "failed":
            return ["**Failed.** Its last lines:", "", "```", *self.printed()[-5:], "```", ""]
        return []


def _end(process: subprocess.Popen) -> None:
    """Tells a process and all that it started to stop, and kills what has not stopped after `PATIENCE`."""
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def comparison(part: Part, peers: str) -> list[str]:
    """The comparison's table, of as many sides and cases as there was time for; goes on with those that it lacks."""
    cases, reps = COMPARISONS[part.name]
    found = part.out / f"{part.name}-results.json"
    part.run(
        *("-m", "benchmarks.compare", "--device", "cuda", "--cases", cases, "--sides", PEER_SIDES),
        *("--measure", "train_step", "--rounds", "1", "--reps", str(reps), "--peers", peers),
        *("--cache", str(part.out / "cache"), "--out", str(found), "--resume"),
        # It ends by itself a little before the part does.
        hidden=("--time-limit", f"{max(1.0, part.left() - 5):.0f}"),
    )
    report = json.loads(found.read_text(encoding="utf-8")) if found.exists() else None
    if part.state == "done" and not (report and report["finished"]):
        part.state = "cut off"
    return [*part.ending(), *([markdown(report["settings"], report["results"])] if report else [])]


def parity(part: Part, peers: str) -> list[str]:
    """The differences that the parity tests print: all at small sizes, then those at the published sizes.

    Of the latter as many as the part's own minutes allow; it is done without the rest.
    """
    seen = part.kept.setdefault("tests", {})
    pytest = ("-q", "-s", "-p", "no:cacheprovider")
    for name, words in PARITY.items():
        if name not in seen:
            status = part.run("-m", "pytest", "tests/parity", *words, *pytest, env=PARITY_ENVIRONMENT)
            if status not in (0, 1):  # 1: some tests failed, and it says which
                return [*part.ending(), *_test_sections(seen)]
            seen[name] = _test_lines(part.printed())
            part.save()
    missed = []
    for test in FULL_SIZE:
        name = f"float32, published sizes: {test}"
        status = None
        if name not in seen and part.own_left() > LEAST_FOR_A_TEST:
            words = (f"tests/parity/test_full_size.py::{test}", *pytest)
            status = part.run("-m", "pytest", *words, env=PARITY_ENVIRONMENT, seconds=part.own_left())
        if status in (0, 1):
            seen[name] = _test_lines(part.printed())
            part.save()
        elif name not in seen:
            missed.append(test)
    part.state = "done"
    return _test_sections(seen) + ([f"Not reached: {', '.join(missed)}"] if missed else [])


def _test_lines(printed: Sequence[str]) -> list[str]:
    """What tests print with -s of the differences that they see, what failed, and pytest's last line."""
    kept = [line.lstrip(".") for line in printed if line.startswith(("FAILED", "ERROR")) or ": " in line]
    return [*kept[-80:], *printed[-1:]]


def _test_sections(seen: Mapping[str, Sequence[str]]) -> list[str]:
    lines: list[str] = []
    for name, printed in seen.items():
        lines += [f"{name.capitalize()}:", "", "```", *printed, "```", ""]
    return lines


def demo(part: Part, peers: str) -> list[str]:
    """What `make demo` does after its set-up: trains the whole cascade on shapes and evaluates it, with its time."""
    run = ROOT / "runs" / "gpu-demo"
    if not part.begun:
        shutil.rmtree(run, ignore_errors=True)
    if not run.exists():
        part.kept.clear()
    part.save()
    status = _timed(part, "training", "-m", "train", "configs/shapes_large.py", "all", "--run", run.name)
    if status == 0:
        status = _timed(part, "evaluation", "-m", "dalle2_jax.cli", "evaluate", f"runs/{run.name}")
    return [*part.ending(), *_run_lines(part, run, evaluated=status == 0)]


def emoji(part: Part, peers: str) -> list[str]:
    """Trains and evaluates the emoji; each stage has the same share of its steps, as many as there is time for.

    The steps are chosen once, so that training goes on by itself where it was cut off.
    """
    from configs.emoji_large import system

    run, probe = ROOT / "runs" / "gpu-emoji", ROOT / "runs" / "gpu-probe"
    if not part.begun:
        for folder in (run, probe):
            shutil.rmtree(folder, ignore_errors=True)
    part.save()
    whole = {name: recipe.steps for name, recipe in system().stages.items()}
    if "steps" not in part.kept:
        fields = {"steps": PROBE_STEPS, "log_every": PROBE_INTERVAL, "preview_every": 0}
        words = [f"{stage}.{field}={value}" for stage in whole for field, value in fields.items()]
        if part.run("-m", "train", "configs/emoji_large.py", "all", "--run", probe.name, *words) != 0:
            return part.ending()
        speeds = {stage: _seconds_a_step(probe / stage) for stage in whole}
        # With little of it left now, another call has the part's own minutes.
        nominal = 60 * part.minutes
        seconds = part.left() if part.left() > nominal / 2 else nominal
        share = share_of_steps(whole, speeds, seconds - EVALUATION)
        chosen = [f"{stage}.steps={max(PROBE_STEPS, round(share * count))}" for stage, count in whole.items()]
        part.kept |= {"share": share, "steps": chosen if share < 1 else []}
        part.save()
    if not run.exists():
        part.kept.pop("seconds", None)
    status = _timed(
        part, "training", "-m", "train", "configs/emoji_large.py", "all", "--run", run.name, *part.kept["steps"]
    )
    if status == 0:
        status = _timed(part, "evaluation", "-m", "dalle2_jax.cli", "evaluate", f"runs/{run.name}")
    lines = [f"Each stage was given {part.kept['share']:.0%} of its steps.", "", *part.ending()]
    return lines + _run_lines(part, run, evaluated=status == 0)


SECTIONS = {"train-steps": comparison, "generation": comparison, "parity": parity, "demo": demo, "emoji": emoji}


def _timed(part: Part, what: str, *words: str) -> int | None:
    """A command of a part, whose seconds are kept, with those of earlier calls."""
    began = time.monotonic()
    status = part.run(*words)
    seconds = part.kept.setdefault("seconds", {})
    seconds[what] = round(seconds.get(what, 0.0) + time.monotonic() - began, 1)
    part.save()
    return status


def _run_lines(part: Part, run: Path, evaluated: bool) -> list[str]:
    """A run's times, its stages' steps and, once it is evaluated, its report; copies its images beside the page."""
    seconds = part.kept.get("seconds", {})
    lines = [", ".join(f"{what} {spent:.0f} s" for what, spent in seconds.items()).capitalize() + ".", ""]
    lines += ["| stage | steps | ms a step |", "| --- | ---: | ---: |"]
    for stage in sorted(run.glob("*/speed.jsonl"), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(IndexError):  # it has no line yet
            last = json.loads(stage.read_text(encoding="utf-8").splitlines()[-1])
            lines.append(f"| {stage.parent.name} | {last['step']} | {1000 * last['seconds_per_step']:.1f} |")
    if not evaluated:
        previews = sorted(run.glob("*/samples/*.png"), key=lambda path: path.stat().st_mtime)
        if previews:
            shutil.copy(previews[-1], part.out / f"{part.name}_preview.png")
            lines += ["", f"![the last preview, of {previews[-1].parts[-3]}]({part.name}_preview.png)"]
        return lines
    lines += ["", "```", *part.printed()[-30:], "```"]
    for name in ("samples.png", "report.json"):
        if (run / name).exists():
            shutil.copy(run / name, part.out / f"{part.name}_{name}")
    return [*lines, "", f"![images of held-out captions]({part.name}_samples.png)"]


def _seconds_a_step(stage: Path) -> float:
    """Of a stage's last interval."""
    return json.loads((stage / "speed.jsonl").read_text(encoding="utf-8").splitlines()[-1])["seconds_per_step"]


def share_of_steps(steps: Mapping[str, int], seconds_a_step: Mapping[str, float], seconds: float) -> float:
    """The share of all stages' steps, 0 to 1, that can be trained within `seconds`."""
    needed = sum(count * seconds_a_step[stage] for stage, count in steps.items())
    return max(0.0, min(1.0, (seconds - STAGE_OVERHEAD * len(steps)) / needed))
